"""Models on fake CUDA tensors, without a GPU: they run there, and never wait for it in between."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from matrix import PATCHES_ONLY
from test_contract import MODELS, TEST_MODELS, _is_like_another, images
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import vision_xformer as vx
from vision_xformer import TokenGrid
from vision_xformer.kernels import performer
from vision_xformer.layers import ConvNorm
from vision_xformer.memory_use import caches_kept
from vision_xformer.mixers import takes_heads

_WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2"}
HEADS = (2, 4)  # of a mixer, whose number of operators is the same with both


@pytest.fixture(autouse=True, scope="module")
def _no_fakes_left() -> Iterator[None]:
    """Caches of libraries that hold fake tensors are cleared for the tests of other files."""
    with caches_kept():
        yield


class OnTheGpu(TorchDispatchMode):
    """Counts operators, and refuses those that wait for the GPU or touch a tensor on the host."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in _WAITS, f"{name} waits for the GPU"
        out = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)]
        assert not any(x.device.type == "cpu" for x in tensors), f"{name} uses the host"
        self.names.append(name)
        return out


@contextmanager
def watched(amp: bool = False) -> Iterator[OnTheGpu]:
    before = torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", amp)  # torch.autocast would refuse without a GPU
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    try:
        with OnTheGpu() as mode:
            yield mode
    finally:
        torch.clear_autocast_cache()
        torch.set_autocast_enabled("cuda", False)
        torch.set_autocast_dtype("cuda", before)


@contextmanager
def fake() -> Iterator[None]:
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


def assert_runs(name: str) -> None:
    with torch.device("meta"):  # initialization depends on values, which fakes do not have
        model = vx.create_model(name)
    with fake():
        model = model.to_empty(device="cuda")
        x = images(model, 2)
        for amp in (False, True):
            with watched(amp):
                y = model(x)
            assert y.shape == (2, model.config.num_classes)
            assert y.device.type == "cuda"
            assert y.dtype == (torch.bfloat16 if amp else torch.float32)


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow) if _is_like_another(n) else n for n in TEST_MODELS],
)
def test_models_run_on_a_gpu_without_waiting(name: str) -> None:
    assert_runs(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(MODELS) - set(TEST_MODELS)))
def test_models_of_published_sizes_run_on_a_gpu_without_waiting(name: str) -> None:
    assert_runs(name)


@pytest.mark.parametrize("name", vx.list_mixers())
def test_mixers_run_on_a_gpu_without_a_loop_over_heads(name: str) -> None:
    grid = TokenGrid((6, 4), 0 if name in {*PATCHES_ONLY, "gmlp"} else 1)
    counts = set()
    for heads in HEADS if takes_heads(name) else [None]:
        with torch.device("meta"):
            mixer = vx.create_mixer(name, dim=16, heads=heads, grid=grid)
        with fake():
            mixer = mixer.to_empty(device="cuda")
            with watched(amp=True) as mode:
                y = mixer(torch.randn(3, grid.length, 16, device="cuda"), grid)
            assert (y.shape, y.device.type) == ((3, grid.length, 16), "cuda")
            counts.add(len(mode.names))
    assert len(counts) == 1


@pytest.mark.parametrize("form", performer._FORMS)
def test_blocks_of_performer_run_on_a_gpu(form: str) -> None:
    """The operator hides what is inside it, so the function is called by itself."""
    counts = set()
    with fake():
        for heads in (8, 32):  # 32: a batch of 8 with 4 heads
            q, k, v = (torch.randn(heads, 1024, 64, device="cuda") for _ in range(3))
            w = torch.randn(266, 64, device="cuda")
            with watched() as mode:
                found = performer._blocked._init_fn(q, k, v, w, form, 1e-4)
                performer._blocked_backward._init_fn(q, k, v, w, *found, v, form, 1e-4)
            counts.add(len(mode.names))
    assert len(counts) == 1  # the blocks are larger than on a CPU


def test_softmax_is_fused_on_a_gpu_where_it_is_not_on_a_cpu() -> None:
    """With a bias and values of another width; the GPU needs no formula of ours."""
    q, v, bias = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 16), torch.randn(3, 8, 8)
    names = {}
    for device in ("cpu", "cuda"):
        calls: list[Any] = []
        with pytest.MonkeyPatch.context() as patch, fake():
            real = torch.nn.functional.scaled_dot_product_attention
            patch.setattr(
                torch.nn.functional, "scaled_dot_product_attention",
                lambda *args, real=real, calls=calls: calls.append(1) or real(*args),
            )  # fmt: skip
            operands = [torch.empty(t.shape, device=device) for t in (q, q, v, bias)]
            vx.kernels.softmax.attend(*operands)
        names[device] = len(calls)
    assert names == {"cpu": 0, "cuda": 1}


def test_a_strided_depthwise_convolution_keeps_half_precision_on_a_gpu() -> None:
    layer = ConvNorm(2, 6, 6, 3, stride=2, groups=6).to("meta")
    with fake():
        layer = layer.to_empty(device="cuda")
        x = torch.randn(2, 6, 8, 8, device="cuda", requires_grad=True)
        seen: list[torch.dtype] = []
        layer.conv.register_forward_hook(lambda module, args, y: seen.append(y.dtype))
        with watched(amp=True):
            layer(x)
    assert seen == [torch.bfloat16]


_REFUSED: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda x: x.sum().item(),
    "condition": lambda x: bool((x > 0).any()),
    "list": lambda x: x[0].tolist(),
    "nonzero": lambda x: x.nonzero(),
    "mask": lambda x: x[x > 0],
    "host": lambda x: x.cpu(),
    "number from the host": lambda x: x + torch.tensor([1.0, 2.0], device="cuda"),
    "tensor from the host": lambda x: x + torch.ones(2).to("cuda"),
}


@pytest.mark.parametrize("name", _REFUSED)
def test_what_waits_for_the_gpu_is_found(name: str) -> None:
    with fake():
        x = torch.empty(2, 2, device="cuda")
        with watched():
            x + 1
        with (
            pytest.raises(
                (AssertionError, DynamicOutputShapeException),
                match=r"waits for the GPU|uses the host|nonzero",
            ),
            watched(),
        ):
            _REFUSED[name](x)


def test_a_loop_over_heads_is_found() -> None:
    counts = set()
    with fake():
        for heads in HEADS:
            with watched() as mode:
                for x in torch.empty(heads, 3, device="cuda"):
                    x.exp()
            counts.add(len(mode.names))
    assert len(counts) == 2


def test_fake_tensors_leave_nothing_behind() -> None:
    """Such as in a cache of a library: real models run afterwards."""
    for name in ("vin_test_rope", "vip_test", "levit_test"):
        assert_runs(name)
        model = vx.create_model(name)
        y = model(images(model, 2))
        assert not isinstance(y, FakeTensor)
        assert y.isfinite().all()
