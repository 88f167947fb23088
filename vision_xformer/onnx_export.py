"""Export models to ONNX, and compare each file with its model before it is kept."""

from __future__ import annotations

import contextlib
import copy
import importlib
import itertools
import json
import logging
import operator
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .backbones import VisionModel
from .backbones.publishing import published
from .kernels import Kernel
from .mixers import Mixer
from .mixers.attention import Attention
from .modes import check_values, unwrapped
from .options import check_types
from .stems.base import check_input_shape
from .weights.files import check_target, replacing

_LIMIT = 2**31  # largest protobuf file in bytes
_TOLERANCE, _HALF_TOLERANCE = 1e-4, 3e-2  # of the largest logit, or of 1 if that is larger


def export_onnx(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    half: bool = False,
    batch_size: int | None = None,
    input_shape: Sequence[int] | None = None,
    dynamic_size: bool = False,
) -> float:
    """Export a model in evaluation mode to an ONNX file, (B, C, *shape) -> (B, num_classes).

    The file is run by onnxruntime on random images, of two batch sizes unless ``batch_size`` fixes
    one, and compared with the model in float32 before it replaces ``path``. Its input is
    "images", its output "logits"; its metadata contains "mean", "std" and "label_names" if the
    model's ``pretrained_cfg`` has them. The model itself is not changed.

    Args:
        model: a model of :func:`create_model`, converted or not, or another module on images.
        path: the file to write, ``*.onnx``.
        half: store weights and activations in float16. Token mixing, where sums over many tokens
            may overflow, is computed in float32; linear layers, convolutions and MLPs in float16.
        batch_size: the only batch size that the file accepts; None for any.
        input_shape: (C, *shape) of an image; by default that of the model's configuration, which
            modules of other libraries do not have.
        dynamic_size: whether the file accepts images of other sizes, as a model built with
            ``dynamic_size=True`` does.

    Returns:
        The largest absolute difference between the logits of the file and of the model.

    Raises:
        ValueError: for a missing package, an invalid path, a model that cannot be exported, or a
            file whose logits differ by more than 1e-4 (``half``: 3e-2) of the largest logit, or of
            1 if that is larger.
        OSError: if the file cannot be written.
    """
    _require("onnx", "onnxscript", "onnxruntime")
    flags = {"half": half, "dynamic_size": dynamic_size}
    check_types({"batch_size": batch_size, **flags}, export_onnx)
    model = unwrapped(model)
    check_values(model, _name(model))
    path, shape = Path(path), _shape_of(model, input_shape)
    if path.suffix != ".onnx":
        raise ValueError(f"{path} must end in .onnx")
    check_target(path)
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size {batch_size} must be at least 1, or None for any")
    if dynamic_size and not getattr(getattr(model, "config", None), "dynamic_size", False):
        raise ValueError(
            "dynamic_size needs a model for all image sizes: create_model(..., dynamic_size=True)"
        )
    reference = copy.deepcopy(model).eval().requires_grad_(False).to("cpu", torch.float32)
    size = sum(t.nbytes for t in reference.state_dict().values()) // (2 if half else 1)
    if size >= _LIMIT:
        raise ValueError(
            f"the weights have {size:,} bytes, and an ONNX file holds less than {_LIMIT:,}"
        )
    exported = in_half(copy.deepcopy(reference)) if half else reference
    dtype = torch.float16 if half else torch.float32
    metadata = _metadata(model, shape[0])
    program = _program(exported, shape, dtype, batch_size, dynamic_size)
    program.model.metadata_props.update(metadata)
    with replacing(path) as part:
        program.save(part, external_data=False)
        shapes = [(n, *shape) for n in ((2, 5) if batch_size is None else (batch_size,))]
        if dynamic_size:
            shapes += [(shapes[0][0], *_other_size(shape, 3, 2))]
        difference, largest = _compare(part, reference, shapes, half)
        if not difference <= (_HALF_TOLERANCE if half else _TOLERANCE) * max(1.0, largest):
            raise ValueError(
                f"the ONNX file of {_name(model)} differs from the model by {difference:.2g}, with "
                f"logits up to {largest:.2g}{': leave out half' if half else ''}; it is not kept"
            )
    return difference


def in_half(model: nn.Module) -> nn.Module:
    """Cast a model to float16 in place, except the token mixing, which casts to float32 and back.

    A kernel is computed in float32 from the projected queries, keys and values on, any other
    mixer as a whole.
    """
    model.half()
    inside: set[nn.Module] = set()  # of a mixer that contains others
    for module in model.modules():
        if module not in inside and (
            isinstance(module, Kernel)
            or (isinstance(module, Mixer) and not isinstance(module, Attention))
        ):
            inside |= set(module.modules())
            module.float()
            module.register_forward_pre_hook(_widen, with_kwargs=True)
            module.register_forward_hook(lambda module, inputs, output: output.half())
    return model


def _widen(module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
    def wide(value: Any) -> Any:
        floating = isinstance(value, Tensor) and value.is_floating_point()
        return value.float() if floating else value

    return tuple(map(wide, args)), {name: wide(value) for name, value in kwargs.items()}


def _program(
    model: nn.Module,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    batch_size: int | None,
    dynamic_size: bool,
) -> torch.onnx.ONNXProgram:
    """Export a model for images of a shape (C, *shape)."""
    axes: dict[int, Any] = {} if batch_size is not None else {0: torch.export.Dim("batch")}
    if dynamic_size:
        axes |= dict.fromkeys(range(2, len(shape) + 1), torch.export.Dim.DYNAMIC)
        shape = _other_size(shape, 2, 3)  # at its own size, a model skips the interpolation
    dynamic = (axes,) if axes else None
    images = torch.zeros(batch_size or 2, *shape, dtype=dtype, device="cpu")
    try:
        with _quiet():
            program = torch.onnx.export(
                model, (images,), dynamo=True, dynamic_shapes=dynamic, verbose=False,
                input_names=["images"], output_names=["logits"],
            )  # fmt: skip
    except torch.onnx.OnnxExporterError as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        reason = (str(cause).strip().splitlines() or [type(cause).__name__])[0]
        raise ValueError(f"{_name(model)} cannot be exported to ONNX: {reason}") from error
    assert program is not None
    return program


def _other_size(shape: tuple[int, ...], *factors: int) -> tuple[int, ...]:
    """An image (C, *shape) with axes that are multiples of these, by the factors in turn."""
    channels, *sizes = shape
    return channels, *(s * f for s, f in zip(sizes, itertools.cycle(factors), strict=False))


def _compare(
    path: Path, model: nn.Module, shapes: Sequence[Sequence[int]], half: bool
) -> tuple[float, float]:
    """The largest difference of the logits of a file and a model, and the largest logit."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # an error is raised as well
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has no common base of its errors
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"the ONNX file of {_name(model)} cannot be loaded: {reason}; it is not kept"
        ) from error
    generator, difference, largest = torch.Generator().manual_seed(0), 0.0, 0.0
    for shape in shapes:
        images = torch.randn(*shape, generator=generator, device="cpu")
        with torch.no_grad():
            logits = model(images)
        if not isinstance(logits, Tensor):
            raise ValueError(
                f"{_name(model)} must return a tensor of logits, not a {type(logits).__name__}"
            )
        given = (images.half() if half else images).numpy()
        try:
            [found] = session.run(None, {"images": given})
        except Exception as error:
            size = "x".join(map(str, shape[2:]))
            raise ValueError(
                f"the ONNX file of {_name(model)} does not run on images of {size} pixels: "
                "the exporter fixed their size; it is not kept"
            ) from error
        gap = (torch.from_numpy(found).float() - logits).abs().max()
        if not gap.isfinite():
            return float("nan"), float(logits.abs().max())
        difference = max(difference, float(gap))
        largest = max(largest, float(logits.abs().max()))
    return difference, largest


def _shape_of(model: nn.Module, given: Sequence[int] | None) -> tuple[int, ...]:
    if given is not None:
        try:
            shape = tuple(operator.index(size) for size in given)
        except TypeError:
            raise ValueError(
                f"input_shape {given!r} must be whole numbers, such as (3, 224, 224)"
            ) from None
        check_input_shape(shape)
        return shape
    if isinstance(model, VisionModel):
        return model.config.input_shape
    raise ValueError(
        f"{type(model).__name__} does not state the shape of its images: give input_shape, "
        "such as (3, 224, 224)"
    )


def _name(model: nn.Module) -> str:
    mixer = getattr(getattr(model, "config", None), "mixer", "")
    return type(model).__name__ + (f" with mixer {mixer!r}" if mixer else "")


def _metadata(model: nn.Module, channels: int) -> dict[str, str]:
    known: Any = getattr(model, "pretrained_cfg", {})
    return {key: json.dumps(value) for key, value in published(known, channels).items()}


def _require(*packages: str) -> None:
    for package in packages:
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise ValueError(
                f"ONNX export needs the package {package}: pip install {' '.join(packages)}"
            ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's notes on every constant that it does not fold."""
    logger = logging.getLogger("onnxscript")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
