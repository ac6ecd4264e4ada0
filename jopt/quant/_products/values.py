"""Products with a weight alone: dequantized as a whole, or a part at a time."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jopt.trace.layered import coarse_map

from .._formats.base import Int
from .._leaves.weights import QArray
from .halves import apart, halves, pairs, woven
from .integers import narrow_dot, shifted
from .operands import (
    Implementation,
    Operands,
    as_row,
    codes_in_bfloat16,
    cut_inputs,
    exact_in_float32,
    group_count,
    over_inputs,
    padded,
    per_output,
    summed_in,
    zeros,
)
from .order import in_order, once_there

# Inputs for which `striped` makes a weight dense at a time.
STRIPE = 512
# Up to so many inputs it is written out instead of as a loop: parts of so many, of which so many
# may be dense at a time.
WRITTEN_OUT = 2048
PART, LANES = 256, 3


def dense(o: Operands) -> jax.Array:
    """The weight dequantized."""
    return jax.lax.dot_general(
        o.x,
        o.leaf.materialise(),
        (((1,), (1 if o.turned else 0,)), ((), ())),
        precision=o.precision,
        preferred_element_type=o.dtype,
    )


def tiled(o: Operands, width: int) -> jax.Array:
    """The weight dequantized for some outputs at a time, so that it never exists as a whole."""
    return padded(o, functools.partial(_tiled, width=width))


def half(o: Operands) -> jax.Array:
    """The weight dequantized for half of the outputs, then for the others."""
    if not in_order(o.x):
        return tiled(o, o.leaf.codes.shape[0 if o.turned else 1] // 2)
    return padded(o, lambda o: _in_turn(o.x, [(o, None)])[0])


def paired_half(o: Operands) -> jax.Array:
    """An int4 weight dequantized by even and odd columns, of half of the outputs at a time."""
    return padded(o, _paired_in_turn if in_order(o.x) else _paired_in_loop)


def striped(o: Operands) -> jax.Array:
    """Sums over some inputs after others, so that no dense weight exists."""
    return padded(o, lambda o: _striped(o, o.leaf.codes, (o.leaf,), lambda codes: (codes,))[0])


def paired_striped(o: Operands) -> jax.Array:
    """The same of a weight of four bits, its even columns and its odd ones side by side."""
    return padded(o, lambda o: woven(*_striped(o, pairs(o.leaf.codes), halves(o), apart)))


# Helpers, in order of use.


def _in_turn(x: jax.Array, products: Sequence[tuple[Operands, Any]]) -> list[jax.Array]:
    """Each product, half of the outputs after half; of so many products a half exists at a time.

    XLA:CPU waits for all threads at the end of each turn of a loop, and then puts outputs into
    order by a copy; here that is fused with what comes after. Products go with how their codes are
    unpacked, as `_some` takes it.
    """
    first, found = products[0][0], []
    outputs = first.leaf.codes.shape[0 if first.turned else 1]
    width = -(-outputs // 2)
    for begin in range(0, outputs, width):
        for o, unpacked in products:
            before = found[-len(products)] if begin else x
            start = once_there(jnp.asarray(begin), before)
            found.append(_product(_some(o, start, min(width, outputs - begin), unpacked)))
    return [jnp.concatenate(found[i :: len(products)], axis=1) for i in range(len(products))]


def _some(o: Operands, start: Any, size: int, unpacked: Any = None) -> Operands:
    """The operands of some outputs; `unpacked` makes codes of what cuts arrays to these outputs."""
    axis = 0 if o.turned else 1

    def cut(array: jax.Array) -> jax.Array:
        if array.shape[axis] == 1:
            return array
        return jax.lax.dynamic_slice_in_dim(array, start, size, axis)

    codes, coarse = o.leaf.split()
    codes = unpacked(cut) if unpacked else cut(codes)
    coarse = coarse_map(lambda c: cut(per_output(c, o)), coarse)
    return o._replace(leaf=o.leaf.joined(codes, coarse))  # pyright: ignore[reportArgumentType]


def _paired_in_turn(o: Operands) -> jax.Array:
    both = pairs(o.leaf.codes)
    products = [(one, lambda cut, i=i: apart(cut(both))[i]) for i, one in enumerate(_each_half(o))]
    even, odd = _in_turn(o.x, products)
    return even + odd if o.turned else woven(even, odd)


def _paired_in_loop(o: Operands) -> jax.Array:
    both = pairs(o.leaf.codes)
    four: Any = jnp.asarray(4, both.dtype)
    sides = _each_half(o)

    def product(turn: Any) -> jax.Array:
        shift, coarse, x = turn
        leaf = o.leaf.joined(jnp.right_shift(jnp.left_shift(both, shift), four), coarse)
        return _product(sides[0]._replace(x=x, leaf=leaf))

    shifts = jnp.stack([four, jnp.zeros_like(four)])
    stacked = [(side.leaf.split()[1], side.x) for side in sides]
    turns = (shifts, *jax.tree.map(lambda *arrays: jnp.stack(arrays), *stacked))
    even, odd = jax.lax.map(product, turns)
    return even + odd if o.turned else woven(even, odd)


def _each_half(o: Operands) -> list[Operands]:
    """The operands of the even columns of an int4 weight, and of the odd ones."""
    if o.turned:  # pairs lie along the inputs
        o = o._replace(dtype=summed_in(o))
        return [o._replace(x=o.x[:, i::2], leaf=own) for i, own in enumerate(halves(o))]
    return [o._replace(leaf=own) for own in halves(o)]


def _tiled(o: Operands, width: int) -> jax.Array:
    count, rest = divmod(o.leaf.codes.shape[0 if o.turned else 1], width)
    if count < 2:
        return _product(o)
    parts = jax.lax.map(lambda i: _product(_some(o, i * width, width)), jnp.arange(count))
    parts = jnp.moveaxis(parts, 0, 1).reshape(o.x.shape[0], count * width)
    if rest:
        parts = jnp.concatenate([parts, _product(_some(o, count * width, rest))], axis=1)
    return parts


def _product(o: Operands) -> jax.Array:
    """With the weight dequantized, or with its codes in bfloat16 where that is what is met."""
    if _times_codes(o) is not _times_narrow:
        return dense(o)
    return _times_narrow(o) * as_row(o.leaf.scale, o).astype(jnp.float32)


def _striped(o: Operands, codes: jax.Array, leaves: tuple[QArray, ...], unpack: Any) -> list[Any]:
    """The products with one weight or more, whose codes are unpacked from the same array."""
    axis = 1 if o.turned else 0
    own = [o._replace(leaf=leaf) for leaf in leaves]
    dtype = summed_in(o)
    times_codes = _times_codes(o)

    def part(x: jax.Array, weight: Any) -> list[jax.Array]:
        codes, coarse = weight
        sums = []
        for one, c in zip(unpack(codes), coarse, strict=True):
            leaf: Any = o.leaf.joined(one, c)
            cut = o._replace(x=x, leaf=leaf, dtype=dtype)
            sums.append((times_codes or dense)(cut).astype(dtype))
        return sums

    weight = (codes, [leaf.split()[1] for leaf in leaves])
    begun = [zeros(one).astype(dtype) for one in own]
    inputs, groups = o.x.shape[1], group_count(o)
    fits = inputs % PART == 0 and (groups == 1 or PART * groups % inputs == 0)
    if in_order(o.x) and fits and inputs <= WRITTEN_OUT:
        totals = _in_lanes(o.x, weight, axis, part)
    else:
        totals = over_inputs(o.x, weight, axis, STRIPE, part, begun)
    if times_codes is None:
        return totals
    scales = [as_row(one.leaf.scale, one).astype(dtype) for one in own]
    return [total * scale for total, scale in zip(totals, scales, strict=True)]


def _in_lanes(x: jax.Array, weight: Any, axis: int, part: Any) -> list[jax.Array]:
    """What `over_inputs` adds up, written out: a part of the weight for each of so many inputs.

    XLA:CPU waits for all threads at the end of each turn of a loop; here one part is widened while
    another is multiplied. Each waits for the third before it, so that no more exist at a time.
    """
    inputs, found = x.shape[1], []
    for i, begin in enumerate(range(0, inputs, PART)):
        before = x if i < LANES else found[i - LANES][0]
        start = once_there(jnp.asarray(begin), before)
        weights = cut_inputs(weight, axis, inputs, start, PART)
        found.append(part(x[:, begin : begin + PART], weights))
    # Summed at the end, which is one kernel with what comes after it.
    return functools.reduce(lambda a, b: jax.tree.map(jnp.add, a, b), found)


def _times_codes(o: Operands) -> Implementation | None:
    """The product with the codes, where the scales may wait for the sum; else None."""
    if not isinstance(o.leaf.format, Int) or group_count(o) != 1:
        return None
    if codes_in_bfloat16(o):
        return _times_narrow
    return _times_wide if exact_in_float32(o) else None


def _times_narrow(o: Operands) -> jax.Array:
    return narrow_dot(o.x, shifted(o.leaf.codes, o.leaf.grid), o.turned)


def _times_wide(o: Operands) -> jax.Array:
    w = o.leaf.codes.astype(jnp.float32)
    if o.leaf.zero_point is not None:
        w = w - per_output(o.leaf.zero_point, o).astype(jnp.float32)
    axis = 1 if o.turned else 0
    return jax.lax.dot_general(o.x, w, (((1,), (axis,)), ((), ())), precision=o.precision)
