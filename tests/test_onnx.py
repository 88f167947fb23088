"""ONNX: every model of the registry, run by onnxruntime; half precision; and every refusal."""

from __future__ import annotations

import copy
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
from onnx.reference import ReferenceEvaluator
from test_contract import TEST_MODELS, fill_zeros, one_block, pool_for
from torch import Tensor, nn

import vision_xformer as vx
from vision_xformer import onnx_export

QUICK = ("cct_test", "levit_test")


def tiny(name: str, **options: object) -> vx.VisionModel:
    """A model of one block in each stage, all of whose branches contribute."""
    model = vx.create_model(name, **one_block(name), **options)
    fill_zeros(model)
    return model


def run(path: Path, images: Tensor) -> Tensor:
    session = onnxruntime.InferenceSession(path)
    [given] = session.get_inputs()
    dtype = {"tensor(float)": torch.float32, "tensor(float16)": torch.float16}[given.type]
    [logits] = session.run(["logits"], {"images": images.to(dtype).numpy()})
    return torch.from_numpy(logits)


@torch.no_grad()
def assert_same(path: Path, model: vx.VisionModel, atol: float) -> None:
    """Equal logits, in float64 by PyTorch, at batch sizes that the export did not see."""
    exact = vx.create_model(model.config).double().eval()
    exact.load_state_dict(model.state_dict())
    for batch in (1, 3):
        images = torch.randn(batch, *model.config.input_shape)
        got, want = run(path, images).double(), exact(images.double())
        torch.testing.assert_close(got, want, rtol=0, atol=atol * max(1.0, float(want.abs().max())))


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if "-" in n else n for n in vx.list_mixers()]
)
def test_every_mixer_runs_in_onnxruntime(name: str, tmp_path: Path) -> None:
    model = tiny("vit_test", mixer=name, pool=pool_for(name))
    vx.export_onnx(model, tmp_path / "model.onnx")
    assert_same(tmp_path / "model.onnx", model, 1e-4)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in TEST_MODELS]
)
def test_every_model_runs_in_onnxruntime(name: str, tmp_path: Path) -> None:
    model = tiny(name)
    difference = vx.export_onnx(model, tmp_path / "model.onnx")
    assert difference <= 1e-4
    assert_same(tmp_path / "model.onnx", model, 1e-4)


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n == "nystrom" else pytest.mark.slow) for n in vx.list_mixers()],
)
def test_every_mixer_runs_in_half_precision(name: str, tmp_path: Path) -> None:
    model = tiny("vit_test", mixer=name, pool=pool_for(name))
    vx.export_onnx(model, tmp_path / "half.onnx", half=True)
    stored = onnx.load(tmp_path / "half.onnx").graph.initializer
    assert any(
        t.data_type == onnx.TensorProto.FLOAT16 and math.prod(t.dims) == 24 * 38 for t in stored
    )
    assert_same(tmp_path / "half.onnx", model, 1e-2)


@pytest.mark.parametrize(
    ("name", "options"),
    [*((name, {}) for name in TEST_MODELS), ("levit_test", {"mixer": "fourier"}),
     ("vit_test", {"input_shape": (2, 4, 14, 10), "factorized": True})],
)  # fmt: skip
def test_every_model_is_cast_to_half(name: str, options: dict[str, Any]) -> None:
    """Also mixers that contain others, each of which would cast its output."""
    model = tiny(name, **options).eval()
    images = torch.randn(2, *model.config.input_shape)
    with torch.no_grad():
        want = model(images)
        got = onnx_export.in_half(copy.deepcopy(model))(images.half())
    assert got.dtype == torch.float16
    scale = max(1.0, float(want.abs().max()))
    torch.testing.assert_close(got.float(), want, rtol=0, atol=2e-2 * scale)


def test_a_file_that_onnxruntime_cannot_load_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("Type parameter (T) bound to different types\nmore")

    monkeypatch.setattr(onnxruntime, "InferenceSession", broken)
    with pytest.raises(ValueError, match=r"MlpMixer .* cannot be loaded: Type .* types; it is not"):
        vx.export_onnx(tiny("mlp_mixer_test"), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_half_precision_keeps_sums_in_float32(tmp_path: Path) -> None:
    """Products of queries and keys above 65,504 are infinite in float16, and so the logits NaN."""
    model = tiny("vit_test").eval()
    with torch.no_grad():
        model.blocks[0].mixer.projection.qkv.weight[: 2 * 24] *= 5000
    images = torch.randn(2, *model.config.input_shape)
    vx.export_onnx(model, tmp_path / "half.onnx", half=True)
    # onnxruntime computes float16 in float32 on a CPU, the reference of ONNX does not
    [got] = ReferenceEvaluator(str(tmp_path / "half.onnx")).run(
        None, {"images": images.half().numpy()}
    )
    torch.testing.assert_close(torch.from_numpy(got).float(), model(images), rtol=0, atol=1e-2)
    plain = torch.onnx.export(model.half(), (images.half(),), dynamo=True, input_names=["images"],
                              verbose=False)  # fmt: skip
    plain.save(tmp_path / "plain.onnx")
    with np.errstate(all="ignore"):
        [got] = ReferenceEvaluator(str(tmp_path / "plain.onnx")).run(
            None, {"images": images.half().numpy()}
        )
    assert torch.from_numpy(got).isnan().all()


def test_models_of_other_libraries_export_converted(tmp_path: Path) -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=1)
    vx.convert(model, "linear")
    path = tmp_path / "model.onnx"
    with pytest.raises(
        ValueError, match=r"VisionTransformer does not state the shape .* input_shape"
    ):
        vx.export_onnx(model, path)
    vx.export_onnx(model, path, input_shape=(3, 32, 32), half=True)
    images = torch.randn(3, 3, 32, 32)
    torch.testing.assert_close(run(path, images).float(), model.eval()(images), rtol=0, atol=1e-2)


def test_an_export_leaves_the_model_alone_and_says_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = tiny("vil_test").double()
    model.pretrained_cfg = {
        "mean": (0.5,),
        "std": (0.25,),
        "label_names": ["a", "b", "c", "d", "e"],
    }
    before, state = torch.get_rng_state(), {k: v.clone() for k, v in model.state_dict().items()}
    path = tmp_path / "model.onnx"
    vx.export_onnx(model, path, batch_size=3, half=True)
    assert model.training
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]
    assert capfd.readouterr() == ("", "")
    found = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    assert found["mean"] == "[0.5]"
    assert found["label_names"] == '["a", "b", "c", "d", "e"]'
    assert run(path, torch.randn(3, *model.config.input_shape)).shape == (3, 5)
    with pytest.raises(Exception, match="Got: 2 Expected: 3"):
        run(path, torch.randn(2, *model.config.input_shape))


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=pytest.mark.slow)
        for n in ("vip_test", "vif_test", "cvt_test", "fnet2d")
    ]
    + ["vit_test"],
)
@torch.no_grad()
def test_images_of_any_size(name: str, tmp_path: Path) -> None:
    model = vx.create_model(name, dynamic_size=True, **one_block(name)).eval()
    fill_zeros(model)
    vx.export_onnx(model, tmp_path / "model.onnx", dynamic_size=True)
    channels, height, width = model.config.input_shape
    for size in ((height, width), (4 * height, width), (2 * height, 5 * width)):
        images = torch.randn(3, channels, *size)
        torch.testing.assert_close(
            run(tmp_path / "model.onnx", images), model(images), rtol=0, atol=1e-4
        )


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("vin_test", "ViT with mixer 'nystrom' cannot be exported"),
        pytest.param("cct_test", "does not run on images of 15x9 pixels", marks=pytest.mark.slow),
    ],
)
def test_a_size_that_the_exporter_fixes_is_refused(name: str, reason: str, tmp_path: Path) -> None:
    model = vx.create_model(name, dynamic_size=True, **one_block(name))
    with pytest.raises(ValueError, match=reason):
        vx.export_onnx(model, tmp_path / "model.onnx", dynamic_size=True)
    with pytest.raises(ValueError, match=r"needs a model for all image sizes: create_model\("):
        vx.export_onnx(tiny(name), tmp_path / "model.onnx", dynamic_size=True)
    assert list(tmp_path.iterdir()) == []


class DependsOnData(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3)) if x.sum() > 0 else x.amax((2, 3))


def test_wrapped_models_export(tmp_path: Path) -> None:
    model = tiny("mlp_mixer_test")
    wrapped = torch.compile(nn.DataParallel(model), backend="eager")
    vx.export_onnx(wrapped, tmp_path / "model.onnx")
    images = torch.randn(3, *model.config.input_shape)
    with torch.no_grad():
        torch.testing.assert_close(
            run(tmp_path / "model.onnx", images), model.eval()(images), rtol=0, atol=1e-4
        )


def test_what_cannot_be_exported_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, path = tiny("mlp_mixer_test"), tmp_path / "model.onnx"
    path.write_text("old", encoding="utf-8")
    for bad, sentence in (
        ("model.pt", r"must end in \.onnx"),
        ("no/model.onnx", "must be a file in a folder that exists"),
    ):
        with pytest.raises(ValueError, match=sentence):
            vx.export_onnx(model, tmp_path / bad)
    with pytest.raises(ValueError, match="batch_size 0 must be at least 1, or None"):
        vx.export_onnx(model, path, batch_size=0)
    with pytest.raises(ValueError, match=r"batch_size=1.5 must be of type int"):
        vx.export_onnx(model, path, batch_size=1.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^half='no' must be of type bool"):
        vx.export_onnx(model, path, half="no")  # type: ignore[arg-type]
    for shape in ("abc", 5, (3.0, 8, 8)):
        with pytest.raises(ValueError, match=r"^input_shape .* must be whole numbers, such as"):
            vx.export_onnx(model, path, input_shape=shape)  # type: ignore[arg-type]
    for shape in ((3,), (3, -1, 8)):
        with pytest.raises(ValueError, match=r"^input_shape \(3,.* must be \(channels, length\)"):
            vx.export_onnx(model, path, input_shape=shape)
    with pytest.raises(ValueError, match=r"^MlpMixer .* is on the meta device"):
        vx.export_onnx(copy.deepcopy(model).to("meta"), path)
    maps = vx.create_model("mlp_mixer_test", features_only=True, **one_block("mlp_mixer_test"))
    with pytest.raises(ValueError, match=r"^FeatureNet must return a tensor of logits, not a list"):
        vx.export_onnx(maps, path, input_shape=model.config.input_shape)
    with pytest.raises(ValueError, match=r"^DependsOnData cannot be exported to ONNX: .*depend"):
        vx.export_onnx(DependsOnData(), path, input_shape=(3, 8, 8))
    monkeypatch.setattr(onnx_export, "_compare", lambda *_: (0.5, 2.0))
    with pytest.raises(
        ValueError, match=r"MlpMixer with mixer 'mlp' differs .* by 0.5, .* up to 2;"
    ):
        vx.export_onnx(model, path)
    monkeypatch.setattr(onnx_export, "_compare", lambda *_: (float("nan"), 2.0))
    with pytest.raises(ValueError, match="by nan, with logits up to 2: leave out half; it is not"):
        vx.export_onnx(model, path, half=True)
    monkeypatch.setattr(onnx_export, "_LIMIT", 1000)
    with pytest.raises(ValueError, match="ONNX file holds less than 1,000"):
        vx.export_onnx(model, path)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ValueError, match="needs the package onnxscript: pip install onnx onnxs"):
        vx.export_onnx(model, path)
    assert path.read_text(encoding="utf-8") == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]
