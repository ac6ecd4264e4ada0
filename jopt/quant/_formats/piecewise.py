"""Steps that differ from region to region: given pieces, or two regions with a fitted break."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

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
    over,
    rows_of,
    scale_of,
)
from .exact import exact_sum
from .placed import whole
from .tables import ascending, below, lookup

_PARTS = 64  # breaks are whole 64ths of the largest magnitude
_UNIT = 2**24  # whole numbers that stand for magnitudes up to 1


@dataclasses.dataclass(frozen=True)
class Piecewise(Format):
    """Values rounded by pieces of the real line.

    With `boundaries` a_0 < … < a_k and `values` b_0 < … < b_(k-1), absolute numbers:

        ŵ = b_i  where  a_i <= w < a_(i+1)

    Beyond the outer boundaries the nearest value is taken; they may be infinite. There is no scale:
    an all-zero weight has the value of zero's piece.

    With `bits`, a dense center and sparse tails, each with even steps, its own mirror image:

        |ŵ| = j p / n                          j = 0 … n-1     for |w| up to the break p
        |ŵ| = p + (j - n)(m - p) / (n - 1)     j = n … 2n-1    from p to m = max|w|

    with n = 2^(bits-2), and codes ±j. The break is the p of m/64, 2m/64 … 63m/64 with the least
    squared error. It takes 8 bits for each scale. Zero has a code; what is all zero stays so; what
    shares a grid with an infinity or a NaN becomes NaN.

    The paper counts `bits - 1` bits, those of one region with its sign; here the region's bit is
    counted too, and the break, which both regions have in the paper, has one code, so that steps
    are a little finer.

    Args:
      bits: 3 to 8, for two regions.
      boundaries: one more than there are values, ascending.
      values: 2 to 256 ascending numbers.
      granularity: for two regions, what shares a break and a scale, as in `Int`.
      group_size: for `"group"`.
      rounding: of two regions: `"nearest"`, ties to even.

    Raises:
      ValueError: if an argument is out of its range, or the arguments are of both kinds.

    Example:
      >>> import jax.numpy as jnp
      >>> from jopt.quant import Piecewise, fake_quant
      >>> signs = Piecewise(boundaries=(-jnp.inf, -0.5, 0.5, jnp.inf), values=(-1, 0, 1))
      >>> fake_quant(jnp.array([-3.0, -0.5, 0.2, 0.5]), signs).tolist()
      [-1.0, 0.0, 0.0, 1.0]

    References:
      Jun Fang, Ali Shafiee, Hamzah Abdel-Aziz, David Thorsley, Georgios Georgiadis, Joseph
      Hassoun, Post-training piecewise linear quantization for deep neural networks, 2020,
      arXiv:2002.00104.
    """

    bits: int = 0
    _: dataclasses.KW_ONLY
    boundaries: tuple[float, ...] | None = None
    values: tuple[float, ...] | None = None
    granularity: Granularity = "channel"
    group_size: int | None = None
    rounding: Rounding = dataclasses.field(default="nearest", init=False, repr=False)
    needs_values: bool = dataclasses.field(default=False, init=False, repr=False)

    def __post_init__(self) -> None:
        """Checks the arguments; given values say how many bits there are."""
        if self.boundaries is not None or self.values is not None:
            self._check_given()
        elif isinstance(self.bits, bool) or self.bits not in range(3, 9):
            raise ValueError(
                f"`Piecewise({self.bits!r})`: bits must be an integer from 3 to 8, or pass "
                "`boundaries=` and `values=`."
            )
        check_sharing(f"Piecewise({self.bits}", self)
        object.__setattr__(self, "needs_values", self.values is None)

    def _check_given(self) -> None:
        call = f"Piecewise(boundaries={self.boundaries}, values={self.values}"
        if self.boundaries is None or self.values is None:
            raise ValueError(f"`{call})`: pass both.")
        if self.granularity == "group":
            raise ValueError(f'`{call}, granularity="group")`: given values have no scale.')
        values = ascending("Piecewise(", "values", self.values)
        ends = tuple(float(np.float32(end)) for end in self.boundaries)
        if list(values) != [float(np.float32(value)) for value in self.values]:
            raise ValueError(f"`{call})`: values must ascend.")
        if len(ends) != len(values) + 1 or any(b <= a for a, b in itertools.pairwise(ends)):
            raise ValueError(
                f"`{call})`: {len(values)} values need {len(values) + 1} ascending boundaries."
            )
        bits = (len(values) - 1).bit_length()
        if self.bits not in (0, bits):
            raise ValueError(f"`{joined(call, f'bits={self.bits}')}`: the values take {bits} bits.")
        # Without a scale there is but one number to store, which tells whether all is finite.
        given = {"bits": bits, "boundaries": ends, "values": values, "granularity": "tensor"}
        for name, value in given.items():
            object.__setattr__(self, name, value)

    @property
    def container(self) -> Any:
        """int4 or int8 for two regions, uint4 or uint8 for given values."""
        if self.values is None:
            return jnp.int4 if self.bits <= 4 else jnp.int8
        return jnp.uint4 if self.bits <= 4 else jnp.uint8

    @property
    def steps(self) -> int:
        """How many codes a region has on either side of zero, n."""
        return 2 ** (self.bits - 2)

    def extent(self, x: jax.Array, axes: Sequence[int]) -> tuple[jax.Array, jax.Array]:
        """Plus and minus the largest magnitude over `axes` (of each group)."""
        return mirrored(self, x, axes)

    def grid(self, low: jax.Array, high: jax.Array) -> Grid:
        """For given values the grid, which is the same for any range.

        Raises:
          ValueError: for two regions, whose break takes more than the two ends.
        """
        if self.values is None:
            raise ValueError(
                f"`{self}` fits its break to values and has no grid for a range alone, as that of "
                "an activation; give `boundaries=` and `values=`, or choose another format there."
            )
        finite = jnp.isfinite(high) & jnp.isfinite(low)  # of finite ones the difference may not be
        return Grid(jnp.where(finite, 1.0, jnp.nan).astype(jnp.float32), None)

    def fit(self, x: jax.Array, axes: Sequence[int]) -> Grid:
        """Scale and break for the values of `x` along `axes`."""
        if self.values is not None:
            return self.grid(*self.extent(x, axes))
        x = whole(x)
        scale = scale_of(self.extent(x, axes)[1], 1.0)
        rows = jnp.abs(over(rows_of(self, x, axes), scale.reshape(-1, 1)))
        rows = jnp.nan_to_num(rows)
        best = _best_break(rows, self.steps)
        return Grid(scale, None, Table(best.astype(jnp.uint8).reshape(*scale.shape, 1)))

    def encode(self, x: jax.Array, grid: Grid, *, key: jax.Array | None = None) -> jax.Array:
        """The codes of the pieces or, for two regions, signed counts of steps; int32."""
        check_key(self, key)
        if key is not None:
            raise ValueError(f"`{self}` does not round at random: pass no `key=`.")
        if self.values is not None:
            assert self.boundaries is not None
            return below(x.astype(jnp.float32), self.boundaries[1:-1], closed=True)
        place = jnp.abs(over(x, grid.scale))
        code = _encode(place, spread(_parts(grid), x.shape), self.steps)
        return jnp.where(x < 0, -code, code)

    def inside(self, x: jax.Array, grid: Grid) -> jax.Array:
        """Where `x` is in a piece, or beyond the largest magnitude by half a step at most."""
        x = x.astype(jnp.float32)
        if self.boundaries is not None:
            return (x >= self.boundaries[0]) & (x < self.boundaries[-1])
        place = jnp.abs(over(x, grid.scale))
        step = (_PARTS - spread(_parts(grid), x.shape)) * np.float32(1 / _PARTS / (self.steps - 1))
        return place - 1.0 <= step * 0.5

    def decode(self, codes: jax.Array, grid: Grid) -> jax.Array:
        """The values in float32."""
        if self.values is not None:
            return lookup(codes, self.values) * spread(grid.scale, codes.shape)
        codes = codes.astype(jnp.int32)
        values = _decode(jnp.abs(codes), spread(_parts(grid), codes.shape), self.steps)
        values = values * spread(grid.scale, codes.shape)
        return jnp.where(codes < 0, -values, values)


def _parts(grid: Grid) -> jax.Array:
    """The break, in 64ths of the scale."""
    assert grid.table is not None
    return grid.table.entries[..., 0].astype(jnp.int32)


def _decode(code: jax.Array, parts: jax.Array, steps: int) -> jax.Array:
    """Magnitude of a code. Sums are of whole numbers, each followed by one product."""
    dense = (code * parts).astype(jnp.float32) * np.float32(1 / (_PARTS * steps))
    tail = (code - steps) * (_PARTS - parts) + parts * (steps - 1)
    tail = tail.astype(jnp.float32) * np.float32(1 / (_PARTS * (steps - 1)))
    return jnp.where(code < steps, dense, tail)


def _encode(place: jax.Array, parts: jax.Array, steps: int) -> jax.Array:
    """Code of a magnitude in [0, 1]; NaN has any."""
    dense = jnp.round(place * (np.float32(_PARTS * steps) / parts.astype(jnp.float32)))
    # What is beyond the break, as a whole number: a difference of floats could be rounded once
    # instead of twice.
    whole = jnp.round(jnp.minimum(place, 2.0) * np.float32(_UNIT)).astype(jnp.int32)
    beyond = (whole - parts * (_UNIT // _PARTS)).astype(jnp.float32)
    one = np.float32(_PARTS * (steps - 1) / _UNIT) / (_PARTS - parts).astype(jnp.float32)
    tail = jnp.clip(jnp.round(beyond * one), 0, steps - 1).astype(jnp.int32) + steps
    return jnp.where(beyond < 0, jnp.minimum(dense, steps).astype(jnp.int32), tail)


def _best_break(rows: jax.Array, steps: int) -> jax.Array:
    """The break, in 64ths, with the least squared error of each row of magnitudes up to 1."""
    whole = jnp.round(rows * np.float32(_UNIT)).astype(jnp.int32)

    def error(parts: jax.Array) -> jax.Array:
        values = _decode(_encode(rows, parts, steps), parts, steps)
        off = whole - jnp.round(values * np.float32(_UNIT)).astype(jnp.int32)
        part = off.astype(jnp.float32) * np.float32(1 / _UNIT)
        return exact_sum(jnp.round(part * part * np.float32(2**30)).astype(jnp.int32), 31)

    errors = jax.lax.map(error, jnp.arange(1, _PARTS, dtype=jnp.int32))
    return jnp.argmin(errors, axis=0) + 1
