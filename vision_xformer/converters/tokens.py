"""The token grid of a model of another library, whose attention layers are not passed one."""

from __future__ import annotations

import inspect
import math
import operator
import weakref
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..backbones import VisionModel
from ..forms import is_transformed
from ..grid import TokenGrid
from ..kernels import Kernel, ValuePath
from ..kernels.linear import LinearAttention
from ..modes import evaluating


def needs_centered_keys(kernel: Kernel) -> bool:
    """Whether keys are centered by default.

    Softmax and Nyström do not change if a vector is added to all keys. Linear attention does, and
    centering brings it closer to softmax. Performer does too, but centering made its error larger
    on trained models.
    """
    return isinstance(kernel, LinearAttention)


class _Pass:
    """A hook of the gradient of the patches, which lives as long as the graph that it is part of.

    Args:
        shape: cells on each axis.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape

    def __call__(self, d: Tensor) -> None:
        """Leave the gradient as it is."""


class GridTracker:
    """Forward hook of the patch embedding that stores the size of its output.

    Args:
        shape: cells on each axis, until the first forward pass.
    """

    def __init__(self, shape: tuple[int, ...] = ()) -> None:
        self.shape = shape
        self.earlier: dict[int, tuple[int, ...]] = {}  # the last one of each number of cells
        self.passes: weakref.WeakSet[_Pass] = weakref.WeakSet()
        self.task = -1  # the backward pass that the last call was part of

    def __call__(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        """The forward hook of the convolution."""
        shape = tuple(output.shape[2:])
        self.note(shape)
        plain = not torch.compiler.is_compiling() and not is_transformed(output)
        if plain and output.requires_grad:
            output.register_hook(forward := _Pass(shape))
            self.passes.add(forward)

    def note(self, shape: tuple[int, ...]) -> None:
        """Store the shape of a grid."""
        self.shape = shape
        if not torch.compiler.is_compiling():  # compiled, nothing is called again
            self.earlier[math.prod(shape)] = shape
            self.task = torch._C._current_graph_task_id()

    def __getstate__(self) -> dict[str, Any]:
        return {"shape": self.shape}  # copies have no forward passes

    def __setstate__(self, state: dict[str, Any]) -> None:
        GridTracker.__init__(self, **state)

    def grid(self, cells: int) -> tuple[int, ...]:
        """Return the shape of a grid, of the last forward pass or of one that is recomputed.

        Raises:
            ValueError: for a forward pass that cannot be told from another one.
        """
        if torch.compiler.is_compiling() or torch._C._current_graph_task_id() == self.task:
            return self.shape
        # in the backward pass, by gradient checkpointing that does not call the convolution
        shapes = sorted({p.shape for p in self.passes if math.prod(p.shape) == cells})
        if len(shapes) > 1:
            raise ValueError(
                f"gradient checkpointing cannot tell images with grids of {shapes[0]} and "
                f"{shapes[1]} patches apart: run the backward pass of one and delete its loss "
                "before the forward pass of the other"
            )
        return shapes[0] if shapes else self.earlier.get(cells, self.shape)


class ConvertedKernel(Kernel):
    """The kernel of a converted layer, which finds the grid, scales queries and centers keys.

    Shape: (B, H, N, K), (B, H, N, K), (B, H, N, V) -> (B, H, N, V)

    Args:
        inner: the kernel.
        tracker: of the patch embedding; None for a sequence, or if the layer passes the grid.
        scale: factor of the queries.
        center_keys: subtract the mean of the keys over the tokens. This does not change softmax, as
            it adds the same number to all logits of a query.
        recipe: arguments with which a layer can be converted again.
    """

    def __init__(
        self,
        inner: Kernel,
        tracker: GridTracker | None,
        scale: float,
        center_keys: bool,
        recipe: Mapping[str, Any],
    ) -> None:
        super().__init__(inner.site)
        self.inner, self.tracker, self.scale, self.center_keys = inner, tracker, scale, center_keys
        self.recipe = dict(recipe)
        self.takes_rope, self.fixed = inner.takes_rope, inner.fixed

    def grid(self, tokens: int) -> TokenGrid:
        """Return the grid of N tokens; a sequence if some of the patches were dropped."""
        prefix = self.site.queries.prefix
        grid = TokenGrid(self.tracker.grid(tokens - prefix) if self.tracker else (), prefix)
        return grid if grid.length == tokens else TokenGrid((tokens - prefix,), prefix)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        queries: TokenGrid | None = None,
        keys: TokenGrid | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        """Attend: q (B, H, N, K), k (B, H, N, K), v (B, H, N, V) -> (B, H, N, V)."""
        if queries is None or keys is None:
            queries = keys = self.grid(q.shape[2])
        if self.center_keys:
            k = k - k.mean(2, keepdim=True)
        if self.scale != 1:
            q = q * self.scale
        return self.inner(q, k, v, queries, keys, bias)

    def check_map(self) -> None:
        """Raise a ValueError if the kernel that is called has no attention map."""
        self.inner.check_map()

    def value_path(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        queries: TokenGrid | None = None,
        keys: TokenGrid | None = None,
        bias: Tensor | None = None,
    ) -> ValuePath:
        """Return the kernel as a function of its values, see :class:`Kernel`."""
        if queries is None or keys is None:
            queries = keys = self.grid(q.shape[2])
        return super().value_path(q, k, v, queries, keys, bias)

    def extra_repr(self) -> str:
        """The options that ``print`` shows."""
        return f"center_keys={self.center_keys}"


class Call(NamedTuple):
    """How a model called one of its layers.

    Attributes:
        grid: of the tokens.
        conv: the name of the convolution that made the grid; None for a sequence.
        masked: the name of an argument that holds a mask or bias, or None.
        crossed: whether queries and keys came from different tensors.
    """

    grid: TokenGrid
    conv: str | None
    masked: str | None
    crossed: bool


def input_shape(model: nn.Module, image_size: int | tuple[int, ...] | None) -> tuple[int, ...]:
    """Determine the shape (C, H, W) of the images that a model accepts.

    Args:
        model: a model of any library.
        image_size: height and width in pixels; None reads them from the model.

    Raises:
        ValueError: if ``image_size`` is None and the model does not state it, or if it is not
            that of a model of this package, or no size at all.
    """
    if isinstance(model, VisionModel):
        channels, *own = model.config.input_shape
        given = (image_size,) * len(own) if isinstance(image_size, int) else image_size
        if given is not None and tuple(given) != tuple(own):
            raise ValueError(f"image_size {image_size}: the model is built for {tuple(own)}")
        return (channels, *own)
    conv = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    places = [
        (getattr(model, "patch_embed", None), "img_size"),
        (getattr(model, "config", None), "image_size"),
        (model, "image_size"),
    ]
    found = (getattr(place, name, None) for place, name in places)
    size = image_size or next((s for s in found if s), None)
    if size is None:
        raise ValueError(
            f"image_size is needed: {type(model).__name__} does not state the size of its images"
        )
    try:
        sizes = [operator.index(s) for s in (size if isinstance(size, Iterable) else (size, size))]
    except TypeError:
        sizes = []
    if len(sizes) != 2 or min(sizes) < 1:
        raise ValueError(f"image_size {size!r} must be a height and a width in pixels")
    return (conv.in_channels if conv is not None else 3, *sizes)


def observe(
    model: nn.Module, layers: Mapping[str, nn.Module], shape: tuple[int, ...]
) -> dict[str, Call]:
    """Run a model on a blank image and record how it calls its attention layers.

    Fake tensors would be faster, but some libraries cache position tables by size and would keep
    fake ones.

    Args:
        model: a model of images (B, *shape).
        layers: attention layers by name.
        shape: of an image, (C, H, W).

    Returns:
        The call of each layer that was called.

    Raises:
        ValueError: for a model that does not accept such an image.
    """
    parameter = next(model.parameters())
    sizes: dict[str, tuple[int, ...]] = {}  # of the outputs of convolutions so far
    calls: dict[str, Call] = {}

    def conv_hook(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            sizes[name] = tuple(int(s) for s in output.shape[2:])

        return hook

    def layer_hook(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            bound = inspect.signature(module.forward).bind(*args, **kwargs).arguments
            given = bound | bound.pop("kwargs", {})
            tokens: Tensor = next(t for t in given.values() if isinstance(t, Tensor))
            batch_first = getattr(module, "batch_first", True)
            count = int(tokens.shape[1 if batch_first else 0])
            conv = max(
                (n for n, s in reversed(sizes.items()) if TokenGrid(s).length <= count),
                key=lambda n: TokenGrid(sizes[n]).length,
                default=None,
            )
            grid = TokenGrid((count,))
            if conv is not None:
                grid = TokenGrid(sizes[conv], count - TokenGrid(sizes[conv]).length)
            masked = next(
                (n for n, v in given.items()
                 if ("mask" in n or "bias" in n) and v is not None),
                None,
            )  # fmt: skip
            operands = [given[n] for n in ("query", "key", "value") if n in given]
            crossed = any(operand is not operands[0] for operand in operands)
            calls[name] = Call(grid, conv, masked, crossed)

        return hook

    hooks = [
        module.register_forward_hook(conv_hook(name))
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d)
    ]
    for name, layer in layers.items():
        hooks.append(layer.register_forward_pre_hook(layer_hook(name), with_kwargs=True))
    try:
        with evaluating(model), torch.no_grad():
            model(torch.zeros(1, *shape, dtype=parameter.dtype, device=parameter.device))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # libraries raise errors of any type
        raise ValueError(
            f"{type(model).__name__} does not run on images (1, {', '.join(map(str, shape))}): "
            f"{error}; set image_size, or convert the part of the model that takes images"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    return calls
