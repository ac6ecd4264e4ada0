"""A product of two activations, both quantized: its formats, and what is computed in its place.

The dense form is the product of both operands fake-quantized. Where both formats are integers the
same is computed on codes,

    y = s_l s_r Σ (q_l - z_l)(q_r - z_r),

the sum in int32, with the derivative of the dense form. An operand has one scale; its range is
found in each call, or was measured.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jopt.trace.swaps import Swapped

from .._formats.base import Format, Grid, Int
from .._training.fake import straight_through
from .weights import Range

Ranges = tuple[Range | None, Range | None]  # of the left and of the right operand


@dataclasses.dataclass(frozen=True)
class Pair:
    """How the two operands of a product without a weight are quantized.

    Args:
      left: format of the left operand; None leaves it as it is.
      right: format of the right operand, likewise. Operands are those of the `dot_general`, which
        `jopt.quant.weightless` lists with their shapes.
      static: take both ranges from `calibrate_products`.

    Raises:
      TypeError: if something else than a format is given.
      ValueError: if neither has a format, or one has groups or rounds stochastically.
    """

    left: Format | None
    right: Format | None
    _: dataclasses.KW_ONLY
    static: bool = False

    def __post_init__(self) -> None:
        """Checks the formats."""
        for format in (self.left, self.right):
            if format is None:
                continue
            if not isinstance(format, Format):
                raise TypeError(f"`Pair({format!r})`: expected a format, such as `Int(8)`.")
            if format.granularity == "group" or format.rounding == "stochastic":
                raise ValueError(
                    f"`Pair({format})`: an operand has one range and is rounded without a key; "
                    "neither groups nor stochastic rounding are for it."
                )
        if self.left is None and self.right is None:
            raise ValueError("`Pair(None, None)` quantizes nothing; leave the product out instead.")


# What is computed in the product's place.


def compute(pair: Pair, call: Swapped, left: jax.Array, right: jax.Array) -> jax.Array:
    """The quantized product."""
    params = tuple(sorted(call.params.items(), key=lambda item: item[0]))
    operation = _Operation(params, pair, call.dtype)
    ranges = call.given or (None, None)
    if operation.on_integers(left):
        return _integers(left, right, ranges, operation)
    return _simulated(left, right, ranges, operation)


class _Operation(NamedTuple):
    """A product and its formats, as a value: equal ones share their traces."""

    params: tuple[tuple[str, Any], ...]
    pair: Pair
    dtype: Any

    def terms(self, left: jax.Array) -> int:
        contract, _ = dict(self.params)["dimension_numbers"]
        return math.prod(left.shape[axis] for axis in contract[0])

    def on_integers(self, left: jax.Array) -> bool:
        """Whether codes can be multiplied, and the sum fits 32 bits."""
        one, other = self.pair.left, self.pair.right
        if not (isinstance(one, Int) and isinstance(other, Int)):
            return False
        return self.terms(left) * (one.high - one.low) * (other.high - other.low) < 2**31


@functools.partial(jax.jit, static_argnames="operation")
def _simulated(left: Any, right: Any, ranges: Ranges, operation: _Operation) -> jax.Array:
    """The dense form."""
    pair = operation.pair
    operands = _rounded(left, pair.left, ranges[0]), _rounded(right, pair.right, ranges[1])
    return jax.lax.dot_general_p.bind(*operands, **dict(operation.params))


@functools.partial(jax.jit, static_argnames="operation")
def _integers(left: Any, right: Any, ranges: Ranges, operation: _Operation) -> jax.Array:
    """The product of codes, with the derivative of the dense form."""

    @jax.custom_jvp
    def product(left: jax.Array, right: jax.Array, ranges: Ranges) -> jax.Array:
        formats, coded = (operation.pair.left, operation.pair.right), []
        for x, format, range in zip((left, right), formats, ranges, strict=True):
            assert format is not None
            grid = _grid(x, format, range)
            coded.append((format.encode(x, grid).astype(jnp.int8), grid))
        return _dot_codes(dict(operation.params), *coded).astype(operation.dtype)

    @product.defjvp
    def _(primals: Any, tangents: Any) -> Any:
        dense = functools.partial(_simulated, operation=operation)
        return product(*primals), jax.jvp(dense, primals, tangents)[1]

    return product(left, right, ranges)


def _grid(x: jax.Array, format: Format, range: Range | None) -> Grid:
    """The grid of an operand, one scale in all, of its rank."""
    if range is None:
        return format.fit(x, tuple(-1 - i for i, _ in enumerate(x.shape)))
    return format.grid(*(end.reshape((1,) * x.ndim) for end in range))


def _rounded(x: jax.Array, format: Format | None, range: Range | None) -> jax.Array:
    """The fake-quantized operand; beyond a static range its gradient is zero."""
    if format is None:
        return x
    fixed = jax.lax.stop_gradient(x)
    grid = _grid(fixed, format, range)
    values = format.decode(format.encode(fixed, grid), grid).astype(x.dtype)
    if range is None:
        return straight_through(x, values)
    values = jnp.where(jnp.isnan(fixed), fixed, values)
    return straight_through(x, values, format.inside(fixed, grid))


def _dot_codes(params: Any, left: tuple[jax.Array, Grid], right: tuple[jax.Array, Grid]) -> Any:
    """The product of codes in int32, times both scales."""
    (one, first), (other, second) = left, right
    contract, batch = params["dimension_numbers"]
    total = jax.lax.dot_general(
        one,
        other,
        params["dimension_numbers"],
        preferred_element_type=jnp.int32,
        out_sharding=params.get("out_sharding"),
    )

    def sums(codes: jax.Array, side: int, ones: int) -> jax.Array:
        """Sums over the contracted axes, laid onto the result."""
        summed = jnp.sum(codes, contract[side], jnp.int32, keepdims=True)
        free = [a for a in range(codes.ndim) if a not in (*contract[side], *batch[side])]
        moved = jnp.transpose(summed, (*batch[side], *free, *contract[side]))
        kept, rest = moved.shape[: len(batch[side])], moved.shape[len(batch[side]) :][: len(free)]
        return moved.reshape(
            (*kept, *rest, *(1,) * ones) if side == 0 else (*kept, *(1,) * ones, *rest)
        )

    frees = [x.ndim - len(contract[0]) - len(batch[0]) for x in (one, other)]
    # (q_l - z_l)(q_r - z_r), multiplied out; int32 wraps around, so only the result must fit.
    zeros = [
        g.zero_point if g.zero_point is None else g.zero_point.astype(jnp.int32).reshape(())
        for g in (first, second)
    ]
    if zeros[0] is not None:
        total = total - zeros[0] * sums(other, 1, frees[0])
    if zeros[1] is not None:
        total = total - zeros[1] * sums(one, 0, frees[1])
    if zeros[0] is not None and zeros[1] is not None:
        total = total + zeros[0] * zeros[1] * math.prod(one.shape[a] for a in contract[0])
    return total.astype(jnp.float32) * (first.scale.reshape(()) * second.scale.reshape(()))
