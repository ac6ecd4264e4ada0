"""The axes of a product in training, and what scales of its operands are on its result."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jopt.trace.layered import full_along, shared_along

from .._products.dot import Axes, axes
from .learned import TrainedValue


class Form(NamedTuple):
    """A `dot_general` of an activation `x` and a weight `w`, whichever stands first."""

    x: Axes
    w: Axes
    out: Any  # dtypes
    x_dtype: Any
    w_dtype: Any

    @property
    def rows(self) -> tuple[int, ...]:
        """The result's axes that are the activation's own; before them come batch axes."""
        start = len(self.x.batch)
        return tuple(range(start, start + len(self.x.free)))

    @property
    def columns(self) -> tuple[int, ...]:
        """The result's axes that are the weight's own, last."""
        start = len(self.x.batch) + len(self.x.free)
        return tuple(range(start, start + len(self.w.free)))


def form_of(call: Any, side: int, x: jax.Array, leaf: TrainedValue) -> Form:
    """The form of a product whose operand `side` is the weight."""
    contract, batch = call.params["dimension_numbers"]
    weight = axes(contract[side], batch[side], leaf.ndim)
    other = axes(contract[1 - side], batch[1 - side], x.ndim)
    return Form(other, weight, call.out[0].dtype, x.dtype, leaf.dtype)


def onto(coarse: jax.Array, form: Form) -> jax.Array | None:
    """Lays an array of the weight's rank onto the activation; only batch axes may differ in it."""
    if not shared_along(coarse, form.w.contract + form.w.free):
        return None
    order = form.x.batch + form.x.contract + form.x.free
    moved = _batch_of(coarse, form.w)
    moved = moved.reshape(moved.shape + (1,) * (len(order) - moved.ndim))
    return jnp.transpose(moved, [order.index(axis) for axis in range(len(order))])


def _batch_of(coarse: jax.Array, axes: Axes) -> jax.Array:
    """An array that is 1 along all but batch axes, as one of batch axes alone."""
    moved = jnp.transpose(coarse, axes.batch + axes.contract + axes.free)
    return moved.reshape(moved.shape[: len(axes.batch)])


def x_on_result(scale: jax.Array, form: Form) -> jax.Array:
    """A scale of the activation, laid onto the result."""
    moved = _without_summed(scale, form.x)
    return moved.reshape(moved.shape + (1,) * len(form.columns))


def w_on_result(scale: jax.Array, shape: Sequence[int], form: Form) -> jax.Array:
    """A scale of the weight, whose shape is given, laid onto the result."""
    moved = _without_summed(without_groups(scale, shape), form.w)
    sizes, first = moved.shape, len(form.w.batch)
    return moved.reshape(sizes[:first] + (1,) * len(form.rows) + sizes[first:])


def _without_summed(scale: jax.Array, axes: Axes) -> jax.Array:
    """A scale that is 1 along summed axes, without them; batch axes first."""
    moved = jnp.transpose(scale, axes.batch + axes.free + axes.contract)
    return moved.reshape(moved.shape[: len(axes.batch) + len(axes.free)])


def without_groups(coarse: jax.Array, shape: Sequence[int]) -> jax.Array:
    """A coarse array with an entry for each index of the axes along which it has groups."""
    return full_along(coarse, shape, [a for a, n in enumerate(coarse.shape) if n != 1])


def ones_for(scale: jax.Array, start: int, old: int, new: int) -> jax.Array:
    """A scale whose `old` axes from `start`, along which it is shared, became `new` others."""
    return scale.reshape(scale.shape[:start] + (1,) * new + scale.shape[start + old :])


def arranged(result: jax.Array, own: Axes, other: Axes, *, free: int, contract: int) -> jax.Array:
    """A product's result in the order of the axes of the operand whose derivative it is.

    Its axes are batch axes, and from `free` and `contract` on the operand's own in the order that
    products give them: summed axes in that of the other operand.
    """
    ranked = sorted(other.contract)
    place = {axis: i for i, axis in enumerate(own.batch)}
    place |= {axis: free + i for i, axis in enumerate(own.free)}
    pairs = zip(own.contract, other.contract, strict=True)
    place |= {axis: contract + ranked.index(twin) for axis, twin in pairs}
    return jnp.transpose(result, [place[axis] for axis in range(result.ndim)])


def swapped(result: jax.Array, form: Form) -> jax.Array:
    """The result of a product whose weight stands first."""
    batch = tuple(range(len(form.x.batch)))
    return jnp.transpose(result, batch + form.columns + form.rows)
