"""A quantized weight plus an array, kept apart: `x (Q + D) = x Q + x D`.

It arises inside a lifted function that adds to a weight, such as one that merges adapters into it.
The quantized part keeps its integers; the array, which is dense anyway, has a product of its own.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from jopt import trees
from jopt.trace import Leaf, rule

from .weights import WeightLeaf


@functools.partial(jax.tree_util.register_dataclass, data_fields=["base", "delta"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Sum(Leaf):
    """A quantized leaf and an array of its shape."""

    base: WeightLeaf
    delta: jax.Array

    def materialise(self) -> jax.Array:
        """The sum."""
        return self.base.materialise() + self.delta


def _fits(call: Any, leaf: Leaf, other: Any) -> bool:
    """Whether the result is still a weight, which a bias that meets activations is not."""
    return not trees.is_typed(other) and call.out[0].shape == leaf.shape


@rule(jax.lax.add_p, WeightLeaf)
def _add(call: Any, left: Any, right: Any) -> Any:
    leaf, other = (left, right) if isinstance(left, WeightLeaf) else (right, left)
    if leaf.always_dense or not _fits(call, leaf, other):
        return NotImplemented
    return Sum(leaf, jnp.broadcast_to(other, leaf.shape))


@rule(jax.lax.add_p, Sum)
def _add_more(call: Any, left: Any, right: Any) -> Any:
    leaf, other = (left, right) if isinstance(left, Sum) else (right, left)
    if not _fits(call, leaf, other):
        return NotImplemented
    return Sum(leaf.base, leaf.delta + jnp.broadcast_to(other, leaf.shape))


@rule(jax.lax.sub_p, WeightLeaf)
def _subtract(call: Any, left: Any, right: Any) -> Any:
    if not isinstance(left, WeightLeaf) or left.always_dense or not _fits(call, left, right):
        return NotImplemented
    return Sum(left, -jnp.broadcast_to(right, left.shape))


@rule(jax.lax.sub_p, Sum)
def _subtract_more(call: Any, left: Any, right: Any) -> Any:
    if not isinstance(left, Sum) or not _fits(call, left, right):
        return NotImplemented
    return Sum(left.base, left.delta - jnp.broadcast_to(right, left.shape))


@rule(jax.lax.dot_general_p, Sum)
@rule(jax.lax.conv_general_dilated_p, Sum)
def _both(call: Any, *operands: Any) -> Any:
    """An operation that is linear in the weight, on either part."""
    if sum(trees.is_typed(x) for x in operands) > 1:
        return NotImplemented

    def on(part: str) -> Any:
        return call.bind(*(getattr(x, part) if isinstance(x, Sum) else x for x in operands))

    return on("base") + on("delta")


def _view(call: Any, leaf: Sum, *indices: Any) -> Any:
    """An operation that only looks at the weight differently."""
    base = call.bind(leaf.base, *indices)
    delta = call.bind(leaf.delta, *indices)
    return Sum(base, delta) if trees.is_typed(base) else base + delta


@rule(jax.lax.split_p, Sum)
@rule(jax.lax.unstack_p, Sum)
def _parts(call: Any, leaf: Sum) -> Any:
    """Pieces of the one and pieces of the other."""
    pairs = zip(call.bind(leaf.base), call.bind(leaf.delta), strict=True)
    return [Sum(base, delta) for base, delta in pairs]


@rule(jax.lax.concatenate_p, Sum)
@rule(jax.lax.stack_p, Sum)
def _together(call: Any, *leaves: Any) -> Any:
    """Sums side by side, and quantized weights to which nothing was added."""
    if not all(isinstance(leaf, Sum | WeightLeaf) for leaf in leaves):
        return NotImplemented
    base = call.bind(*(leaf.base if isinstance(leaf, Sum) else leaf for leaf in leaves))
    delta = call.bind(*(_delta(leaf) for leaf in leaves))
    return Sum(base, delta) if trees.is_typed(base) else base + delta


def _delta(leaf: Sum | WeightLeaf) -> jax.Array:
    if isinstance(leaf, Sum):
        return leaf.delta
    return jnp.zeros_like(leaf.split()[0], leaf.dtype)


@rule(jax.lax.gather_p, Sum)
def _gather(call: Any, leaf: Any, indices: Any) -> Any:
    """Rows of an embedding."""
    if not isinstance(leaf, Sum) or trees.is_typed(indices):
        return NotImplemented
    return call.bind(leaf.base, indices) + call.bind(leaf.delta, indices)


for _primitive in (
    *(jax.lax.transpose_p, jax.lax.reshape_p, jax.lax.squeeze_p, jax.lax.broadcast_in_dim_p),
    *(jax.lax.slice_p, jax.lax.rev_p, jax.lax.dynamic_slice_p, jax.lax.convert_element_type_p),
):
    rule(_primitive, Sum)(_view)
