"""Report of a conversion: what was converted, and its cost per attention layer."""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from ..flops import count_flops
from ..grid import TokenGrid
from ..kernels import KERNELS, Kernel, Site
from ..kernels.softmax import Softmax
from ..memory_use import bytes_kept
from ..summary import text_table

TOKENS = (64, 128, 256, 512, 1024, 2048, 4096)
_ROUNDS = 7


@dataclasses.dataclass(frozen=True)
class Row:
    """One attention layer.

    Attributes:
        name: of the layer in the model.
        layer: its class.
        status: the kernel, "kept", or "refused: " with the reason.
        tokens: tokens of an image, N.
        flops: floating-point operations of softmax and of the kernel, for one image.
        kept: bytes that softmax and the kernel store for the backward pass, for one image.
    """

    name: str
    layer: str
    status: str
    tokens: int = 0
    flops: tuple[int, int] | None = None
    kept: tuple[int, int] | None = None


@dataclasses.dataclass(frozen=True)
class BreakEven:
    """Times of softmax and a kernel on this machine; ``print`` shows them with a conclusion.

    Attributes:
        mixer: the kernel.
        tokens: number of tokens N of the converted model.
        rows: (tokens, seconds of softmax, seconds of the kernel) for a forward and backward pass of
            one image.
    """

    mixer: str
    tokens: int
    rows: list[tuple[int, float, float]]

    @property
    def first(self) -> int | None:
        """The smallest measured number of tokens from which the kernel is always faster."""
        slower = [i for i, (_, softmax, kernel) in enumerate(self.rows) if kernel >= softmax]
        rest = self.rows[slower[-1] + 1 :] if slower else self.rows
        return rest[0][0] if rest else None

    def __str__(self) -> str:
        head = ["tokens", "softmax, ms", f"{self.mixer}, ms"]
        body = [[str(n), f"{a * 1e3:.2f}", f"{b * 1e3:.2f}"] for n, a, b in self.rows]
        if self.first is None:
            verdict = f"{self.mixer} is not faster than softmax at any of these lengths"
        else:
            verdict = f"{self.mixer} is faster than softmax from {self.first} tokens on"
        advice = "worth it" if self.first and self.first <= self.tokens else "not worth it"
        lines = f"{verdict}; this model has {self.tokens}: a conversion for speed is {advice}"
        return f"{text_table([head, *body])}\n{lines} on this machine"


@dataclasses.dataclass(frozen=True)
class Report:
    """The report of a conversion; ``print`` shows it as a table.

    Attributes:
        mixer: the kernel.
        options: its options.
        rows: one for each attention layer.
        site: heads, widths and grid of the first converted layer.
    """

    mixer: str
    options: dict[str, Any]
    rows: list[Row]
    site: Site

    @property
    def converted(self) -> list[str]:
        """The names of the converted layers."""
        return [row.name for row in self.rows if row.flops is not None]

    def break_even(
        self, tokens: Sequence[int] = TOKENS, device: torch.device | str = "cpu"
    ) -> BreakEven:
        """Measure the number of tokens from which the kernel is faster than softmax.

        The time is the median of seven forward and backward passes on one image, in which softmax
        and the kernel alternate.

        Args:
            tokens: numbers of tokens to measure, in ascending order.
            device: where to measure.
        """
        rows = []
        for count in tokens:
            grid = _square(count)
            site = self.site._replace(queries=grid, keys=grid)
            with torch.device(device):
                pair = Softmax(site), KERNELS.create(self.mixer, site, options=self.options)
            times = _alternating(pair, site, torch.device(device))
            rows.append((count, *times))
        return BreakEven(self.mixer, self.site.queries.length, rows)

    def __str__(self) -> str:
        head = ["layer", "class", "kernel", "tokens", "MFLOPs", "KiB kept"]
        body = [head]
        for row in self.rows:
            flops = "" if row.flops is None else _arrow(row.flops, 1e6)
            kept = "" if row.kept is None else _arrow(row.kept, 2**10)
            tokens = str(row.tokens) if row.tokens else ""
            body.append([row.name, row.layer, row.status, tokens, flops, kept])
        return text_table(body)


def _arrow(values: tuple[int, int], unit: float) -> str:
    before, after = (f"{value / unit:,.1f}" for value in values)
    return f"{before} -> {after}"


def _square(count: int) -> TokenGrid:
    """Return the grid with ``count`` tokens that is closest to a square."""
    side = next(s for s in range(math.isqrt(count), 0, -1) if count % s == 0)
    return TokenGrid((side, count // side))


def _alternating(
    kernels: tuple[Kernel, Kernel], site: Site, device: torch.device
) -> tuple[float, float]:
    """Measure seconds of a forward and backward pass of two kernels on one image."""
    shape = (1, site.heads, site.queries.length)
    widths = (site.key_dim, site.key_dim, site.value_dim)
    operands = [torch.randn(*shape, w, device=device, requires_grad=True) for w in widths]
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(_ROUNDS + 1):
        for kernel, found in zip(kernels, times, strict=True):
            _synchronize(device)
            start = time.perf_counter()
            kernel(*operands, site.queries, site.keys).sum().backward()
            _synchronize(device)
            found.append(time.perf_counter() - start)
    softmax, other = (statistics.median(found[1:]) for found in times)
    return softmax, other


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure_layer(name: str, layer: str, status: str, kernel: Kernel, like: Tensor) -> Row:
    """Return the row of a converted layer, with the cost of softmax and of its kernel.

    Args:
        name: of the layer in the model.
        layer: its class.
        status: the kernel.
        kernel: of the layer.
        like: a parameter of the layer, of any shape, with its device and dtype.
    """
    flops, kept = zip(*(_cost(k, like) for k in (Softmax(kernel.site), kernel)), strict=True)
    return Row(name, layer, status, kernel.site.queries.length, flops, kept)


def _cost(kernel: Kernel, like: Tensor) -> tuple[int, int]:
    """Count FLOPs and bytes stored for the backward pass of one image, without computing it."""
    heads, key_dim, value_dim, queries, keys = kernel.site
    with FakeTensorMode(allow_non_fake_inputs=True):
        q, k, v = (
            like.new_empty(1, heads, grid.length, width, requires_grad=True)
            for grid, width in ((queries, key_dim), (keys, key_dim), (keys, value_dim))
        )
        operands = (q, k, v, queries, keys)
        return count_flops(kernel, *operands), bytes_kept(kernel, lambda: kernel(*operands))
