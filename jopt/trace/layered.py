"""A leaf made of layers: one array of the value's shape, and coarser ones that follow it.

Scales, zero points, activation ranges and indices have the rank of the value and along each axis
its size, or 1 (shared), or the number of groups of consecutive entries. An operation that only
looks at the value differently (reshape, transpose, slice, ...) goes to the array itself, and the
coarser ones follow. Where groups no longer line up they are spread to one entry a value first:
larger, never wrong. Axes count from the end, so that scan and vmap may slice leading ones.
"""

import abc
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from . import compat, rules
from .leaf import Leaf

Shape = tuple[int, ...]
# How a coarse array follows an operation: f(params, coarse, shape of the array, of the result).
Follow = Callable[[dict[str, Any], jax.Array, Shape, Shape], jax.Array]


class Layered(Leaf):
    """A leaf of an array and coarser arrays of its rank; the views below need no rules of its own.

    Subclasses say how they come apart and how they are put together again. One that sets
    `always_dense` is materialised by views as by all else.
    """

    @abc.abstractmethod
    def split(self) -> tuple[jax.Array, Any]:
        """The array of the value's shape, and a pytree of arrays coarser than it."""

    @abc.abstractmethod
    def joined(self, array: jax.Array, coarse: Any) -> "Layered":
        """This leaf with other arrays."""


@functools.partial(jax.tree_util.register_dataclass, data_fields=["entries"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Table:
    """A coarse array whose every entry is a row of values: an axis more than the leaf has, last."""

    entries: jax.Array


def coarse_map(function: Callable[..., jax.Array], coarse: Any, *others: Any) -> Any:
    """Maps a function of coarse arrays over a pytree of them; of a `Table` over each column."""

    def apply(first: Any, *rest: Any) -> Any:
        if not isinstance(first, Table):
            return function(first, *rest)
        columns = [table.entries for table in (first, *rest)]
        return Table(jax.vmap(function, in_axes=-1, out_axes=-1)(*columns))

    return jax.tree.map(apply, coarse, *others, is_leaf=lambda c: isinstance(c, Table))


def spread(coarse: jax.Array, shape: Sequence[int]) -> jax.Array:
    """Repeats groups, so that `coarse` broadcasts against `shape`; shared axes stay 1."""
    for axis, size in enumerate(shape):
        if coarse.shape[axis] not in (1, size):
            coarse = repeated(coarse, size // coarse.shape[axis], axis)
    return coarse


def repeated(x: jax.Array, times: int, axis: int) -> jax.Array:
    """`jnp.repeat`, also along an axis that is sharded over explicit axes of a mesh."""
    axis %= x.ndim
    before, after = x.shape[: axis + 1], x.shape[axis + 1 :]
    wide = jnp.broadcast_to(jnp.expand_dims(x, axis + 1), (*before, times, *after))
    return wide.reshape(*before[:-1], before[-1] * times, *after)


def coarse_row(coarse: jax.Array, at: Any, rows: int) -> jax.Array:
    """Row `at` of a coarse array beside one of so many rows, `[1, ...]`."""
    if coarse.shape[0] == 1:
        return coarse
    return jax.lax.dynamic_slice_in_dim(coarse, at // (rows // coarse.shape[0]), 1, 0)


def full_along(coarse: jax.Array, shape: Sequence[int], axes: Sequence[int]) -> jax.Array:
    """Repeats `coarse` to the whole size of `shape` along `axes`."""
    for axis in axes:
        if coarse.shape[axis] != shape[axis]:
            coarse = repeated(coarse, shape[axis] // coarse.shape[axis], axis)
    return coarse


def shared_along(coarse: jax.Array | None, axes: Sequence[int]) -> bool:
    """Whether `coarse` is the same along `axes`."""
    return coarse is None or all(coarse.shape[axis] == 1 for axis in axes)


def view(primitive: Any) -> Callable[[Follow], Follow]:
    """Registers how coarse arrays follow an operation of one operand and one result."""

    def register(follow: Follow) -> Follow:
        def viewed(call: Any, leaf: Layered) -> Any:
            if leaf.always_dense:
                return NotImplemented
            array, coarse = leaf.split()
            seen = call.bind(array)
            moved = coarse_map(lambda c: follow(call.params, c, array.shape, seen.shape), coarse)
            return leaf.joined(seen, moved)

        viewed.__qualname__ = follow.__qualname__
        rules.rule(primitive, Layered)(viewed)
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
        coarse = cut(coarse, shape[axis], axis, start, limit, stride)
    return coarse


@view(jax.lax.rev_p)
def _reverse(params: Any, coarse: jax.Array, shape: Shape, result: Shape) -> jax.Array:
    return jax.lax.rev(coarse, params["dimensions"])


@view(jax.lax.tile_p)
def _tile(params: Any, coarse: jax.Array, shape: Shape, result: Shape) -> jax.Array:
    sizes = zip(params["reps"], coarse.shape, strict=True)
    return jnp.tile(coarse, [1 if size == 1 else times for times, size in sizes])


@rules.rule(jax.lax.split_p, Layered)
def _split(call: Any, leaf: Layered) -> Any:
    if leaf.always_dense:
        return NotImplemented
    array, coarse = leaf.split()
    axis, start, parts = call.params["axis"], 0, []
    for part in call.bind(array):
        limit = start + part.shape[axis]
        bounds = (array.shape[axis], axis, start, limit)
        parts.append(leaf.joined(part, coarse_map(lambda c, b=bounds: cut(c, *b), coarse)))
        start = limit
    return parts


@rules.rule(jax.lax.unstack_p, Layered)
def _unstack(call: Any, leaf: Layered) -> Any:
    if leaf.always_dense:
        return NotImplemented
    array, coarse = leaf.split()
    axis = call.params["axis"]

    def part(c: jax.Array, i: int) -> jax.Array:
        return jnp.squeeze(cut(c, array.shape[axis], axis, i, i + 1), axis)

    parts = enumerate(call.bind(array))
    return [leaf.joined(a, coarse_map(lambda c, i=i: part(c, i), coarse)) for i, a in parts]


@rules.rule(jax.lax.all_gather_p, Layered)
def _all_gather(call: Any, leaf: Layered) -> Any:
    """The shards of a weight put together while they are small."""
    if leaf.always_dense:
        return NotImplemented
    array, coarse = leaf.split()
    axis, tiled = call.params["all_gather_dimension"], call.params["tiled"]
    names = call.params["axis_name"]
    names = {*names} if isinstance(names, tuple) else {names}
    checked = bool(compat.varying(array))  # else nobody knows what differs between shards

    def follow(c: jax.Array) -> jax.Array:
        shared = checked and not names & compat.varying(c)
        if shared and not tiled:
            return jnp.expand_dims(c, axis)
        return c if shared and c.shape[axis] == 1 else call.bind(c)

    return leaf.joined(call.bind(array), coarse_map(follow, coarse))


@rules.rule(jax.lax.dynamic_slice_p, Layered)
def _dynamic_slice(call: Any, leaf: Layered, *starts: jax.Array) -> Any:
    if not isinstance(leaf, Layered) or leaf.always_dense:
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

    return leaf.joined(call.bind(array, *starts), coarse_map(follow, coarse))


@rules.rule(jax.lax.gather_p, Layered)
def _gather(call: Any, leaf: Layered, indices: jax.Array) -> Any:
    """Rows of an embedding: gathered in layers, then dense, since they are activations now."""
    if not isinstance(leaf, Layered):
        return NotImplemented
    codes, coarse = leaf.split()
    if not jax.tree.leaves(coarse):
        return call.bind(leaf.materialise(), indices)
    call.say("rows of it, dequantized: from here on they are activations")
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

    rows = leaf.joined(take(codes), coarse_map(follow, coarse)).materialise()
    if params["mode"] != jax.lax.GatherScatterMode.FILL_OR_DROP:
        return rows
    indexed = {*numbers.start_index_map, *numbers.operand_batching_dims}
    corner = codes[tuple(slice(None if a in indexed else 1) for a in range(codes.ndim))]
    fill = jnp.nan if params["fill_value"] is None else params["fill_value"]
    return jnp.where(take(jnp.ones_like(corner, jnp.int8), 0) == 1, rows, fill)


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


def cut(coarse: jax.Array, size: int, axis: int, start: int, limit: int, stride: int = 1) -> Any:
    """Follows a slice of one axis that has `size` values."""
    if coarse.shape[axis] == 1 or (start, limit, stride) == (0, size, 1):
        return coarse
    group = size // coarse.shape[axis]
    if stride == 1 and start % group == 0 and limit % group == 0:
        start, limit = start // group, limit // group
    else:
        coarse = full_along(coarse, [size] * coarse.ndim, [axis])
    return jax.lax.slice_in_dim(coarse, start, limit, stride, axis)
