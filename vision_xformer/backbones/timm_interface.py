"""The interface of timm's models: the head, the size of the input, features, parameter groups."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ..grid import TokenGrid
from ..options import check_types
from .resizing import resize_in_place

OutputFormat = Literal["NCHW", "NLC"]
_TABLE = re.compile(
    r"(^|\.)(cls_token|reg_token|(position|position_bias)(\.table)?\.(grid|prefix))$"
)


class Feature(NamedTuple):
    """The tokens after a layer, or those of one of its branches.

    Args:
        module: name of the layer, such as "blocks.3" or "stages.1".
        layer: its index.
        dim: width D of the tokens.
        reduction: pixels per token, the largest of the axes.
        norm: final norm of the model; None if its width is that of a later stage.
        branch: index of the branch, if the layer has several.
    """

    module: str
    layer: int
    dim: int
    reduction: int
    norm: nn.Module | None
    branch: int | None = None

    def of(self, x: Any, grid: Any) -> tuple[Tensor, TokenGrid]:
        """Select the tokens and grid of the branch from those of the layer."""
        return (x, grid) if self.branch is None else (x[self.branch], grid[self.branch])


class TimmInterface(nn.Module):
    """What timm expects of a model, in terms of its stages: ``blocks``, one of them, or ``stages``.

    Attributes:
        num_features: width of the pooled features.
        head: the classifier.
        pooled_by: how the tokens are pooled, "avg" or "token", in timm's words.
    """

    config: Any
    pooled_by: str = "avg"
    blocks: Any
    stages: Any
    norm: nn.Module
    num_features: int
    head: nn.Module
    embed: Callable[[Tensor], tuple[Any, Any]]
    finish: Callable[[Any, Any], Tensor]
    make_head: Callable[[int], nn.Module]

    @property
    def num_classes(self) -> int:
        """Number of classes of the head."""
        return self.config.num_classes

    @property
    def head_hidden_size(self) -> int:
        """Width of the pooled features, under timm's name."""
        return self.num_features

    def drop_head(self) -> None:
        """Remove the classifier and the layers that only it uses."""
        self.reset_classifier(0, "")

    def get_classifier(self) -> nn.Module:
        """Return the classifier head, as timm's models do."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head with a new one for ``num_classes``; 0 returns the pooled features.

        Args:
            num_classes: number of classes.
            global_pool: "", with 0 classes, to return the final tokens (B, N, D) without pooling;
                "avg" or "token" to pool them, of which only ViT supports both; None to keep it.

        Raises:
            ValueError: for another ``global_pool``, "" with classes, or a value of another type.
        """
        given = {"num_classes": num_classes, "global_pool": global_pool}
        check_types(given, TimmInterface.reset_classifier)
        if global_pool and global_pool != self.pooled_by:
            raise ValueError(
                f"{type(self).__name__} pools in one way: global_pool {global_pool!r} must be "
                f"{self.pooled_by!r}, None, or '' for no pooling"
            )
        keeps = global_pool is None and (num_classes > 0 or self.config.global_pool)
        pooled = bool(global_pool) or keeps
        self.config = dataclasses.replace(self.config, num_classes=num_classes, global_pool=pooled)
        reference = next(self.parameters())
        self.head = self.make_head(num_classes).to(reference).train(self.training)

    def set_input_size(
        self,
        img_size: int | tuple[int, ...] | None = None,
        patch_size: int | tuple[int, ...] | None = None,
    ) -> None:
        """Change the size of the input in place, as timm's models do.

        Tables of tokens are interpolated as by ``load_weights(..., resize=True)``, and the patch
        embedding is resampled. These become new parameters, so create the optimizer afterwards;
        all other parameters stay the same.

        Args:
            img_size: pixels, one size or one for each axis; None keeps it.
            patch_size: pixels per token, one size or one for each axis; None keeps it.

        Raises:
            ValueError: for a size that does not fit, or a model whose layers have been replaced.
                The model is left untouched.
        """
        check_types({"img_size": img_size, "patch_size": patch_size}, TimmInterface.set_input_size)
        channels, *shape = self.config.input_shape
        size = tuple(shape) if img_size is None else img_size
        size = (size,) * len(shape) if isinstance(size, int) else tuple(size)
        if len(size) != len(shape):
            raise ValueError(f"img_size {img_size} must be one size, or one for each of {shape}")
        changes: dict[str, Any] = {"input_shape": (channels, *size)}
        if patch_size is not None:
            if not hasattr(self.config, "patch_size"):
                raise ValueError(f"{type(self).__name__} has no patch_size that could be changed")
            changes["patch_size"] = patch_size
        config = dataclasses.replace(self.config, **changes)
        with torch.device("meta"):
            before, after = type(self)(self.config), type(self)(config)
        resize_in_place(self, before, after)

    def no_weight_decay(self) -> set[str]:
        """Return the names of tokens and of tables of positions, which should not decay.

        Parameters with a single axis, such as biases, are not named: timm never lets them decay.
        """
        return {name for name, _ in self.named_parameters() if _TABLE.search(name)}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return patterns that group parameter names by depth, for timm's layer-wise decay.

        Stem, tokens and positions form the lowest layer, each block is a layer, and the head is the
        highest. In timm's convention, ``(99999,)`` joins a pattern to the layer below.

        Args:
            coarse: group by stage instead of block.
        """
        first = None if coarse else (0,)
        stages = [
            (r"^stages\.(\d+)\.(?:downsample|branches|exchanges)", first),
            (r"^stages\.(\d+)\.norm", None if coarse else (99999,)),
            (r"^stages\.(\d+)" if coarse else r"^stages\.(\d+)\.(\d+)", None),
        ]
        stem = r"^(?:stem|position|cls_token|reg_token|branches|class_stage\.cls_token)"
        return {
            "stem": rf"{stem}|^stages\.0\.downsample",
            "blocks": [(r"^blocks\.(\d+)", None), *stages],
            "class_blocks": [(r"^class_stage\.blocks\.(\d+)", None), (r"^norms?\.", (99999,))],
        }

    def features(self) -> list[Feature]:
        """List what :meth:`forward_intermediates` can return, in the order of its indices."""
        c, norm = self.config, getattr(self, "norm", nn.Identity())
        reduction = _largest(getattr(c, "patch_size", 1))
        if hasattr(self, "blocks"):
            layers = range(len(self.blocks))
            return [Feature(f"blocks.{i}", i, c.dim, reduction, norm) for i in layers]
        found, last = [], len(self.stages) - 1
        for i, stage in enumerate(self.stages):
            if stage.downsample is not None:
                reduction = _largest(stage.downsample.stride) * (reduction if i else 1)
            ends = norm if i == last else None
            found.append(Feature(f"stages.{i}", i, c.dims[i], reduction, ends))
        return found

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        """Width, pixels per token and name of each feature, as timm's models have them."""
        return [
            {"num_chs": f.dim, "reduction": f.reduction, "module": f.module, "index": i}
            for i, f in enumerate(self.features())
        ]

    def drop_norm(self) -> None:
        """Remove the final norm."""
        if hasattr(self, "norm"):
            self.norm = nn.Identity()

    def prune_intermediate_layers(
        self,
        indices: int | Sequence[int] | None = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Remove the layers that the given features do not need, as timm's models do.

        Without its head, the model returns its final tokens (B, N, D).
        The model can then no longer be saved by ``save_model``, only its state dict.

        Args:
            indices: as for :meth:`forward_intermediates`.
            prune_norm: whether to remove the final norm; always done if the last stage is removed.
            prune_head: whether to remove the classifier; always done if the last stage is.

        Returns:
            The indices of the same features in the pruned model.

        Raises:
            ValueError: for an index out of range.
        """
        features = self.features()
        taken = [features[i] for i in take_indices(len(features), indices)]
        depth = 1 + max(feature.layer for feature in taken)
        last = next(feature for feature in features if feature.layer == depth - 1)
        if hasattr(self, "blocks"):
            self.blocks.truncate(depth)
        else:
            self.stages = self.stages[:depth]
        if prune_norm or last.norm is None:
            self.drop_norm()
        if prune_head or last.norm is None:
            self.drop_head()
        if last.norm is None:
            self.num_features = last.dim
        kept = {(f.layer, f.branch): i for i, f in enumerate(self.features())}
        return [kept[f.layer, f.branch] for f in taken]

    def apply_layer(self, index: int, x: Any, grid: Any) -> tuple[Any, Any]:
        """Apply one layer to tokens on ``grid``: the new tokens and their grid."""
        if hasattr(self, "blocks"):
            return self.blocks.apply_block(index, x, grid), grid
        stage = self.stages[index]
        return stage(x, grid), stage.out_grid(grid)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: OutputFormat = "NCHW",
        intermediates_only: bool = False,
        return_prefix_tokens: bool = False,
    ) -> list[Any] | tuple[Tensor, list[Any]]:
        """Compute the final tokens and those after some of the layers, as timm's models do.

        The layers are the blocks of a model with one grid, and the stages of a pyramid. CrossViT
        has the stages of its first branch, then those of its second.

        Args:
            x: batch (B, C, *shape).
            indices: list of layers, negative ones counted from the end; ``n`` for the last n; None
                for all. Results are in the order of the model, without duplicates.
            norm: whether to apply the final norm to tokens of its width.
            stop_early: whether to skip the layers after the last of ``indices``.
            output_fmt: "NCHW" for (B, D, *grid), "NLC" for (B, N, D); both without class and
                register tokens.
            intermediates_only: whether to leave out the final tokens.
            return_prefix_tokens: whether to return pairs, with the class and register tokens
                (B, P, D) second, if any of the layers has some.

        Returns:
            The final tokens, as from :meth:`forward_features`, and a list of intermediates, or only
            the list. With ``stop_early``, the former are those after the last layer applied.

        Raises:
            ValueError: for an index out of range, or an unknown format.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt {output_fmt!r} must be 'NCHW' or 'NLC'")
        features = self.features()
        taken = [(i, features[i]) for i in take_indices(len(features), indices)]
        wanted = [feature for _, feature in taken] if stop_early else features
        depth = 1 + max(feature.layer for feature in wanted)
        x, grid = self.embed(x)
        found: dict[int, Any] = {}
        for layer in range(depth):
            x, grid = self.apply_layer(layer, x, grid)
            for index, feature in taken:
                if feature.layer == layer:
                    y, on = feature.of(x, grid)
                    y = feature.norm(y) if norm and feature.norm is not None else y
                    found[index] = y[:, : on.prefix], _formatted(y[:, on.prefix :], on, output_fmt)
        intermediates: list[Any] = [found[index][1] for index, _ in taken]
        if return_prefix_tokens and any(prefix.shape[1] for prefix, _ in found.values()):
            intermediates = [(found[index][1], found[index][0]) for index, _ in taken]
        if intermediates_only:
            return intermediates
        ends = next(feature for feature in features if feature.layer == depth - 1)
        return x if ends.norm is None else self.finish(x, grid), intermediates


def _largest(size: int | tuple[int, ...]) -> int:
    return size if isinstance(size, int) else max(size)


def take_indices(count: int, indices: int | Sequence[int] | None) -> list[int]:
    """Convert ``indices`` to a sorted list of indices from 0 to ``count`` - 1.

    Args:
        count: number of features.
        indices: n for the last n, None for all, or a sequence in which negative ones are counted
            from the end.

    Raises:
        ValueError: for an index out of range, none at all, or another type.
    """
    if indices is None:
        return list(range(count))
    if type(indices) is int:
        if not 0 < indices <= count:
            raise ValueError(f"indices {indices} must be between 1 and {count}, for the last ones")
        return list(range(count - indices, count))
    if not isinstance(indices, Sequence) or isinstance(indices, str) or not indices:
        raise ValueError(f"indices {indices!r} must be a number, a list of numbers or None")
    for index in indices:
        if type(index) is not int or not -count <= index < count:
            raise ValueError(f"index {index!r} of indices must be between {-count} and {count - 1}")
    return sorted({index % count for index in indices})


def _formatted(cells: Tensor, grid: TokenGrid, output_fmt: OutputFormat) -> Tensor:
    """Format the tokens of the cells of the grid: (B, N, D) -> the same or (B, D, *grid)."""
    return cells if output_fmt == "NLC" else cells.mT.unflatten(2, grid.shape).contiguous()
