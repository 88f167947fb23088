"""The contract of kernels: arithmetic between projected queries, keys and values, nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, NamedTuple

from einops import rearrange
from torch import Tensor, nn

from ..grid import TokenGrid, pool_grid
from ..registry import Registry


class Site(NamedTuple):
    """All that a kernel may know of its surroundings when it is built.

    Args:
        heads: number of query heads H.
        key_dim: key width per head K.
        value_dim: value width per head V.
        queries: grid of the N queries.
        keys: grid of the M keys and values.
    """

    heads: int
    key_dim: int
    value_dim: int
    queries: TokenGrid
    keys: TokenGrid


class ValuePath(NamedTuple):
    """A kernel or mixer as a linear function of its values, for one input.

    Args:
        values: values (B, G, M, V).
        apply: values (B, G, M, V) -> (B, H, N, V), linear.
        finish: maps the result (B, H, N, V) to the output of the kernel or mixer.
        queries: grid of the N queries.
        keys: grid of the M values; None if they are a learned memory instead of tokens.
    """

    values: Tensor
    apply: Callable[[Tensor], Tensor]
    finish: Callable[[Tensor], Tensor]
    queries: TokenGrid
    keys: TokenGrid | None


class Kernel(nn.Module):
    """Map q (B, H, N, K), k (B, G, M, K) and v (B, G, M, V) to (B, H, N, V).

    A kernel is complete: it needs no scaling or normalization before or after. Subclasses add their
    options as keyword-only constructor arguments. A subclass may define ``flops``, with the
    arguments of :meth:`forward`, see :func:`~vision_xformer.count_flops`.

    Args:
        site: heads, widths and grids, see :class:`Site`.

    Attributes:
        takes_rope: whether rotating q and k before the kernel is meaningful.
        takes_bias: whether the kernel forms an attention map that ``bias`` can be added to.
        supports_single_query: whether the output for one query is independent of the other queries.
        fixed: whether the kernel is tied to the keys of its site; another grid raises a ValueError.
        weight_grid: grid whose cells rows of the weights belong to, if the shape of these weights
            does not state it.
    """

    takes_rope: bool = True
    takes_bias: bool = False
    supports_single_query: ClassVar[bool] = True
    fixed: bool = False
    weight_grid: tuple[int, ...] | None = None

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.site = site

    @property
    def operand_widths(self) -> tuple[int, ...]:
        """Widths (H K, G K, G V) of q, k and v over all heads; (H K, G K) where v is k."""
        heads, key_dim, value_dim, *_ = self.site
        return heads * key_dim, heads * key_dim, heads * value_dim

    def start_from_softmax(self) -> None:
        """Initialize the parameters so that the kernel is as close to softmax as possible.

        Called when a trained model is converted. The default changes nothing.
        """

    def check_keys(self, keys: TokenGrid) -> None:
        """Raise a ValueError for keys on a grid other than that of the site."""
        if keys != self.site.keys:
            tables = any(name.endswith(".grid") for name, _ in self.named_parameters())
            hint = "; load_weights(..., resize=True) carries its tables over" if tables else ""
            raise ValueError(
                f"{type(self).__name__} was built for keys on {self.site.keys} and cannot take "
                f"{keys}: build it for that{hint}"
            )

    def check_axes(self, queries: TokenGrid, keys: TokenGrid) -> None:
        """Raise a ValueError for queries and keys on grids with another number of axes."""
        if len(queries.shape) != len(keys.shape):
            raise ValueError(f"queries on {queries} and keys on {keys} differ in their axes")

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        queries: TokenGrid,
        keys: TokenGrid,
        bias: Tensor | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            q: queries (B, H, N, K).
            k: keys (B, G, M, K), where G is H or 1.
            v: values (B, G, M, V).
            queries: grid of the N queries.
            keys: grid of the M keys.
            bias: (H, N, M), added to the logits of a kernel with ``takes_bias``.

        Returns:
            Attended values (B, H, N, V).
        """
        raise NotImplementedError

    def check_map(self) -> None:
        """Raise a ValueError if the kernel has no attention map."""

    def value_path(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        queries: TokenGrid,
        keys: TokenGrid,
        bias: Tensor | None = None,
    ) -> ValuePath:
        """Return the kernel as a function of its values, for the arguments of :meth:`forward`.

        Raises:
            ValueError: if the kernel has no attention map.
        """
        self.check_map()
        return ValuePath(
            v, lambda values: self(q, k, values, queries, keys, bias), lambda y: y, queries, keys
        )


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, N, H K) -> (B, H, N, K)."""
    return rearrange(x, "b n (h k) -> b h n k", h=heads)


def merge_heads(x: Tensor) -> Tensor:
    """(B, H, N, V) -> (B, N, H V)."""
    return rearrange(x, "b h n v -> b n (h v)")


def pool_heads(x: Tensor, grid: TokenGrid, parts: tuple[int, ...]) -> Tensor:
    """Average over rectangular cells of the grid, see :func:`~vision_xformer.grid.pool_grid`.

    Heads are merged so that the inner axis is long. The result is contiguous, so that the operators
    that store it share one copy.

    Shape: (B, H, N, K) -> (B, H, prod(parts), K)
    """
    return split_heads(pool_grid(merge_heads(x), grid, parts), x.shape[1]).contiguous()


KERNELS: Registry[Kernel] = Registry("kernel")
