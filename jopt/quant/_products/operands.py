"""A product of quantized operands as one of matrices, and what its scales are along either axis."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jopt.trace.layered import coarse_map, full_along

from .._formats.base import Grid
from .._leaves.weights import QArray


class Operands(NamedTuple):
    """A product as one of matrices."""

    x: jax.Array  # [rows, inputs]: values, or codes if there is a grid
    grid: Grid | None  # of x: [rows or 1, 1]
    leaf: QArray  # the weight
    turned: bool  # the weight is [outputs, inputs], else [inputs, outputs]
    precision: Any  # of a float product
    dtype: Any  # of its result


Implementation = Callable[[Operands], jax.Array]


def flattened(leaf: QArray, contract: Sequence[int]) -> tuple[QArray, bool] | None:
    """The weight as a matrix and whether that is turned; None where that would move its codes."""
    shape = leaf.codes.shape
    first, axes = len(shape) - len(contract), sorted(contract)
    if axes == list(range(len(contract))):
        cut, turned = len(contract), False
    elif axes == list(range(first, len(shape))):
        cut, turned = first, True
    else:
        return None

    def flat(coarse: jax.Array) -> jax.Array:
        blocks = (range(cut), range(cut, len(shape)))
        for block in blocks:
            if not _merges([coarse.shape[a] for a in block], [shape[a] for a in block]):
                coarse = full_along(coarse, shape, block)
        return coarse.reshape([math.prod(coarse.shape[a] for a in block) for block in blocks])

    codes, coarse = leaf.split()
    codes = codes.reshape(math.prod(shape[:cut]), math.prod(shape[cut:]))
    return leaf.joined(codes, coarse_map(flat, coarse)), turned  # pyright: ignore[reportReturnType]


def _merges(coarse: list[int], sizes: list[int]) -> bool:
    """Whether axes of a coarse array become one axis, of equal groups, by a reshape."""
    whole = 0
    while whole < len(sizes) and coarse[whole] == sizes[whole]:
        whole += 1
    return all(size == 1 for size in coarse[whole + 1 :])


def group_count(o: Operands) -> int:
    """Into how many groups of one scale the inputs fall; 0 where they fall into none."""
    axis = 1 if o.turned else 0
    counts = {c.shape[axis] for c in jax.tree.leaves(tuple(o.leaf.grid))} - {1}
    return 1 if not counts else counts.pop() if len(counts) == 1 else 0


def codes_in_bfloat16(o: Operands) -> bool:
    """Whether the product is one of values in bfloat16 with codes, which that holds exactly.

    A weight alone that was rounded to another type on its way is not: its codes do not know of it.
    """
    rounded = {jnp.dtype(dtype) for dtype in (*o.leaf.via, o.leaf.value_dtype)}
    plain = rounded <= {jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16)}
    return o.grid is None and o.x.dtype == jnp.bfloat16 and (plain or bool(o.leaf.activation))


def exact_in_float32(o: Operands) -> bool:
    """Whether a weight alone is the dequantized one, in float32, as what it meets.

    Then its scales may wait for the sums, but for rounding.
    """
    float32 = jnp.dtype(jnp.float32)
    return o.grid is None and o.x.dtype == o.leaf.value_dtype == float32 and not o.leaf.via


def summed_in(o: Operands) -> np.dtype[Any]:
    """The dtype of what is summed up to the result: at least float32."""
    return np.promote_types(o.dtype, np.float32)


def as_row(coarse: jax.Array, o: Operands) -> jax.Array:
    """A coarse array that is shared along the inputs, as [1, outputs or 1]."""
    coarse = per_output(coarse, o)
    return coarse.T if o.turned else coarse


def per_output(coarse: jax.Array, o: Operands) -> jax.Array:
    """A coarse array with one entry for each output, or one for all."""
    shape = o.leaf.codes.shape
    return full_along(coarse, shape, in_groups(coarse, shape, [0 if o.turned else 1]))


def in_groups(coarse: jax.Array, shape: Sequence[int], axes: Sequence[int]) -> list[int]:
    """Those of `axes` along which `coarse` has groups."""
    return [axis for axis in axes if coarse.shape[axis] not in (1, shape[axis])]


def zeros(o: Operands) -> jax.Array:
    """[rows, outputs], made of the operands, for what `shard_map` wants to know of them."""
    codes = o.leaf.codes[:, :1].T if o.turned else o.leaf.codes[:1]
    return jnp.zeros_like(o.x[:, :1], jnp.float32) + jnp.zeros_like(codes, jnp.float32)


def padded(o: Operands, inner: Implementation) -> jax.Array:
    """One row as two: XLA:CPU has kernels for matrices, and makes the weight wide for a vector."""
    rows = o.x.shape[0]
    if not isinstance(rows, int) or rows != 1:
        return inner(o)
    grid = o.grid
    if grid is not None and grid.scale.shape[0] != 1:
        grid = jax.tree.map(_doubled, grid)
    return inner(o._replace(x=_doubled(o.x), grid=grid))[:1]


def over_inputs(
    x: jax.Array, weight: Any, axis: int, size: int, part: Callable[..., Any], total: Any
) -> Any:
    """Adds to `total` what `part` makes of `size` inputs after others, in a loop.

    Args:
      x: [rows, inputs].
      weight: a pytree of arrays with inputs along `axis`, groups of whole inputs, or one entry.
      axis: of the inputs.
      size: how many at a time; what is left comes last.
      part: of x and of the weight, both cut to some inputs; a pytree like `total`.
      total: to begin with.
    """
    inputs = x.shape[1]

    def add(total: Any, start: Any, size: int) -> Any:
        some = jax.lax.dynamic_slice_in_dim(x, start, size, 1)
        own = part(some, cut_inputs(weight, axis, inputs, start, size))
        return jax.tree.map(jnp.add, total, own)

    count, rest = divmod(inputs, size)
    total = jax.lax.fori_loop(0, count, lambda i, total: add(total, i * size, size), total)
    return add(total, count * size, rest) if rest else total


def cut_inputs(weight: Any, axis: int, inputs: int, start: Any, size: int) -> Any:
    """Some inputs of a pytree of arrays, as `over_inputs` takes it."""

    def cut(array: jax.Array) -> jax.Array:
        count = array.shape[axis]
        if count == 1:
            return array
        each = inputs // count
        return jax.lax.dynamic_slice_in_dim(array, start // each, size // each, axis)

    return coarse_map(cut, weight)


# Helpers, in order of use.


def _doubled(x: jax.Array) -> jax.Array:
    return jnp.concatenate([x, x])


def is_spread(array: Any) -> bool:
    """Whether an array's type says that it is laid out over several devices."""
    sharding = getattr(jax.typeof(array), "sharding", None)
    return sharding is not None and any(axis is not None for axis in sharding.spec)
