"""Parameters whose gradient is zero in theory, and why.

In floating point, such a gradient is rounding noise, which differs between machines. The parameters
are therefore listed here, and a test compares the list with gradients in float64, in which noise
and gradients are far apart. Every other parameter must have a gradient above rounding.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator

import torch
from torch import nn

from vision_xformer import KERNELS
from vision_xformer.layers import LayerScale

NOISE = 1e-13  # relative to the largest gradient of the module, in float64
KEYS_UNDER_SOFTMAX = ("softmax", "softmax_eager", "talking_heads", "nystrom", "efficient", "agent")
SHIFTED_KEYS = (*KEYS_UNDER_SOFTMAX, "inline")  # which subtracts the mean of the products


def silent(module: nn.Module) -> Iterator[tuple[str, str]]:
    """Yield patterns of the parameters whose gradient is zero, each with the reason."""
    config = getattr(module, "config", None)
    c = {} if config is None else {**vars(config), "backbone": config.backbone}
    mixer, backbone = c.get("mixer"), c.get("backbone")

    why = "a softmax cancels what is added to all of its logits"
    yield "pool.attention.bias", f"{why}; in the weights of CCT"
    yield "*kernel.before.bias", f"{why}; in the weights of CaiT"
    yield "*.position_bias.layers.9.bias", f"{why}; in the weights of CrossFormer"
    if mixer in SHIFTED_KEYS and c.get("rope") is None:
        yield "*.projection.k.bias", f"{why}; rotary angles differ between them"

    if backbone == "cvt":
        # The class token bypasses the convolutions, so a bias there is not added to all tokens.
        alike = [f"stages.{i}.*" for i in range(len(c["dims"]) - c["class_token"])]
        if mixer == "external":
            yield from ((f"{stage}.mixer.conv.norm.bias", why) for stage in alike)
        if mixer in SHIFTED_KEYS and c["rope"] is None:
            yield from ((f"{stage}.projection.convs.1.norm.bias", why) for stage in alike)
        pools_queries = mixer in KERNELS and not KERNELS[mixer].supports_single_query
        if c["class_token"] and not pools_queries:
            last = f"stages.{len(c['dims']) - 1}.{c['depths'][-1] - 1}"
            only = "only the class token is read, and its query bypasses the convolution"
            yield f"{last}.mixer.projection.convs.0.*", only
    elif backbone != "levit" and mixer == "external":
        for block in ("blocks.?", "stages.?.?", "stages.?.branches.?.?"):
            yield f"{block}.norm1.bias", f"{why}, here over tokens"

    scales = [m.gamma for m in module.modules() if isinstance(m, LayerScale)]
    if mixer == "mlp" and all((gamma == gamma[0]).all() for gamma in scales):
        one = "layer norms cancel what is added to all channels; in the weights of MLP-Mixer"
        yield "blocks.*.mixer.fc2.bias", one
    unread = (c.get("registers") or c.get("class_token")) and not c.get("pool_include_prefix")
    if mixer == "fourier" and backbone == "vit" and c["pool"] in ("mean", "seq") and unread:
        first = "the transform of a constant is in the first token, which the pool leaves out"
        yield f"blocks.{c['depth'] - 1}.norm1.bias", first

    if mixer == "ttt" and backbone == "vit" and c["pool"] == "cls":
        only = "only the class token is read, and it bypasses the convolution"
        yield f"blocks.{c['depth'] - 1}.mixer.conv.weight", only

    if backbone == "levit" and module.training:
        after = "the following batch norms cancel it in training; in the weights of LeViT"
        last = f"stages.{len(c['dims']) - 1}.{c['depths'][-1] - 1}"
        if mixer == "fourier":  # which moves it to the first token
            blocks = last
        else:
            blocks = "stages.*"
            yield f"stem.convs.{c['stem_layers'] - 1}.norm.bias", after
        yield f"{blocks}.mixer.proj.1.norm.bias", after
        yield f"{blocks}.mlp.2.norm.bias", after


# In CrossFormer: a ReLU unit that is active for all offsets, or for none, only adds a constant.
SOMETIMES_SILENT = ("*.position_bias.layers.7.bias",)


def without_influence(module: nn.Module) -> set[str]:
    """Return the names of parameters that cannot change the output, in the module's mode."""
    names = [name for name, _ in module.named_parameters()]
    return {name for pattern, _ in silent(module) for name in fnmatch.filter(names, pattern)}


def assert_all_learn(module: nn.Module) -> None:
    """Assert that every gradient is finite, and above rounding unless the parameter is listed."""
    gradients = {name: parameter.grad for name, parameter in module.named_parameters()}
    listed, scale = without_influence(module), 0.0
    for name, gradient in gradients.items():
        assert gradient is not None, f"{name} has no gradient"
        assert gradient.isfinite().all(), f"the gradient of {name} is not finite"
        assert gradient.dtype == torch.float64, "only float64 tells small gradients from rounding"
        scale = max(scale, float(gradient.abs().max()))
    for name, gradient in gradients.items():
        if any(fnmatch.fnmatch(name, pattern) for pattern in SOMETIMES_SILENT):
            continue
        size = float(gradient.abs().max())
        if name in listed:
            assert size <= NOISE * scale, f"{name} is listed as silent but has a gradient"
        else:
            assert size > NOISE * scale, f"the gradient of {name} is zero up to rounding"


@torch.no_grad()
def shake(module: nn.Module, std: float = 0.3) -> None:
    """Add noise to all parameters, so that no branch is zero and no gradient is small by design."""
    for parameter in module.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=std)
