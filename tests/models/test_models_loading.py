"""Loading by spec. Oracle: the model that was saved, or the function that the test wrote."""

import json
import math
import pickle
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torchvision
from safetensors.torch import load_file, save_file
from torch import nn

from feint.core.errors import (
    ConfigError,
    DataError,
    DeviceError,
    ModelError,
    UnknownNameError,
)
from feint.models import (
    Normalized,
    Resized,
    build,
    bundle,
    bundled,
    card,
    check_model,
    describe,
    fingerprint,
    initialise,
    load,
    resolve,
    save_bundle,
    zoo,
)

CARD = {"architecture": "toy", "ace": 10.0, "classes": 10, "input_size": [32, 32]}


def same(a, b, shape=(2, 3, 32, 32)):
    x = torch.rand(shape)
    return torch.equal(a.eval()(x), b.eval()(x))


@pytest.fixture
def toy():
    model = build("toy", 10.0)
    initialise(model, 1)
    return model


@pytest.fixture
def shelf(tmp_path, monkeypatch, toy):
    """A folder of bundled weights with one model in it."""
    monkeypatch.setattr(bundle, "WEIGHTS", tmp_path)
    save_bundle(toy, tmp_path / "mine.safetensors", {**CARD, "accuracy": 0.5})
    return tmp_path


def test_bundled_round_trip(shelf, toy):
    assert bundled() == ["mine"]
    assert card("mine")["accuracy"] == 0.5
    found = resolve("bundled:mine")
    assert same(found.model, toy)
    assert not found.model.training
    assert found.card["parameters"] == sum(p.numel() for p in toy.parameters())
    assert found.notes == ("images of another size are resized to 32×32 inside the model",)
    assert found.model(torch.rand(1, 3, 50, 40)).shape == (1, 10)
    assert found.facts == {
        "type": "Normalized",
        "parameters": found.card["parameters"],
        "classes": 10,
        "input_size": [32, 32],
        "stochastic": False,
        "training": False,
    }
    assert sorted(p.name for p in shelf.iterdir()) == ["mine.json", "mine.safetensors"]


def test_bundled_names_and_damage(shelf):
    with pytest.raises(UnknownNameError, match="did you mean 'mine'"):
        load("bundled:mina")
    with pytest.raises(ConfigError, match="brings its own architecture"):
        load("bundled:mine", arch="toy")
    path = shelf / "mine.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    with pytest.raises(DataError, match=r"not the file that mine\.json describes"):
        load("bundled:mine")
    (shelf / "mine.json").write_text("{")
    with pytest.raises(DataError, match="no model card"):
        load("bundled:mine")
    (shelf / "mine.json").unlink()
    with pytest.raises(DataError, match="cannot read"):
        load("bundled:mine")


def test_saving_is_whole_or_not_at_all(shelf, toy, monkeypatch):
    before = {p.name: p.read_bytes() for p in shelf.iterdir()}

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(DataError, match="No space left"):
        save_bundle(build("toy"), shelf / "mine.safetensors", {"architecture": "toy"})
    assert {p.name: p.read_bytes() for p in shelf.iterdir()} == before
    with pytest.raises(ConfigError, match="architecture"):
        save_bundle(toy, shelf / "other.safetensors", {})
    with pytest.raises(ConfigError, match=r"\.safetensors"):
        save_bundle(toy, shelf / "other.bin", CARD)


def test_checkpoint_with_and_without_metadata(shelf, toy, tmp_path):
    path = str(shelf / "mine.safetensors")
    assert same(load(path), toy)
    assert isinstance(load(path), Resized)
    assert same(load(path, arch="toy(ace=10)"), toy)
    with pytest.raises(ConfigError, match=r"made for toy\(ace=10, classes=10\), but arch is toy"):
        load(path, arch="toy")
    bare = tmp_path / "bare.safetensors"
    save_file(toy.state_dict(), bare)
    with pytest.raises(ConfigError, match=r"give arch \(--arch\), one of resnet20"):
        load(str(bare))
    assert same(load(str(bare), arch="toy(ace=10, classes=10)"), toy)


def test_infinite_lambda_survives_json(tmp_path):
    model = build("toy", math.inf)
    initialise(model, 0)
    save_bundle(model, tmp_path / "m.safetensors", {"architecture": "toy", "ace": "inf"})
    assert same(load(str(tmp_path / "m.safetensors")), model)
    assert same(load(str(tmp_path / "m.safetensors"), arch="toy(ace=inf)"), model)


def test_half_precision_weights_are_widened(tmp_path, toy):
    save_file({k: v.half() for k, v in toy.state_dict().items()}, tmp_path / "m.safetensors")
    model = load(str(tmp_path / "m.safetensors"), arch="toy(ace=10)")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    torch.testing.assert_close(
        model.net.network.fc2.weight, toy.net.network.fc2.weight, atol=1e-3, rtol=1e-3
    )


@pytest.mark.parametrize(
    ("arch", "message"),
    [
        (
            "resnet20",
            r"another architecture than resnet20\(classes=10\): \d+ weights missing, first",
        ),
        ("toy", "14 unexpected, first 'net.ace"),
        ("toy(ace=10, classes=7)", r"2 of another shape, first .*\(10, 512\), expected \(7, 512\)"),
        ("resnet_20", "did you mean 'resnet20'"),
        ("toy(lam=10)", "unknown option of arch"),
        ("toy(10)", "arch is 'toy"),
        ("toy(ace=f())", "arch is 'toy"),
        ("toy(", r"arch is 'toy\('"),
        ("toy(ace=-1)", "ace is -1"),
        ("toy(ace='a')", "ace is 'a'"),
        ("toy(classes=1)", "classes is 1"),
    ],
)
def test_checkpoints_for_another_architecture(tmp_path, toy, arch, message):
    save_file(toy.state_dict(), tmp_path / "m.safetensors")
    with pytest.raises((ConfigError, UnknownNameError), match=message):
        load(str(tmp_path / "m.safetensors"), arch=arch)


def test_damaged_checkpoints(tmp_path, toy):
    path = tmp_path / "m.safetensors"
    with pytest.raises(DataError, match="no such file"):
        load(str(path), arch="toy")
    save_file(toy.state_dict(), path, {"feint": "{"})
    with pytest.raises(DataError, match="metadata"):
        load(str(path))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match="truncated or no safetensors"):
        load(str(path), arch="toy(ace=10)")
    state = toy.state_dict()
    state["net.network.fc1.weight"][3, 4] = torch.nan
    save_file(state, path)
    with pytest.raises(
        ModelError, match=r"NaN or infinite weights, first 'net\.network\.fc1\.weight'"
    ):
        load(str(path), arch="toy(ace=10)")


class Bomb:
    """A pickle that runs code when it is opened."""

    fired: list[int] = []  # noqa: RUF012  # shared on purpose: the pickle cannot know an instance

    def __reduce__(self):
        return Bomb.fired.append, (1,)


@pytest.mark.parametrize("suffix", ["pt", "pth", "bin", "pkl", "ckpt"])
def test_pickles_stay_closed_without_trust(tmp_path, suffix):
    path = tmp_path / f"m.{suffix}"
    torch.save(Bomb(), path)
    with pytest.raises(ConfigError, match=r"can run code.*trust=True \(--trust\)"):
        load(str(path), arch="toy")
    assert not Bomb.fired


def test_trusted_pickles(tmp_path, toy):
    path = tmp_path / "m.pt"
    for content in (toy.state_dict(), {"state_dict": toy.state_dict(), "epoch": 3}):
        torch.save(content, path)
        found = resolve(str(path), arch="toy(ace=10)", trust=True)
        assert same(found.model, toy)
        assert found.notes[0].startswith("read as tensors only, nothing unpickled")
    with pytest.raises(ConfigError, match=r"holds weights; give arch"):
        load(str(path), trust=True)
    torch.save(toy.train(), path)
    found = resolve(str(path), trust=True)
    assert same(found.model, toy)
    assert found.notes[:2] == (
        "read as pickle, trusted",
        "came in training mode, switched to eval mode",
    )
    with pytest.raises(ConfigError, match="leave arch out"):
        load(str(path), arch="toy", trust=True)
    for content in ([1, 2], {"a": 1}):
        torch.save(content, path)
        with pytest.raises(ModelError, match="expected a module or weights"):
            load(str(path), arch="toy", trust=True)
    path.write_bytes(b"rubbish")
    with pytest.raises(DataError, match="cannot be opened"):
        load(str(path), arch="toy", trust=True)
    path.write_bytes(pickle.dumps(3))
    with pytest.raises((DataError, ModelError)):
        load(str(path), arch="toy", trust=True)
    with pytest.raises(DataError, match="no such file"):
        load(str(tmp_path / "gone.pt"), trust=True)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_trusted_torchscript(tmp_path):
    path = tmp_path / "m.pt"
    plain = build("toy").eval()
    torch.jit.trace(plain, torch.rand(1, 3, 32, 32)).save(str(path))
    found = resolve(str(path), trust=True)
    assert same(found.model, plain)
    assert found.notes == ("read as TorchScript, trusted",)


FILE = """
from dataclasses import dataclass
import torch
from torch import nn
import beside

@dataclass
class Size:
    side: int = 4

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(48, beside.CLASSES))
        nn.init.zeros_(self.net[1].weight)
    def forward(self, x):
        return self.net(x)

def net():
    return Net()

def sized():
    model = Net().eval()
    model.input_size = (3, Size().side, 4)
    return model

def broken():
    raise KeyError("layer9")

def leaves():
    raise SystemExit(3)

def wants(depth):
    return Net()

def number():
    return 3
"""


@pytest.fixture
def mine(tmp_path):
    (tmp_path / "beside.py").write_text("CLASSES = 7\n")
    (tmp_path / "mine.py").write_text(FILE)
    return str(tmp_path / "mine.py")


def test_a_function_in_a_file(mine):
    path = list(sys.path)
    found = resolve(f"{mine}:net")
    assert found.notes == ("came in training mode, switched to eval mode",)
    assert not any(m.training for m in found.model.modules())
    assert found.model(torch.rand(2, 3, 4, 4)).shape == (2, 7)
    assert describe(found.model)["classes"] == 7
    assert sys.path == path


def test_input_size_declared_or_given(mine):
    assert resolve(f"{mine}:net").facts["input_size"] is None
    declared = resolve(f"{mine}:sized")
    assert declared.notes == ("images of another size are resized to 4×4 inside the model",)
    assert declared.model(torch.rand(2, 3, 9, 5)).shape == (2, 7)
    given = load(f"{mine}:net", input_size=4)
    assert isinstance(given, Resized)
    assert given(torch.zeros(1, 3, 9, 9)).shape == (1, 7)
    twice = load(f"{mine}:sized", input_size=4)
    assert not isinstance(twice.net, Resized)
    with pytest.raises(ModelError, match=r"fails on images \(1, 3, 9, 9\).*--input-size"):
        check_model(load(f"{mine}:net"), torch.zeros(1, 3, 9, 9))


@pytest.mark.parametrize(
    ("tail", "error", "message"),
    [
        (":broken", ModelError, r"broken\(\) raised KeyError: 'layer9' \(.*mine\.py line 28\)"),
        (":leaves", ModelError, r"leaves\(\) raised SystemExit: 3"),
        (":wants", ModelError, "missing 1 required positional argument: 'depth'"),
        (":number", ModelError, r"gives a int; expected a torch\.nn\.Module"),
        (":nett", UnknownNameError, "did you mean 'net'"),
        (":FILE", UnknownNameError, "unknown function"),
        ("", ConfigError, "names no function"),
        (":", ConfigError, "names no function"),
        (":a.b", ConfigError, "names no function"),
    ],
)
def test_bad_functions(mine, tail, error, message):
    with pytest.raises(error, match=message) as caught:
        load(f"{mine}{tail}")
    assert "mine.py" in str(caught.value)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import nothing_of_this_name", r"ModuleNotFoundError.*bad\.py line 1"),
        ("x = (1,\n", r"SyntaxError.*bad\.py line 1"),
        ("raise SystemExit", "SystemExit"),
    ],
)
def test_files_that_cannot_be_imported(tmp_path, code, message):
    (tmp_path / "bad.py").write_text(code)
    names = set(sys.modules)
    with pytest.raises(ModelError, match=message):
        load(f"{tmp_path}/bad.py:net")
    assert not {n for n in set(sys.modules) - names if "bad" in n}
    with pytest.raises(DataError, match="no such file"):
        load(f"{tmp_path}/gone.py:net")


def test_unknown_specs_name_the_nearest(shelf):
    with pytest.raises(UnknownNameError, match="did you mean 'torchvision'"):
        load("torchvison:resnet50")
    with pytest.raises(UnknownNameError, match="did you mean 'bundled:mine'"):
        load("bundled-mine")
    with pytest.raises(DeviceError, match="warp"):
        load("bundled:mine", device="warp")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    return tmp_path / "checkpoints"


def test_torchvision_takes_weights_from_the_cache_alone(hub, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("fetched")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    with pytest.raises(UnknownNameError, match="did you mean 'squeezenet1_1'"):
        load("torchvision:squeezenet11")
    with pytest.raises(UnknownNameError, match="did you mean 'IMAGENET1K_V1'"):
        load("torchvision:squeezenet1_1:IMAGENET1K_V9")
    with pytest.raises(DataError, match=r"squeezenet1_1-b8a52dc0\.pth; put them there or fetch"):
        load("torchvision:squeezenet1_1")
    net = torchvision.models.squeezenet1_1()
    path = hub / "squeezenet1_1-b8a52dc0.pth"
    torch.save(net.state_dict(), path)
    with pytest.raises(DataError, match=r"is damaged.*b8a52dc0.*delete it"):
        load("torchvision:squeezenet1_1")
    # No test can make a file of that hash, so this one says that it has it.
    digest = SimpleNamespace(hexdigest=lambda: "b8a52dc0" + 56 * "0")
    monkeypatch.setattr(zoo.hashlib, "file_digest", lambda file, kind: digest)
    found = resolve("torchvision:squeezenet1_1")
    x = torch.rand(1, 3, 224, 224)
    mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    std = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    torch.testing.assert_close(found.model(x), net.eval()((x - mean) / std), rtol=1e-4, atol=1e-5)
    assert found.notes == ("images of another size are resized to 224×224 inside the model",)
    path.write_bytes(b"rubbish")
    with pytest.raises(DataError, match="could not be loaded"):
        load("torchvision:squeezenet1_1")


def test_extras_that_are_not_installed_say_how(monkeypatch):
    for name, extra in (("timm", "zoo"), ("robustbench.utils", "robustbench")):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(ConfigError, match=rf"pip install 'feint\[{extra}\]'"):
            load(f"{name.partition('.')[0]}:some_model")


def test_timm_with_its_own_normalisation_and_cache(monkeypatch):
    # Stand-ins with timm's documented functions; the real timm is used by no default test.
    made = []

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.pretrained_cfg = {"input_size": (3, 6, 6), "mean": (0.5,) * 3, "std": (0.25,) * 3}

        def forward(self, x):
            return x.mean((2, 3))

    def create_model(name, **options):
        made.append((name, options))
        return Net()

    timm = ModuleType("timm")
    timm.is_model = lambda name: name == "tiny"
    timm.list_models = lambda: ["tiny"]
    timm.get_pretrained_cfg = lambda name: SimpleNamespace(hf_hub_id="timm/tiny")
    timm.create_model = create_model
    cache = {"timm/tiny": None}
    hub = ModuleType("huggingface_hub")
    hub.try_to_load_from_cache = lambda repository, file: cache[repository]
    monkeypatch.setitem(sys.modules, "timm", timm)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    with pytest.raises(UnknownNameError, match="did you mean 'tiny'"):
        load("timm:tinny")
    with pytest.raises(DataError, match=r"not in the cache; fetch it with download=True"):
        load("timm:tiny.in1k")
    assert not made
    cache["timm/tiny"] = "/cache/model.safetensors"
    model = load("timm:tiny.in1k")
    overlay = {"file": "/cache/model.safetensors"}
    assert made == [("tiny.in1k", {"pretrained": True, "pretrained_cfg_overlay": overlay})]
    x = torch.rand(2, 3, 6, 6)
    torch.testing.assert_close(model(x), (x.mean((2, 3)) - 0.5) / 0.25)
    assert model.size == (6, 6)
    load("timm:tiny", download=True)
    assert made[1] == ("tiny", {"pretrained": True})


def test_robustbench_needs_trust_and_a_cache(hub, monkeypatch):
    asked = []

    def load_model(**options):
        asked.append(options)
        return nn.Flatten()

    utils = ModuleType("robustbench.utils")
    utils.load_model = load_model
    monkeypatch.setitem(sys.modules, "robustbench", ModuleType("robustbench"))
    monkeypatch.setitem(sys.modules, "robustbench.utils", utils)
    with pytest.raises(ConfigError, match=r"robustbench:NAME\[:DATASET\[:THREAT\]\]"):
        load("robustbench:a:b:c:d", trust=True)
    with pytest.raises(ConfigError, match="--trust"):
        load("robustbench:Some2020")
    with pytest.raises(DataError, match=r"not in .*cifar10/Linf"):
        load("robustbench:Some2020", trust=True)
    assert not asked
    inside = hub.parent / "robustbench" / "cifar100" / "L2"
    inside.mkdir(parents=True)
    (inside / "Some2020.pt").write_bytes(b"")
    assert isinstance(load("robustbench:Some2020:cifar100:L2", trust=True), nn.Flatten)
    assert asked[0]["model_name"] == "Some2020"
    assert (asked[0]["dataset"], asked[0]["threat_model"]) == ("cifar100", "L2")


def test_check_model():
    flat = nn.Sequential(nn.Flatten(), nn.Linear(12, 3)).eval()
    x = torch.rand(4, 3, 2, 2)
    assert torch.equal(check_model(flat, x), flat(x))

    class Odd(nn.Module):
        def __init__(self, out):
            super().__init__()
            self.out = out

        def forward(self, x):
            return self.out(x)

    for out, message in (
        (lambda x: x.mean((1, 2, 3))[:, None], "at least 2"),
        (lambda x: flat(x) / 0, "NaN or infinite logits for 4 of 4"),
        (lambda x: flat(x)[:2], "logits"),
        (lambda x: (flat(x), 1), "logits"),
        (lambda x: x, "logits"),
    ):
        with pytest.raises(ModelError, match=message):
            check_model(Odd(out).eval(), x)
    with pytest.raises(ModelError, match="training mode"):
        check_model(flat.train(), x)


def test_fingerprint_tells_weights_structure_and_buffers():
    one = build("toy")
    initialise(one, 0)
    first = fingerprint(one)
    assert first == fingerprint(one)
    seen = {first}
    with torch.no_grad():
        one.net.fc2.bias[3] += 1e-6
    seen.add(fingerprint(one))
    one.mean[0, 0, 0, 0] += 0.01
    seen.add(fingerprint(one))
    seen.add(fingerprint(Resized(one, 32)))
    assert fingerprint(Normalized(one.net)) in seen  # the default mean again
    assert len(seen) == 4
    one.mean[0, 0, 0, 0] -= 0.02
    assert fingerprint(one) not in seen


@pytest.mark.parametrize("name", bundled())
def test_shipped_weights_load_and_classify_the_bundled_images(name):
    # Oracle: the accuracy on all 10 000 test images in the card; 200 images: within 5 binomial
    # standard deviations of it.
    from feint.data import load as load_data

    told = card(name)["accuracy"]["clean"]
    assert told["n"] == 10_000
    data = load_data("bundled:cifar10", samples=200)
    model = load(f"bundled:{name}")
    with torch.no_grad():
        hits = sum(int((model(b.x).argmax(1) == b.y).sum()) for b in data.batches(100))
    p = told["value"]
    assert abs(hits / 200 - p) < 5 * (p * (1 - p) / 200) ** 0.5
    assert json.dumps(card(name))
    state = load_file(bundle.WEIGHTS / f"{name}.safetensors")
    assert sum(v.numel() for v in state.values()) > card(name)["parameters"]
