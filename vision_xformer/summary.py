"""Text summary of a model, and tables of text."""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def _shapes(model: nn.Module, sample: Tensor) -> dict[str, tuple[int, ...]]:
    """Output shape of each module that returns a tensor for ``sample``, by name."""
    shapes: dict[str, tuple[int, ...]] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                shapes[name] = tuple(output.shape)

        return hook

    hooks = [m.register_forward_hook(keep(name)) for name, m in model.named_modules()]
    modes = {module: module.training for module in model.modules()}
    try:
        with torch.no_grad():
            model.eval()(sample)
    finally:
        for module, training in modes.items():
            module.training = training
        for hook in hooks:
            hook.remove()
    return shapes


def summary(model: nn.Module, sample: Tensor, depth: int) -> str:
    """A table of modules with parameters down to ``depth``: type, output shape, parameters.

    Deeper modules are counted in their parents. ``sample`` is a batch of one, (1, C, *shape).
    """
    shapes = _shapes(model, sample)
    rows = [("module", "type", "output", "parameters")]

    def visit(name: str, module: nn.Module, level: int) -> None:
        label = "  " * level + (name.rpartition(".")[2] or "(model)")
        shape = str(shapes[name]) if name in shapes else ""
        rows.append((label, type(module).__name__, shape, f"{_count(module):,}"))
        if level >= depth:
            return
        for key, parameter in module.named_parameters(recurse=False):
            size = f"{parameter.numel():,}"
            rows.append(("  " * (level + 1) + key, "Parameter", str(tuple(parameter.shape)), size))
        for key, child in module.named_children():
            if _count(child):
                visit(f"{name}.{key}" if name else key, child, level + 1)

    visit("", model, 0)
    head, *body = text_table(rows, right={3}).splitlines()
    return "\n".join((head, "-" * len(head), *body))


def text_table(rows: Sequence[Sequence[str]], right: Container[int] = ()) -> str:
    """Align the columns of a table for a terminal.

    Args:
        rows: cells of each line.
        right: indices of the columns that are aligned on the right.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        [
            c.rjust(w) if i in right else c.ljust(w)
            for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ]
        for row in rows
    )
    return "\n".join("  ".join(cells).rstrip() for cells in lines)


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
