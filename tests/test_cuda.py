"""What only a CUDA GPU can show; ``pytest -m cuda`` and ``train benchmark gpu`` run these tests."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from test_contract import (
    GRIDS,
    PAPER_MODELS,
    TEST_MODELS,
    _is_like_another,
    images,
    make,
    supports,
    tokens,
)
from test_train import config_for
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._inductor.cudagraph_trees import get_manager

import vision_xformer as vx
from train.benchmark.cases import Case
from train.benchmark.rows import machine
from train.benchmark.worker import Worker
from train.loop import Run

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    # of cuBLAS in the thread of the backward pass, and of torch.compile
    pytest.mark.filterwarnings("ignore:.*no current CUDA context"),
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores"),
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning"),
]
each_test_model = pytest.mark.parametrize(
    "name", [name for name in TEST_MODELS if not _is_like_another(name)]
)
each_mixer = pytest.mark.parametrize("name", vx.list_mixers())


@contextmanager
def refusing_to_wait() -> Iterator[None]:
    """An operator that waits for the GPU is an error."""
    try:
        torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def gradients(module: nn.Module, x: Tensor, *rest: object) -> list[Tensor]:
    """The output and the gradients of the input and of all parameters."""
    x = x.clone().requires_grad_()
    y = module(x, *rest)
    y.square().sum().backward()
    found = [y.detach(), x.grad, *(p.grad for p in module.parameters())]
    return [t for t in found if t is not None]


def assert_same_on_both(module: nn.Module, x: Tensor, *rest: object) -> None:
    there = copy.deepcopy(module).cuda()
    wanted, got = gradients(module, x, *rest), gradients(there, x.cuda(), *rest)
    assert len(wanted) == len(got)
    for want, have in zip(wanted, got, strict=True):
        assert have.device.type == "cuda"
        # sines of positions are computed in float32, and are not the same on both
        assert torch.allclose(have.cpu(), want, rtol=1e-4, atol=1e-5 * float(want.abs().max() + 1))


@each_test_model
def test_models_compute_the_same_as_on_the_cpu(name: str) -> None:
    model = vx.create_model(name).double().eval()
    assert_same_on_both(model, images(model))


@each_mixer
def test_mixers_compute_the_same_as_on_the_cpu(name: str) -> None:
    if not supports(name, "2-D"):
        pytest.skip("not for images")
    grid = GRIDS["2-D"]
    assert_same_on_both(make(name, grid), tokens(grid), grid)


@each_test_model
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_train_with_autocast(name: str, dtype: torch.dtype) -> None:
    model = vx.create_model(name).cuda()
    with torch.autocast("cuda", dtype):
        y = model(images(model))
    assert y.dtype == dtype
    y.float().square().mean().backward()
    for tensor in (y, *(p.grad for p in model.parameters() if p.grad is not None)):
        assert tensor.isfinite().all()


@each_test_model
def test_no_model_waits_for_the_gpu(name: str) -> None:
    model = vx.create_model(name).cuda()
    x = torch.randn(3, *model.config.input_shape, device="cuda")
    with refusing_to_wait():
        model(x).sum().backward()


def test_waiting_for_the_gpu_is_an_error() -> None:
    x = torch.ones(2, device="cuda")
    with pytest.raises(RuntimeError, match="synchroniz"), refusing_to_wait():
        x.sum().item()


@pytest.mark.parametrize("name", ["softmax", "performer", "nystrom", "linformer", "linear"])
def test_compiled_mixers_compute_the_same(name: str) -> None:
    grid = GRIDS["2-D"]
    mixer, x = make(name, grid).cuda(), tokens(grid).cuda()
    wanted = gradients(mixer, x, grid)
    mixer.zero_grad()
    got = gradients(torch.compile(mixer, dynamic=False), x, grid)
    for want, have in zip(wanted, got, strict=True):
        assert torch.allclose(have, want, rtol=1e-6, atol=1e-8 * float(want.abs().max() + 1))


@pytest.mark.parametrize("name", PAPER_MODELS)
def test_models_of_the_paper_take_a_step(name: str) -> None:
    model = vx.create_model(name, image_size=32, num_classes=10).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    with torch.autocast("cuda", torch.bfloat16):
        y = model(torch.randn(4, 3, 32, 32, device="cuda"))
    loss = y.float().logsumexp(-1).mean()
    loss.backward()
    optimizer.step()
    assert loss.isfinite()
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", ["softmax", "linformer", "performer", "nystrom"])
def test_no_map_of_attention_is_stored(name: str) -> None:
    grid, heads = vx.TokenGrid((64, 64)), 4
    mixer = vx.create_mixer(name, dim=256, heads=heads, grid=grid).cuda()
    x = torch.randn(1, grid.length, 256, device="cuda", requires_grad=True)
    mixer(x, grid).sum().backward()  # workspaces of libraries
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    mixer(x, grid).sum().backward()
    assert torch.cuda.max_memory_allocated() - before < heads * grid.length**2 * 4


def test_a_run_trains_on_the_gpu(tmp_path: Path) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    config = config_for(tmp_path / "run")
    config.train.precision = "auto"
    Run(config).fit()
    (session,) = json.loads((tmp_path / "run" / "sessions.json").read_text())
    assert session["device"] == torch.cuda.get_device_name()
    assert session["versions"]["cuda"] == torch.version.cuda
    assert session["precision"] in ("bf16", "fp16")


def test_cuda_graphs_train_the_same(tmp_path: Path) -> None:
    losses = []
    counters.clear()
    for compile_ in (False, "cudagraphs"):
        AcceleratorState._reset_state(reset_partial_state=True)
        config = config_for(tmp_path / str(compile_))
        config.train.compile, config.train.precision = compile_, "fp32"
        run = Run(config)
        run.fit()
        losses.append([row["train_loss"] for row in run.rows])
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert counters["inductor"]["cudagraph_skips"] == 0
    assert get_manager(0, create_if_none_exists=False) is not None


def test_a_row_has_the_memory_of_the_gpu() -> None:
    worker = Worker(Case("mixer", "softmax", 256, 2, "bf16"), "cuda")
    worker.prepare()
    worker.turn()
    row = worker.close()
    assert row["status"] == "ok"
    assert 0 < row["kept_mib"] <= row["peak_mib"] <= row["reserved_mib"]
    assert row["step_ms_p50"] > 0
    assert "driver" in machine()[1]


def test_what_does_not_fit_is_a_row() -> None:
    worker = Worker(Case("mixer", "softmax_eager", 512**2, 1, "bf16"), "cuda")
    worker.prepare()
    assert worker.close()["status"] == "out of memory"
