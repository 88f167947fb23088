"""Emulated machines: an Apple GPU, Windows, consoles without Unicode, unusual names."""

from __future__ import annotations

import ast
import builtins
import csv
import fcntl
import io
import json
import multiprocessing
import os
import pickle
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from matplotlib.figure import Figure
from PIL import Image
from test_data import write_mnist
from test_train import ROOT, TINY, config_for, image_folder
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import train.loop
import vision_xformer as vx
from train import fonts, plots
from train.__main__ import main
from train.commands import read_runs
from train.config import AugmentConfig, DataConfig, ModelConfig, TrainConfig
from train.data import load_data
from train.devices import make_accelerator, pick_device
from train.loop import Run
from train.report import curves


@pytest.fixture(autouse=True)
def _fresh_accelerate() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)


# Apple GPUs


class NoDoubles(TorchDispatchMode):
    """Refuse float64 tensors, as MPS does."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in _pytree.tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and leaf.dtype in (torch.float64, torch.complex128):
                raise TypeError(f"{func} makes a tensor of {leaf.dtype}, which MPS does not have")
        return out


@pytest.mark.parametrize(
    "model",
    [
        ModelConfig("hybrid_vin_rope", options=TINY, mixer_options={"landmarks": 6}),
        ModelConfig("vip", options=TINY),
        ModelConfig("vil", options=TINY, mixer_options={"rank": 5}),
    ],
    ids=lambda m: m.name,
)
def test_a_run_makes_nothing_in_float64_on_its_device(
    model: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def on_the_host(function: Any) -> Any:
        def inner(*args: Any) -> Any:
            with _disable_current_modes():
                return function(*args)

        return inner

    for name in ("accuracy", "draw_run"):  # computed on the CPU
        monkeypatch.setattr(train.loop, name, on_the_host(getattr(train.loop, name)))
    config = config_for(tmp_path, batch_size=400)
    config.model = model
    config.augment = AugmentConfig(policy="trivial", color=0.3, erasing=0.4,
                                   mixup=0.3, cutmix=1.0)  # fmt: skip
    config.train.ema, config.train.accumulate = 0.9, 2
    run = Run(config)
    tensors = [*run.model.parameters(), *run.model.buffers(), *run.data.train[0]]
    assert all(t.dtype != torch.float64 for t in tensors if isinstance(t, torch.Tensor))
    with NoDoubles(), pytest.raises(TypeError, match="which MPS does not have"):
        torch.ones(3).double()
    with NoDoubles():
        run.fit()
    assert (tmp_path / "result.json").is_file()


@pytest.mark.parametrize("name", vx.list_models("*test*"))
def test_no_model_computes_in_float64(name: str) -> None:
    model = vx.create_model(name)
    x = torch.randn(2, *model.config.input_shape)
    with NoDoubles():
        output = model(x)
        output = output if isinstance(output, torch.Tensor) else sum(output)
        output.square().sum().backward()
        vx.load_weights(model, model.state_dict())


def test_the_device_is_the_one_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def there(**devices: bool) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: devices.get("cuda", False))
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: devices.get("mps", False))

    there()
    assert pick_device("auto") == pick_device("cpu") == "cpu"
    for name in ("cuda", "mps"):
        with pytest.raises(ValueError, match=f"train.device {name}: PyTorch finds no such device"):
            pick_device(name)
        there(**{name: True})
        assert pick_device("auto") == pick_device(name) == name
        assert pick_device("cpu") == "cpu"
        there()


@pytest.mark.parametrize("precision", ["auto", "fp32", "fp16", "bf16"])
def test_a_mac_trains_on_its_gpu(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name, value in (("is_available", True), ("is_built", True)):
        monkeypatch.setattr(torch.backends.mps, name, lambda value=value: value)
    monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda *version: True)
    monkeypatch.setenv("PYTORCH_ENABLE_MPS_FALLBACK", "0")
    accelerator = make_accelerator(TrainConfig(precision=precision))
    assert accelerator.device.type == "mps"
    assert accelerator.mixed_precision == {"auto": "no", "fp32": "no"}.get(precision, precision)
    AcceleratorState._reset_state(reset_partial_state=True)
    assert make_accelerator(TrainConfig(device="cpu")).device.type == "cpu"
    monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda *version: False)
    with pytest.raises(ValueError, match=r"train.precision bf16 needs macOS 14"):
        make_accelerator(TrainConfig(precision="bf16"))


# Windows


def refuse_read_only_fsync(descriptor: int) -> None:
    if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
        raise OSError(9, "Bad file descriptor")


def open_files(path: str) -> list[str]:
    """The open files of this process under a path."""
    links = [f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd")]
    targets = [os.readlink(link) for link in links if os.path.islink(link)]
    return [target for target in targets if target.startswith(path)]


@pytest.fixture
def windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Emulate the restrictions of Windows, and its default encoding."""
    replace, text_encoding, opening = os.replace, io.text_encoding, io.open

    def closed_only(source: Any, target: Any, **options: Any) -> None:
        assert not open_files(os.path.realpath(target)), f"{target} is replaced while it is open"
        assert not open_files(os.path.realpath(source)), f"{source} is moved while it is open"
        replace(source, target, **options)

    def opened(file: Any, mode: str = "r", *args: Any, **options: Any) -> Any:
        encoding = options.get("encoding") or (args[1] if len(args) > 1 else None)
        ours = isinstance(file, str | Path) and str(file).startswith(str(tmp_path))
        if ours and "b" not in mode and encoding in (None, "locale"):
            options["encoding"], args = "cp1252", args[:1]
        return opening(file, mode, *args, **options)

    monkeypatch.setattr(os, "fsync", refuse_read_only_fsync)
    monkeypatch.setattr(os, "replace", closed_only)
    monkeypatch.setattr(os, "rename", closed_only)
    monkeypatch.setattr(io, "text_encoding", lambda encoding, level=2: encoding or "cp1252")
    monkeypatch.setattr(builtins, "open", opened)
    monkeypatch.setattr(io, "open", opened)
    assert text_encoding is not io.text_encoding


@pytest.mark.usefixtures("windows")
@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs a list of open files")
def test_the_emulation_of_windows_refuses(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("é")
    assert file.read_bytes() == b"\xe9"
    with pytest.raises(UnicodeEncodeError):
        file.write_text("猫")
    with file.open("rb") as held:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fsync(held.fileno())
        with pytest.raises(AssertionError, match="while it is open"):
            (tmp_path / "b.txt").replace(file)


NAMES = ("café", "猫", "🐱 $x_1$ & <b>")


def named_folder(root: Path) -> Path:
    """An image folder with classes of :data:`NAMES`."""
    image_folder(root)
    for part in ("train", "test"):
        for old, new in zip(("cat", "dog", "emu"), NAMES, strict=True):
            (root / part / old).rename(root / part / new)
    return root


@pytest.mark.usefixtures("windows")
@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs a list of open files")
def test_every_command_on_windows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = named_folder(tmp_path / "Bilder ü")
    run = tmp_path / "Läufe" / "erster"
    options = {**TINY, "dim": 12}
    main(["--model.name", "vit", "--model.options", json.dumps(options), "--data.name",
          "imagefolder", "--data.root", str(root), "--data.batch_size", "8", "--data.workers", "0",
          "--train.epochs", "1", "--train.precision", "fp32", "--run_dir", str(run)])  # fmt: skip
    assert json.loads((run / "classes.json").read_bytes()) == sorted(NAMES)
    main(["resume", str(run), "--train.epochs", "2"])
    main(["evaluate", str(run)])
    main(["predict", str(run), str(root / "test"), "--out", str(tmp_path / "out.csv")])
    main(["predict", str(run), str(root / "test" / "猫" / "1.png")])
    main(["report", str(run.parent)])
    assert "猫" in capsys.readouterr().out
    rows = list(csv.DictReader(io.StringIO((tmp_path / "out.csv").read_bytes().decode())))
    assert len(rows) == 33
    assert set(rows[0]) == {"path", "class", "error", *NAMES}
    assert yaml.safe_load((run / "config.yaml").read_bytes())["run_dir"] == str(run)
    with pytest.raises(SystemExit) as stop:
        main(["--run_dir", str(run)])
    assert stop.value.code == 2


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_a_narrow_console_shows_codes(
    encoding: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = named_folder(tmp_path / "photos")
    config = config_for(tmp_path / "run", name="imagefolder", root=str(root), batch_size=8)
    Run(config).fit()
    bytes_out = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(bytes_out, encoding=encoding))
    main(["predict", str(tmp_path / "run"), str(root / "test" / "猫" / "1.png")])
    sys.stdout.flush()
    (line,) = bytes_out.getvalue().decode(encoding).splitlines()
    assert r"\u732b/1.png: " in line
    assert r"\U0001f431 $x_1$ & <b> " in line
    assert ("caf\\xe9 " if encoding == "ascii" else "café ") in line


def hugging_face_folder(root: Path) -> None:
    datasets = pytest.importorskip("datasets")
    kinds = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])}
    pixels = [Image.new("RGB", (8, 8), (i, i, i)) for i in range(40)]
    columns = {"image": pixels, "label": [i % 2 for i in range(40)]}
    data = datasets.Dataset.from_dict(columns, features=datasets.Features(kinds))
    data.save_to_disk(str(root))


def mnist_folder(root: Path) -> None:
    for part in ("train", "t10k"):
        write_mnist(root / "MNIST" / "raw", (part, "idx"), range(10))


@pytest.mark.parametrize(
    ("name", "write"),
    [("imagefolder", image_folder), ("huggingface", hugging_face_folder),
     ("torchvision:MNIST", mnist_folder)],
    ids=["imagefolder", "huggingface", "torchvision"],
)  # fmt: skip
def test_images_pickle_for_processes_that_start_anew(name: str, write: Any, tmp_path: Path) -> None:
    write(tmp_path)
    config = DataConfig(name=name, root=str(tmp_path), in_memory=False, val_fraction=0.2)
    images = load_data(config).train
    again = pickle.loads(pickle.dumps(images))
    assert torch.equal(again[3][0], images[3][0])


@pytest.mark.slow
def test_workers_may_start_anew(tmp_path: Path) -> None:
    images = load_data(
        DataConfig(name="imagefolder", root=str(image_folder(tmp_path)), in_memory=False)
    ).train
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method("spawn", force=True)
    try:
        ((x, _),) = images.batches([torch.arange(5)], torch.device("cpu"), 1)
    finally:
        multiprocessing.set_start_method(before, force=True)
    assert torch.equal(x[3], images[3][0])


# Names that users chose, in figures


def figures_of(classes: list[str]) -> list[Any]:
    logits = torch.randn(40, len(classes))
    labels = torch.arange(40) % len(classes)
    images = [(torch.zeros(3, 8, 8, dtype=torch.uint8), 0)] * 40
    return [
        plots.confusion(logits, labels, classes, "a $title"),
        plots.mistakes(images, logits, labels, classes, "a $title"),
    ]


def drawn_texts(figure: Any, path: Path) -> str:
    """All texts of a figure after drawing it, which may warn or raise."""
    plots.save(figure, path)
    return "\n".join(text.get_text() for text in figure.findobj(mpl.text.Text))


def test_names_are_drawn_as_they_are(tmp_path: Path) -> None:
    classes = ["price_$1_to_$5", r"$\frac{1}$", "a_b^c", "café", "_first", "two\nlines", "x" * 200]
    for figure in figures_of(classes):
        text = drawn_texts(figure, tmp_path / "a.png")
        assert all(name[:15] in text for name in classes[:5])
    figure = Figure()
    figure.suptitle(r"$\frac{1}$")
    with pytest.raises(ValueError, match="Expected"):  # what matplotlib does by default
        plots.save(figure, tmp_path / "b.png")


def test_a_character_without_a_font_is_numbered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No font has U+100001; if none has Chinese characters, they are replaced as well."""
    families, shown = fonts.plain_text(["cat", "\U00100001\U00100002", "a \U00100001"])
    assert shown == ["cat", "1: ??", "2: a ?"]
    for figure in figures_of(["cat", "\U00100001\U00100002", "a \U00100001"]):
        assert "1: ??" in drawn_texts(figure, tmp_path / "a.png")
    for figure in figures_of(list(NAMES)):
        drawn_texts(figure, tmp_path / "a.png")
    monkeypatch.setattr(fonts, "_installed", lambda: {"Some Sans": frozenset(map(ord, "猫"))})
    families, shown = fonts.plain_text(["猫", "\U00100001"])
    assert families["font.family"][-1] == "Some Sans"
    assert shown == ["猫", "1: ?"]


def test_a_figure_that_fails_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*args: Any) -> Any:
        raise RuntimeError("no such glyph")

    monkeypatch.setattr(plots, "confusion", broken)
    Run(config_for(tmp_path)).fit()
    line = "warning: confusion.png could not be drawn: RuntimeError('no such glyph')"
    assert capsys.readouterr().err.count(line) == 1
    assert line in (tmp_path / "log.txt").read_text(encoding="utf-8")
    assert {p.name for p in tmp_path.glob("*.png")} == {"curves.png", "mistakes.png"}
    assert (tmp_path / "result.json").is_file()
    monkeypatch.setattr("train.report.curves", broken)
    main(["report", str(tmp_path)])
    assert "warning: broken could not be drawn" in capsys.readouterr().err
    assert (tmp_path / "report.html").is_file()


def test_names_of_runs_are_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["_first", "$x", "<script>1", "猫", "n" * 120, "bad\udcff"]
    first = tmp_path / "runs" / names[0]
    Run(config_for(first)).fit()
    for name in names[1:]:
        shutil.copytree(first, tmp_path / "runs" / name)
    main(["report", str(tmp_path / "runs")])
    page = (tmp_path / "runs" / "report.html").read_text(encoding="utf-8")
    assert page.count("<script") == 1  # that of the page itself
    assert "<script>1" not in page
    assert "&lt;script&gt;1" in page
    assert "bad\\udcff" in page
    runs = read_runs([tmp_path / "runs"])
    figure = curves(runs)
    legend = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert len(legend) == len(names)
    assert {"_first", "$x"} < set(legend)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere file names are Unicode")
def test_file_names_that_are_not_unicode(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = image_folder(tmp_path / "photos")
    for part in ("train", "test"):
        (root / part / "cat").rename(os.fsdecode(os.fsencode(root / part) + b"/\xffcat"))
    sys.stderr.reconfigure(errors="backslashreplace")  # as it is outside of pytest
    config = config_for(tmp_path / "run", name="imagefolder", root=str(root), batch_size=8)
    Run(config).fit()
    out = tmp_path / "out.csv"
    main(["predict", str(tmp_path / "run"), str(root / "test"), "--out", str(out)])
    assert out.read_text(encoding="utf-8").count("\\udcffcat/") == 11
    main(["evaluate", str(tmp_path / "run")])
    main(["report", str(tmp_path)])
    assert "could not be drawn" not in capsys.readouterr().err


def text_calls(path: Path) -> Iterator[tuple[int, bool]]:
    """The calls that read or write text: their line, and whether they name an encoding."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        function = node.func
        name = function.attr if isinstance(function, ast.Attribute) else ast.unparse(function)
        options = {option.arg: ast.unparse(option.value) for option in node.keywords}
        modes = [a.value for a in node.args if isinstance(a, ast.Constant)]
        opens = name == "open" and (isinstance(function, ast.Name) or any(map(str, modes)))
        if (
            name in ("read_text", "write_text")
            or options.get("text") == "True"
            or (opens and not any("b" in str(mode) for mode in modes))
        ):
            yield node.lineno, "encoding" in options


def test_texts_are_utf8_on_every_system() -> None:
    files = [file for part in ("vision_xformer", "train") for file in (ROOT / part).rglob("*.py")]
    found = [(file, line, named) for file in files for line, named in text_calls(file)]
    assert len(found) > 10
    assert [(str(file), line) for file, line, named in found if not named] == []
