"""Weights of four bits as two of eight, their even and their odd columns.

XLA:CPU takes int4 apart one by one; shifts of whole bytes it vectorizes.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jopt.trace.layered import coarse_map, full_along

from .._leaves.weights import QArray
from .operands import Implementation, Operands, group_count, summed_in


def splits(o: Operands) -> bool:
    """Whether `halves` can take the weight apart."""
    if o.leaf.codes.dtype not in (jnp.int4, jnp.uint4) or o.leaf.codes.shape[-1] % 2:
        return False
    inputs = o.leaf.codes.shape[1 if o.turned else 0]
    groups = group_count(o)
    return not o.turned or (groups > 0 and inputs // groups % 2 == 0)


def paired(o: Operands, inner: Implementation) -> jax.Array:
    """One product with the even columns, one with the odd ones."""
    both = halves(o)
    if o.turned:  # pairs lie along the inputs
        o = o._replace(dtype=summed_in(o))
        one, other = (o._replace(x=o.x[:, i::2], leaf=half) for i, half in enumerate(both))
        return inner(one) + inner(other)
    return woven(*(inner(o._replace(leaf=half)) for half in both))


def woven(even: jax.Array, odd: jax.Array) -> jax.Array:
    """[rows, outputs] of the even and the odd outputs."""
    rows, columns = even.shape
    return jnp.stack([even, odd], axis=-1).reshape(rows, 2 * columns)


def halves(o: Operands) -> tuple[QArray, QArray]:
    """The even and the odd columns of the weight, as codes of eight bits."""
    codes, coarse = o.leaf.split()
    rows, columns = codes.shape

    def half(array: jax.Array, first: int) -> QArray:
        def cut(c: jax.Array) -> jax.Array:
            size = c.shape[1]
            if size == 1 or (o.turned and size != columns):
                return c  # shared by pairs: groups of inputs are of even size
            return full_along(c, (rows, columns), [1])[:, first::2]

        return o.leaf.joined(array, coarse_map(cut, coarse))  # pyright: ignore[reportReturnType]

    even, odd = nibbles(codes)
    return half(even, 0), half(odd, 1)


def nibbles(codes: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The even and the odd columns of codes of four bits, as codes of eight.

    As slices, which XLA:CPU reads where the codes lie; `pairs` it stores before they are apart.
    """
    dtype = jnp.int8 if codes.dtype == jnp.int4 else jnp.uint8
    rows, columns = codes.shape
    both = codes.reshape(rows, columns // 2, 2)
    return both[:, :, 0].astype(dtype), both[:, :, 1].astype(dtype)


def pairs(codes: jax.Array) -> jax.Array:
    """Codes of four bits two by two, as bytes."""
    # An arithmetic shift of int8 keeps the sign of int4, a logical one of uint8 that there is none.
    dtype = jnp.int8 if codes.dtype == jnp.int4 else jnp.uint8
    rows, columns = codes.shape
    return jax.lax.bitcast_convert_type(codes.reshape(rows, columns // 2, 2), dtype)


def apart(both: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The first and the second of each pair, as codes of eight bits."""
    four: Any = jnp.asarray(4, both.dtype)
    return jnp.right_shift(jnp.left_shift(both, four), four), jnp.right_shift(both, four)
