"""Where a function can be stopped: a weight, and how its products read it."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .sites import Site


class Target(NamedTuple):
    """A weight to stop at, and how its products read it. Axes count from its end."""

    path: str
    contracted: tuple[int, ...]
    batched: tuple[int, ...]
    groups: int  # of a convolution's features


@dataclasses.dataclass(frozen=True)
class Stop:
    """A weight before which the function has stopped."""

    target: Target
    index: tuple[int, ...]  # the layer's number in each scan around it, outermost first
    weight: jax.Array  # this layer's
    stats: Any  # what `measure` found, over all batches: a pytree of arrays

    @property
    def path(self) -> str:
        """The parameter's path."""
        return self.target.path

    def matrices(self, weight: jax.Array | None = None) -> jax.Array:
        """The weight as `[blocks, inputs, outputs]`, in the order of the statistics."""
        weight = self.weight if weight is None else weight
        batched, contracted, free = self._axes(weight.ndim)
        moved = jnp.transpose(weight, (*batched, *contracted, *free))
        sizes = [math.prod(weight.shape[a] for a in axes) for axes in (batched, contracted)]
        if self.target.groups == 1:
            return moved.reshape(*sizes, -1)
        return jnp.moveaxis(moved.reshape(sizes[1], self.target.groups, -1), 1, 0)

    def restored(self, matrices: jax.Array) -> jax.Array:
        """What `matrices` took apart."""
        batched, contracted, free = self._axes(self.weight.ndim)
        if self.target.groups > 1:
            matrices = jnp.moveaxis(matrices, 0, 1)
        order = (*batched, *contracted, *free)
        moved = matrices.reshape([self.weight.shape[axis] for axis in order])
        return jnp.transpose(moved, [order.index(axis) for axis in range(len(order))])

    def coarse(self, matrices: jax.Array) -> jax.Array:
        """`[blocks, groups of inputs, outputs or 1]` laid out along the weight, at its rank."""
        shape, (batched, contracted, free) = self.weight.shape, self._axes(self.weight.ndim)
        blocks, groups, outputs = matrices.shape
        inputs = [shape[axis] for axis in contracted]
        total = math.prod(inputs)
        if groups == 1:
            inputs = [1] * len(inputs)
        elif groups != total:  # consecutive inputs, which lie along the last of the axes
            inputs[-1] = inputs[-1] * groups // total
        kept = [shape[axis] for axis in free]
        if self.target.groups > 1:
            matrices, blocks = jnp.moveaxis(matrices, 0, 1), 1
            kept = [self.target.groups * outputs]
        elif outputs == 1:
            kept = [1] * len(kept)
        sizes = [shape[axis] for axis in batched] if blocks > 1 else [1] * len(batched)
        order = (*batched, *contracted, *free)
        moved = matrices.reshape(*sizes, *inputs, *kept)
        return jnp.transpose(moved, [order.index(axis) for axis in range(len(order))])

    def _axes(self, ndim: int) -> tuple[list[int], list[int], list[int]]:
        batched, contracted = (
            sorted(axis % ndim for axis in axes)
            for axes in (self.target.batched, self.target.contracted)
        )
        return batched, contracted, [a for a in range(ndim) if a not in batched + contracted]


def target_of(path: str, found: Sequence[Site]) -> Target | str:
    """How the products at `path` read their weight, or why that cannot be told."""
    uses = [(site, use) for site in found for use in site.uses if use.path == path]
    layouts = {
        Target(path, use.contracted, use.batched, site.groups)
        for site, use in uses
        if use.contracted and use.batched is not None
    }
    if not uses:
        return "no product reads it"
    if not layouts:
        return "its products sum over parts of its axes"
    if len(layouts) > 1:
        return "its products read it in different ways"
    return layouts.pop()


def stacked(parts: Mapping[tuple[int, ...], Any]) -> Any:
    """The layers of one weight as one pytree."""
    depth = len(next(iter(parts)))
    if depth == 0:
        return parts[()]
    sizes = [1 + max(index[axis] for index in parts) for axis in range(depth)]

    def stack(*arrays: jax.Array) -> jax.Array:
        joined = jnp.stack(arrays)
        return joined.reshape(*sizes, *arrays[0].shape)

    ordered = [parts[index] for index in sorted(parts)]
    return jax.tree.map(stack, *ordered)
