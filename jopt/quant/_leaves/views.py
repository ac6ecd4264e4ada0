"""Rules that put quantized weights together, or into one another, and that cast them.

What takes one weight apart or looks at it differently, any layered leaf does (`jopt.trace`).
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jopt.trace import rule
from jopt.trace.layered import coarse_map, full_along

from .weights import QArray, Range, WeightLeaf

Shape = tuple[int, ...]


@rule(jax.lax.dynamic_update_slice_p, WeightLeaf)
def _dynamic_update_slice(call: Any, leaf: Any, update: Any, *starts: jax.Array) -> Any:
    """Codes into codes of the same kind, each with its own scales: rows of a table, say."""
    if not (isinstance(leaf, QArray) and isinstance(update, QArray)):
        return NotImplemented
    (array, coarse), (part, finer) = leaf.split(), update.split()
    if jax.tree.structure(leaf) != jax.tree.structure(update) or leaf.range is not None:
        return NotImplemented
    cut = [a for a in range(array.ndim) if part.shape[a] != array.shape[a]]

    def whole(c: jax.Array, d: jax.Array) -> tuple[jax.Array, jax.Array]:
        return full_along(c, array.shape, cut), full_along(d, part.shape, cut)

    for c, d in zip(jax.tree.leaves(coarse), jax.tree.leaves(finer), strict=True):
        c, d = whole(c, d)
        if any(c.shape[a] != d.shape[a] for a in range(array.ndim) if a not in cut):
            return NotImplemented
    first = [s if a in cut else jnp.zeros_like(s) for a, s in enumerate(starts)]

    def update_slice(c: jax.Array, d: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice(*whole(c, d), first)

    return leaf.joined(call.bind(array, part, *starts), coarse_map(update_slice, coarse, finer))


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
    kinds = {(jax.tree.structure(leaf), leaf.range and leaf.range.low.shape) for leaf in leaves}
    if len(kinds) > 1:
        return NotImplemented
    arrays = [leaf.split()[0] for leaf in leaves]
    ranges, grids = _covering([leaf.range for leaf in leaves]), [_grid(leaf) for leaf in leaves]
    if expand is not None:
        ranges, grids = coarse_map(expand, (ranges, grids))
    shapes = [(expand(array) if expand else array).shape for array in arrays]
    grid = coarse_map(lambda *parts: _join(parts, shapes, axis), *grids)
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
