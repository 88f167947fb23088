"""What a conversion did and what it costs: a row for each attention layer."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from ..flops import count_flops
from ..kernels import Kernel
from ..kernels.softmax import Softmax


@dataclasses.dataclass(frozen=True)
class Row:
    """One attention layer.

    Attributes:
        name: of the layer in the model.
        layer: its class.
        status: the kernel, "kept", or "refused: " with the reason.
        tokens: tokens of an image, N.
        flops: floating-point operations of softmax and of the kernel, for one image.
        kept: bytes that softmax and the kernel keep for the backward pass, for one image.
    """

    name: str
    layer: str
    status: str
    tokens: int = 0
    flops: tuple[int, int] | None = None
    kept: tuple[int, int] | None = None


@dataclasses.dataclass(frozen=True)
class Report:
    """The report of a conversion; ``print`` shows it as a table.

    Attributes:
        mixer: the kernel.
        options: its options.
        rows: one for each attention layer.
    """

    mixer: str
    options: dict[str, Any]
    rows: list[Row]

    @property
    def converted(self) -> list[str]:
        """The names of the converted layers."""
        return [row.name for row in self.rows if row.flops is not None]

    def __str__(self) -> str:
        head = ["layer", "class", "kernel", "tokens", "MFLOPs", "KiB kept"]
        body = [head]
        for row in self.rows:
            flops = "" if row.flops is None else _arrow(row.flops, 1e6)
            kept = "" if row.kept is None else _arrow(row.kept, 2**10)
            tokens = str(row.tokens) if row.tokens else ""
            body.append([row.name, row.layer, row.status, tokens, flops, kept])
        return _table(body)


def _table(rows: list[list[str]]) -> str:
    """Rows of text with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
    return "\n".join(lines)


def _arrow(values: tuple[int, int], unit: float) -> str:
    before, after = (f"{value / unit:,.1f}" for value in values)
    return f"{before} -> {after}"


def measure_layer(name: str, layer: str, mixer: str, kernel: Kernel) -> Row:
    """The row of a converted layer: what softmax and its kernel cost for one image."""
    weight = next(kernel.parameters(), next(kernel.buffers(), torch.empty(0)))
    flops, kept = zip(*(_cost(k, weight) for k in (Softmax(kernel.site), kernel)), strict=True)
    return Row(name, layer, mixer, kernel.site.queries.length, flops, kept)


def _cost(kernel: Kernel, like: Tensor) -> tuple[int, int]:
    """Operations, and bytes kept for the backward pass, of one image; nothing is computed."""
    heads, key_dim, value_dim, queries, keys = kernel.site
    with FakeTensorMode(allow_non_fake_inputs=True):
        q, k, v = (
            like.new_empty(1, heads, grid.length, width, requires_grad=True)
            for grid, width in ((queries, key_dim), (keys, key_dim), (keys, value_dim))
        )
        operands = (q, k, v, queries, keys)
        return count_flops(kernel, *operands), _bytes_kept(kernel, operands)


def _bytes_kept(kernel: Kernel, operands: tuple[Any, ...]) -> int:
    """Bytes of all storages that autograd holds, queries, keys and values included."""
    held: dict[int, int] = {}
    alive: list[Tensor] = []  # so that no address is reused

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        held[storage._cdata] = storage.nbytes()
        alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        kernel(*operands)
    own = {t.untyped_storage()._cdata for t in (*kernel.parameters(), *kernel.buffers())}
    return sum(size for storage, size in held.items() if storage not in own)
