"""`train`: data in, weights and card out. Oracle: the weights that come out, measured anew."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from scipy.stats import norm

from feint.core.errors import ConfigError, DataError, UnknownNameError
from feint.data import load as load_data
from feint.models import build, initialise, load, resolve
from feint.training.recipe import TrainingRecipe
from feint.training.run import train


def plan(**changes):
    plain = {"name": "mini", "architecture": "toy", "epochs": 2, "batch_size": 20, "peak_lr": 0.02}
    return TrainingRecipe.model_validate(plain | {"precision": "float32"} | changes)


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """The bundled images, parted by place: 300 to learn from, 200 to be measured on."""
    data = load_data("bundled:cifar10")
    x, y = data.images().numpy(), data.labels.numpy()
    path = tmp_path_factory.mktemp("data") / "mini.npz"
    np.savez(path, x_train=x[:300], y_train=y[:300], x_test=x[300:], y_test=y[300:])
    return str(path)


def test_train_writes_weights_and_a_card_that_tells_the_truth(tmp_path, archive):
    reports = []
    card = train(plan(ace=10, peak_lr=0.002), data=archive, out=tmp_path, on_epoch=reports.append)
    assert [r.epoch for r in reports] == [1, 2]
    assert card == {**json.loads((tmp_path / "mini.json").read_text()), "path": card["path"]}
    found = resolve(card["path"])
    test = load_data(archive)
    with torch.no_grad():
        hits = sum(int((found.model(b.x).argmax(1) == b.y).sum()) for b in test.batches(64))
    clean = card["accuracy"]["clean"]
    assert (clean["hits"], clean["n"]) == (hits, 200)
    # Wilson 1927, written out.
    z, n, p = norm.ppf(0.975), 200, hits / 200
    middle, half = p + z * z / (2 * n), z * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = ((middle + sign * half) / (1 + z * z / n) for sign in (-1, 1))
    assert (clean["low"], clean["high"]) == pytest.approx((low, high))
    assert card["data"]["test"] == {"images": 200, "fingerprint": test.fingerprint}
    assert (card["architecture"], card["ace"], card["classes"]) == ("toy", 10.0, 10)
    assert card["recipe"]["epochs"] == 2
    assert set(card["versions"]) == {"feint", "python", "torch", "torchvision", "numpy"}
    again = train(plan(ace=10, peak_lr=0.002), data=archive, out=tmp_path)
    assert again == card


def test_train_starts_from_given_weights(tmp_path, archive):
    start = build("toy")
    initialise(start, 9)
    save_file(start.state_dict(), tmp_path / "start.safetensors")
    spec = str(tmp_path / "start.safetensors")
    card = train(plan(start=spec, peak_lr=1e-12), data=archive, out=tmp_path / "run")
    assert card["start"]["spec"] == "start.safetensors"
    assert str(tmp_path) not in (tmp_path / "run" / "mini.json").read_text()
    model = load(card["path"]).net
    x = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(model(x), start.eval()(x))
    with pytest.raises(ConfigError, match="another architecture than the recipe's toy, ace=10"):
        train(plan(start=spec, ace=10), data=archive, out=tmp_path / "other")
    with pytest.raises(UnknownNameError, match="bundled model"):
        train(plan(start="bundled:nothing"), data=archive, out=tmp_path / "other")
    with pytest.raises(ConfigError, match=r"expected bundled:NAME or NAME\.safetensors"):
        train(plan(start="torchvision:resnet18"), data=archive, out=tmp_path / "other")


def test_infinite_lambda_is_written_and_read(tmp_path, archive):
    card = train(plan(ace="inf", epochs=1), data=archive, out=tmp_path)
    assert (card["ace"], card["recipe"]["ace"]) == ("inf", "inf")
    assert load(card["path"]).net.net.ace.lam == float("inf")


def test_missing_data_and_recipes(tmp_path, archive):
    with pytest.raises(DataError, match="root=DIR"):
        train(plan(), out=tmp_path, root=tmp_path)
    with pytest.raises(UnknownNameError, match="did you mean 'cifar10-resnet20'"):
        train("cifar10-resnet2", data=archive, out=tmp_path)
    with pytest.raises(ConfigError, match="is not split"):
        train(plan(), data="bundled:cifar10", out=tmp_path)
    assert not list(tmp_path.iterdir())
