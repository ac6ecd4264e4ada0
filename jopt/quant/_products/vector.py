"""One row times codes, in one kernel that XLA:CPU makes of products and sums.

The codes are read once, where they lie, and are never stored as wider ones. A reduction over
sixteen inputs is one that its vectorizer unrolls over the outputs; one to two arrays, of different
columns, is one that no library takes from it, which would have the operands stored first.
"""

import functools

import jax
import jax.numpy as jnp

from jopt.trace.layered import full_along

from .._formats.base import Int
from .halves import nibbles, splits, woven
from .integers import integers
from .operands import Operands, codes_in_bfloat16, exact_in_float32, group_count, per_output
from .order import settled

# As many products of int8 and of four bits as a sum in 16 bits can take: 16 · 128 · 15 < 2^15.
SIXTEEN = 16
# As many rows of int32 XLA:CPU sums in one loop over the columns; of more it makes a slow tree.
FEW = 32


def serves(o: Operands) -> bool:
    """Whether `vector` can compute a product."""
    (inputs, outputs), groups = o.leaf.codes.shape, group_count(o)
    one_row = isinstance(o.x.shape[0], int) and o.x.shape[0] == 1
    if not one_row or o.turned or outputs % 2 or not isinstance(o.leaf.format, Int):
        return False
    if not inputs or not groups or inputs // groups % SIXTEEN:
        return False
    if o.grid is not None:
        return groups == 1 and splits(o) and o.x.dtype == jnp.int8
    return codes_in_bfloat16(o) or (o.leaf.activation is None and exact_in_float32(o))


def vector(o: Operands) -> jax.Array:
    """One row times codes, of four bits if the row has codes, too: then in integers."""
    return _floats(o) if o.grid is None else integers(o, _integers)


# Helpers, in order of use.


def _floats(o: Operands) -> jax.Array:
    """Sums in float32, of each group by itself; scales afterwards."""
    scale, zero = (None if c is None else _coarse_columns(c, o) for c in o.leaf.grid[:2])
    assert scale is not None
    values = [_sixteens(c.astype(jnp.float32)) for c in _columns(o.leaf.codes)]
    if zero is not None:
        values = [v - _spread(z, v.shape[0])[:, None] for v, z in zip(values, zero, strict=True)]
    sums = _sums(o.x, *values)
    if group_count(o) == 1:
        totals = [jnp.sum(s, 0, keepdims=True) * c for s, c in zip(sums, scale, strict=True)]
    else:
        scaled = [s * _spread(c, s.shape[0]) for s, c in zip(sums, scale, strict=True)]
        totals = [jnp.sum(s, 0, keepdims=True) for s in scaled]
    return _joined(o.leaf.codes, *totals)


def _integers(x: jax.Array, w: jax.Array, axis: int) -> jax.Array:
    del axis  # the weight is not turned
    one, other = (_sixteens(c.astype(jnp.int16)) for c in _columns(w))
    return _joined(w, *(_over_few(sums.astype(jnp.int32)) for sums in _sums(x, one, other)))


def _columns(codes: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Two halves of the columns: of codes of four bits those that share bytes, else those apart."""
    if codes.dtype in (jnp.int4, jnp.uint4):
        return nibbles(codes)
    half = codes.shape[1] // 2
    return codes[:, :half], codes[:, half:]


def _joined(codes: jax.Array, one: jax.Array, other: jax.Array) -> jax.Array:
    """[1, outputs] of the two halves of the outputs."""
    if codes.dtype in (jnp.int4, jnp.uint4):
        return woven(one, other)
    return jnp.concatenate([one, other], 1)


def _sixteens(values: jax.Array) -> jax.Array:
    return values.reshape(-1, SIXTEEN, values.shape[1])


def _sums(x: jax.Array, one: jax.Array, other: jax.Array) -> list[jax.Array]:
    """[inputs / 16, columns] of each: sums of products with a row, in the dtype of the columns."""
    row = settled(x)[0].reshape(-1, SIXTEEN, 1).astype(one.dtype)
    zero = jnp.zeros((), one.dtype)

    def add(a: list[jax.Array], b: list[jax.Array]) -> list[jax.Array]:
        return [a[0] + b[0], a[1] + b[1]]

    return jax.lax.reduce([row * one, row * other], [zero, zero], add, (1,))


def _coarse_columns(coarse: jax.Array, o: Operands) -> tuple[jax.Array, jax.Array]:
    """What `_columns` is for codes, for an array as coarse as groups, in float32."""
    coarse, codes = per_output(coarse, o).astype(jnp.float32), o.leaf.codes
    coarse = full_along(coarse, (coarse.shape[0], codes.shape[1]), [1])
    if codes.dtype in (jnp.int4, jnp.uint4):
        return coarse[:, 0::2], coarse[:, 1::2]
    half = codes.shape[1] // 2
    return coarse[:, :half], coarse[:, half:]


def _spread(coarse: jax.Array, count: int) -> jax.Array:
    """[groups, columns] as [count, columns], each of them for several sixteens."""
    groups, columns = coarse.shape
    each = jnp.broadcast_to(coarse[:, None], (groups, count // groups, columns))
    return each.reshape(count, columns)


def _over_few(sums: jax.Array) -> jax.Array:
    """Σ over the rows, as [1, columns]."""
    each = (sums[i : i + FEW] for i in range(0, sums.shape[0], FEW))
    return functools.reduce(jnp.add, (jnp.sum(s, 0, jnp.int32, keepdims=True) for s in each))
