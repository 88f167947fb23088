"""Memory computed from shapes, against measurements and against the operators of CUDA."""

from __future__ import annotations

import copy
import functools
import re
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from blocks import GPU, RESULTS
from matrix import QUADRATIC
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import vision_xformer as vx
from train.benchmark import __main__ as program
from train.benchmark.cases import Case
from train.benchmark.controls import CONTROLS
from train.benchmark.estimate import estimate
from train.benchmark.plan import Planned, largest_batch, models_of
from train.benchmark.rows import KEY, Row, read_rows
from vision_xformer import planning
from vision_xformer.memory_use import bytes_kept
from vision_xformer.precision import autocasts


def measured(least: float) -> list[Row]:
    """Committed eager rows whose peak is at least this many MiB."""
    rows = [row for file in sorted(RESULTS.rglob("m*.csv")) for row in read_rows(file)[1]]
    return [r for r in rows if r["mode"] == "eager" and (r["peak_mib"] or 0) >= least]


def off(row: Row, column: str) -> float:
    """The relative error of the estimate of a row, for the device that it was measured on."""
    device = "cuda" if row["reserved_mib"] else "cpu"
    found = estimate(Case(**{name: row[name] for name in KEY}), device)[column]
    return abs(found / row[column] - 1)


_SINCE = {"fourier", "linear", "mala", "rala"}  # changed since they were measured on a GPU
# of estimates for a GPU; cuDNN and cuFFT choose the workspace of the first two
_LARGER = {"conv": 0.45, "fft2": 0.26, "xca": 0.13}


def outdated(row: Row) -> bool:
    """Whether the mixer's memory has changed since the row was measured."""
    return bool(row["reserved_mib"]) and row["name"] in _SINCE


def largest(row: Row) -> float:
    """The largest error that the estimate of a row may have."""
    return _LARGER.get(row["name"], 0.1) if row["reserved_mib"] else 0.1


@pytest.mark.parametrize("tokens", [4096, pytest.param(16384, marks=pytest.mark.slow)])
def test_estimates_are_near_the_measurement_of_every_mixer(tokens: int) -> None:
    rows = [row for row in measured(20) if row["kind"] == "mixer" and row["size"] == tokens]
    without = set(QUADRATIC) if tokens == 16384 else set()  # out of memory
    for on_gpu in (False, True):
        some = [row for row in rows if bool(row["reserved_mib"]) == on_gpu]
        missing = {*vx.list_mixers(), *CONTROLS} - without - {row["name"] for row in some}
        assert not missing, "measure them: python -m train benchmark mixers --only ..."
        some = [row for row in some if not outdated(row)]
        errors = {row["name"]: off(row, "peak_mib") / largest(row) for row in some}
        assert max(errors.values()) < 1, errors
        kept = {row["name"]: off(row, "kept_mib") for row in some if on_gpu and row["kept_mib"] > 1}
        assert max(kept.values(), default=0) < 1e-3, kept


@pytest.mark.slow
def test_estimates_are_near_all_measurements() -> None:
    rows = [row for row in measured(200) if not outdated(row)]
    assert len(rows) > 105
    errors = [off(row, "peak_mib") for row in rows]
    assert statistics.median(errors) < 0.01
    assert all(error < largest(row) for error, row in zip(errors, rows, strict=True))


def test_estimates_of_the_gpu_are_those_of_the_results() -> None:
    """What the documentation says of their errors is computed from the files."""
    files = (RESULTS / GPU).glob("*.csv")
    rows = [row for file in sorted(files) for row in read_rows(file)[1] if row["size"] <= 256]
    assert len(rows) > 60
    for row in rows:
        if outdated(row):
            continue
        found = estimate(Case(**{name: row[name] for name in KEY}), "cuda")
        assert found["peak_mib"] == pytest.approx(row["computed_mib"], rel=1e-4), row["name"]
        assert row["kept_mib"] <= 1 or found["kept_mib"] == pytest.approx(row["kept_mib"], rel=1e-3)


def test_operators_without_tensors_or_axes_have_no_workspace() -> None:
    class Plain(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(torch.fft.fftn(x, dim=()).real)

    assert vx.memory(Plain(4, 4), (2, 4)).peak > 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "device_type", lambda x: "cuda")
        assert planning.workspace(torch.ops.aten.zeros.default, ()) == 0


@pytest.mark.parametrize("name", ["vit_test", "levit_test", "swin_test", "vip_test", "cvt_test"])
def test_kept_bytes_are_those_of_a_real_forward_pass(name: str) -> None:
    model = vx.create_model(name).train()
    x = torch.randn(4, *model.config.input_shape)
    kept = bytes_kept(WithImages(model, x), lambda: model(x))
    found = vx.memory(model, tuple(x.shape), device="cpu").kept
    assert kept <= found <= kept + 512  # of the loss


class WithImages(nn.Module):
    """A model and its images, whose bytes are not counted as stored for backward."""

    def __init__(self, model: nn.Module, x: torch.Tensor) -> None:
        super().__init__()
        self.model, self.x = model, nn.Buffer(x)


def cuda_kept(model: nn.Module, x_shape: tuple[int, ...], dtype: torch.dtype | None) -> int:
    """Bytes that the forward pass stores on a GPU, from its own dispatcher and autocast."""
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    twin = copy.deepcopy(model).to("meta")
    with fake, planning.planned_for("cuda"), pytest.MonkeyPatch.context() as patch:
        twin.to_empty(device="cuda")
        # the fused kernel, which is chosen on machines with a GPU, under its autocast
        fused = planning._fused_attention

        def attend(*args: Any, **kwargs: Any) -> torch.Tensor:
            cast = [a.to(dtype) if dtype and isinstance(a, torch.Tensor) else a for a in args]
            return fused(*cast, **kwargs)

        patch.setattr(planning, "_fused_attention", attend)
        x = torch.empty(x_shape, device="cuda")
        labels = torch.empty(x_shape[0], dtype=torch.long, device="cuda")
        if dtype is not None:  # autocast() turns itself off on machines without a GPU
            torch.set_autocast_enabled("cuda", True)
            torch.set_autocast_dtype("cuda", dtype)
        try:
            assert autocasts(x) == (dtype is not None)
            own = WithImages(twin, x)
            return bytes_kept(own, lambda: F.cross_entropy(twin(x), labels))
        finally:
            torch.set_autocast_enabled("cuda", False)
            torch.clear_autocast_cache()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "name",
    ["vit_test", "cct_test", "levit_test", "swin_test", "cait_test", "vip_test", "vin_test",
     "vif_test"],
)  # fmt: skip
def test_the_forms_of_cuda_are_those_of_its_dispatcher(name: str, precision: str) -> None:
    model = vx.create_model(name).train()
    shape = (4, *model.config.input_shape)
    with_cuda = cuda_kept(model, shape, {"fp32": None, "bf16": torch.bfloat16}[precision])
    found = vx.memory(model, shape, precision=precision).kept
    assert found == pytest.approx(with_cuda, rel=0.01)


def test_autocast_stores_less_and_differently_on_cuda() -> None:
    model, shape = vx.create_model("swin_test"), (4, 3, 16, 12)
    shape = (4, *model.config.input_shape)
    kept = {
        (device, precision): vx.memory(model, shape, device=device, precision=precision).kept
        for device in ("cpu", "cuda")
        for precision in ("fp32", "bf16")
    }
    assert kept["cuda", "bf16"] < kept["cuda", "fp32"]
    assert kept["cpu", "bf16"] != kept["cuda", "bf16"]


def test_parts() -> None:
    model = vx.create_model("vit_test")
    shape = (4, *model.config.input_shape)
    size = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    learned = sum(p.nbytes for p in model.parameters())
    one = vx.memory(model, shape)
    assert (one.weights, one.gradients, one.optimizer) == (size, learned, 2 * learned)
    assert one.inputs == 4 * (3 * 14 * 10 * 4 + 8)
    assert one.kept == sum(one.modules.values())
    assert one.peak >= one.weights + one.optimizer + one.inputs + one.kept
    assert one.peak_module in dict(model.named_modules())
    for optimizer, factor in (("sgd", 1), ("none", 0)):
        other = vx.memory(model, shape, optimizer=optimizer)  # type: ignore[arg-type]
        assert other.optimizer == factor * learned
        assert one.peak - other.peak == (2 - factor) * learned
    vectors = sum(p.nbytes for p in model.parameters() if p.dim() < 2)
    assert vx.memory(model, shape, optimizer="muon").optimizer == learned + vectors
    averaged = vx.memory(model, shape, average=True)
    assert averaged.peak - one.peak == averaged.average == size
    more = vx.memory(model, shape, accumulate=True).peak - one.peak
    assert 0 < more <= learned + 512 * len(list(model.parameters()))
    infer = vx.memory(model, shape, training=False)
    assert (infer.kept, infer.gradients, infer.optimizer) == (0, 0, 0)
    assert infer.peak < one.peak
    half = vx.memory(copy.deepcopy(model).bfloat16(), shape)
    assert half.weights == size // 2
    assert vx.memory(model, (8, *shape[1:])).kept > 1.9 * one.kept
    assert f"MiB, in {one.peak_module}" in str(one)


def test_frozen_parameters_have_no_gradients() -> None:
    model = vx.create_model("vit_test").requires_grad_(False)
    model.head.requires_grad_(True)
    found = vx.memory(model, (4, *model.config.input_shape))
    assert found.gradients == sum(p.nbytes for p in model.head.parameters())
    assert found.kept < vx.memory(vx.create_model("vit_test"), (4, 3, 14, 10)).kept / 10


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_checkpointing_stores_less(device: Any, precision: Any) -> None:
    model = vx.create_model("vit_test", depth=6)
    shape = (8, *model.config.input_shape)
    plain = vx.memory(model, shape, device=device, precision=precision)
    model.set_grad_checkpointing()
    found = vx.memory(model, shape, device=device, precision=precision)
    assert found.kept < plain.kept / 3
    assert found.peak < plain.peak


class Residual(nn.Module):
    """Residual layers, which may all be recomputed in the backward pass."""

    def __init__(self, recompute: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(4))
        self.head, self.recompute = nn.Linear(32, 10), recompute

    def body(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x).tanh()
        return x

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.flatten(2).transpose(1, 2)
        y = checkpoint(self.body, x, use_reentrant=False) if self.recompute else self.body(x)
        return self.head(y.mean(1))


def test_residual_additions_that_are_recomputed_are_counted() -> None:
    """All is recomputed, next to the output: more memory than without checkpointing."""
    shape = (8, 32, 16, 16)
    plain, found = (vx.memory(Residual(again), shape).peak for again in (False, True))
    assert found >= plain + 0.9 * 8 * 32 * 16 * 16 * 4


class Tied(nn.Module):
    """A model with tied weights, a table without a name, a cached function and two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(10, 10), nn.Linear(10, 10)
        self.second.weight = self.first.weight
        self.table = torch.ones(10)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        y = self.first(x.flatten(1)[:, :10]) * self.table * _cached(10, x.dtype)
        return {"logits": self.second(y), "features": y[:, None]}


@functools.lru_cache
def _cached(n: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.ones(n, dtype=dtype)


def test_the_model_stays_as_it_was() -> None:
    model = Tied()
    _cached.cache_clear()
    before = copy.deepcopy(model.state_dict())
    found = vx.memory(model, (4, 3, 5, 5))
    assert found.weights == (10 * 10 + 2 * 10) * 4
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert model.training
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert type(model(torch.ones(4, 3, 5, 5))["logits"]) is torch.Tensor  # no cached fake tensor


def test_models_of_others() -> None:
    timm = pytest.importorskip("timm")
    transformers = pytest.importorskip("transformers")
    from torchvision.models import VisionTransformer

    config = transformers.DINOv3ViTConfig(
        hidden_size=48, num_attention_heads=3, num_hidden_layers=2, intermediate_size=96,
        image_size=64,
    )  # fmt: skip
    models = [
        timm.create_model("resnet18"),
        timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2),
        transformers.DINOv3ViTModel(config),
        VisionTransformer(64, 16, 2, 3, 48, 96),
    ]
    for model in models:
        found = vx.memory(model, (2, 3, 64, 64), precision="bf16")
        assert found.peak > found.weights + found.optimizer + found.kept > 0
        assert model(torch.zeros(2, 3, 64, 64)) is not None
    # the fused kernel of CUDA in nn.MultiheadAttention: nothing is as large as the map
    attention = VisionTransformer(512, 8, 1, 1, 8, 8)
    assert vx.memory(attention, (1, 3, 512, 512)).peak < 4096**2 * 4


def test_mistakes() -> None:
    model = vx.create_model("vit_test")
    shape = (4, *model.config.input_shape)
    for option, value in (("precision", "int8"), ("optimizer", "lion"), ("device", "tpu")):
        with pytest.raises(ValueError, match=f"unknown {option} '{value}'"):
            vx.memory(model, shape, **{option: value})
    with pytest.raises(ValueError, match=r"shape \(4, 3, 14, 11\) cannot be computed"):
        vx.memory(model, (4, 3, 14, 11))

    wrong: list[Any] = [(-1, 3, 14, 10), (0, 3, 14, 10), (4, 3, 14.0, 10), (), 4]
    for given in wrong:
        with pytest.raises(ValueError, match=re.escape(f"shape {given!r} must be positive int")):
            vx.memory(model, given)
    frozen = vx.create_model("vit_test").requires_grad_(False)
    with pytest.raises(ValueError, match=r"no parameter of it requires .* use training=False$"):
        vx.memory(frozen, shape)
    assert vx.memory(frozen, shape, training=False) == vx.memory(model, shape, training=False)

    class Depends(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if x.sum().item() > 0 else -x

    with pytest.raises(ValueError, match=r"Depends .* cannot be computed"):
        vx.memory(Depends(), (1, 3, 8, 8))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("training", [True, False])
def test_contexts_of_the_caller_change_nothing(precision: Any, training: bool) -> None:
    model = vx.create_model("vit_test")
    model.set_grad_checkpointing()
    shape = (4, *model.config.input_shape)
    options: dict[str, Any] = {"precision": precision, "training": training, "device": "cpu"}
    found = vx.memory(model, shape, **options)
    for context in (
        torch.inference_mode(), torch.no_grad(), torch.autocast("cpu", torch.bfloat16),
    ):  # fmt: skip
        with context:
            assert vx.memory(model, shape, **options) == found


class Grouped(nn.Module):
    """Attention whose queries share two heads of keys."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(8, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = self.proj(x.flatten(1, 2)).unflatten(2, (8, 8)).transpose(1, 2)
        kv = q[:, :2]
        return F.scaled_dot_product_attention(q, kv, kv, enable_gqa=True).mean((1, 2))


def test_grouped_queries_are_those_of_the_model() -> None:
    assert Grouped()(torch.zeros(2, 3, 4, 8)).shape == (2, 8)
    assert vx.memory(Grouped(), (2, 3, 4, 8)).kept > 0


# the command


def test_the_largest_batch_fits_and_one_more_does_not() -> None:
    planned = Planned("hybrid_vil", "", 32, {"precision": "bf16"})
    sizes = [2**20, 2**28, 2**30]
    first, each, found = largest_batch(planned, sizes)
    assert found[0] == 0
    for memory, batch in zip(sizes[1:], found[1:], strict=True):
        peaks = [vx.memory(planned.build(), (n, 3, 32, 32), precision="bf16").peak
                 for n in (batch, batch + 1)]  # fmt: skip
        assert peaks[0] <= memory < peaks[1]
    assert found[2] / found[1] == pytest.approx((2**30 - first.weights) / 2**28, rel=0.3)
    assert each * found[2] == pytest.approx(2**30, rel=0.2)


def test_a_name_is_planned_with_every_mixer_and_a_pattern_as_it_is() -> None:
    mixers = {mixer for _, mixer in models_of(["vin_tiny"])}
    assert mixers == {"", *vx.list_mixers()} - {"nystrom"}
    assert models_of(["vi?_tiny"]) == [(name, "") for name in vx.list_models("vi?_tiny")]
    assert models_of(["timm:resnet18"]) == [("timm:resnet18", "")]


def test_plan(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, mixers = tmp_path / "plan.csv", ["nystrom", "performer", "conv"]
    monkeypatch.setattr(vx, "list_mixers", lambda: mixers)
    program.main(
        ["plan", "--name", "vin_test", "--memory", "16MB", "1GB", "--precision", "bf16",
         "--image-size", "32", "--out", str(out)]
    )  # fmt: skip
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.endswith("batch in 16MB  batch in 1GB")
    assert len(lines) == len(mixers)
    assert [line for line in lines if line.startswith("vin_test, conv at 32: mixer 'conv' does")]
    text = out.read_text(encoding="utf-8")
    assert "name,mixer,size,status,model_mib,image_mib,batch in 16MB,batch in 1GB" in text
    monkeypatch.undo()
    program.main(["plan", "--model", "timm:resnet18", "--image-size", "64", "--inference"])
    head, line = capsys.readouterr().out.splitlines()
    assert head.split()[:5] == ["model", "pixels", "weights,", "MiB", "gradients,"]
    assert line.split()[:4] == ["timm:resnet18", "64", "42.7", "0.0"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--name", "nothing"], "--name nothing: no model matches"),
        (["--name", "timm:nothing"], "unknown timm model 'nothing'"),
        (["--name", "vit_test", "--memory", "16XB"], "--memory 16XB must be a number with a unit"),
        (["--name", "vit_test", "--measure"], "--measure needs one --memory"),
        (["--name", "vit_tiny", "--image-size", "15"], "15"),
    ],
)
def test_plan_mistakes(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        program.main(["plan", *arguments])
    assert message in capsys.readouterr().err
