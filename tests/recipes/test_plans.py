"""Plans. Oracle: the definitions of the scenarios, and what the design asks of the default run."""

from __future__ import annotations

from typing import Any

import pytest

from feint.core.errors import ConfigError, FeintError, RangeError
from feint.evaluation.attackers import parse_attack
from feint.recipes.plans import plan, story
from feint.store import DataSpec, RunSpec

DATA = DataSpec(samples=10)


def test_story_tells_claim_reproduction_and_adaptive_attacks() -> None:
    spec = story(DATA)
    ((position, claim),) = spec.published.items()
    cell = spec.cells[position]
    assert (cell.scenario, cell.defense) == ("gray-box", "pixel_shift")
    assert "ace" in cell.attack
    assert claim.value == 0.983
    main = [c for c in spec.cells if c.eps == 8 / 255]
    knowing = {c.defense for c in main if c.scenario == "white-box"}
    assert {"none", "pixel_shift", "pixel_shift(random=True)"} <= knowing
    assert spec.cells[1].eps == 8 / 255  # the first attack's budget is the main one


def test_story_takes_the_original_attack_at_equal_length() -> None:
    text = next(c.attack for c in story(DATA).cells if "ace" in c.attack)
    attack = parse_attack(text)
    length = attack.effective("steps") * attack.effective("step_size")
    assert length == pytest.approx(1000 * 0.1 * 0.2257)  # S0: 1000 steps of 0.1, std 0.2257
    assert attack.effective("direction") == "gradient"
    assert attack.effective("eps") == 0.031


def test_plan_expands_scenarios_rules_and_budgets() -> None:
    spec = plan(
        "net.py:f",
        data=DATA,
        defense="fd",
        attacks="pgd, fgsm",
        backward="default, identity",
        eps=8 / 255,
        curve=(4 / 255,),
    )
    rows = [(c.scenario, c.defense, c.attack, c.backward, c.eps) for c in spec.cells]
    assert len(rows) == len(set(rows))
    assert rows[0] == ("none", "none", "none", "default", 8 / 255)
    assert ("gray-box", "fd", "fgsm", "default", 8 / 255) in rows
    assert ("white-box", "fd", "pgd", "identity", 8 / 255) in rows
    assert ("white-box", "fd", "pgd", "default", 4 / 255) in rows
    assert not any(r[0] == "gray-box" and r[3] == "identity" for r in rows)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"eps": 8.0}, RangeError, "8/255"),
        ({"curve": (9.0,)}, RangeError, "9/255"),
        ({"norm": "l7"}, ConfigError, "linf"),
        ({"attacks": "pgdd"}, FeintError, "did you mean 'pgd'"),
        ({"scenarios": "grey-box"}, FeintError, "did you mean 'gray-box'"),
        ({"scenarios": "transfer"}, ConfigError, "--source"),
        ({"source": "a.py:f"}, ConfigError, "--scenario"),
        ({"defense": "fdd"}, FeintError, "did you mean 'fd'"),
    ],
)
def test_plan_refuses(options: dict[str, object], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        plan("net.py:f", data=DATA, **options)  # type: ignore[arg-type]


# --- the ladder ----------------------------------------------------------------------------------

LADDER = [
    "none",
    "gray-box",
    "removal",
    "transfer",
    "decision",
    "score",
    "semi-brute-force",
    "white-box",
    "adaptive",
]


def ladder(**options: Any) -> RunSpec:
    given = {"data": DATA, "defense": "fd + rdg", "scenarios": "all", **options}
    return plan("bundled:cifar10-resnet20-ace100", **given)


def test_all_is_every_rung() -> None:
    spec = ladder()
    assert list(dict.fromkeys(c.scenario for c in spec.cells if c.defense != "none")) == LADDER
    assert len(spec.cells) == len(set(spec.cells))
    assert {c.source for c in spec.cells if c.scenario == "transfer"} == {
        "bundled:cifar10-resnet20"
    }
    white = {(c.backward, c.attack) for c in spec.cells if c.scenario == "white-box"}
    assert ("aligned + default", "pgd") in white  # BPDA and EOT
    assert ("default", "pgd(gradient=eot(1))") in white  # BPDA alone
    assert not any(c.backward != "default" for c in spec.cells if c.scenario == "gray-box")


def test_all_without_a_source_leaves_transfer_out() -> None:
    spec = plan("net.py:f", data=DATA, defense="rdg", scenarios="all")
    assert "transfer" not in {c.scenario for c in spec.cells}
    several = plan("net.py:f", data=DATA, defense="rdg", scenarios="all", source="a.py:f, b.py:f")
    assert {c.source for c in several.cells} == {"", "a.py:f", "b.py:f"}


@pytest.mark.parametrize(("norm", "eps"), [("l2", 0.5), ("l1", 12.0), ("l0", 8.0)])
def test_all_in_every_norm(norm: str, eps: float) -> None:
    """Rungs for which no attack has the norm are left out; no cell has an attack without it."""
    spec = ladder(norm=norm, eps=eps)
    names = {c.scenario for c in spec.cells}
    assert names == set(LADDER) - (set() if norm == "l2" else {"decision"})
    for cell in spec.cells:
        if cell.attack != "none":
            assert norm in parse_attack(cell.attack).info.norms


def test_an_rms_budget_is_s1s_l2() -> None:
    """Oracle: 0.05·√(3·32·32) for CIFAR's images."""
    spec = ladder(norm="rms", eps=0.05, curve=(0.1,))
    assert {c.norm for c in spec.cells} == {"l2"}
    unit = (3 * 32 * 32) ** 0.5
    assert sorted({c.eps for c in spec.cells}) == pytest.approx([0.05 * unit, 0.1 * unit])


def test_budgets_of_the_ladder() -> None:
    texts = {c.attack for c in ladder(queries=400, steps=7, rounds=9).cells}
    assert "square(queries=100, draws=4)" in texts
    assert "pgd(steps=9, random_start=False)" in texts
    assert "apgd(steps=7)" in texts
