"""Rules for operations that only look at a weight differently: reshape, transpose, slice, ...

The array of a leaf goes through the operation itself; its scales, zero points and ranges, coarser
arrays of the same rank, follow it. Where groups no longer line up they are spread to one entry a
value first: larger, never wrong.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jopt.trace import rule

from ._layout import full_along
from ._leaves import DenseWeight, QArray, Range, WeightLeaf

Shape = tuple[int, ...]
# How a coarse array follows an operation: f(params, coarse, shape of the array, of the result).
Follow = Callable[[dict[str, Any], jax.Array, Shape, Shape], jax.Array]


def view(primitive: Any) -> Callable[[Follow], Follow]:
    """Registers how coarse arrays follow an operation of one operand and one result."""

    def register(follow: Follow) -> Follow:
        def viewed(call: Any, leaf: WeightLeaf) -> Any:
            if leaf.always_dense:
                return NotImplemented
            array, coarse = leaf.split()
            seen = call.bind(array)
            moved = [
                follow(call.params, c, array.shape, seen.shape) for c in jax.tree.leaves(coarse)
            ]
            return leaf.joined(seen, jax.tree.unflatten(jax.tree.structure(coarse), moved))

        viewed.__qualname__ = follow.__qualname__
        rule(primitive, WeightLeaf)(viewed)
        return follow

    return register


@view(jax.lax.transpose_p)
def _transpose(params: Any, coarse: jax.Array, shape: Shape, result: Shape) -> jax.Array:
    return jax.lax.transpose(coarse, params["permutation"])


@view(jax.lax.squeeze_p)
def _squeeze(params: Any, coarse: jax.Array, shape: Shape, result: Shape) -> jax.Array:
    return jax.lax.squeeze(coarse, params["dimensions"])


@view(jax.lax.broadcast_in_dim_p)
def _broadcast(params: Any, coarse: jax.Array, shape: Shape, result: Shape) -> jax.Array:
    target = [1] * len(result)
    for axis, size in zip(params["broadcast_dimensions"], coarse.shape, strict=True):
        target[axis] = size
    return coarse.reshape(target)


@view(jax.lax.reshape_p)
def _reshape(params: Any, coarse: jax.Array, shape: Shape, result: Shape) -> jax.Array:
    if (order := params.get("dimensions")) is not None:  # read in another order than memory's
        coarse, shape = jax.lax.transpose(coarse, order), tuple(shape[axis] for axis in order)
    sizes: list[int] = []
    for old, new in _blocks(shape, result):
        target = [result[axis] for axis in new]
        block = _regroup([coarse.shape[a] for a in old], [shape[a] for a in old], target)
        if block is None:
            coarse, block = full_along(coarse, shape, old), target
        sizes += block
    return coarse.reshape(sizes)


@view(jax.lax.slice_p)
def _slice(params: Any, coarse: jax.Array, shape: Shape, result: Shape) -> jax.Array:
    strides = params["strides"] or (1,) * len(shape)
    bounds = zip(params["start_indices"], params["limit_indices"], strides, strict=True)
    for axis, (start, limit, stride) in enumerate(bounds):
        coarse = _cut(coarse, shape[axis], axis, start, limit, stride)
    return coarse


@view(jax.lax.rev_p)
def _reverse(params: Any, coarse: jax.Array, shape: Shape, result: Shape) -> jax.Array:
    return jax.lax.rev(coarse, params["dimensions"])


@view(jax.lax.tile_p)
def _tile(params: Any, coarse: jax.Array, shape: Shape, result: Shape) -> jax.Array:
    sizes = zip(params["reps"], coarse.shape, strict=True)
    return jnp.tile(coarse, [1 if size == 1 else times for times, size in sizes])


@rule(jax.lax.split_p, WeightLeaf)
def _split(call: Any, leaf: WeightLeaf) -> Any:
    if leaf.always_dense:
        return NotImplemented
    array, coarse = leaf.split()
    axis, start, parts = call.params["axis"], 0, []
    for part in call.bind(array):
        limit = start + part.shape[axis]
        bounds = (array.shape[axis], axis, start, limit)
        parts.append(leaf.joined(part, jax.tree.map(lambda c, b=bounds: _cut(c, *b), coarse)))
        start = limit
    return parts


@rule(jax.lax.unstack_p, WeightLeaf)
def _unstack(call: Any, leaf: WeightLeaf) -> Any:
    if leaf.always_dense:
        return NotImplemented
    array, coarse = leaf.split()
    axis = call.params["axis"]

    def part(c: jax.Array, i: int) -> jax.Array:
        return jnp.squeeze(_cut(c, array.shape[axis], axis, i, i + 1), axis)

    parts = enumerate(call.bind(array))
    return [leaf.joined(a, jax.tree.map(lambda c, i=i: part(c, i), coarse)) for i, a in parts]


@rule(jax.lax.dynamic_slice_p, WeightLeaf)
def _dynamic_slice(call: Any, leaf: WeightLeaf, *starts: jax.Array) -> Any:
    if not isinstance(leaf, WeightLeaf) or leaf.always_dense:
        return NotImplemented
    array, coarse = leaf.split()
    sizes = call.params["slice_sizes"]

    def follow(c: jax.Array) -> jax.Array:
        cut = [a for a, size in enumerate(sizes) if size != array.shape[a] and c.shape[a] != 1]
        c = full_along(c, array.shape, cut)
        first = [s if a in cut else jnp.zeros_like(s) for a, s in enumerate(starts)]
        return jax.lax.dynamic_slice(
            c, first, [sizes[a] if a in cut else n for a, n in enumerate(c.shape)]
        )

    return leaf.joined(call.bind(array, *starts), jax.tree.map(follow, coarse))


@rule(jax.lax.dynamic_update_slice_p, WeightLeaf)
def _dynamic_update_slice(call: Any, leaf: Any, update: Any, *starts: jax.Array) -> Any:
    """Codes into codes of the same kind, each with its own scales: rows of a table, say."""
    if not (isinstance(leaf, QArray) and isinstance(update, QArray)):
        return NotImplemented
    (array, coarse), (part, finer) = leaf.split(), update.split()
    if jax.tree.structure(leaf) != jax.tree.structure(update) or leaf.range is not None:
        return NotImplemented
    cut = [a for a in range(array.ndim) if part.shape[a] != array.shape[a]]
    pairs = [
        (full_along(c, array.shape, cut), full_along(d, part.shape, cut))
        for c, d in zip(jax.tree.leaves(coarse), jax.tree.leaves(finer), strict=True)
    ]
    if any(c.shape[a] != d.shape[a] for c, d in pairs for a in range(c.ndim) if a not in cut):
        return NotImplemented
    first = [s if a in cut else jnp.zeros_like(s) for a, s in enumerate(starts)]
    moved = [jax.lax.dynamic_update_slice(c, d, first) for c, d in pairs]
    whole = jax.tree.unflatten(jax.tree.structure(coarse), moved)
    return leaf.joined(call.bind(array, part, *starts), whole)


@rule(jax.lax.gather_p, WeightLeaf)
def _gather(call: Any, leaf: WeightLeaf, indices: jax.Array) -> Any:
    """Rows of an embedding: gathered as codes, then dense, since they are activations now."""
    if not isinstance(leaf, WeightLeaf):
        return NotImplemented
    if not isinstance(leaf, QArray):
        return call.bind(leaf.materialise(), indices)
    codes, coarse = leaf.split()
    params, sizes = call.params, call.params["slice_sizes"]
    numbers = params["dimension_numbers"]

    def take(array: jax.Array, fill: Any = None) -> jax.Array:
        # An axis of size 1 is shared by all rows: clipping turns every index into 0 there.
        return jax.lax.gather(
            array,
            indices,
            numbers,
            [min(size, n) for size, n in zip(sizes, array.shape, strict=True)],
            mode="clip" if fill is None else "fill",
            fill_value=fill,
        )

    def follow(c: jax.Array) -> jax.Array:
        groups = [a for a, n in enumerate(c.shape) if n not in (1, codes.shape[a])]
        return take(full_along(c, codes.shape, [*groups, *numbers.operand_batching_dims]))

    rows = leaf.joined(take(codes), jax.tree.map(follow, coarse)).materialise()
    if params["mode"] != jax.lax.GatherScatterMode.FILL_OR_DROP:
        return rows
    indexed = {*numbers.start_index_map, *numbers.operand_batching_dims}
    corner = codes[tuple(slice(None if a in indexed else 1) for a in range(codes.ndim))]
    fill = jnp.nan if params["fill_value"] is None else params["fill_value"]
    return jnp.where(take(jnp.ones_like(corner, jnp.int8), 0) == 1, rows, fill)


@rule(jax.lax.concatenate_p, WeightLeaf)
def _concatenate(call: Any, *leaves: Any) -> Any:
    return _together(call, leaves, call.params["dimension"])


@rule(jax.lax.stack_p, WeightLeaf)
def _stack(call: Any, *leaves: Any) -> Any:
    axis = call.params["axis"]
    return _together(call, leaves, axis, lambda array: jnp.expand_dims(array, axis))


@rule(jax.lax.convert_element_type_p, WeightLeaf)
def _convert(call: Any, leaf: WeightLeaf) -> Any:
    """Codes stay codes; their values are rounded as the function rounds them.

    The dtype that the leaf itself has is no rounding: cast to a wider one, values are exact.
    """
    dtype = call.params["new_dtype"]
    if leaf.always_dense or not jnp.issubdtype(dtype, jnp.floating):
        return NotImplemented
    if isinstance(leaf, QArray):
        old, new = jnp.finfo(leaf.value_dtype), jnp.finfo(dtype)
        narrows = new.nmant <= old.nmant and new.maxexp <= old.maxexp
        via = (*leaf.via, jnp.dtype(dtype)) if narrows else leaf.via
        return dataclasses.replace(leaf, value_dtype=jnp.dtype(dtype), via=via)
    array, coarse = leaf.split()
    return leaf.joined(call.bind(array), coarse)


# Helpers, in order of use.


def _blocks(shape: Shape, result: Shape) -> Iterator[tuple[range, range]]:
    """Consecutive axes of both shapes that hold the same values: `(4, 6, 5) -> (24, 5)` has two."""
    if 0 in shape:
        yield range(len(shape)), range(len(result))
        return
    i = j = 0
    while i < len(shape) or j < len(result):
        first, second = i, j
        i, j = min(i + 1, len(shape)), min(j + 1, len(result))
        while (old := math.prod(shape[first:i])) != (new := math.prod(result[second:j])):
            i, j = (i + 1, j) if old < new else (i, j + 1)
        yield range(first, i), range(second, j)


def _regroup(coarse: list[int], old: list[int], new: list[int]) -> list[int] | None:
    """Sizes of a coarse array after `old` axes became `new` ones, or None if it no longer fits.

    It fits where, in memory order, every `run` consecutive values share an entry.
    """
    whole = 0
    while whole < len(old) and coarse[whole] == old[whole]:
        whole += 1
    if any(size != 1 for size in coarse[whole + 1 :]) or 0 in old:
        return None
    run = math.prod(old) // math.prod(coarse)
    sizes = []
    for size in reversed(new):
        if run % size == 0:
            run //= size
            sizes.append(1)
        elif size % run == 0:
            sizes.append(size // run)
            run = 1
        else:
            return None
    return sizes[::-1]


def _cut(coarse: jax.Array, size: int, axis: int, start: int, limit: int, stride: int = 1) -> Any:
    """Follows a slice of one axis that has `size` values."""
    if coarse.shape[axis] == 1 or (start, limit, stride) == (0, size, 1):
        return coarse
    group = size // coarse.shape[axis]
    if stride == 1 and start % group == 0 and limit % group == 0:
        start, limit = start // group, limit // group
    else:
        coarse = full_along(coarse, [size] * coarse.ndim, [axis])
    return jax.lax.slice_in_dim(coarse, start, limit, stride, axis)


def _together(
    call: Any,
    leaves: Sequence[Any],
    axis: int,
    expand: Callable[[jax.Array], jax.Array] | None = None,
) -> Any:
    """Leaves of one kind as one; the range of the activation they share covers all of theirs."""
    if not all(isinstance(leaf, WeightLeaf) and not leaf.always_dense for leaf in leaves):
        return NotImplemented
    if not all(isinstance(leaf, QArray) for leaf in leaves):
        leaves = [leaf.joined(*leaf.split()) for leaf in leaves]
    if isinstance(leaves[0], DenseWeight):
        names = tuple(name for leaf in leaves for name in leaf.observed)
        leaves = [dataclasses.replace(leaf, observed=names) for leaf in leaves]
    kinds = {(jax.tree.structure(leaf), leaf.range and leaf.range.low.shape) for leaf in leaves}
    if len(kinds) > 1:
        return NotImplemented
    arrays = [leaf.split()[0] for leaf in leaves]
    ranges, grids = _covering([leaf.range for leaf in leaves]), [_grid(leaf) for leaf in leaves]
    if expand is not None:
        ranges, grids = jax.tree.map(expand, (ranges, grids))
    shapes = [(expand(array) if expand else array).shape for array in arrays]
    grid = jax.tree.map(lambda *parts: _join(parts, shapes, axis), *grids)
    return leaves[0].joined(call.bind(*arrays), (grid, ranges) if grid else ranges)


def _covering(ranges: Sequence[Range | None]) -> Range | None:
    """The range that covers all of `ranges`; all are None, or none is."""
    ends = [r for r in ranges if r is not None]
    if not ends:
        return None
    low = functools.reduce(jnp.minimum, [r.low for r in ends])
    return Range(low, functools.reduce(jnp.maximum, [r.high for r in ends]))


def _grid(leaf: WeightLeaf) -> Any:
    return leaf.grid if isinstance(leaf, QArray) else ()


def _join(parts: Sequence[jax.Array], shapes: Sequence[Shape], axis: int) -> jax.Array:
    """Concatenates coarse arrays whose weights, of `shapes`, are concatenated along `axis`."""
    differ = [a for a in range(len(shapes[0])) if len({part.shape[a] for part in parts}) > 1]
    differ = [a for a in differ if a != axis]
    groups = {shape[axis] / part.shape[axis] for shape, part in zip(shapes, parts, strict=True)}
    if len(groups) > 1:
        differ.append(axis)
    spread = [full_along(part, s, differ) for part, s in zip(parts, shapes, strict=True)]
    return jnp.concatenate(spread, axis=axis)
