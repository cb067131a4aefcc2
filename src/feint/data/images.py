"""Image files in and out: exactly the 8-bit RGB values that the file holds, or an error."""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from feint.core.checks import check_images
from feint.core.errors import ConfigError, DataError, FeintError, ShapeError
from feint.core.quantise import Rounding, to_uint8

__all__ = ["SUFFIXES", "image_size", "read_image", "write_png"]

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm")
"""File names that count as images in a folder."""

# Only formats that Pillow decodes by itself: EPS would start Ghostscript.
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "PPM")
_MAX_PIXELS = 89_478_485  # Pillow's own limit: 256 MiB of RGB
_ORIENTATION = 0x0112


def read_image(path: str | Path, *, name: str | None = None) -> Tensor:
    """The pixels of an image file.

    Convention:
        8-bit RGB, as stored: no color management. The EXIF orientation is applied, as every viewer
        does. Grayscale, bilevel and palette images become RGB without loss; an alpha channel is
        accepted only where it is opaque throughout. Whatever would lose information is an error.

    Args:
        path: A PNG, JPEG, WebP, BMP, TIFF, GIF or PPM file with one frame.
        name: What to call the file in an error message; by default its path.

    Returns:
        uint8, (3, H, W).

    Raises:
        DataError: The file is missing, truncated, no image, larger than 89 megapixels, has 16 bits
            per channel, transparent pixels, several frames, or another color space.

    Example:
        >>> import tempfile
        >>> x = torch.rand(3, 5, 4)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_png(x, f"{folder}/x.png")
        ...     bool((read_image(f"{folder}/x.png") == to_uint8(x)).all())
        True
    """
    with _opened(path, name) as (image, label):
        pixels = np.array(_rgb(ImageOps.exif_transpose(_single(image, label)), label))
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def image_size(path: str | Path, *, name: str | None = None) -> tuple[int, int]:
    """Height and width of an image file after its EXIF orientation, from the header alone.

    Raises:
        DataError: The file is missing, no image, or too large.
    """
    with _opened(path, name) as (image, _):
        # Asking a PNG without an EXIF block for it would decode the whole image.
        exif = {} if image.format == "PNG" and "exif" not in image.info else image.getexif()
        width, height = image.size
        if image.format == "TIFF":  # some versions of Pillow turn this size themselves
            width, height = (int(image.tag_v2[tag]) for tag in (256, 257))  # type: ignore[attr-defined]
        turned = exif.get(_ORIENTATION, 1) in (5, 6, 7, 8)
        return (width, height) if turned else (height, width)


@contextmanager
def _opened(path: str | Path, name: str | None) -> Iterator[tuple[Image.Image, str]]:
    label = str(path) if name is None else name
    try:
        with warnings.catch_warnings():
            # Pillow only warns of bombs and of damaged EXIF blocks; here both are errors.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            warnings.simplefilter("error", UserWarning)
            with Image.open(path, formats=_FORMATS) as image:
                if image.width * image.height > _MAX_PIXELS:
                    raise Image.DecompressionBombError
                yield image, label
    except FeintError:
        raise
    except FileNotFoundError:
        raise DataError(f"{label}: there is no such file") from None
    except IsADirectoryError:
        raise DataError(f"{label} is a folder; expected an image file") from None
    except PermissionError:
        raise DataError(f"{label}: no permission to read it") from None
    except UnidentifiedImageError:
        raise DataError(
            f"{label} is not an image that can be read; expected {', '.join(_FORMATS)}"
        ) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise DataError(
            f"{label} has more than {_MAX_PIXELS} pixels; expected a photograph, not a "
            "decompression bomb; scale the file down"
        ) from None
    except Exception as error:  # a decoder raises whatever a malformed file provokes
        raise DataError(f"{label} is truncated or damaged ({error}); replace the file") from None


def _single(image: Image.Image, label: str) -> Image.Image:
    # Phones write MPO, a JPEG with previews behind it: the first picture is the photograph.
    if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":
        raise DataError(f"{label} has several frames; expected one; save the one you mean as PNG")
    # Pillow reads 16-bit color as 8-bit without a word; the raw mode of the file tells.
    if image.mode in ("I", "F") or "16" in image.mode or ";16" in repr(getattr(image, "tile", ())):
        raise DataError(
            f"{label} has more than 8 bits per channel; expected 8; convert it, choosing the "
            "rounding yourself"
        )
    return image


def _rgb(image: Image.Image, label: str) -> Image.Image:
    if image.mode not in ("RGB", "L", "1", "P", "RGBA", "LA", "PA"):
        raise DataError(
            f"{label} has color mode {image.mode}; expected RGB, grayscale or palette; convert it, "
            "since this conversion loses information"
        )
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        if np.asarray(image.getchannel("A")).min() != 255:
            raise DataError(
                f"{label} has transparent pixels; expected an opaque image; flatten it on the "
                "background that you mean"
            )
    return image.convert("RGB")


def write_png(x: Tensor, path: str | Path, *, rounding: Rounding = "nearest") -> None:
    """Write one image as an 8-bit PNG, whole or not at all.

    Args:
        x: (3, H, W), float in [0, 1] or uint8.
        path: File name ending in .png; its folder must exist.
        rounding: How floats become 8-bit values; see `feint.core.quantise.to_uint8`.

    Raises:
        ShapeError, DtypeError, RangeError: `x` is no such image.
        ConfigError: The name does not end in .png.
        DataError: The file cannot be written.
    """
    path = Path(path)
    if x.ndim != 3 or x.shape[0] != 3 or not x.numel():
        raise ShapeError(f"x has shape {tuple(x.shape)}; expected one image (3, H, W)")
    if path.suffix.lower() != ".png":
        raise ConfigError(f"{path} does not end in .png; other formats would lose pixels or names")
    if x.dtype != torch.uint8:
        check_images(x[None])
        x = to_uint8(x.detach(), rounding)
    buffer = io.BytesIO()
    Image.fromarray(x.permute(1, 2, 0).cpu().contiguous().numpy(), "RGB").save(buffer, "PNG")
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror}") from None
    finally:
        if partial.exists():
            partial.unlink()
