"""Products with codes themselves: of int8 in int32, or of numbers that bfloat16 holds exactly."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jopt.trace.layered import full_along

from .._formats.base import Grid
from .halves import apart, pairs, woven
from .operands import (
    Operands,
    as_row,
    group_count,
    in_groups,
    over_inputs,
    padded,
    per_output,
    zeros,
)
from .order import in_order

# Of codes and codes [inputs, outputs], or turned; with the weight's axis that is summed.
IntegerProduct = Callable[[jax.Array, jax.Array, int], jax.Array]

# Inputs that `blocked` sums at a time: above so many XLA:CPU's kernel runs out of its caches.
BLOCK = 1024


def integers(o: Operands, product: IntegerProduct | None = None) -> jax.Array:
    """Codes times codes into int32, scales afterwards."""
    assert o.grid is not None
    total = _total(o.x, o.grid.zero_point, o.leaf.codes, o.leaf.zero_point, o.turned, product)
    return total.astype(jnp.float32) * (o.grid.scale * as_row(o.leaf.scale, o))


def blocked(o: Operands) -> jax.Array:
    """Codes times codes into int32, block after block of inputs."""
    return padded(o, functools.partial(integers, product=_in_blocks))


def paired_blocked(o: Operands) -> jax.Array:
    """The same of codes of four bits, of which a block at a time becomes codes of eight."""
    return padded(o, functools.partial(integers, product=_in_blocks_of_pairs))


def grouped(o: Operands, narrow: Any = jnp.int8) -> jax.Array:
    """A loop over groups of inputs, whose integer products are scaled and summed in float32."""
    return padded(o, functools.partial(_grouped, narrow=narrow))


def bfloat16(o: Operands) -> jax.Array:
    """Codes, which bfloat16 holds exactly, as bfloat16, with sums in float32."""
    return padded(o, _bfloat16)


def shifted(codes: jax.Array, grid: Grid | None) -> jax.Array:
    """Codes without their zero point: at most 255 in size, which bfloat16 holds exactly."""
    values = codes.astype(jnp.bfloat16)
    if grid is None or grid.zero_point is None:
        return values
    zero = full_along(grid.zero_point, codes.shape, in_groups(grid.zero_point, codes.shape, (0, 1)))
    return values - zero.astype(jnp.bfloat16)


def narrow_dot(x: jax.Array, w: jax.Array, turned: bool) -> jax.Array:
    """A product of two matrices with sums in float32."""
    dimensions = (((1,), (1 if turned else 0,)), ((), ()))
    return jax.lax.dot_general(x, w, dimensions, preferred_element_type=jnp.float32)


# Helpers, in order of use.


def _total(
    x: Any, x_zero: Any, w: Any, w_zero: Any, turned: bool, product: IntegerProduct | None = None
) -> jax.Array:
    """Σ (x - x_zero)(w - w_zero), multiplied out; int32 wraps, so only the result must fit."""
    axis = 1 if turned else 0
    product = product or _wide_dot
    if x_zero is None:
        total = product(x, w, axis)
    else:
        zero = x_zero.astype(jnp.int32)

        def summed(x: jax.Array, w: jax.Array) -> jax.Array:
            return product(x, w, axis) - zero * jnp.sum(w, axis, jnp.int32)[None]

        def by_ones(x: jax.Array, w: jax.Array) -> jax.Array:
            both = product(jnp.concatenate([x, jnp.ones_like(x[:1])]), w, axis)
            return both[:-1] - zero * both[-1:]

        # To sum the weight's codes XLA:CPU makes them wide; a row of ones more costs little there.
        if in_order(x):
            total = jax.lax.platform_dependent(x, w, cpu=by_ones, default=summed)
        else:
            total = summed(x, w)
        x = x.astype(jnp.int32) - x_zero.astype(jnp.int32)
    if w_zero is not None:
        zero = w_zero.T if turned else w_zero
        total = total - jnp.sum(x, 1, jnp.int32, keepdims=True) * zero.astype(jnp.int32)
    return total


def _wide_dot(x: jax.Array, w: jax.Array, axis: int) -> jax.Array:
    dimensions = (((1,), (axis,)), ((), ()))
    return jax.lax.dot_general(x, w.astype(jnp.int8), dimensions, preferred_element_type=jnp.int32)


def _in_blocks(x: jax.Array, w: jax.Array, axis: int) -> jax.Array:
    def part(x: jax.Array, w: jax.Array) -> jax.Array:
        return _wide_dot(x, w, axis)

    return over_inputs(x, w, axis, BLOCK, part, _zero_sums(x, w))


def _in_blocks_of_pairs(x: jax.Array, w: jax.Array, axis: int) -> jax.Array:
    both = pairs(w)

    def part(x: jax.Array, both: jax.Array) -> tuple[jax.Array, ...]:
        return tuple(_wide_dot(x, half, axis) for half in apart(both))

    total = _zero_sums(x, both)
    return woven(*over_inputs(x, both, axis, BLOCK, part, (total, total)))


def _zero_sums(x: jax.Array, w: jax.Array) -> jax.Array:
    """[rows, columns], made of the operands, for what `shard_map` wants to know of them."""
    return jnp.zeros_like(x[:, :1], jnp.int32) + jnp.zeros_like(w[:1], jnp.int32)


def _bfloat16(o: Operands) -> jax.Array:
    scale = as_row(o.leaf.scale, o)
    if o.grid is not None:
        scale = o.grid.scale * scale
    x, w = shifted(o.x, o.grid), shifted(o.leaf.codes, o.leaf.grid)
    return narrow_dot(x, w, o.turned) * scale


def _grouped(o: Operands, narrow: Any) -> jax.Array:
    count, axis = group_count(o), 1 if o.turned else 0
    size = o.leaf.codes.shape[axis] // count
    x = jnp.moveaxis(o.x.reshape(o.x.shape[0], count, size), 1, 0)
    x_zero = None if o.grid is None else o.grid.zero_point

    def divided(array: jax.Array | None) -> jax.Array | None:
        """Codes, or an array as coarse as groups, with the groups first."""
        if array is None or array.shape[axis] == 1:
            return array if array is None else jnp.broadcast_to(array, (count, *array.shape))
        shape = (*array.shape[:axis], count, array.shape[axis] // count, *array.shape[axis + 1 :])
        return jnp.moveaxis(array.reshape(shape), axis, 0)

    def add(total: jax.Array, group: Any) -> tuple[jax.Array, None]:
        x, codes, scale, zero = group
        if narrow == jnp.int8:
            part = _total(x, x_zero, codes, zero, o.turned).astype(jnp.float32)
        else:
            wide = shifted(codes, Grid(scale, zero))
            part = narrow_dot(shifted(x, o.grid), wide, o.turned)
        return total + part * (scale.T if o.turned else scale), None

    grid = (None if c is None else per_output(c, o) for c in o.leaf.grid[:2])
    groups = (x, divided(o.leaf.codes), *(divided(c) for c in grid))
    total, _ = jax.lax.scan(add, zeros(o), groups)
    return total if o.grid is None else total * o.grid.scale
