"""Image folders: what is read or left out, broken files, and unbalanced classes."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from accelerate.state import AcceleratorState
from PIL import Image
from test_train import TINY, config_for, image_folder, write_image
from torch import nn

from train.__main__ import main
from train.balance import class_weights, cross_entropy, epoch_order
from train.config import DataConfig
from train.data import Images, Splits, load_data
from train.loop import Run


@pytest.fixture(autouse=True)
def _fresh_accelerate() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(autouse=True)
def _no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.loop.draw_run", lambda *arguments: None, raising=False)


def load(root: Path, **more: object) -> Splits:
    return load_data(DataConfig(name="imagefolder", root=str(root), **more))


def names(images: Images) -> list[str]:
    return sorted(str(path) for path, _ in images.samples)


# files and folders


def test_images_of_all_extensions_and_subfolders_are_read(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "photos", ("train", "test"), images=3)
    cat = root / "train" / "cat"
    found = ["a.gif", "b.jfif", "c.JPG", "d.jpe", "e.Tga", "f.qoi", "2024/may/g.PNG", "2024/h.webp"]
    for name in found:
        write_image(cat / name.lower(), 9)
        (cat / name.lower()).rename(cat / name)
    (cat / "i.png").symlink_to(root / "train" / "dog" / "0.png")
    (tmp_path / "elsewhere").mkdir()
    write_image(tmp_path / "elsewhere" / "j.png", 3)
    (cat / "linked").symlink_to(tmp_path / "elsewhere")
    data = load(root, val_fraction=0.2)
    read = {*names(data.train), *names(data.val)}
    want = [*found, "i.png", "linked/j.png", "0.png", "1.png", "2.png"]
    assert {path for path in read if "/cat/" in path} == {str(cat / name) for name in want}
    assert not any("left out" in note for note in data.notes)


def test_files_that_are_left_out_are_reported_once(tmp_path: Path) -> None:
    root = image_folder(tmp_path, ("train", "test"))
    cat, test = root / "train" / "cat", root / "test" / "dog"
    for path in (cat / "a.txt", cat / "b.txt", test / "c.HEIC", cat / "more" / "README"):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"")
    (cat / "gone.png").symlink_to(tmp_path / "nowhere.png")
    os.mkfifo(cat / "pipe.png")  # opening it would block forever
    (cat / "more" / "again").symlink_to(cat)  # which contains it
    write_image(root / "train" / "loose.png", 3)
    for hidden in (cat / ".d.png", cat / "__MACOSX" / "e.png", root / ".cache" / "f.png"):
        hidden.parent.mkdir(exist_ok=True)
        hidden.write_bytes(b"")
    data = load(root)
    assert len(data.train) + len(data.val) == 33
    (note,) = (note for note in data.notes if "left out" in note)
    start, _, reasons = note.partition(": ")
    assert start == f"7 files are left out of {root}"
    assert sorted(reasons.split(", ")) == [
        ".heic 1", ".txt 2", "dangling links 1", "images outside the class folders 1",
        "no extension 1", "not plain files 1",
    ]  # fmt: skip


def test_a_class_folder_without_images_says_what_it_has(tmp_path: Path) -> None:
    root = image_folder(tmp_path)
    for file in (root / "train" / "dog").iterdir():
        file.rename(file.with_suffix(".heic"))
    match = r"no images in the class folder .*dog \(11 files are left out of .*dog: .heic 11\)"
    with pytest.raises(ValueError, match=match):
        load(root)


@pytest.mark.parametrize("name", ["val", "valid", "validation", "Val", "VALID"])
def test_a_validation_folder_has_one_of_three_names(name: str, tmp_path: Path) -> None:
    root = image_folder(tmp_path, ("train", "val", "test"))
    write_image(root / "val" / "emu" / "more.png", 7)
    (root / "val").rename(root / name)
    data = load(root)
    assert [len(part) for part in (data.train, data.val, data.test)] == [33, 34, 33]
    shutil.rmtree(root / "test")
    data = load(root)
    assert (len(data.train) + len(data.val), len(data.test)) == (33, 34)


def test_unknown_folders_next_to_train_are_refused(tmp_path: Path) -> None:
    def refused(parts: tuple[str, ...], match: str) -> None:
        root = image_folder(tmp_path / "-".join(parts), parts, images=3)
        with pytest.raises(ValueError, match=match):
            load(root)

    refused(("train", "val", "valid"), r"has both val and valid: keep one of them")
    refused(("train", "validation", "valid", "test"), r"has both valid and validation")
    refused(
        ("train", "dev"),
        r"has dev next to train: name the folders train, val \(or valid, or validation\) and test; "
        r"if these are classes, move all class folders into a folder train",
    )
    refused(("valid", "test"), r"has test, valid but no folder train")
    # a class may be named train
    root = image_folder(tmp_path / "vehicles", images=7)
    (root / "train" / "cat").rename(root / "train" / "train")
    shutil.rmtree(root / "test")
    assert load(root, val_fraction=0.3).classes == ["dog", "emu", "train"]


def test_class_names_may_be_of_any_script(tmp_path: Path) -> None:
    classes = ["café", "собака", "猫", "قطة", "🐈 $1_^{", os.fsdecode(b"caf\xe9")]
    for i, name in enumerate(classes):
        for k in range(5):
            write_image(tmp_path / "photos" / name / f"{k}.png", 20 * i + k)
    data = load(tmp_path / "photos", val_fraction=0.3)
    assert data.classes == sorted(classes)
    assert len(data.train.fingerprint()) == 64


# unbalanced classes


def test_images_per_class_are_reported_and_missing_classes_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "photos"
    for name, count in (("cat", 100), ("dog", 2), ("emu", 1), ("fox", 30)):
        for i in range(count):
            write_image(root / name / f"{i}.png", i)
    config = config_for(tmp_path / "run", name="imagefolder", root=str(root), batch_size=50)
    config.train.epochs = 1
    run = Run(config)
    assert capsys.readouterr().err == ""
    run.fit()
    lines = capsys.readouterr().err.splitlines()
    counts = [torch.bincount(part.labels, minlength=4).tolist() for part in
              (run.data.train, run.data.val, run.data.test)]  # fmt: skip
    assert [sum(of) for of in zip(*counts, strict=True)] == [100, 2, 1, 30]
    for part, of in zip(("train", "val", "test"), counts, strict=True):
        found = ", ".join(f"{n} {k}" for n, k in zip(run.data.classes, of, strict=True))
        assert f"{part}: {sum(of)} images ({found})" in lines
        absent = ", ".join(n for n, k in zip(run.data.classes, of, strict=True) if k == 0)
        assert (f"warning: {part} has no images of {absent}" in lines) == bool(absent)
    assert counts[0][2] == 1  # a single image is for training
    assert "warning: val has no images of dog, emu" in lines


def test_a_set_may_lack_a_class_but_not_have_another(tmp_path: Path) -> None:
    root = image_folder(tmp_path, ("train", "test"))
    shutil.rmtree(root / "test" / "dog")
    for file in (root / "test" / "cat").iterdir():
        file.unlink()
    data = load(root)
    assert len(data.test) == 11
    assert "warning: test has no images of cat, dog" in data.notes
    write_image(root / "test" / "dgo" / "0.png", 3)
    with pytest.raises(
        ValueError, match=r"test has class folders that the training set does not have: dgo"
    ):
        load(root)
    shutil.rmtree(root / "test" / "dgo")
    shutil.rmtree(root / "test" / "emu")
    with pytest.raises(ValueError, match=r"no images in the class folders of .*test"):
        load(root)


def test_of_many_classes_the_extremes_are_reported(tmp_path: Path) -> None:
    for k in range(12):
        for i in range(5 + k):
            write_image(tmp_path / f"c{k:02}" / f"{i}.png", i)
    data = load(tmp_path, val_fraction=0.2)
    counts = torch.bincount(data.train.labels).tolist()
    assert data.notes[0] == (
        f"train: {len(data.train)} images (12 classes, {min(counts)} (c00) to {max(counts)} (c11) "
        "each)"
    )


UNEVEN = torch.tensor([0] * 90 + [2] * 7 + [3] * 3)  # class 1 has no images


def test_an_epoch_has_equally_many_images_of_each_class() -> None:
    def order(seed: int, balance: str = "sampler") -> torch.Tensor:
        return epoch_order(UNEVEN, balance, torch.Generator().manual_seed(seed))

    drawn = order(3)
    assert len(drawn) == 100
    counts = UNEVEN[drawn].bincount(minlength=4)
    assert counts[1] == 0
    assert sorted(counts.tolist()) == [0, 33, 33, 34]
    often = drawn.bincount(minlength=100)
    for label in (2, 3):  # each image of a small class is repeated equally often
        own = often[label == UNEVEN]
        assert own.max() - own.min() <= 1
    assert often[:90].max() == 1
    assert torch.equal(order(3), drawn)
    assert not torch.equal(order(4), drawn)
    assert (UNEVEN[drawn[:50]].bincount(minlength=4)[[0, 2, 3]] > 5).all()  # they are mixed
    got = order(3, "none")
    assert torch.equal(got, torch.randperm(100, generator=torch.Generator().manual_seed(3)))
    assert torch.equal(order(3, "loss"), got)
    few = epoch_order(torch.tensor([0, 1, 2]), "sampler", torch.Generator().manual_seed(1))
    assert sorted(few.tolist()) == [0, 1, 2]


def splits_of(labels: torch.Tensor) -> Splits:
    image = torch.zeros(1, 2, 2, dtype=torch.uint8)
    images = Images([(image, int(label)) for label in labels], 2)
    return Splits(images, images, images, list("abcd"), 1, 2, True)


def test_weights_of_the_loss_are_inverse_frequencies() -> None:
    weights = class_weights(splits_of(UNEVEN), "loss", torch.device("cpu"))
    assert weights is not None
    torch.testing.assert_close(weights, torch.tensor([100 / 270, 0, 100 / 21, 100 / 9]))
    assert weights[UNEVEN].mean().item() == pytest.approx(1)
    for balance in ("none", "sampler"):
        assert class_weights(splits_of(UNEVEN), balance, torch.device("cpu")) is None


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_weighted_loss_is_that_of_pytorch(smoothing: float) -> None:
    weights = torch.tensor([0.5, 2.0, 0.25, 3.0], dtype=torch.float64)
    logits = torch.randn(24, 4, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(4, (24,))
    got = cross_entropy(logits, labels, weights, smoothing)
    log = logits.log_softmax(1)
    targets = (1 - smoothing) * F.one_hot(labels, 4) + smoothing / 4
    want = -(targets * weights * log).sum(1).mean()  # the definition
    torch.testing.assert_close(got, want)
    theirs = F.cross_entropy(logits, labels, weights, label_smoothing=smoothing)
    torch.testing.assert_close(got, theirs * weights[labels].mean())  # it divides by the weights
    mixed = torch.rand(24, 4, dtype=torch.float64).softmax(1)
    torch.testing.assert_close(
        cross_entropy(logits, mixed, weights, smoothing),
        F.cross_entropy(logits, mixed, weights, label_smoothing=smoothing),
    )
    parts = [cross_entropy(logits[i::3], labels[i::3], weights, smoothing) for i in range(3)]
    torch.testing.assert_close(sum(parts) / 3, got)  # of gradient accumulation
    plain = cross_entropy(logits, labels, None, smoothing)
    torch.testing.assert_close(plain, F.cross_entropy(logits, labels, label_smoothing=smoothing))


def unbalanced(root: Path) -> Path:
    for name, count in (("cat", 60), ("dog", 12)):
        for i in range(count):
            write_image(root / name / f"{i}.png", 3 * i + (0 if name == "cat" else 1))
    return root


def weights_of(run: Run) -> torch.Tensor:
    return nn.utils.parameters_to_vector(run.model.parameters()).detach()


class CutError(Exception):
    """Raised in place of a power failure."""


@pytest.mark.parametrize("balance", ["sampler", "loss"])
def test_a_balanced_run_resumes_bit_for_bit(balance: str, tmp_path: Path) -> None:
    root = unbalanced(tmp_path / "photos")

    def new(name: str, balance: str = balance) -> Run:
        AcceleratorState._reset_state(reset_partial_state=True)
        config = config_for(tmp_path / name, name="imagefolder", root=str(root), batch_size=8)
        config.data.balance, config.train.save_every = balance, 2
        return Run(config)

    whole, plain, cut = new("whole"), new("plain", "none"), new("cut")
    assert (whole.class_weights is None) == (balance == "sampler")
    whole.fit()
    plain.fit()
    assert not torch.equal(weights_of(whole), weights_of(plain))
    train_step = cut.train_step

    def step(batches: object) -> None:
        if cut.step == 9:
            raise CutError
        train_step(batches)

    cut.train_step = step
    with pytest.raises(CutError):
        cut.fit()
    AcceleratorState._reset_state(reset_partial_state=True)
    resumed = Run(cut.config, tmp_path / "cut")
    assert resumed.step == 8
    resumed.fit()
    assert torch.equal(weights_of(resumed), weights_of(whole))


# broken files


def spoil(path: Path, header: bool) -> Path:
    """Break a file, in its header or after it."""
    data = path.read_bytes()
    path.write_bytes(data[:10] if header else data[:-30])
    return path


@pytest.mark.parametrize("in_memory", [True, False])
def test_all_broken_files_are_listed_before_the_first_step(
    in_memory: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = image_folder(tmp_path / "photos")
    bad = [spoil(root / "train" / "dog" / f"{i}.png", True) for i in range(8)]
    bad += [spoil(root / "test" / "emu" / f"{i}.png", True) for i in range(5)]
    with pytest.raises(SystemExit) as stop:
        main(
            ["--data.name", "imagefolder", "--data.root", str(root), "--model.name", "vit",
             "--model.options", json.dumps(TINY), "--data.in_memory", str(in_memory).lower(),
             "--run_dir", str(tmp_path / "run")]
        )  # fmt: skip
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("error: 13 images: ")
    assert error.endswith("and 3 more; --data.skip_broken true skips such images\n")
    assert sum(str(path) in error for path in bad) == 10
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("in_memory", [True, False])
def test_broken_files_are_skipped(in_memory: bool, tmp_path: Path) -> None:
    """The sets equal those of a folder without these files."""
    root = image_folder(tmp_path / "photos")
    bad = [spoil(root / "train" / "cat" / "0.png", True),
           spoil(root / "train" / "dog" / "4.png", False),
           spoil(root / "test" / "emu" / "10.png", False)]  # fmt: skip
    skipped = load(root, in_memory=in_memory, skip_broken=True)
    (note,) = (note for note in skipped.notes if "skip_broken" in note)
    assert note.startswith("left out by data.skip_broken: 3 images: ")
    assert all(str(path) in note for path in bad)
    for path in bad:
        path.unlink()
    removed = load(root, in_memory=in_memory)
    for one, other in zip(skipped[:3], removed[:3], strict=True):
        assert one.fingerprint() == other.fingerprint()
        assert all(torch.equal(x, y) for (x, _), (y, _) in zip(one, other, strict=True))
    assert len(skipped.train) + len(skipped.val) == 31
    whole = load(root, in_memory=in_memory, skip_broken=True)
    assert not any("skip_broken" in note for note in whole.notes)


def test_a_set_of_broken_files_alone_is_refused(tmp_path: Path) -> None:
    root = image_folder(tmp_path, images=4)
    for name in ("cat", "dog", "emu"):
        for i in range(4):
            spoil(root / "test" / name / f"{i}.png", True)
    with pytest.raises(ValueError, match=r"no image in the test set can be read: 12 images: "):
        load(root, skip_broken=True, val_fraction=0.3)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_streamed_image_that_breaks_later_is_named_and_can_be_skipped(
    workers: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = image_folder(tmp_path / "photos", ("train", "val", "test"))
    bad = spoil(root / "train" / "dog" / "4.png", False)
    arguments = [
        "--data.name", "imagefolder", "--data.root", str(root), "--model.name", "vit",
        "--model.options", json.dumps(TINY), "--data.in_memory", "false", "--data.workers",
        str(workers), "--train.epochs", "1", "--train.precision", "fp32", "--run_dir",
        str(tmp_path / "run"),
    ]  # fmt: skip
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert not multiprocessing.active_children()  # while the frames of the error are alive
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: {bad} cannot be read as an image: ")
    assert error.endswith("; --data.skip_broken true skips such images, in training only in a new "
                          "run")  # fmt: skip
    AcceleratorState._reset_state(reset_partial_state=True)
    main([*arguments, "--data.skip_broken", "true"])
    captured = capsys.readouterr()
    assert f"left out by data.skip_broken: {bad} cannot be read" in captured.err
    assert captured.out.startswith("test top-1 ")


def test_a_changed_test_set_is_reported_and_a_changed_training_set_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A broken test image stops a run at its end; without it, the run resumes."""
    root = image_folder(tmp_path / "photos", ("train", "val", "test"))
    bad = spoil(root / "test" / "dog" / "4.png", False)
    config = config_for(tmp_path / "run", name="imagefolder", root=str(root), batch_size=8)
    config.data.in_memory, config.train.epochs = False, 1
    with pytest.raises(ValueError, match=r"4.png cannot be read as an image"):
        Run(config).fit()
    shutil.copytree(tmp_path / "run", tmp_path / "other")
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(SystemExit):
        main(["resume", str(tmp_path / "run")])
    assert "4.png cannot be read" in capsys.readouterr().err
    # either skipped, by its own configuration
    saved = yaml.safe_load((tmp_path / "other" / "config.yaml").read_text())
    saved["data"]["skip_broken"] = True
    (tmp_path / "other" / "config.yaml").write_text(yaml.safe_dump(saved))
    AcceleratorState._reset_state(reset_partial_state=True)
    main(["resume", str(tmp_path / "other")])
    assert "have changed since the run was started" in capsys.readouterr().err
    # or removed
    bad.unlink()
    AcceleratorState._reset_state(reset_partial_state=True)
    main(["resume", str(tmp_path / "run")])
    assert "have changed since the run was started" in capsys.readouterr().err
    results = [(tmp_path / name / "result.json").read_text() for name in ("run", "other")]
    assert json.loads(results[0])["test_top1"] == json.loads(results[1])["test_top1"]
    (tmp_path / "run" / "result.json").unlink()
    (root / "train" / "cat" / "3.png").unlink()
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(SystemExit):
        main(["resume", str(tmp_path / "run")])
    assert "with other images or classes than imagefolder" in capsys.readouterr().err


def test_the_first_image_that_can_be_read_gives_the_size(tmp_path: Path) -> None:
    root = image_folder(tmp_path)
    spoil(root / "train" / "cat" / "0.png", True)
    assert load(root, skip_broken=True).image_size == 10
    for path in sorted((root / "train").rglob("*.png")):
        spoil(path, True)
    with pytest.raises(ValueError, match=r"cat/0.png cannot be read as an image"):
        load(root, skip_broken=True)


def test_predict_reads_as_the_run_did(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Transparent images are put on the background of the run, so they have its color."""
    root = tmp_path / "photos"
    for name, color in (("red", (250, 0, 0)), ("green", (0, 250, 0))):
        for i in range(20):
            (root / name).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), color).save(root / name / f"{i}.png")
    config = config_for(tmp_path / "run", name="imagefolder", root=str(root), batch_size=8)
    config.data.background, config.train.epochs, config.train.lr = "#fa0000", 3, 1e-2
    Run(config).fit()
    capsys.readouterr()
    Image.new("RGBA", (8, 8)).save(tmp_path / "clear.png")
    files = [str(tmp_path / "clear.png"), str(root / "red" / "0.png")]
    main(["predict", str(tmp_path / "run"), *files])
    first, second = capsys.readouterr().out.splitlines()
    assert first.split(": ")[1] == second.split(": ")[1]
    assert first.split(": ")[1].startswith("red ")


def test_a_background_must_be_a_color(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data.background 'wite' must be the name of a color or"):
        load(image_folder(tmp_path), background="wite")
