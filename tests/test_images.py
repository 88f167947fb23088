"""One image reader: every mode, bit depth and orientation; damaged files are named."""

from __future__ import annotations

import functools
import io
import itertools
import random
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from train.data.images import Images, Item, as_items, count_channels, decode, open_image
from train.data.reading import FORMATS, IMAGE_ENDINGS, Reading

ROOT = Path(__file__).parents[1]
ORANGE = (250, 120, 10)


def png(
    depth: int, color: int, width: int, rows: list[bytes], *chunks: tuple[bytes, bytes]
) -> bytes:
    """A PNG file with ``chunks`` before the pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, len(rows), depth, color, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows))
    parts = [(b"IHDR", header), *chunks, (b"IDAT", pixels), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


PALETTE = (b"PLTE", bytes([0, 0, 0, 200, 10, 60, 90, 250, 30, 255, 255, 255]))
COLORS = [(0, 0, 0), (200, 10, 60), (90, 250, 30), (255, 255, 255)]


def with_alpha(alphas: list[int], colors: list[Any]) -> list[tuple[int, ...]]:
    """Colors (or grays) with these alphas."""
    whole = [color if isinstance(color, tuple) else (color,) * 3 for color in colors]
    return [(*color, alpha) for color, alpha in zip(whole, alphas, strict=True)]


# a file of one row, and its colors and alphas
TRANSPARENT = {
    "RGBA": (
        png(8, 6, 3, [bytes([9, 8, 7, 0, 90, 0, 200, 100, 5, 6, 7, 255])]),
        with_alpha([0, 100, 255], [(9, 8, 7), (90, 0, 200), (5, 6, 7)]),
    ),
    "LA": (
        png(8, 4, 3, [bytes([0, 0, 90, 128, 200, 255])]),
        with_alpha([0, 128, 255], [0, 90, 200]),
    ),
    "P with an index": (
        png(8, 3, 4, [bytes([0, 1, 2, 3])], PALETTE, (b"tRNS", b"\xff\x00")),
        with_alpha([255, 0, 255, 255], COLORS),
    ),
    "P with a table": (
        png(8, 3, 4, [bytes([0, 1, 2, 3])], PALETTE, (b"tRNS", b"\x00\x80\xff\x40")),
        with_alpha([0, 128, 255, 64], COLORS),
    ),
    "P of 2 bits": (
        png(2, 3, 4, [bytes([0b00011011])], PALETTE, (b"tRNS", b"\x00")),
        with_alpha([0, 255, 255, 255], COLORS),
    ),
    "RGB with a key": (
        png(8, 2, 2, [bytes([0, 0, 0, 0, 0, 1])], (b"tRNS", bytes(6))),
        with_alpha([0, 255], [(0, 0, 0), (0, 0, 1)]),
    ),
    "L with a key": (
        png(8, 0, 3, [bytes([0, 7, 255])], (b"tRNS", b"\0\7")),
        with_alpha([255, 0, 255], [0, 7, 255]),
    ),
    "L of 4 bits": (
        png(4, 0, 4, [bytes([0x05, 0xAF])], (b"tRNS", b"\0\5")),
        with_alpha([255, 0, 255, 255], [0, 85, 170, 255]),
    ),
    "L of 2 bits": (
        png(2, 0, 4, [bytes([0b00011011])], (b"tRNS", b"\0\1")),
        with_alpha([255, 0, 255, 255], [0, 85, 170, 255]),
    ),
    "1 bit": (
        png(1, 0, 4, [bytes([0b10110000])], (b"tRNS", b"\0\1")),
        with_alpha([0, 255, 0, 0], [255, 0, 255, 255]),
    ),
}


@pytest.mark.parametrize("background", [(255, 255, 255), ORANGE])
@pytest.mark.parametrize("kind", TRANSPARENT)
def test_transparency_shows_the_background(
    kind: str, background: tuple[int, ...], tmp_path: Path
) -> None:
    """As in the equation of compositing."""
    file = tmp_path / "icon.png"
    data, rgba = TRANSPARENT[kind]
    file.write_bytes(data)
    reading = Reading(background=background)
    got = np.asarray(open_image(file, reading))
    colors = np.array([rgba], np.float64)
    alpha = colors[..., 3:] / 255
    want = alpha * colors[..., :3] + (1 - alpha) * np.array(background)
    assert np.abs(got - want).max() <= 1
    item = open_image(Item(lambda index: Image.open(file), 0), reading)  # of a dataset
    assert np.array_equal(np.asarray(item), got)
    gray = np.asarray(open_image(file, Reading("L", background)))
    assert np.abs(gray - want @ [0.299, 0.587, 0.114]).max() <= 2


@pytest.mark.parametrize("ending", ["gif", "webp", "tif", "ico", "tga", "jp2"])
def test_every_format_may_be_transparent(ending: str, tmp_path: Path) -> None:
    image = Image.new("RGBA", (16, 16))
    image.paste((0, 0, 0, 255), (8, 0, 16, 16))
    image.save(tmp_path / f"icon.{ending}")
    got = np.asarray(open_image(tmp_path / f"icon.{ending}", Reading(background=ORANGE)))
    assert np.abs(got[:, :7].astype(int) - ORANGE).max() <= 3
    assert got[:, 9:].max() <= 3


@pytest.mark.parametrize("mode", ["RGBa", "La", "PA", "LA", "RGBA"])
def test_pixels_that_are_all_transparent_are_background(mode: str) -> None:
    got = open_image(Item(lambda index: Image.new(mode, (2, 3)), 0), Reading(background=ORANGE))
    assert (np.asarray(got) == ORANGE).all()


def test_icons_on_transparent_ground_differ(tmp_path: Path) -> None:
    """Black shapes, whose transparent pixels are black as well."""
    for name, box in (("bar", (0, 4, 9, 6)), ("dot", (4, 4, 6, 6))):
        icon = Image.new("RGBA", (9, 9))
        icon.paste((0, 0, 0, 255), box)
        icon.save(tmp_path / f"{name}.png")
    bar, dot = (decode(tmp_path / f"{name}.png", 9) for name in ("bar", "dot"))
    assert not torch.equal(bar, dot)
    assert [int((image == 0).sum()) for image in (bar, dot)] == [3 * 18, 3 * 4]


# orientation


def exif(*entries: bytes) -> bytes:
    """EXIF in big-endian order with these entries of 12 bytes."""
    ifd = struct.pack(">H", len(entries)) + b"".join(entries) + bytes(4)
    return b"Exif\0\0MM\0\x2a\0\0\0\x08" + ifd


def orientation(value: int) -> bytes:
    return struct.pack(">HHIHH", 0x0112, 3, 1, value, 0)


TURNS = {1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud,
         5: lambda a: a.swapaxes(0, 1), 6: lambda a: np.rot90(a, -1),
         7: lambda a: np.rot90(a.swapaxes(0, 1), 2), 8: np.rot90}  # fmt: skip


@pytest.mark.parametrize("ending", ["png", "jpg", "webp", "tiff"])
@pytest.mark.parametrize("value", [*TURNS, 0, 9])
def test_every_orientation_is_turned_upright(value: int, ending: str, tmp_path: Path) -> None:
    pixels = np.zeros((8, 16, 3), np.uint8)
    pixels[:4, :12] = (220, 30, 60)
    file = tmp_path / f"turned.{ending}"
    more: dict[str, Any] = {"png": {}, "tiff": {}}.get(ending, {"quality": 100})
    tags = Image.Exif()
    tags[0x0112] = value
    Image.fromarray(pixels).save(file, exif=tags, **more)
    got = np.asarray(open_image(file)).astype(int)
    want = TURNS.get(value, TURNS[1])(pixels)
    assert got.shape == want.shape
    assert np.abs(got - want).mean() < 16  # chroma of JPEG and WebP at the edges


@pytest.mark.parametrize("mode", ["L", "RGBA", "CMYK", "I;16"])
def test_uncompressed_tiffs_of_every_mode_are_turned_upright(mode: str, tmp_path: Path) -> None:
    """Pillow maps such files into memory, unless they are opened as streams."""
    shape = (8, 16, 4) if mode in ("RGBA", "CMYK") else (8, 16)
    kind = np.uint16 if mode == "I;16" else np.uint8
    values = np.arange(8 * 16 * 4)[: np.prod(shape)].reshape(shape).astype(kind)
    image = Image.frombytes(mode, (16, 8), values.tobytes())
    image.save(tmp_path / "plain.tiff")
    plain, reading = tmp_path / "plain.tiff", Reading(max_value=512 if mode == "I;16" else None)
    pixels = np.asarray(open_image(plain, reading))
    assert len(np.unique(pixels)) > 16
    for value, turn in TURNS.items():
        tags = Image.Exif()
        tags[0x0112] = value
        image.save(file := tmp_path / f"{value}.tiff", exif=tags)
        assert np.array_equal(np.asarray(open_image(file, reading)), turn(pixels))


ODD = {
    "text for a number": [orientation(6), struct.pack(">HHI4s", 0x0100, 2, 2, b"8\0\0\0")],
    "an offset behind the end": [orientation(6), struct.pack(">HHII", 0x010F, 2, 99, 9999)],
    "an unknown type": [orientation(6), struct.pack(">HHII", 0x0131, 77, 1, 0)],
}  # fmt: skip


@pytest.mark.parametrize("kind", ODD)
def test_a_sound_jpeg_with_odd_exif_is_read_and_turned(kind: str, tmp_path: Path) -> None:
    Image.new("RGB", (16, 8)).save(tmp_path / "odd.jpg", exif=exif(*ODD[kind]))
    before = (tmp_path / "odd.jpg").read_bytes()
    assert open_image(tmp_path / "odd.jpg").size == (8, 16)
    assert (tmp_path / "odd.jpg").read_bytes() == before


@pytest.mark.parametrize("data", [b"Exif\0\0", b"Exif\0\0MM\0", b"Exif\0\0II*\0\xff\xff\xff\xff"])
def test_exif_without_orientation_turns_nothing(data: bytes, tmp_path: Path) -> None:
    Image.new("RGB", (16, 8)).save(tmp_path / "odd.jpg", exif=data)
    assert open_image(tmp_path / "odd.jpg").size == (16, 8)


# bit depth

RAMP = np.array([[0, 1, 128, 129, 4095], [4096, 30000, 32768, 65534, 65535]], np.uint16)


def tiff(pixels: np.ndarray, order: str, photometric: int = 1, sample_format: int = 1) -> bytes:
    """An uncompressed TIFF of one channel."""
    tags = [(256, pixels.shape[1]), (257, pixels.shape[0]), (258, pixels.itemsize * 8), (259, 1),
            (262, photometric), (273, 8), (277, 1), (278, pixels.shape[0]), (279, pixels.nbytes),
            (339, sample_format)]  # fmt: skip
    data = pixels.astype(pixels.dtype.newbyteorder(order)).tobytes()
    entries = b"".join(struct.pack(f"{order}HHII", tag, 4, 1, value) for tag, value in tags)
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8 + len(data))
    return head + data + struct.pack(f"{order}H", len(tags)) + entries + bytes(4)


def deep_files() -> dict[str, bytes]:
    jp2 = io.BytesIO()
    Image.fromarray(np.tile(RAMP, (4, 2))).save(jp2, "JPEG2000", irreversible=False)
    rows = [row.astype(">u2").tobytes() for row in RAMP]
    return {
        "deep.png": png(16, 0, 5, rows),
        "little.tif": tiff(RAMP, "<"),
        "big.tif": tiff(RAMP, ">"),
        "deep.pgm": b"P5 5 2 65535\n" + RAMP.astype(">u2").tobytes(),
        "deep.jp2": jp2.getvalue(),
    }


@pytest.mark.parametrize("max_value", [None, 4095.0])
@pytest.mark.parametrize("name", deep_files())
def test_sixteen_bits_are_scaled_to_eight(
    name: str, max_value: float | None, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(deep_files()[name])
    got = np.asarray(open_image(tmp_path / name, Reading(max_value=max_value)))
    want = np.minimum(np.rint(RAMP.astype(np.float64) / (max_value or 65535) * 255), 255)
    assert want.flat[6] == (255 if max_value else 117)
    assert np.array_equal(got[:2, :5], np.repeat(want[..., None], 3, 2))
    gray = np.asarray(open_image(tmp_path / name, Reading("L", max_value=max_value)))
    assert np.array_equal(gray[:2, :5], want)


def test_a_file_that_states_its_white_needs_no_option(tmp_path: Path) -> None:
    values = np.array([[0, 1000, 4095]], np.uint16)
    (tmp_path / "twelve.pgm").write_bytes(b"P5 3 1 4095\n" + values.astype(">u2").tobytes())
    for reading in (Reading(), Reading(max_value=4095), Reading(max_value=65535)):
        got = np.asarray(open_image(tmp_path / "twelve.pgm", reading))
        assert got[0, :, 0].tolist() == [0, 62, 255]
    (tmp_path / "negative.tif").write_bytes(tiff(RAMP, "<", photometric=0))
    got = np.asarray(open_image(tmp_path / "negative.tif"))
    assert np.array_equal(got[..., 0], np.rint(255 - RAMP / 257.0))
    Image.new("L", (1, 1), 77).save(tmp_path / "eight.png")  # 8 bits are as they are
    assert open_image(tmp_path / "eight.png", Reading(max_value=4095)).getpixel((0, 0))[0] == 77


def test_a_deep_key_is_transparent(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(
        png(16, 0, 2, [struct.pack(">HH", 0, 30000)], (b"tRNS", b"\0\0"))
    )
    got = np.asarray(open_image(tmp_path / "a.png", Reading(background=ORANGE)))
    assert got[0].tolist() == [list(ORANGE), [117] * 3]
    colors = png(16, 2, 2, [struct.pack(">6H", 0, 0, 0, 0, 30000, 0)], (b"tRNS", bytes(6)))
    (tmp_path / "b.png").write_bytes(colors)
    got = np.asarray(open_image(tmp_path / "b.png", Reading(background=ORANGE)))
    assert got[0].tolist() == [list(ORANGE), [0, 117, 0]]


def test_thirty_two_bits_need_the_value_of_white(tmp_path: Path) -> None:
    files = {
        "float.tif": (tiff(np.array([[0, 0.25, 1, 7]], np.float32), "<", 1, 3), 1.0, "F"),
        "int.tif": (tiff(np.array([[0, 25000, 100000, 700000]], np.int32), "<", 1, 2), 1e5, "I"),
        "float.pfm": (b"Pf\n4 1\n-1.0\n" + np.array([0, 0.25, 1, 7], "<f4").tobytes(), 1.0, "F"),
    }
    for name, (data, white, mode) in files.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=f"{name} has pixels of mode '{mode}': .*max_value"):
            open_image(tmp_path / name)
        got = np.asarray(open_image(tmp_path / name, Reading(max_value=white)))
        assert got[0, :, 0].tolist() == [0, 64, 255, 255]
    (tmp_path / "nan.tif").write_bytes(tiff(np.array([[0, np.nan]], np.float32), "<", 1, 3))
    with pytest.raises(ValueError, match=r"nan.tif cannot be read .* pixels are not finite"):
        open_image(tmp_path / "nan.tif", Reading(max_value=1))


def test_deep_colors_are_refused_only_with_another_white(tmp_path: Path) -> None:
    rows = [struct.pack(">6H", 0, 0, 257, 65535, 30000, 0)]
    (tmp_path / "deep.png").write_bytes(png(16, 2, 2, rows))
    got = np.asarray(open_image(tmp_path / "deep.png"))
    assert np.abs(got[0] - np.array([[0, 0, 1], [255, 116.7, 0]])).max() <= 1
    with pytest.raises(
        ValueError, match=r"deep.png has 16-bit colors, of which the upper 8 bits are read"
    ):
        open_image(tmp_path / "deep.png", Reading(max_value=4095))


# color spaces and frames


def lab_to_srgb(lightness: float, a: float, b: float) -> np.ndarray:
    """The equations of CIE Lab for D50, Bradford's adaptation to D65, and sRGB's gamma."""
    y = (lightness + 16) / 116
    f = np.array([y + a / 500, y, y - b / 200])
    xyz = np.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29)) * [0.9642, 1, 0.8249]
    matrix = np.array([[3.1338561, -1.6168667, -0.4906146], [-0.9787684, 1.9161415, 0.0334540],
                       [0.0719453, -0.2289914, 1.4052427]])  # fmt: skip
    linear = (matrix @ xyz).clip(0, 1)
    curve = np.where(linear > 0.0031308, 1.055 * linear ** (1 / 2.4) - 0.055, 12.92 * linear)
    return 255 * curve


def test_lab_is_converted_as_cie_says(tmp_path: Path) -> None:
    for lightness, a, b in ((50, 0, 0), (60, 30, 20), (70, -20, 35), (40, 10, -30), (100, 0, 0)):
        pixel = (round(lightness * 2.55), a + 128, b + 128)
        Image.new("LAB", (2, 2), pixel).save(tmp_path / "lab.tif")
        got = np.asarray(open_image(tmp_path / "lab.tif"))[0, 0]
        assert np.abs(got - lab_to_srgb(pixel[0] / 2.55, a, b)).max() <= 2


def test_print_and_video_colors_are_converted(tmp_path: Path) -> None:
    cyan, key = 200, 100
    Image.new("CMYK", (2, 2), (cyan, 0, 0, key)).save(tmp_path / "print.tif")
    got = open_image(tmp_path / "print.tif").getpixel((0, 0))
    want = [(255 - ink) * (255 - key) / 255 for ink in (cyan, 0, 0)]
    assert np.abs(np.array(got) - want).max() <= 1
    for mode in ("YCbCr", "HSV"):
        image = Image.new("RGB", (2, 2), (200, 60, 20)).convert(mode)
        got = open_image(Item(lambda index, image=image: image, 0)).getpixel((0, 0))
        assert np.abs(np.array(got) - (200, 60, 20)).max() <= 3
    Image.new("CMYK", (8, 8), (cyan, 0, 0, key)).save(tmp_path / "print.jpg", quality=100)
    got = open_image(tmp_path / "print.jpg").getpixel((4, 4))  # Adobe stores it inverted
    assert np.abs(np.array(got) - want).max() <= 6


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png", "a.apng", "a.tif"])
def test_the_first_frame_of_an_animation_is_read(name: str, tmp_path: Path) -> None:
    frames = [Image.new("RGB", (9, 7), color) for color in ("red", "lime", "blue")]
    options = {"lossless": True} if name == "a.webp" else {}
    frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], **options)
    assert (np.asarray(open_image(tmp_path / name)) == (255, 0, 0)).all()


@pytest.mark.parametrize("size", [(1, 1), (1, 700), (700, 1), (3, 2)])
def test_images_of_any_shape_become_squares(size: tuple[int, int], tmp_path: Path) -> None:
    Image.new("RGB", size, ORANGE).save(tmp_path / "odd.png")
    pixels = decode(tmp_path / "odd.png", 8)
    assert pixels.shape == (3, 8, 8)
    assert (pixels == torch.tensor(ORANGE)[:, None, None]).all()


def test_the_modes_of_items_decide_on_grayscale() -> None:
    def broken(index: int) -> Image.Image:
        raise struct.error("damaged")

    def mixed(index: int) -> Image.Image:
        return Image.new("LA" if index else "RGB", (2, 2))

    assert count_channels(lambda index: Image.new("LA", (2, 2)), 3) == 1
    assert count_channels(mixed, 3) == 3
    assert count_channels(broken, 3) == 3


# damaged files


@functools.cache
def files_of_all_formats() -> list[tuple[str, bytes]]:
    """Files of every format that Pillow writes and we read, in several modes and compressions."""
    draws = np.random.default_rng(0).integers(0, 9, (23, 31, 3))
    ramp = np.add.outer(np.arange(23) * 5, np.arange(31) * 4)[..., None] + [0, 20, 40] + draws
    rgb = Image.fromarray(ramp.clip(0, 255).astype(np.uint8))
    modes = {mode: rgb.convert(mode) for mode in ("RGB", "L", "1", "CMYK")}
    modes |= {"P": rgb.quantize(32), "I;16": Image.fromarray((ramp[..., 0] * 200).astype("u2"))}
    modes["RGBA"] = rgb.copy()
    modes["RGBA"].putalpha(modes["L"])
    options: dict[str, list[dict[str, Any]]] = {
        "TIFF": [{"compression": c} for c in ("tiff_lzw", "tiff_deflate", "jpeg", "packbits")],
        "JPEG": [{"progressive": True}],
        "WEBP": [{"lossless": True}],
        "GIF": [{"interlace": False}],
        "PNG": [{"save_all": True, "append_images": [rgb]}],
    }
    found = []
    for name, (mode, image) in itertools.product(sorted(Image.SAVE), modes.items()):
        for more in [{}, *options.get(name, [])] if name in [*FORMATS, "MPO"] else []:
            file = io.BytesIO()
            try:
                image.save(file, name, **more)
            except (OSError, ValueError):
                continue  # the format has no such mode
            if (name, mode) != ("ICNS", "P"):  # Pillow cannot read its own output
                found.append((name.lower(), file.getvalue()))
    return found


def read_or_reason(file: Path) -> Image.Image | str:
    try:
        return open_image(file)
    except ValueError as error:
        return str(error)


def test_every_common_format_is_read() -> None:
    kinds = {kind for kind, _ in files_of_all_formats()}
    assert kinds >= {"png", "jpeg", "webp", "gif", "bmp", "tiff", "ppm", "tga", "ico", "mpo"}
    assert {".jpg", ".jpe", ".jfif", ".gif", ".png", ".tga", ".webp", ".mpo"} <= IMAGE_ENDINGS
    assert not {".eps", ".pdf", ".ps", ".h5", ".mpg", ".wmf", ".pcx"} & IMAGE_ENDINGS


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    """Unless only metadata is missing: then the pixels are those of the whole file."""
    refused = 0
    for kind, data in files_of_all_formats():
        file = tmp_path / f"cut.{kind}"
        file.write_bytes(data)
        whole = np.asarray(open_image(file))
        for length in {len(data) * k // 8 for k in range(8)} | {len(data) - k for k in (1, 2, 9)}:
            file.write_bytes(data[:length])
            got = read_or_reason(file)
            if isinstance(got, str):
                assert got.startswith(f"{file} cannot be read as an image: ")
                refused += 1
            else:
                assert np.array_equal(np.asarray(got), whole), kind
    assert refused > 500


def damaged(count: int, seed: int, tmp_path: Path) -> None:
    """Change random bytes, half of the time in the first 200, and read the file."""
    draws, files = random.Random(seed), list(files_of_all_formats())
    refused = 0
    for _ in range(count):
        kind, data = draws.choice(files)
        changed = bytearray(data)
        for _ in range(draws.randint(1, 8)):
            end = len(data) if draws.random() < 0.5 else min(len(data), 200)
            changed[draws.randrange(end)] = draws.randrange(256)
        file = tmp_path / f"damaged.{kind}"
        file.write_bytes(changed)
        start = time.monotonic()
        got = read_or_reason(file)
        refused += isinstance(got, str)
        if isinstance(got, str):
            assert got.startswith(f"{file} ")
            assert "\n" not in got
        else:
            assert got.mode == "RGB"
        assert time.monotonic() - start < 20
    assert count / 5 < refused < 4 * count / 5


def test_damaged_files_are_read_or_named(tmp_path: Path) -> None:
    damaged(400, 3, tmp_path)


@pytest.mark.slow
def test_many_damaged_files_are_read_or_named(tmp_path: Path) -> None:
    damaged(20_000, 4, tmp_path)


ERRORS = [
    ValueError("bad"), struct.error("bad"), SyntaxError("bad"), EOFError("bad"), zlib.error("bad"),
    MemoryError(), OverflowError("bad"), Image.DecompressionBombError("bad"), IndexError("bad"),
    RuntimeError("bad"), AssertionError(), KeyError("bad"), OSError("bad\nand worse"),
]  # fmt: skip


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_whatever_a_decoder_raises_the_file_is_named(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(self: object) -> None:
        raise error

    def read(index: int) -> Image.Image:
        raise error

    file = tmp_path / "a.png"
    Image.new("RGB", (4, 4)).save(file)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", load)
    reason = " ".join(str(error).split()) or type(error).__name__
    with pytest.raises(ValueError, match="cannot be read") as caught:
        decode(file, 4)
    assert str(caught.value) == f"{file} cannot be read as an image: {reason}"
    ((item, _),) = as_items(read, [1])
    with pytest.raises(ValueError, match="cannot be read") as caught:
        decode(item, 4)
    assert str(caught.value) == f"image 0 of the dataset cannot be read: {reason}"
    for workers in (0, 1):
        streamed = Images([(file, 0)], 4).batches([torch.tensor([0])], torch.device("cpu"), workers)
        with pytest.raises(ValueError, match="cannot be read") as caught:
            next(streamed)
        assert str(caught.value) == (
            f"{file} cannot be read as an image: {reason}; "
            "--data.skip_broken true skips such images, in training only in a new run"
        )


def test_files_that_trick_decoders_are_named(tmp_path: Path) -> None:
    text = (b"zTXt", b"Comment\0\0" + zlib.compress(b"a" * (2**20 + 1)))
    rows = [bytes(3)]
    bomb = png(1, 0, 30000, [b"\0"] * 30000)
    files = {
        "text.png": (png(8, 2, 1, rows, text), "too large"),
        "bomb.png": (bomb, "exceeds limit of 178956970 pixels"),
        "empty.jpg": (b"", "has no known image format"),
        "page.jpg": (b"<html><body>404</body></html>", "has no known image format"),
        "figure.png": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "has no known image"),
    }
    for name, (data, reason) in files.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=f"{name} cannot be read as an image: .*{reason}"):
            open_image(tmp_path / name)


def test_pillow_warns_of_nothing(tmp_path: Path) -> None:
    """Large images and odd metadata, where warnings are errors."""
    (tmp_path / "large.png").write_bytes(png(1, 0, 12000, [b"\0"] * 9000))  # lacks pixels
    Image.new("RGB", (16, 8)).save(tmp_path / "a.jpg", exif=exif(*ODD["an offset behind the end"]))
    program = (
        "import sys; from pathlib import Path; from train.data import open_image\n"
        "for file in sys.argv[1:]:\n"
        "    try: print(open_image(Path(file)).size)\n"
        "    except ValueError as error: print(error)\n"
    )
    files = [str(tmp_path / name) for name in ("a.jpg", "large.png")]
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program, *files],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert lines[0] == "(8, 16)"
    assert "large.png cannot be read as an image: image file is truncated" in lines[1]
