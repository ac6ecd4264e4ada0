"""What rounding each weight alone costs: measured, or by the second order of the divergence."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jopt import trees

PyTree = Any
Loss = Callable[[PyTree, Any], jax.Array]


class Worse:
    """How much worse the function gets with some weights rounded."""

    def __init__(
        self, apply: Callable[..., Any], params: PyTree, paths: Sequence[str], loss: Loss | None
    ) -> None:
        self.params, self.paths = params, tuple(paths)

        def value(rounded: dict[str, jax.Array], batch: Any) -> jax.Array:
            changed = trees.map_with_path(lambda path, leaf: rounded.get(path, leaf), params)
            if loss is not None:
                return loss(changed, batch)
            inputs = batch if isinstance(batch, tuple) else (batch,)
            return _divergence(apply(params, *inputs), apply(changed, *inputs))

        def each(rounded: dict[str, jax.Array], batch: Any) -> jax.Array:
            """With each weight alone: `[weights]`. One body, whatever their number."""
            old = {path: leaf for path, leaf in trees.items(params) if path in rounded}

            def alone(number: jax.Array) -> jax.Array:
                picked = {
                    path: jnp.where(number == j, rounded[path], old[path])
                    for j, path in enumerate(self.paths)
                }
                return value(picked, batch)

            return jax.lax.map(alone, jnp.arange(-1, len(self.paths)))  # the first: none of them

        self._value, self._each = jax.jit(value), jax.jit(each)

    def each(self, rounded: Sequence[dict[str, jax.Array]], batches: Sequence[Any]) -> np.ndarray:
        """`[weights, formats]`, the mean over batches."""
        found = [
            np.mean([np.asarray(self._each(values, batch), np.float64) for batch in batches], 0)
            for values in rounded
        ]
        return np.stack([column[1:] - column[0] for column in found], axis=1)

    def together(self, rounded: dict[str, jax.Array], batches: Sequence[Any]) -> float:
        """All at once, against none."""
        gained = [
            float(self._value(rounded, batch)) - float(self._value({}, batch)) for batch in batches
        ]
        return float(np.mean(gained))


def _divergence(old: jax.Array, new: jax.Array) -> jax.Array:
    """KL(old ‖ new) of the distributions that logits stand for, averaged over examples."""
    before, after = (jax.nn.log_softmax(x.astype(jnp.float32)) for x in (old, new))
    return jnp.mean(jnp.sum(jnp.exp(before) * (before - after), -1))


def fisher(
    apply: Callable[..., Any],
    params: PyTree,
    paths: Sequence[str],
    rounded: Sequence[dict[str, jax.Array]],
    batches: Sequence[Any],
    loss: Loss | None,
    key: jax.Array | None,
) -> np.ndarray:
    """½ mean (g · Δ)² over examples, of each weight in each format: `[weights, formats]`."""
    old = {path: leaf for path, leaf in trees.items(params) if path in rounded[0]}
    deltas = [{path: values[path] - old[path] for path in paths} for values in rounded]

    def example_loss(weights: dict[str, jax.Array], example: Any, key: jax.Array) -> jax.Array:
        changed = trees.map_with_path(lambda path, leaf: weights.get(path, leaf), params)
        one = jax.tree.map(lambda x: x[None], example)
        if loss is not None:
            return loss(changed, one)
        logits = apply(changed, *(one if isinstance(one, tuple) else (one,)))
        logits = logits.astype(jnp.float32).reshape(-1, logits.shape[-1])
        labels = jax.random.categorical(key, jax.lax.stop_gradient(logits))
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1)
        # Labels of one example are drawn apart, so the variance of their sum is the sum of theirs.
        return -jnp.sum(chosen) / math.sqrt(len(logits))

    @jax.jit
    def squares(batch: Any, key: jax.Array) -> jax.Array:
        def one(given: tuple[Any, jax.Array]) -> jax.Array:
            gradient = jax.grad(example_loss)(old, *given)
            return jnp.stack(
                [
                    jnp.stack([jnp.vdot(gradient[path], delta[path]) for delta in deltas])
                    for path in paths
                ]
            )

        count = len(jax.tree.leaves(batch)[0])
        return jnp.mean(jax.lax.map(one, (batch, jax.random.split(key, count))) ** 2, 0)

    key = jax.random.key(0) if key is None else key
    found = [squares(batch, jax.random.fold_in(key, b)) for b, batch in enumerate(batches)]
    return 0.5 * np.mean([np.asarray(square, np.float64) for square in found], 0)
