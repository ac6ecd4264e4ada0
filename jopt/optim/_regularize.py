"""What all regularizers share: which leaves they act on, their step, strengths that may change."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from jopt import trees

PyTree = Any
Level = jax.typing.ArrayLike | optax.Schedule


class RegularizeState(NamedTuple):
    """State of every regularizer."""

    step: jax.Array  # int32, updates so far
    owed: jax.Array | tuple[()] = ()  # float32, thresholds put off until a later step


def regularizer(
    change: Callable[[jax.Array, jax.Array, RegularizeState, str], jax.Array],
    where: trees.Where | None,
    *,
    caller: str,
    check: Callable[[PyTree, list[bool]], None] = lambda params, chosen: None,
    owe: Callable[[RegularizeState], jax.Array] | None = None,
) -> optax.GradientTransformation:
    """A transformation that replaces the updates of some leaves.

    Args:
      change: gives an update, from `(update, weight, state, path)`.
      where: the leaves; by default those of floats with two axes or more.
      caller: what errors call the culprit.
      check: raises for parameters that it cannot act on, given which leaves are chosen.
      owe: what is put off after this step, of which the state keeps account.
    """

    def init(params: PyTree) -> RegularizeState:
        check(params, _chosen(params, where, caller))
        owed = () if owe is None else jnp.zeros([], jnp.float32)
        return RegularizeState(jnp.zeros([], jnp.int32), owed)

    def update(
        updates: PyTree, state: Any, params: PyTree | None = None
    ) -> tuple[PyTree, RegularizeState]:
        if params is None:
            raise ValueError(
                f"`{caller}(...)` acts on weights: call `update(updates, state, params)` with "
                "`params`."
            )
        marks = _chosen(params, where, caller)
        check(params, marks)
        treedef = jax.tree.structure(params, is_leaf=trees.is_typed)
        changed = []
        for (path, leaf), given, mine in zip(
            trees.items(params), treedef.flatten_up_to(updates), marks, strict=True
        ):
            if mine:
                own = change(trees.weight_of(given), trees.weight_of(leaf), state, path)
                given = trees.with_weight(given, own)
            changed.append(given)
        step = jnp.asarray(optax.safe_increment(state.step))
        owed = () if owe is None else owe(state)
        return treedef.unflatten(changed), RegularizeState(step, owed)

    return optax.GradientTransformation(init, update)


def level(value: Level, step: jax.Array) -> jax.Array:
    """A number, or what a schedule gives at this step, in float32."""
    return jnp.asarray(value(step) if callable(value) else value).astype(jnp.float32)


def checked(value: Level, name: str, *, caller: str) -> None:
    """Raises for a number below zero."""
    if callable(value) or isinstance(value, Tracer):
        return
    try:
        fits = float(np.asarray(value)) >= 0
    except (TypeError, ValueError):
        fits = False
    if not fits:
        raise ValueError(f"`{caller}(..., {name}={value!r})` expects a number of 0 or more.")


def wide(array: jax.Array) -> jax.Array:
    """At least float32."""
    return array.astype(np.promote_types(array.dtype, np.float32))


# Helpers, in order of use.


def _chosen(params: PyTree, where: trees.Where | None, caller: str) -> list[bool]:
    if not jax.tree.leaves(params):
        return [False] * len(trees.items(params))
    marks = trees.select(params, _matrices if where is None else where, caller=caller)
    return jax.tree.leaves(marks)


def _matrices(path: str, leaf: Any) -> bool:
    if trees.is_typed(leaf) and not hasattr(leaf, "with_weight"):
        return False
    weight = trees.weight_of(leaf)
    dtype = getattr(weight, "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, jnp.inexact) and jnp.ndim(weight) >= 2
