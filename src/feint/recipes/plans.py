"""Plans: what `feint evaluate` computes, as a run's plain data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from feint.core import spec
from feint.core.checks import check_eps
from feint.core.errors import ConfigError
from feint.core.norms import check_norm
from feint.data import load
from feint.defenses import parse
from feint.evaluation import SCENARIOS, Cell, expand
from feint.evaluation.attackers import parse_attack
from feint.evaluation.budgets import rms_budget
from feint.evaluation.rungs import QUERIES, ROUNDS, basic_attacks, white_box_cells
from feint.evaluation.scenarios import get_scenario
from feint.store import DataSpec, Published, RunSpec

__all__ = ["DEFAULT_ATTACKS", "DEFAULT_SCENARIOS", "plan", "story"]

DEFAULT_ATTACKS = "pgd, pgd(loss='margin')"
DEFAULT_SCENARIOS = "none, gray-box, white-box"
_MANY = 1 << 14
"""A side that no image exceeds."""


def plan(
    model: str,
    *,
    data: DataSpec,
    defense: str = "none",
    attacks: str = DEFAULT_ATTACKS,
    scenarios: str = DEFAULT_SCENARIOS,
    source: str = "",
    norm: str = "linf",
    eps: float = 8 / 255,
    curve: Sequence[float] = (),
    targeted: bool = False,
    backward: str = "default",
    votes: int = 1,
    combine: str = "mean_probability",
    judge_draws: int = 32,
    seed: int = 0,
    queries: int = QUERIES,
    steps: int = 40,
    rounds: int = ROUNDS,
    **options: Any,
) -> RunSpec:
    """One pipeline against attackers, the bare model beside it.

    The scenario `"all"` is the whole ladder: every scenario, white-box with each backward rule that
    the defense declares (BPDA), over draws (EOT), and both.

    Args:
        model: Model spec.
        data: The samples.
        defense: Defense expression, or `"none"`.
        attacks: Attack expressions, separated by commas; each goes to the scenarios whose attacker
            can make it (`feint.evaluation.rungs`).
        scenarios: Scenario names, separated by commas, or `"all"`.
        source: Model spec that `"transfer"` attacks; several are separated by commas. For a bundled
            model `"all"` takes a bundled twin by default.
        norm: The threat model's norm, or `"rms"` for S1's: l2 with eps·√(C·H·W).
        eps: The threat model's budget.
        curve: Further budgets, at which the white-box cells are computed too.
        targeted: Whether the data's targets are the attacker's goal.
        backward: Backward rule for the defense; more, separated by commas, are tried one by one
            in the scenarios that go through the defense.
        votes: Draws per prediction of the deployed pipeline.
        combine: How votes are combined.
        judge_draws: Held-out draws per sample.
        seed: Seed of every draw.
        queries: Queries per sample of the black-box attackers.
        steps: Steps of the adaptive attackers.
        rounds: Rounds of the semi-brute force.
        **options: Other fields of `RunSpec`.

    Raises:
        ConfigError, UnknownNameError: On anything that cannot be run; nothing was computed yet.
    """
    budgets = (eps, *curve)
    if norm == "rms":
        shape = load(**data.model_dump()).shape
        norm, budgets = "l2", tuple(rms_budget(b, shape) for b in budgets)
    check_norm(norm)
    for budget in budgets:
        # How many pixels or values there are is known, and checked, when the data are there.
        check_eps(budget, norm, () if norm == "linf" else (1, 1, _MANY, _MANY))
    chain = parse(defense)  # canonical text, so that the same defense has the same address
    expressions = [str(term) for term in spec.parse_list(attacks)]
    if attacks == DEFAULT_ATTACKS:
        expressions = basic_attacks(norm)
    for expression in expressions:
        parse_attack(expression)
    rules = [r.strip() for r in backward.split(",")]
    names = [n.strip() for n in scenarios.split(",") if n.strip()]
    everything = names == ["all"]
    if everything:
        source = source or _twin(model)
        names = [n for n in SCENARIOS if n != "transfer" or source]
        if norm in ("l1", "l0"):
            names.remove("decision")  # no attack on decisions has these norms
    for name in names:
        get_scenario(name)
    if source and "transfer" not in names:
        raise ConfigError("--source is only used by the scenario 'transfer'; add it to --scenario")
    if "transfer" in names and not source:
        raise ConfigError("scenario 'transfer' needs a source model; give --source SPEC")
    base = Cell(
        "none",
        model,
        str(chain),
        norm=norm,
        eps=budgets[0],
        targeted=targeted,
        backward=rules[0],
        votes=votes,
        combine=combine,
        judge_draws=judge_draws,
        seed=seed,
    )
    given: dict[str, Any] = {
        "source": [s.strip() for s in source.split(",") if s.strip()],
        "defense": None if str(chain) == "none" else chain,
        "queries": queries,
        "steps": steps,
        "rounds": rounds,
    }
    through = everything and rules == ["default"]
    first = [n for n in names if not (through and n in ("white-box", "adaptive"))]
    cells = expand(base, expressions, first, **given)
    if through:
        cells += white_box_cells(base, expressions, given["defense"])
        cells += expand(base, expressions, ["adaptive"], undefended=False, **given)
    for other in budgets[1:]:
        more = expand(
            replace(base, eps=other),
            expressions[:1],
            [n for n in names if n in ("gray-box", "white-box")],
            undefended=False,
            **given,
        )
        cells += [c for c in more if c.attack != "none"]
    knowing = [n for n in names if n in ("removal", "white-box")]
    for rule in rules[1:]:
        ruled = replace(base, backward=rule)
        more = expand(ruled, expressions, knowing, undefended=False, **given)
        cells += [c for c in more if c.attack != "none"]
    title = options.pop("title", model if str(chain) == "none" else f"{model} + {chain}")
    return RunSpec(title=title, data=data, cells=tuple(dict.fromkeys(cells)), **options)


def _twin(model: str) -> str:
    """Another bundled classifier of the same images, to transfer from; none for other models."""
    if not model.startswith("bundled:"):
        return ""
    plain, other = "bundled:cifar10-resnet20", "bundled:cifar10-resnet20-ace100"
    return plain if model != plain else other


def story(data: DataSpec, *, seed: int = 0, judge_draws: int = 32, **options: Any) -> RunSpec:
    """S0's story on the bundled models: the published number, and what is left of it.

    ACE with λ=100 and a one-pixel shift under S0's own PGD (which does not know of the shift), a
    sign PGD that does not know either, and attackers who know: through the fixed shift, and over
    the random shift's eight neighbours. A plain and an adversarially trained classifier frame it.
    """
    ours = "pgd(preset='ace', step_size=0.2257, steps=100)"
    sign = "pgd"
    ace, plain, robust = (f"bundled:cifar10-resnet20{suffix}" for suffix in ("-ace100", "", "-at"))
    shift, roam = "pixel_shift", "pixel_shift(random=True)"

    def cell(scenario: str, model: str, defense: str = "none", attack: str = "none") -> Cell:
        return Cell(scenario, model, defense, attack, seed=seed, judge_draws=judge_draws)

    cells = [
        cell("none", plain),
        cell("white-box", plain, attack=sign),
        cell("none", ace),
        cell("white-box", ace, attack=ours),
        cell("white-box", ace, attack=sign),
        cell("none", ace, shift),
        cell("gray-box", ace, shift, ours),
        cell("gray-box", ace, shift, sign),
        cell("white-box", ace, shift, sign),
        cell("none", ace, roam),
        cell("gray-box", ace, roam, ours),
        cell("white-box", ace, roam, "pgd(steps=20, stop='success')"),
        cell("none", robust),
        cell("white-box", robust, attack=sign),
        cell("white-box", robust, attack="pgd(loss='margin')"),
    ]
    # Further budgets, for accuracy against eps; small ones are where the curves differ.
    cells += [
        replace(cell("white-box", ace, shift, sign), eps=1 / 255),
        replace(cell("white-box", ace, shift, sign), eps=2 / 255),
        replace(cell("white-box", robust, attack=sign), eps=4 / 255),
    ]
    claim = Published(
        label="defense success",
        value=0.983,
        source="ACE, Table 3: ResNet-18, λ=100, PGD",
    )
    return RunSpec(
        title="ACE and its one-pixel shift: the claim, and what is left of it",
        data=data,
        cells=tuple(cells),
        published={6: claim},
        **options,
    )
