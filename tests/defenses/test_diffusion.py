"""Diffusion purification. Oracles: closed forms for normal data, DDPM's posterior by Bayes' rule,
the unchecked graph for the checkpointed gradient; diffusers' own scheduler and UNet (reference).
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from feint.core import random
from feint.core.errors import ConfigError, DataError, FeintError, RangeError, ShapeError
from feint.core.weights import initialise
from feint.defenses import Diffusion
from feint.defenses._ddpm import Gaussian, Schedule, from_diffusers, linear_schedule
from tests.contracts.defense import DefenseContract, images

SHORT = linear_schedule(20, 1e-3, 0.2)


class Predictor(nn.Module):
    """A tiny predictor that knows the time, and counts its calls."""

    def __init__(self, channels: int = 3, twice: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 4, 3, padding=1)
        self.last = nn.Conv2d(4, channels * (2 if twice else 1), 3, padding=1)
        self.calls = 0
        initialise(self, 1)
        self.eval()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.calls += 1
        return self.last(torch.tanh(self.conv(x) + 0.1 * t.to(x.dtype).view(-1, 1, 1, 1)))


class TestDiffusion(DefenseContract):
    cls = Diffusion
    configs = (
        {"steps": 3},
        {"preset": "imagenet", "steps": 2, "sampler": "ddpm", "checkpoint": False},
        {"steps": 2, "sampler": "ddim", "t": 0.05},
    )


class TestDiffusionWithANetwork(DefenseContract):
    cls = Diffusion
    channels = (3,)
    batch_atol = 1e-5

    def build(self, config: dict[str, Any]) -> Diffusion:
        return Diffusion(model=Predictor(), schedule=SHORT, t=0.2, **config)


def test_schedule_is_ddpms() -> None:
    """Ho et al., §4: ᾱ_1000 is 4.0e-5, so that the prior is reached; β as written."""
    schedule = linear_schedule()
    assert len(schedule.kept) == 1000
    assert schedule.kept[0] == pytest.approx(1 - 1e-4)
    assert schedule.kept[-1] == pytest.approx(4.036e-5, rel=1e-3)
    assert schedule.kept[999] / schedule.kept[998] == pytest.approx(1 - 0.02)
    assert Diffusion().times == tuple(range(99, -1, -1)), "dt = 1/1000 from t* = 0.1"
    assert len(Diffusion(preset="imagenet").times) == 150
    assert Diffusion(steps=5).times == (99, 79, 59, 39, 19)
    assert Diffusion(steps=3, t=0.01).times == (9, 5, 2)


def test_ddpm_is_the_posterior() -> None:
    """Oracle: Bayes' rule for x_{t−1} given x_t and x_0, as precisions, from q's two factors."""
    x0, xt = (images(i, 1, 1, 2, 2).double() * 2 - 1 for i in (0, 1))
    for t, before in ((7, 6), (19, 3), (12, 11)):
        now, then = SHORT.kept[t], SHORT.kept[before]
        share = now / then  # x_t = √share · x_before + √(1 − share) · noise
        precision = share / (1 - share) + 1 / (1 - then)
        mean = (share**0.5 * xt / (1 - share) + then**0.5 * x0 / (1 - then)) / precision
        noise = (xt - now**0.5 * x0) / (1 - now) ** 0.5
        zero, one = torch.zeros_like(xt), torch.ones_like(xt)
        got = SHORT.reverse(xt, noise, t, before, zero, "ddpm")
        torch.testing.assert_close(got, mean)
        spread = SHORT.reverse(xt, noise, t, before, one, "ddpm") - got
        torch.testing.assert_close(spread, one * precision**-0.5)


@pytest.mark.parametrize("how", ["ddpm", "ddim"])
def test_the_last_step_gives_the_image_that_the_noise_belongs_to(how: str) -> None:
    x0, noise = images(0, 2, 3, 4, 4).double(), images(1, 2, 3, 4, 4).double()
    xt = SHORT.kept[9] ** 0.5 * x0 + (1 - SHORT.kept[9]) ** 0.5 * noise
    z = torch.ones_like(xt)
    torch.testing.assert_close(SHORT.reverse(xt, noise, 9, -1, z, how), x0)


def test_ddim_keeps_the_noise() -> None:
    x0, noise = images(0, 2, 3, 4, 4).double(), images(1, 2, 3, 4, 4).double()

    def at(t: int) -> Tensor:
        return SHORT.kept[t] ** 0.5 * x0 + (1 - SHORT.kept[t]) ** 0.5 * noise

    torch.testing.assert_close(SHORT.reverse(at(15), noise, 15, 4, noise, "ddim"), at(4))


def test_sde_and_ddpm_agree_for_small_steps() -> None:
    """Property: the difference of one step falls with the square of its length."""
    x, noise, z = (images(i, 1, 3, 4, 4).double() for i in range(3))

    def gap(factor: int) -> float:
        schedule = linear_schedule(1000 * factor, 1e-4 / factor, 0.02 / factor)
        t = 500 * factor
        a, b = (schedule.reverse(x, noise, t, t - 1, z * 0, how) for how in ("sde", "ddpm"))
        return float((a - b).abs().max())

    assert gap(4) == pytest.approx(gap(1) / 16, rel=0.1)


@pytest.mark.parametrize("sampler", ["sde", "ddpm"])
def test_normal_images_come_back_as_normal_images(sampler: str) -> None:
    """Closed form: with the exact predictor, what is N(m, s²) stays so, whatever the step is.

    The reverse process is linear here, so mean and variance follow from two runs and the noise:
    measured over 40 000 values, five standard errors; the first-order SDE's error allowed for.
    """
    mean, std = 0.1, 0.2
    model = Gaussian(linear_schedule(), mean, std)
    defense = Diffusion(model=model, sampler=sampler, t=0.1)  # type: ignore[arg-type]
    z = random.normal(random.keys(0, 100), (1, 20, 20))
    x = ((mean + std * z) + 1) / 2
    y = 2 * defense(x, random.keys(1, 100)) - 1
    assert float(y.mean()) == pytest.approx(mean, abs=5 * std / 200)
    assert float(y.std()) == pytest.approx(std, rel=5 / 200 / 2**0.5 + 0.005)
    assert not torch.allclose(x, y, atol=0.05)


def test_ddim_in_closed_form() -> None:
    """Each step of the exact predictor is affine: by hand, value by value."""
    mean, std = 0.1, 0.3
    model = Gaussian(SHORT, mean, std)
    defense = Diffusion(model=model, schedule=SHORT, sampler="ddim", t=0.15).double()
    x, keys = images(0, 2, 1, 3, 3, low=0.4, high=0.6).double(), random.keys(0, 2)
    z = random.normal(random.fold(keys, "diffusion", 0), (1, 3, 3)).double()
    kept = SHORT.kept
    value = kept[2] ** 0.5 * (2 * x - 1) + (1 - kept[2]) ** 0.5 * z
    for now, then in ((kept[2], kept[1]), (kept[1], kept[0]), (kept[0], 1.0)):
        # E[x_0 | x_t] of a normal prior, and the noise that is left over.
        gain = now**0.5 * std**2 / (now * std**2 + 1 - now)
        image = mean + gain * (value - now**0.5 * mean)
        noise = (value - now**0.5 * image) / (1 - now) ** 0.5
        value = then**0.5 * image + (1 - then) ** 0.5 * noise
    torch.testing.assert_close(defense(x, keys), (value + 1) / 2, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("sampler", ["sde", "ddpm", "ddim"])
def test_checkpointing_changes_no_gradient(sampler: str) -> None:
    """Oracle: the whole graph. And each step's predictor runs twice, which saves the memory."""
    x, keys = images(0, 2, 3, 6, 6), random.keys(0, 2)
    found = []
    for kept in (True, False):
        model = Predictor()
        defense = Diffusion(
            model=model,
            schedule=SHORT,
            t=0.5,
            sampler=sampler,  # type: ignore[arg-type]
            checkpoint=kept,
        )
        leaf = x.clone().requires_grad_()
        y = defense(leaf, keys)
        assert model.calls == 10
        (g,) = torch.autograd.grad(y.square().sum(), leaf)
        assert model.calls == (20 if kept else 10)
        model.calls = 0
        with torch.no_grad():
            assert torch.equal(defense(x, keys), y)
        assert model.calls == 10
        found.append((y.detach(), g))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


def test_noise_is_new_at_every_step_and_does_not_hang_on_the_steps_number() -> None:
    x, keys = images(0, 1, 3, 6, 6), random.keys(0, 1)
    defense = Diffusion(model=Predictor(), schedule=SHORT)
    first, *others = (defense._noise(keys, i, x) for i in range(-1, 4))
    assert all(not torch.equal(first, other) for other in others)
    assert torch.equal(Diffusion(steps=7)._noise(keys, -1, x), first)
    assert list(defense.sample(x, keys)) == ["keys"], "no noise is stored"


class Answer:
    """What a diffusers network returns."""

    def __init__(self, sample: Tensor) -> None:
        self.sample = sample


def test_any_callable_predicts() -> None:
    """A function, an object with `.sample`, and learned variances, which are left out."""
    model, x, keys = Predictor(), images(0, 2, 3, 5, 5), random.keys(0, 2)
    expected = Diffusion(model=model, schedule=SHORT)(x, keys)
    twice = Predictor(twice=True)
    twice.conv = model.conv
    with torch.no_grad():
        twice.last.weight[:3], twice.last.bias[:3] = model.last.weight, model.last.bias
    for other in (
        lambda z, t: model(z, t),
        lambda z, t: Answer(model(z, t)),
        twice,
    ):
        torch.testing.assert_close(Diffusion(model=other, schedule=SHORT)(x, keys), expected)
    low = Diffusion(model=Predictor().double(), schedule=SHORT)
    assert low(x, keys).dtype == torch.float32, "in the predictor's dtype, back in the image's"
    torch.testing.assert_close(low(x, keys), expected)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"t": 0.0}, RangeError, "0 < t ≤ 1"),
        ({"t": 1.1}, RangeError, "0 < t ≤ 1"),
        ({"steps": 0}, RangeError, "steps is 0; expected 1 to 100"),
        ({"steps": 101}, RangeError, "expected 1 to 100, t of the schedule's steps"),
        ({"sampler": "euler"}, ConfigError, "'sde', 'ddpm' or 'ddim'"),
        ({"model": 3}, ConfigError, "model is a int; expected 'gaussian', a folder"),
        ({"model": "no/such/folder"}, DataError, "is no folder"),
        ({"schedule": [0.9]}, ConfigError, "expected a Schedule"),
    ],
)
def test_bad_settings(settings: dict[str, Any], error: type[FeintError], message: str) -> None:
    with pytest.raises(error, match=message):
        Diffusion(**settings)


@pytest.mark.parametrize("kept", [(), (1.0,), (0.9, 0.9), (0.5, 0.6), (0.5, 0.0), (float("nan"),)])
def test_bad_schedules(kept: tuple[float, ...]) -> None:
    with pytest.raises(RangeError, match="expected falling shares between 1 and 0"):
        Schedule(kept)


def test_a_predictor_of_another_shape_is_refused() -> None:
    defense = Diffusion(model=lambda x, t: x[:, :, 1:], steps=1)
    with pytest.raises(ShapeError, match="the predictor gave"):
        defense(images(0, 1, 3, 5, 5))


def test_without_diffusers_the_error_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ConfigError, match=r"pip install 'feint\[diffusion\]'"):
        Diffusion(model=str(tmp_path))


# --- with diffusers itself -----------------------------------------------------------------------


def unet(diffusers: Any) -> Any:
    return diffusers.UNet2DModel(
        sample_size=16,
        block_out_channels=(8, 8),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=4,
    ).eval()


@pytest.mark.reference
@pytest.mark.filterwarnings("ignore")  # of diffusers' own imports
def test_a_saved_unet_purifies_as_diffusers_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: DDPMScheduler.step and DDIMScheduler.step with the noise that ours draws."""
    diffusers = importlib.import_module("diffusers")
    with torch.random.fork_rng(devices=[]):
        network = unet(diffusers)
    scheduler = diffusers.DDPMScheduler(50, 1e-3, 0.1, clip_sample=False)
    network.save_pretrained(tmp_path / "unet")
    scheduler.save_pretrained(tmp_path / "scheduler")
    x, keys = images(0, 2, 3, 16, 16, low=0.3, high=0.7), random.keys(0, 2)
    defense = Diffusion(model=str(tmp_path), sampler="ddpm", t=0.2)
    assert defense.times == tuple(range(9, -1, -1))
    noisy = scheduler.add_noise(2 * x - 1, defense._noise(keys, -1, x), torch.tensor([9, 9]))
    values = noisy
    for number, t in enumerate(defense.times):
        with torch.no_grad():
            predicted = network(values, t).sample
        z = defense._noise(keys, number, x)
        monkeypatch.setattr(
            "diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *_, z=z, **__: z
        )
        values = scheduler.step(predicted, t, values).prev_sample
    torch.testing.assert_close(
        defense(x, keys), ((values + 1) / 2).clamp(0, 1), rtol=1e-4, atol=1e-5
    )
    ddim = diffusers.DDIMScheduler(50, 1e-3, 0.1, clip_sample=False, set_alpha_to_one=True)
    ddim.set_timesteps(50)
    values = noisy
    for t in defense.times:
        with torch.no_grad():
            predicted = network(values, t).sample
        values = ddim.step(predicted, t, values, eta=0.0).prev_sample
    ours = Diffusion(model=str(tmp_path), sampler="ddim", t=0.2)
    torch.testing.assert_close(ours(x, keys), ((values + 1) / 2).clamp(0, 1), rtol=1e-4, atol=1e-5)
    # The same network alone gets DDPM's schedule; its gradient is whole.
    alone = Diffusion(model=str(tmp_path / "unet"), steps=3)
    assert alone.schedule == linear_schedule()
    leaf = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(alone(leaf, keys).sum(), leaf)
    assert bool(g.flatten(1).any(1).all())


@pytest.mark.reference
@pytest.mark.filterwarnings("ignore")
def test_folders_that_cannot_be(tmp_path: Path) -> None:
    diffusers = importlib.import_module("diffusers")
    with pytest.raises(DataError, match="diffusers cannot read"):
        from_diffusers(tmp_path)
    with torch.random.fork_rng(devices=[]):
        unet(diffusers).save_pretrained(tmp_path / "unet")
    scheduler = diffusers.DDPMScheduler(prediction_type="v_prediction")
    scheduler.save_pretrained(tmp_path / "scheduler")
    with pytest.raises(ConfigError, match="predicts 'v_prediction'; expected 'epsilon'"):
        from_diffusers(tmp_path)
    path = tmp_path / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({"beta_schedule": "no such"}))
    with pytest.raises(FeintError, match="diffusers cannot read"):
        from_diffusers(tmp_path)
