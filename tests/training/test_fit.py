"""The training loop. Oracles: an uninterrupted run, numpy's padding, the schedule's formula."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from feint.core import random
from feint.core.errors import ConfigError, DataError, DtypeError, ModelError, RangeError, ShapeError
from feint.models import build, initialise
from feint.training.augment import crop_and_flip
from feint.training.fit import accuracy, fit, one_cycle
from feint.training.recipe import TrainingRecipe, content_digest, list_recipes, load_recipe

CLASSES = 4


class Small(nn.Module):
    """A convolution, a batch normalisation and a linear layer."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Linear(6, CLASSES)

    def forward(self, x):
        return self.fc(self.bn(self.conv(x)).relu().mean((2, 3)))


def small():
    model = Small()
    initialise(model, 7)
    return model


def recipe(**changes):
    plain = {
        "name": "small",
        "architecture": "toy",
        "epochs": 4,
        "batch_size": 10,
        "peak_lr": 0.1,
        "precision": "float32",
    }
    return TrainingRecipe.model_validate(plain | changes)


CLASSIFIERS = [n for n in list_recipes() if isinstance(load_recipe(n), TrainingRecipe)]
PLAIN = "architecture: toy\nepochs: 1\npeak_lr: 0.1\n"
ADVERSARY = {"eps": "8/255", "steps": 2, "step_size": "5/255", "warmup": 0.5}


@pytest.fixture(scope="module")
def data():
    """Class k is bright in one color or dark: separable, with noise."""
    keys = random.keys(0, 60)
    labels = torch.arange(60) % CLASSES
    noise = random.uniform(keys, (3, 8, 8), 0.0, 120.0)
    noise[torch.arange(60), labels.clamp(max=2)] += (labels < 3)[:, None, None] * 110.0
    return noise.to(torch.uint8), labels


def weights(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"average": 0.9},
        {"precision": "bf16", "label_smoothing": 0.1},
        {"adversary": ADVERSARY | {"share": 0.5}},
    ],
    ids=["plain", "average", "bf16", "adversarial"],
)
def test_a_stopped_run_ends_with_the_weights_of_an_uninterrupted_one(tmp_path, data, changes):
    plan = recipe(**changes)
    whole = fit(small(), plan, *data)

    class Stop(Exception):
        pass

    def stop(report):
        raise Stop

    for _ in range(plan.epochs):  # killed after every epoch
        with pytest.raises(Stop):
            fit(small(), plan, *data, folder=tmp_path, on_epoch=stop)
    resumed = fit(small(), plan, *data, folder=tmp_path)
    assert equal(weights(whole), weights(resumed))
    assert not whole.training
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [entry["epoch"] for entry in log] == [1, 2, 3, 4]


def test_training_learns_and_leaves_the_global_generator_alone(data):
    start, reports = small(), []
    state = torch.random.get_rng_state()
    model = fit(start, recipe(epochs=12), *data, on_epoch=reports.append)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert reports[-1].loss < 0.5 * reports[0].loss
    assert accuracy(model, *data) > 0.9
    assert equal(weights(fit(small(), recipe(epochs=12), *data)), weights(model))
    other = fit(small(), recipe(epochs=12, seed=1), *data)
    assert not equal(weights(other), weights(model))


def test_steps_are_those_of_torch_sgd(data):
    # Oracle: the same batches through torch's own loop, written out.
    plan = recipe(epochs=1, weight_decay=0.01)
    ours = fit(small(), plan, *data)
    model = small().train()
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.01}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True)
    order = random.permutation(random.fold(random.keys(0, 1), "order", 0), 60)[0]
    for step, index in enumerate(order.split(10)):
        for group in optimizer.param_groups:
            group["lr"] = one_cycle(step / 6, 0.1, 0.2)
        keys = random.fold(random.keys(0, index), "augment", 0)
        x = crop_and_flip(data[0][index], keys).float() / 255
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), data[1][index]).backward()
        optimizer.step()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=1e-4, atol=1e-6)


def test_the_inner_attack_does_not_move_batch_statistics(data):
    # The running statistics count the training batches and nothing else: one per step with share
    # 1, two with share ½.
    for share, forwards in ((1.0, 1), (0.5, 2)):
        plan = recipe(epochs=2, adversary=ADVERSARY | {"share": share})
        model = fit(small(), plan, *data)
        assert int(model.bn.num_batches_tracked) == 2 * 6 * forwards
    still = fit(small(), recipe(epochs=2), *data)
    attacked = fit(small(), recipe(epochs=2, adversary=ADVERSARY), *data)
    assert int(still.bn.num_batches_tracked) == int(attacked.bn.num_batches_tracked)
    assert not equal(weights(still), weights(attacked))


def test_adversarial_training_resists_more_than_plain_training(data):
    # Property of what it is for, on the same data and schedule.
    from feint.attacks import pgd

    x, y = data[0].float() / 255, data[1]
    rate = {}
    strong = ADVERSARY | {"eps": 0.15, "step_size": 0.1}
    for name, adversary in (("plain", None), ("adversarial", strong)):
        model = fit(small(), recipe(epochs=12, adversary=adversary), *data)
        x_adv = pgd(model, x, y, eps=0.15, steps=10)
        rate[name] = float((model(x_adv).argmax(1) == y).float().mean())
    assert rate["adversarial"] > rate["plain"] + 0.1


def test_foreign_checkpoints_are_refused(tmp_path, data):
    fit(small(), recipe(epochs=1), *data, folder=tmp_path)
    before = (tmp_path / "checkpoint.safetensors").read_bytes()
    with pytest.raises(ConfigError, match=r"another recipe.*another output folder"):
        fit(small(), recipe(epochs=1, seed=1), *data, folder=tmp_path)
    images = data[0].clone()
    images[5, 0, 0, 0] ^= 1
    with pytest.raises(ConfigError, match="other images or labels"):
        fit(small(), recipe(epochs=1), images, data[1], folder=tmp_path)
    with pytest.raises(ConfigError, match="other images or labels"):
        fit(small(), recipe(epochs=1), data[0], data[1].flip(0), folder=tmp_path)
    assert (tmp_path / "checkpoint.safetensors").read_bytes() == before


def test_infinite_lambda_is_not_taken_for_no_ace():
    texts = {recipe(ace=ace).model_dump_json() for ace in (None, 0, 1, math.inf)}
    assert len(texts) == 4
    assert recipe(ace="inf") == recipe(ace=math.inf)


def test_damaged_checkpoints(tmp_path, data):
    plan = recipe(epochs=1)
    fit(small(), plan, *data, folder=tmp_path)
    path = tmp_path / "checkpoint.safetensors"
    whole = path.read_bytes()
    for raw in (whole[:-50], whole[:4], b"", b"rubbish" * 30):
        path.write_bytes(raw)
        with pytest.raises(DataError, match=r"is damaged.*delete it"):
            fit(small(), plan, *data, folder=tmp_path)
    path.write_bytes(whole)
    with safe_open(path, "pt") as file:
        meta = file.metadata()
    state = load_file(path)
    lacking = {k: v for k, v in state.items() if k != "model/fc.weight"}
    for tensors, told in (
        (lacking, meta),
        (state, {k: v for k, v in meta.items() if k != "epoch"}),
        (state, meta | {"epoch": "x"}),
    ):
        save_file(tensors, path, told)
        with pytest.raises(DataError, match="does not fit its recipe"):
            fit(small(), plan, *data, folder=tmp_path)


def test_a_half_written_checkpoint_is_never_trusted(tmp_path, data):
    # What a kill during the write leaves behind: the partial file beside the good one.
    plan = recipe()
    whole = weights(fit(small(), plan, *data))
    (tmp_path / "checkpoint.partial").write_bytes(b"half")
    assert equal(weights(fit(small(), plan, *data, folder=tmp_path)), whole)


def test_folders_that_cannot_be_written(tmp_path, data, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot make the folder"):
        fit(small(), recipe(), *data, folder=tmp_path / "file" / "run")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(DataError, match="No space left"):
        fit(small(), recipe(), *data, folder=tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoint.safetensors").exists()


def test_a_loss_that_is_not_finite_is_an_error(data):
    with pytest.raises(ModelError, match="the loss is nan in epoch 1; lower peak_lr"):
        fit(small(), recipe(peak_lr=1e30), *data)


def test_bad_input(data):
    images, labels = data
    with pytest.raises(DtypeError, match="uint8"):
        fit(small(), recipe(), images.float(), labels)
    with pytest.raises(ShapeError, match=r"\(N, 3, H, W\)"):
        fit(small(), recipe(), images[0], labels)
    with pytest.raises(ShapeError, match="one per image"):
        fit(small(), recipe(), images, labels[:-1])
    with pytest.raises(RangeError, match=r"\[-1, 2\]"):
        fit(small(), recipe(), images, labels - 1)
    with pytest.raises(ConfigError, match="60 images give no batch of 61"):
        fit(small(), recipe(batch_size=61), images, labels)


def test_average_is_the_exponential_one(data):
    # Oracle: a recipe of 12 steps with decay min(0.9, (1 + done)/(10 + done)), where `done` counts
    # the steps of finished epochs; the first average is the first step's weights.
    plan = recipe(epochs=2, average=0.9, batch_size=30)
    seen = []
    model = small()
    step = torch.optim.SGD.step

    def watched(self, *args, **kwargs):
        out = step(self, *args, **kwargs)
        seen.append(model.fc.weight.detach().double().clone())
        return out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.SGD, "step", watched)
        fit(model, plan, *data)
    average = seen[0]
    for number, value in enumerate(seen[1:], 1):
        done = 2 * (number // 2) if number < 4 else 4
        decay = min(0.9, (1 + done) / (10 + done))
        average = decay * average + (1 - decay) * value
    torch.testing.assert_close(model.fc.weight.detach().double(), average, rtol=1e-5, atol=1e-7)


@given(
    side=st.tuples(st.integers(5, 9), st.integers(5, 9)),
    pad=st.integers(0, 4),
    seed=st.integers(0, 99),
)
def test_crop_and_flip_is_numpys_reflect_padding(side, pad, seed):
    x = torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (3, 3, *side), np.uint8))
    keys = random.keys(seed, 3)
    got = crop_and_flip(x, keys, pad)
    assert got.dtype == torch.uint8
    offsets = random.integers(keys, 0, 2 * pad + 1, (2,)).tolist()
    flips = random.integers(random.fold(keys, "flip"), 0, 2).tolist()
    for image, (top, left), flip, out in zip(x.numpy(), offsets, flips, got, strict=True):
        wide = np.pad(image, ((0, 0), (pad, pad), (pad, pad)), mode="reflect")
        cut = wide[:, top : top + side[0], left : left + side[1]]
        assert np.array_equal(out.numpy(), cut[:, :, ::-1] if flip else cut)
    # Keyed by sample: alone, and in another order, an image is shown the same way.
    assert torch.equal(crop_and_flip(x[2:], keys[2:], pad)[0], got[2])
    assert torch.equal(crop_and_flip(x.flip(0), keys.flip(0), pad).flip(0), got)


def test_every_crop_and_flip_occurs_equally_often():
    keys = random.keys(0, 9 * 9 * 2 * 200)
    x = torch.arange(100, dtype=torch.int64).reshape(1, 1, 10, 10).expand(len(keys), 1, 10, 10)
    shown = crop_and_flip(x, keys)[:, 0, 4:6, 4:6].flatten(1)
    counts = torch.unique(shown, dim=0, return_counts=True)[1]
    assert len(counts) == 9 * 9 * 2
    assert ((counts - 200).abs() < 6 * 200**0.5).all()


@given(rise=st.floats(0.05, 0.95), peak=st.floats(0.01, 1))
def test_one_cycle_rises_along_a_line_and_falls_along_a_cosine(rise, peak):
    assert one_cycle(0.0, peak, rise) == pytest.approx(0.04 * peak)
    assert one_cycle(rise / 2, peak, rise) == pytest.approx(0.52 * peak)
    assert one_cycle(rise, peak, rise) == pytest.approx(peak, rel=1e-4)
    assert one_cycle((1 + rise) / 2, peak, rise) == pytest.approx(peak / 2, rel=1e-4)
    assert 0 < one_cycle(1.0, peak, rise) < 1e-4 * peak


def test_accuracy_counts_hits_in_float32(data):
    images, labels = data
    model = small().eval()
    hits = (model(images.float() / 255).argmax(1) == labels).float().mean()
    assert accuracy(model, images, labels, batch_size=7) == pytest.approx(float(hits))


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_recipes_in_the_package_load_and_build(name):
    plan = load_recipe(name)
    assert plan.name == name
    assert build(plan.architecture, plan.ace)(torch.rand(2, 3, 32, 32)).shape == (2, 10)
    assert TrainingRecipe.model_validate_json(plan.model_dump_json()) == plan


def test_members_of_a_family_differ_in_its_key_alone():
    one, two = (load_recipe(f"cifar10-vgg11-ace{lam}") for lam in (5, "inf"))
    assert (one.ace, two.ace) == (5.0, float("inf"))
    assert one.model_copy(update={"name": two.name, "ace": two.ace}) == two
    assert content_digest(one) != content_digest(two)
    assert content_digest(one) == content_digest(load_recipe("cifar10-vgg11-ace5"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epochs: 3", "architecture: Field required"),
        ("architecture: resnet_20\nepochs: 1\npeak_lr: 0.1", "did you mean 'resnet20'"),
        (PLAIN + "epoch: 3", "epoch: Extra inputs"),
        ("architecture: toy\nepochs: 0\npeak_lr: 0.1", "epochs: .*got 0"),
        (PLAIN + "ace: -2", "expected λ ≥ 0"),
        (
            PLAIN + "adversary: {eps: 8, steps: 1, step_size: 1}",
            "adversary.eps: .*got 8",
        ),
        (
            PLAIN + "adversary: {eps: 8/0, steps: 1, step_size: 1}",
            "expected for example 8/255",
        ),
        ("- a\n- b", "recipe"),
        ("a: [", "recipe"),
    ],
)
def test_bad_recipes(tmp_path, text, message):
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_recipe(str(path))
