"""The lowest scores, exactly as many as asked for, by bisection over the bits of floats.

Only counts cross devices: no sort, no concatenation, no gather. So one threshold over all leaves of
a sharded model costs a few scalar reductions.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

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


@functools.partial(jax.jit, static_argnames=("together", "stacked"))
def keep(
    scores: list[jax.Array], lowest: Wide, *, together: bool, stacked: bool = False
) -> list[jax.Array]:
    """Marks all but the lowest scores. Of equal scores the first ones go first.

    Args:
      scores: floats of one dtype, one array a leaf.
      lowest: how many scores to mark False, at most as many as there are: one number for all leaves
        if `together`, else one for each.
      together: rank the scores of all leaves in one order, instead of each leaf's on its own.
      stacked: put leaves of one shape into one array first. A program of hundreds of leaves is then
        a small one; but leaves that devices share in different ways would be moved.

    Returns:
      Boolean arrays, shaped like the scores.
    """
    leaves = _leaves([sortable(score) for score in scores], stacked=stacked)
    if together:
        limits, stops = _together(leaves, _at(lowest, 0))
    else:
        limits, stops = _apart(leaves, [_at(lowest, group) for group in leaves.places])
    kept = [
        (key > _along(limit, key)) | ((key == _along(limit, key)) & ~leaves.before(key, stop))
        for key, limit, stop in zip(leaves.arrays, limits, stops, strict=True)
    ]
    return leaves.apart(kept)


def counts(marks: Sequence[jax.Array], *, stacked: bool = False) -> jax.Array:
    """How many are True in each array: uint32 [arrays]. `stacked`: as of `keep`."""
    leaves = _leaves(marks, stacked=stacked)
    return leaves.ordered([leaves.counted(array) for array in leaves.arrays])


class _Leaves(NamedTuple):
    """Arrays of one leaf each, or of all leaves of one shape, with an axis of theirs in front.

    Numbers of an array's leaves are a scalar or [members] alike.
    """

    arrays: list[jax.Array]
    places: list[Any]  # of each array's leaves among all: an index, or an array of them
    stacked: bool

    @property
    def sizes(self) -> list[jax.Array]:
        """How many elements a leaf has."""
        found = []
        for array, places in zip(self.arrays, self.places, strict=True):
            size = math.prod(self.shape(array))
            if size >= 2**32:
                raise ValueError(f"A leaf of {size} weights cannot be counted: split it first.")
            found.append(jnp.full(np.shape(places), size, jnp.uint32))
        return found

    def shape(self, array: jax.Array) -> tuple[int, ...]:
        """That of one leaf."""
        return array.shape[self.stacked :]

    def ordered(self, numbers: list[jax.Array]) -> jax.Array:
        """Numbers of all leaves in their order, [leaves]."""
        if not self.stacked:
            return jnp.stack(numbers)
        places = np.concatenate(self.places)
        together = jnp.concatenate(numbers)
        return together if np.all(np.diff(places) == 1) else together[np.argsort(places)]

    def apart(self, arrays: list[jax.Array]) -> list[jax.Array]:
        """The leaves in their order."""
        if not self.stacked:
            return arrays
        found: dict[int, jax.Array] = {}
        for array, places in zip(arrays, self.places, strict=True):
            for member, place in enumerate(places):
                found[place] = jax.lax.index_in_dim(array, member, keepdims=False)
        return [found[place] for place in range(len(found))]

    def before(self, array: jax.Array, numbers: jax.Array) -> jax.Array:
        """Marks each leaf's elements before the one of this number, row by row."""
        position = _position(self.shape(array))
        if self.stacked:
            position = jnp.expand_dims(position, 0)
        return position < _along(numbers, array)

    def counted(self, marks: jax.Array) -> jax.Array:
        """How many are True: first of every eight along the axis that masks are packed along.

        XLA:CPU adds bytes to bytes three times as fast as booleans to 32 bits. But a reshape of an
        axis whose devices hold parts of an eight would gather it, or be an error under a mesh of
        `Explicit` axes. Under `Auto` axes types do not tell; an axis of this many twos is whole
        however the devices that there are share it out.
        """
        shape = self.shape(marks)
        axis = _bits.packed_axis(shape)
        if shape and marks.size and shape[axis] % 8 == 0:
            words = shape[axis] // 8
            many = 1 << (jax.device_count().bit_length() - 1)
            if not words % _bits.devices_along(marks, axis) and _bits.twos(words) >= many:
                marks = jnp.sum(_bits.eights(marks, axis), axis=axis, dtype=jnp.uint8)
        return jnp.sum(marks, axis=tuple(range(self.stacked, marks.ndim)), dtype=jnp.uint32)


def _leaves(arrays: Sequence[jax.Array], *, stacked: bool) -> _Leaves:
    if not stacked:
        return _Leaves(list(arrays), list(range(len(arrays))), stacked=False)
    groups = _bits.by_shape(arrays).values()
    together = [jnp.stack([arrays[place] for place in places]) for places in groups]
    return _Leaves(together, [np.asarray(places) for places in groups], stacked=True)


# The two functions below return the threshold of each leaf, and the position in it before which
# scores that equal the threshold go. A position is found like a threshold, as a k-th smallest
# number: a cumulative sum would run across devices. It is looked for only where a leaf gives some
# of its equal scores and keeps others.


def _together(keys: _Leaves, k: Wide) -> tuple[list[jax.Array], list[jax.Array]]:
    def total(found: list[jax.Array]) -> list[Wide]:
        return [_wide.total(keys.ordered(found))]

    def under(i: int, trial: jax.Array) -> jax.Array:
        return keys.arrays[i] < trial

    (limit,), below, upto = _bisect(under, total, [k], keys, keys.arrays[0].dtype)
    sizes = keys.ordered(keys.sizes)
    below, upto = keys.ordered(below), keys.ordered(upto)
    tied = upto - below
    # The first leaves give first, so one leaf at most gives a part.
    room = _wide.remainder(_wide.subtract(k, _wide.total(below)), _wide.exclusive_sum(tied))
    taken = _wide.minimum(room, _wide.widen(tied)).low
    partly = (taken > 0) & (taken < tied)

    def search() -> list[jax.Array]:
        def part(found: list[jax.Array]) -> list[Wide]:
            return [_wide.total(jnp.where(partly, keys.ordered(found), 0))]

        def before(i: int, trial: jax.Array) -> jax.Array:
            return (keys.arrays[i] == limit) & keys.before(keys.arrays[i], trial)

        wanted = [_wide.total(jnp.where(partly, taken, 0))]
        (last,), _, _ = _bisect(before, part, wanted, keys, np.dtype(np.uint32))
        stops = jnp.where(partly, last + 1, jnp.where(taken > 0, sizes, 0))
        return [stops[places] for places in keys.places]

    def all_or_none() -> list[jax.Array]:
        stops = jnp.where(taken > 0, sizes, 0)
        return [stops[places] for places in keys.places]

    return [limit] * len(keys.arrays), jax.lax.cond(jnp.any(partly), search, all_or_none)


def _apart(keys: _Leaves, k: list[Wide]) -> tuple[list[jax.Array], list[jax.Array]]:
    def own(found: list[jax.Array]) -> list[Wide]:
        return [_wide.widen(count) for count in found]

    def under(i: int, trial: jax.Array) -> jax.Array:
        return keys.arrays[i] < _along(trial, keys.arrays[i])

    limits, below, upto = _bisect(under, own, k, keys, keys.arrays[0].dtype)
    taken = [each.low - count for each, count in zip(k, below, strict=True)]
    partly = [(t > 0) & (t < u - b) for t, u, b in zip(taken, upto, below, strict=True)]

    def search() -> list[jax.Array]:
        def before(i: int, trial: jax.Array) -> jax.Array:
            array = keys.arrays[i]
            return (array == _along(limits[i], array)) & keys.before(array, trial)

        last, _, _ = _bisect(before, own, own(taken), keys, np.dtype(np.uint32))
        return [jnp.where(t > 0, place + 1, 0) for t, place in zip(taken, last, strict=True)]

    def all_or_none() -> list[jax.Array]:
        return [jnp.where(t > 0, size, 0) for t, size in zip(taken, keys.sizes, strict=True)]

    return limits, jax.lax.cond(jnp.any(keys.ordered(partly)), search, all_or_none)


def _bisect(
    below: Callable[[int, jax.Array], jax.Array],
    total: Callable[[list[jax.Array]], list[Wide]],
    k: list[Wide],
    leaves: _Leaves,
    dtype: np.dtype,
) -> tuple[list[jax.Array], list[jax.Array], list[jax.Array]]:
    """Finds k-th smallest numbers, bit by bit.

    Lists of numbers, not vectors of all leaves: an element taken out of a vector would make a
    kernel of its own for every leaf, and XLA compiles equal kernels once.

    Args:
      below: marks what is below a number, given an array's index and the numbers of its leaves.
      total: what to compare with `k`, given the counts of each array's leaves.
      k: one for all leaves, or those of each array's.
      leaves: what is ranked.
      dtype: of the numbers, an unsigned integer.

    Returns:
      The numbers, 0 where k is 0; and in each leaf the counts of what is below and of what is not
      above.
    """
    width, one = dtype.itemsize * 8, np.ones((), dtype)
    count = len(leaves.arrays)
    owner = range(count) if len(k) > 1 else [0] * count

    def step(i: jax.Array, carry: list[list[jax.Array]]) -> list[list[jax.Array]]:
        found, under, upto = carry
        bit = one << (width - 1 - i).astype(dtype)
        trial = [number | bit for number in found]
        marks = [below(i, trial[g]) for i, g in enumerate(owner)]
        have = [leaves.counted(mark) for mark in marks]
        larger = [_wide.less(few, want) for few, want in zip(total(have), k, strict=True)]

        def chosen(new: list[jax.Array], old: list[jax.Array]) -> list[jax.Array]:
            return [jnp.where(larger[g], a, b) for g, a, b in zip(owner, new, old, strict=True)]

        found = [jnp.where(ok, a, b) for ok, a, b in zip(larger, trial, found, strict=True)]
        # Not above the number is what was below the last trial that was too large.
        return [found, chosen(have, under), chosen(upto, have)]

    sizes = leaves.sizes
    numbers = [jnp.zeros(jnp.shape(each.low), dtype) for each in k]
    start = [numbers, [jnp.zeros_like(size) for size in sizes], sizes]
    found, under, upto = jax.lax.fori_loop(0, width, step, start)
    return found, under, upto


def _along(numbers: jax.Array, array: jax.Array) -> jax.Array:
    """The numbers of an array's leaves, to be compared with its elements."""
    return numbers.reshape(-1, *(1,) * (array.ndim - 1)) if numbers.ndim else numbers


def _at(counts: Wide, i: Any) -> Wide:
    return Wide(counts.high[i], counts.low[i])


def _position(shape: tuple[int, ...]) -> jax.Array:
    """The index of each element in row-major order, without a reshape."""
    position = jnp.zeros(shape, jnp.uint32)
    for axis in range(len(shape)):
        step = np.uint32(math.prod(shape[axis + 1 :]))
        position += jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * step
    return position
