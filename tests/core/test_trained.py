"""Models that a recipe left in the cache. Oracle: the model that was saved."""

from pathlib import Path

import pytest
import torch

from feint.core.errors import ConfigError, DataError
from feint.core.trained import cache_folder, trained_folder, trained_path
from feint.models import build, load, save_bundle


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FEINT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("feint.core.trained._checkout", lambda: [tmp_path / "weights"])
    return tmp_path / "cache"


def leave(name, digest):
    model = build("toy", 10.0).eval()
    folder = trained_folder(name, digest)
    folder.mkdir(parents=True)
    card = {"architecture": "toy", "ace": 10.0, "classes": 10, "input_size": [32, 32]}
    save_bundle(model, folder / f"{name}.safetensors", card)
    return model


def test_a_trained_model_is_found_by_its_name_and_content(cache):
    model = leave("mine", "abc")
    x = torch.rand(2, 3, 32, 32)
    for spec in ("trained:mine", "trained:mine@abc"):
        assert torch.equal(load(spec)(x), model(x))


def test_missing_weights_say_how_to_make_them(cache):
    leave("mine", "abc")
    with pytest.raises(DataError, match="there are mine; make them: feint train other"):
        load("trained:other")
    with pytest.raises(DataError, match="feint train mine"):
        trained_path("mine@abd")


def test_two_contents_of_one_name_are_not_guessed_between(cache):
    leave("mine", "abc")
    leave("mine", "abd")
    with pytest.raises(ConfigError, match="trained:mine@abc, trained:mine@abd"):
        trained_path("mine")
    assert trained_path("mine@abd").parent.name == "mine@abd"


def test_weights_of_a_checkout_stand_behind_those_of_the_cache(cache):
    leave("mine", "abc")
    cache.rename(cache.parent / "weights")
    assert trained_path("mine").is_relative_to(cache.parent / "weights")
    leave("mine", "abc")
    assert trained_path("mine").is_relative_to(cache)
    leave("mine", "abd")
    with pytest.raises(ConfigError, match="trained:mine@abc, trained:mine@abd"):
        trained_path("mine")


def test_the_weights_of_this_repository_need_no_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FEINT_CACHE", str(tmp_path))
    found = trained_path("cifar10-toy")
    assert found.parent.parent == Path(__file__).parents[2] / "weights" / "trained"


def test_the_cache_is_in_the_home_folder_by_default(monkeypatch):
    monkeypatch.delenv("FEINT_CACHE", raising=False)
    assert cache_folder().parts[-2:] == (".cache", "feint")
