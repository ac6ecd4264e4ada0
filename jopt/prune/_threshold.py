"""The lowest scores, exactly as many as asked for, by bisection over the bits of floats.

Only counts cross devices: no sort, no concatenation, no gather. So one threshold over all leaves of
a sharded model costs a few scalar reductions.
"""

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from . import _wide
from ._wide import Wide


def sortable(scores: jax.Array) -> jax.Array:
    """Unsigned integers in the order of the floats: -0 equals 0, and NaN stands above all.

    Integer operations alone, so that denormal numbers keep their order where floating-point units
    flush them to zero.
    """
    width = scores.dtype.itemsize * 8
    unsigned = np.dtype(f"uint{width}")
    sign = unsigned.type(1 << (width - 1))
    infinity = np.asarray(np.inf, scores.dtype).view(unsigned)[()]
    bits = jax.lax.bitcast_convert_type(scores, unsigned)
    magnitude = bits & ~sign
    keys = jnp.where(bits < sign, bits | sign, ~bits)
    keys = jnp.where(magnitude == 0, sign, keys)
    return jnp.where(magnitude > infinity, ~unsigned.type(0), keys)


def common(scores: Sequence[jax.Array]) -> list[jax.Array]:
    """The scores in one dtype, to be ranked together: float32, unless all share another."""
    dtypes = {score.dtype for score in scores}
    if len(dtypes) > 1 or dtypes.pop().itemsize not in (2, 4, 8):
        wide = any(score.dtype.itemsize > 4 for score in scores)
        return [score.astype(jnp.float64 if wide else jnp.float32) for score in scores]
    return list(scores)


@functools.partial(jax.jit, static_argnames="together")
def keep(scores: list[jax.Array], lowest: Wide, *, together: bool) -> list[jax.Array]:
    """Marks all but the lowest scores. Of equal scores the first ones go first.

    Args:
      scores: floats of one dtype, one array a leaf.
      lowest: how many scores to mark False, at most as many as there are: one number for all leaves
        if `together`, else one for each.
      together: rank the scores of all leaves in one order, instead of each leaf's on its own.

    Returns:
      Boolean arrays, shaped like the scores.
    """
    keys = [sortable(score) for score in scores]
    sizes = _sizes(keys)
    limits, under, upto = _bisect(
        lambda i, trial: keys[i] < trial, lowest, sizes, together, keys[0].dtype
    )
    tied = upto - under
    rest = _wide.subtract(lowest, _total(under, together))
    if together:  # first leaves give first
        rest = _wide.remainder(rest, _wide.exclusive_sum(tied))
    taken = _wide.minimum(rest, _wide.widen(tied)).low
    level = [key == limit for key, limit in zip(keys, limits, strict=True)]
    stops = _stops(level, taken, tied, sizes)
    return [
        (key > limit) | (equal & (_position(key.shape) >= stop))
        for key, limit, equal, stop in zip(keys, limits, level, stops, strict=True)
    ]


def _stops(
    level: Sequence[jax.Array], taken: jax.Array, tied: jax.Array, sizes: np.ndarray
) -> list[jax.Array]:
    """The position in each leaf before which as many are level as are taken."""

    def search() -> jax.Array:
        # A k-th smallest position, found like the threshold: no cumulative sum, which would run
        # across devices.
        def before(i: int, trial: jax.Array) -> jax.Array:
            return level[i] & (_position(level[i].shape) < trial)

        last, _, _ = _bisect(before, _wide.widen(taken), sizes, False, np.dtype(np.uint32))
        return jnp.where(taken > 0, jnp.stack(last) + 1, 0)

    def all_or_none() -> jax.Array:
        return jnp.where(taken > 0, sizes, 0)

    stops = jax.lax.cond(jnp.any((taken > 0) & (taken < tied)), search, all_or_none)
    return [stops[i] for i in range(len(level))]


def _bisect(
    below: Callable[[int, jax.Array], jax.Array],
    k: Wide,
    sizes: np.ndarray,
    together: bool,
    dtype: np.dtype,
) -> tuple[list[jax.Array], jax.Array, jax.Array]:
    """Finds the k-th smallest number, bit by bit.

    Args:
      below: marks what is below a number, given a leaf's index and the number.
      k: one for all leaves if `together`, else one for each.
      sizes: of the leaves.
      together: see `keep`.
      dtype: of the numbers, an unsigned integer.

    Returns:
      The number once for each leaf, 0 where k is 0; how many are below it in each leaf; and how many
      are not above it.
    """
    width, one = dtype.itemsize * 8, np.ones((), dtype)

    def each(numbers: jax.Array) -> list[jax.Array]:
        return [numbers[0 if together else i] for i in range(len(sizes))]

    def step(i: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        found, under, upto = carry
        trial = found | (one << (width - 1 - i).astype(dtype))
        marks = [below(i, number) for i, number in enumerate(each(trial))]
        counts = jnp.stack([jnp.sum(mark, dtype=jnp.uint32) for mark in marks])
        larger = _wide.less(_total(counts, together), k)
        # What is not above the number is what was below the last trial that was too large.
        return (
            jnp.where(larger, trial, found),
            jnp.where(larger, counts, under),
            jnp.where(larger, upto, counts),
        )

    start = (jnp.zeros(k.low.shape, dtype), jnp.zeros_like(sizes), jnp.asarray(sizes))
    found, under, upto = jax.lax.fori_loop(0, width, step, start)
    return each(found), under, upto


def _sizes(arrays: Sequence[jax.Array]) -> np.ndarray:
    for array in arrays:
        if array.size >= 2**32:
            raise ValueError(f"A leaf of {array.size} weights cannot be counted: split it first.")
    return np.asarray([array.size for array in arrays], np.uint32)


def _total(counts: jax.Array, together: bool) -> Wide:
    return _wide.total(counts) if together else _wide.widen(counts)


def _position(shape: tuple[int, ...]) -> jax.Array:
    """The index of each element in row-major order, without a reshape."""
    position = jnp.zeros(shape, jnp.uint32)
    for axis in range(len(shape)):
        step = np.uint32(math.prod(shape[axis + 1 :]))
        position += jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * step
    return position
