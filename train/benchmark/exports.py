"""Inference time of models in onnxruntime, and in eager and compiled PyTorch."""

from __future__ import annotations

import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

import vision_xformer as vx

from .rows import Row, revision

COLUMNS = (
    "name", "size", "batch", "status", "difference", "eager_ms", "compiled_ms", "onnx_ms",
    "revision",
)  # fmt: skip
METHOD = (
    "inference in float32 at the image size of each name; medians of 5 interleaved turns of at",
    "least 3 calls and 0.2 s; onnxruntime uses as many threads as PyTorch; difference: the largest",
    "between the logits of the ONNX file and of the model, on random images",
)
TURNS, CALLS, SECONDS = 5, 3, 0.2


def models(patterns: Sequence[str]) -> list[str]:
    """List the names that match patterns.

    Raises:
        ValueError: if a pattern matches no model.
    """
    for pattern in patterns:
        if not vx.list_models(pattern):
            raise ValueError(f"--names {pattern}: no model matches")
    return list(dict.fromkeys(n for pattern in patterns for n in vx.list_models(pattern)))


def measure_exports(names: Sequence[str], batch: int) -> Iterator[Row]:
    """Yield a row for each model; if it cannot be exported or compiled, the status says why.

    Args:
        names: names of models.
        batch: batch size.
    """
    for name in names:
        torch.manual_seed(0)
        torch._dynamo.reset()
        model = vx.create_model(name).eval()
        row: Row = {"name": name, "size": model.config.input_shape[-1], "batch": batch}
        images = torch.randn(batch, *model.config.input_shape)
        try:
            with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
                warnings.simplefilter("ignore")
                path = Path(folder) / "model.onnx"
                row["difference"] = vx.export_onnx(model, path)
                row |= _times(model, path, images)
            row["status"] = "ok"
        except (ValueError, RuntimeError) as error:
            row["status"] = (str(error).strip().splitlines() or [type(error).__name__])[0]
        yield row | {"revision": revision()}


@torch.no_grad()
def _times(model: vx.VisionModel, path: Path, images: torch.Tensor) -> dict[str, float]:
    """Median milliseconds of a call, by column."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    compiled, given = torch.compile(model), {"images": images.numpy()}
    calls: dict[str, Callable[[], Any]] = {
        "eager_ms": lambda: model(images),
        "compiled_ms": lambda: compiled(images),
        "onnx_ms": lambda: session.run(None, given),
    }
    found: dict[str, list[float]] = {column: [] for column in calls}
    for call in calls.values():  # compiles
        call()
    for _ in range(TURNS):
        for column, call in calls.items():
            start, count = time.perf_counter(), 0
            while count < CALLS or time.perf_counter() - start < SECONDS:
                before = time.perf_counter()
                call()
                found[column].append(1e3 * (time.perf_counter() - before))
                count += 1
    return {column: statistics.median(times) for column, times in found.items()}
