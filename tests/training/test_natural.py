"""Training on images of any source. Oracles: `Dataset.take`, slices in numpy, equal counts."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from feint.cli.app import app
from feint.core import random
from feint.core.errors import ConfigError, DataError, ShapeError
from feint.data import load as load_data
from feint.defenses import parse
from feint.models import build, initialise
from feint.models.bundle import save_bundle
from feint.training.augment import cut_and_flip
from feint.training.defense import begin, fit_defense
from feint.training.recipe import DefenseRecipe, load_recipe
from feint.training.run import train


def recipe(**changes):
    plain = {
        "name": "wild",
        "defense": "s2snet(stages=1, width=3)",
        "objective": "reconstruct",
        "data": "?",
        "side": 16,
        "crop": 8,
        "held_out": 4,
        "epochs": 1,
        "batch_size": 2,
        "peak_lr": 0.01,
    }
    return DefenseRecipe.model_validate(plain | changes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Twelve photographs of different sizes in a list, and a classifier of them."""
    folder = tmp_path_factory.mktemp("wild")
    photos = load_data("bundled:cifar10", samples=12)
    rows = ["file,label"]
    for k, batch in enumerate(photos.batches(1)):
        levels = (batch.x[0] * 255).byte().permute(1, 2, 0).numpy()
        Image.fromarray(levels).resize((20 + k, 30 - k)).save(folder / f"{k}.png")
        rows.append(f"{k}.png,{int(batch.y)}")
    (folder / "list.csv").write_text("\n".join(rows) + "\n")
    model = build("toy")
    initialise(model, 3)
    card = {"architecture": "toy", "ace": None, "classes": 10, "input_size": [32, 32]}
    save_bundle(model, folder / "toy.safetensors", card)
    return folder


def test_what_is_held_out_are_the_images_that_evaluations_take_first(tmp_path, folder):
    spec = str(folder / "list.csv")
    card = train(recipe(samples=5), data=spec, out=tmp_path)
    whole = load_data(spec, resize=16, fit="crop")
    assert card["data"]["test"] == {"images": 4, "fingerprint": whole.take(4).fingerprint}
    assert card["data"]["train"]["images"] == 5
    learned = whole.subset([*whole.take(9).index.tolist()][4:])
    assert card["data"]["train"]["fingerprint"] == learned.fingerprint
    assert card["data"]["spec"] == "list.csv"
    rest = train(recipe(), data=spec, out=tmp_path / "all")
    assert rest["data"]["train"]["images"] == 8


def test_trained_weights_are_opened_by_name_and_a_second_stage_begins_with_them(
    tmp_path, folder, monkeypatch
):
    monkeypatch.setenv("FEINT_CACHE", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "300")
    path = tmp_path / "wild.yaml"
    path.write_text(json.dumps(recipe().model_dump(mode="json")))
    command = ["train", str(path), "--data", str(folder / "list.csv"), "--json"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    card = json.loads(done.stdout)
    x = torch.rand(2, 3, 9, 9)
    named, opened = (parse(f"s2snet(weights={w!r})") for w in ("trained:wild", card["path"]))
    assert torch.equal(named(x), opened(x))
    second = recipe(
        name="wilder",
        start="trained:wild",
        objective="through-classifier",
        classifier="?",
        side=32,
        crop=None,
    )
    path.write_text(json.dumps(second.model_dump(mode="json")))
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 2
    assert "give classifier (--classifier)" in " ".join(done.output.split())
    done = CliRunner().invoke(app, [*command, "--classifier", str(folder / "toy.safetensors")])
    assert done.exit_code == 0, done.output
    after = json.loads(done.stdout)
    assert after["start"]["sha256"] == card["sha256"]
    assert after["recipe"]["classifier"] == "toy.safetensors"
    assert after["accuracy"]["clean"]["n"] == 4


def test_what_cannot_be_is_refused(tmp_path, folder):
    spec = str(folder / "list.csv")
    for changes, options, error, message in (
        ({}, {}, ConfigError, "leaves the images open; give data"),
        ({"classifier": "?"}, {"data": spec}, ConfigError, "leaves the classifier open"),
        ({"held_out": 12}, {"data": spec}, ConfigError, "12 images; recipe wild holds 12 out"),
        ({"side": None}, {"data": spec}, ShapeError, "expected one size"),
        ({"start": "trained:none"}, {"data": spec}, DataError, "make them: feint train none"),
    ):
        with pytest.raises(error, match=message):
            train(recipe(**changes), out=tmp_path / "out", **options)
    with pytest.raises(ConfigError, match="trains a classifier; leave classifier out"):
        train("cifar10-toy", out=tmp_path / "out", classifier="bundled:cifar10-resnet20")
    with pytest.raises(ValueError, match="crop is 17; expected at most side, 16"):
        recipe(crop=17)
    with pytest.raises(ValueError, match="crop is for augment: crop-flip"):
        recipe(augment="none")
    plan = recipe(side=None)
    with pytest.raises(ShapeError, match="sides of at least crop, 8"):
        fit_defense(begin(plan), plan, torch.zeros(4, 3, 7, 9, dtype=torch.uint8), torch.arange(4))


@pytest.mark.parametrize(
    ("stem", "default"),
    [
        ("unet", "ace(form='unet', weights='untrained')"),
        ("segnet", "s2snet(weights='untrained')"),
        ("s2snet", "s2snet(weights='untrained')"),
    ],
)
def test_small_recipes_do_what_the_papers_do_in_small(stem, default):
    small, papers = load_recipe(f"natural-{stem}"), load_recipe(f"imagenet-{stem}")
    for field in ("objective", "parts", "data", "classifier", "corrupt", "adversary"):
        assert getattr(small, field) == getattr(papers, field)
    of_small, of_papers = (begin(r.model_copy(update={"start": None})) for r in (small, papers))
    assert of_papers.structure == parse(default).structure
    assert of_small.structure["width"] < of_papers.structure["width"]


@pytest.mark.parametrize("side", [1, 4, 5])
def test_cuts_are_numpys_slices(side):
    x = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (6, 3, 5, 7), np.uint8))
    keys = random.keys(1, 6)
    got = cut_and_flip(x, keys, side)
    for image, out in zip(x.numpy(), got.numpy(), strict=True):
        cuts = [
            image[:, i : i + side, j : j + side] for i in range(6 - side) for j in range(8 - side)
        ]
        assert any(np.array_equal(out, cut) or np.array_equal(out, cut[:, :, ::-1]) for cut in cuts)
    assert torch.equal(cut_and_flip(x.flip(0), keys.flip(0), side).flip(0), got)


def test_every_cut_and_flip_occurs_equally_often():
    keys = random.keys(0, 3 * 4 * 2 * 200)
    x = torch.arange(30, dtype=torch.int64).reshape(1, 1, 5, 6).expand(len(keys), 1, 5, 6)
    counts = torch.unique(cut_and_flip(x, keys, 3).flatten(1), dim=0, return_counts=True)[1]
    assert len(counts) == 3 * 4 * 2
    assert ((counts - 200).abs() < 6 * 200**0.5).all()
