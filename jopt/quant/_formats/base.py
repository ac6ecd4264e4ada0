"""Number formats: what codes there are, where they lie on the real line, how a value gets one.

A format is static and hashes. `fit` looks at values and gives a `Grid` (scale, integer zero point
and table of codes, each of the values' rank); `encode` and `decode` go between values and codes on
that grid. A new format implements `Format` and everything else in this folder works with it.

What `fit`, `encode` and `decode` compute must not depend on how XLA compiles them, so that training
and storing agree to the last bit: no product is followed by a sum (LLVM rounds both at once), and
sums over many values are taken over integers (`_exact`).
"""

import abc
import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from jopt.trace import Table, reductions
from jopt.trace.layered import spread

from .layout import grouped

Granularity = Literal["channel", "tensor", "group", "token"]
Rounding = Literal["nearest", "floor", "stochastic"]

# The smallest normal float32: smaller scales are flushed to zero, and their reciprocals overflow.
_TINY = float(np.finfo(np.float32).tiny)
# Reciprocals of larger scales are below it.
_LARGE = 1.0 / _TINY


class Grid(NamedTuple):
    """Where codes lie on the real line; for integers `value = (code - zero_point) * scale`."""

    scale: jax.Array  # rank of the values; n, 1 or the number of groups along each axis
    zero_point: jax.Array | None  # int8 of the same shape as scale; None is zero
    table: Table | None = None  # what else was fitted: [*shape of scale, entries]


class Format(abc.ABC):
    """What quantization needs to know of a number format. Subclasses are frozen dataclasses."""

    bits: int  # of one code as it is stored
    granularity: Granularity
    group_size: int | None
    rounding: Rounding
    needs_values: bool = False  # `fit` needs all values, so that `grid` alone cannot make one

    @property
    @abc.abstractmethod
    def container(self) -> Any:
        """The dtype that holds codes in memory."""

    @abc.abstractmethod
    def extent(self, x: jax.Array, axes: Sequence[int]) -> tuple[jax.Array, jax.Array]:
        """Lowest and highest value over `axes`, zero included: float32, of the rank of `x`."""

    @abc.abstractmethod
    def grid(self, low: jax.Array, high: jax.Array) -> Grid:
        """The grid that covers `[low, high]`."""

    @abc.abstractmethod
    def encode(self, x: jax.Array, grid: Grid, *, key: jax.Array | None = None) -> jax.Array:
        """The codes of `x`; values outside the grid get its nearest end.

        As int32, or as float32 where codes are floats; `astype(container)` keeps them as they are.
        """

    def encode_own(self, x: jax.Array, grid: Grid) -> jax.Array:
        """`encode` of the values that the grid was made from, none of which lies outside it."""
        return self.encode(x, grid)

    @abc.abstractmethod
    def inside(self, x: jax.Array, grid: Grid) -> jax.Array:
        """Where `x` has a code without clipping."""

    @abc.abstractmethod
    def decode(self, codes: jax.Array, grid: Grid) -> jax.Array:
        """The float32 values of `codes`."""

    def fit(self, x: jax.Array, axes: Sequence[int]) -> Grid:
        """The grid for the values of `x`, shared along `axes` (counted from the end)."""
        return self.grid(*self.extent(x, axes))

    def leaf(self, codes: jax.Array, grid: Grid, dtype: Any) -> Any:
        """The `QArray` of a weight of that dtype, quantized alone."""
        from .._leaves.weights import QArray  # which needs formats

        codes = codes.astype(self.container)
        return QArray(codes, *grid, None, self, None, False, jnp.dtype(dtype))

    def nonzeros(self, codes: jax.Array, grid: Grid) -> int:
        """How many of `codes` stand for other values than zero. Looks at values."""
        return int(np.count_nonzero(np.asarray(self.decode(codes, grid))))


@dataclasses.dataclass(frozen=True)
class Int(Format):
    """Integers of 2 to 8 bits on a uniform grid.

    With n = 2^(bits-1), symmetric codes are -(n-1) … n-1, so that the grid is its own mirror image
    and 2 bits are the ternary -1, 0, 1; asymmetric codes are -n … n-1 around a zero point:

        symmetric    scale = max|x| / (n-1)                  code = round(x / scale)
        asymmetric   scale = (max(x,0) - min(x,0)) / (2n-1)  code = round(x / scale) + zero_point
                     zero_point = -n - round(min(x,0) / scale)

    Zero always has a code of its own. With the scale taken from the values nothing is clipped by
    more than half a step, and `|x - decode(encode(x))| <= scale / 2`. Scales are float32 for any
    dtype of `x`. A channel (group, tensor) that is all zero keeps its zeros; one that holds an
    infinity or a NaN becomes all NaN, so that the trouble shows. An asymmetric grid that reaches to
    the largest float32 ends half a step beyond it at most, where its value is infinite.

    Args:
      bits: 2 to 8. Up to 4 bits are held in int4, more in int8.
      symmetric: no zero point.
      granularity: what shares a scale: `"channel"` one output channel, `"tensor"` one weight
        matrix, `"group"` `group_size` consecutive inputs of one output channel; `"token"`, for
        activations, one row: everything that a product does not sum over has a scale of its own.
      group_size: for `"group"`; divides the number of inputs.
      rounding: `"nearest"` (ties to even), `"floor"` (q = ⌊x / scale⌋, error up to one step) or
        `"stochastic"` (up with the probability of the fraction, so the mean is exact; needs a key).

    Raises:
      ValueError: if an argument is out of its range.

    Example:
      >>> from jopt.quant import Int
      >>> Int(4, granularity="group", group_size=64).bits
      4

    References:
      Raghuraman Krishnamoorthi, Quantizing deep convolutional networks for efficient inference: a
      whitepaper, 2018, arXiv:1806.08342. Benoit Jacob et al., Quantization and training of neural
      networks for efficient integer-arithmetic-only inference, 2017, arXiv:1712.05877. Suyog Gupta
      et al., Deep learning with limited numerical precision, 2015, arXiv:1502.02551 (stochastic
      rounding).
    """

    bits: int
    _: dataclasses.KW_ONLY
    symmetric: bool = True
    granularity: Granularity = "channel"
    group_size: int | None = None
    rounding: Rounding = "nearest"

    def __post_init__(self) -> None:
        """Checks the arguments."""
        if isinstance(self.bits, bool) or not isinstance(self.bits, int) or not 2 <= self.bits <= 8:
            raise ValueError(f"`Int({self.bits!r})`: bits must be an integer from 2 to 8.")
        check_sharing(f"Int({self.bits}", self)
        one_of(f"Int({self.bits}", "rounding", self.rounding, get_args(Rounding))

    @property
    def low(self) -> int:
        """The lowest code."""
        return -(2 ** (self.bits - 1)) + self.symmetric

    @property
    def high(self) -> int:
        """The highest code."""
        return 2 ** (self.bits - 1) - 1

    @property
    def container(self) -> Any:
        """int4 for up to 4 bits, else int8."""
        # Not int2: XLA:CPU (jaxlib 0.10.2 and 0.12) aborts the process when it concatenates int2
        # or uint2. On disk codes take their true bits.
        return jnp.int4 if self.bits <= 4 else jnp.int8

    def extent(self, x: jax.Array, axes: Sequence[int]) -> tuple[jax.Array, jax.Array]:
        """Lowest and highest value over `axes` (of each group), zero included."""
        if self.symmetric:
            return mirrored(self, x, axes)
        x, axes, keep = sharing(self, x, axes)
        return reductions.ends(x, axes, keepdims=keep)

    def grid(self, low: jax.Array, high: jax.Array) -> Grid:
        """The grid that covers `[low, high]` and zero."""
        if self.symmetric:
            return Grid(scale_of(jnp.maximum(-low, high), 1.0 / self.high), None)
        low, high = jnp.minimum(low, 0.0), jnp.maximum(high, 0.0)
        scale = scale_between(low, high, 1.0 / (self.high - self.low))
        zero_point = self.low - jnp.round(self._steps(low, scale))
        return Grid(scale, jnp.clip(zero_point, self.low, self.high).astype(jnp.int8))

    def encode(self, x: jax.Array, grid: Grid, *, key: jax.Array | None = None) -> jax.Array:
        """The codes of `x` as int32, clipped to the format's ends; `key` rounds stochastically."""
        return jnp.clip(self._place(x, grid, key), self.low, self.high).astype(jnp.int32)

    def encode_own(self, x: jax.Array, grid: Grid) -> jax.Array:
        """The codes of the values that the grid was made from; nearest ones need no clipping.

        `|x| <= (n-1) scale` but for rounding, of a few units in the last place, and half a step
        would have to be missing to reach another code. An affine grid's zero point is rounded, so
        that its ends may lie half a step inside.
        """
        if self.symmetric and self.rounding == "nearest":
            return self._place(x, grid, None).astype(jnp.int32)
        return self.encode(x, grid)

    def inside(self, x: jax.Array, grid: Grid) -> jax.Array:
        """Where the code of `x` is not clipped."""
        code = self._place(x, grid, None)
        return (code >= self.low) & (code <= self.high)

    def decode(self, codes: jax.Array, grid: Grid) -> jax.Array:
        """`(codes - zero_point) * scale` in float32."""
        steps = codes.astype(jnp.float32)
        if grid.zero_point is not None:
            steps = steps - spread(grid.zero_point, codes.shape).astype(jnp.float32)
        return steps * spread(grid.scale, codes.shape)

    def nonzeros(self, codes: jax.Array, grid: Grid) -> int:
        """How many codes differ from the zero point, whatever the scale."""
        held = np.asarray(codes).astype(np.int8)
        if grid.zero_point is None:
            return int(np.count_nonzero(held))
        return int(np.count_nonzero(held != np.asarray(spread(grid.zero_point, held.shape))))

    def _place(self, x: jax.Array, grid: Grid, key: jax.Array | None) -> jax.Array:
        # No product is followed by a sum here, which LLVM would fuse and round once, not twice.
        steps = self._steps(x, grid.scale)
        check_key(self, key)
        if key is not None:
            below = jnp.floor(steps)
            up = jax.random.uniform(key, steps.shape) < steps - below
            rounded = below + up.astype(jnp.float32)
        else:
            rounded = jnp.floor(steps) if self.rounding == "floor" else jnp.round(steps)
        if grid.zero_point is None:
            return rounded
        return rounded + spread(grid.zero_point, x.shape).astype(jnp.float32)

    def _steps(self, x: jax.Array, scale: jax.Array) -> jax.Array:
        if self.bits <= 3:
            return over(x, scale)
        # What more steps cover has no scale that is too large for its reciprocal.
        return x.astype(jnp.float32) * spread(1.0 / scale, x.shape)


def over(x: jax.Array, scale: jax.Array) -> jax.Array:
    """`x / scale` in float32, for any normal scale of the rank of `x`, spread as it must be."""
    # The reciprocal is taken once per channel, before spreading. XLA turns a division by a
    # constant into this same product, so that codes do not depend on what was constant when
    # compiling.
    first, second = (spread(factor, x.shape) for factor in reciprocals(scale))
    return x.astype(jnp.float32) * first * second


def reciprocals(scale: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Two factors of `1 / scale`, both normal: a power of two, 1 but for large scales; the rest."""
    power = jnp.where(scale > _LARGE, 0.25, 1.0)
    return power, 1.0 / (scale * power)


def sharing(
    format: Format, x: jax.Array, axes: Sequence[int]
) -> tuple[jax.Array, tuple[int, ...], bool]:
    """Float32 values, the axes along which they share a grid, and whether reductions keep those."""
    x = x.astype(jnp.float32)
    if format.granularity != "group":
        return x, tuple(axes), True
    assert format.group_size is not None  # checked when the format was made
    return *grouped(x, axes, format.group_size), False


def mirrored(format: Format, x: jax.Array, axes: Sequence[int]) -> tuple[jax.Array, jax.Array]:
    """The extent of a grid that is its own mirror image."""
    x, axes, keep = sharing(format, x, axes)
    high = reductions.largest(x, axes, keepdims=keep)
    return -high, high


def rows_of(format: Format, x: jax.Array, axes: Sequence[int]) -> jax.Array:
    """Float32 values that share a grid as rows, in the order of the grid: `[grids, values]`."""
    x, axes, _ = sharing(format, x, axes)
    along = [axis % x.ndim for axis in axes]
    others = [axis for axis in range(x.ndim) if axis not in along]
    count = math.prod(x.shape[axis] for axis in others)
    width = math.prod(x.shape[axis] for axis in along)
    return jnp.transpose(x, [*others, *along]).reshape(count, width)


def scale_of(span: jax.Array, step: jax.Array | float) -> jax.Array:
    """`span * step`, kept normal; NaN where the span is not finite."""
    scale = jnp.maximum(span * step, _TINY)
    return jnp.where(jnp.isfinite(span), scale, jnp.nan)


def scale_between(low: jax.Array, high: jax.Array, step: jax.Array | float) -> jax.Array:
    """`scale_of(high - low, step)`, also where the difference of finite ends overflows."""
    span = high - low
    # Not always from halves: those of small numbers may be flushed to zero.
    halves = scale_of(high * 0.5 - low * 0.5, step * 2.0)
    return jnp.where(jnp.isinf(span), halves, scale_of(span, step))


def check_sharing(call: str, format: Format) -> None:
    """Checks granularity and group size of a format that `call`, not yet closed, would make."""
    one_of(call, "granularity", format.granularity, get_args(Granularity))
    if format.granularity != "group":
        if format.group_size is not None:
            raise ValueError(
                f"`{joined(call, f'group_size={format.group_size}')}` has "
                f'granularity="{format.granularity}"; groups need `granularity="group"`.'
            )
    elif type(format.group_size) is not int or format.group_size < 1:
        given = f'granularity="group", group_size={format.group_size!r}'
        raise ValueError(
            f"`{joined(call, given)}`: group_size must be a positive integer, such as 64."
        )


def check_key(format: Format, key: jax.Array | None) -> None:
    """A format that rounds at random needs a key."""
    if format.rounding == "stochastic" and key is None:
        raise ValueError(f"`{format}` rounds at random: pass `key=`.")


def one_of(call: str, name: str, value: Any, known: Sequence[str]) -> None:
    """Checks that the argument `name` has a known value."""
    if value not in known:
        names = ", ".join(f'"{option}"' for option in known)
        raise ValueError(f"`{joined(call, f'{name}={value!r}')}`: {name} is one of {names}.")


def joined(call: str, argument: str) -> str:
    """`Int(8` and another argument, as a call."""
    return f"{call}{'' if call.endswith('(') else ', '}{argument})"
