"""Chain and `parse`. Oracles: the parts applied by hand, the product of their supports."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import feint.defenses as defenses
from feint.core import random
from feint.core.errors import ConfigError, RangeError, UnknownNameError
from feint.core.registry import DEFENSES
from feint.defenses import ACE, JPEG, BitDepth, Chain, Defense, PixelShift, Rand, parse
from feint.defenses.base import backward_rule
from tests.contracts.defense import DefenseContract, images


class TestChain(DefenseContract):
    cls = Chain
    configs = (
        {"text": "none"},
        {"text": "jpeg + pixel_shift"},
        {"text": "bit_depth(bits=5) + rand + jpeg(quality=90)"},
        {"text": "pixel_shift(random=True)*2"},
        {"text": "rand + ace(lam=1.0)"},
    )
    channels = (3,)
    min_side = 2
    batch_atol = 2 / 255  # a level of the codec, where Rand's sums are reordered
    step = 1e-6

    def build(self, config: dict[str, Any]) -> Defense:
        torch.manual_seed(0)  # ACE's initial weights
        return Chain([parse(config["text"])])

    def test_representation_shows_the_configuration(self, config: dict[str, Any]) -> None:
        assert str(self.build(config)) == config["text"]

    def test_too_small_is_refused(self, config: dict[str, Any]) -> None:
        if "shift" in config["text"]:
            super().test_too_small_is_refused(config)


def x_and_keys(b: int = 3) -> tuple[Tensor, Tensor]:
    return images(0, b, 3, 12, 12), random.keys(0, b)


def test_parts_run_in_order_with_keys_folded_by_place() -> None:
    x, keys = x_and_keys()
    parts = [JPEG(), PixelShift(random=True), Rand(), PixelShift(random=True)]
    y = x
    for i, part in enumerate(parts):
        y = part(y, random.fold(keys, "chain", i))
    assert torch.equal(Chain(parts)(x, keys), y)


def test_the_same_instance_draws_apart_in_each_place() -> None:
    chain = parse("pixel_shift(random=True)*3")
    assert isinstance(chain, Chain)
    assert chain.members[0] is chain.members[2]
    params = chain.sample(images(0, 64, 3, 8, 8), random.keys(0, 64))
    assert sorted(params) == ["0.dx", "0.dy", "1.dx", "1.dy", "2.dx", "2.dy"]
    assert not torch.equal(params["0.dx"], params["1.dx"])
    assert not torch.equal(params["1.dx"], params["2.dx"])


def test_facts_are_those_of_the_parts() -> None:
    def facts(text: str) -> tuple[bool, bool, bool]:
        d = parse(text)
        return d.differentiable, d.stochastic, d.bounded

    assert facts("none") == (True, False, True)
    assert facts("pixel_shift + rand") == (True, True, True)
    assert facts("pixel_shift + jpeg") == (False, False, True)
    assert facts("jpeg + ace") == (False, False, False)
    assert facts("pixel_shift(random=True) + pixel_shift") == (True, True, True)


def test_chains_dissolve_in_chains() -> None:
    a, b, c = JPEG(), Rand(), PixelShift()
    x, keys = x_and_keys()
    left, right = Chain([Chain([a, b]), c]), Chain([a, Chain([b, c])])
    assert left.members == right.members == (a, b, c)
    assert torch.equal(left(x, keys), right(x, keys))


def test_support_is_the_product() -> None:
    """Oracle: the mean over 64 enumerated pairs of shifts against composing them by hand."""
    chain = parse("pixel_shift(random=True)*2 + jpeg")
    x, _ = x_and_keys(2)
    options = chain.support(x.shape)
    assert options is not None
    assert len(options) == 64
    seen = {tuple(int(o[k][0]) for k in sorted(o)) for o in options}
    assert len(seen) == 64
    one = options[11]
    first, second = (
        PixelShift(dx=int(one[f"{i}.dx"][0]), dy=int(one[f"{i}.dy"][0])) for i in (0, 1)
    )
    assert torch.equal(chain.replay(x, one), JPEG()(second(first(x))))
    assert parse("pixel_shift(random=True) + rand").support(x.shape) is None
    assert parse("pixel_shift(random=True)*4").support(x.shape) is None  # 4096 > 1024
    assert parse("jpeg + bit_depth").support(x.shape) == ({},)


# --- views ---------------------------------------------------------------------------------------


def gradient(front: torch.nn.Module, x: Tensor, keys: Tensor | None = None) -> Tensor:
    leaf = x.clone().requires_grad_()
    out = front(leaf, keys)
    weight = random.normal(random.keys(3, len(x)), x.shape[1:])
    return torch.autograd.grad((out * weight).sum(), leaf)[0]


class ByHand(torch.nn.Module):
    """Views of the parts, one after the other."""

    def __init__(self, *views: torch.nn.Module) -> None:
        super().__init__()
        self.views = views

    def forward(self, x: Tensor, keys: Tensor) -> Tensor:
        for i, view in enumerate(self.views):
            x = view(x, random.fold(keys, "chain", i))
        return x


@pytest.mark.parametrize(
    ("backward", "rules"),
    [
        (None, ("surrogate", "exact", "identity")),
        ("identity", ("identity", "exact", "identity")),
        (["identity", None, "surrogate"], ("identity", "exact", "surrogate")),
        ({"jpeg": "identity"}, ("identity", "exact", "identity")),
        ({2: "surrogate"}, ("surrogate", "exact", "surrogate")),
        ({0: "identity", "bit_depth": "surrogate"}, ("identity", "exact", "surrogate")),
    ],
    ids=str,
)
def test_a_view_composes_the_parts_views(backward: Any, rules: tuple[str, ...]) -> None:
    jpeg, rand, bits = JPEG(quality=60), Rand(), BitDepth()
    chain, (x, keys) = Chain([jpeg, rand, bits]), x_and_keys()
    view = chain.view(backward)
    assert view.backward_rule == ", ".join(rules)
    by_hand = ByHand(jpeg.view(rules[0]), rand.view(rules[1]), bits.view(rules[2]))
    assert torch.equal(view(x, keys), chain(x, keys))
    assert torch.equal(gradient(view, x, keys), gradient(by_hand, x, keys))


@pytest.mark.parametrize(
    ("text", "backward", "error", "match"),
    [
        ("jpeg + rand", "exact", UnknownNameError, "backward rule of JPEG 'exact'"),
        ("jpeg + bit_depth", "aligned", UnknownNameError, "backward rule of JPEG"),
        ("rand + pixel_shift", "identity", UnknownNameError, "backward rule of the chain"),
        ("jpeg + rand", ["identity"], ConfigError, "1 rules; expected 2, one for each of jpeg"),
        ("jpeg + rand", ["identity", "surrogate"], UnknownNameError, "backward rule of Rand"),
        ("jpeg + rand", {"jepg": "identity"}, UnknownNameError, "did you mean 'jpeg'"),
        ("jpeg + rand", {2: "identity"}, UnknownNameError, "part of the chain '2'"),
        ("jpeg", {"rand": "identity"}, UnknownNameError, "part of the chain 'rand'"),
    ],
)
def test_rules_that_make_no_sense(
    text: str, backward: Any, error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        parse(text).view(backward)


class Borrowed(Defense):
    """Gives back its input, or a window on its memory: nothing that a view may pass on as is."""

    differentiable = False

    def __init__(self, *, window: bool) -> None:
        super().__init__()
        self.window = window

    def transform(self, x: Tensor, params: dict[str, Tensor]) -> Tensor:
        return x.transpose(-1, -2) if self.window else x

    @backward_rule("tripled")
    def tripled(self, x: Tensor, params: dict[str, Tensor]) -> Tensor:
        return 3 * x


@pytest.mark.parametrize("window", [False, True])
def test_a_view_may_hand_its_input_through(window: bool) -> None:
    """Oracle: the derivative of 3x is 3, whatever the forward pass does."""
    defense, (x, _) = Borrowed(window=window), x_and_keys()
    leaf = x.clone().requires_grad_()
    y = defense.view()(leaf)
    assert torch.equal(y, defense(x))
    assert y.untyped_storage().data_ptr() != leaf.untyped_storage().data_ptr()
    (g,) = torch.autograd.grad(y.sum(), leaf)
    assert torch.equal(g, torch.full_like(x, 3.0))
    assert not defense.view()(x).requires_grad


def test_a_second_derivative_of_a_substitute_is_refused_and_not_zero() -> None:
    x = x_and_keys()[0].requires_grad_()
    (g,) = torch.autograd.grad(JPEG().view()(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="to not have been used in the graph"):
        torch.autograd.grad(g.sum(), x)


def test_one_defense_takes_the_forms_of_a_chain() -> None:
    jpeg, (x, _) = JPEG(), x_and_keys()
    for form in ("identity", ["identity"], {"jpeg": "identity"}, {0: "identity"}):
        assert torch.equal(gradient(jpeg.view(form), x), gradient(jpeg.view("identity"), x))
    assert jpeg.view().backward_rule == "surrogate"
    assert BitDepth().view().backward_rule == "identity"
    assert Rand().view().backward_rule == "exact"


def test_the_identity_chain() -> None:
    none, (x, keys) = parse("none"), x_and_keys()
    assert isinstance(none, Chain)
    assert none.members == ()
    assert str(none) == none.name == "none"
    assert torch.equal(none(x, keys), x)
    assert torch.equal(gradient(none.view(), x), gradient(ByHand(), x, keys))


@pytest.mark.parametrize(
    ("text", "rules"),
    [
        ("none", ("exact",)),
        ("rand + pixel_shift", ("exact",)),
        ("jpeg + rand", ("identity", "surrogate")),
        ("jpeg + bit_depth + jpeg", ("identity", "surrogate")),
    ],
)
def test_rules_for_the_whole_chain(text: str, rules: tuple[str, ...]) -> None:
    defense = Chain([parse(text)])
    assert defense.backward_rules() == rules
    for rule in rules:
        assert defense.view(rule).backward_rule.count(",") == max(0, len(defense.members) - 1)


def test_a_part_that_is_no_defense() -> None:
    with pytest.raises(ConfigError, match="got a ReLU"):
        Chain([torch.nn.ReLU()])  # type: ignore[list-item]


def test_state_of_trained_parts_travels() -> None:
    a, b = parse("ace(lam=2) + jpeg"), parse("ace(lam=2) + jpeg")
    x, keys = x_and_keys()
    assert not torch.equal(a(x, keys), b(x, keys))
    b.load_state_dict(a.state_dict())
    assert torch.equal(a(x, keys), b(x, keys))


# --- parse ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("jpeg", "jpeg"),
        ("jpeg(quality=75)", "jpeg"),
        ("jpeg(preset='qiu', quality=75)", "jpeg(preset='qiu')"),
        ("jpeg(preset='qiu',rounding='nearest')", "jpeg(preset='qiu', rounding='nearest')"),
        ("rand(preset='xie') + rand", "rand(preset='xie') + rand"),
        ("jpeg + jpeg(quality=75)", "jpeg*2"),
        ("ace(lam=100)", "ace"),
        ("ace(lam=inf)", "ace(lam=inf)"),
        ("ace(lam=10)", "ace(lam=10.0)"),
        ("(jpeg + rand)*2", "jpeg + rand + jpeg + rand"),
    ],
)
def test_str_is_canonical(text: str, canonical: str) -> None:
    defense = parse(text)
    assert str(defense) == defense.spec == canonical
    assert str(parse(canonical)) == canonical


def test_one_name_is_no_chain() -> None:
    assert type(parse("jpeg(quality=50)")) is JPEG
    assert parse("jpeg(quality=50)").config["quality"] == 50


@pytest.mark.parametrize(
    ("text", "error", "match"),
    [
        ("jepg", UnknownNameError, "unknown defense 'jepg'; did you mean 'jpeg'"),
        ("jpeg + rnd", UnknownNameError, "did you mean 'rand'"),
        ("jpeg(qualty=3)", UnknownNameError, "keyword of jpeg 'qualty'; did you mean 'quality'"),
        ("rand(preset='xi')", UnknownNameError, "preset of rand 'xi'; did you mean 'xie'"),
        ("rand(preset=xie)", ConfigError, "quote text: preset='xie'"),
        ("jpeg(quality=500)", RangeError, "jpeg\\(quality=500\\): quality is 500; expected"),
        ("jpeg(quality='high')", RangeError, "quality is 'high'"),
        ("rand(value='gray')", ConfigError, "rand\\(value='gray'\\)"),
        ("jpeg + none", ConfigError, "'none' stands alone"),
        ("jpeg(75)", ConfigError, "expected jpeg\\(key=value\\)"),
        ("", ConfigError, "is empty"),
    ],
)
def test_text_that_makes_no_sense(text: str, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        parse(text)


def test_every_registered_defense_is_exported_and_described() -> None:
    for name in DEFENSES:
        info = DEFENSES[name]
        assert getattr(defenses, info.component.__name__) is info.component
        assert info.summary
        assert info.paper


def test_config_holds_what_is_in_force() -> None:
    config = Rand(preset="xie", high=320).config
    assert config["low"] == 310
    assert config["high"] == 320
    assert config["resize_back"] == "legacy"
    assert Rand(preset="xie", high=320).spec == "rand(high=320, preset='xie')"
    assert ACE().config["lam"] == ACE(lam=100).config["lam"] == 100.0
    assert ACE(lam=100).spec == "ace"
    unet = {"form": "unet", "weights": "untrained", "width": 4, "depth": 2}
    assert "lam" not in ACE(lam=0.99, **unet).spec  # its own form's usual one
