"""A leaf that divides the activation it meets: what no neighbour of a layer could take."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jopt import trees
from jopt.trace import Layered, rule
from jopt.trace.layered import shared_along, spread


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["base", "inverse"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class Scaled(Layered):
    """The weight `base · inverse`, whose products multiply the activation by `inverse` first.

    Made by `jopt.quant.smooth` and for AWQ: `base` is the weight times its scales, an array or what
    it is quantized to, and the product is that of `x · inverse` with `base` by the rules of `base`,
    its activation format and range included.
    """

    base: Any  # an array or a typed leaf
    inverse: jax.Array  # rank of the value; differs along the summed axes and those of layers only

    def materialise(self) -> jax.Array:
        """The weight as the function knew it."""
        base = _array(self.base)
        return (base.astype(jnp.float32) * spread(self.inverse, base.shape)).astype(base.dtype)

    def split(self) -> tuple[jax.Array, Any]:
        """The base's array; and what is coarse in the base, and the inverse scales."""
        if isinstance(self.base, Layered):
            array, coarse = self.base.split()
            return array, (coarse, self.inverse)
        return _array(self.base), (None, self.inverse)

    def joined(self, array: jax.Array, coarse: Any) -> "Scaled":
        """This leaf with other arrays."""
        inner, inverse = coarse
        base = self.base.joined(array, inner) if isinstance(self.base, Layered) else array
        return Scaled(base, inverse)

    def trainable(self, mark: Callable[[Any], Any]) -> "Scaled":
        """What of this trains: what does of the base."""
        return Scaled(mark(self.base), jax.tree.map(lambda _: False, self.inverse))

    def storage(self) -> dict[str, tuple[Any, int]]:
        """The base's arrays and the inverse scales."""
        kept = super().storage()
        if trees.is_typed(self.base):
            kept |= {f"base/{name}": array for name, array in self.base.storage().items()}
        return kept

    def size(self) -> trees.Size:
        """Values of the base that are not zero, and all bits; the scales are no parameters."""
        base = trees.size({"base": self.base})
        extra = self.inverse.size * trees.bits_of(self.inverse)
        return trees.Size(base.parameters, base.nonzeros, base.bits + extra)


def scaled(base: Any, scales: jax.Array, axes: tuple[int, ...] = (-2,)) -> Scaled:
    """A leaf for a weight that was multiplied by `scales`, before or after it is quantized.

    Args:
      base: the multiplied weight, an array or a leaf that `quantize` made of it.
      scales: `[..., in]`, leading axes for stacked layers.
      axes: which of the weight's axes, counted from the end, hold the inputs, the major one first.
    """
    return Scaled(base, along(1.0 / scales.astype(jnp.float32), jnp.shape(_shaped(base)), axes))


def along(scales: jax.Array, shape: tuple[int, ...], axes: tuple[int, ...]) -> jax.Array:
    """Lays `[*layers, in]` onto an array of `shape`, the inputs along `axes`."""
    ordered = sorted(axes)
    split = scales.reshape(*scales.shape[:-1], *(shape[axis] for axis in axes))
    first = scales.ndim - 1
    split = jnp.transpose(split, (*range(first), *(first + axes.index(a) for a in ordered)))
    sizes = [1] * len(shape)
    for axis in ordered:
        sizes[axis] = shape[axis]
    return split.reshape(*scales.shape[:-1], *sizes[first:])


def _array(base: Any) -> jax.Array:
    return base.materialise() if trees.is_typed(base) else jnp.asarray(base)


def _shaped(base: Any) -> Any:
    return base.aval if trees.is_typed(base) else base


# Rules. The result is that of the base with the divided activation; where the inverse scales lie
# along other axes, the weight is materialised.


@rule(jax.lax.dot_general_p, Scaled)
def _dot(call: Any, *operands: Any) -> Any:
    side = 0 if isinstance(operands[0], Scaled) else 1
    leaf, x = operands[side], operands[1 - side]
    if trees.is_typed(x):
        return NotImplemented
    summed, shared = call.params["dimension_numbers"]
    ours, theirs = ((*shared[k], *summed[k]) for k in (side, 1 - side))
    rank = leaf.inverse.ndim
    inverse, others = leaf.inverse, [axis for axis in range(rank) if axis not in ours]
    if not shared_along(inverse, others):
        return NotImplemented
    inverse = jnp.transpose(inverse, (*ours, *others)).reshape([inverse.shape[a] for a in ours])
    x = x * _onto(inverse, theirs, x.ndim).astype(x.dtype)
    return call.bind(*((leaf.base, x) if side == 0 else (x, leaf.base)))


@rule(jax.lax.conv_general_dilated_p, Scaled)
def _conv(call: Any, x: Any, leaf: Any) -> Any:
    if not isinstance(leaf, Scaled) or trees.is_typed(x):
        return NotImplemented
    numbers = call.params["dimension_numbers"]
    feature = numbers.rhs_spec[1]
    rest = [axis for axis in range(leaf.inverse.ndim) if axis != feature]
    groups = call.params["feature_group_count"] * call.params["batch_group_count"]
    if groups != 1 or not shared_along(leaf.inverse, rest):
        return NotImplemented
    x = x * _onto(leaf.inverse.reshape(-1), (numbers.lhs_spec[1],), x.ndim).astype(x.dtype)
    return call.bind(x, leaf.base)


@rule(jax.lax.convert_element_type_p, Scaled)
def _convert(call: Any, leaf: Scaled) -> Any:
    return Scaled(call.bind(leaf.base), leaf.inverse)


def _onto(values: jax.Array, axes: tuple[int, ...], rank: int) -> jax.Array:
    """Lays an array onto one of another rank, its axes in the places given."""
    order = sorted(range(len(axes)), key=lambda k: axes[k])
    sizes = [1] * rank
    for k in order:
        sizes[axes[k]] = values.shape[k]
    return jnp.transpose(values, order).reshape(sizes)
