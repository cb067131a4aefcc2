"""The defense weights in the package. Oracles: their cards, binomial tolerance, files' bytes."""

import json
import math
import zlib
from pathlib import Path

import pytest
import torch

import feint
from feint.core import random
from feint.data import load as load_data
from feint.defenses import ACE, HGD, PRM, MagNet, PixelDefend, S2SNet
from feint.defenses._learned import Learned, bundled_weights, weights_path
from feint.models import load
from feint.models.bundle import read_card
from feint.training.defense import begin
from feint.training.recipe import DefenseRecipe, load_recipe

FAMILIES = {
    "segnet": S2SNet,
    "unet": ACE,
    "dunet": HGD,
    "magnet": MagNet,
    "pixelcnn": PixelDefend,
}


@pytest.mark.parametrize("name", bundled_weights())
def test_cards_tell_how_the_weights_were_made(name):
    card = read_card(weights_path(name))  # checks the SHA-256
    plan = load_recipe(name)
    assert isinstance(plan, DefenseRecipe)
    assert DefenseRecipe.model_validate(card["recipe"]) == plan
    defense = begin(plan)
    assert card["family"] == defense.family
    assert card["structure"] == json.loads(json.dumps(defense.structure))
    assert card["parameters"] == sum(p.numel() for p in defense.network.parameters())
    assert card["data"]["test"]["images"] == 10_000
    assert card["accuracy"]["clean"]["n"] == (plan.judged or 10_000)


@pytest.mark.parametrize("name", bundled_weights())
def test_accuracy_and_reconstruction_are_those_of_the_card(name):
    """On the 500 bundled test images, within four standard deviations of the card's 10 000.

    PixelDefend on 100 of them, which it takes seconds for; its card has 500.
    """
    card = read_card(weights_path(name))
    family = FAMILIES[card["family"]]
    extra = {"form": "unet"} if family is ACE else {}
    defense = family(weights=name, **extra)
    assert isinstance(defense, Learned)
    judged = card["accuracy"]["clean"]["n"]
    data = load_data("bundled:cifar10", samples=500 if judged == 10_000 else 100)
    classifier = load(card["recipe"]["classifier"])
    hits, squares, nats, values = 0, 0.0, 0.0, 0
    for batch in data.batches(100):
        with torch.no_grad():
            hits += int((classifier(defense(batch.x)).argmax(1) == batch.y).sum())
            if isinstance(defense, PixelDefend):
                nats += float(defense.log_likelihood(batch.x).sum())
            else:
                squares += float((defense.learn(batch.x, {}) - batch.x).square().sum())
        values += batch.x.numel()
    share = card["accuracy"]["clean"]["value"]
    deviation = math.sqrt(share * (1 - share) * (1 / len(data) + 1 / judged))
    assert abs(hits / len(data) - share) < 4 * deviation
    if isinstance(defense, PixelDefend):
        assert -nats / math.log(2) / values == pytest.approx(card["bits_per_value"], rel=0.1)
    else:
        assert math.sqrt(squares / values) == pytest.approx(card["reconstruction_rms"], rel=0.1)


def test_defaults_are_the_bundled_weights():
    assert S2SNet().structure == S2SNet(weights="cifar10-s2snet").structure
    x = random.uniform(random.keys(0, 2), (3, 32, 32))
    assert torch.equal(S2SNet()(x), S2SNet(weights="cifar10-s2snet")(x))
    control = S2SNet(weights="cifar10-segnet")
    for name, value in control.network.encode.state_dict().items():  # frozen in the second stage
        assert torch.equal(value, S2SNet().network.encode.state_dict()[name])
    unet = ACE(form="unet")
    torch.testing.assert_close(PRM(shift=False)(x), unet(x))


def test_the_package_stays_small():
    """The wheel's limit is 8 MB; it is a zip, so every file is deflated apart."""
    files = [p for p in Path(feint.__file__).parent.rglob("*") if "__pycache__" not in p.parts]
    assert sum(len(zlib.compress(p.read_bytes())) for p in files if p.is_file()) < 8e6
