"""Training of learned defenses. Oracles: an uninterrupted run, torch's AdamW written out, the
formulas of the objectives in numpy, weights measured anew.
"""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from typer.testing import CliRunner

from feint.cli.app import app
from feint.core import random
from feint.core.errors import ConfigError, DataError, UnknownNameError
from feint.data import load as load_data
from feint.defenses import S2SNet, parse
from feint.defenses._learned import Learned
from feint.models import build, initialise
from feint.models.bundle import save_bundle
from feint.training.augment import crop_and_flip
from feint.training.defense import begin, defended_accuracy, fit_defense, measured
from feint.training.fit import one_cycle
from feint.training.objectives import OBJECTIVES, Example
from feint.training.recipe import DefenseRecipe, TrainingRecipe, list_recipes, load_recipe
from feint.training.run import train

TINY = "s2snet(stages=1, width=3)"
ADVERSARY = {"eps": "8/255", "steps": 2, "step_size": "5/255", "warmup": 0.5}


class Judge(nn.Module):
    """A convolution and a linear layer."""

    def __init__(self):
        super().__init__()
        self.conv, self.linear = nn.Conv2d(3, 4, 3), nn.Linear(4, 4)

    def forward(self, x):
        return self.linear(torch.tanh(self.conv(x)).mean((2, 3)))


def judge():
    with torch.random.fork_rng(devices=[]):
        model = Judge()
    initialise(model, 5)
    return model.eval().requires_grad_(False)


def recipe(**changes):
    plain = {
        "name": "small",
        "defense": TINY,
        "objective": "reconstruct",
        "epochs": 3,
        "batch_size": 10,
        "peak_lr": 0.01,
        "precision": "float32",
    }
    return DefenseRecipe.model_validate(plain | changes)


@pytest.fixture(scope="module")
def data():
    keys = random.keys(0, 40)
    return random.uniform(keys, (3, 8, 8), 0.0, 256.0).to(torch.uint8), torch.arange(40) % 4


def trained(plan, data, **kwargs):
    return fit_defense(begin(plan), plan, *data, classifier=judge(), **kwargs)


def state(defense):
    return {k: v.clone() for k, v in defense.network.state_dict().items()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


CHANGES = {
    "reconstruct": {"average": 0.9},
    "corrupted": {"corrupt": "noise(scale=0.1)", "precision": "bf16", "optimizer": "sgd"},
    "through": {"objective": "through-classifier", "classifier": "x", "parts": ["network.decode"]},
    "guided": {
        "objective": "guided",
        "classifier": "x",
        "layer": "conv",
        "adversary": ADVERSARY | {"share": 0.5},
    },
}


@pytest.mark.parametrize("changes", CHANGES.values(), ids=list(CHANGES))
def test_a_stopped_run_ends_with_the_weights_of_an_uninterrupted_one(tmp_path, data, changes):
    plan = recipe(**changes)
    before = torch.get_rng_state()
    whole = trained(plan, data)

    class Stop(Exception):
        pass

    def stop(report):
        raise Stop

    for _ in range(plan.epochs):  # killed after every epoch
        with pytest.raises(Stop):
            trained(plan, data, folder=tmp_path, on_epoch=stop)
    assert equal(state(whole), state(trained(plan, data, folder=tmp_path)))
    assert not equal(state(whole), state(begin(plan)))
    assert not any(p.requires_grad for p in whole.parameters())
    assert not any(m.training for m in whole.modules())
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [entry["epoch"] for entry in log] == [1, 2, 3]
    assert all((entry["accuracy"] is None) == (plan.classifier is None) for entry in log)
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(ConfigError, match="another recipe"):
        trained(plan.model_copy(update={"seed": 1}), data, folder=tmp_path)


def test_steps_are_those_of_torch_adamw(data):
    plan = recipe(epochs=1, weight_decay=0.01)
    ours = trained(plan, data)
    defense = begin(plan)
    net = defense.network.train().requires_grad_(True)
    groups = [
        {"params": [p for p in net.parameters() if p.ndim > 1], "weight_decay": 0.01},
        {"params": [p for p in net.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.999))
    order = random.permutation(random.fold(random.keys(0, 1), "order", 0), 40)[0]
    mean, std = (
        torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    )
    for step, index in enumerate(order.split(10)):
        for group in optimizer.param_groups:
            group["lr"] = one_cycle(step / 4, 0.01, 0.2)
        keys = random.fold(random.keys(0, index), "augment", 0)
        x = (crop_and_flip(data[0][index], keys).float() / 255 - mean) / std
        optimizer.zero_grad()
        (net(x) - x).square().mean().backward()
        optimizer.step()
    for name, value in net.named_parameters():
        # Biases in front of a batch normalisation have no gradient but rounding, which Adam scales.
        if not (name.endswith("bias") and "stages" in name):
            torch.testing.assert_close(ours.network.state_dict()[name], value, rtol=1e-3, atol=1e-5)


def test_the_decoder_alone_learns_and_everything_else_stays_bit_by_bit(data):
    plan = recipe(**CHANGES["through"])
    model, start = judge(), begin(plan)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    first = state(start)
    after = state(fit_defense(start, plan, *data, classifier=model))
    assert equal(before, model.state_dict())
    for name, value in after.items():
        if name.startswith("encode."):  # weights and batch statistics
            assert torch.equal(value, first[name]), name
        else:
            assert not torch.equal(value, first[name]), name


def test_through_the_classifier_learns_what_it_wants(data):
    """Property: the loss falls where the plain autoencoder is worse than it could be."""
    reports = []
    trained(recipe(**CHANGES["through"], epochs=12), data, on_epoch=reports.append)
    assert reports[-1].loss < reports[0].loss
    assert reports[-1].accuracy is not None


def example(**changes):
    x = random.uniform(random.keys(1, 3), (3, 8, 8))
    plain = {
        "defense": parse("s2snet(stages=1, weights='untrained', width=3)"),
        "classifier": judge(),
        "x": x,
        "given": (x + 0.1).clamp(max=1),
        "y": torch.tensor([0, 1, 2]),
        "params": {},
    }
    return Example(**plain | changes)


def test_objectives_are_their_formulas():
    e = example()
    made = e.defense(e.given).double().numpy()
    x, std = e.x.double().numpy(), np.array([0.229, 0.224, 0.225])[:, None, None]
    loss, logits = OBJECTIVES["reconstruct"].function(e)
    assert logits is None
    assert loss.numpy() == pytest.approx((((made - x) / std) ** 2).mean((1, 2, 3)), rel=1e-4)
    z = judge()(e.defense(e.given)).double().numpy()
    own = z[np.arange(3), e.y]
    loss, logits = OBJECTIVES["through-classifier"].function(e)
    assert logits.numpy() == pytest.approx(z, rel=1e-4)
    assert loss.numpy() == pytest.approx(np.log(np.exp(z).sum(1)) - own, rel=1e-4)
    loss, _ = OBJECTIVES["guided"].function(e)
    assert loss.numpy() == pytest.approx(np.abs(z - judge()(e.x).numpy()).mean(1), rel=1e-4)
    loss, _ = OBJECTIVES["guided"].function(example(layer="conv"))
    conv = judge().conv
    gap = (conv(e.defense(e.given)) - conv(e.x)).abs().mean((1, 2, 3))
    assert loss.numpy() == pytest.approx(gap.numpy(), rel=1e-4)
    with pytest.raises(UnknownNameError, match="did you mean 'conv'"):
        OBJECTIVES["guided"].function(example(layer="conf"))

    class Even:  # every value has the density of U(0, 1/8)
        def log_likelihood(self, x):
            return torch.full((len(x),), x[0].numel() * np.log(8.0))

    loss, _ = OBJECTIVES["likelihood"].function(example(defense=Even()))
    assert loss.numpy() == pytest.approx([-3.0] * 3)


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    data = load_data("bundled:cifar10")
    x, y = data.images().numpy(), data.labels.numpy()
    folder = tmp_path_factory.mktemp("data")
    np.savez(
        folder / "mini.npz", x_train=x[:60], y_train=y[:60], x_test=x[300:340], y_test=y[300:340]
    )
    model = build("toy")
    initialise(model, 3)
    card = {"architecture": "toy", "ace": None, "classes": 10, "input_size": [32, 32]}
    save_bundle(model, folder / "toy.safetensors", card)
    return folder


@pytest.mark.parametrize("store", ["float32", "float16"])
def test_train_writes_weights_that_open_and_a_card_that_tells_the_truth(tmp_path, archive, store):
    classifier = str(archive / "toy.safetensors")
    plan = recipe(classifier=classifier, epochs=1, store=store)
    card = train(plan, data=str(archive / "mini.npz"), out=tmp_path)
    assert card == {**json.loads((tmp_path / "small.json").read_text()), "path": card["path"]}
    assert str(archive) not in (tmp_path / "small.json").read_text()
    found = parse(f"s2snet(weights={card['path']!r})")
    assert isinstance(found, S2SNet)
    assert found.structure == {"width": 3, "stages": 1} == card["structure"]
    kinds = {v.dtype for v in load_file(card["path"]).values() if v.is_floating_point()}
    assert kinds == {getattr(torch, store)}
    test = load_data(str(archive / "mini.npz"))
    x = test.images().float() / 255
    from feint.models import load

    model = load(classifier)
    with torch.no_grad():
        hits = int((model(found(x)).argmax(1) == test.labels).sum())
        alone = int((model(x).argmax(1) == test.labels).sum())
        rms = float((found(x) - x).double().square().mean().sqrt())
    assert (card["accuracy"]["clean"]["hits"], card["accuracy"]["undefended"]["hits"]) == (
        hits,
        alone,
    )
    assert card["reconstruction_rms"] == pytest.approx(rms, rel=1e-5)
    assert defended_accuracy(found, model, test.images(), test.labels, 7) == {
        "clean": hits,
        "undefended": alone,
    }
    assert measured(found, test.images(), 7)["reconstruction_rms"] == pytest.approx(rms, rel=1e-5)
    # A second stage begins where the first one ended.
    second = recipe(
        name="second",
        objective="through-classifier",
        classifier=classifier,
        start=card["path"],
        parts=["network.decode"],
        epochs=1,
        peak_lr=1e-12,
        judged=9,
    )
    after = train(second, data=str(archive / "mini.npz"), out=tmp_path / "two")
    assert after["start"] == {"spec": "small.safetensors", "sha256": card["sha256"]}
    assert after["accuracy"]["clean"]["n"] == 9
    first, then = load_file(card["path"]), load_file(after["path"])
    for name in first:
        if name.startswith("encode.") or name.endswith("weight"):
            torch.testing.assert_close(
                then[name].float(), first[name].float(), rtol=1e-6, atol=1e-6
            )


def test_the_command_line_trains_a_defense(tmp_path, archive, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    path, mini = tmp_path / "r.yaml", str(archive / "mini.npz")
    plan = recipe(classifier=str(archive / "toy.safetensors"), epochs=1).model_dump(mode="json")
    for changes, said in (({}, "undefended"), ({"classifier": None}, "small: reconstruction")):
        path.write_text(json.dumps(plan | changes))
        out = tmp_path / said[:3]
        done = CliRunner().invoke(app, ["train", str(path), "--data", mini, "--out", str(out)])
        assert done.exit_code == 0, done.output
        assert said in done.stdout
        assert "reconstruction error 0." in " ".join(done.stdout.split())
        again = ["train", str(path), "--data", mini, "--out", str(out), "--json"]
        card = json.loads(CliRunner().invoke(app, again).stdout)
        assert card["family"] == "segnet"
        assert sorted(card["accuracy"]) == ([] if changes else ["clean", "undefended"])


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"objective": "recostruct"}, ConfigError, "did you mean 'reconstruct'"),
        ({"defense": "s2snet*2"}, ConfigError, "expected one name"),
        ({"defense": "s2snet(weights='x')"}, ConfigError, "leave weights to `start`"),
        ({"defense": "jpeg"}, UnknownNameError, "keyword of jpeg 'weights'"),
        ({"defense": "s2snot"}, UnknownNameError, "did you mean 's2snet'"),
        ({"objective": "likelihood"}, ConfigError, r"needs a defense with log_likelihood\(…\)"),
        ({"objective": "guided"}, ConfigError, "needs classifier"),
        ({"adversary": ADVERSARY}, ConfigError, "name one"),
        ({"parts": ["network.decoder"]}, UnknownNameError, "did you mean 'network.decode'"),
        ({"start": "nothing"}, UnknownNameError, "defense weights 'nothing'"),
        ({"start": "nothing.safetensors"}, DataError, "there is no such file"),
    ],
)
def test_recipes_that_cannot_be(tmp_path, changes, error, message):
    path = tmp_path / "r.yaml"
    path.write_text(json.dumps(recipe().model_dump(mode="json") | changes))
    with pytest.raises(error, match=message):
        train(str(path), data="nowhere.npz", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_weights_of_another_kind_are_refused_as_a_start(tmp_path, archive):
    with pytest.raises(ConfigError, match=r"family None; expected 'segnet'"):
        begin(recipe(start=str(archive / "toy.safetensors")))
    plan = recipe(epochs=1)
    card = train(plan, data=str(archive / "mini.npz"), out=tmp_path)
    with pytest.raises(ConfigError, match="another architecture than the recipe's"):
        begin(recipe(start=card["path"], defense="s2snet(stages=1, width=4)"))


def test_an_unknown_kind_is_refused(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("kind: attack\n")
    with pytest.raises(ConfigError, match="expected classifier or defense"):
        load_recipe(str(path))
    path.write_text("kind: classifier\narchitecture: toy\nepochs: 1\npeak_lr: 0.1\n")
    assert isinstance(load_recipe(str(path)), TrainingRecipe)


@pytest.mark.parametrize(
    "name", [n for n in list_recipes() if isinstance(load_recipe(n), DefenseRecipe)]
)
def test_recipes_in_the_package_load_and_begin(name):
    plan = load_recipe(name)
    assert plan.name == name
    assert DefenseRecipe.model_validate_json(plan.model_dump_json()) == plan
    defense = begin(plan.model_copy(update={"start": None}))
    assert isinstance(defense, Learned)
    with torch.no_grad():
        x = torch.rand(2, 3, 32, 32)
        assert defense.learn(x, defense.sample(x, random.keys(0, 2))).shape == x.shape
