"""Benchmark cases: a single mixer or a whole model, in inference and in a training step."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vision_xformer as vx
from vision_xformer.mixers import takes_heads
from vision_xformer.names import name_to_config

from .controls import CONTROLS

HEADS, HEAD_DIM = 4, 64
DIM = HEADS * HEAD_DIM
CLASSES = 10
BASE, EAGER = "softmax", "softmax_eager"  # our baseline; the baseline of the papers
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# our mixer -> package, and the options with which both compute the same function
PAIRS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "performer": ("performer-pytorch", {"stabilizer": "package"}, {}),
    "nystrom": ("nystrom-attention", {"segments": "sequence", "landmarks": 64}, {"landmarks": 64}),
    "linformer": ("linformer-pytorch", {"rank": 64}, {"rank": 64}),
    "fourier": ("fft2", {}, {}),
}
_OPTIONS = {
    name: options
    for ours, (peer, own, theirs) in PAIRS.items()
    for name, options in ((ours, own), (peer, theirs))
}


@dataclasses.dataclass(frozen=True)
class Case:
    """Configuration that identifies a row.

    Args:
        kind: "mixer" or "model".
        name: name of the mixer or model.
        size: sequence length of a mixer, a square number; image size of a model, in pixels.
        batch: batch size.
        dtype: "fp32", or "bf16" and "fp16" with autocast.
        mode: "eager" or "compiled".
        checkpointing: whether a model's blocks are recomputed in the backward pass.
        mixer: mixer of a model; "" for the one that its name implies.
    """

    kind: str
    name: str
    size: int
    batch: int
    dtype: str = "fp32"
    mode: str = "eager"
    checkpointing: bool = False
    mixer: str = ""


@dataclasses.dataclass
class Subject:
    """A case ready to run.

    Args:
        module: the mixer or model.
        forward: forward pass with gradients; returns the output (B, N, D) or the loss.
        infer: forward pass without gradients.
        step: training step; leaves no gradients behind.
    """

    module: nn.Module
    forward: Callable[[], Tensor]
    infer: Callable[[], None]
    step: Callable[[], None]


def grid_of(tokens: int) -> vx.TokenGrid:
    """Return a square grid of ``tokens`` tokens.

    Raises:
        ValueError: if ``tokens`` is not a square number.
    """
    side = math.isqrt(tokens)
    if side * side != tokens:
        raise ValueError(f"length {tokens} must be a square number: the tokens of a square image")
    return vx.TokenGrid((side, side))


def mixer_cases(
    names: Sequence[str],
    lengths: Sequence[int],
    batch: int,
    dtype: str,
    modes: Sequence[str] = ("eager",),
) -> list[Case]:
    """List the cases of single layers, sorted by length.

    Raises:
        ValueError: if a length is not a square number.
    """
    for tokens in lengths:
        grid_of(tokens)
    return [
        Case("mixer", name, tokens, batch, dtype, mode)
        for tokens in sorted(set(lengths))
        for name in dict.fromkeys(names)
        for mode in modes
    ]


def model_cases(
    patterns: Sequence[str],
    sizes: Sequence[int],
    batch: int,
    dtype: str,
    modes: Sequence[str] = ("eager",),
    checkpointing: Sequence[bool] = (False,),
) -> list[Case]:
    """List the cases of whole models, sorted by image size.

    Models with fused softmax are measured with materialized softmax as well.

    Raises:
        ValueError: if a pattern matches no model.
    """
    for pattern in patterns:
        if not vx.list_models(pattern):
            raise ValueError(f"--names {pattern}: no model matches")
    names = [name for pattern in patterns for name in vx.list_models(pattern)]
    wanted = [
        (name, mixer)
        for name in dict.fromkeys(names)
        for mixer in (["", EAGER] if mixer_of(name) == BASE else [""])
    ]
    return [
        Case("model", name, size, batch, dtype, mode, checkpoint, mixer)
        for size in sorted(set(sizes))
        for name, mixer in wanted
        for mode in modes
        for checkpoint in checkpointing
    ]


def mixer_of(model: str) -> str:
    """Return the mixer that a model's name implies; "" if its backbone has a fixed one."""
    return str(name_to_config(model).to_dict().get("mixer", ""))


def build_mixer(name: str, tokens: int) -> vx.Mixer:
    """Build one layer of ``DIM`` channels for a square grid of ``tokens`` tokens."""
    grid = grid_of(tokens)
    if name in CONTROLS:
        return CONTROLS[name](DIM, None, grid)
    heads = HEADS if takes_heads(name) else None
    return vx.create_mixer(name, dim=DIM, heads=heads, grid=grid, **_OPTIONS.get(name, {}))


def with_weights(name: str, tokens: int) -> vx.Mixer:
    """Build a mixer as :func:`build_mixer` does, with equal weights for ours and its package."""
    torch.manual_seed(0)
    mixer = build_mixer(name, tokens)
    peer = PAIRS[name][0] if name in PAIRS else None
    if peer is not None and peer not in CONTROLS:
        vx.load_weights(mixer, with_weights(peer, tokens).state_dict())
    return mixer


def make(case: Case, batch: int) -> tuple[nn.Module, Tensor, tuple[vx.TokenGrid, ...]]:
    """Build the module of a case and a random input.

    Models take square color images and have ``CLASSES`` classes.

    Args:
        case: the case to build.
        batch: batch size of the input.

    Returns:
        The module; its input, (batch, N, D) for a mixer and (batch, C, H, W) for a model; and the
        other arguments of its forward pass.
    """
    if case.kind == "mixer":
        mixer = with_weights(case.name, case.size)
        return mixer, torch.randn(batch, case.size, DIM), (grid_of(case.size),)
    torch.manual_seed(0)
    model = vx.create_model(
        case.name, image_size=case.size, num_classes=CLASSES, mixer=case.mixer or None
    )
    return model, torch.randn(batch, *model.config.input_shape), ()


def sketch(case: Case) -> tuple[nn.Module, Tensor, tuple[vx.TokenGrid, ...]]:
    """Build the module and the input of a case as :func:`make` does, but without data."""
    with torch.device("meta"):
        if case.kind == "model":
            return make(case, 1)
        mixer = build_mixer(case.name, case.size)
        return mixer, torch.empty(1, case.size, DIM), (grid_of(case.size),)


def facts(case: Case) -> dict[str, Any]:
    """Compute the columns that need no measurement.

    Returns:
        The backbone, the number of parameters, the FLOPs of a forward pass of one sample, and the
        tokens, width and heads of the first mixer.
    """
    found: dict[str, Any] = {}

    def look(mixer: nn.Module, inputs: tuple[Any, ...]) -> None:
        if "tokens" not in found:
            found.update(tokens=inputs[0].shape[1], width=mixer.dim, heads=mixer.heads)

    module, x, rest = sketch(case)
    if isinstance(module, vx.VisionModel):
        found["backbone"] = module.config.to_dict()["backbone"]
    for part in module.modules():
        if isinstance(part, vx.Mixer):
            part.register_forward_pre_hook(look)
    found["flops"] = vx.count_flops(module, x, *rest)
    return found | {"parameters": sum(p.numel() for p in module.parameters())}


def build(case: Case, device: str) -> Subject:
    """Build a case on a device.

    Raises:
        ValueError: if the combination of name, size and mixer is invalid.
    """
    module, x, rest = make(case, case.batch)
    return ready(case, module.to(device), x.to(device), rest)


def ready(case: Case, module: nn.Module, x: Tensor, rest: tuple[vx.TokenGrid, ...] = ()) -> Subject:
    """Prepare the passes of a case, for its module and input (see :func:`make`) on one device."""
    device = x.device.type
    if case.checkpointing and isinstance(module, vx.VisionModel):
        module.set_grad_checkpointing()
    x.requires_grad_(case.kind == "mixer")
    labels = torch.randint(CLASSES, (case.batch,), device=device)
    parameters = list(module.parameters())
    optimizer = torch.optim.AdamW(parameters, fused=True) if case.kind == "model" else None
    run: Callable[..., Any] = module
    if case.mode == "compiled":
        run = torch.compile(module, dynamic=False)
    autocast = torch.autocast(
        device, DTYPES[case.dtype], enabled=case.dtype != "fp32", cache_enabled=False
    )

    def forward() -> Tensor:
        with autocast:
            y = run(x, *rest)
            return y if optimizer is None else F.cross_entropy(y, labels)

    direction: Tensor | None = None  # gradient with respect to the output

    def step() -> None:
        nonlocal direction
        y = forward()
        if direction is None:
            direction = torch.ones_like(y)
        y.backward(direction)
        if optimizer is not None:
            optimizer.step()
        for tensor in (x, *parameters):
            tensor.grad = None

    @torch.no_grad()
    def infer() -> None:
        with autocast:
            run(x, *rest)

    return Subject(module, forward, infer, step)
