"""Rules for caches: what is written becomes codes, products read the codes."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jopt import trees
from jopt.trace import rule
from jopt.trace.layered import full_along, shared_along

from .cache import Cache


@rule(jax.lax.dynamic_update_slice_p, Cache)
def _dynamic_update_slice(call: Any, cache: Any, update: Any, *starts: jax.Array) -> Any:
    """What is written is quantized, each token on its own."""
    if not isinstance(cache, Cache) or any(trees.is_typed(x) for x in starts):
        return NotImplemented
    new = _written(cache, update)
    if new is None:
        return NotImplemented
    first = [
        jnp.zeros_like(s) if n == 1 else s for s, n in zip(starts, cache.scale.shape, strict=True)
    ]
    grid = jax.tree.map(
        lambda old, part: jax.lax.dynamic_update_slice(old, part, first),
        cache.split()[1],
        new.split()[1],
    )
    return cache.joined(call.bind(cache.codes, new.codes, *starts), grid)


@rule(jax.lax.scatter_p, Cache)
def _scatter(call: Any, cache: Any, indices: Any, update: Any) -> Any:
    """`.at[...].set`: likewise, where whole scales are written."""
    if not isinstance(cache, Cache) or trees.is_typed(indices):
        return NotImplemented
    params, numbers = call.params, call.params["dimension_numbers"]
    gone = (*numbers.inserted_window_dims, *numbers.operand_batching_dims)
    window = [axis for axis in range(cache.ndim) if axis not in gone]
    lies = dict(zip(window, numbers.update_window_dims, strict=True))
    shared = [axis for axis, n in enumerate(cache.scale.shape) if n == 1]
    whole = all(
        a in lies and update.shape[lies[a]] == cache.codes.shape[a]
        for a in shared
        if cache.codes.shape[a] != 1
    )
    grouped = any(n not in (1, m) for n, m in zip(cache.scale.shape, cache.shape, strict=True))
    if grouped or not whole or any(a in numbers.scatter_dims_to_operand_dims for a in shared):
        return NotImplemented
    new = _coded(cache, update, [lies[a] for a in shared if a in lies])
    if new is None:
        return NotImplemented

    def put(old: jax.Array, part: jax.Array) -> jax.Array:
        return jax.lax.scatter(
            old,
            indices,
            part,
            numbers,
            indices_are_sorted=params["indices_are_sorted"],
            unique_indices=params["unique_indices"],
            mode=params["mode"],
        )

    return cache.joined(
        put(cache.codes, new.codes), jax.tree.map(put, cache.split()[1], new.split()[1])
    )


@rule(jax.lax.convert_element_type_p, Cache)
def _convert(call: Any, cache: Cache) -> Any:
    dtype = call.params["new_dtype"]
    if not jnp.issubdtype(dtype, jnp.floating):
        return NotImplemented
    return dataclasses.replace(cache, value_dtype=jnp.dtype(dtype))


@rule(jax.lax.dot_general_p, Cache)
def _dot(call: Any, *operands: Any) -> Any:
    """A product with the codes; scales go into the result, or into the other operand before."""
    side = 0 if isinstance(operands[0], Cache) else 1
    cache, x = operands[side], operands[1 - side]
    if trees.is_typed(x):
        return NotImplemented
    contract, batch = call.params["dimension_numbers"]
    free = [a for a in range(cache.ndim) if a not in (*contract[side], *batch[side])]
    after = shared_along(cache.scale, contract[side])
    if not after and not shared_along(cache.scale, free):
        return NotImplemented  # it runs along both
    cache = _without_groups(cache)
    dtype, scale = x.dtype, cache.scale
    if not after:
        x = x.astype(jnp.float32) * _onto_other(scale, call.params, side, x.ndim)
    total = _multiplied(call, side, x, cache, dtype).astype(jnp.float32)
    if after:
        total = total * _onto_result(scale, call.params, side, x.ndim)
    return total.astype(call.out[0].dtype)


# Helpers, in order of use.


def _without_groups(cache: Cache) -> Cache:
    """A cache whose scales are one for each entry along an axis, or one for all of them."""
    shape = cache.codes.shape
    axes = [axis for axis, n in enumerate(cache.scale.shape) if n != 1]
    grid = jax.tree.map(lambda coarse: full_along(coarse, shape, axes), cache.split()[1])
    return cache.joined(cache.codes, grid)


def _written(cache: Cache, update: Any) -> Cache | None:
    """What is to be written, on scales of its own; None if it covers a scale only in part."""
    if isinstance(update, Cache):
        kinds = ((c.format, c.zero_point is None, c.codes.dtype) for c in (cache, update))
        return update if len(set(kinds)) == 1 and _shares(cache, update) else None
    if trees.is_typed(update):
        return None
    sizes = list(zip(cache.scale.shape, cache.codes.shape, update.shape, strict=True))
    if any(n not in (1, size) or (n == 1 and part != size) for n, size, part in sizes):
        return None
    shared = [axis for axis, n in enumerate(cache.scale.shape) if n == 1]
    return _coded(cache, update, shared)


def _shares(cache: Cache, update: Cache) -> bool:
    """Whether what shares a scale in one does so in the other."""
    sizes = (cache.codes.shape, cache.scale.shape, update.codes.shape, update.scale.shape)
    return all(
        (m == n and p == q) or (n == q and m == p) for m, n, p, q in zip(*sizes, strict=True)
    )


def _coded(cache: Cache, update: Any, shared: Sequence[int]) -> Cache | None:
    """Values as codes, one scale along the axes `shared`."""
    if trees.is_typed(update) or not jnp.issubdtype(update.dtype, jnp.floating):
        return None
    fixed = jax.lax.stop_gradient(update)
    grid = cache.format.fit(fixed, tuple(axis - update.ndim for axis in shared))
    codes = cache.format.encode(fixed, grid).astype(cache.format.container)
    return cache.joined(codes, grid)


def _multiplied(call: Any, side: int, x: jax.Array, cache: Cache, dtype: Any) -> jax.Array:
    """The product of an operand with what the codes count."""

    def floats(x: jax.Array, codes: jax.Array) -> jax.Array:
        levels = codes.astype(dtype)
        if cache.zero_point is not None:
            levels = levels - cache.zero_point.astype(dtype)
        return call.bind(*_placed(side, levels, x.astype(dtype)))

    numbers = call.params["dimension_numbers"]
    terms = math.prod(cache.codes.shape[axis] for axis in numbers[0][side])
    if cache.query is None or terms * 2**14 >= 2**31:
        call.say("a float product with the codes")
        return floats(x, cache.codes)
    query, rows = cache.query, tuple(axis - x.ndim for axis in numbers[0][1 - side])

    @jax.custom_jvp
    def integers(x: jax.Array, codes: jax.Array) -> jax.Array:
        grid = query.fit(x, rows)
        own = query.encode(x, grid).astype(jnp.int8)
        operands = _placed(side, codes.astype(jnp.int8), own)
        total = jax.lax.dot_general(*operands, numbers, preferred_element_type=jnp.int32)
        scale = _onto_result(grid.scale, call.params, 1 - side, cache.ndim)
        return total.astype(jnp.float32) * scale

    @integers.defjvp
    def _(primals: Any, tangents: Any) -> Any:
        derivative = floats(tangents[0], primals[1])
        return integers(*primals), derivative.astype(jnp.float32)

    call.say("a product of integers")
    return integers(x, cache.codes)


def _placed(side: int, weight: Any, x: Any) -> tuple[Any, Any]:
    return (weight, x) if side == 0 else (x, weight)


def _onto_other(coarse: jax.Array, params: Any, side: int, ndim: int) -> jax.Array:
    """Lays an array of an operand's rank, 1 along its free axes, onto the other operand."""
    contract, batch = params["dimension_numbers"]
    theirs = (*batch[1 - side], *contract[1 - side])
    own = (*batch[side], *contract[side])
    free = [a for a in range(coarse.ndim) if a not in own]
    sizes = [1] * ndim
    for axis, other in zip(own, theirs, strict=True):
        sizes[other] = coarse.shape[axis]
    order = sorted(range(len(own)), key=lambda i: theirs[i])
    return jnp.transpose(coarse, (*(own[i] for i in order), *free)).reshape(sizes)


def _onto_result(coarse: jax.Array, params: Any, side: int, ndim: int) -> jax.Array:
    """Lays an array of an operand's rank, 1 along its summed axes, onto the product's result."""
    contract, batch = (axes[side] for axes in params["dimension_numbers"])
    free = [a for a in range(coarse.ndim) if a not in (*contract, *batch)]
    moved = jnp.transpose(coarse, (*batch, *free, *contract))
    first, second = moved.shape[: len(batch)], moved.shape[len(batch) : len(batch) + len(free)]
    ones = (1,) * (ndim - len(contract) - len(batch))  # the other operand's free axes
    return moved.reshape((*first, *second, *ones) if side == 0 else (*first, *ones, *second))
