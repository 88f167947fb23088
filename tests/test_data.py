"""Datasets: what each reader returns, and which data it refuses."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_images import ODD, exif
from test_train import image_folder, write_image
from torchvision.datasets import VisionDataset
from torchvision.datasets.utils import verify_str_arg

from train.__main__ import main
from train.config import DataConfig
from train.data import Source, dataset_names, load_data, open_image, register, unpack
from train.data.cifar import CIFAR10


def tiny_imagenet(root: Path) -> Path:
    wnids = ["n01", "n02", "n03"]
    root.mkdir()
    (root / "wnids.txt").write_text("\n".join(wnids) + "\n")
    lines = []
    for k, wnid in enumerate(wnids):
        for i in range(7):
            mode = "L" if i == 0 else "RGB"  # a few images of the original are grayscale
            write_image(root / "train" / wnid / "images" / f"{wnid}_{i}.JPEG", 9 * k + i, mode, 64)
        file = f"val_{k}.JPEG"
        write_image(root / "val" / "images" / file, k, size=64)
        lines.append(f"{file}\t{wnid}\t0\t0\t62\t62")
    (root / "val" / "val_annotations.txt").write_text("\n".join(reversed(lines)) + "\n")
    return root


def test_digits_are_split_by_class_and_apart() -> None:
    data = load_data(DataConfig(name="digits"))
    sizes = [len(s) for s in (data.train, data.val, data.test)]
    assert sum(sizes) == 1797
    assert sizes[2] == 360
    assert abs(sizes[1] - 144) <= 1
    counts = np.bincount([label for _, label in data.test.samples])
    assert counts.min() >= 34
    parts = (data.train, data.val, data.test)
    images = [image.numpy().tobytes() for s in parts for image, _ in s.samples]
    assert len(set(images)) == len(images)
    image, label = data.train[0]
    assert (image.shape, image.dtype) == ((1, 8, 8), torch.uint8)
    assert image.max() > 200
    assert label == data.train.labels[0]


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("cifar11", r"unknown data.name 'cifar11'; did you mean 'cifar10' or 'cifar100'\?"),
        ("digits:8", r"data.name 'digits:8': digits takes nothing after the colon"),
    ],
)
def test_a_name_without_a_reader_is_refused(name: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        load_data(DataConfig(name=name))


def test_a_data_set_is_one_function(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.data.registry._ENTRIES", {})

    @register("noise")
    def read_noise(config: DataConfig) -> Source:
        image = torch.zeros(1, 6, 6, dtype=torch.uint8)
        return Source([(image, i % 2) for i in range(40)], ["a", "b"], channels=1)

    data = load_data(DataConfig(name="noise"))
    assert [len(part) for part in (data.train, data.val, data.test)] == [28, 4, 8]
    assert (data.channels, data.image_size, data.mirror) == (1, 6, True)
    with pytest.raises(ValueError, match="dataset 'noise' is already registered"):
        register("noise")(read_noise)


def test_help_lists_the_data_sets(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["fit", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert f"which dataset, one of {', '.join(dataset_names())}." in text


def test_image_folder_with_and_without_a_test_folder(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "a")
    data = load_data(DataConfig(name="imagefolder", root=str(root), val_fraction=0.2))
    assert data.classes == ["cat", "dog", "emu"]
    assert (data.image_size, len(data.test)) == (10, 33)
    assert len(data.train) + len(data.val) == 33
    alone = load_data(DataConfig(name="imagefolder", root=str(root / "train"), val_fraction=0.2))
    assert len(alone.test) == 7
    assert len(alone.train) + len(alone.val) == 26
    resized = load_data(DataConfig(name="imagefolder", root=str(root), image_size=6))
    assert resized.test[0][0].shape == (3, 6, 6)


def test_tiny_imagenet_reads_its_own_layout(tmp_path: Path) -> None:
    root = tiny_imagenet(tmp_path / "tiny-imagenet-200")
    config = DataConfig(name="tiny_imagenet", root=str(tmp_path), val_fraction=0.2)
    data = load_data(config)
    assert data.classes == ["n01", "n02", "n03"]
    # the flat val/ folder is three classes, in the order of the annotations
    assert [label for _, label in data.test.samples] == [2, 1, 0]
    assert all(image.shape == (3, 64, 64) for image, _ in data.train)
    (root / "val" / "images" / "val_1.JPEG").unlink()
    with pytest.raises(ValueError, match=r"lists val_1.JPEG, which is missing"):
        load_data(config)
    (root / "val" / "val_annotations.txt").unlink()
    with pytest.raises(ValueError, match=r"val_annotations.txt is missing"):
        load_data(config)


def test_an_archive_of_tiny_imagenet_is_unpacked_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By one of two processes, also if another was killed, and next to a file of no archive."""
    tiny_imagenet(tmp_path / "tiny-imagenet-200")
    root = tmp_path / "root"
    root.mkdir()
    shutil.make_archive(str(root / "tiny-imagenet-200"), "zip", tmp_path, "tiny-imagenet-200")
    (root / "tiny-imagenet-200.md5").write_text("90528d7ca1a48142e341f4ef8d21d0de")
    for name in ("unpacked", ".tiny-imagenet-200.unpacked"):
        (root / name / "tiny-imagenet-200").mkdir(parents=True)
        (root / name / "tiny-imagenet-200" / "x").write_text("")
    calls = []

    def slow(archive: Path, target: Path) -> None:
        calls.append(archive.name)
        time.sleep(0.2)
        unpack(archive, target)

    monkeypatch.setattr("train.data.tiny_imagenet.unpack", slow)
    config = DataConfig(name="tiny_imagenet", root=str(root), val_fraction=0.2)
    with ThreadPoolExecutor() as pool:  # a lock holds between threads as between processes
        read = pool.map(load_data, [config] * 2)
        assert [len(data.test) for data in read] == [3, 3]
    assert calls == ["tiny-imagenet-200.zip"]
    assert {path.name for path in root.iterdir() if path.is_dir()} == {
        "tiny-imagenet-200", "unpacked",
    }  # fmt: skip


def test_texts_of_tiny_imagenet_may_have_a_mark_or_other_letters(tmp_path: Path) -> None:
    root = tiny_imagenet(tmp_path / "tiny-imagenet-200")
    for name in ("wnids.txt", "val/val_annotations.txt"):
        (root / name).write_bytes(b"\xef\xbb\xbf" + (root / name).read_bytes())
    (root / "words.txt").write_bytes(b"\xef\xbb\xbfn01\tcaf\xe9, bar\nn02\tdog\n")
    data = load_data(DataConfig(name="tiny_imagenet", root=str(root), val_fraction=0.2))
    assert data.classes == ["caf\ufffd", "dog", "n03"]
    assert data.test.labels.tolist() == [2, 1, 0]


def cifar_batches(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write CIFAR-10's files with few images, and accept their checksums."""
    folder = root / CIFAR10.base_folder
    folder.mkdir(parents=True)
    labels = [i % 10 for i in range(40)]
    for name, _ in (*CIFAR10.train_list, *CIFAR10.test_list):
        images = np.random.default_rng(0).integers(0, 256, (40, 3072), dtype=np.uint8)
        (folder / name).write_bytes(pickle.dumps({"data": images, "labels": labels}))
    names = {"label_names": list("abcdefghij")}
    (folder / "batches.meta").write_bytes(pickle.dumps(names))
    monkeypatch.setattr(CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *args: True)


def test_cifar10_from_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cifar_batches(tmp_path, monkeypatch)
    data = load_data(DataConfig(name="cifar10", root=str(tmp_path)))
    assert (len(data.train), len(data.val), len(data.test)) == (180, 20, 40)
    assert data.classes == list("abcdefghij")
    assert data.train[3][0].shape == (3, 32, 32)


def test_a_label_outside_the_classes_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cifar_batches(tmp_path, monkeypatch)
    file = tmp_path / CIFAR10.base_folder / "data_batch_3"
    batch = pickle.loads(file.read_bytes())
    batch["labels"][7] = 10
    file.write_bytes(pickle.dumps(batch))
    with pytest.raises(ValueError, match=r"images of class 10; its 10 classes are 0 to 9"):
        load_data(DataConfig(name="cifar10", root=str(tmp_path)))


def test_incomplete_cifar10_is_refused(tmp_path: Path) -> None:
    (tmp_path / CIFAR10.base_folder).mkdir()
    with pytest.raises(ValueError, match=r"has no complete cifar10 .*cifar-10-batches-py") as error:
        load_data(DataConfig(name="cifar10", root=str(tmp_path)))
    assert "incomplete: if you remove it, it is downloaded again" in str(error.value)
    assert "could not be downloaded" not in str(error.value)


def test_image_folder_given_as_cifar10_names_the_right_reader(tmp_path: Path) -> None:
    image_folder(tmp_path)
    with pytest.raises(ValueError, match=r"use --data.name imagefolder"):
        load_data(DataConfig(name="cifar10", root=str(tmp_path)))


def test_broken_image_folders_are_refused(tmp_path: Path) -> None:
    def refused(root: Path, match: str, **more: object) -> None:
        with pytest.raises(ValueError, match=match):
            load_data(DataConfig(name="imagefolder", root=str(root), **more))

    refused(tmp_path / "nowhere", r"data.root .*nowhere is not a folder")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", r"folders of at least 2 classes, not \[\]")
    root = image_folder(tmp_path / "differs")
    (root / "test" / "fox").mkdir()
    write_image(root / "test" / "fox" / "0.png", 3)
    refused(root, r"class folders that the training set does not have: fox")
    root = image_folder(tmp_path / "hollow")
    for file in (root / "train" / "dog").iterdir():
        file.unlink()
    refused(root, r"no images in the class folder .*dog")
    refused(image_folder(tmp_path / "few", images=1), r"too few to hold out")
    large = image_folder(tmp_path / "large")
    write_image(large / "train" / "cat" / "0.png", 1, size=300)
    refused(large, r"data.image_size is needed: .* has 300 x 300 pixels")


def test_a_validation_folder_is_used(tmp_path: Path) -> None:
    root = image_folder(tmp_path, ("train", "val", "test"))
    write_image(root / "val" / "emu" / "more.png", 7)
    data = load_data(DataConfig(name="imagefolder", root=str(root)))
    assert (len(data.train), len(data.val), len(data.test)) == (33, 34, 33)


def test_bit_depth_and_orientation_are_applied(tmp_path: Path) -> None:
    deep = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    read = np.asarray(open_image(tmp_path / "deep.png"))
    assert np.abs(read[..., 0] - deep / 257.0).max() <= 1
    turned = Image.new("RGB", (8, 4))
    exif = turned.getexif()
    exif[0x0112] = 6  # orientation
    turned.save(tmp_path / "turned.jpg", exif=exif)
    assert open_image(tmp_path / "turned.jpg").size == (4, 8)
    Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / "float.tiff")
    with pytest.raises(ValueError, match=r"float.tiff has pixels of mode 'F'"):
        open_image(tmp_path / "float.tiff")


def test_other_files_are_skipped(tmp_path: Path) -> None:
    root = image_folder(tmp_path)
    (root / "train" / "cat" / "._0.png").write_bytes(b"left by a file browser")
    (root / "train" / "cat" / "folder.png").mkdir()
    data = load_data(DataConfig(name="imagefolder", root=str(root)))
    assert len(data.train) + len(data.val) == 33


def test_tiny_imagenet_classes_have_their_names(tmp_path: Path) -> None:
    root = tiny_imagenet(tmp_path / "tiny-imagenet-200")
    (root / "words.txt").write_text(
        "n02\tcrane\nn09\tox\nn03\tcrane, a bird\nn01\tgoldfish, carp\n"
    )
    data = load_data(DataConfig(name="tiny_imagenet", root=str(root), val_fraction=0.2))
    assert data.classes == ["goldfish", "crane n02", "crane n03"]


def test_a_class_listed_twice_is_refused(tmp_path: Path) -> None:
    root = tiny_imagenet(tmp_path / "tiny-imagenet-200")
    (root / "wnids.txt").write_text("n01\nn01\nn02\nn03\n")
    with pytest.raises(ValueError, match=r"wnids.txt must list 2 or more classes, each once"):
        load_data(DataConfig(name="tiny_imagenet", root=str(root)))


@pytest.mark.parametrize("workers", [0, 2])
def test_images_decoded_on_the_fly_equal_those_in_memory(tmp_path: Path, workers: int) -> None:
    root = image_folder(tmp_path)
    batches = [torch.tensor([3, 1, 4]), torch.tensor([1, 5])]
    got = []
    for in_memory in (True, False):
        config = DataConfig(name="imagefolder", root=str(root), in_memory=in_memory)
        train = load_data(config).train
        assert (train.pixels is None) != in_memory
        got.append(list(train.batches(batches, torch.device("cpu"), workers)))
    for (x, labels), (y, same) in zip(*got, strict=True):
        assert torch.equal(x, y)
        assert torch.equal(labels, same)


def test_images_of_other_shapes_are_cropped_at_the_center(tmp_path: Path) -> None:
    wide = np.zeros((10, 30, 3), np.uint8)
    wide[:, 10:20] = 200
    for name in ("cat", "dog"):
        for i in range(7):
            path = tmp_path / name / f"{i}.png"
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(wide).save(path)
    data = load_data(DataConfig(name="imagefolder", root=str(tmp_path), image_size=10))
    assert (data.train[0][0] == 200).all()


# torchvision


def write_idx(path: Path, array: np.ndarray) -> None:
    """Write the format of MNIST: two zeros, data type, number of axes, their sizes, values."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sizes = np.array(array.shape, ">i4").tobytes()
    path.write_bytes(bytes([0, 0, 8, array.ndim]) + sizes + array.astype(np.uint8).tobytes())


def write_mnist(folder: Path, prefix: tuple[str, str], classes: range) -> np.ndarray:
    images = np.random.default_rng(0).integers(0, 256, (260, 28, 28))
    labels = np.array(classes)[np.arange(260) % len(classes)]
    for part in prefix:
        write_idx(folder / f"{part}-images-idx3-ubyte", images)
        write_idx(folder / f"{part}-labels-idx1-ubyte", labels)
    return images


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Refuse all requests and return a list of their URLs."""
    urls: list[str] = []

    def refuse(request: urllib.request.Request, *args: object, **more: object) -> None:
        urls.append(request.full_url)
        raise urllib.error.URLError("no network")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    return urls


def test_mnist_of_torchvision_is_gray_and_not_mirrored(tmp_path: Path, offline: list[str]) -> None:
    images = write_mnist(tmp_path / "MNIST" / "raw", ("train", "t10k"), range(10))
    data = load_data(DataConfig(name="torchvision:MNIST", root=str(tmp_path), val_fraction=0.2))
    assert [len(part) for part in (data.train, data.val, data.test)] == [208, 52, 260]
    assert (data.channels, data.image_size, data.mirror) == (1, 28, False)
    assert data.classes[:2] == ["0 - zero", "1 - one"]
    assert "images are read as grayscale, as the 65 that were looked at are" in data.notes
    image, label = data.test[13]
    assert label == 3
    assert np.array_equal(image[0].numpy(), images[13])
    assert torch.equal(data.test.pixels[13], image)
    assert offline == []
    resized = DataConfig(name="torchvision:mnist", root=str(tmp_path), image_size=32)
    assert load_data(resized).test[0][0].shape == (1, 32, 32)


def test_fashion_mnist_may_be_mirrored(tmp_path: Path) -> None:
    write_mnist(tmp_path / "FashionMNIST" / "raw", ("train", "t10k"), range(10))
    data = load_data(DataConfig(name="torchvision:FashionMNIST", root=str(tmp_path)))
    assert (data.channels, data.mirror, data.classes[9]) == (1, True, "Ankle boot")


def test_emnist_has_the_split_that_is_named(tmp_path: Path) -> None:
    files = ("emnist-letters-train", "emnist-letters-test")
    write_mnist(tmp_path / "EMNIST" / "raw", files, range(1, 27))
    data = load_data(
        DataConfig(name="torchvision:EMNIST:split=letters", root=str(tmp_path), val_fraction=0.2)
    )
    assert (len(data.test), data.mirror) == (260, False)
    assert data.classes[data.test[25][1]] == "z"


def test_splits_of_torchvision_are_those_it_has(tmp_path: Path, offline: list[str]) -> None:
    food = tmp_path / "food-101"
    for part in ("train", "test"):
        names = {}
        for label, name in enumerate(("apple_pie", "waffles")):
            files = [f"{name}/{part}{i}" for i in range(10)]
            for i, file in enumerate(files):
                write_image(food / "images" / f"{file}.jpg", 20 * label + i, size=96)
            names[name] = files
        (food / "meta").mkdir(exist_ok=True)
        (food / "meta" / f"{part}.json").write_text(json.dumps(names))
    for part in ("train", "valid", "test"):
        for i in range(6):
            write_image(tmp_path / "country211" / part / f"{i % 2}" / f"{i}.png", i)
    for i in range(40):
        write_image(tmp_path / "eurosat" / "2750" / f"{i % 2}" / f"{i}.png", i)

    def sizes(name: str) -> list[int]:
        data = load_data(DataConfig(name=name, root=str(tmp_path), val_fraction=0.2))
        assert (data.channels, data.mirror) == (3, True)
        return [len(part) for part in (data.train, data.val, data.test)]

    assert sizes("torchvision:Food101") == [16, 4, 20]
    assert sizes("torchvision:Country211") == [6, 6, 6]
    assert sizes("torchvision:EuroSAT") == [25, 7, 8]  # it has no splits of its own
    assert offline == []
    (food / "images" / "waffles" / "test3.jpg").write_bytes(b"torn")
    with pytest.raises(ValueError, match=r"image 13 of the dataset cannot be read: .*test3.jpg"):
        sizes("torchvision:Food101")
    config = DataConfig(name="torchvision:Food101", root=str(tmp_path), val_fraction=0.2)
    config.skip_broken = True
    assert len(load_data(config).test) == 19
    (food / "images" / "waffles" / "train9.jpg").write_bytes(b"torn")
    with pytest.raises(ValueError, match=r"image 19 of Food101 cannot be read: .*train9.jpg"):
        sizes("torchvision:Food101")


def test_class_names_of_torchvision_are_those_of_the_labels(tmp_path: Path) -> None:
    """Oxford-IIIT Pet names its breeds and, for other labels, its species."""
    root = tmp_path / "oxford-iiit-pet"
    breeds = {"Abyssinian": 1, "beagle": 2, "Bengal": 1, "pug": 2}
    for split in ("trainval", "test"):
        lines = []
        for number, (breed, species) in enumerate(breeds.items(), 1):
            for i in range(12):
                write_image(root / "images" / f"{breed}_{i}.jpg", i)
                lines.append(f"{breed}_{i} {number} {species} 1\n")
        (root / "annotations").mkdir(exist_ok=True)
        (root / "annotations" / f"{split}.txt").write_text("".join(lines))
    (root / "annotations" / "trimaps").mkdir()
    name = "torchvision:OxfordIIITPet"
    data = load_data(DataConfig(name=name, root=str(tmp_path), val_fraction=0.2))
    assert data.classes == ["Abyssinian", "Beagle", "Bengal", "Pug"]
    name += ":target_types=binary-category"
    data = load_data(DataConfig(name=name, root=str(tmp_path), val_fraction=0.2))
    assert data.classes == ["Cat", "Dog"]


class Bars(VisionDataset):
    """A dataset with a "trainval" split, a test split without labels, and images of two modes."""

    def __init__(self, root: str, split: str = "trainval", **more: object) -> None:
        super().__init__(root)
        self.split = verify_str_arg(split, "split", ("trainval", "val", "test"))

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> tuple[Image.Image, int | None]:
        image = Image.new("L" if index % 3 else "RGB", (7, 7), index if index % 3 else (9, 0, 0))
        return image, None if self.split == "test" else index % 2


def test_a_test_split_without_labels_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchvision.datasets.Bars", Bars, raising=False)
    monkeypatch.setattr("torchvision.datasets.__all__", ("Bars",))
    data = load_data(DataConfig(name="torchvision:Bars", val_fraction=0.2))
    assert [len(part) for part in (data.train, data.val, data.test)] == [16, 4, 20]
    assert (data.classes, data.channels, data.image_size) == (["0", "1"], 3, 7)
    assert data.test[3][0][:, 0, 0].tolist() == [9, 0, 0]
    assert data.test[4][0][:, 0, 0].tolist() == [4, 4, 4]


def test_an_option_may_be_true_or_false(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offline: list[str]
) -> None:
    """A text "false" would be true, so that Omniglot would read its other images."""
    monkeypatch.setattr("torchvision.datasets.Omniglot._check_integrity", lambda self: True)
    for part, count in (("background", 60), ("evaluation", 40)):
        for i in range(count):
            folder = tmp_path / "omniglot-py" / f"images_{part}" / "Greek" / f"character0{i % 2}"
            write_image(folder / f"{i}.png", i, "L")
    for value, count in (("false", 40), ("False", 40), ("TRUE", 60)):
        name = f"torchvision:Omniglot:background={value}"
        data = load_data(DataConfig(name=name, root=str(tmp_path), val_fraction=0.2))
        assert len(data.train) + len(data.val) + len(data.test) == count
    assert offline == []


def test_missing_data_of_torchvision_is_downloaded(tmp_path: Path, offline: list[str]) -> None:
    with pytest.raises(ValueError, match=r"no complete torchvision:KMNIST, .* not be downloaded"):
        load_data(DataConfig(name="torchvision:KMNIST", root=str(tmp_path)))
    assert offline


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("MNITS", r"no dataset 'MNITS' for classification; did you mean torchvision:MNIST\?"),
        ("food-101", r"did you mean torchvision:Food101\?"),
        ("", r"torchvision has no dataset '' for classification; one is torchvision:MNIST"),
        ("VOCDetection", r"no dataset 'VOCDetection' for classification"),
        ("Sintel", r"no dataset 'Sintel' for classification"),
        ("EMNIST", r"torchvision:EMNIST needs :split=\.\.\."),
        ("EMNIST:letters", r"'letters' must have the form option=value"),
        ("EMNIST:split=letter", r"Unknown value 'letter' for argument split"),
        ("DTD:partitions=1", r"torchvision:DTD: 'partitions'; did you mean 'partition'\?"),
        ("Food101:split=test", r"unknown option of torchvision:Food101: 'split'"),
    ],
)
def test_names_that_torchvision_does_not_have_are_refused(
    name: str, sentence: str, tmp_path: Path, offline: list[str]
) -> None:
    with pytest.raises(ValueError, match=sentence):
        load_data(DataConfig(name=f"torchvision:{name}", root=str(tmp_path)))
    assert offline == []


# Hugging Face


def rows(count: int, mode: str = "RGB", **more: object) -> dict[str, list[object]]:
    value: Any = (lambda i: i) if mode == "L" else (lambda i: (i, i, i))
    images = [Image.new(mode, (12, 12), value(i)) for i in range(count)]
    return {"image": images, "label": [i % 2 for i in range(count)], **more}


def test_a_hugging_face_folder_has_its_splits(tmp_path: Path) -> None:
    hf = pytest.importorskip("datasets")
    features = hf.Features(image=hf.Image(), label=hf.ClassLabel(names=["cat", "dog"]))
    parts = {"train": 40, "validation": 10, "test": 20}
    saved = {part: hf.Dataset.from_dict(rows(n), features=features) for part, n in parts.items()}
    hf.DatasetDict(saved).save_to_disk(str(tmp_path / "all"))
    data = load_data(DataConfig(name="huggingface", root=str(tmp_path / "all")))
    assert [len(part) for part in (data.train, data.val, data.test)] == [40, 10, 20]
    assert (data.classes, data.channels, data.image_size) == (["cat", "dog"], 3, 12)
    image, label = data.test[7]
    assert (label, image.shape) == (1, (3, 12, 12))
    assert (image == 7).all()
    hf.DatasetDict(train=saved["train"], validation=saved["validation"]).save_to_disk(
        str(tmp_path / "two")
    )
    data = load_data(DataConfig(name="huggingface", root=str(tmp_path / "two"), in_memory=False))
    assert [len(part) for part in (data.train, data.val, data.test)] == [36, 4, 10]
    (x, labels), = data.train.batches([torch.arange(3)], torch.device("cpu"), 1)  # fmt: skip
    assert (x.shape, labels.shape) == ((3, 3, 12, 12), (3,))


def test_a_hugging_face_data_set_without_splits_is_split(tmp_path: Path) -> None:
    hf = pytest.importorskip("datasets")
    table = rows(40, "L")
    table["label"] = ["dog" if label else "cat" for label in table["label"]]
    features = hf.Features(image=hf.Image(), label=hf.Value("string"))
    hf.Dataset.from_dict(table, features=features).save_to_disk(str(tmp_path / "gray"))
    data = load_data(DataConfig(name="huggingface", root=str(tmp_path / "gray")))
    assert [len(part) for part in (data.train, data.val, data.test)] == [28, 4, 8]
    assert (data.classes, data.channels) == (["cat", "dog"], 1)
    assert all(image[0, 0, 0] % 2 == label for image, label in data.test)


def test_hugging_face_images_are_read_as_files_are(tmp_path: Path) -> None:
    """Transparent, with odd EXIF, broken and absent ones."""
    hf = pytest.importorskip("datasets")
    clear, odd, gray = io.BytesIO(), io.BytesIO(), io.BytesIO()
    Image.new("RGBA", (12, 12)).save(clear, "PNG")
    Image.new("RGB", (12, 6), (90, 0, 0)).save(odd, "JPEG", exif=exif(*ODD["text for a number"]))
    Image.fromarray(np.full((12, 12), 30000, np.uint16)).save(gray, "TIFF")
    encoded = [file.getvalue() for file in (clear, odd, gray)]
    encoded = [*encoded, encoded[0][:50], None] + [encoded[0]] * 35
    table = {"image": [data and {"bytes": data, "path": None} for data in encoded],
             "label": [i % 2 for i in range(40)]}  # fmt: skip
    features = hf.Features(image=hf.Image(), label=hf.ClassLabel(names=["cat", "dog"]))
    hf.DatasetDict(
        train=hf.Dataset.from_dict(rows(40), features=features),
        test=hf.Dataset.from_dict(table, features=features),
    ).save_to_disk(str(tmp_path))
    config = DataConfig(name="huggingface", root=str(tmp_path), image_size=12)
    with pytest.raises(ValueError, match=r"2 images: image 3 of the .*; image 4 of the dataset"):
        load_data(config)
    config.skip_broken = True
    test = load_data(config).test
    assert len(test) == 38
    assert (test[0][0] == 255).all()
    assert (test[1][0][0] > 70).all()
    assert (test[2][0] == 117).all()
    assert (open_image(test.samples[1][0]).size) == (6, 12)


def test_hugging_face_folders_that_are_not_clear_are_refused(tmp_path: Path) -> None:
    hf = pytest.importorskip("datasets")
    label = hf.ClassLabel(names=["cat", "dog"])
    features = hf.Features(image=hf.Image(), label=label, coarse=label)
    two = hf.Dataset.from_dict(rows(40, coarse=[0, 1] * 20), features=features)
    two.save_to_disk(str(tmp_path / "two"))

    def refused(folder: str, match: str, name: str = "huggingface") -> None:
        with pytest.raises(ValueError, match=match):
            load_data(DataConfig(name=name, root=str(tmp_path / folder)))

    refused("nowhere", r"data.root .*nowhere is not a folder")
    (tmp_path / "empty").mkdir()
    refused("empty", r"empty is not a folder written by save_to_disk")
    refused("two", r"2 columns of image, label, coarse may hold the label: name it")
    refused("two", r"no column 'fine'; the columns are image", "huggingface:label=fine")
    refused("two", r"'labels'; did you mean 'label'\?", "huggingface:labels=fine")
    refused("two", r"column 'label' holds ClassLabel.*, not images", "huggingface:image=label")
    hf.DatasetDict(test=two).save_to_disk(str(tmp_path / "test"))
    refused("test", r"has no split 'train', only test")
    names = hf.Features(image=hf.Image(), label=hf.Value("string"))
    table = {**rows(40), "label": ["cat", "dog", None, "cat"] * 10}
    hf.Dataset.from_dict(table, features=names).save_to_disk(str(tmp_path / "none"))
    refused("none", r"row 2 of the dataset has no label")
    config = DataConfig(name="huggingface:label=coarse", root=str(tmp_path / "two"))
    assert load_data(config).classes == ["cat", "dog"]


def save_splits(folder: Path, **splits: tuple[object, list[object]]) -> DataConfig:
    """Save splits, each with the type of its labels and the labels."""
    hf = pytest.importorskip("datasets")
    saved = {}
    for part, (kind, labels) in splits.items():
        features = hf.Features(image=hf.Image(), label=kind)
        saved[part] = hf.Dataset.from_dict(rows(len(labels), label=labels), features=features)
    hf.DatasetDict(saved).save_to_disk(str(folder))
    return DataConfig(name="huggingface", root=str(folder), val_fraction=0.2)


def test_labels_of_hugging_face_splits_are_mapped_by_name(tmp_path: Path) -> None:
    hf = pytest.importorskip("datasets")
    three = hf.ClassLabel(names=["black", "gray", "white"])
    two = hf.ClassLabel(names=["white", "gray"])
    train = three, [0, 1, 2] * 10
    data = load_data(save_splits(tmp_path / "two", train=train, test=(two, [0, 1, 1])))
    assert data.classes == ["black", "gray", "white"]
    assert data.test.labels.tolist() == [2, 1, 1]
    text = hf.Value("string"), ["gray", "black", "white"]
    data = load_data(save_splits(tmp_path / "text", train=train, test=text))
    assert data.test.labels.tolist() == [1, 0, 2]
    numbers = hf.Value("int64"), [-1, 1] * 15
    data = load_data(save_splits(tmp_path / "signs", train=numbers, test=(numbers[0], [-1] * 3)))
    assert (data.classes, data.test.labels.tolist()) == (["-1", "1"], [0, 0, 0])
    data = load_data(save_splits(tmp_path / "hidden", train=train, validation=(two, [-1] * 3),
                                 test=(three, [2, 1, 0])))  # fmt: skip
    assert [len(part) for part in (data.train, data.val, data.test)] == [24, 6, 3]


def test_labels_that_are_no_class_name_their_hugging_face_split(tmp_path: Path) -> None:
    hf = pytest.importorskip("datasets")
    two, text = hf.ClassLabel(names=["cat", "dog"]), hf.Value("string")
    train = two, [0, 1] * 15
    faults = {
        "other": ({"test": (hf.ClassLabel(names=["dog", "emu"]), [0, 1])},
                  r"split 'test' of .*other has the label 'emu', which is not a class of the tra"),
        "text": ({"validation": (text, ["cat", "Dog"])}, r"'validation' of .* has the label 'Dog'"),
        "some": ({"test": (two, [0, -1, 1])}, r"split 'test' of .*some has the label -1"),
        "training": ({"train": (two, [0, 1, -1] * 9)}, r"'train' of .*training has the label -1"),
        "none": ({"train": (two, [-1] * 9)}, r"split 'train' of .*none has no labeled images"),
        "nan": ({"train": (hf.Value("float32"), [0.5, float("nan")])}, r"row 1 .* has no label"),
    }  # fmt: skip
    for name, (splits, sentence) in faults.items():
        config = save_splits(tmp_path / name, **{"train": train, **splits})
        with pytest.raises(ValueError, match=sentence):
            load_data(config)


def test_each_hugging_face_split_must_have_the_columns(tmp_path: Path) -> None:
    hf = pytest.importorskip("datasets")
    features = hf.Features(image=hf.Image(), label=hf.ClassLabel(names=["cat", "dog"]))
    train = hf.Dataset.from_dict(rows(40), features=features)
    lists = hf.Features(image=hf.Image(), label=hf.Sequence(hf.Value("int64")))
    several = hf.Dataset.from_dict(rows(4, label=[[0, 1]] * 4), features=lists)
    for name, test, sentence in (
        ("bare", train.remove_columns("label"), r"split 'test' of .*bare has no column 'label'"),
        ("renamed", train.rename_column("image", "photo"), r"'test' of .* has no column 'image'"),
        ("several", several, r"'test' .* 'label' holds .*, not one label per image"),
    ):
        hf.DatasetDict(train=train, test=test).save_to_disk(str(tmp_path / name))
        with pytest.raises(ValueError, match=sentence):
            load_data(DataConfig(name="huggingface", root=str(tmp_path / name)))
    several.save_to_disk(str(tmp_path / "alone"))
    with pytest.raises(ValueError, match=r"holds .*, not one label per image"):
        load_data(DataConfig(name="huggingface", root=str(tmp_path / "alone")))


def test_empty_hugging_face_splits_are_left_out_or_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hf = pytest.importorskip("datasets")
    features = hf.Features(image=hf.Image(), label=hf.ClassLabel(names=["cat", "dog"]))
    full = hf.Dataset.from_dict(rows(40), features=features)
    config = DataConfig(name="huggingface", root=str(tmp_path / "empty"))
    full.select([]).save_to_disk(config.root)
    with pytest.raises(ValueError, match=r"empty (has a split without rows|.*no labeled images)"):
        load_data(config)
    splits = {"train": full, "validation": full.select([]), "test": full}
    monkeypatch.setattr("train.data.huggingface._load", lambda *args: splits)
    assert [len(part) for part in load_data(config)[:3]] == [36, 4, 40]
    splits["train"] = full.select([])
    with pytest.raises(ValueError, match=r"split 'train' of .*empty has no labeled images"):
        load_data(config)


@pytest.mark.parametrize("kind", ["torch", "numpy", "arrow"])
def test_hugging_face_data_may_be_saved_with_a_format(kind: str, tmp_path: Path) -> None:
    hf = pytest.importorskip("datasets")
    features = hf.Features({"image": hf.Image(), "0": hf.ClassLabel(names=["cat", "dog"])})
    table = rows(40)
    table["0"] = table.pop("label")
    data = hf.Dataset.from_dict(table, features=features).with_format(kind)
    data.save_to_disk(str(tmp_path))
    test = load_data(DataConfig(name="huggingface:label=0", root=str(tmp_path))).test
    assert all(image[0, 0, 0] % 2 == label for image, label in test)


def test_without_datasets_its_install_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"needs the package datasets: pip install datasets"):
        load_data(DataConfig(name="huggingface"))
