"""Read image files of every format, mode, bit depth and orientation as 8-bit pixels."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, TypeAlias

import numpy as np
from PIL import Image, ImageCms, UnidentifiedImageError

from ..text import reason

# Pillow opens these formats but cannot decode them itself (EPS starts Ghostscript), cannot tell
# them from other files (SPIDER), or does not detect truncation (PCX, whose palette is at the end).
_NOT_READ = {"BUFR", "DCX", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "PCX", "SPIDER", "WMF"}
Image.init()
FORMATS = [name for name in Image.ID if name not in _NOT_READ]
IMAGE_ENDINGS = frozenset(
    ending
    for ending, name in Image.registered_extensions().items()
    if name in FORMATS or name == "MPO"  # opened as JPEG
)
GRAYSCALE_MODES = ("1", "L", "LA", "La", "I", "I;16", "I;16B", "I;16L", "I;16N", "F")
Encoded: TypeAlias = Path | IO[bytes] | Image.Image
_ORIENTATION = 0x0112
_END_OF_CODESTREAM = b"\xff\xd9"  # does not occur within packets of JPEG 2000
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_PHOTOMETRIC = 262  # TIFF tag; if its value is 0, white is 0
_KEY_SCALES = {"L;2": 85, "L;4": 17}  # Pillow scales such pixels to 8 bits, but not the color key

# Pillow's warnings about odd metadata and large images are not useful in a training run: a file is
# either read or raises an error.
warnings.filterwarnings("ignore", module=r"PIL\.")
logging.getLogger("PIL").addHandler(logging.NullHandler())


@dataclasses.dataclass(frozen=True)
class Reading:
    """How image files are converted to pixels.

    Args:
        mode: "RGB" or "L", the mode of the result.
        background: color (R, G, B) behind transparent pixels.
        max_value: value of white in images of more than 8 bits per channel. If None, it is 65,535
            for 16 bits, and images of 32 bits raise an error.
    """

    mode: str = "RGB"
    background: tuple[int, ...] = (255, 255, 255)
    max_value: float | None = None


class RefusedImageError(ValueError):
    """Raised for an intact file that is not read; the message follows the name of the file."""


def read_image(source: Encoded, reading: Reading) -> Image.Image:
    """Read an image: its first frame, upright, without transparency, with 8 bits per channel.

    Raises:
        RefusedImageError: if its bit depth needs a ``max_value``, or does not support one.
        Exception: whatever Pillow raises for a damaged file.
    """
    with _opened(source) as image:
        white, key = _white(image, reading), _color_key(image)
        if image.format == "JPEG2000":
            _check_end(image)
        image.load()
        upright = _turned(image)
        if white is not None:
            upright = _eight_bits(upright, white, key)
        elif key is not None:
            upright.info["transparency"] = key
        return _convert(_composite(upright, reading.background), reading.mode)


def check_header(source: Encoded, reading: Reading) -> None:
    """Raise the errors of :func:`read_image` that can be detected without decoding."""
    with _opened(source) as image:
        _white(image, reading)


def image_mode(source: Encoded) -> str:
    """Return the mode of an image as Pillow names it."""
    with _opened(source) as image:
        return image.mode


def image_error(name: object, error: Exception) -> ValueError:
    """Turn the exception of a decoder into an error that names the image, in one sentence."""
    if isinstance(error, RefusedImageError):
        return ValueError(f"{name} {error}")
    what = " as an image" if isinstance(name, Path) else ""
    return ValueError(f"{name} cannot be read{what}: {reason(error)}")


@contextlib.contextmanager
def _opened(source: Encoded) -> Iterator[Image.Image]:
    """Open a file in a context that closes it; an image of a dataset stays open."""
    if isinstance(source, Image.Image):
        yield source
        return
    # By its path, Pillow would map an uncompressed TIFF into memory with the size that it has only
    # after its orientation is applied, and so scramble it.
    with source.open("rb") if isinstance(source, Path) else source as file:
        try:
            image = Image.open(file, formats=FORMATS)
        except UnidentifiedImageError as error:
            raise ValueError("its content has no known image format") from error
        with image:
            yield image


def _stored(image: Image.Image) -> str:
    """Return how the file stores pixels, such as "L;2" or "RGB;16B"; empty if it is unknown."""
    tiles: list[Any] = getattr(image, "tile", [])
    args = tiles[0].args if tiles else ""
    return str(args if isinstance(args, str) else next(iter(args or ("",))))


def _white(image: Image.Image, reading: Reading) -> float | None:
    """Return the value of white of an image that is not loaded yet; None for 8 bits."""
    stored = _stored(image)
    if image.format == "PPM" and image.mode == "I":
        states_maximum = stored != "I;16B"  # Pillow scales to it
        return 65535 if states_maximum else reading.max_value or 65535
    if image.mode.startswith("I;16"):
        return reading.max_value or (4095 if stored == "I;12" else 65535)
    if image.mode in ("I", "F"):
        if reading.max_value is None:
            raise RefusedImageError(
                f"has pixels of mode {image.mode!r}: save it with 8 or 16 bits, or set "
                "data.max_value, the value of white"
            )
        return reading.max_value
    if reading.max_value is not None and ";16" in stored:
        raise RefusedImageError(
            "has 16-bit colors, of which the upper 8 bits are read: do not set data.max_value"
        )
    return None


def _color_key(image: Image.Image) -> Any:
    """Return the transparent color, index or table in the scale of the loaded pixels, or None."""
    key, stored = image.info.get("transparency"), _stored(image)
    if isinstance(key, int):
        return key * _KEY_SCALES.get(stored, 1)
    if isinstance(key, tuple) and ";16" in stored:
        return tuple(value >> 8 for value in key)
    return key


def _check_end(image: Image.Image) -> None:
    """Raise an OSError for a JPEG 2000 truncated between packets, which Pillow would decode."""
    file: IO[bytes] | None = getattr(image, "fp", None)
    if file is not None:  # it is not decoded yet
        file.seek(0)
        if _END_OF_CODESTREAM not in file.read():
            raise OSError("image file is truncated")


def _turned(image: Image.Image) -> Image.Image:
    """Apply the EXIF orientation; unlike ImageOps, without rewriting tags, which can fail."""
    try:
        turn = _TURNS.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # damaged metadata, but intact pixels
        return image
    return image if turn is None else image.transpose(turn)


def _eight_bits(image: Image.Image, white: float, key: int | None) -> Image.Image:
    """Scale one channel of more than 8 bits, so that ``white`` becomes 255."""
    values = np.asarray(image)
    scaled = values.astype(np.float64) * (255 / white)
    if not np.isfinite(scaled).all():
        raise ValueError("some of its pixels are not finite")
    if getattr(image, "tag_v2", {}).get(_PHOTOMETRIC) == 0:
        scaled = 255 - scaled
    gray = Image.fromarray(scaled.round().clip(0, 255).astype(np.uint8))
    if isinstance(key, int):
        gray.putalpha(Image.fromarray((values != key).astype(np.uint8) * 255))
    return gray


def _composite(image: Image.Image, background: tuple[int, ...]) -> Image.Image:
    """Composite transparent pixels onto a background."""
    if not image.has_transparency_data:
        return image
    if image.mode in ("La", "PA"):
        image = image.convert("LA" if image.mode == "La" else "RGBA")
    top = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", top.size, background), top)


def _convert(image: Image.Image, mode: str) -> Image.Image:
    if image.mode == mode:
        return image
    if image.mode == "LAB":
        converted = ImageCms.applyTransform(image, _lab_to_rgb())
        assert converted is not None
        image = converted
    return image if image.mode == mode else image.convert(mode)


@functools.cache
def _lab_to_rgb() -> ImageCms.ImageCmsTransform:
    profiles = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    return ImageCms.buildTransform(*profiles, "LAB", "RGB")
