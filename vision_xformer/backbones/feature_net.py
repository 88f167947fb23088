"""Models that return the maps of some of their layers, for dense prediction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from .base import VisionModel


class FeatureInfo:
    """Widths and strides of the maps that a model returns, as in timm.

    Args:
        info: a dict for each layer of the model, see ``feature_info`` of models.
        out_indices: the layers whose maps are returned; methods without an index are about these.
    """

    def __init__(self, info: list[dict[str, Any]], out_indices: Sequence[int]) -> None:
        self.info, self.out_indices = info, tuple(out_indices)

    def __len__(self) -> int:
        return len(self.info)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.info[index]

    def get(self, key: str, idx: int | Sequence[int] | None = None) -> Any:
        """The entry ``key`` of a layer, or a list of those of several; None for the returned ones.

        Raises:
            KeyError: for an unknown entry.
            IndexError: for a layer that the model does not have.
        """
        if isinstance(idx, int):
            return self.info[idx][key]
        return [self.info[i][key] for i in (self.out_indices if idx is None else idx)]

    def channels(self, idx: int | Sequence[int] | None = None) -> Any:
        """The width of each map, or of the layer ``idx``."""
        return self.get("num_chs", idx)

    def reduction(self, idx: int | Sequence[int] | None = None) -> Any:
        """The pixels per cell of each map, or of that of the layer ``idx``."""
        return self.get("reduction", idx)

    def module_name(self, idx: int | Sequence[int] | None = None) -> Any:
        """The layer that each map comes from, or the name of the layer ``idx``."""
        return self.get("module", idx)

    def get_dicts(self, keys: Sequence[str] | None = None) -> list[dict[str, Any]]:
        """A dict for each map, with "num_chs", "reduction", "module" and "index", or ``keys``."""
        entries = [self.info[i] for i in self.out_indices]
        return [{key: entry[key] for key in keys or entry} for entry in entries]


class FeatureNet(nn.Module):
    """Maps of some layers of a model: (B, C, *shape) -> list of (B, D, *grid).

    Args:
        model: the model; it is pruned in place to the layers that the maps need.
        out_indices: which layers, as for ``indices`` of ``forward_intermediates``.

    Attributes:
        feature_info: widths and strides of the maps.

    Raises:
        ValueError: for an index out of range.
    """

    def __init__(self, model: VisionModel, out_indices: int | Sequence[int] | None = None) -> None:
        super().__init__()
        self.out_indices = model.prune_intermediate_layers(out_indices, prune_norm=True)
        self.model = model
        self.feature_info = FeatureInfo(model.feature_info, self.out_indices)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Compute the maps: (B, C, *shape) -> list of (B, D, *grid)."""
        found = self.model.forward_intermediates(x, self.out_indices, intermediates_only=True)
        assert isinstance(found, list)
        return found

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Store only the inputs of the blocks for the backward pass, see the model's method."""
        self.model.set_grad_checkpointing(enable)
