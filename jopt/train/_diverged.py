"""Losses and parameters that are no longer finite: found, and told with step and way back."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jopt.train._checkpoint import Checkpoints
from jopt.train._chunk import Rows
from jopt.train._state import State

PyTree = Any


class TrainingDiverged(FloatingPointError):
    """A loss or a parameter that is no longer finite.

    Attributes:
      step: the step found bad, counted from 1.
      checkpoint: the step of the newest checkpoint, written before that, or None.
    """

    def __init__(self, message: str, *, step: int, checkpoint: int | None):
        super().__init__(message)
        self.step = step
        self.checkpoint = checkpoint


def first_bad(rows: Rows) -> int | None:
    """The index of the first loss that is not finite."""
    bad = np.flatnonzero(~np.isfinite(rows["loss"]))
    return int(bad[0]) if bad.size else None


def bad_loss(rows: Rows, index: int, done: int, checkpoints: Checkpoints | None) -> Exception:
    """The error for a loss at `index` of a chunk that began when `done` steps were done."""
    return _diverged(f"the loss is {rows['loss'][index]} at step", done + index + 1, checkpoints)


def check_state(state: State, done: int, unset: int, checkpoints: Checkpoints | None) -> None:
    """Raises if more numbers are not finite than the `unset` ones there were at the beginning."""
    if int(nonfinite(state)) <= unset:
        return
    flat, _ = jax.tree_util.tree_flatten_with_path((state.params, state.collections))
    worst = max(flat, key=lambda item: int(_count(item[1])))[0]
    path = jax.tree_util.keystr(worst[1:], simple=True, separator="/")
    raise _diverged(f"`{path}` is not finite after step", done, checkpoints)


@jax.jit
def nonfinite(state: State) -> jax.Array:
    """How many numbers in the parameters and collections are infinite or not a number."""
    leaves = jax.tree.leaves((state.params, state.collections))
    return sum((_count(leaf) for leaf in leaves), jnp.zeros((), jnp.int32))


def _count(leaf: jax.Array) -> jax.Array:
    if not jnp.issubdtype(leaf.dtype, jnp.inexact):
        return jnp.zeros((), jnp.int32)
    return jnp.sum(~jnp.isfinite(leaf), dtype=jnp.int32)


def _diverged(what: str, step: int, checkpoints: Checkpoints | None) -> TrainingDiverged:
    kept = None if checkpoints is None else checkpoints.latest()
    where = (
        "There is no checkpoint from before."
        if checkpoints is None or kept is None
        else f"The checkpoint of step {kept}, from before, is in `{checkpoints.directory}`."
    )
    return TrainingDiverged(
        f"`fit` stopped: {what} {step}. {where}\n"
        "Lower the learning rate, clip the gradient (`optax.clip_by_global_norm`), or look at "
        f"batch {step - 1} of the feed.",
        step=step,
        checkpoint=kept,
    )
