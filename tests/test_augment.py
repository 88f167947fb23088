"""Batched augmentation against one image at a time; safe unpacking; pictures and the report."""

from __future__ import annotations

import gzip
import io
import json
import random
import re
import shutil
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torchvision.transforms import v2

from train.augment import augment, draw, plain
from train.commands import read_runs
from train.config import AugmentConfig
from train.data import unpack
from train.report import page, table

OFF = AugmentConfig(crop=False, flip=False)


def images(count: int = 29, height: int = 16, width: int = 11) -> Tensor:
    return torch.randint(256, (count, 3, height, width), dtype=torch.uint8)


def draws(count: int = 29) -> Tensor:
    return draw(count, torch.Generator().manual_seed(3))


def test_nothing_on_is_the_plain_image() -> None:
    x = images()
    assert torch.equal(augment(x, draws(), OFF, mirror=True), plain(x))
    assert plain(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [-1, 1]


def test_crops_and_mirrors_are_those_of_single_images() -> None:
    x, d = images(), draws()
    got = augment(x, d, AugmentConfig(), mirror=True)
    mirrored, places = 0, set()
    for image, (down, right, flip, *_), y in zip(x, d.tolist(), got, strict=True):
        top, left = int(down * 5), int(right * 3)  # padded by 2 and 1
        padded = v2.functional.pad(image, [1, 2])
        want = v2.functional.crop(padded, top, left, 16, 11)
        if flip < 0.5:
            want, mirrored = want.flip(-1), mirrored + 1
        assert torch.equal(y, plain(want))
        places.add((top, left))
    assert 5 < mirrored < 24
    assert len(places) > 8


def test_digits_are_not_mirrored() -> None:
    x = images()
    flips = AugmentConfig(crop=False, flip=True)
    assert torch.equal(augment(x, draws(), flips, mirror=False), plain(x))
    assert not torch.equal(augment(x, draws(), flips, mirror=True), plain(x))


def test_color_multiplies_brightness_and_saturation() -> None:
    x, d = images(), draws()
    got = augment(x, d, AugmentConfig(crop=False, flip=False, color=0.4), mirror=True)
    for i in (0, 7, 28):
        brightness, saturation = (1 + 0.4 * (2 * d[i, 3:5] - 1)).tolist()
        bright = x[i].float() * brightness
        grey = bright.mean(0)
        want = (grey + saturation * (bright - grey)).clamp(0, 255) / 127.5 - 1
        torch.testing.assert_close(got[i], want, rtol=0, atol=1e-6)


def test_erasing_takes_a_rectangle_of_its_share() -> None:
    x = torch.full((4000, 1, 32, 32), 255, dtype=torch.uint8)
    got = augment(x, draws(4000), AugmentConfig(crop=False, flip=False, erasing=0.25), mirror=True)
    erased = (got == 0).squeeze(1)
    hit = erased.flatten(1).any(1)
    assert 0.2 < hit.float().mean() < 0.3
    areas = []
    for mask in erased[hit]:
        rows, columns = mask.any(1), mask.any(0)
        assert torch.equal(mask, rows[:, None] & columns), "not a rectangle"
        areas.append(mask.float().mean().item())
    assert min(areas) < 0.06
    assert 0.25 < max(areas) <= 0.4
    assert (got[~erased[:, None]] == 1).all()


@pytest.mark.parametrize("policy", ["trivial", "rand"])
def test_a_policy_changes_images_by_the_global_generator(policy: str) -> None:
    config = AugmentConfig(crop=False, flip=False, policy=policy)
    x, results = images(), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(augment(x, draws(), config, mirror=True))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])
    assert results[0].shape == x.shape
    assert results[0].abs().max() <= 1


def test_a_process_does_to_its_rows_what_all_would() -> None:
    x, d = images(28), draws(28)
    config = AugmentConfig(color=0.3, erasing=0.5)
    whole = augment(x, d, config, mirror=True)
    parts = [augment(x[a : a + 7], d[a : a + 7], config, mirror=True) for a in range(0, 28, 7)]
    assert torch.equal(whole, torch.cat(parts))


# archives


def tar_of(path: Path, **members: bytes | str) -> Path:
    """Files by name; a text value is the target of a link."""
    with tarfile.open(path, "w:gz") as file:
        for name, content in members.items():
            info = tarfile.TarInfo(name.replace("__", "/").replace("UP", ".."))
            if isinstance(content, str):
                info.type, info.linkname = tarfile.SYMTYPE, content
                file.addfile(info)
            else:
                info.size = len(content)
                file.addfile(info, io.BytesIO(content))
    return path


def test_archives_are_unpacked_inside_their_target(tmp_path: Path) -> None:
    unpack(tar_of(tmp_path / "a.tar.gz", set__one=b"1", set__two=b"22"), tmp_path / "a")
    assert {p.name: p.read_bytes() for p in (tmp_path / "a" / "set").iterdir()} == {
        "one": b"1", "two": b"22",
    }  # fmt: skip
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as file:
        file.writestr("set/one", "1")
    unpack(tmp_path / "b.zip", tmp_path / "b")
    assert (tmp_path / "b" / "set" / "one").read_text() == "1"


@pytest.mark.parametrize(
    ("members", "match"),
    [
        ({"good": b"1", "UP__evil": b"2"}, "has the path ../evil, out of its folder"),
        ({"good": b"1", "__evil": b"2"}, "has the path /evil, out of its folder"),
        ({"good": b"1", "link": "/etc"}, "has link, no plain file or folder"),
        ({"good": b"1", "link": "good"}, "has link, no plain file or folder"),
    ],
    ids=["path out", "absolute path", "absolute link", "link"],
)
def test_archives_that_reach_out_are_refused(
    members: dict[str, bytes | str], match: str, tmp_path: Path
) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    with pytest.raises(ValueError, match=match):
        unpack(tar_of(tmp_path / "a.tar.gz", **members), inside / "a")
    assert not list(inside.iterdir())
    assert not (tmp_path / "evil").exists()


def test_a_zip_that_reaches_out_and_a_torn_archive_are_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        file.writestr("../evil", "1")
    with pytest.raises(ValueError, match=r"has the path \.\./evil, out of its folder"):
        unpack(tmp_path / "a.zip", tmp_path / "in" / "a")
    whole = tar_of(tmp_path / "b.tar.gz", one=bytes(range(256)) * 99)
    whole.write_bytes(whole.read_bytes()[:-60])
    with pytest.raises(ValueError, match=r"b.tar.gz cannot be unpacked"):
        unpack(whole, tmp_path / "b")
    (tmp_path / "c.tar").write_text("no archive")
    with pytest.raises(ValueError, match=r"c.tar cannot be unpacked"):
        unpack(tmp_path / "c.tar", tmp_path / "c")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.zip", "b.tar.gz", "c.tar"]


@pytest.mark.parametrize("end", ["cut at a header", "a damaged header"])
def test_a_tar_without_its_last_files_is_refused(end: str, tmp_path: Path) -> None:
    path = tar_of(tmp_path / "a.tar.gz", one=b"1", two=b"2", three=b"3")
    data = bytearray(gzip.decompress(path.read_bytes()))
    path.unlink()
    data[2048:2052] = b"XXXX"
    kept, sentence = (data[:2048], "truncated") if "cut" in end else (data, "damaged at byte 2,048")
    (tmp_path / "a.tar").write_bytes(kept)
    with pytest.raises(ValueError, match=f"a.tar is {sentence}$"):
        unpack(tmp_path / "a.tar", tmp_path / "a")
    assert [p.name for p in tmp_path.iterdir()] == ["a.tar"]


def test_damage_within_an_archive_is_one_sentence(tmp_path: Path) -> None:
    """Whatever the decompressor raises; a password and an unknown compression, too."""
    chance = random.Random(0)
    for kind in ("zip", "gztar", "xztar", "bztar"):
        (tmp_path / kind / "in").mkdir(parents=True)
        (tmp_path / kind / "in" / "a.png").write_bytes(chance.randbytes(9000) + bytes(9000))
        path = Path(shutil.make_archive(str(tmp_path / kind / "a"), kind, tmp_path / kind / "in"))
        data = path.read_bytes()
        changes = [{i: chance.randrange(256) for i in chance.sample(range(len(data)), 9)}
                   for _ in range(20)]  # fmt: skip
        if kind == "zip":
            entry = data.index(b"PK\x01\x02")
            changes += [{6: 1, entry + 8: 1}, {8: 77, entry + 10: 77}]
        sentences, left = [], []
        for change in changes:
            changed = bytearray(data)
            for i, byte in change.items():
                changed[i] = byte
            path.write_bytes(changed)
            try:
                unpack(path, tmp_path / kind / "out")
            except ValueError as error:
                sentences.append(str(error))
                left += [p for p in (tmp_path / kind).iterdir() if p.name not in ("in", path.name)]
            shutil.rmtree(tmp_path / kind / "out", ignore_errors=True)
        assert len(sentences) >= len(changes) - 2  # others changed unused bytes
        assert not [text for text in sentences if "\n" in text]
        assert not left


# the report


def run_folder(folder: Path, top1: list[float], done: bool = True) -> None:
    folder.mkdir(parents=True)
    lines = ["epoch,train_loss,val_loss,val_top1,val_top5,images_per_second"]
    lines += [f"{i + 1},{2 - t},{2.1 - t},{t},{t},1234.5" for i, t in enumerate(top1)]
    (folder / "metrics.csv").write_text("\n".join(lines) + "\n")
    command = ["python", "-m", "train", "--seed", "<3>"]
    (folder / "sessions.json").write_text(json.dumps([{"command": command, "device": "a card"}]))
    if done:
        result = {"val_top1": max(top1), "test_top1": top1[-1] / 2, "test_top5": 1.0,
                  "parameters": 1000, "peak_mib": 77.0, "minutes": 1.5}  # fmt: skip
        (folder / "result.json").write_text(json.dumps(result))


def test_the_report_shows_every_run_and_needs_no_network(tmp_path: Path) -> None:
    run_folder(tmp_path / "a" / "first", [0.2, 0.4])
    run_folder(tmp_path / "a" / "second & co", [0.3, 0.6, 0.5])
    run_folder(tmp_path / "a" / "cut", [0.1], done=False)
    runs = read_runs([tmp_path / "a"])
    headings, rows = table(runs).headings, table(runs).rows
    assert headings[:2] == ["run", "test top-1"]
    assert [row[0] for row in rows] == ["second & co", "first", "cut"]
    assert rows[0][1:4] == ["25.00%", "60.00%", "3"]
    assert rows[2][1] == ""
    assert table(runs).text().splitlines()[1].startswith("second & co")
    page(runs, tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert text.count("data:image/png;base64,") == 2
    assert "second &amp; co" in text
    assert "&lt;3&gt;" in text
    addresses = re.findall(r'(?:src|href)="([^"]{0,30})|url\(|@import', text)
    assert len(addresses) == 2
    assert all(address.startswith("data:image/png;base64,") for address in addresses)
