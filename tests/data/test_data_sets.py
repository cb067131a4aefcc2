"""Datasets by spec. Oracles: the arrays that were written, Pillow's resize, the rule's words."""

import contextlib
import io
import pickle
import zipfile

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from feint.core import random
from feint.core.errors import (
    ConfigError,
    DataError,
    FeintError,
    RangeError,
    ShapeError,
    UnknownNameError,
)
from feint.data import Resize, load
from feint.data.dataset import Dataset
from feint.data.sources import ArraySource

RNG = np.random.default_rng(1)
X = RNG.integers(0, 256, (12, 3, 6, 5), dtype=np.uint8)
Y = RNG.integers(0, 4, 12)


def save(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image.transpose(1, 2, 0)).save(path)


@pytest.fixture
def listed(tmp_path):
    """images.csv whose first files lie beside it and whose others lie in images/."""
    rows = ["label,file,author"]
    for i, (image, label) in enumerate(zip(X, Y, strict=True)):
        save(tmp_path / ("images" if i > 3 else "") / f"{i}.png", image)
        rows.append(f"{label},{i}.png,nobody")
    (tmp_path / "images.csv").write_text("\n".join(rows) + "\n")
    return tmp_path / "images.csv"


def in_memory(n, index=None):
    index = torch.arange(n) if index is None else index
    pixels = torch.zeros(n, 3, 1, 1, dtype=torch.uint8)
    return Dataset(
        "test", ArraySource(pixels, "test"), tuple(range(n)), index, torch.zeros_like(index)
    )


def test_list_gives_pixels_labels_and_row_numbers(listed):
    data = load(str(listed))
    batches = list(data.batches(5))
    assert [len(b.x) for b in batches] == [5, 5, 2]
    x, y, target, index = (
        torch.cat(c) if c[0] is not None else None for c in zip(*batches, strict=True)
    )
    assert x.dtype == torch.float32
    assert torch.equal(x, torch.from_numpy(X).float() / 255)
    assert y.tolist() == Y.tolist()
    assert target is None
    assert index.tolist() == list(range(12))
    assert torch.equal(data.images(), torch.from_numpy(X))
    assert str(data).endswith("12 images, 3×6×5")


def test_list_with_targets_bom_quotes_and_repeated_rows(tmp_path):
    save(tmp_path / "a, b.png", X[0])
    text = '\ufefffile,label,target\n"a, b.png", 3 ,7\n\n"a, b.png",3,8\n'
    (tmp_path / "l.csv").write_text(text, encoding="utf-8")
    batch = next(load(str(tmp_path / "l.csv")).batches(9))
    assert batch.y.tolist() == [3, 3]
    assert batch.target.tolist() == [7, 8]
    assert batch.index.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("file,label\n", "no rows"),
        ("path,label\na.png,1\n", "no column 'file'"),
        ("file,labels\na.png,1\n", "no column 'label'.*did you mean 'labels'"),
        ("file,label\na.png,1\ngone.png,1\n", r"line 3: there is no file 'gone\.png' beside"),
        ("file,label\n,1\n", "line 2: the column file is empty"),
        ("file,label\na.png\n", "line 2: label is ''"),
        ("file,label\na.png,cat\n", "line 2: label is 'cat'"),
        ("file,label\na.png,-1\n", "line 2: label is '-1'; expected a class index"),
        ("file,label\na.png,1.5\n", "line 2: label is '1.5'"),
        ("file,label\na.png,9999999999\n", "line 2: label is"),
        ("file,label\na.png,٣\n", "line 2: label is"),
        ("file,label,target\na.png,1,\n", "target is ''.*leave the column out"),
        ('file,label\n"a.png,1\n', "no readable CSV"),
        ("file,label\na\0.png,1\n", "line 2|no readable CSV"),
        (b"\xff\xfe\x00", "not UTF-8"),
    ],
)
def test_bad_lists_name_the_line_and_the_fix(tmp_path, text, message):
    save(tmp_path / "a.png", X[0])
    path = tmp_path / "l.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError, match=message) as caught:
        load(str(path))
    assert "l.csv" in str(caught.value)


def test_a_damaged_image_is_named_with_its_line(listed):
    (listed.parent / "images" / "7.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(DataError, match=r"7\.png \(images\.csv line 9\)"):
        load(str(listed))


def test_a_damaged_body_is_found_by_the_fingerprint(listed):
    path = listed.parent / "images" / "7.png"
    path.write_bytes(path.read_bytes()[:-30])
    data = load(str(listed))
    with pytest.raises(DataError, match=r"line 9\) is truncated"):
        _ = data.fingerprint


def test_folder_sorts_classes_by_name_and_passes_over_other_files(tmp_path):
    for name in ("dog/2.png", "cat/b/1.PNG", "cat/a.png", ".hidden/x.png", "dog/.x.png"):
        save(tmp_path / name, X[0])
    (tmp_path / "dog" / "notes.txt").write_text("no image")
    (tmp_path / "ant").mkdir()
    data = load(f"imagefolder:{tmp_path}")
    assert data.classes == ("ant", "cat", "dog")
    assert data.labels.tolist() == [1, 1, 2]
    assert [data.where(i).removeprefix(f"{tmp_path}/") for i in range(3)] == [
        "cat/a.png",
        "cat/b/1.PNG",
        "dog/2.png",
    ]


def test_folder_names_that_are_numbers_are_the_labels(tmp_path):
    for name in ("0", "2", "10"):
        save(tmp_path / name / "x.png", X[0])
    data = load(f"imagefolder:{tmp_path}")
    assert sorted(data.labels.tolist()) == [0, 2, 10]
    assert all(f"/{label}/" in data.where(i) for i, label in enumerate(data.labels.tolist()))


def test_bad_folders(tmp_path):
    with pytest.raises(DataError, match="is no folder"):
        load(f"imagefolder:{tmp_path}/nowhere")
    with pytest.raises(DataError, match=r"no class folders.*NAME\.csv"):
        load(f"imagefolder:{tmp_path}")
    (tmp_path / "cat").mkdir()
    with pytest.raises(DataError, match="1 class folders and no image"):
        load(f"imagefolder:{tmp_path}")
    with pytest.raises(ConfigError, match="write imagefolder:"):
        load(str(tmp_path))


def test_mixed_sizes_need_a_resize(tmp_path):
    save(tmp_path / "cat" / "a.png", X[0])
    save(tmp_path / "cat" / "b.png", X[0][:, :4])
    with pytest.raises(ShapeError, match=r"a\.png has 6×5 pixels, .*b\.png 4×5;.*--resize"):
        load(f"imagefolder:{tmp_path}")
    data = load(f"imagefolder:{tmp_path}", resize=4)
    assert next(data.batches(2)).x.shape == (2, 3, 4, 4)
    assert "resized to 4×4 (antialiased bilinear, aspect ratio ignored)" in str(data)


@settings(deadline=None, max_examples=40)
@given(
    height=st.integers(2, 40),
    width=st.integers(2, 40),
    side=st.integers(1, 40),
    seed=st.integers(0, 9),
)
def test_resize_is_pillows(height, width, side, seed):
    # Pillow rounds its filter weights to 8 bits and rounds between the passes: within 1 level.
    # Where a center falls between two pixels, Pillow's sum of steps decides by its rounding.
    ties = any((2 * i + 1) * n % (2 * side) == 0 for i in range(side) for n in (height, width))
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    x = torch.from_numpy(values).permute(2, 0, 1)
    for mode, theirs, slack in (
        ("bilinear", Image.Resampling.BILINEAR, 1),
        ("nearest", Image.Resampling.NEAREST, 0),
    ):
        expected = np.array(Image.fromarray(values).resize((side, side), theirs)).astype(int)
        got = Resize(side, mode)(x).permute(1, 2, 0).numpy()
        assert (mode == "nearest" and ties) or np.abs(got - expected).max() <= slack


def test_crop_keeps_the_aspect_ratio_and_the_center():
    x = torch.zeros(3, 4, 8, dtype=torch.uint8)
    x[:, :, 2:6] = 200
    assert torch.equal(Resize(4, fit="crop")(x), torch.full((3, 4, 4), 200, dtype=torch.uint8))
    small = Resize(2, fit="crop")(x.float().to(torch.uint8).transpose(1, 2))
    assert small.shape == (3, 2, 2)
    same = torch.from_numpy(X[0][:, :5])
    assert torch.equal(Resize(5, fit="crop")(same), same)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"resize": 0}, RangeError),
        ({"resize": True}, RangeError),
        ({"resize": 8, "mode": "cubic"}, ConfigError),
        ({"resize": 8, "fit": "pad"}, ConfigError),
        ({"mode": "nearest"}, ConfigError),
        ({"split": "validation"}, ConfigError),
        ({"split": "train"}, ConfigError),
        ({"samples": 0}, RangeError),
        ({"samples": 501}, RangeError),
        ({"download": True}, ConfigError),
        ({"root": "."}, ConfigError),
    ],
)
def test_options_that_cannot_mean_anything(options, error):
    with pytest.raises(error):
        load("bundled:cifar10", **options)


def test_unknown_specs_name_the_nearest(tmp_path):
    with pytest.raises(UnknownNameError, match="did you mean 'cifar10'"):
        load("cifar1O")
    with pytest.raises(UnknownNameError, match="did you mean 'cifar10'"):
        load("bundled:cifar")
    other = tmp_path / "x.parquet"
    other.write_bytes(b"")
    with pytest.raises(DataError, match="is no dataset"):
        load(str(other))


@settings(deadline=None, max_examples=30)
@given(n=st.integers(1, 60), a=st.integers(1, 60), b=st.integers(1, 60))
def test_samples_are_nested_and_depend_on_the_indices_alone(n, a, b):
    a, b = sorted((min(a, n), min(b, n)))
    index = torch.arange(n) * 7 + 3
    few, more = in_memory(n, index).take(a).index, in_memory(n, index).take(b).index
    assert torch.equal(few, more[:a])
    assert len(set(more.tolist())) == b
    turned = in_memory(n, index.flip(0)).take(b).index
    assert torch.equal(turned, more)


def test_samples_follow_the_documented_rule_and_hit_every_sample_equally():
    # Oracle: rank by 63 bits of Philox words of the key (seed 0, index, "samples").
    index = torch.arange(50)
    words = random.words(random.fold(random.keys(0, index), "samples"), 2).numpy()
    order = np.argsort(words[:, 0].astype(object) * 2**31 + words[:, 1] // 2)
    assert in_memory(50).take(9).index.tolist() == order[:9].tolist()
    # A random subset of 2000 of 4000: its mean is within 5 standard errors of the whole mean.
    chosen = in_memory(4000).take(2000).index.double().mean()
    assert abs(chosen - 1999.5) < 5 * 4000 / 12**0.5 / 2000**0.5 * 0.5**0.5


def test_fingerprint_is_of_the_content_whatever_the_container(listed, tmp_path):
    np.savez(tmp_path / "same.npz", x=X, y=Y)
    np.savez(tmp_path / "split.npz", x_test=X, y_test=Y)
    a = load(str(listed))
    assert len(a.fingerprint) == 64
    for name in ("same", "split"):
        assert load(str(tmp_path / f"{name}.npz")).fingerprint == a.fingerprint
    variants = {a.fingerprint, a.take(5).fingerprint, a.subset(range(11, -1, -1)).fingerprint}
    other, label = X.copy(), Y.copy()
    other[3, 1, 2, 2] ^= 1
    label[2] += 1
    for x, y in ((other, Y), (X, label)):
        np.savez(tmp_path / "other.npz", x=x, y=y)
        variants.add(load(str(tmp_path / "other.npz")).fingerprint)
    variants.add(load(str(listed), resize=4).fingerprint)
    assert len(variants) == 6


def test_npz_takes_the_part_asked_for(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, x_train=X[:8], y_train=Y[:8], x_test=X[8:], y_test=Y[8:].astype(np.uint8))
    assert torch.equal(load(str(path), split="train").images(), torch.from_numpy(X[:8]))
    test = load(str(path))
    assert torch.equal(test.images(), torch.from_numpy(X[8:]))
    assert test.labels.dtype == torch.int64
    part = load(str(path), samples=2)
    assert torch.equal(part.images(), torch.from_numpy(X[8:])[part.index])
    np.savez(path, x=X, y=Y)
    with pytest.raises(ConfigError, match="leave the split out"):
        load(str(path), split="train")


def _corrupt(path):
    np.savez(path, x=X, y=Y)
    raw = bytearray(path.read_bytes())
    raw[300] ^= 255
    path.write_bytes(raw)


def _not_npy(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.npy", b"rubbish")
        archive.writestr("y.npy", b"rubbish")


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda p: np.savez(p, x=X), "no array 'y'"),
        (lambda p: np.savez(p, images=X), "no array 'x_test'; it holds images"),
        (lambda p: np.savez(p, x_test=X), "no array 'y_test'"),
        (lambda p: np.savez(p, x=np.array([X, None], object), y=Y), "pickled objects"),
        (lambda p: np.savez(p, x=X / 255.0, y=Y), r"dtype float64.*np\.rint\(255"),
        (lambda p: np.savez(p, x=X.astype(np.int64), y=Y), "dtype int64; expected uint8"),
        (lambda p: np.savez(p, x=X.transpose(0, 2, 3, 1), y=Y), r"transpose\(0, 3, 1, 2\)"),
        (lambda p: np.savez(p, x=X[:, :1], y=Y), r"expected \(N, 3, H, W\)"),
        (lambda p: np.savez(p, x=X[0], y=Y), r"expected \(N, 3, H, W\)"),
        (lambda p: np.savez(p, x=X, y=Y[:5]), r"expected integers \(12,\)"),
        (lambda p: np.savez(p, x=X, y=Y[:, None]), r"expected integers \(12,\)"),
        (lambda p: np.savez(p, x=X, y=Y / 1.0), "float64.*expected integers"),
        (lambda p: np.savez(p, x=X, y=Y - 9), "row 0 .* has label -"),
        (lambda p: np.savez(p, x=X[:0], y=Y[:0]), "holds no image"),
        (_corrupt, "is damaged"),
        (_not_npy, "is no array"),
        (lambda p: p.write_bytes(b"PK\x03\x04 cut off"), "no npz archive"),
        (lambda p: p.write_bytes(pickle.dumps({"x": 1})), "no npz archive"),
        (lambda p: None, "no such file"),
    ],
)
def test_bad_npz(tmp_path, write, message):
    path = tmp_path / "a.npz"
    write(path)
    with pytest.raises(DataError, match=message) as caught:
        load(str(path))
    assert "a.npz" in str(caught.value)


@settings(deadline=None, max_examples=60)
@given(position=st.integers(0, 2500), value=st.integers(0, 255), cut=st.integers(0, 2500))
def test_a_damaged_npz_is_read_or_refused_and_nothing_else(tmp_path_factory, position, value, cut):
    buffer = io.BytesIO()
    np.savez_compressed(buffer, x=X, y=Y)
    raw = bytearray(buffer.getvalue())
    raw[position % len(raw)] = value
    path = tmp_path_factory.mktemp("npz") / "a.npz"
    path.write_bytes(raw[: len(raw) - (cut if cut < 100 else 0)])
    with contextlib.suppress(FeintError):
        load(str(path))


def test_labels_beyond_the_models_classes_name_the_sample(listed):
    data = load(str(listed))
    data.check_classes(4)
    first = int((data.labels == 3).nonzero()[0])
    with pytest.raises(DataError, match=rf"line {first + 2}\) has label 3; expected 0 to 2"):
        data.check_classes(3)
    (listed.parent / "t.csv").write_text("file,label,target\n0.png,0,5\n")
    with pytest.raises(DataError, match="has target 5; expected 0 to 3"):
        load(str(listed.parent / "t.csv")).check_classes(4)


def test_bundled_images_are_what_their_card_says():
    data = load()
    assert len(data) == 500
    assert data.shape == (3, 32, 32)
    assert data.labels.bincount().tolist() == [50] * 10
    assert data.classes[3] == "cat"
    assert torch.equal(data.index, data.index.sort().values)
    # Frozen by tools/make_bundled_images.py; the first CIFAR-10 test images are cat, ship, ship.
    assert data.labels[:3].tolist() == [3, 8, 8]
    assert data.fingerprint.startswith("5f9afaf189ecc3b8")


def test_a_damaged_bundle_is_refused(tmp_path, monkeypatch):
    from feint.data import arrays

    for suffix in ("png", "json"):
        (tmp_path / f"cifar10.{suffix}").write_bytes(
            (arrays.BUNDLED / f"cifar10.{suffix}").read_bytes()
        )
    sheet = np.array(Image.open(tmp_path / "cifar10.png"))
    sheet[5, 5, 0] ^= 1
    Image.fromarray(sheet).save(tmp_path / "cifar10.png")
    monkeypatch.setattr(arrays, "BUNDLED", tmp_path)
    with pytest.raises(DataError, match="damaged; install feint anew"):
        load()


@pytest.fixture
def tiny_cifar(tmp_path, monkeypatch):
    """Batches in the original layout with other images, and torchvision told their checksums."""
    import hashlib

    def write(folder, name, content):
        path = tmp_path / folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(pickle.dumps(content))
        return hashlib.md5(path.read_bytes()).hexdigest()

    wide = RNG.integers(0, 256, (4, 3, 32, 32), dtype=np.uint8)
    for cls, key, names in (
        (torchvision.datasets.CIFAR10, "labels", "label_names"),
        (torchvision.datasets.CIFAR100, "fine_labels", "fine_label_names"),
    ):
        batch = {"data": wide.reshape(4, -1), key: [3, 1, 0, 2]}
        md5 = write(cls.base_folder, "batch", batch)
        meta = write(cls.base_folder, "meta", {names: list("abcd")})
        monkeypatch.setattr(cls, "train_list", [["batch", md5]])
        monkeypatch.setattr(cls, "test_list", [["batch", md5]])
        monkeypatch.setattr(cls, "meta", {"filename": "meta", "key": names, "md5": meta})
    return tmp_path, wide


@pytest.mark.parametrize("kind", ["cifar10", "cifar100"])
def test_cifar_from_a_folder(tiny_cifar, kind, monkeypatch):
    root, wide = tiny_cifar
    data = load(kind, root=root)
    assert torch.equal(data.images(), torch.from_numpy(wide))
    assert data.labels.tolist() == [3, 1, 0, 2]
    assert data.classes == tuple("abcd")
    monkeypatch.setenv("FEINT_DATA", str(root))
    assert load(kind, split="train").fingerprint == data.fingerprint
    folder = root / ("cifar-10-batches-py" if kind == "cifar10" else "cifar-100-python")
    (folder / "batch").write_bytes(b"damaged")
    with pytest.raises(DataError, match=r"damaged.*download=True"):
        load(kind)


def test_missing_cifar_is_not_fetched_unless_asked(tmp_path, monkeypatch):
    asked = []

    def refuse(*args, **kwargs):
        asked.append(args)
        raise OSError("no network")

    monkeypatch.setattr(torchvision.datasets.CIFAR10, "download", refuse)
    with pytest.raises(
        DataError, match=r"root=DIR \(--data-root, environment FEINT_DATA\).*download"
    ):
        load("cifar10", root=tmp_path)
    assert not asked
    with pytest.raises(DataError, match=r"could not be fetched.*no network"):
        load("cifar10", root=tmp_path, download=True)
    assert asked
    assert not list(tmp_path.iterdir())


def test_random_targets_are_other_classes_drawn_by_the_index():
    """Properties: never the own class, all others occur, equal for the same index in any subset."""
    whole = load("bundled:cifar10", targets="random")
    assert whole.targets is not None
    assert not bool((whole.targets == whole.labels).any())
    share = torch.bincount(whole.targets, minlength=10) / len(whole)
    assert float(share.min()) > 0.05  # a tenth each: 2.4 standard errors are 0.032
    part = load("bundled:cifar10", samples=20, targets="random")
    places = [int((whole.index == i).nonzero()) for i in part.index]
    assert torch.equal(part.targets, whole.targets[places])
    with pytest.raises(ConfigError, match="expected 'random'"):
        load("bundled:cifar10", targets="next")
