"""Formats whose codes are rows of a table: NF4, and codebooks given or fitted.

A value is `table[code] * scale`. Tables ascend, and so does the value with the code.
"""

import abc
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from jopt.trace import Table
from jopt.trace.layered import spread

from .base import (
    Format,
    Granularity,
    Grid,
    Rounding,
    check_key,
    check_sharing,
    joined,
    mirrored,
    one_of,
    over,
    rows_of,
)
from .fits import kmeans, normal_levels, root_mean_square
from .placed import placed_like, whole

# A table is a tuple of numbers, or an array with the entries last: [*shape of scale, entries].
Levels = tuple[float, ...] | jax.Array
Method = Literal["kmeans", "lloyd_max"]

# Up to so many entries are chosen by a tree of selects, which every backend makes vectors of (and
# which brings no constant array into a `shard_map`); more are gathered.
_FEW = 16
_TINY = float(np.finfo(np.float32).tiny)

# The codes of NF4 as Dettmers et al. print them. Between -1 and 0 lie 8 quantiles of the normal
# distribution, between 0 and 1 there are 9, each side scaled to its end.
_NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


class TableFormat(Format):
    """A format with a scale and a table of at most 256 values. Rounds to the nearest of them."""

    @property
    def container(self) -> Any:
        """uint4 for up to 16 values, else uint8."""
        # XLA:CPU packs and concatenates uint4 as it should; uint2 it does not (see `Int`).
        return jnp.uint4 if self.bits <= 4 else jnp.uint8

    @abc.abstractmethod
    def levels(self, grid: Grid) -> Levels:
        """The values of the codes, ascending, before the scale."""

    def extent(self, x: jax.Array, axes: Sequence[int]) -> tuple[jax.Array, jax.Array]:
        """Plus and minus the largest magnitude over `axes` (of each group)."""
        return mirrored(self, x, axes)

    def encode(self, x: jax.Array, grid: Grid, *, key: jax.Array | None = None) -> jax.Array:
        """The codes of the nearest values, the lower of two as near; `key` rounds at random."""
        check_key(self, key)
        place, levels = _unscaled(x, grid.scale), self.levels(grid)
        if key is None:
            return below(place, _middles(levels))
        code = jnp.clip(below(place, levels, closed=True) - 1, 0, size(levels) - 2)
        low, high = lookup(code, levels), lookup(code + 1, levels)
        up = jax.random.uniform(key, place.shape) * (high - low) < place - low
        return code + up.astype(jnp.int32)

    def inside(self, x: jax.Array, grid: Grid) -> jax.Array:
        """Where `x` is beyond the table's ends by half a step at most."""
        place, levels = _unscaled(x, grid.scale), self.levels(grid)
        first, second, last, end = (_column(levels, j, x.shape) for j in (0, 1, -2, -1))
        low, high = first - (second - first) * 0.5, end + (end - last) * 0.5
        return (place >= low) & (place <= high)

    def decode(self, codes: jax.Array, grid: Grid) -> jax.Array:
        """`table[codes] * scale` in float32."""
        scale = spread(grid.scale, codes.shape)
        # Where all is zero so is the scale, and -1 times it would be the other zero.
        return jnp.where(scale == 0, 0.0, lookup(codes, self.levels(grid)) * scale)


@dataclasses.dataclass(frozen=True)
class NF4(TableFormat):
    """4-bit NormalFloat: 16 quantiles of the normal distribution, scaled group by group.

        scale = max|w| of a group,   ŵ = scale · nearest entry of (-1, -0.696, … 0 … 0.723, 1)

    Zero has a code. The error is at most 0.152 of the scale, half the widest gap, next to -1. Of
    two entries as near the lower is taken. A group that is all zero stays so; one that holds an
    infinity or a NaN becomes all NaN.

    QLoRA cuts the flattened weight into blocks; here a group is `group_size` consecutive inputs of
    one output, which is the same where a weight is stored output by output. Its second
    quantization, that of the scales, is not done.

    Args:
      group_size: how many inputs share a scale; divides their number.

    Raises:
      ValueError: if group_size is not a positive integer.

    Example:
      >>> import jax.numpy as jnp
      >>> from jopt.quant import NF4, fake_quant
      >>> fake_quant(jnp.array([[2.0], [0.1]]), NF4(group_size=2)).tolist()
      [[2.0], [0.15916059911251068]]

    References:
      Tim Dettmers, Artidoro Pagnoni, Ari Holtzman, Luke Zettlemoyer, QLoRA: Efficient finetuning of
      quantized LLMs, 2023, arXiv:2305.14314.
    """

    group_size: int | None = 64
    granularity: Granularity = dataclasses.field(default="group", init=False, repr=False)
    rounding: Rounding = dataclasses.field(default="nearest", init=False, repr=False)
    bits: int = dataclasses.field(default=4, init=False, repr=False)

    def __post_init__(self) -> None:
        """Checks the group size."""
        check_sharing("NF4(", self)

    def grid(self, low: jax.Array, high: jax.Array) -> Grid:
        """The grid whose last code is the larger of `-low` and `high`."""
        return Grid(_scale(low, high), None)

    def levels(self, grid: Grid) -> Levels:
        """The sixteen values."""
        return _NF4


@dataclasses.dataclass(frozen=True)
class Codebook(TableFormat):
    """k values of any spacing, given or fitted; weights are replaced by the nearest.

        ŵ = scale · c_j,   j = argmin |w / scale - c_j|

    - `method="kmeans"`: centers of k clusters of the values themselves, so that Σ (w - ŵ)² is at a
      local minimum. Lloyd's iterations, from quantiles chosen by the density and without chance,
      until no weight changes its cluster or `iterations` are through. Each tensor (channel, group)
      has k centers of its own, which take 32 bits each.
    - `method="lloyd_max"`: the k values that are best for the normal distribution, times the root
      mean square. Nothing but that is stored.
    - `values`: as given, scaled so that the largest magnitude among them meets that of the weights.

    The scale is max|w| for k-means, and c_j are within -1 and 1. Of two values as near the lower is
    taken. What is all zero stays so; what shares a grid with an infinity or a NaN becomes NaN.
    Unless one of the values is 0, other zeros do not stay zero: for pruned weights pass
    `zero=True`.

    Args:
      k: number of values, 2 to 256; with `values`, their number and not needed. Codes take
        ⌈log₂ k⌉ bits.
      method: how values are found, as above.
      values: the values, all different. In place of a method.
      granularity: what shares a codebook: `"tensor"` one weight matrix, `"channel"` one output
        channel, `"group"` `group_size` consecutive inputs of one output channel.
      group_size: for `"group"`.
      zero: keep one of the k-means centers at zero, so that what was pruned stays pruned.
      iterations: the most that k-means takes.

    Raises:
      ValueError: if an argument is out of its range or does not fit the others.

    Example:
      >>> import jax.numpy as jnp
      >>> from jopt.quant import Codebook, fake_quant
      >>> fake_quant(jnp.array([[1.0, 1.5, 6.0, 8.0]]), Codebook(2)).tolist()
      [[1.25, 1.25, 7.0, 7.0]]

    References:
      Song Han, Huizi Mao, William J. Dally, Deep compression: compressing deep neural networks with
      pruning, trained quantization and Huffman coding, 2015, arXiv:1510.00149. Stuart P. Lloyd,
      Least squares quantization in PCM, IEEE Trans. Inform. Theory 28, 1982. Joel Max, Quantizing
      for minimum distortion, IRE Trans. Inform. Theory 6, 1960.
    """

    k: int = 0
    _: dataclasses.KW_ONLY
    method: Method = "kmeans"
    values: tuple[float, ...] | None = None
    granularity: Granularity = "tensor"
    group_size: int | None = None
    zero: bool = False
    iterations: int = 100
    rounding: Rounding = dataclasses.field(default="nearest", init=False, repr=False)
    bits: int = dataclasses.field(default=0, init=False, repr=False)
    needs_values: bool = dataclasses.field(default=False, init=False, repr=False)

    def __post_init__(self) -> None:
        """Checks the arguments; sorts the values and counts them and their bits."""
        call = f"Codebook({self.k}"
        if self.values is not None:
            values = ascending("Codebook(", "values", self.values)
            if self.k not in (0, len(values)) or self.zero or self.method != "kmeans":
                raise ValueError(
                    f"`{joined(call, f'values={self.values}')}`: {len(values)} given values leave "
                    "nothing to fit; pass no k, method or zero."
                )
            if not any(values):
                raise ValueError(f"`{joined(call, f'values={self.values}')}`: all are zero.")
            object.__setattr__(self, "values", values)
            object.__setattr__(self, "k", len(values))
        if isinstance(self.k, bool) or not isinstance(self.k, int) or not 2 <= self.k <= 256:
            raise ValueError(f"`Codebook({self.k!r})`: k must be an integer from 2 to 256.")
        one_of(call, "method", self.method, get_args(Method))
        check_sharing(call, self)
        if self.zero and self.method != "kmeans":
            raise ValueError(
                f"`{joined(call, f'method={self.method!r}, zero=True')}`: only k-means centers can "
                'be held at zero; of `"lloyd_max"` an odd k has a zero.'
            )
        if isinstance(self.iterations, bool) or self.iterations < 1:
            raise ValueError(f"`{joined(call, f'iterations={self.iterations}')}`: at least 1.")
        object.__setattr__(self, "bits", (self.k - 1).bit_length())
        object.__setattr__(self, "needs_values", self.values is None)

    def fit(self, x: jax.Array, axes: Sequence[int]) -> Grid:
        """Scale and, from k-means, a table for the values of `x` along `axes`."""
        if self.values is not None:
            return self.grid(*self.extent(x, axes))
        x = whole(x)
        scale = _scale(*self.extent(x, axes))
        rows = _unscaled(rows_of(self, x, axes), scale.reshape(-1, 1))
        if self.method == "lloyd_max":
            return Grid(scale * root_mean_square(rows).reshape(scale.shape), None)
        centers = kmeans(rows, self.k, zero=self.zero, iterations=self.iterations)
        return Grid(scale, None, Table(centers.reshape(*scale.shape, self.k)))

    def grid(self, low: jax.Array, high: jax.Array) -> Grid:
        """For given values, the grid that covers `[low, high]`.

        Raises:
          ValueError: if the codebook is fitted, since that takes more than two ends.
        """
        if self.values is None:
            raise ValueError(
                f"`{self}` is fitted to values and has no grid for a range alone, as that of an "
                "activation; give `values=`, or choose another format there."
            )
        top = max(abs(value) for value in self.values)
        return Grid(_scale(low, high) * np.float32(1.0 / top), None)

    def levels(self, grid: Grid) -> Levels:
        """The k values."""
        if grid.table is not None:
            return grid.table.entries
        return self.values or normal_levels(self.k)


def ascending(call: str, name: str, values: Any) -> tuple[float, ...]:
    """Distinct numbers in order, as float32 has them."""
    numbers = tuple(sorted(float(np.float32(value)) for value in values))
    if not 2 <= len(numbers) <= 256 or len(set(numbers)) < len(numbers):
        raise ValueError(f"`{joined(call, f'{name}={values}')}`: 2 to 256 different numbers.")
    if not all(np.isfinite(number) for number in numbers):
        raise ValueError(f"`{joined(call, f'{name}={values}')}`: numbers must be finite.")
    return numbers


# Tables.


def size(levels: Levels) -> int:
    """How many entries a table has."""
    return len(levels) if isinstance(levels, tuple) else levels.shape[-1]


def lookup(codes: jax.Array, levels: Levels) -> jax.Array:
    """The table's entry of each code, as float32."""
    return _undivided(_lookup, codes, levels)


def below(x: jax.Array, bounds: Levels, *, closed: bool = False) -> jax.Array:
    """How many of ascending `bounds` lie below each value (or at it, if `closed`), as int32."""
    return _undivided(functools.partial(_below, closed=closed), x, bounds)


# Helpers, in order of use.


def _undivided(
    function: Callable[[jax.Array, Levels], jax.Array], x: jax.Array, levels: Levels
) -> jax.Array:
    """`function(x, levels)`; on explicit axes with `x` whole, unless the numbers are constants."""
    if isinstance(levels, tuple) and len(levels) <= _FEW:
        return function(x, levels)
    levels = levels if isinstance(levels, tuple) else whole(levels)
    return placed_like(function(whole(x), levels), x)


def _lookup(codes: jax.Array, levels: Levels) -> jax.Array:
    codes, count = codes.astype(jnp.int32), size(levels)
    if count > _FEW:
        flat, first = _flat(levels, codes.shape)
        return flat[first + codes]
    columns = [_column(levels, j, codes.shape) for j in range(count)]
    bit = 1
    while len(columns) > 1:
        odd = (codes & bit) != 0
        pairs = zip(columns[::2], [*columns[1::2], columns[-1]], strict=False)
        columns = [jnp.where(odd, high, low) for low, high in pairs]
        bit *= 2
    return jnp.broadcast_to(columns[0], codes.shape).astype(jnp.float32)


def _below(x: jax.Array, bounds: Levels, closed: bool) -> jax.Array:
    count = size(bounds)
    if count < _FEW:
        columns = [_column(bounds, j, x.shape) for j in range(count)]
        hits = [(x >= column) if closed else (x > column) for column in columns]
        return sum((hit.astype(jnp.int32) for hit in hits), jnp.zeros(x.shape, jnp.int32))
    flat, first = _flat(bounds, x.shape)
    found = jnp.zeros(x.shape, jnp.int32)
    for step in [1 << bit for bit in reversed(range(count.bit_length()))]:
        bound = flat[first + jnp.minimum(found + step, count) - 1]
        hit = (x >= bound) if closed else (x > bound)
        found = jnp.where(hit & (found + step <= count), found + step, found)
    return found


def _unscaled(x: jax.Array, scale: jax.Array) -> jax.Array:
    """`x / scale`; zero where the scale is."""
    return over(x, jnp.where(scale == 0, jnp.inf, scale))


def _scale(low: jax.Array, high: jax.Array) -> jax.Array:
    """The largest magnitude; zero where it is below normal, NaN where it is not finite."""
    span = jnp.maximum(-low, high)
    return jnp.where(jnp.isfinite(span), jnp.where(span < _TINY, 0.0, span), jnp.nan)


def _middles(levels: Levels) -> Levels:
    if isinstance(levels, tuple):
        pairs = zip(levels[1:], levels[:-1], strict=True)
        return tuple(float(np.float32((high + low) / 2)) for high, low in pairs)
    return (levels[..., 1:] + levels[..., :-1]) * 0.5


def _column(levels: Levels, index: int, shape: Sequence[int]) -> Any:
    """One entry of the table, as a number or spread to where it holds."""
    if isinstance(levels, tuple):
        return levels[index]
    return spread(levels[..., index], shape)


def _flat(levels: Levels, shape: Sequence[int]) -> tuple[jax.Array, Any]:
    """All entries in a row, and at which of them each value's table begins."""
    if isinstance(levels, tuple):
        return jnp.asarray(levels, jnp.float32), 0
    coarse, count = levels.shape[:-1], levels.shape[-1]
    first = jnp.arange(levels.size // count, dtype=jnp.int32).reshape(coarse) * count
    return levels.reshape(-1), spread(first, shape)
