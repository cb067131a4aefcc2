"""Image files. Oracles: Pillow and numpy on the same file; PNG chunks written by hand."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from feint.core.errors import ConfigError, DataError, DtypeError, RangeError, ShapeError
from feint.core.quantise import to_uint8
from feint.data import read_image, write_png
from feint.data.images import image_size

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (7, 5, 3), dtype=np.uint8)


def png(depth, color, rows, width, height):
    """A PNG from its chunks: what Pillow cannot write, such as 16 bits per channel."""

    def chunk(kind, body):
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    head = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def as_array(x):
    return x.permute(1, 2, 0).numpy()


@pytest.mark.parametrize("suffix", ["png", "bmp", "tiff", "ppm", "webp"])
def test_rgb_formats_are_read_bit_exactly(tmp_path, suffix):
    path = tmp_path / f"x.{suffix}"
    Image.fromarray(RGB).save(path, **({"lossless": True} if suffix == "webp" else {}))
    x = read_image(path)
    assert x.dtype == torch.uint8
    assert x.is_contiguous()
    assert np.array_equal(as_array(x), RGB)


def test_jpeg_is_read_as_pillow_reads_it(tmp_path):
    path = tmp_path / "x.jpg"
    Image.fromarray(RGB).save(path, quality=60)
    assert np.array_equal(as_array(read_image(path)), np.array(Image.open(path)))


def test_gray_bilevel_palette_and_opaque_alpha_become_rgb_without_loss(tmp_path):
    gray = RGB[..., 0]
    cases = {
        "gray": (Image.fromarray(gray), np.repeat(gray[..., None], 3, 2)),
        "bilevel": (
            Image.fromarray(gray > 127),
            np.repeat(np.where(gray > 127, 255, 0)[..., None], 3, 2),
        ),
        "rgba": (
            Image.fromarray(np.dstack([RGB, np.full_like(gray, 255)])),
            RGB,
        ),
    }
    few = Image.fromarray(RGB).quantize(16)
    cases["palette"] = (few, np.array(few.convert("RGB")))
    for name, (image, expected) in cases.items():
        path = tmp_path / f"{name}.png"
        image.save(path)
        assert np.array_equal(as_array(read_image(path)), expected), name


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, orientation):
    # EXIF 2.3, tag 0x0112: which side of the scene the first row and column are.
    turned = {
        1: RGB,
        2: RGB[:, ::-1],
        3: RGB[::-1, ::-1],
        4: RGB[::-1],
        5: RGB.transpose(1, 0, 2),
        6: np.rot90(RGB, -1),
        7: np.rot90(RGB, 2).transpose(1, 0, 2),
        8: np.rot90(RGB, 1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    for suffix in ("png", "tiff"):
        path = tmp_path / f"x.{suffix}"
        Image.fromarray(RGB).save(path, exif=exif)
        assert np.array_equal(as_array(read_image(path)), turned)
        assert image_size(path) == turned.shape[:2]


def transparent(path):
    alpha = np.full(RGB.shape[:2], 255, np.uint8)
    alpha[3, 2] = 254
    Image.fromarray(np.dstack([RGB, alpha])).save(path)


def transparent_palette(path):
    Image.fromarray(RGB).quantize(8).save(path, transparency=3)


def transparent_color(path):
    Image.fromarray(RGB).save(path, transparency=tuple(int(v) for v in RGB[0, 0]))


def frames(path):
    first, second = Image.fromarray(RGB), Image.fromarray(RGB[::-1].copy())
    first.save(path, "GIF", save_all=True, append_images=[second])


def cmyk(path):
    Image.fromarray(RGB).convert("CMYK").save(path, "JPEG")


def sixteen_gray(path):
    Image.fromarray(np.arange(35, dtype=np.uint16).reshape(7, 5) * 900).save(path)


def sixteen_rgb(path):
    rows = b"".join(b"\0" + RNG.integers(0, 256, 6 * 5, dtype=np.uint8).tobytes() for _ in range(7))
    path.write_bytes(png(16, 2, rows, 5, 7))


def floats(path):
    Image.fromarray(RNG.random((7, 5), dtype=np.float32)).save(path, "TIFF")


def truncated(path):
    buffer = io.BytesIO()
    Image.fromarray(RNG.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(buffer, "PNG")
    path.write_bytes(buffer.getvalue()[:2000])


def bad_checksum(path):
    buffer = io.BytesIO()
    Image.fromarray(RGB).save(buffer, "PNG")
    raw = bytearray(buffer.getvalue())
    raw[raw.index(b"IDAT") + 10] ^= 255
    path.write_bytes(raw)


def postscript(path):
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (transparent, "transparent pixels.*flatten"),
        (transparent_palette, "transparent pixels"),
        (transparent_color, "transparent pixels"),
        (frames, "several frames"),
        (cmyk, "color mode CMYK"),
        (sixteen_gray, "more than 8 bits"),
        (sixteen_rgb, "more than 8 bits"),
        (floats, "more than 8 bits"),
        (truncated, "truncated or damaged"),
        (bad_checksum, "truncated or damaged"),
        (postscript, "not an image"),
        (lambda path: path.write_text("hello"), "not an image"),
        (lambda path: path.write_bytes(b""), "not an image"),
        (lambda path: path.write_bytes(png(8, 2, b"", 20_000, 20_000)), "decompression bomb"),
        (lambda path: path.write_bytes(png(8, 2, b"", 10_000, 9_000)), "decompression bomb"),
        (lambda path: path.mkdir(), "is a folder"),
        (lambda path: None, "no such file"),
    ],
)
def test_bad_files_give_one_typed_error_that_names_them(tmp_path, make, message):
    path = tmp_path / "x.png"
    make(path)
    with pytest.raises(DataError, match=message) as caught:
        read_image(path)
    assert "x.png" in str(caught.value)
    with pytest.raises(DataError, match=r"^images\.csv line 3"):
        read_image(path, name="images.csv line 3")


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_a_damaged_file_is_read_or_refused_and_nothing_else(tmp_path_factory, data):
    # Property: whatever bytes change or go missing, no foreign exception and no warning escapes.
    kind = data.draw(st.sampled_from(["PNG", "JPEG", "GIF", "TIFF", "BMP", "WEBP"]))
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    options = {"exif": exif} if kind in ("PNG", "JPEG", "WEBP", "TIFF") else {}
    Image.fromarray(RGB).save(buffer, kind, **options)
    raw = bytearray(buffer.getvalue())
    for _ in range(data.draw(st.integers(0, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    raw = raw[: data.draw(st.integers(len(raw) // 2, len(raw)))]
    path = tmp_path_factory.mktemp("damaged") / "x.png"
    path.write_bytes(raw)
    for read in (read_image, image_size):
        try:
            read(path)
        except DataError:
            continue


@settings(deadline=None, max_examples=25)
@given(height=st.integers(1, 9), width=st.integers(1, 9), seed=st.integers(0, 99))
def test_png_round_trip_is_bit_exact(tmp_path_factory, height, width, seed):
    values = np.random.default_rng(seed).integers(0, 256, (3, height, width), dtype=np.uint8)
    x = torch.from_numpy(values)
    path = tmp_path_factory.mktemp("trip") / "x.png"
    write_png(x, path)
    assert torch.equal(read_image(path), x)
    write_png(x.float() / 255, path)  # written over
    assert torch.equal(read_image(path), x)
    assert [p.name for p in path.parent.iterdir()] == ["x.png"]


@pytest.mark.parametrize("rounding", ["nearest", "truncate", "torchvision"])
def test_png_rounding_is_the_named_one(tmp_path, rounding):
    x = torch.linspace(0, 1, 3 * 64).reshape(3, 8, 8)
    write_png(x, tmp_path / "x.png", rounding=rounding)
    assert torch.equal(read_image(tmp_path / "x.png"), to_uint8(x, rounding))


def test_png_refuses_what_is_no_image(tmp_path):
    path = tmp_path / "x.png"
    with pytest.raises(ShapeError, match=r"\(3, H, W\)"):
        write_png(torch.rand(1, 3, 4, 4), path)
    with pytest.raises(RangeError, match="divide by 255"):
        write_png(torch.full((3, 4, 4), 200.0), path)
    with pytest.raises(RangeError, match="NaN"):
        write_png(torch.full((3, 4, 4), torch.nan), path)
    with pytest.raises(DtypeError):
        write_png(torch.zeros(3, 4, 4, dtype=torch.int64), path)
    with pytest.raises(ConfigError, match=r"\.png"):
        write_png(torch.rand(3, 4, 4), tmp_path / "x.jpg")
    with pytest.raises(DataError, match="cannot write"):
        write_png(torch.rand(3, 4, 4), tmp_path / "nowhere" / "x.png")
    assert not list(tmp_path.iterdir())


def test_png_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "x.png"
    old = torch.zeros(3, 4, 4, dtype=torch.uint8)
    write_png(old, path)

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(DataError, match="No space left"):
        write_png(torch.rand(3, 4, 4), path)
    assert torch.equal(read_image(path), old)
    assert [p.name for p in tmp_path.iterdir()] == ["x.png"]
