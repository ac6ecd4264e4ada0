"""Patterns: which weights may only go together.

A pattern divides a weight into units and says how much of a unit goes. The number of units to take,
and from which leaves, is the scope's affair; which units, the score's.
"""

import abc
import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from . import _bits
from ._threshold import sortable


class Pattern(abc.ABC):
    """A division of weights into units that are pruned at once. Subclasses are frozen dataclasses.

    `axis` is the axis that a product sums over (the inputs), counted from the end.
    """

    @property
    @abc.abstractmethod
    def share(self) -> float:
        """The fraction of its weights that a pruned unit loses, and so the highest sparsity."""

    @property
    @abc.abstractmethod
    def along_inputs(self) -> bool:
        """Whether units lie along `axis`; if not, `axis` does not matter."""

    @property
    def steps(self) -> Sequence[tuple["Pattern", float]]:
        """Patterns to apply one after another, each with the part of the sparsity it reaches."""
        return ((self, 1.0),)

    @abc.abstractmethod
    def misfit(self, shape: tuple[int, ...], axis: int) -> str | None:
        """Why a weight of this shape cannot be divided into units; None if it can."""

    @abc.abstractmethod
    def units(self, scores: jax.Array, axis: int) -> jax.Array:
        """The score of each unit: the sum of what it would lose."""

    @abc.abstractmethod
    def spread(self, kept: jax.Array, scores: jax.Array, axis: int) -> jax.Array:
        """The mask of the weights, given which units stay whole."""


def is_integer(value: Any) -> bool:
    """Whether it is an integer, NumPy's included, and no boolean."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


@dataclasses.dataclass(frozen=True)
class Unstructured(Pattern):
    """Every weight on its own."""

    @property
    def share(self) -> float:
        """A pruned unit is gone."""
        return 1.0

    @property
    def along_inputs(self) -> bool:
        """Single weights lie along no axis."""
        return False

    def misfit(self, shape: tuple[int, ...], axis: int) -> str | None:
        """Any shape will do."""
        return None

    def units(self, scores: jax.Array, axis: int) -> jax.Array:
        """The weights' own scores."""
        return scores

    def spread(self, kept: jax.Array, scores: jax.Array, axis: int) -> jax.Array:
        """The mask is what was kept."""
        return kept


@dataclasses.dataclass(frozen=True)
class NM(Pattern):
    """At most `n` weights KEPT of every `m` consecutive inputs: `NM(2, 4)` is 2:4.

    Groups lie along the axis that the product sums over: the one that `sites` names (of a
    convolution's, the input features), else axis -2 of `[..., in, out]`. A pruned group loses its
    `m - n` lowest scores. At sparsity `1 - n / m` every group is pruned; below it, as on a rising
    schedule, the groups that lose least go first; it cannot go above.

    Attributes:
      n: weights kept of a group, at least 1.
      m: size of a group, above `n`.

    Raises:
      ValueError: unless `1 <= n < m`.
      TypeError: unless they are integers.
    """

    n: int
    m: int

    def __post_init__(self) -> None:
        if not (is_integer(self.n) and is_integer(self.m)):
            raise TypeError(
                f"`NM({self.n!r}, {self.m!r})` expects two integers: `n` weights kept of every "
                "`m`, as in `NM(2, 4)`."
            )
        if not 1 <= self.n < self.m:
            raise ValueError(
                f"`NM({self.n}, {self.m})` expects `1 <= n < m`: `n` weights kept of every `m`."
            )

    @property
    def share(self) -> float:
        """A pruned group loses m - n of its m weights."""
        return (self.m - self.n) / self.m

    @property
    def along_inputs(self) -> bool:
        """Groups are of consecutive inputs."""
        return True

    def misfit(self, shape: tuple[int, ...], axis: int) -> str | None:
        """Groups must fill the axis."""
        if len(shape) < -axis:
            return f"shape {shape} has no axis {axis}"
        if shape[axis] % self.m:
            return (
                f"shape {shape}: {shape[axis]} inputs (axis {axis}) are not a multiple of {self.m}"
            )
        return None

    def units(self, scores: jax.Array, axis: int) -> jax.Array:
        """The sum of each group's lowest scores, in float32 or wider."""
        wide = scores.astype(np.promote_types(scores.dtype, np.float32))
        lost = jnp.where(self._lost(scores, axis), self._groups(wide, axis), 0)
        return jnp.sum(lost, axis=axis)

    def spread(self, kept: jax.Array, scores: jax.Array, axis: int) -> jax.Array:
        """Prunes the lowest of every group that does not stay whole."""
        mask = jnp.expand_dims(kept, axis) | ~self._lost(scores, axis)
        return _bits.placed(mask.reshape(scores.shape), scores)

    def _groups(self, scores: jax.Array, axis: int) -> jax.Array:
        """[..., in, ...] to [..., in / m, m, ...]; `axis`, from the end, is then inside a group."""
        scores = _bits.whole(scores, axis, self.m)
        at = scores.ndim + axis
        shape = (*scores.shape[:at], scores.shape[at] // self.m, self.m, *scores.shape[at + 1 :])
        return scores.reshape(shape)

    def _lost(self, scores: jax.Array, axis: int) -> jax.Array:
        """Which members of a group have the m - n lowest scores; of equal ones the first."""
        keys = self._groups(sortable(scores), axis)
        inside = jax.lax.broadcasted_iota(jnp.int32, keys.shape, keys.ndim + axis)
        lower = jnp.zeros(keys.shape, jnp.int32)
        for j in range(self.m):
            other = jax.lax.slice_in_dim(keys, j, j + 1, axis=axis)
            lower += ((other < keys) | ((other == keys) & (j < inside))).astype(jnp.int32)
        return lower < self.m - self.n
