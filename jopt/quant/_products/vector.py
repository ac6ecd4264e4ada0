"""One row times codes, in one kernel that XLA:CPU makes of products and sums.

The codes are read once, where they lie, and are never stored as wider ones. A reduction over
sixteen inputs is one that its vectorizer unrolls over the outputs; one to two arrays, of different
columns, is one that no library takes from it, which would have the operands stored first.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jopt.trace.layered import full_along

from .._formats.base import Int
from .halves import nibbles, woven
from .operands import (
    Implementation,
    Operands,
    codes_in_bfloat16,
    exact_in_float32,
    group_count,
    is_spread,
    per_output,
)
from .order import settled

# As many products of int8 less a zero point and of int4 as 16 bits can sum: 16 · 255 · 8 < 2^15.
SIXTEEN = 16
# As many rows of int32 XLA:CPU sums in one loop over the columns; of more it makes a slow tree.
FEW = 32
# Outputs from which on the vectorizer has enough of them, where codes meet codes.
WIDE = 64


def serves(o: Operands) -> bool:
    """Whether `vector` can compute a product."""
    (inputs, outputs), groups = o.leaf.codes.shape, group_count(o)
    one_row = isinstance(o.x.shape[0], int) and o.x.shape[0] == 1
    if not one_row or o.turned or not outputs or outputs % 2:
        return False
    if not isinstance(o.leaf.format, Int) or not inputs or not groups:
        return False
    if inputs // groups % SIXTEEN:
        return False
    if o.grid is None:
        return codes_in_bfloat16(o) or (o.leaf.activation is None and exact_in_float32(o))
    return o.x.dtype == jnp.int8 and o.leaf.codes.dtype == jnp.int4 and outputs >= WIDE


def vector(o: Operands, many: Implementation) -> jax.Array:
    """One row times codes, of four bits if the row has codes, too: then in integers.

    Args:
      o: the operands, as `serves` takes them.
      many: what computes the product of several rows, which is what one row is under `vmap`.
    """
    arrays, structure = jax.tree.flatten((o.x, o.grid, o.leaf))

    def operands(arrays: Sequence[jax.Array]) -> Operands:
        x, grid, leaf = jax.tree.unflatten(structure, arrays)
        return o._replace(x=x, grid=grid, leaf=leaf)

    @jax.custom_batching.custom_vmap
    def run(*arrays: jax.Array) -> jax.Array:
        return _row(operands(arrays))

    @run.def_vmap
    def _(size: int, batched: Sequence[bool], *arrays: jax.Array) -> tuple[jax.Array, bool]:
        of_row = len(jax.tree.leaves((o.x, o.grid)))
        if any(batched[of_row:]) or not batched[0] or is_spread(arrays[0]):
            axes = [0 if own else None for own in batched]
            return jax.vmap(lambda *arrays: _row(operands(arrays)), axes)(*arrays), True
        pairs = zip(arrays, batched, strict=True)
        y = many(operands([a.reshape(size, a.shape[-1]) if own else a for a, own in pairs]))
        return y[:, None].astype(jnp.float32), True

    return run(*arrays)


# Helpers, in order of use.


def _row(o: Operands) -> jax.Array:
    totals = _floats(o) if o.grid is None else _integers(o)
    return _joined(o.leaf.codes, *totals)


def _floats(o: Operands) -> list[jax.Array]:
    """The sums of the columns, in float32, scaled after all inputs of one scale."""
    values = [_sixteens(c.astype(jnp.float32)) for c in _columns(o.leaf.codes)]
    if o.leaf.zero_point is not None:
        zero = (_spread(z.astype(jnp.float32), o) for z in _coarse(o.leaf.zero_point, o))
        values = [v - z[:, None] for v, z in zip(values, zero, strict=True)]
    found = zip(_sums(o.x.astype(jnp.float32), *values), _coarse(o.leaf.scale, o), strict=True)
    if group_count(o) == 1:
        return [jnp.sum(sums, 0, keepdims=True) * scale for sums, scale in found]
    return [jnp.sum(sums * _spread(scale, o), 0, keepdims=True) for sums, scale in found]


def _integers(o: Operands) -> list[jax.Array]:
    """The same of codes and codes: exact sums of all inputs, or of sixteen each that are scaled."""
    assert o.grid is not None
    x = o.x.astype(jnp.int16)
    if o.grid.zero_point is not None:
        x = x - o.grid.zero_point.astype(jnp.int16)
    values = (_sixteens(c.astype(jnp.int16)) for c in _columns(o.leaf.codes))
    found = [sums.astype(jnp.int32) for sums in _sums(x, *values)]
    if o.leaf.zero_point is not None:
        of_row = jnp.sum(x[0].reshape(-1, SIXTEEN), 1, jnp.int32, keepdims=True)
        zero = (_spread(z.astype(jnp.int32), o) for z in _coarse(o.leaf.zero_point, o))
        found = [sums - of_row * z for sums, z in zip(found, zero, strict=True)]
    own = zip(found, _coarse(o.leaf.scale, o), strict=True)
    if group_count(o) == 1:
        return [_over_few(sums).astype(jnp.float32) * (o.grid.scale * c) for sums, c in own]
    scaled = (sums.astype(jnp.float32) * _spread(c, o) for sums, c in own)
    return [jnp.sum(sums, 0, keepdims=True) * o.grid.scale for sums in scaled]


def _share_bytes(codes: jax.Array) -> bool:
    return codes.dtype in (jnp.int4, jnp.uint4)


def _columns(codes: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Two halves of the columns: of codes of four bits those that share bytes, else those apart."""
    if _share_bytes(codes):
        return nibbles(codes)
    half = codes.shape[1] // 2
    return codes[:, :half], codes[:, half:]


def _joined(codes: jax.Array, one: jax.Array, other: jax.Array) -> jax.Array:
    """[1, outputs] of the two halves of the outputs."""
    if _share_bytes(codes):
        return woven(one, other)
    return jnp.concatenate([one, other], 1)


def _sixteens(values: jax.Array) -> jax.Array:
    return values.reshape(-1, SIXTEEN, values.shape[1])


def _sums(x: jax.Array, one: jax.Array, other: jax.Array) -> list[jax.Array]:
    """[inputs / 16, columns] of each: sums of products with a row, all of one dtype."""
    row, zero = settled(x)[0].reshape(-1, SIXTEEN, 1), jnp.zeros((), x.dtype)

    def add(a: list[jax.Array], b: list[jax.Array]) -> list[jax.Array]:
        return [a[0] + b[0], a[1] + b[1]]

    return jax.lax.reduce([row * one, row * other], [zero, zero], add, (1,))


def _coarse(coarse: jax.Array, o: Operands) -> tuple[jax.Array, jax.Array]:
    """What `_columns` is for codes, for an array as coarse as groups."""
    coarse, codes = per_output(coarse, o), o.leaf.codes
    coarse = full_along(coarse, (coarse.shape[0], codes.shape[1]), [1])
    return (coarse[:, 0::2], coarse[:, 1::2]) if _share_bytes(codes) else _columns(coarse)


def _spread(coarse: jax.Array, o: Operands) -> jax.Array:
    """[groups, columns] as [inputs / 16, columns], each of them for several sixteens."""
    (groups, columns), count = coarse.shape, o.leaf.codes.shape[0] // SIXTEEN
    each = jnp.broadcast_to(coarse[:, None], (groups, count // groups, columns))
    return each.reshape(count, columns)


def _over_few(sums: jax.Array) -> jax.Array:
    """Σ over the rows, as [1, columns], by levels where there are very many."""
    count, columns = sums.shape
    if count > FEW * FEW:
        parts = count // FEW
        first = sums[: parts * FEW].reshape(parts, FEW, columns).sum(1, dtype=jnp.int32)
        total = _over_few(first)
        rest = sums[parts * FEW :]
        return total + _over_few(rest) if rest.shape[0] else total
    each = (sums[i : i + FEW] for i in range(0, count, FEW))
    return functools.reduce(jnp.add, (jnp.sum(s, 0, jnp.int32, keepdims=True) for s in each))
