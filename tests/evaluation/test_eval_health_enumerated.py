"""Every check of the checklist has a test that makes it fire, and one that does not.

Oracle: the checklist's names, and the findings that the named tests really make.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest

from feint.evaluation.checklist import CHECKS
from feint.evaluation.findings import Finding
from tests.evaluation import test_eval_budget as budget
from tests.evaluation import test_eval_health_cells as cells
from tests.evaluation import test_eval_health_costly as costly
from tests.evaluation import test_eval_health_more as more
from tests.evaluation import test_eval_health_pipelines as pipelines
from tests.evaluation import test_eval_results as results
from tests.tiny import LinearModel

Test = Callable[..., None]

HONEST = cells.test_an_honest_evaluation_passes_everything
"""Silent for most; `SILENT` names another where it does not meet the check."""

FIRES: dict[str, Test] = {
    "input-and-mode": more.test_images_outside_of_the_box_and_a_dropout_that_is_on,
    "outputs-are-logits": pipelines.test_probabilities,
    "declared-randomness": pipelines.test_declared_but_not_random,
    "undeclared-randomness": pipelines.test_keyed_randomness_that_is_not_declared,
    "unkeyed-randomness": pipelines.test_unkeyed_randomness,
    "batch-independence": pipelines.test_batch_normalisation_in_training_mode,
    "static-state": pipelines.test_a_model_that_adapts,
    "static-process": pipelines.test_undeclared_randomness_unwrapped,
    "differentiable-parts": pipelines.test_a_cut_graph_names_its_module,
    "stand-in-fidelity": pipelines.test_a_misleading_rule,
    "view-is-exact": pipelines.test_another_pipeline_is_attacked_than_judged,
    "zero-gradient": pipelines.test_a_cut_graph_names_its_module,
    "loss-is-alive": more.test_a_temperature_comes_to_light,
    "gradient-is-useful": pipelines.test_a_misleading_rule,
    "gradient-foretells": more.test_slopes_by_size,
    "stable-loss": more.test_an_unstable_loss,
    "eot-signal": more.test_noise_that_drowns_the_gradient_only_matters_where_something_stands,
    "attack-moves": cells.test_an_attack_that_does_not_move,
    "budget-and-box": cells.test_a_box_that_is_left,
    "survives-8-bit": cells.test_a_perturbation_below_half_a_level_does_not_survive_8_bits,
    "silent-success": more.test_silent_successes,
    "single-draw-luck": cells.test_single_draw_luck,
    "transfer-failure": more.test_surrogates_that_fall_in_vain,
    "loss-has-settled": cells.test_a_loss_that_still_rises,
    "successes-have-settled": more.test_successes_that_still_come,
    "votes": more.test_what_votes_would_change,
    "judged-on-fresh-draws": more.test_a_random_pipeline_needs_several_draws,
    "threat-model-card": more.test_a_card_without_a_budget,
    "clean-accuracy": more.test_clean_accuracy,
    "undefended-falls": more.test_an_attack_too_weak_for_the_bare_model,
    "white-box-is-strongest": cells.test_scores_that_beat_a_masked_gradient,
    "knowledge-helps": more.test_knowledge_that_does_not_help,
    "monotone-in-eps": results.test_a_curve_that_rises,
    "worst-case-per-sample": more.test_a_bound_that_is_a_mean,
    "same-samples": more.test_other_samples,
    "invariance": more.test_a_defense_that_nobody_notices,
    "random-does-not-win": cells.test_random_points_that_beat_a_masked_gradient,
    "iterative-beats-single": more.test_one_step_that_beats_many,
    "zero-budget": cells.test_a_pipeline_that_changed_since_its_clean_cell,
    "large-budget-breaks": more.test_a_budget_without_limits,
    "more-steps-do-not-help": cells.test_more_steps_that_help,
    "gradients-along-the-path": more.test_gradients_that_vanish_on_the_way,
    "attack-batch-invariance": more.test_an_attack_that_sees_the_batch,
    "logit-shift": more.test_an_attack_that_sees_a_shift,
    "logit-scale": more.test_a_temperature_comes_to_light,
    "more-restarts-do-not-help": costly.test_more_restarts,
    "more-draws-do-not-help": costly.test_more_draws,
    "loss-disagreement": costly.test_losses_that_disagree,
    "black-box-does-not-win": costly.test_a_black_box_that_wins,
    "frozen-randomness": costly.test_frozen_randomness,
    "equal-budget": costly.test_equal_budget,
    "stand-in-on-undefended": costly.test_a_stand_in_that_does_not_attack_the_bare_model,
    "binarisation": costly.test_binarisation_catches_a_masked_gradient,
    "known-broken-controls": costly.test_controls,
    "rerun-agrees": costly.test_a_rerun_that_comes_out_otherwise,
    "cost-of-checks": budget.test_a_backward_pass_counts_as_two,
    "one-environment": more.test_another_machine,
}


def _found_by_an_honest_attack() -> None:
    costly.test_binarisation_is_passed_by_an_honest_attack(LinearModel())


_OWN = {name: FIRES[name] for name, check in CHECKS.items() if check.cost == "costly"}
SILENT: dict[str, Test] = _OWN | {
    "stand-in-fidelity": costly.test_a_stand_in_that_does_not_attack_the_bare_model,
    "eot-signal": more.test_noise_that_drowns_the_gradient_only_matters_where_something_stands,
    "single-draw-luck": cells.test_no_luck_where_the_attack_holds_on_all_draws,
    "transfer-failure": more.test_surrogates_that_fall_in_vain,
    "votes": more.test_what_votes_would_change,
    "judged-on-fresh-draws": more.test_a_random_pipeline_needs_several_draws,
    "undefended-falls": more.test_an_attack_too_weak_for_the_bare_model,
    "white-box-is-strongest": cells.test_scores_that_beat_a_masked_gradient,
    "knowledge-helps": more.test_knowledge_that_does_not_help,
    "monotone-in-eps": results.test_a_curve_that_rises,
    "invariance": more.test_a_defense_that_nobody_notices,
    "binarisation": _found_by_an_honest_attack,
    "one-environment": more.test_another_machine,
}
ABSENT = ("undeclared-randomness", "unkeyed-randomness")
"""What is no finding at all where nothing is wrong."""


@cache
def made(test: Test) -> frozenset[tuple[str, str]]:
    """Checks and statuses of the findings that come up while a test runs."""
    seen: set[tuple[str, str]] = set()
    real = Finding.__post_init__

    def note(finding: Finding) -> None:
        real(finding)
        seen.add((finding.check, finding.status if finding.made else "not made"))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Finding, "__post_init__", note)
        wanted = inspect.signature(test).parameters
        fixtures: dict[str, Any] = {"monkeypatch": patch} if "monkeypatch" in wanted else {}
        test(**fixtures)
    return frozenset(seen)


def test_the_table_is_the_checklist() -> None:
    assert set(FIRES) == set(CHECKS)
    assert set(SILENT) <= set(CHECKS)


@pytest.mark.parametrize("check", CHECKS)
def test_every_check_fires(check: str) -> None:
    assert made(FIRES[check]) & {(check, "warn"), (check, "fail")}


@pytest.mark.parametrize("check", CHECKS)
def test_every_check_can_be_silent(check: str) -> None:
    found = made(SILENT.get(check, HONEST))
    if check in ABSENT:
        assert not {status for name, status in found if name == check}
    else:
        assert (check, "pass") in found
