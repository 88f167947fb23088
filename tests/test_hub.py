"""The Hugging Face Hub, with a stub in its place; transformers; and runs that are exported."""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
import yaml
from accelerate.state import AcceleratorState
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import save_file
from test_commands import fails
from test_onnx import run
from test_train import config_for
from torch import nn
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline

import vision_xformer as vx
from train.__main__ import main
from train.augment import plain
from train.config import ConvertConfig, ModelConfig
from train.data import decode
from train.loop import Run
from train.model import Sizes, build_model, load_model, save_weights
from train.pixels import NAMED, pixels_of, pixels_of_weights

LABELS = ("cat", "dog", "emu")


@pytest.fixture
def model() -> vx.VisionModel:
    made = vx.create_model(
        "vip_test", input_shape=(3, 16, 16), pool="mean", num_classes=3
    ).eval()  # fmt: skip
    made.pretrained_cfg = {**NAMED["imagenet"]._asdict(), "label_names": LABELS}
    return made


def assert_same(got: torch.nn.Module, want: vx.VisionModel) -> None:
    images = torch.randn(2, *want.config.input_shape).to(next(want.parameters()))
    assert torch.equal(got(images), want(images))


@pytest.mark.parametrize("name", ["vin_test", "levit_test", "fnet2d_test", "swin_test"])
def test_models_return_from_a_folder(name: str, tmp_path: Path) -> None:
    model = vx.create_model(name).double().eval()
    model.pretrained_cfg = {"mean": (0.5,), "std": (0.25,)}
    model.save_pretrained(tmp_path / "new" / "folder")
    found = vx.from_pretrained(tmp_path / "new" / "folder")
    assert_same(found, model)
    assert found.config == model.config
    assert found.pretrained_cfg == model.pretrained_cfg
    assert not found.training
    assert sorted(p.name for p in tmp_path.iterdir()) == ["new"]
    assert_same(vx.load_model(tmp_path / "new" / "folder" / "model.safetensors"), model)


def test_a_folder_may_be_a_link_to_another_file_system(
    model: vx.VisionModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace = Path.replace

    def across(self: Path, target: Path) -> Path:
        if self.parent.resolve() != target.parent.resolve():
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", across)
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    model.save_pretrained(tmp_path / "link")
    assert_same(vx.from_pretrained(tmp_path / "real"), model)


def test_a_full_disk_leaves_a_folder_as_it_was(
    model: vx.VisionModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.save_pretrained(tmp_path / "old")
    before = {path: path.read_bytes() for path in (tmp_path / "old").iterdir()}

    def full(*arguments: Any) -> None:
        raise SafetensorError("No space left on device")

    monkeypatch.setattr("vision_xformer.factory.save_file", full)
    other = vx.create_model("vit_test", num_classes=5)
    for folder in (tmp_path / "old", tmp_path / "new" / "folder"):
        with pytest.raises(OSError, match=r"cannot be written: .*No space left"):
            other.save_pretrained(folder)
    assert {path: path.read_bytes() for path in (tmp_path / "old").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


class Stub:
    """A hub of one folder."""

    def __init__(self, root: Path) -> None:
        self.root, self.calls = root, []

    def __call__(self, **options: Any) -> Stub:  # HfApi()
        return self

    def create_repo(self, repo_id: str, **options: Any) -> Any:
        self.calls.append((repo_id, options))
        return SimpleNamespace(repo_id=repo_id)

    def upload_folder(self, repo_id: str, folder_path: str, **options: Any) -> Any:
        self.calls.append((repo_id, options))
        shutil.copytree(folder_path, self.root / repo_id / (options["revision"] or "main"))
        return SimpleNamespace(commit_url=f"https://huggingface.co/{repo_id}/commit/0")

    def hf_hub_download(self, repo_id: str, name: str, revision: str | None, **_: Any) -> str:
        return str(self.root / repo_id / (revision or "main") / name)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stub:
    stub = Stub(tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "HfApi", stub)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", stub.hf_hub_download)
    return stub


def test_models_go_to_the_hub_and_return(model: vx.VisionModel, hub: Stub) -> None:
    address = model.push_to_hub("me/x", private=True, revision="v1", commit_message="mine")
    assert address == "https://huggingface.co/me/x/commit/0"
    assert hub.calls[0] == ("me/x", {"private": True, "exist_ok": True})
    assert hub.calls[1][1]["commit_message"] == "mine"
    found = vx.from_pretrained("me/x", revision="v1")
    assert_same(found, model)
    assert found.pretrained_cfg == model.pretrained_cfg
    files = {path.name for path in (hub.root / "me" / "x" / "v1").iterdir()}
    assert files == {"README.md", "config.json", "model.safetensors", "preprocessor_config.json"}
    with pytest.raises(TypeError, match="privat"):
        model.push_to_hub("me/x", privat=True)


def test_a_model_card_has_what_the_hub_reads(model: vx.VisionModel, tmp_path: Path) -> None:
    text = vx.hub.model_card(
        model, license="apache-2.0", dataset="digits", results={"accuracy": 0.75}, tags=["mine"],
        text="## More",
    )  # fmt: skip
    data = huggingface_hub.ModelCard(text).data
    assert (data.license, data.library_name) == ("apache-2.0", "vision_xformer")
    assert data.pipeline_tag == "image-classification"
    assert data.tags == ["vision_xformer", "vit", "performer", "mine"]
    [result] = data.eval_results
    assert (result.dataset_name, result.metric_type, result.metric_value) == (
        "digits", "accuracy", 0.75,
    )  # fmt: skip
    assert text.endswith("## More\n")
    with pytest.raises(ValueError, match="results need a dataset"):
        vx.hub.model_card(model, results={"accuracy": 0.75})
    # an own card stays, unless another is given
    model.save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text("mine", encoding="utf-8")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == "mine"
    model.save_pretrained(tmp_path, card="new")
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == "new"


def test_statistics_of_pixels_may_be_numbers_or_arrays(tmp_path: Path) -> None:
    model = vx.create_model("vit_test")
    model.pretrained_cfg = {"mean": 0.5, "std": np.array([0.25, 0.5, 0.75]), "label_names": None}
    want = {"mean": (0.5,), "std": (0.25, 0.5, 0.75)}
    model.save_pretrained(tmp_path / "folder")
    assert vx.from_pretrained(tmp_path / "folder").pretrained_cfg == want
    vx.save_model(model, tmp_path / "model.safetensors")
    assert vx.load_model(tmp_path / "model.safetensors").pretrained_cfg == want
    for wrong in ("imagenet", (0.5, 0.5)):
        model.pretrained_cfg = {"mean": wrong}
        for save in (model.save_pretrained, partial(vx.save_model, model)):
            with pytest.raises(
                ValueError, match=r"pretrained_cfg\['mean'\] .* for each of 3 channels"
            ):
                save(tmp_path / "other.safetensors")
    assert not (tmp_path / "other.safetensors").exists()


def test_what_cannot_be_read_or_saved_is_refused(
    model: vx.VisionModel, tmp_path: Path, hub: Stub, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=r"has no config\.json: was it written by save_pretrained"):
        vx.from_pretrained(tmp_path)
    model.save_pretrained(tmp_path / "m")
    with pytest.raises(ValueError, match="is a local folder, which has no revision 'v1'"):
        vx.from_pretrained(tmp_path / "m", revision="v1")
    for text in ("{}", "[]", "torn"):
        (tmp_path / "m" / "config.json").write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match="has no model of this package: its config"):
            vx.from_pretrained(tmp_path / "m")
    model.save_pretrained(tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text(encoding="utf-8"))
    for mean, valid in ((0.5, True), ("imagenet", False), ([0.5, 0.5], False)):
        text = json.dumps({**config, "mean": mean})
        (tmp_path / "m" / "config.json").write_text(text, encoding="utf-8")
        if valid:
            assert vx.from_pretrained(tmp_path / "m").pretrained_cfg["mean"] == (0.5,)
        else:
            with pytest.raises(ValueError, match=r"m: pretrained_cfg\['mean'\] .* must be a numb"):
                vx.from_pretrained(tmp_path / "m")
    meta = vx.create_model("vit_test").to("meta")
    for save in (meta.save_pretrained, partial(vx.save_model, meta)):
        with pytest.raises(ValueError, match=r"^\S+ is on the meta device: it has no values"):
            save(tmp_path / "other.safetensors")
    assert not (tmp_path / "other.safetensors").exists()
    with pytest.raises(ValueError, match="must be a folder, not a file"):
        model.save_pretrained(tmp_path / "m" / "config.json")
    model.pretrained_cfg["label_names"] = ["one"]
    with pytest.raises(ValueError, match=r"has 1 names, and the model 3 classes"):
        model.save_pretrained(tmp_path / "other")
    model.pretrained_cfg["label_names"] = 5
    with pytest.raises(ValueError, match=r"\['label_names'\] 5 must be a list of names"):
        model.save_pretrained(tmp_path / "other")
    del model.pretrained_cfg["label_names"]
    model = vx.create_model("vit_test")
    vx.convert(model, "linear")
    with pytest.raises(ValueError, match="cannot save a converted model"):
        model.save_pretrained(tmp_path / "other")
    assert not (tmp_path / "other").exists()

    def raises(error: Exception) -> Any:
        def call(*args: Any, **options: Any) -> None:
            raise error

        return call

    response = SimpleNamespace(headers={}, request=None)
    for error, reason in (
        (LocalEntryNotFoundError("a long\nstory"), "there is no connection, and the cache does"),
        (RepositoryNotFoundError("x", response=response), "there is no such repository, or your"),
        (RuntimeError("first line\nsecond"), "first line$"),
    ):
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", raises(error))
        with pytest.raises(ValueError, match=rf"^me/x is not a folder, and .*: {reason}"):
            vx.from_pretrained("me/x")
    vx.save_model(vx.create_model("vit_test"), file := tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"is a file: vx\.load_model reads a file of save_model"):
        vx.from_pretrained(file)
    monkeypatch.setattr(hub, "create_repo", raises(RuntimeError("401 Unauthorized")))
    with pytest.raises(ValueError, match=r"^me/x cannot be uploaded .* Hub: 401 Unauthorized$"):
        vx.create_model("vit_test").push_to_hub("me/x")
    monkeypatch.setattr(hub, "create_repo", raises(huggingface_hub.errors.OfflineModeIsEnabled()))
    with pytest.raises(
        ValueError, match=r"^me/x cannot be uploaded .* Hub: HF_HUB_OFFLINE is set$"
    ):
        vx.create_model("vit_test").push_to_hub("me/x")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match="package huggingface_hub: pip install huggingface_hub"):
        vx.from_pretrained("me/x")


def test_importing_needs_no_optional_package() -> None:
    names = ["timm", "transformers", "onnx", "onnxruntime", "onnxscript", "huggingface_hub",
             "datasets", "webdataset"]  # fmt: skip
    code = f"import sys, vision_xformer; print([n for n in {names} if n in sys.modules])"
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, encoding="utf-8"
    )
    assert found.stdout.strip() == "[]"


@pytest.mark.filterwarnings("ignore")  # those of transformers are not ours
def test_transformers_classifies_with_our_models(model: vx.VisionModel, tmp_path: Path) -> None:
    import vision_xformer.transformers  # noqa: F401

    model.save_pretrained(tmp_path)
    theirs = AutoModelForImageClassification.from_pretrained(tmp_path)
    images, labels = torch.randn(2, 3, 16, 16), torch.tensor([0, 2])
    found = theirs(images, labels=labels)
    torch.testing.assert_close(found.logits, model(images), rtol=0, atol=0)
    assert found.loss.isfinite()
    theirs.save_pretrained(tmp_path / "theirs")
    again = AutoModelForImageClassification.from_pretrained(tmp_path / "theirs")
    torch.testing.assert_close(again(images).logits, model(images), rtol=0, atol=0)
    assert_same(vx.from_pretrained(tmp_path / "theirs"), model)
    rows, columns = np.mgrid[:48, :40]
    picture = Image.fromarray(
        np.stack([4 * rows, 6 * columns, 255 - 5 * rows], -1).astype(np.uint8)
    )
    picture.save(tmp_path / "picture.png")
    pixels = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")(picture)["pixel_values"][0]
    ours = plain(decode(tmp_path / "picture.png", 16)[None], pixels_of(model))[0]
    assert (torch.as_tensor(pixels) - ours).abs().max() < 0.2
    answer = pipeline("image-classification", model=str(tmp_path))(picture)
    assert {entry["label"] for entry in answer} == set(LABELS)


@pytest.mark.filterwarnings("ignore")  # those of transformers are not ours
@pytest.mark.parametrize("backend", ["pil", "torchvision"])
def test_images_of_a_model_that_is_not_square_are_stretched(backend: str, tmp_path: Path) -> None:
    model = vx.create_model("vit_test", input_shape=(3, 16, 32))
    model.pretrained_cfg = {"mean": (0.5,), "std": (0.5,)}
    model.save_pretrained(tmp_path)
    prepare = AutoImageProcessor.from_pretrained(tmp_path, backend=backend)
    columns = np.arange(32, dtype=np.uint8) * 8
    image = Image.fromarray(np.broadcast_to(columns[None, :, None], (16, 32, 3)).copy())
    pixels = torch.as_tensor(np.asarray(prepare(image)["pixel_values"][0]))
    want = (torch.as_tensor(columns) / 127.5 - 1).expand(3, 16, 32)
    torch.testing.assert_close(pixels, want, rtol=0, atol=1e-5)
    taller = prepare(image.resize((32, 64)))["pixel_values"][0]
    torch.testing.assert_close(torch.as_tensor(np.asarray(taller)), want, rtol=0, atol=0.02)


@pytest.mark.filterwarnings("ignore")  # those of transformers are not ours
@pytest.mark.parametrize("name", ["vit_test", "swin_test", "xcit_test"])
def test_transformers_fills_computed_tables(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import vision_xformer.transformers  # noqa: F401

    options = {"position": "sincos", "rope": "axial"} if name == "vit_test" else {}
    model = vx.create_model(name, **options).eval()
    model.save_pretrained(tmp_path)
    empty_like = torch.empty_like

    def unlike(*args: Any, **options: Any) -> torch.Tensor:
        return empty_like(*args, **options).fill_(17)  # memory as it may be found

    monkeypatch.setattr(torch, "empty_like", unlike)
    found = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    images = torch.randn(2, *model.config.input_shape)
    assert torch.equal(found(images).logits, model(images))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "options", "given"),
    [("levit_test", {}, 0), ("cct_test", {}, 0), ("cct_test", {}, (0, "")),
     ("vit_test", {"pool": "seq", "class_token": False}, (0, ""))],
)  # fmt: skip
def test_transformers_gives_a_head_to_a_model_without(
    name: str, options: dict[str, Any], given: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import vision_xformer.transformers  # noqa: F401

    model = vx.create_model(name, **options)
    model.reset_classifier(*([given] if given == 0 else given))
    model.save_pretrained(tmp_path)
    empty_like = torch.empty_like

    def unlike(*args: Any, **options: Any) -> torch.Tensor:
        return empty_like(*args, **options).fill_(17)  # memory as it may be found

    monkeypatch.setattr(torch, "empty_like", unlike)
    theirs = AutoModelForImageClassification.from_pretrained(tmp_path, num_labels=5).eval()
    tensors = {**dict(theirs.named_parameters()), **dict(theirs.named_buffers())}
    assert not [key for key, value in tensors.items() if (value == 17).all()]
    assert theirs(torch.randn(2, *model.config.input_shape)).logits.shape == (2, 5)


@pytest.mark.filterwarnings("ignore")
def test_the_loss_is_that_of_transformers(model: vx.VisionModel, tmp_path: Path) -> None:
    """Trainer accumulates gradients by ``num_items_in_batch``."""
    import vision_xformer.transformers  # noqa: F401

    model.save_pretrained(tmp_path)
    theirs = AutoModelForImageClassification.from_pretrained(tmp_path)
    images, labels = torch.randn(8, 3, 16, 16), torch.tensor([0, 2, 1, 0, 2, 2, 1, 0])
    whole = theirs(images, labels=labels).loss
    torch.testing.assert_close(whole, F.cross_entropy(model(images), labels))
    parts = [
        theirs(x, labels=y, num_items_in_batch=8).loss
        for x, y in zip(images.split(2), labels.split(2), strict=True)
    ]
    torch.testing.assert_close(sum(parts), whole)
    several = AutoModelForImageClassification.from_pretrained(
        tmp_path, problem_type="multi_label_classification"
    )
    hot = torch.randint(2, (8, 3)).float()
    want = F.binary_cross_entropy_with_logits(model(images), hot)
    torch.testing.assert_close(several(images, labels=hot).loss, want)
    loss, logits = theirs(images, labels=labels, return_dict=False)
    assert (loss.shape, logits.shape) == ((), (8, 3))
    with pytest.raises(ValueError, match=r"use vx\.attention_maps"):
        theirs(images, output_attentions=True)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["vip_test", "levit_test", "crossvit_test"])
def test_transformers_gives_a_model_other_labels(name: str, tmp_path: Path) -> None:
    import vision_xformer.transformers  # noqa: F401

    model = vx.create_model(name, num_classes=3)
    model.pretrained_cfg = {"label_names": LABELS}
    model.save_pretrained(tmp_path)
    theirs = AutoModelForImageClassification.from_pretrained(
        tmp_path, num_labels=5, ignore_mismatched_sizes=True
    )
    images = torch.randn(2, *model.config.input_shape)
    logits = theirs(images).logits
    assert logits.shape == (2, 5)
    linears = [m for m in theirs.model.head.modules() if isinstance(m, nn.Linear)]
    for linear in linears:  # drawn, not uninitialized
        assert 0 < linear.weight.std() < 0.1
        assert not linear.bias.any()
    assert linears
    theirs.save_pretrained(tmp_path / "theirs")
    found = vx.from_pretrained(tmp_path / "theirs")
    assert torch.equal(found(images), logits)
    assert found.pretrained_cfg["label_names"] == tuple(f"LABEL_{i}" for i in range(5))


@pytest.mark.filterwarnings("ignore")
def test_a_name_of_two_classes_has_no_number(model: vx.VisionModel, tmp_path: Path) -> None:
    import vision_xformer.transformers  # noqa: F401

    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert config["label2id"] == {label: i for i, label in enumerate(LABELS)}
    model.pretrained_cfg["label_names"] = names = ("crane", "crane", "emu")
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert "label2id" not in config
    assert vx.from_pretrained(tmp_path).pretrained_cfg["label_names"] == names
    theirs = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert tuple(theirs.config.id2label.values()) == names
    images = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(theirs(images).logits, model(images))


def test_a_file_without_floating_point_weights_is_refused(tmp_path: Path) -> None:
    config = json.dumps(vx.create_model("vit_test").config.to_dict())
    for state in ({}, {"norm.weight": torch.ones(3, dtype=torch.int8)}):
        save_file(state, file := tmp_path / "model.safetensors", {"config": config})
        with pytest.raises(ValueError, match=r"safetensors: the weights must be floating point"):
            vx.load_model(file)


def test_images_without_three_channels_have_no_processor(tmp_path: Path) -> None:
    for channels in (3, 1):
        model = vx.create_model("vit_test", channels=channels)
        model.pretrained_cfg = {"mean": (0.5,), "std": (0.5,)}
        model.save_pretrained(tmp_path)
        assert (tmp_path / "preprocessor_config.json").exists() == (channels == 3)
    assert pixels_of_weights(tmp_path / "model.safetensors", "") == NAMED["half"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run."""
    AcceleratorState._reset_state(reset_partial_state=True)
    folder = tmp_path_factory.mktemp("runs") / "mine"
    Run(config_for(folder)).fit()
    return folder


def test_runs_become_onnx_files(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "model.onnx"
    main(["export", str(finished), "--onnx", str(path), "--half"])
    assert f"wrote {path}; in onnxruntime, its logits differ by at most" in capsys.readouterr().out
    model, sizes = load_model(finished / "best.safetensors")
    images = torch.randn(3, sizes.channels, sizes.image_size, sizes.image_size)
    torch.testing.assert_close(run(path, images).float(), model(images), rtol=0, atol=2e-2)
    metadata = {entry.key: json.loads(entry.value) for entry in onnx.load(path).metadata_props}
    assert metadata["label_names"] == [str(i) for i in range(10)]


def test_runs_become_folders_for_the_hub(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "card"
    main(["export", str(finished), "--hub", str(out), "--license", "mit"])
    assert f"upload it with: hf upload USER/NAME {out}" in capsys.readouterr().out
    model, _ = load_model(finished / "best.safetensors")
    assert_same(vx.from_pretrained(out), model)
    assert vx.from_pretrained(out).pretrained_cfg["label_names"] == tuple(map(str, range(10)))
    text = (out / "README.md").read_text(encoding="utf-8")
    data = huggingface_hub.ModelCard(text).data
    result = json.loads((finished / "result.json").read_text(encoding="utf-8"))
    assert data.license == "mit"
    assert data.eval_results[0].metric_value == result["test_top1"]
    assert data.eval_results[0].dataset_name == "digits"
    assert f"| accuracy | {result['test_top1']:.2%} |" in text
    assert "Trained on digits, for 2 epochs." in text
    main(["export", str(finished), "--hub", str(out)])  # over an earlier export
    assert "license" not in (out / "README.md").read_text(encoding="utf-8").split("---")[1]


def test_the_card_of_a_run_has_its_first_command_and_its_folder(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(finished, tmp_path / "run")
    config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    config["data"].update(name="imagefolder", root=".")
    (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    file = folder / "sessions.json"
    [session] = json.loads(file.read_text(encoding="utf-8"))
    sessions = [{**session, "command": ["python", "-m", "train", word]} for word in ("fit", "re")]
    file.write_text(json.dumps(sessions), encoding="utf-8")
    lines = (folder / "metrics.csv").read_text(encoding="utf-8").splitlines()
    (folder / "metrics.csv").write_text("\n".join(lines[:2]) + "\n", encoding="utf-8")
    (tmp_path / "photos").mkdir()
    monkeypatch.chdir(tmp_path / "photos")
    main(["export", str(folder), "--hub", str(tmp_path / "card")])
    text = (tmp_path / "card" / "README.md").read_text(encoding="utf-8")
    assert "```sh\npython -m train fit\n```" in text
    assert "Trained on photos, for 1 epoch.\n" in text
    assert huggingface_hub.ModelCard(text).data.eval_results[0].dataset_name == "photos"


def test_exports_that_cannot_be_are_refused(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_folder, file = str(finished), str(tmp_path / "model.onnx")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").touch()
    for words, sentence in (
        ([run_folder], "export needs either --onnx FILE or --hub DIR"),
        ([run_folder, "--onnx", file, "--hub", file], "export needs either --onnx FILE or --hub"),
        ([run_folder, "--hub", file, "--half"], "--half is an option of --onnx"),
        ([run_folder, "--onnx", file, "--license", "mit"], "--license is an option of --hub"),
        ([run_folder, "--onnx", str(tmp_path / "a.pt")], "must end in .onnx"),
        ([run_folder, "--onnx", str(tmp_path / "no" / "a.onnx")], "--onnx "),
        (
            [run_folder, "--hub", str(tmp_path / "photos")],
            "must be a new folder, or one of an earl",
        ),
        ([str(tmp_path), "--onnx", file], "is not a run with weights: it has no config.yaml"),
    ):
        assert sentence in fails(["export", *words], capsys)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["photos"]


@pytest.mark.parametrize(
    ("name", "mixer", "kind"),
    [
        ("timm:vit_tiny_patch16_224", None, "a VisionTransformer of timm"),
        ("vit_test", "linear", "a converted model"),
    ],
)
def test_runs_of_other_models_do_not_become_folders(
    name: str,
    mixer: str | None,
    kind: str,
    finished: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = shutil.copytree(finished, tmp_path / "run")
    options = {"depth": 1, "patch_size": 8} if mixer is None else {"depth": 1}
    config = ModelConfig(name=name, options=options, convert=ConvertConfig(mixer=mixer))
    sizes = Sizes(16, 3, 10)
    save_weights(build_model(config, sizes), folder / "best.safetensors", config, sizes)
    sentence = fails(["export", str(folder), "--hub", str(tmp_path / "out")], capsys)
    assert sentence == f"{folder} has {kind}: --hub is for models of vx.create_model"
    assert not (tmp_path / "out").exists()
