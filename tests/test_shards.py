"""Shards of WebDataset and streams of Hugging Face: each image once, resumed exactly, refused."""

from __future__ import annotations

import collections
import functools
import gzip
import http.server
import io
import json
import os
import socket
import subprocess
import sys
import tarfile
import threading
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from test_resume import ROOT, CutError, assert_equal, left

from train import balance
from train.__main__ import main
from train.atomic import read_state
from train.balance import epoch_order
from train.checkpoint import resolved
from train.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from train.data import Images, Splits, cache, load_data
from train.data.images import ShardError
from train.data.webdataset import read_webdataset
from train.loop import Run

wds = pytest.importorskip("webdataset")
NAMES = ("cat", "dog", "eel")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    AcceleratorState._reset_state(reset_partial_state=True)


def encoded(value: int, ending: str = "PNG") -> bytes:
    """An image of 8 x 8 pixels of one color."""
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (value, 255 - value, 7)).save(file, ending)
    return file.getvalue()


def write_tar(path: Path, files: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def samples(first: int, count: int, names: bool = False) -> dict[str, bytes]:
    """Images whose red is their number, and their labels: the number modulo 3."""
    files = {}
    for i in range(first, first + count):
        label = NAMES[i % 3] if names else str(i % 3)
        files |= {f"{i:04}.png": encoded(i), f"{i:04}.cls": label.encode()}
    return files


def write_set(root: Path) -> Path:
    """37 training images in 4 shards of unequal sizes, 6 for validation, 11 for the test."""
    for number, (first, count) in enumerate([(0, 10), (10, 9), (19, 11), (30, 7)]):
        write_tar(root / f"train-{number:02}.tar", samples(first, count))
    write_tar(root / "validation-00.tar", samples(100, 6))
    for number, (first, count) in enumerate([(200, 5), (205, 6)]):
        write_tar(root / f"test-{number:02}.tar", samples(first, count))
    return root


def load(root: Path | str, name: str = "webdataset", **options: object) -> Splits:
    return load_data(DataConfig(name=name, root=str(root), **options))


def numbers(images: Images) -> list[int]:
    """The red of all images, which is their number."""
    return [int(images[i][0][0, 0, 0]) for i in range(len(images))]


def test_shards_are_written_by_webdataset_and_read_by_it(tmp_path: Path) -> None:
    """The library's own reader is the oracle of our index, in the order of the shards."""
    for number in range(3):
        with wds.TarWriter(str(tmp_path / f"train-{number}.tar")) as writer:
            for i in range(5 * number, 5 * number + 4 + number):
                writer.write({"__key__": f"n01/{i}", "jpg": encoded(i, "JPEG"), "cls": i % 3,
                              "json": b"{}", "note.txt": b"x"})  # fmt: skip
    theirs = []
    for path in sorted(tmp_path.glob("*.tar")):
        with path.open("rb") as file:
            files = wds.tariterators.tar_file_iterator(file)
            named = ({**found, "__url__": str(path)} for found in files)
            found = wds.tariterators.group_by_keys(named)
            theirs += [(sample["jpg"], int(sample["cls"])) for sample in found]
    ours = read_webdataset(DataConfig(name="webdataset", root=str(tmp_path))).train
    assert len(ours) == 15
    assert [(item.read(item.index).read(), label) for item, label in ours] == theirs


def test_the_program_of_the_documentation_writes_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    program = text.split("```py\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    for i in range(30):
        path = tmp_path / "my" / "photos" / "train" / NAMES[i % 3] / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(i, "JPEG"))
    exec(compile(program, "data.md", "exec", dont_inherit=True), {})
    data = load("my/shards")
    assert data.classes == list(NAMES)
    assert len(data.train) + len(data.val) + len(data.test) == 30


def test_a_folder_of_shards_has_its_sets(tmp_path: Path) -> None:
    data = load(write_set(tmp_path))
    assert [len(part) for part in (data.train, data.val, data.test)] == [37, 6, 11]
    assert (data.classes, data.channels, data.image_size) == (["0", "1", "2"], 3, 8)
    assert numbers(data.train) == list(range(37))
    assert numbers(data.val) == list(range(100, 106))
    assert data.test.labels.tolist() == [i % 3 for i in range(200, 211)]
    assert data.train.shards is not None
    assert data.train.shards.bincount().tolist() == [10, 9, 11, 7]


def test_patterns_name_shards(tmp_path: Path) -> None:
    write_set(tmp_path)
    data = load(f"{tmp_path}/{{train-{{00..02}},validation-00}}.tar")
    assert [len(part) for part in (data.train, data.test)] == [27, 6]  # a tenth is held out
    assert sorted(numbers(data.train) + numbers(data.val)) == list(range(30))
    data = load(f"{tmp_path}/train-*.tar::{tmp_path}/test-01.tar", in_memory=False)
    assert len(data.test) == 6
    assert sorted(numbers(data.train) + numbers(data.val)) == list(range(37))
    for part in (
        data.train,
        data.val,
    ):  # the split mixes the images, and yet shards are read one after another
        assert part.shards is not None
        assert part.shards.tolist() == sorted(part.shards.tolist())
        assert numbers(part) == sorted(numbers(part))


def test_classes_may_be_names(tmp_path: Path) -> None:
    write_tar(tmp_path / "train" / "0.tar", samples(0, 30, names=True))
    write_tar(tmp_path / "val" / "0.tar", samples(30, 5, names=True))
    data = load(tmp_path)
    assert data.classes == ["cat", "dog", "eel"]
    assert data.test.labels.tolist() == [0, 1, 2, 0, 1]


FAULTS = {
    "no label": ({"9.png": encoded(9)}, r"0.tar: sample 9 has no label, a file 9.cls"),
    "empty label": ({"9.png": encoded(9), "9.cls": b" "}, r"sample 9 has no label"),
    "no image": ({"9.cls": b"1"}, r"sample 9 must have 1 image, has 0"),
    "two images": ({"9.png": b"", "9.jpg": b"", "9.cls": b"1"}, r"must have 1 image, has 2"),
    "traversal": ({"../9.png": encoded(9), "../9.cls": b"1"}, r"0.tar has the path ../9.png, out"),
    "absolute": ({"/9.png": encoded(9), "/9.cls": b"1"}, r"has the path /9.png, out of its folder"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_a_shard_is_one_sentence(fault: str, tmp_path: Path) -> None:
    files, sentence = FAULTS[fault]
    write_tar(tmp_path / "train-0.tar", samples(10, 30) | files)
    with pytest.raises(ValueError, match=sentence) as error:
        load(tmp_path)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.parent.glob("9.*"))
    assert not list(tmp_path.glob("cache/**/*.bin"))  # nothing is remembered of it


def test_files_that_are_no_samples_are_passed_over(tmp_path: Path) -> None:
    extra = {"README": b"", "__meta__/a.png": b"x", "._0.png": b"x", "notes/": b"", "__i__": b""}
    path = write_tar(tmp_path / "0.tar", extra | samples(0, 30))
    with tarfile.open(path, "a") as tar:
        link = tarfile.TarInfo("secret.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    (tmp_path / ".hidden.tar").write_bytes(b"")
    data = load(tmp_path)
    assert len(data.train) + len(data.val) + len(data.test) == 30


def test_a_word_in_the_path_is_no_set(tmp_path: Path) -> None:
    """Only the name of a shard, or of its own folder."""
    for folder, part in (("validated/a", 0), ("Test", 6)):
        write_tar(tmp_path / folder / "0.tar", samples(0, 30 - part))
    assert len(load(tmp_path).test) == 24


@pytest.mark.parametrize("keep", [1500, 10 * 1536 + 700, 10 * 2048, 0])
def test_a_truncated_shard_is_named(keep: int, tmp_path: Path) -> None:
    """In a header, in an image, between two files, and of no bytes."""
    path = write_tar(tmp_path / "train-0.tar", samples(0, 30))
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"train-0.tar (is truncated|cannot be read as an unc)"):
        load(tmp_path)


def test_a_damaged_header_is_not_the_end_of_a_shard(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "train-0.tar", samples(0, 30))
    with tarfile.open(path) as tar:
        start = tar.getmembers()[40].offset
    data = bytearray(path.read_bytes())
    data[start : start + 4] = b"XXXX"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=f"train-0.tar is damaged at byte {start:,}$"):
        load(tmp_path)
    path.write_bytes(data[:start])
    with pytest.raises(ValueError, match=r"train-0.tar is truncated$"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["val-0.tar.gz", "more/test-0.TGZ", "val.tar.zst", "a.tar.xz"])
def test_a_compressed_shard_in_a_folder_is_named(name: str, tmp_path: Path) -> None:
    write_tar(tmp_path / "train-0.tar", samples(0, 30))
    write_tar(tmp_path / name, samples(30, 3))
    with pytest.raises(ValueError, match=f"{name} is compressed: decompress it"):
        load(tmp_path)


def test_shards_are_found_as_image_files_are(tmp_path: Path) -> None:
    """Behind links, with endings in upper case, and not in hidden folders."""
    root = tmp_path / "root"
    write_tar(root / "train" / "0.TAR", samples(0, 30))
    write_tar(root / ".trash" / "train-1.tar", samples(30, 9))
    write_tar(tmp_path / "elsewhere" / "0.tar", samples(40, 5))
    (root / "test").symlink_to(tmp_path / "elsewhere")
    data = load(root)
    assert [len(part) for part in (data.train, data.val, data.test)] == [27, 3, 5]


def test_a_shard_with_two_names_is_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tar(tmp_path / "train-0.tar", samples(0, 30))
    (tmp_path / "train-1.tar").symlink_to("train-0.tar")
    monkeypatch.chdir(tmp_path)
    for root in (tmp_path, "train-0.tar::./train-0.tar", f"{tmp_path}/train-*.tar"):
        data = load(root)
        assert len(data.train) + len(data.val) + len(data.test) == 30


def test_a_compressed_shard_is_refused(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "train-0.tar", samples(0, 30))
    path.write_bytes(gzip.compress(path.read_bytes()))
    with pytest.raises(ValueError, match=r"cannot be read as an uncompressed tar file"):
        load(tmp_path)


LABELS = {
    "indices": ("0 1 2 3", ["0", "1", "2", "3"]),
    "indices of which half occur": ("1 5 3", ["0", "1", "2", "3", "4", "5"]),
    "indices of which fewer occur": ("1 6 3", ["1", "3", "6"]),
    "years": ("2019 2020", ["2019", "2020"]),
    "integers of several lengths": ("900 90 1000", ["90", "900", "1000"]),
    "zeros in front": ("007 7 8 0", ["0", "007", "7", "8"]),
    "signs": ("-1 0 1 10", ["-1", "0", "1", "10"]),
    "a name among integers": ("10 9 cat", ["10", "9", "cat"]),
    "more digits than any number": (f"{'9' * 5000} 1", ["1", "9" * 5000]),
}


@pytest.mark.parametrize("kind", LABELS)
def test_labels_of_digits_are_indices_or_names(kind: str, tmp_path: Path) -> None:
    labels, classes = LABELS[kind]
    files: dict[str, bytes] = {}
    for i, label in enumerate(labels.split() * 10):
        files |= {f"{i:02}.png": encoded(i), f"{i:02}.cls": label.encode()}
    write_tar(tmp_path / "train.tar", files)
    source = read_webdataset(DataConfig(name="webdataset", root=str(tmp_path)))
    assert source.classes == classes
    assert [classes[label] for _, label in source.train] == labels.split() * 10


def test_a_class_that_cannot_be_is_named(tmp_path: Path) -> None:
    write_set(tmp_path)
    write_tar(tmp_path / "train-04.tar", {"a.png": encoded(1), "a.cls": b"123456"})
    assert load(tmp_path).classes == ["0", "1", "2", "123456"]
    (tmp_path / "train-04.tar").unlink()
    write_tar(tmp_path / "test-02.tar", {"a.png": encoded(1), "a.cls": b"3"})
    with pytest.raises(ValueError, match=r"test-02.tar: a.png has the class 3, which no train"):
        load(tmp_path)


def test_a_broken_image_is_named_or_skipped(tmp_path: Path) -> None:
    write_set(tmp_path)
    write_tar(tmp_path / "train-04.tar", {"bad.png": encoded(1)[:45], "bad.cls": b"1"})
    with pytest.raises(ValueError, match=r"train-04.tar/bad.png cannot be read: .*skip_broken"):
        load(tmp_path)
    data = load(tmp_path, skip_broken=True, in_memory=False)
    assert numbers(data.train) == list(range(37))
    assert "train-04.tar/bad.png" in data.notes[0]
    streamed = load(tmp_path, in_memory=False)
    with pytest.raises(ValueError, match=r"^train-04.tar/bad.png cannot be read: [^\n]*$"):
        list(streamed.train.batches([torch.arange(38)], torch.device("cpu"), 1))


@pytest.mark.parametrize(("root", "sentence"), [
    ("pipe:cat x.tar", r"pipe:cat x.tar must be a path or begin with http://, https://"),
    ("file:///x.tar", r"file:///x.tar must be a path"),
    ("/nowhere/train-{0..3}.tar", r"there is no shard /nowhere/train-0.tar"),
    ("/nowhere/*.tar", r"there is no shard /nowhere/\*.tar"),
])  # fmt: skip
def test_roots_that_are_no_shards_are_refused(root: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        load(root)


def test_folders_without_shards_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no shards, files \*.tar"):
        load(tmp_path)
    write_tar(tmp_path / "test-0.tar", samples(0, 3))
    with pytest.raises(ValueError, match=r"has shards of test, but none of train"):
        load(tmp_path)
    write_tar(tmp_path / "train-0.tar", {})
    with pytest.raises(ValueError, match=r"train-0.tar: there are no images"):
        load(tmp_path)


def test_without_webdataset_its_install_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "webdataset", None)
    with pytest.raises(ValueError, match=r"package webdataset: pip install webdataset"):
        load(tmp_path / "{0..1}.tar")


def test_an_index_is_remembered_until_its_shard_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_set(tmp_path)
    indexed = []
    index = sys.modules["train.data.webdataset"]._index
    monkeypatch.setattr(
        "train.data.webdataset._index", lambda path: indexed.append(Path(path).name) or index(path)
    )
    load(tmp_path)
    assert len(indexed) == 7
    load(tmp_path)
    assert len(indexed) == 7
    data = load(tmp_path, in_memory=False)
    write_tar(tmp_path / "train-02.tar", samples(19, 12))
    with pytest.raises(ShardError, match=r"train-02.tar has changed since it was indexed"):
        numbers(data.train)
    assert numbers(load(tmp_path).train) == [*range(31), *range(30, 37)]
    assert indexed[7:] == ["train-02.tar"]


@pytest.mark.parametrize("content", [b"", b"no JSON", b"[]", b"{}", b"\xff", b'{"samples": []}'])
def test_a_damaged_index_is_made_again(content: bytes, tmp_path: Path) -> None:
    write_set(tmp_path / "data")
    load(tmp_path / "data")
    files = list((tmp_path / "cache/vision_xformer/index").glob("*.bin"))
    sound = files[0].read_bytes()
    files[0].write_bytes(content)
    files[1].write_bytes(files[2].read_bytes())
    data = load(tmp_path / "data")
    assert [len(part) for part in (data.train, data.val, data.test)] == [37, 6, 11]
    assert files[0].read_bytes() == sound


def test_a_sample_that_makes_images_grayscale_is_mentioned(tmp_path: Path) -> None:
    def notes(count: int, mode: str) -> list[str]:
        file = io.BytesIO()
        Image.new(mode, (8, 8)).save(file, "PNG")
        files: dict[str, bytes] = {}
        for i in range(count):
            files |= {f"{i:04}.png": file.getvalue(), f"{i:04}.cls": b"%d" % (i % 2)}
        write_tar(tmp_path / "0.tar", files)
        return [note for note in load(tmp_path).notes if "grayscale" in note]

    assert notes(60, "L") == notes(200, "RGB") == []
    assert notes(200, "L") == ["images are read as grayscale, as the 67 that were looked at are"]


def test_colors_in_any_local_shard_are_found(server: str, tmp_path: Path) -> None:
    """Of remote shards, only the first and the last one are looked at."""
    file = io.BytesIO()
    Image.new("L", (8, 8)).save(file, "PNG")
    for number in range(4):
        files = samples(10 * number, 10)
        if number in (0, 3):
            files |= {name: file.getvalue() for name in files if name.endswith(".png")}
        write_tar(tmp_path / "served" / f"train-{number:02}.tar", files)
    urls = server + "/train-{00..03}.tar"
    sources = [
        read_webdataset(DataConfig(name="webdataset", root=root))
        for root in (str(tmp_path / "served"), urls, f"{urls}::{tmp_path}/served/train-01.tar")
    ]
    assert [source.channels for source in sources] == [3, 1, 3]
    assert sources[1].notes == ["images are read as grayscale, as the 20 that were looked at are"]


# The order of an epoch
SHARDS = torch.arange(12).repeat_interleave(50)


def order(seed: int, labels: torch.Tensor | None = None, kind: str = "none") -> torch.Tensor:
    labels = torch.zeros(600, dtype=torch.long) if labels is None else labels
    return epoch_order(labels, kind, torch.Generator().manual_seed(seed), SHARDS)


def test_shards_are_shuffled_within_a_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(balance, "SHUFFLE_BUFFER", 100)
    drawn = order(3)
    assert sorted(drawn.tolist()) == list(range(600))
    assert torch.equal(order(3), drawn)
    assert not torch.equal(order(4), drawn)
    first, last = {}, {}
    for at, shard in enumerate(SHARDS[drawn].tolist()):
        first.setdefault(shard, at)
        last[shard] = at
    # a shard is in use for its 50 images and the delay of the last one, not throughout
    assert max(last[shard] - first[shard] for shard in first) <= 200
    in_use = [sum(first[s] <= at <= last[s] for s in first) for at in range(600)]
    assert max(in_use) <= 5
    assert len(SHARDS[drawn[100:150]].unique()) > 1  # and neighbors are from several shards
    assert list(first) != sorted(first)
    within = drawn[SHARDS[drawn] == 5]
    assert within.tolist() != sorted(within.tolist())


def test_a_small_set_is_shuffled_as_a_whole() -> None:
    """With fewer images than the buffer holds, the order is as good as any permutation."""
    places = torch.stack([order(seed).argsort() for seed in range(300)]).double()
    assert (places.mean(0) - 299.5).abs().max() < 6 * 173 / 300**0.5
    half = (SHARDS[torch.stack([order(seed) for seed in range(300)])[:, :300]] == 0).double()
    assert abs(half.sum(1).mean().item() - 25) < 2.5


def test_balance_and_shards_go_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(balance, "SHUFFLE_BUFFER", 100)
    labels = (torch.arange(600) % 10 == 0).long()
    drawn = order(1, labels, "sampler")
    assert labels[drawn].bincount().tolist() == [300, 300]
    first: dict[int, int] = {}
    for at, shard in enumerate(SHARDS[drawn].tolist()):
        first.setdefault(shard, at)
    assert max(first.values()) > 350  # some shards are opened late


# Shards elsewhere
class Server(http.server.SimpleHTTPRequestHandler):
    """Counts the files that are fetched."""

    counts: ClassVar[collections.Counter[str]] = collections.Counter()

    def do_GET(self) -> None:
        self.counts[self.path] += 1
        super().do_GET()

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    Server.counts.clear()
    root = write_set(tmp_path / "served")
    handler = functools.partial(Server, directory=str(root))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


def test_urls_are_fetched_once(server: str, tmp_path: Path) -> None:
    urls = server + "/{train-{00..03},validation-00,test-{00..01}}.tar"
    data = load(urls, in_memory=False)
    local = load(tmp_path / "served")
    for ours, theirs in zip(data[:3], local[:3], strict=True):
        assert numbers(ours) == numbers(theirs)
        assert ours.fingerprint() == theirs.fingerprint()
    assert set(Server.counts.values()) == {1}
    for copy in (tmp_path / "cache/vision_xformer/shards").glob("*.bin"):
        copy.unlink()
    batches = torch.arange(37).split(3)
    seen = [x for x, _ in data.train.batches(batches, torch.device("cpu"), 2)]
    assert torch.cat(seen)[:, 0, 0, 0].tolist() == list(range(37))
    again = {name: count for name, count in Server.counts.items() if "train" in name}
    assert set(again.values()) == {2}  # by one of the two workers


def test_only_some_copies_are_kept(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of the last shards; others are fetched again."""
    monkeypatch.setattr(cache, "KEPT", 50_000)
    data = load(server + "/train-{00..03}.tar", in_memory=False, val_fraction=0.2)
    found = [number for part in (data.train, data.val, data.test) for number in numbers(part)]
    assert sorted(found) == list(range(37))
    copies = [p.stat().st_size for p in (tmp_path / "cache/vision_xformer/shards").glob("*.bin")]
    assert 0 < sum(copies) <= 50_000
    assert Server.counts["/train-00.tar"] > 1


def test_a_shard_out_of_reach_is_not_a_broken_image(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(OSError, match=r"/train-04.tar cannot be fetched"):
        load(server + "/train-{03..04}.tar")
    data = load(server + "/train-{00..03}.tar", in_memory=False)
    for copy in (tmp_path / "cache/vision_xformer/shards").glob("*.bin"):
        copy.unlink()
    for shard in (tmp_path / "served").glob("*.tar"):
        shard.unlink()
    with pytest.raises(ShardError, match=r"^http[^\n]*train-\d\d.tar cannot be fetched[^\n]*$"):
        list(data.train.batches([torch.arange(9)], torch.device("cpu"), 1))
    with pytest.raises(OSError, match="cannot be fetched"):
        load(server + "/train-{00..03}.tar", skip_broken=True)
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--data.name", "webdataset", "--data.root", server + "/train-{00..03}.tar",
              "--run_dir", str(tmp_path / "run")])  # fmt: skip
    assert stop.value.code == 2
    assert not (tmp_path / "run").exists()


def test_a_full_disk_is_one_sentence(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(ShardError, match=r"cannot be written: No space left on device"):
        load(server + "/train-00.tar")


# Streams of Hugging Face
def write_stream(root: Path, kind: str = "parquet", **changed: list[object]) -> Path:
    """The images of :func:`write_set` as files of a Hugging Face data set."""
    hf = pytest.importorskip("datasets")
    hf.disable_progress_bars()
    label, number = hf.ClassLabel(names=list(NAMES)), hf.Value("int64")
    features = hf.Features(image=hf.Image(), label=label, id=number)
    for part, files in {"train": [(0, 10), (10, 9), (19, 11), (30, 7)], "validation": [(100, 6)],
                        "test": [(200, 5), (205, 6)]}.items():  # fmt: skip
        for number, (first, count) in enumerate(files):
            values = range(first, first + count)
            rows = {"image": [{"bytes": encoded(i), "path": None} for i in values],
                    "label": [i % 3 for i in values], "id": list(values)}  # fmt: skip
            rows |= changed if part == "test" and number == 0 else {}
            path = root / f"{part}-{number:05}-of-{len(files):05}.{kind}"
            path.parent.mkdir(parents=True, exist_ok=True)
            data = hf.Dataset.from_dict(rows, features=features)
            if kind == "parquet":
                data.to_parquet(str(path))
            else:
                from datasets.arrow_writer import ArrowWriter

                with ArrowWriter(path=str(path), features=features) as writer:
                    writer.write_table(data.data.table)
                    writer.finalize()
    return root


STREAM = "huggingface:streaming=true"


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_a_stream_has_the_images_of_the_shards(kind: str, tmp_path: Path) -> None:
    root = write_stream(tmp_path / "hf", kind)
    shards = load(write_set(tmp_path / "wds"))
    data = load(root, STREAM, in_memory=False)
    assert (data.classes, data.channels, data.image_size) == (list(NAMES), 3, 8)
    for ours, theirs in zip(data[:3], shards[:3], strict=True):
        assert numbers(ours) == numbers(theirs)
        assert ours.labels.tolist() == theirs.labels.tolist()
        assert ours.shards.tolist() == theirs.shards.tolist()
    batches = torch.arange(37).flip(0).split(8)
    seen = [x for x, _ in data.train.batches(batches, torch.device("cpu"), 2)]
    assert torch.cat(seen)[:, 0, 0, 0].tolist() == list(range(37))[::-1]


def test_labels_of_a_stream_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_stream(tmp_path / "hf")
    first = load(root, STREAM)
    monkeypatch.setattr("train.data.streaming._labels", lambda *args: pytest.fail("read again"))
    second = load(root, STREAM)
    assert [part.fingerprint() for part in second[:3]] == [part.fingerprint() for part in first[:3]]
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_stream(root, label=[2, 2, 2, 2, 2])
    assert load(root, STREAM).test.labels.tolist()[:6] == [2, 2, 2, 2, 2, 1]


def test_a_stream_with_hidden_test_labels_is_tested_on_validation(tmp_path: Path) -> None:
    root = write_stream(tmp_path / "hf", label=[-1] * 5)
    (root / "test-00001-of-00002.parquet").unlink()
    data = load(root, STREAM)
    assert numbers(data.test) == list(range(100, 106))
    assert len(data.train) + len(data.val) == 37


def test_faults_of_a_stream_are_named(tmp_path: Path) -> None:
    root = write_stream(tmp_path / "hf", label=[0, None, 1, 1, 1])
    with pytest.raises(ValueError, match=r"row 1 of test file 0 of .*hf has no label"):
        load(root, STREAM)
    images = [{"bytes": data, "path": None} for data in (encoded(7), encoded(8)[:45], b"")]
    write_stream(root, image=[*images, None, images[0]])
    with pytest.raises(ValueError, match=r"3 images: image 1 of test file 0 cannot be read"):
        load(root, STREAM)
    assert len(load(root, STREAM, skip_broken=True).test) == 8
    torn = root / "train-00001-of-00004.parquet"
    torn.write_bytes(torn.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"cannot be (read|streamed)[^\n]*$"):
        load(root, STREAM)


@pytest.mark.parametrize(("name", "sentence"), [
    ("huggingface:streaming=yes", "streaming must be true"),
    ("huggingface:config=plain", "config needs streaming=true"),
    ("huggingface:stream=true", r"'stream'; did you mean 'streaming'\?"),
    (STREAM, "empty cannot be streamed as a Hugging Face dataset"),
    (STREAM + ":config=other", "cannot be streamed as a Hugging Face dataset"),
])  # fmt: skip
def test_streams_that_cannot_be_are_refused(name: str, sentence: str, tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=sentence) as error:
        load(tmp_path / "empty", name)
    assert "\n" not in str(error.value)


# Training
def config_for(folder: Path, root: Path, name: str = "webdataset") -> RunConfig:
    """Two epochs of 6 steps on images that are read by workers; the state is saved often."""
    return RunConfig(
        model=ModelConfig(name="vit", options={"dim": 12, "depth": 1, "heads": 2, "dropout": 0.1}),
        data=DataConfig(name=name, root=str(root), batch_size=6, in_memory=False, workers=2),
        train=TrainConfig(epochs=2, warmup_epochs=0, save_every=2, precision="fp32", device="cpu"),
        run_dir=str(folder),
    )


@pytest.mark.parametrize("name", ["webdataset", STREAM])
def test_a_run_on_shards_resumes_within_an_epoch(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut in the second epoch, and resumed with the shards elsewhere and other workers."""
    monkeypatch.setattr(balance, "SHUFFLE_BUFFER", 12)
    write = write_set if name == "webdataset" else write_stream
    Run(config_for(tmp_path / "whole", write(tmp_path / "here"), name)).fit()
    AcceleratorState._reset_state(reset_partial_state=True)
    run = Run(config_for(tmp_path / "cut", tmp_path / "here", name))
    train_step = run.train_step

    def cut(batches: object) -> None:
        if run.step == 9:
            raise CutError
        train_step(batches)

    run.train_step = cut
    with pytest.raises(CutError):
        run.fit()
    assert read_state(tmp_path / "cut" / "state.pt")["step"] == 8
    torch.manual_seed(5)
    there = (tmp_path / "here").rename(tmp_path / "there")
    main(["resume", str(tmp_path / "cut"), "--data.root", str(there), "--data.workers", "1"])
    assert_equal(left(tmp_path / "cut"), left(tmp_path / "whole"))


PROCESS = """
import json, sys
from pathlib import Path
from train import balance
from train.__main__ import parse
from train.data import Images
from train.loop import Run

seen, batches = [], Images.batches
def record(images, indices, device, workers):
    for x, labels in batches(images, indices, device, workers):
        seen.append([len(images), x[:, 0, 0, 0].tolist()])
        yield x, labels
Images.batches = record
balance.SHUFFLE_BUFFER = 12
run = Run(parse(["--config", sys.argv[1]]))
run.fit()
Path(f"{sys.argv[1]}.{run.accelerator.process_index}").write_text(json.dumps(seen))
run.accelerator.end_training()
"""


@pytest.mark.slow
def test_two_processes_share_the_images(tmp_path: Path) -> None:
    """Of an epoch, each image once; of validation and test too, which 2 do not divide."""
    config = config_for(tmp_path / "run", write_set(tmp_path / "data"))
    config.train.epochs, config.data.workers = 1, 1
    file = tmp_path / "config.yaml"
    file.write_text(resolved(config), encoding="utf-8")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    world = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
             "ACCELERATE_USE_CPU": "true"}  # fmt: skip
    processes = [
        subprocess.Popen([sys.executable, "-c", PROCESS, str(file)], cwd=ROOT,
                         env={**world, "RANK": rank, "LOCAL_RANK": rank})
        for rank in "01"
    ]  # fmt: skip
    try:
        assert [process.wait(timeout=300) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    seen = [json.loads(Path(f"{file}.{rank}").read_text(encoding="utf-8")) for rank in "01"]
    drawn = [[number for size, x in own if size == 37 for number in x] for own in seen]
    assert [len(part) for part in drawn] == [18, 18]  # 6 steps of 6 images
    assert len({*drawn[0], *drawn[1]} & set(range(37))) == 36
    for size, first in ((6, 100), (11, 200)):
        found = [number for own in seen for count, x in own if count == size for number in x]
        assert sorted(found) == list(range(first, first + size))
    assert all(any(size == 11 for size, _ in own) for own in seen)


def test_images_are_not_kept(tmp_path: Path) -> None:
    """Of 100 MiB that are read, one image at a time is in memory, and a few bytes for each."""
    data = os.urandom(2**20)
    for number in range(4):
        files = {f"{i}.{end}": content for i in range(25)
                 for end, content in (("png", data), ("cls", b"%d" % (i % 2)))}  # fmt: skip
        write_tar(tmp_path / f"train-{number}.tar", files)
    tracemalloc.start()
    source = read_webdataset(DataConfig(name="webdataset", root=str(tmp_path)))
    assert sum(len(item.read(item.index).getvalue()) for item, _ in source.train) == 100 * 2**20
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 * 2**20
    assert kept < 2**18
