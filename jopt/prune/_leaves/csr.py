"""Compressed sparse rows, one for each output, and the one product here that skips zeros."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jopt import backends, trees
from jopt.trace import rule

from .sparse import Sparse, widened

# Weights of a row that one step of the product takes: more save passes over the sums, too many
# keep XLA:CPU from vectorizing.
STEP = 4
# Below this many values in the weight no choice matters.
SMALL = 64 * 1024


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["values", "inputs", "counts"],
    meta_fields=["length", "axis"],
)
@dataclasses.dataclass(frozen=True)
class CSR(Sparse):
    """A very sparse matrix: for each output the inputs that it has weights for, and these.

    Rows are as long as the longest of any output and layer, rounded up to four: XLA compiles no
    loops of ragged length, and on CPU this is two to three times as fast as rows end to end. In
    float32 a stored weight takes 48 bits (64 beyond 65,536 inputs). Made by `jopt.prune.pack`; use
    it in `jopt.lift(apply)`.

        y[m, o] = Σ_k values[k, o] x[m, inputs[k, o]]

    is computed so on CPU where that was measured to win, sums in float32; elsewhere, and for
    gradients, the weight is unpacked and the product is dense. A NaN or infinity among the inputs
    reaches the outputs that have a weight for it, and may reach others, as it does all of them in a
    dense product. Leading axes count layers, and may be sliced by scan and vmap.
    """

    values: jax.Array  # [..., most, out]; zero where a row has ended
    inputs: jax.Array  # uint16 or int32 [..., most, out]; 0 where a row has ended
    counts: jax.Array  # int32 [..., out]: the length of each row
    length: int  # how many inputs there are
    axis: int  # -2: the weight is [..., in, out]; -1: [..., out, in]

    arrays: ClassVar[tuple[str, ...]] = ("values", "inputs", "counts")

    @property
    def matrix_ndim(self) -> int:
        """Two: a matrix."""
        return 2

    def materialise(self) -> jax.Array:
        """The weight: each value written into its place."""
        one = functools.partial(_scattered, length=self.length)
        for _ in self.values.shape[:-2]:
            one = jax.vmap(one)
        dense = one(widened(self.values), self.inputs, self.counts).astype(self.values.dtype)
        return dense if self.axis == -2 else jnp.swapaxes(dense, -1, -2)

    def transposed(self, permutation: Sequence[int]) -> "CSR | None":
        """The same arrays, the weight's last two axes exchanged."""
        ndim = len(permutation)
        if tuple(permutation) != (*range(ndim - 2), ndim - 1, ndim - 2):
            return None
        return dataclasses.replace(self, axis=-3 - self.axis)

    @property
    def density(self) -> float:
        """The share of the weights that is stored, padding included."""
        return self.values.shape[-2] / max(1, self.length)


def packed(weight: np.ndarray, axis: int) -> CSR:
    """Packs matrices whose inputs lie along `axis`, -2 or -1."""
    rows = weight if axis == -1 else np.swapaxes(weight, -1, -2)  # [..., out, in]
    lead, (outputs, length) = rows.shape[:-2], rows.shape[-2:]
    kept = rows != 0
    counts = np.count_nonzero(kept, axis=-1).astype(np.int32)
    most = max(1, -(-int(counts.max(initial=0)) // STEP)) * STEP
    small = np.uint16 if length <= 2**16 else np.int32
    values, inputs = (np.zeros((*lead, most, outputs), t) for t in (weight.dtype, small))
    where = np.nonzero(kept)
    number = (np.cumsum(kept, axis=-1, dtype=np.int32) - 1)[where]
    place = (*where[:-2], number, where[-2])
    values[place], inputs[place] = rows[where], where[-1]
    return CSR(jnp.asarray(values), jnp.asarray(inputs), jnp.asarray(counts), length, axis)


@rule(jax.lax.dot_general_p, CSR)
def _dot(call: Any, *operands: Any) -> Any:
    side = 0 if isinstance(operands[0], CSR) else 1
    leaf, x = operands[side], operands[1 - side]
    summed, batch = call.params["dimension_numbers"]
    plain = leaf.ndim == 2 and not batch[0] and tuple(summed[side]) == (leaf.axis + 2,)
    if trees.is_typed(x) or not plain or not _wins(leaf, x):
        return NotImplemented
    call.say("the weights that are left times their inputs on cpu, elsewhere a dense product")
    dtype = call.out[0].dtype

    def dense(x: jax.Array, leaf: CSR) -> jax.Array:
        pair = (leaf.materialise(), x)
        return call.bind(*(pair if side == 0 else pair[::-1]))

    def sparse(x: jax.Array, leaf: CSR) -> jax.Array:
        return _skipping(x, leaf, summed[1 - side][0], side).astype(dtype)

    @jax.custom_jvp
    def product(x: jax.Array, leaf: CSR) -> jax.Array:
        return jax.lax.platform_dependent(x, leaf, cpu=sparse, default=dense)

    @product.defjvp
    def _(primals: Any, tangents: Any) -> Any:
        return product(*primals), jax.jvp(dense, primals, tangents)[1]

    return product(x, leaf)


# Helpers, in order of use.


def _scattered(
    values: jax.Array, inputs: jax.Array, counts: jax.Array, *, length: int
) -> jax.Array:
    """One matrix [length, out]; what lies beyond a row's end is written nowhere."""
    most, outputs = values.shape
    step = jax.lax.broadcasted_iota(counts.dtype, (most, outputs), 0)
    output = jax.lax.broadcasted_iota(counts.dtype, (most, outputs), 1)
    target = jnp.where(step < counts[None], inputs.astype(counts.dtype), length)
    blank = jnp.zeros((length, outputs), values.dtype)
    return blank.at[target, output].set(values, mode="drop")


def _wins(leaf: CSR, x: Any) -> bool:
    """Whether skipping zeros was measured to be quicker on CPU."""
    arrays = (x, leaf.values)
    floats = all(jnp.issubdtype(array.dtype, jnp.floating) for array in arrays)
    large = leaf.length * leaf.values.shape[-1] >= SMALL
    sparse = leaf.density <= backends.choices("cpu").sparse
    return floats and large and sparse and not any(map(_laid_out, arrays))


def _laid_out(array: Any) -> bool:
    """Whether an array's type says that it is laid out over several devices."""
    sharding = getattr(jax.typeof(array), "sharding", None)
    return sharding is not None and any(axis is not None for axis in sharding.spec)


def _skipping(x: jax.Array, leaf: CSR, summed: int, side: int) -> jax.Array:
    """The product over the weights that are left, `STEP` of each output at a time."""
    wide = jnp.float64 if 8 in (x.dtype.itemsize, leaf.values.dtype.itemsize) else jnp.float32
    moved = jnp.moveaxis(x, summed, 0).astype(wide)
    rest = moved.shape[1:]
    columns = moved.reshape(moved.shape[0], math.prod(rest))

    def part(values: jax.Array, inputs: jax.Array) -> jax.Array:
        terms = [
            values[j].astype(wide)[:, None]
            * columns.at[inputs[j].astype(jnp.int32)].get(mode="promise_in_bounds")
            for j in range(STEP)
        ]
        return sum(terms[1:], terms[0])

    def step(total: jax.Array, chunk: Any) -> tuple[jax.Array, None]:
        return total + part(*chunk), None

    chunks = [a.reshape(-1, STEP, a.shape[-1]) for a in (leaf.values, leaf.inputs)]
    first, others = [a[0] for a in chunks], [a[1:] for a in chunks]
    total = jax.lax.scan(step, part(*first), others)[0].reshape(leaf.values.shape[-1], *rest)
    return total if side == 0 else jnp.moveaxis(total, 0, -1)
