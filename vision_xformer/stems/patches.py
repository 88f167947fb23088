"""Linear stems on normalized patches of the image and of its Fourier transform."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..grid import TokenGrid
from ..positions import SinCosPosition
from ..precision import to_accumulate, without_autocast
from .base import STEMS, PatchStem


@STEMS.register("v0.2")
class NormPatchStem(PatchStem):
    """The stem of vision_xformer 0.1.6 to 0.2.0, for their checkpoints only.

    It applies layer norm to each patch first: with 1-pixel patches that is over the channels of one
    pixel, which removes brightness and contrast (and everything in a gray image).

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
        self.norm_in = nn.LayerNorm(self.patch_dim)
        self.norm_out = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        """Embed patches: (B, C, *shape) -> (B, N, D)."""
        return self.norm_out(self.proj(self.norm_in(self.patches(x))))


@STEMS.register("fft")
class FourierStem(NormPatchStem):
    """Patches of the image, preceded by patches of its Fourier transform.

    Real and imaginary parts are channels. Both kinds of patches are normalized before and after
    their linear layer, and those of the transform have their own sin-cos positions. (This is the
    SimpleViT with FFT of vit-pytorch.)

    Shape: (B, C, *shape) -> (B, P + N, D), with P patches of the transform

    Args:
        input_shape: (C, *shape), one to three axes.
        patch_size: pixels per token, one size or one for each axis.
        dim: token width D.
        freq_patch_size: frequencies per token, one size or one for each axis; ``patch_size`` by
            default.
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        patch_size: int | tuple[int, ...],
        dim: int,
        *,
        freq_patch_size: int | tuple[int, ...] | None = None,
    ) -> None:
        super().__init__(input_shape, patch_size, dim)
        channels, *shape = input_shape
        freq = self.patch_size if freq_patch_size is None else freq_patch_size
        try:
            self.freq = NormPatchStem((2 * channels, *shape), freq, dim)
        except ValueError as error:
            raise ValueError(f"freq_patch_size of stem 'fft': {error}") from None
        self.freq_position = SinCosPosition(self.freq.grid, dim)
        self.grid = TokenGrid(self.grid.shape, self.freq.grid.length)

    def forward(self, x: Tensor) -> Tensor:
        """Embed patches: (B, C, *shape) -> (B, P + N, D)."""
        # float16 overflows on the plain sums; the following norm removes the scale
        norm = "ortho" if x.dtype == torch.float16 else "backward"
        with without_autocast(x):
            waves = torch.fft.fftn(*to_accumulate(x), dim=tuple(range(2, x.ndim)), norm=norm)
            parts = torch.cat((waves.real, waves.imag), 1).to(x.dtype)
        freq = self.freq(parts)
        freq = freq + self.freq_position(freq)
        return torch.cat((freq, super().forward(x)), 1)
