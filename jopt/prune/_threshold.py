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

from . import _bits, _wide
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
    if together:
        limits, stops = _together(keys, _at(lowest, 0))
    else:
        limits, stops = _apart(keys, [_at(lowest, i) for i in range(len(keys))])
    return [
        (key > limit) | ((key == limit) & (_position(key.shape) >= stop))
        for key, limit, stop in zip(keys, limits, stops, strict=True)
    ]


def count(marks: jax.Array) -> jax.Array:
    """How many are True: first of every eight along the axis that masks are packed along.

    XLA:CPU adds bytes to bytes three times as fast as booleans to 32 bits. But a reshape of an axis
    whose devices hold parts of an eight would gather it, or be an error under a mesh of `Explicit`
    axes. Under `Auto` axes types do not tell; an axis of this many twos is whole however the
    devices that there are share it out.
    """
    axis = _bits.packed_axis(marks.shape)
    if marks.ndim and marks.size and marks.shape[axis] % 8 == 0:
        words = marks.shape[axis] // 8
        many = 1 << (jax.device_count().bit_length() - 1)
        if not words % _bits.devices_along(marks, axis) and _bits.twos(words) >= many:
            marks = jnp.sum(_bits.eights(marks, axis), axis=axis, dtype=jnp.uint8)
    return jnp.sum(marks, dtype=jnp.uint32)


# The two functions below return the threshold of each leaf, and the position in it before which
# scores that equal the threshold go. A position is found like a threshold, as a k-th smallest
# number: a cumulative sum would run across devices. It is looked for only where a leaf gives some
# of its equal scores and keeps others.


def _together(keys: list[jax.Array], k: Wide) -> tuple[list[jax.Array], list[jax.Array]]:
    sizes = _sizes(keys)

    def total(counts: list[jax.Array]) -> list[Wide]:
        return [_wide.total(jnp.stack(counts))]

    def under(i: int, trial: jax.Array) -> jax.Array:
        return keys[i] < trial

    (limit,), below, upto = _bisect(under, total, [k], sizes, keys[0].dtype)
    below = jnp.stack(below)
    tied = jnp.stack(upto) - below
    # The first leaves give first, so one leaf at most gives a part.
    room = _wide.remainder(_wide.subtract(k, _wide.total(below)), _wide.exclusive_sum(tied))
    taken = _wide.minimum(room, _wide.widen(tied)).low
    partly = (taken > 0) & (taken < tied)

    def search() -> list[jax.Array]:
        def part(counts: list[jax.Array]) -> list[Wide]:
            return [_wide.total(jnp.where(partly, jnp.stack(counts), 0))]

        def before(i: int, trial: jax.Array) -> jax.Array:
            return (keys[i] == limit) & (_position(keys[i].shape) < trial)

        wanted = [_wide.total(jnp.where(partly, taken, 0))]
        (last,), _, _ = _bisect(before, part, wanted, sizes, np.dtype(np.uint32))
        return list(jnp.where(partly, last + 1, jnp.where(taken > 0, sizes, 0)))

    def all_or_none() -> list[jax.Array]:
        return list(jnp.where(taken > 0, sizes, 0))

    return [limit] * len(keys), jax.lax.cond(jnp.any(partly), search, all_or_none)


def _apart(keys: list[jax.Array], k: list[Wide]) -> tuple[list[jax.Array], list[jax.Array]]:
    sizes = _sizes(keys)

    def own(counts: list[jax.Array]) -> list[Wide]:
        return [_wide.widen(count) for count in counts]

    def under(i: int, trial: jax.Array) -> jax.Array:
        return keys[i] < trial

    limits, below, upto = _bisect(under, own, k, sizes, keys[0].dtype)
    taken = [each.low - count for each, count in zip(k, below, strict=True)]
    partly = [(t > 0) & (t < u - b) for t, u, b in zip(taken, upto, below, strict=True)]

    def search() -> list[jax.Array]:
        def before(i: int, trial: jax.Array) -> jax.Array:
            return (keys[i] == limits[i]) & (_position(keys[i].shape) < trial)

        last, _, _ = _bisect(before, own, own(taken), sizes, np.dtype(np.uint32))
        return [jnp.where(t > 0, place + 1, 0) for t, place in zip(taken, last, strict=True)]

    def all_or_none() -> list[jax.Array]:
        return [jnp.where(t > 0, size, 0) for t, size in zip(taken, sizes, strict=True)]

    return limits, jax.lax.cond(jnp.any(jnp.stack(partly)), search, all_or_none)


def _bisect(
    below: Callable[[int, jax.Array], jax.Array],
    total: Callable[[list[jax.Array]], list[Wide]],
    k: list[Wide],
    sizes: np.ndarray,
    dtype: np.dtype,
) -> tuple[list[jax.Array], list[jax.Array], list[jax.Array]]:
    """Finds k-th smallest numbers, bit by bit.

    Lists of scalars, not vectors: an element taken out of a vector would make a kernel of its own
    for every leaf, and XLA compiles equal kernels once.

    Args:
      below: marks what is below a number, given a leaf's index and the number.
      total: what to compare with `k`, given the count of each leaf.
      k: one for all leaves, or one for each.
      sizes: of the leaves.
      dtype: of the numbers, an unsigned integer.

    Returns:
      The numbers, 0 where k is 0; and in each leaf the counts of what is below and of what is not
      above.
    """
    width, one = dtype.itemsize * 8, np.ones((), dtype)
    owner = range(len(sizes)) if len(k) > 1 else [0] * len(sizes)

    def step(i: jax.Array, carry: list[list[jax.Array]]) -> list[list[jax.Array]]:
        found, under, upto = carry
        bit = one << (width - 1 - i).astype(dtype)
        trial = [number | bit for number in found]
        marks = [below(i, trial[g]) for i, g in enumerate(owner)]
        counts = [count(mark) for mark in marks]
        larger = [_wide.less(have, want) for have, want in zip(total(counts), k, strict=True)]

        def chosen(new: list[jax.Array], old: list[jax.Array]) -> list[jax.Array]:
            return [jnp.where(larger[g], a, b) for g, a, b in zip(owner, new, old, strict=True)]

        found = [jnp.where(ok, a, b) for ok, a, b in zip(larger, trial, found, strict=True)]
        # Not above the number is what was below the last trial that was too large.
        return [found, chosen(counts, under), chosen(upto, counts)]

    zero, none = jnp.zeros((), dtype), jnp.zeros((), jnp.uint32)
    start = [[zero] * len(k), [none] * len(sizes), [jnp.asarray(size) for size in sizes]]
    found, under, upto = jax.lax.fori_loop(0, width, step, start)
    return found, under, upto


def _sizes(arrays: Sequence[jax.Array]) -> np.ndarray:
    for array in arrays:
        if array.size >= 2**32:
            raise ValueError(f"A leaf of {array.size} weights cannot be counted: split it first.")
    return np.asarray([array.size for array in arrays], np.uint32)


def _at(counts: Wide, i: int) -> Wide:
    return Wide(counts.high[i], counts.low[i])


def _position(shape: tuple[int, ...]) -> jax.Array:
    """The index of each element in row-major order, without a reshape."""
    position = jnp.zeros(shape, jnp.uint32)
    for axis in range(len(shape)):
        step = np.uint32(math.prod(shape[axis + 1 :]))
        position += jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * step
    return position
