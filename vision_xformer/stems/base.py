"""The contract of stems, (B, C, *shape) -> (B, N, D) on one to three axes, and patch embedding."""

from __future__ import annotations

import math
from typing import ClassVar

from einops import rearrange
from torch import Tensor, nn

from ..grid import TokenGrid
from ..registry import Registry


def check_input_shape(input_shape: tuple[int, ...]) -> None:
    """Raise a ValueError for a shape that is not (C, *shape) of one to three axes."""
    if not 2 <= len(input_shape) <= 4 or min(input_shape) < 1:
        raise ValueError(
            f"input_shape {input_shape} must be (channels, length), (channels, height, width) "
            "or (channels, depth, height, width), all at least 1"
        )


def patch_grid(
    input_shape: tuple[int, ...], patch_size: int | tuple[int, ...], ragged: bool = False
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Check (C, *shape) and the patch size; return the patch size and the grid on each axis.

    With ``ragged``, the last patch of an axis may extend past the border.

    Raises:
        ValueError: for an invalid shape, or one that the patch size does not divide.
    """
    check_input_shape(input_shape)
    shape = input_shape[1:]
    sizes = (patch_size,) * len(shape) if isinstance(patch_size, int) else tuple(patch_size)
    if len(sizes) != len(shape) or min(sizes) < 1:
        raise ValueError(
            f"patch_size {patch_size} must be one positive size, or one for each axis of "
            f"{tuple(shape)}"
        )
    for size, p in zip(shape, sizes, strict=True):
        if size % p and not ragged:
            near = sorted({max(p, size // p * p), -(-size // p) * p})
            raise ValueError(
                f"image size {'x'.join(map(str, shape))} is not divisible by patch_size "
                f"{patch_size}: {size} could be {' or '.join(map(str, near))}"
            )
    return sizes, tuple(-(-s // p) for s, p in zip(shape, sizes, strict=True))


class Stem(nn.Module):
    """Pixels (B, C, *shape) to tokens (B, N, D). Options are keyword-only constructor arguments.

    Args:
        input_shape: (C, *shape), one to three axes.
        patch_size: pixels per token, one size or one for each axis.
        dim: token width D.

    Attributes:
        grid: positions of the N tokens.
        ragged: whether the last patch of an axis may extend past the border.
    """

    ragged: ClassVar[bool] = False

    def __init__(
        self, input_shape: tuple[int, ...], patch_size: int | tuple[int, ...], dim: int
    ) -> None:
        super().__init__()
        self.patch_size, shape = patch_grid(input_shape, patch_size, self.ragged)
        self.grid = TokenGrid(shape)

    def grid_of(self, input_shape: tuple[int, ...]) -> TokenGrid:
        """Return the positions of the tokens of a sample (C, *shape).

        Raises:
            ValueError: for a shape that the patch size does not divide.
        """
        return self.grid._replace(shape=patch_grid(input_shape, self.patch_size, self.ragged)[1])

    def extra_repr(self) -> str:
        """The options that ``print`` shows."""
        return f"patch_size={self.patch_size}, grid={self.grid.shape}"

    def forward(self, x: Tensor) -> Tensor:
        """Turn pixels (B, C, *shape) into tokens (B, N, D)."""
        raise NotImplementedError


STEMS: Registry[Stem] = Registry("stem")


_PATCHES = {
    1: "b (l p0) c -> b l (p0 c)",
    2: "b (h p0) (w p1) c -> b (h w) (p0 p1 c)",
    3: "b (t p0) (h p1) (w p2) c -> b (t h w) (p0 p1 p2 c)",
}


@STEMS.register("patch")
class PatchStem(Stem):
    """A linear layer on flattened patches (Dosovitskiy et al. 2020, eq. 1).

    A patch is flattened pixel by pixel, with channels innermost.

    Shape: (B, C, *shape) -> (B, N, D)

    Args:
        input_shape: (C, *shape), one to three axes.
        patch_size: pixels per token, one size or one for each axis.
        dim: token width D.
    """

    def __init__(
        self, input_shape: tuple[int, ...], patch_size: int | tuple[int, ...], dim: int
    ) -> None:
        super().__init__(input_shape, patch_size, dim)
        self.patch_dim = input_shape[0] * math.prod(self.patch_size)
        self.proj = nn.Linear(self.patch_dim, dim)

    def patches(self, x: Tensor) -> Tensor:
        """Flatten the patches: (B, C, *shape) -> (B, N, prod(patch_size) * C)."""
        sizes = {f"p{axis}": size for axis, size in enumerate(self.patch_size)}
        # in two steps, of which the second copies rows of pixels, not single numbers: twice as fast
        x = x.movedim(1, -1).contiguous()
        return rearrange(x, _PATCHES[len(sizes)], **sizes)

    def forward(self, x: Tensor) -> Tensor:
        """Embed patches: (B, C, *shape) -> (B, N, D)."""
        return self.proj(self.patches(x))
