"""A bitmap and the values that it marks: the form for any pattern and any shape."""

import dataclasses
import functools
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from .sparse import Sparse, widened

WORD = 32
BLOCK = 256  # words whose marks are summed on their own: XLA:CPU is slow at long running sums


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["words", "values"], meta_fields=["matrix"]
)
@dataclasses.dataclass(frozen=True)
class BitSparse(Sparse):
    """A pruned weight: one bit for each weight, and the values of those that are left.

    In float32 `1 + 32 (1 - sparsity)` bits a weight in place of 32. Made by `jopt.prune.pack`; use
    it in `jopt.lift(apply)`. A product unpacks the weight and is dense: this saves memory at rest
    and not time. Of layers stacked in one leaf each has as many values as the one with the most:
    layers pruned together are best pruned alike (`scope="layer"`). Leading axes, which count
    layers, may be sliced by scan and vmap; the axes of `matrix` may not.
    """

    words: jax.Array  # uint32 [..., ceil(size / 32)], the lowest bit first
    values: jax.Array  # [..., most values of any layer]; those beyond a layer's own are not read
    matrix: tuple[int, ...]  # the shape of one layer's weight

    arrays: ClassVar[tuple[str, ...]] = ("words", "values")

    @property
    def matrix_ndim(self) -> int:
        """Axes of one layer's weight."""
        return len(self.matrix)

    def materialise(self) -> jax.Array:
        """The weight: each marked place takes the value whose number is the marks before it."""
        words, values = self.words, widened(self.values)
        before = _before(jax.lax.population_count(words).astype(jnp.int32))[..., None]
        inside = jax.lax.broadcasted_iota(words.dtype, (*words.shape, WORD), words.ndim)
        words = words[..., None]
        marked = (words >> inside) & 1 == 1
        below = jax.lax.population_count(words & ((1 << inside) - 1))
        number = before + below.astype(jnp.int32)
        number, marked = (_cut(array, math.prod(self.matrix)) for array in (number, marked))
        # The number of an unmarked place may be one past the last value, and is not used.
        found = jnp.take_along_axis(values, number, axis=-1, mode="clip")
        dense = jnp.where(marked, found, jnp.zeros_like(found))
        return dense.reshape(*dense.shape[:-1], *self.matrix).astype(self.values.dtype)


def packed(weight: np.ndarray, layers: int) -> BitSparse:
    """Packs a weight whose first `layers` axes count layers."""
    lead, matrix = weight.shape[:layers], weight.shape[layers:]
    rows = weight.reshape(math.prod(lead), math.prod(matrix))
    marked = rows != 0
    counts = np.count_nonzero(marked, axis=-1)
    values = np.zeros((len(rows), max(1, counts.max(initial=0))), weight.dtype)
    values[np.arange(values.shape[1]) < counts[:, None]] = rows[marked]
    marked = np.pad(marked, [(0, 0), (0, -marked.shape[1] % WORD)])
    bytes = np.packbits(marked, axis=-1, bitorder="little")
    words = np.ascontiguousarray(bytes).view("<u4").astype(np.uint32)
    words, values = (jnp.asarray(a.reshape(*lead, a.shape[-1])) for a in (words, values))
    return BitSparse(words, values, matrix)


def _before(counts: jax.Array) -> jax.Array:
    """The sum of all that stands before each entry along the last axis, in two levels."""
    size = counts.shape[-1]
    padded = jnp.pad(counts, [(0, 0)] * (counts.ndim - 1) + [(0, -size % BLOCK)])
    blocks = padded.reshape(*counts.shape[:-1], -1, BLOCK)
    sums = jnp.sum(blocks, axis=-1)
    inside = jnp.cumsum(blocks, axis=-1) - blocks
    before = (jnp.cumsum(sums, axis=-1) - sums)[..., None] + inside
    return before.reshape(padded.shape)[..., :size]


def _cut(array: jax.Array, size: int) -> jax.Array:
    """[..., words, 32] to [..., size]."""
    return array.reshape(*array.shape[:-2], -1)[..., :size]
