"""Robust activation maps. Oracles: the class activation map by its closed form (layer's weights
times features), a plain loop over classes with autograd, torchvision's architectures."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from feint.core import random
from feint.core.errors import ConfigError, RangeError, ShapeError
from feint.data import load as load_data
from feint.defenses import Chain, PixelDeflection, parse
from feint.defenses.activation import ActivationMap
from feint.evaluation import Pipeline, evaluate
from feint.models import Bfloat16, load
from tests.contracts.defense import images


class Pooled(nn.Module):
    """Two convolutions, a global average pool and a linear layer: what CAM is defined for."""

    def __init__(self, classes: int = 8, inplace: bool = False, stride: int = 2) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 5, 3, stride=stride, padding=1)
        self.last = nn.Conv2d(5, 6, 3, padding=1)
        self.relu = nn.ReLU(inplace=inplace)
        self.head = nn.Linear(6, classes)
        weights = random.normal(random.keys(5, [0])[0], (2000,))
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(weights[: p.numel()].view_as(p) * (2 / max(1, p[0].numel())) ** 0.5)

    def features(self, x: Tensor) -> Tensor:
        return self.relu(self.last(self.relu(self.first(x))))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean((2, 3)))


class Functional(Pooled):
    """The same without a module to hook, and with a 1×1 convolution as its head."""

    def forward(self, x: Tensor) -> Tensor:
        conv = nn.functional.conv2d
        x = conv(x, self.first.weight, self.first.bias, 2, 1).relu()
        x = conv(x, self.last.weight, self.last.bias, 1, 1).clamp(min=0)
        x = nn.functional.adaptive_avg_pool2d(x, 1)
        return conv(x, self.head.weight[..., None, None], self.head.bias).flatten(1)


class Flat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3 * 12 * 12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.flatten(1))


def class_maps(net: Pooled, x: Tensor, top: int) -> Tensor:
    """Equation 4 for the likeliest classes, (B, top, h, w): weights of the layer × features."""
    with torch.no_grad():
        features, logits = net.features(x), net(x)
    weight = net.head.weight.detach()[logits.topk(top, 1).indices]
    return torch.einsum("btk,bkhw->bthw", weight, features)


def enlarged(maps: Tensor, x: Tensor) -> Tensor:
    return nn.functional.interpolate(maps, x.shape[-2:], mode="bilinear", align_corners=False)


@pytest.mark.parametrize("top", [1, 3, 5])
@pytest.mark.parametrize("net", [Pooled(), Pooled(inplace=True), Functional()], ids=str)
def test_equals_the_closed_form(net: Pooled, top: int) -> None:
    x = images(0, 4, 3, 14, 11)
    total = sum(class_maps(net, x, top)[:, i : i + 1] / 2 ** (i + 1) for i in range(top))
    expected = enlarged(total, x).clamp(min=0)
    expected = expected / expected.amax((2, 3), keepdim=True)
    torch.testing.assert_close(ActivationMap(net, top=top)(x), expected, rtol=0, atol=1e-5)


def test_the_repos_weights() -> None:
    """Oracle: the original's loop, from the fifth class to the first: m₅·1.2, then (roi + m)/2."""
    net, x = Pooled(), images(1, 3, 3, 12, 12)
    maps = class_maps(net, x, 5)
    low, high = maps.amin((2, 3), keepdim=True), maps.amax((2, 3), keepdim=True)
    maps = (maps - low) / (high - low)
    roi = 1.2 * maps[:, 4]
    for i in (3, 2, 1, 0):
        roi = (roi + maps[:, i]) / 2
    expected = enlarged(roi[:, None], x)
    low = expected.amin((2, 3), keepdim=True)
    expected = (expected - low) / (expected.amax((2, 3), keepdim=True) - low)
    got = ActivationMap(net, variant="repo")(x)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


def test_fewer_classes_than_asked_for_are_all() -> None:
    net, x = Pooled(classes=2), images(0, 2, 3, 8, 8)
    assert torch.equal(ActivationMap(net)(x), ActivationMap(net, top=2)(x))


def test_a_head_that_is_not_linear() -> None:
    """Oracle: one backward pass per class, through the whole network, in a plain loop."""
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(400, 9), nn.Tanh(), nn.Linear(9, 6)
    )
    x = images(0, 3, 3, 12, 12)
    features = net[:2](x).detach().requires_grad_()
    logits = net[2:](features)
    best = logits.topk(5, 1).indices
    total = torch.zeros(3, 1, 10, 10)
    for i in range(5):
        score = logits.gather(1, best[:, i : i + 1]).sum()
        (slope,) = torch.autograd.grad(score, features, retain_graph=True)
        weight = slope.mean((2, 3), keepdim=True)
        total += (weight * features.detach()).sum(1, keepdim=True) / 2 ** (i + 1)
    expected = enlarged(total, x).clamp(min=0)
    expected = expected / expected.amax((2, 3), keepdim=True).clamp(min=1e-30)
    torch.testing.assert_close(ActivationMap(net)(x), expected, rtol=0, atol=1e-5)


def test_a_trained_residual_network() -> None:
    """Oracle: the closed form with the features in front of the pool, taken by a hook."""
    model = load("bundled:cifar10-resnet20")
    x = next(load_data("bundled:cifar10", samples=3).batches(3)).x
    linear = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
    pooled: list[Tensor] = []
    found = ActivationMap(model)
    handle = linear.register_forward_pre_hook(lambda module, args: pooled.append(args[0]))
    logits = model(x)
    features, _ = found._run(x, found._find(x[:1]))
    handle.remove()
    # What the search found is what the head gets, once averaged.
    torch.testing.assert_close(features.mean((2, 3)), pooled[0])
    weight = linear.weight.detach()[logits.topk(5, 1).indices] / 2.0 ** torch.arange(1, 6)[:, None]
    total = torch.einsum("btk,bkhw->bhw", weight, features.detach())[:, None]
    expected = enlarged(total, x).clamp(min=0)
    expected = expected / expected.amax((2, 3), keepdim=True)
    torch.testing.assert_close(found(x), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_leaves_no_trace(mode: type) -> None:
    net, x = Pooled().eval(), images(0, 2, 3, 12, 12)
    expected = ActivationMap(net)(x)
    with mode():
        before = torch.is_grad_enabled()
        got = ActivationMap(net)(x)
        assert torch.is_grad_enabled() == before
    assert torch.equal(got, expected)
    assert not got.requires_grad
    assert all(p.grad is None for p in net.parameters())


def test_sizes_types_and_empty_batches() -> None:
    found = ActivationMap(Pooled())
    for height, width in ((12, 12), (9, 20), (12, 12)):
        x = images(0, 2, 3, height, width)
        assert found(x).shape == (2, 1, height, width)
        torch.testing.assert_close(found(x.double()), found(x))
        torch.testing.assert_close(found(x)[1:], found(x[1:]), rtol=0, atol=1e-5)
    assert found(images(0, 0, 3, 9, 9)).shape == (0, 1, 9, 9)


def test_classifiers_without_a_map_are_refused() -> None:
    with pytest.raises(ConfigError, match="Flat has no convolution"):
        ActivationMap(Flat())
    with pytest.raises(ShapeError, match="a single place"):
        ActivationMap(nn.Sequential(nn.Conv2d(3, 4, 12), nn.Flatten()))(images(0, 1, 3, 12, 12))
    cut = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(400, 3))
    cut.register_forward_hook(lambda module, args, out: out.detach())
    with pytest.raises(ConfigError, match="do not follow"):
        ActivationMap(cut)(images(0, 1, 3, 12, 12))
    noisy = Pooled()
    noisy.stochastic = True
    with pytest.raises(ConfigError, match="without randomness"):
        ActivationMap(noisy)
    with pytest.raises(RangeError, match="top"):
        ActivationMap(Pooled(), top=0)
    with pytest.raises(ConfigError, match="variant"):
        ActivationMap(Pooled(), variant="other")  # type: ignore[arg-type]


# --- in front of its classifier -----------------------------------------------------------------


NET = Pooled(stride=1).eval()


def test_a_pipeline_makes_its_classifier_known() -> None:
    x, keys = images(0, 3, 3, 12, 12), random.keys(0, 3)
    text = "wavelet + pixel_deflection(activation_map='rcam', deflections=60)"
    chain = parse(text)
    assert parse(str(chain)).spec == chain.spec
    pipeline, other = Pipeline(NET, chain), Pipeline(Pooled(classes=3), chain)
    assert pipeline.defense is not chain
    assert str(pipeline.defense) == str(chain)
    # Oracle: the same deflection with the map given as a tensor.
    denoised = parse("wavelet")(x)
    keyed = random.fold(random.fold(keys, "defense"), "chain", 1)
    expected = PixelDeflection(deflections=60, activation_map=ActivationMap(NET)(denoised))
    assert torch.equal(pipeline.defense(x, random.fold(keys, "defense")), expected(denoised, keyed))
    assert other(x, keys).shape == (3, 3)
    again = Pipeline(NET, other.defense)  # bound anew, not to the classifier before
    assert torch.equal(again(x, keys), pipeline(x, keys))
    for copied in (copy.deepcopy(pipeline), pickle.loads(pickle.dumps(pipeline))):
        assert torch.equal(copied(x, keys), pipeline(x, keys))
    assert "map_of" not in " ".join(pipeline.state_dict())  # the classifier is not held twice


def test_others_are_left_as_they_are() -> None:
    fd = parse("fd*2 + rdg")
    assert Pipeline(NET, fd).defense is fd
    assert isinstance(fd, Chain)
    twice = parse("pixel_deflection(activation_map='rcam')*2").bind(NET)
    assert isinstance(twice, Chain)
    assert twice.members[0] is twice.members[1]


def test_without_a_classifier_it_is_refused() -> None:
    with pytest.raises(ConfigError, match="needs a classifier"):
        parse("pixel_deflection(activation_map='rcam')")(images(0, 1, 3, 8, 8))
    with pytest.raises(ConfigError, match="rcam"):
        parse("pixel_deflection(activation_map='cam')")
    with pytest.raises(ConfigError, match="no convolution"):
        Pipeline(Flat(), parse("pixel_deflection(activation_map='rcam')"))


def test_the_attackers_map_follows_the_image() -> None:
    """Property: the view's forward pass is the pipeline's at every image, and its gradient that of
    the gather alone, as with the map frozen at this very image."""
    x, keys = images(3, 4, 3, 12, 12), random.keys(0, 4)
    pipeline = Pipeline(NET, parse("pixel_deflection(activation_map='rcam', deflections=99)"))
    view = pipeline.view()
    far = (x + 0.3 * random.normal(random.keys(9, 4), (3, 12, 12))).clamp(0, 1)
    assert not torch.allclose(ActivationMap(NET)(x), ActivationMap(NET)(far))
    for z in (x, far):
        leaf, other = z.clone().requires_grad_(), z.clone().requires_grad_()
        out = view(leaf, keys)
        assert torch.equal(out, pipeline(z, keys))
        frozen = PixelDeflection(deflections=99, activation_map=ActivationMap(NET)(z))
        same = Pipeline(NET, frozen)(other, keys)
        assert torch.equal(same, out)
        (g,), (h,) = (
            torch.autograd.grad(v.square().sum(), w) for v, w in ((out, leaf), (same, other))
        )
        torch.testing.assert_close(g, h)


def test_a_whole_evaluation_takes_it() -> None:
    x = images(0, 6, 3, 12, 12)
    found = evaluate(
        NET,
        x,
        NET(x).argmax(1),
        defense=parse("pixel_deflection(activation_map='rcam') + wavelet"),
        attacks=["pgd(steps=2)"],
        judge_draws=2,
        votes=3,
        combine="majority",
    )
    assert [c.cell.scenario for c in found.results][-2:] == ["gray-box", "white-box"]


def test_a_vote_of_ten_runs_is_the_majority_of_ten() -> None:
    """S2's Ens-10. Oracle: ten single runs with the vote's keys, counted."""
    defense = parse("pixel_deflection(deflections=90, activation_map='rcam') + wavelet(sigma=0.3)")
    x, keys = images(7, 12, 3, 12, 12), random.keys(2, 12)
    net = Pooled().eval()
    with torch.no_grad():
        net.head.bias -= net(x).mean(0)  # close calls
    ensemble = Pipeline(net, defense, votes=10, combine="majority")
    draws = random.fold(keys, "vote", 0, torch.arange(10))
    single = Pipeline(net, defense)
    runs = torch.stack([single(x, draws[:, i]) for i in range(10)], 1)
    ballots = nn.functional.one_hot(runs.argmax(-1), 8).sum(1)
    winner = ensemble(x, keys).argmax(1)
    assert bool((ballots.gather(1, winner[:, None])[:, 0] == ballots.amax(1)).all())
    assert bool((ballots.amax(1) < 10).any()), "no run ever disagrees: nothing is tested"
    with pytest.raises(ShapeError):
        ensemble.defense(x[0])


@pytest.mark.parametrize("name", ["resnet18", "vgg11", "mobilenet_v2", "squeezenet1_1"])
def test_torchvision_architectures(name: str) -> None:
    """Oracle: the features in front of the head, taken by a hook, and autograd on them."""
    import torchvision

    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = getattr(torchvision.models, name)(weights=None).eval()
    x = images(0, 2, 3, 96, 96)
    kept: list[Tensor] = []
    if name == "resnet18":
        source: nn.Module = net.layer4
    elif name == "vgg11":
        source = net.features[-2]  # the last convolution's activation, in front of the pool
    elif name == "squeezenet1_1":
        source = net.classifier[2]
    else:
        source = net.features

    def keep(module: nn.Module, args: object, out: Tensor) -> Tensor:
        leaf = out.detach().requires_grad_()
        kept.append(leaf)
        return leaf.clone()  # an in-place layer may follow

    handle = source.register_forward_hook(keep)
    logits = net(x)
    handle.remove()
    best = logits.topk(5, 1)
    score = (best.values / 2.0 ** torch.arange(1, 6)).sum()
    (slope,) = torch.autograd.grad(score, kept[0])
    base = kept[0].detach()
    maps = (slope.mean((2, 3), keepdim=True) * base).sum(1, keepdim=True)
    expected = enlarged(maps, x).clamp(min=0)
    expected = expected / expected.amax((2, 3), keepdim=True).clamp(min=1e-30)
    torch.testing.assert_close(ActivationMap(net)(x), expected, rtol=0, atol=1e-3)


def test_what_a_first_pass_alone_does_is_not_counted() -> None:
    class Once(nn.Module):
        """Makes a constant when it is first called."""

        def __init__(self) -> None:
            super().__init__()
            self.net, self.offset = Pooled(), None

        def forward(self, x: Tensor) -> Tensor:
            if self.offset is None:
                self.offset = torch.zeros(1)
            return self.net(x) + self.offset

    torch.manual_seed(0)
    once, x = Once(), torch.rand(2, 3, 12, 12)
    assert torch.equal(ActivationMap(once)(x), ActivationMap(once.net)(x))


def test_a_classifier_in_bfloat16_has_a_map() -> None:
    torch.manual_seed(0)
    net, x = Pooled(), torch.rand(2, 3, 12, 12)
    got, expected = ActivationMap(Bfloat16(net), top=1)(x), ActivationMap(net, top=1)(x)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected, atol=0.05, rtol=0)
