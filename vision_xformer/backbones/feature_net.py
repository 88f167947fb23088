"""Models that return the maps of some of their layers, for dense prediction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from .base import VisionModel


class FeatureInfo:
    """Widths and strides of the maps that a model returns, as in timm.

    Args:
        info: a dict for each map, see ``feature_info`` of models.
    """

    def __init__(self, info: list[dict[str, Any]]) -> None:
        self.info = info

    def channels(self) -> list[int]:
        """The width of each map."""
        return [entry["num_chs"] for entry in self.info]

    def reduction(self) -> list[int]:
        """The pixels per cell of each map."""
        return [entry["reduction"] for entry in self.info]

    def module_name(self) -> list[str]:
        """The layer that each map comes from."""
        return [entry["module"] for entry in self.info]

    def get_dicts(self) -> list[dict[str, Any]]:
        """A dict for each map, with "num_chs", "reduction", "module" and "index"."""
        return [dict(entry) for entry in self.info]


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
        self.feature_info = FeatureInfo([model.feature_info[i] for i in self.out_indices])

    def forward(self, x: Tensor) -> list[Tensor]:
        """Compute the maps: (B, C, *shape) -> list of (B, D, *grid)."""
        found = self.model.forward_intermediates(x, self.out_indices, intermediates_only=True)
        assert isinstance(found, list)
        return found
