"""A chunk: several steps between two looks at the clock, looped, stepped or fed from a stream."""

from collections.abc import Callable
from typing import Any, Protocol

import jax
import numpy as np

from jopt.train._feed import Feed
from jopt.train._programs import CAPACITY, Fixed
from jopt.train._state import State
from jopt.train._step import Step

PyTree = Any
Rows = dict[str, np.ndarray]  # one number a step, by the metric's name
Chunk = Callable[[State, int, int], tuple[State, Rows, int]]

_SECONDS = 0.5  # of work in a chunk


class Stream(Protocol):
    """Batches by number, such as a `grain.MapDataset`."""

    def __getitem__(self, step: int, /) -> PyTree:
        """The batch at `step`."""
        ...


def chunks(step: Step, feed: Feed | Stream, state: State, steps: int) -> Chunk:
    """Returns `f(state, done, count) -> (state, rows, examples)`, which takes `count` steps."""
    shardings = step.layout.shardings(state)
    if not hasattr(feed, "__getitem__") and not isinstance(feed, Feed):
        raise TypeError(
            "`fit(step, state, feed, ...)` expects a `Feed`, or anything that gives batch `i` as "
            f"`feed[i]`; got a {type(feed).__name__}, which cannot go on at a step of its middle."
        )
    if not isinstance(feed, Feed):
        return _streamed(step, feed, Fixed(shardings), steps)
    arrays = step.layout.beside(state, feed.arrays)
    fixed = Fixed(shardings, feed.order)
    if step.programs.loops(fixed, state, arrays):
        return _looped(step, fixed, arrays, feed.batch_size)
    return _stepped(step, fixed, arrays, feed.batch_size)


def next_length(count: int, seconds: float) -> int:
    """The length of the next chunk, after `count` steps took so many seconds."""
    return int(min(max(count * _SECONDS / max(seconds, 1e-6), 1), 8 * count, CAPACITY))


def _looped(step: Step, fixed: Fixed, arrays: PyTree, batch_size: int) -> Chunk:
    def go(state: State, done: int, count: int) -> tuple[State, Rows, int]:
        state, buffers = step.programs.many(fixed, state, arrays, np.int32(count))
        rows = {name: np.array(buffer[:count]) for name, buffer in jax.device_get(buffers).items()}
        return state, rows, count * batch_size

    return go


def _stepped(step: Step, fixed: Fixed, arrays: PyTree, batch_size: int) -> Chunk:
    def go(state: State, done: int, count: int) -> tuple[State, Rows, int]:
        taken = []
        for _ in range(count):
            state, metrics = step.programs.fed(fixed, state, arrays)
            taken.append(metrics)
        return state, _columns(taken), count * batch_size

    return go


def _streamed(step: Step, stream: Stream, fixed: Fixed, steps: int) -> Chunk:
    ahead: dict[int, PyTree] = {}  # the batch fetched while the device was busy

    def go(state: State, done: int, count: int) -> tuple[State, Rows, int]:
        taken, examples = [], 0
        for i in range(done, done + count):
            batch = ahead.pop(i) if i in ahead else stream[i]
            examples += np.shape(jax.tree.leaves(batch)[0])[0]
            state, metrics = step.programs.one(fixed, state, step.layout.spread(batch))
            taken.append(metrics)
            if i + 1 < steps:
                ahead[i + 1] = stream[i + 1]
        return state, _columns(taken), examples

    return go


def _columns(taken: list[dict[str, jax.Array]]) -> Rows:
    rows = jax.device_get(taken)
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}
