"""Units of many weights: blocks, channels, and trees of patterns from coarse to fine."""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jopt import schedules

from . import _bits
from ._patterns import Pattern, is_integer


@dataclasses.dataclass(frozen=True)
class Block(Pattern):
    """Blocks of the last axes: `Block((4, 4))` takes tiles of 4 inputs by 4 outputs.

    Blocks start at index 0; at the far edge they are as small as what remains. A block's score is
    the mean of its weights', so small blocks compete with whole ones; sparsity counts blocks, small
    ones like others, and `report` counts the weights.

    Attributes:
      shape: the lengths of a block along the last axes, each at least 1.

    Raises:
      ValueError: unless `shape` holds positive integers.
      TypeError: unless it holds integers.
    """

    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        given: Any = self.shape
        if not isinstance(given, Sequence | np.ndarray) or not all(map(is_integer, given)):
            raise TypeError(
                f"`Block({given!r})` expects integers in a tuple, the lengths of a block along the "
                "last axes, as in `Block((4, 4))`."
            )
        object.__setattr__(self, "shape", tuple(int(n) for n in given))
        if not self.shape or min(self.shape) < 1:
            raise ValueError(f"`Block({self.shape})` expects lengths of 1 or more, as in `(4, 4)`.")

    @property
    def share(self) -> float:
        """A pruned block is gone."""
        return 1.0

    @property
    def along_inputs(self) -> bool:
        """Blocks lie along the last axes."""
        return False

    def misfit(self, shape: tuple[int, ...], axis: int) -> str | None:
        """One whole block must find room."""
        tail = shape[len(shape) - len(self.shape) :] if len(shape) >= len(self.shape) else ()
        if not tail or any(have < want for have, want in zip(tail, self.shape, strict=True)):
            return f"shape {shape} is smaller than a block of {self.shape}"
        return None

    def units(self, scores: jax.Array, axis: int) -> jax.Array:
        """The mean of each block's scores, in float32 or wider."""
        first = scores.ndim - len(self.shape)
        return _means(scores, lambda x: self._pooled(x, first), self._members(scores.shape))

    def spread(self, kept: jax.Array, scores: jax.Array, axis: int) -> jax.Array:
        """Repeats each block's mark over its weights."""
        first = scores.ndim - len(self.shape)
        for at, length in enumerate(self.shape, first):
            # By broadcasting and a reshape, which keep a sharded axis where it is.
            shape = (*kept.shape[: at + 1], length, *kept.shape[at + 1 :])
            wide = jnp.broadcast_to(jnp.expand_dims(kept, at + 1), shape)
            kept = wide.reshape(*kept.shape[:at], kept.shape[at] * length, *kept.shape[at + 1 :])
            kept = jax.lax.slice_in_dim(kept, 0, scores.shape[at], axis=at)
        return _bits.placed(kept, scores)

    def _pooled(self, x: jax.Array, first: int) -> jax.Array:
        for at, length in enumerate(self.shape, first):
            x = _bits.whole(x, at, length)
            short = -x.shape[at] % length
            if short:
                x = jnp.pad(x, [(0, short if i == at else 0) for i in range(x.ndim)])
            shape = (*x.shape[:at], x.shape[at] // length, length, *x.shape[at + 1 :])
            x = jnp.sum(x.reshape(shape), axis=at + 1)
        return x

    def _members(self, shape: tuple[int, ...]) -> np.ndarray:
        """How many weights each block has, in a form that broadcasts."""
        lead = len(shape) - len(self.shape)
        members = np.ones((1,) * len(shape), np.float32)
        for at, length in enumerate(self.shape, lead):
            last = shape[at] % length or length
            own = np.full(-(-shape[at] // length), length, np.float32)
            own[-1] = last
            members = members * own.reshape([-1 if i == at else 1 for i in range(len(shape))])
        return members


@dataclasses.dataclass(frozen=True)
class Channel(Pattern):
    """Whole channels: all weights at one index of an axis, `Channel(-1)` the outputs of a kernel.

    A channel's score is the mean of its weights': with `magnitude(p)` it ranks channels by their
    Lp norm. The masks keep shapes as they are; the channel's bias and its readers stay too, which
    only shrinking the model removes. Where layers are stacked in one leaf, a channel runs through
    all of them.

    Attributes:
      axis: the axis of the channels, counted from the end (negative).

    Raises:
      ValueError: if `axis` is not negative.
      TypeError: if it is no integer.
    """

    axis: int = -1

    def __post_init__(self) -> None:
        if not is_integer(self.axis):
            raise TypeError(
                f"`Channel({self.axis!r})` expects an integer, an axis counted from the end, such "
                "as -1."
            )
        if self.axis >= 0:
            raise ValueError(
                f"`Channel({self.axis})` expects an axis counted from the end, such as -1."
            )

    @property
    def share(self) -> float:
        """A pruned channel is gone."""
        return 1.0

    @property
    def along_inputs(self) -> bool:
        """The axis is given."""
        return False

    def misfit(self, shape: tuple[int, ...], axis: int) -> str | None:
        """The axis must be there."""
        return None if len(shape) >= -self.axis else f"shape {shape} has no axis {self.axis}"

    def units(self, scores: jax.Array, axis: int) -> jax.Array:
        """The mean of each channel's scores, in float32 or wider."""
        others = tuple(i for i in range(scores.ndim) if i != scores.ndim + self.axis)
        members = np.float32(math.prod(scores.shape[i] for i in others))
        return _means(scores, lambda x: jnp.sum(x, axis=others), members)

    def spread(self, kept: jax.Array, scores: jax.Array, axis: int) -> jax.Array:
        """Repeats each channel's mark over its weights."""
        at = scores.ndim + self.axis
        kept = kept.reshape([-1 if i == at else 1 for i in range(scores.ndim)])
        return _bits.placed(jnp.broadcast_to(kept, scores.shape), scores)


@dataclasses.dataclass(frozen=True)
class Tree(Pattern):
    """Patterns within patterns, from coarse to fine: channels go, then blocks, then weights.

    Every level has a part of the work. At sparsity s the first level prunes its units to the
    fraction `parts[0] · s`, rounded down, the next its own units to `(parts[0] + parts[1]) · s`,
    where units already gone count and come first, and the last one takes what is missing to s. So
    the last level settles the count: exactly where it is `Unstructured()`, and to half a group's
    loss where it is `NM`; all remaining groups are n:m only at the highest sparsity, which is above
    that of `NM` alone. More than s goes where the levels before take more: units that cut across
    each other or are of unlike sizes; and behind a rising schedule, where masks only grow, a coarse
    unit that goes late takes weights beside those that went before (on a small weight with few
    channels some percent). What a unit has left is what its score is made of.

    Attributes:
      levels: patterns from coarse to fine, two or more. All but the last take whole units; the last
        may be `NM`.
      parts: each level's share of the pruned weights, positive, with sum 1; equal by default.

    Raises:
      ValueError: if there are fewer than two levels, a level but the last leaves a part of a unit,
        or the parts do not fit.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jopt import prune
      >>> weight = jax.random.normal(jax.random.key(0), (16, 16))
      >>> tree = prune.Tree([prune.Channel(-1), prune.Block((4, 4)), prune.Unstructured()])
      >>> mask = prune.masks(weight, 0.75, pattern=tree)
      >>> int((~mask).sum()), int((~mask).all(axis=0).sum()) >= 4
      (192, True)
    """

    levels: tuple[Pattern, ...]
    parts: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        levels, given = _several(self.levels), _several(self.parts)
        parts = given or (1 / max(len(levels), 1),) * len(levels)
        object.__setattr__(self, "levels", levels)
        object.__setattr__(self, "parts", parts)
        whole = all(isinstance(p, Pattern) and p.share == 1 for p in levels[:-1])
        if len(levels) < 2 or not whole or any(isinstance(p, Tree) for p in levels):
            raise ValueError(
                f"`Tree({list(levels)})` expects two patterns or more, from coarse to fine, all "
                "but the last of them of whole units: `Channel`, `Block` or `Unstructured`."
            )
        if (
            len(parts) != len(levels)
            or not all(schedules.is_number(part) and part > 0 for part in parts)
            or abs(sum(parts) - 1) > 1e-6
        ):
            raise ValueError(
                f"`Tree(..., parts={parts})` expects a positive part for each of {len(levels)} "
                "levels, with sum 1."
            )

    @property
    def share(self) -> float:
        """What the finest level allows within what the others leave."""
        finest = self.levels[-1].share
        return finest / (1 - (1 - self.parts[-1]) * (1 - finest))

    @property
    def along_inputs(self) -> bool:
        """Whether any level lies along the inputs."""
        return any(level.along_inputs for level in self.levels)

    @property
    def steps(self) -> Sequence[tuple[Pattern, float]]:
        """Each level, and the part of the sparsity that is reached with it."""
        reached = np.cumsum(self.parts)
        reached[-1] = 1.0
        return list(zip(self.levels, (float(part) for part in reached), strict=True))

    def misfit(self, shape: tuple[int, ...], axis: int) -> str | None:
        """Every level must fit."""
        reasons = (level.misfit(shape, axis) for level in self.levels)
        return next((reason for reason in reasons if reason), None)

    def units(self, scores: jax.Array, axis: int) -> jax.Array:
        """The finest level's units."""
        return self.levels[-1].units(scores, axis)

    def spread(self, kept: jax.Array, scores: jax.Array, axis: int) -> jax.Array:
        """The finest level's weights."""
        return self.levels[-1].spread(kept, scores, axis)


def _several(given: Any) -> tuple[Any, ...]:
    """What was given, as a tuple; one thing alone is a tuple of one."""
    return tuple(given) if isinstance(given, Iterable) else (given,)


def _means(scores: jax.Array, add_up: Any, members: Any) -> jax.Array:
    """Means over units. What is gone (minus infinity) adds nothing; a unit all gone stays gone."""
    wide = scores.astype(np.promote_types(scores.dtype, np.float32))
    gone = jnp.isneginf(wide)
    sums = add_up(jnp.where(gone, 0, wide)) / jnp.asarray(members, wide.dtype)
    left = add_up((~gone).astype(jnp.uint32))
    return jnp.where(left == 0, -jnp.inf, sums)
