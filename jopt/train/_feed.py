"""Batches from arrays on the device: a function of the seed and the step, and of nothing else."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

PyTree = Any
Transform = Callable[[PyTree, jax.Array], PyTree]

_ROUNDS = 8  # of the cipher below; from four on, neighbours are no longer seen to stay neighbours


@dataclasses.dataclass(frozen=True)
class Order:
    """Which examples make up which batch: what a compiled loop knows of a feed."""

    examples: int
    batch_size: int
    seed: int
    drop_last: bool
    transform: Transform | None

    @property
    def steps_per_epoch(self) -> float:
        """Steps in which every example is seen once; whole where the last batch is dropped."""
        steps = self.examples / self.batch_size
        return math.floor(steps) if self.drop_last else steps

    def indices(self, step: jax.Array) -> jax.Array:
        """The rows of the batch at `step`, `[batch_size]`."""
        order = jax.random.key(self.seed)
        epoch, start = self.locate(jnp.asarray(step, jnp.uint32))
        position = start + jnp.arange(self.batch_size, dtype=jnp.uint32)
        here = jax.random.bits(jax.random.fold_in(order, epoch), (_ROUNDS,), jnp.uint32)
        if self.drop_last:
            return _shuffled(position, [here[r] for r in range(_ROUNDS)], self.examples)
        there = jax.random.bits(jax.random.fold_in(order, epoch + 1), (_ROUNDS,), jnp.uint32)
        over = position >= self.examples  # these belong to the epoch that begins within the batch
        keys = [jnp.where(over, there[r], here[r]) for r in range(_ROUNDS)]
        return _shuffled(jnp.where(over, position - self.examples, position), keys, self.examples)

    def batch(self, arrays: PyTree, step: jax.Array) -> PyTree:
        """The batch at `step`, transformed."""
        rows = self.indices(step)
        batch = jax.tree.map(lambda array: jnp.take(array, rows, axis=0, mode="clip"), arrays)
        if self.transform is None:
            return batch
        # A stream of its own: no epoch has this number.
        root = jax.random.fold_in(jax.random.key(self.seed), 2**32 - 1)
        return self.transform(batch, jax.random.fold_in(root, step))

    def locate(self, step: Any) -> tuple[Any, Any]:
        """The epoch in which `step` begins and the position in it, in the integers of `step`."""
        if self.drop_last:
            whole = self.examples // self.batch_size
            return step // whole, step % whole * self.batch_size
        cycle, rest = step // self.examples, step % self.examples * self.batch_size
        return cycle * self.batch_size + rest // self.examples, rest % self.examples


class Feed:
    """Shuffled batches of arrays that lie on the device.

    The batch at a step depends on `(seed, step)` alone, so a run that resumes at a step sees what
    the uncut run saw, and a loop over steps compiles without any state of its own. In each epoch
    every example appears once. The order is a pseudo-random permutation computed index by index
    (a Feistel cipher over the positions, its rounds keyed by `fold_in(key, epoch)`), which costs
    a batch, not an epoch. It is well mixed but not uniform over all `n!` orders.

    Args:
      arrays: a tree of arrays whose leading axis counts examples.
      batch_size: examples a step, at most as many as there are.
      seed: of the order and of the transform's keys.
      drop_last: leave out, each epoch, the examples that do not fill a batch (others every time).
        Otherwise a batch may end one epoch and begin the next, and nothing is left out.
      transform: `transform(batch, key) -> batch`, run inside the compiled step: augmentation,
        scaling.

    Attributes:
      arrays: the arrays, on the device.
      batch_size: examples a step.
      steps_per_epoch: an integer with `drop_last`, else a fraction.

    Raises:
      ValueError: if the arrays disagree about the number of examples, or there are fewer than a
        batch.

    Example:
      >>> import jax.numpy as jnp
      >>> from jopt import train
      >>> feed = train.Feed({"x": jnp.arange(6)}, 2, seed=0)
      >>> sorted(int(i) for step in range(3) for i in feed.batch(feed.arrays, step)["x"])
      [0, 1, 2, 3, 4, 5]

    References:
      John Black, Phillip Rogaway: Ciphers with Arbitrary Finite Domains, CT-RSA 2002 (the
        generalised
      Feistel construction, and walking the cycle until it is back in the domain).
    """

    def __init__(
        self,
        arrays: PyTree,
        batch_size: int,
        *,
        seed: int,
        drop_last: bool = True,
        transform: Transform | None = None,
    ):
        examples = _examples(arrays)
        if not 1 <= batch_size <= examples:
            raise ValueError(
                f"`Feed(..., batch_size={batch_size})` expects a batch of 1 to {examples} "
                f"examples: the arrays hold {examples}."
            )
        if not drop_last and examples * batch_size >= 2**32:
            raise ValueError(
                f"`Feed(..., drop_last=False)` counts to {examples} × {batch_size}, beyond 32 "
                "bits. Use `drop_last=True` or a smaller batch."
            )
        self.arrays = jax.tree.map(jnp.asarray, arrays)
        self.order = Order(examples, batch_size, seed, drop_last, transform)

    @property
    def batch_size(self) -> int:
        """Examples a step."""
        return self.order.batch_size

    @property
    def steps_per_epoch(self) -> float:
        """Steps in which every example is seen once."""
        return self.order.steps_per_epoch

    def batch(self, arrays: PyTree, step: jax.Array | int) -> PyTree:
        """The batch at `step`: a pure function of `feed.arrays` (under `jit`, an argument)."""
        return self.order.batch(arrays, jnp.asarray(step))

    def state(self, step: int) -> dict[str, Any]:
        """Where the feed stands before `step`, as a checkpoint keeps it."""
        epoch, position = self.order.locate(int(step))
        kept = {"step": int(step), "epoch": epoch, "position": position}
        fields = ("seed", "batch_size", "examples", "drop_last")
        return kept | {name: getattr(self.order, name) for name in fields}


def _examples(arrays: PyTree) -> int:
    leaves = jax.tree_util.tree_leaves_with_path(arrays)
    counts = {
        jax.tree_util.keystr(path, simple=True, separator="/"): jnp.shape(leaf)[:1]
        for path, leaf in leaves
    }
    if len(set(counts.values())) != 1 or () in counts.values():
        rows = {path: count[0] if count else "a scalar" for path, count in counts.items()}
        raise ValueError(
            "`Feed(arrays, ...)` expects arrays that share their leading axis, one row an example; "
            f"got {rows}."
        )
    return next(iter(counts.values()))[0]


def _shuffled(position: jax.Array, keys: list[jax.Array], examples: int) -> jax.Array:
    """Where a permutation of `range(examples)` sends each position."""

    # The cipher permutes a domain barely larger than wanted; whoever lands outside goes on walking.
    def walk(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        index, walking = carry
        index = jnp.where(walking, _permuted(index, keys, examples), index)
        return index, index >= examples

    begin = (position, jnp.ones(position.shape, bool))
    index, _ = jax.lax.while_loop(lambda carry: jnp.any(carry[1]), walk, begin)
    return index.astype(jnp.int32)


def _permuted(position: jax.Array, keys: list[jax.Array], examples: int) -> jax.Array:
    """One application of the cipher to `range(rows * columns)`, which covers `range(examples)`."""
    rows = max(math.isqrt(examples - 1) + 1, 2) if examples > 1 else 2
    columns = -(-examples // rows)
    row, column = position // columns, position % columns
    for turn, key in enumerate(keys):
        if turn % 2 == 0:
            row = (row + _mixed(column, key) % rows) % rows
        else:
            column = (column + _mixed(row, key) % columns) % columns
    return row * columns + column


def _mixed(value: jax.Array, key: jax.Array) -> jax.Array:
    """A 32-bit hash of `value`, another one for each key."""
    # Two multiply-and-shift rounds with Chris Wellons' constants (hash-prospector, public domain).
    value = value * jnp.uint32(0x9E3779B9) + key
    value = (value ^ (value >> 16)) * jnp.uint32(0x7FEB352D)
    value = (value ^ (value >> 15)) * jnp.uint32(0x846CA68B)
    return value ^ (value >> 16)
