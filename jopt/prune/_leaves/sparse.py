"""What packed weights share: how they are seen, cast, sliced layer by layer, and multiplied.

A packed weight is whole again before it is multiplied: this saves memory at rest, not time. What
does better (`csr.py`) registers rules of its own, which go first.
"""

import abc
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jopt import trees
from jopt.trace import Leaf, rule

UNPACKED = "unpacked: its zeros are stored from here on"


class Sparse(Leaf):
    """A weight without (most of) its zeros. Zeros come back as +0, all else bit for bit.

    The last `matrix_ndim` axes are packed together; those before them count layers, and each of the
    leaf's arrays begins with them, so that scan and vmap may slice them.
    """

    arrays: ClassVar[tuple[str, ...]]  # fields with arrays, all of them
    values: jax.Array  # what trains

    @property
    @abc.abstractmethod
    def matrix_ndim(self) -> int:
        """How many axes, the last ones, are packed together."""

    def with_arrays(self, function: Callable[[jax.Array], Any]) -> "Sparse":
        """This leaf with another array for each of its own."""
        new = {name: function(getattr(self, name)) for name in self.arrays}
        return dataclasses.replace(self, **new)  # pyright: ignore[reportArgumentType]

    def trainable(self, mark: Callable[[Any], Any]) -> "Sparse":
        """What of this trains: of the values what `mark` says."""
        frozen = self.with_arrays(lambda array: False)
        return dataclasses.replace(frozen, values=mark(self.values))  # pyright: ignore

    def size(self) -> trees.Size:
        """Parameters, nonzeros and bits; places without a value hold zeros."""
        bits = sum(array.size * width for array, width in self.storage().values())
        return trees.Size(math.prod(self.shape), int(np.count_nonzero(self.values)), bits)

    def transposed(self, permutation: Sequence[int]) -> "Sparse | None":
        """This leaf with its axes in another order; None where that moves what is packed."""
        return None


def widened(values: jax.Array) -> jax.Array:
    """Values in a dtype of whole bytes, which is what XLA gathers and selects."""
    return values.astype(jnp.int8) if trees.bits_of(values) < 8 else values


@rule(jax.lax.dot_general_p, Sparse)
@rule(jax.lax.conv_general_dilated_p, Sparse)
def _product(call: Any, *operands: Any) -> Any:
    call.say("a dense product of the unpacked weight")
    return call.bind(*map(_unpacked, operands))


@rule(jax.lax.gather_p, Sparse)
def _gather(call: Any, leaf: Any, indices: Any) -> Any:
    if trees.is_typed(indices):
        return NotImplemented
    call.say("rows of the unpacked weight")
    return call.bind(leaf.materialise(), indices)


@rule(jax.lax.convert_element_type_p, Sparse)
def _convert(call: Any, leaf: Sparse) -> Any:
    """Values are cast, and zeros stay out."""
    dtype = call.params["new_dtype"]
    if not jnp.issubdtype(dtype, jnp.floating):
        return NotImplemented
    return dataclasses.replace(leaf, values=leaf.values.astype(dtype))  # pyright: ignore


@rule(jax.lax.transpose_p, Sparse)
def _transpose(call: Any, leaf: Sparse) -> Any:
    moved = leaf.transposed(call.params["permutation"])
    return _seen(call, leaf) if moved is None else moved


@rule(jax.lax.squeeze_p, Sparse)
def _squeeze(call: Any, leaf: Sparse) -> Any:
    dimensions = call.params["dimensions"]
    if any(axis >= _layers(leaf) for axis in dimensions):
        return _seen(call, leaf)
    return leaf.with_arrays(lambda array: jax.lax.squeeze(array, dimensions))


@rule(jax.lax.slice_p, Sparse)
def _slice(call: Any, leaf: Sparse) -> Any:
    """Some of the layers."""
    params, layers = call.params, _layers(leaf)
    strides = params["strides"] or (1,) * leaf.ndim
    bounds = list(zip(params["start_indices"], params["limit_indices"], strides, strict=True))
    whole = [(0, size, 1) for size in leaf.shape]
    if bounds[layers:] != whole[layers:]:
        return _seen(call, leaf)
    index = tuple(slice(*bound) for bound in bounds[:layers])
    return leaf.with_arrays(lambda array: array[index])


@rule(jax.lax.dynamic_slice_p, Sparse)
def _dynamic_slice(call: Any, leaf: Any, *starts: jax.Array) -> Any:
    """Some of the layers."""
    layers, sizes = _layers(leaf), call.params["slice_sizes"]
    if tuple(sizes[layers:]) != leaf.shape[layers:]:
        return _seen(call, leaf, *starts)

    def cut(array: jax.Array) -> jax.Array:
        rest = array.shape[layers:]
        first = [*starts[:layers], *[jnp.zeros_like(starts[0])] * len(rest)]
        return jax.lax.dynamic_slice(array, first, (*sizes[:layers], *rest))

    return leaf.with_arrays(cut)


def _seen(call: Any, leaf: Sparse, *others: Any) -> Any:
    call.say(UNPACKED)
    return call.bind(leaf.materialise(), *others)


for _primitive in (
    *(jax.lax.reshape_p, jax.lax.broadcast_in_dim_p, jax.lax.rev_p),
    *(jax.lax.split_p, jax.lax.unstack_p),
):
    rule(_primitive, Sparse)(_seen)


# Helpers, in order of use.


def _unpacked(operand: Any) -> Any:
    return operand.materialise() if isinstance(operand, Sparse) else operand


def _layers(leaf: Sparse) -> int:
    """How many leading axes count layers."""
    return leaf.ndim - leaf.matrix_ndim
