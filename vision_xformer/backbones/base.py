"""The contract of backbones: models, stages and blocks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar, overload

import torch
from torch import Tensor, nn

from ..grid import TokenGrid
from ..layers import LayerScale, Mlp, init_linears, make_drop_path, mlp_width
from ..mixers import Mixer
from ..positions import FixedTable, RopeKind, RotaryPosition
from ..registry import Registry
from ..summary import summary
from .checkpointing import checkpointed
from .config import Config
from .publishing import Publishable
from .timm_interface import TimmInterface


class VisionModel(TimmInterface, Publishable):
    """An image classifier: (B, C, *shape) -> (B, num_classes). ``config`` rebuilds it.

    Subclasses are registered under the name in their ``config_class`` and list sizes in
    ``presets``; the size "" is the configuration of the X-formers paper for CIFAR-10. They define
    ``embed`` and have ``num_features``, ``head``, and ``blocks``, a :class:`Stage`, or ``stages``.

    Args:
        config: an instance of ``config_class``.

    Attributes:
        num_features: width of the pooled features.
        pretrained_cfg: "mean" and "std" of the pixels (0 to 1) that the weights expect, and
            "label_names" of the classes, if known.
    """

    config_class: ClassVar[type[Config]]
    presets: ClassVar[dict[str, dict[str, Any]]]
    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.pretrained_cfg: dict[str, Any] = {}
        self.register_load_state_dict_post_hook(_tables_follow)

    def forward(self, x: Tensor) -> Tensor:
        """Classify a batch: (B, C, *shape) -> (B, num_classes)."""
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """Compute the final tokens, (B, C, *shape) -> (B, N, D)."""
        x, grid = self.embed(x)
        for stage in self.trunk:
            x, grid = stage(x, grid), stage.out_grid(grid)
        return self.finish(x, grid)

    @property
    def trunk(self) -> Sequence[Any]:
        """The stages, in order; a model with ``blocks`` has one."""
        return (self.blocks,) if hasattr(self, "blocks") else self.stages

    def embed(self, x: Tensor) -> tuple[Any, Any]:
        """Compute the tokens before the first layer, (B, C, *shape) -> (B, N, D), and their grid.

        A model with several branches returns a list of both.
        """
        raise NotImplementedError

    def finish(self, x: Any, grid: Any) -> Tensor:
        """Compute the final tokens from those after the last layer: (B, N, D) -> (B, N, D)."""
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Classify tokens (B, N, D): (B, num_classes), or pooled (B, D) with ``pre_logits``."""
        if self.config.global_pool:
            x = self.pool_tokens(x)
        return x if pre_logits else self.head(x)

    def pool_tokens(self, x: Tensor) -> Tensor:
        """Pool the final tokens: (B, N, D) -> (B, D)."""
        return x.mean(1)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Store only the inputs of the blocks for the backward pass, and recompute the rest."""
        for module in self.modules():
            if isinstance(module, Checkpointed):
                module.grad_checkpointing = enable

    def make_head(self, num_classes: int) -> nn.Module:
        """A linear classifier with small initial weights; the identity for 0 classes."""
        if num_classes == 0:
            return nn.Identity()
        head = nn.Linear(self.num_features, num_classes)
        init_linears(head)
        return head

    def weight_shapes(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of every saved tensor by name."""
        return {k: (tuple(v.shape), v.dtype) for k, v in self.state_dict().items()}

    def summary(self, depth: int = 2) -> str:
        """A table of modules down to ``depth``: type, output shape of one sample, parameters."""
        sample = torch.zeros(1, *self.config.input_shape).to(next(self.parameters()))
        return summary(self, sample, depth)

    def check_channels(self, x: Tensor) -> None:
        """Raise a ValueError unless the batch has the axes and channels of ``input_shape``."""
        want = self.config.input_shape
        if x.ndim != len(want) + 1:
            sizes = ", ".join(map(str, want))
            raise ValueError(f"input of shape {tuple(x.shape)} must be (B, {sizes})")
        if x.shape[1] != want[0]:
            raise ValueError(f"input has {x.shape[1]} channels; the model was built for {want[0]}")

    def check_input(self, x: Tensor) -> tuple[int, ...]:
        """Return the shape (C, *shape) of a sample.

        Raises:
            ValueError: unless the batch is (B, *input_shape), or (B, C, ...) with ``dynamic_size``.
        """
        self.check_channels(x)
        if self.config.dynamic_size:
            return tuple(x.shape[1:])
        want = self.config.input_shape[1:]
        if x.shape[2:] != torch.Size(want):
            got, built = ("x".join(map(str, size)) for size in (x.shape[2:], want))
            raise ValueError(
                f"input of size {got}; the model was built for {built}: build it for that; "
                "load_weights(..., resize=True) carries tables of tokens over"
            )
        return self.config.input_shape


def _tables_follow(model: nn.Module, _: Any) -> None:
    """Recompute the tables of a model whose new weights have another device or dtype.

    The first forward pass would also do so, but it may be inside torch.compile or torch.export.
    """
    like = next((p for p in model.parameters() if p.is_floating_point()), None)
    for module in model.modules():
        if isinstance(module, FixedTable):
            module(like)


class Downsampling(nn.Module):
    """Bring tokens to a coarser grid: (B, M, C) -> (B, N, D).

    Attributes:
        stride: ratio of the old grid to the new one on each axis.
    """

    stride: tuple[int, ...]

    def out_grid(self, grid: TokenGrid) -> TokenGrid:
        """Return the positions of the N tokens for those of the M tokens."""
        raise NotImplementedError

    def forward(self, x: Tensor, grid: TokenGrid) -> Tensor:
        """Map tokens on ``grid``: (B, M, C) -> (B, N, D)."""
        raise NotImplementedError


class Checkpointed(nn.Module):
    """A module that can store only the inputs of its blocks for the backward pass.

    Attributes:
        grad_checkpointing: whether only the inputs are stored.
    """

    grad_checkpointing: bool = False

    def run(self, block: nn.Module, *args: Any) -> Any:
        """Call ``block(*args)``; with ``grad_checkpointing``, recompute it in the backward pass."""
        recomputes = self.grad_checkpointing and torch.is_grad_enabled()
        return checkpointed(block, *args) if recomputes else block(*args)


class Stage(Checkpointed):
    """Blocks on one grid: (B, N, D) -> (B, N, D). It can be called alone and indexed by block.

    Args:
        blocks: modules called as ``block(x, grid, rope)``.
        grid: positions of their tokens, unless a call gives others.
        rope: rotary positions of the grid.
        downsample: brings the output of the previous stage to this grid, before the blocks.
        in_grid: positions of the tokens of the previous stage; by default ``grid``.
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        grid: TokenGrid,
        rope: RotaryPosition | None = None,
        downsample: Downsampling | None = None,
        in_grid: TokenGrid | None = None,
    ) -> None:
        super().__init__()
        self.downsample, self.grid, self.rope, self.depth = downsample, grid, rope, len(blocks)
        self.in_grid = grid if in_grid is None else in_grid
        for index, block in enumerate(blocks):
            self.add_module(str(index), block)

    def __len__(self) -> int:
        return self.depth

    def truncate(self, depth: int) -> None:
        """Remove the blocks after the first ``depth``."""
        for index in range(depth, self.depth):
            delattr(self, str(index))
        self.depth = depth

    @overload
    def __getitem__(self, index: int) -> nn.Module: ...

    @overload
    def __getitem__(self, index: slice) -> list[nn.Module]: ...

    def __getitem__(self, index: int | slice) -> nn.Module | list[nn.Module]:
        if isinstance(index, slice):
            return list(self)[index]
        return self.get_submodule(str(range(self.depth)[index]))

    def __setitem__(self, index: int, block: nn.Module) -> None:
        setattr(self, str(range(self.depth)[index]), block)

    def __iter__(self) -> Iterator[nn.Module]:
        return (self.get_submodule(str(index)) for index in range(self.depth))

    def out_grid(self, grid: TokenGrid) -> TokenGrid:
        """Return the grid of its tokens for that of the previous stage."""
        return grid if self.downsample is None else self.downsample.out_grid(grid)

    def _angles(self, x: Tensor, grid: TokenGrid) -> Tensor | None:
        return None if self.rope is None else self.rope(x, grid)

    def apply_block(self, index: int, x: Tensor, grid: TokenGrid) -> Tensor:
        """Apply one block to tokens on ``grid``: (B, N, D) -> (B, N, D)."""
        return self.run(self[index], x, grid, self._angles(x, grid))

    def forward(self, x: Tensor, grid: TokenGrid | None = None) -> Tensor:
        """Apply the stage to the tokens of the previous one: (B, M, C) -> (B, N, D).

        ``grid`` is that of the M tokens, by default the one it was built for.
        """
        grid = self.in_grid if grid is None else grid
        if self.downsample is not None:
            x, grid = self.run(self.downsample, x, grid), self.out_grid(grid)
        rope = self._angles(x, grid)  # once: on a grid other than its own, it computes them
        for block in self:
            x = self.run(block, x, grid, rope)
        return x


class Block(nn.Module):
    """x + mixer(norm x), then x + mlp(norm x). Shape: (B, N, D) -> (B, N, D).

    Args:
        mixer: of width D.
        mlp_ratio: ratio of the hidden width of the MLP to D; 0 disables the MLP.
        dropout: dropout in the MLP.
        drop_path: probability with which a sample skips a branch.
        layer_scale: initial value of LayerScale, or None for none.
        norm_eps: epsilon of the layer norms.
    """

    def __init__(
        self,
        mixer: Mixer,
        mlp_ratio: float,
        *,
        dropout: float = 0.0,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        dim = mixer.dim
        self.norm1 = nn.LayerNorm(dim, norm_eps)
        self.mixer = mixer
        self.scale1 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale)
        self.mlp: Mlp | None = None
        if mlp_ratio:
            self.norm2 = nn.LayerNorm(dim, norm_eps)
            self.mlp = Mlp(dim, mlp_width(dim, mlp_ratio), dropout)
            self.scale2 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale)
        self.drop_path = make_drop_path(drop_path)

    def forward(self, x: Tensor, grid: TokenGrid, rope: Tensor | None = None) -> Tensor:
        """Apply the block to tokens (B, N, D) on ``grid``, with angles ``rope`` (N, A)."""
        x = x + self.drop_path(self.scale1(self.mixer(self.norm1(x), grid, rope)))
        if self.mlp is None:
            return x
        return x + self.drop_path(self.scale2(self.mlp(self.norm2(x))))


def make_rope(kind: RopeKind | None, mixer: Mixer, name: str) -> RotaryPosition | None:
    """Rotary positions of a ``kind`` for the mixer of that name; None for ``kind`` None.

    Raises:
        ValueError: for a mixer that does not take them.
    """
    if kind is None:
        return None
    if mixer.rope_dim is None:
        raise ValueError(
            f"mixer {name!r} does not take rotary positions: rope must be None, not {kind!r}"
        )
    return RotaryPosition(mixer.grid, mixer.rope_dim, kind)


def check_prefix(blocks: Iterable[nn.Module], name: str, instead: str) -> None:
    """Raise a ValueError if the mixer does not update class and register tokens."""
    mixers = (part for block in blocks for part in block.modules() if isinstance(part, Mixer))
    if not all(mixer.updates_prefix for mixer in mixers):
        raise ValueError(
            f"mixer {name!r} does not update class and register tokens, so they would learn "
            f"nothing: {instead}"
        )


BACKBONES: Registry[VisionModel] = Registry("backbone")
