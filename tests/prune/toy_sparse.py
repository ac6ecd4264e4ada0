"""Parameters of every kind of container, and a training loop that watches what it runs."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jopt import prune, schedules

RAMP = schedules.cubic_sparsity(0.75, begin=0, end=4)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scaled:
    """A typed leaf that trains, with an array beside its weight."""

    weight: jax.Array
    range: jax.Array | None

    def materialise(self):
        return self.weight

    def with_weight(self, weight):
        return dataclasses.replace(self, weight=weight)


class Pair(NamedTuple):
    first: jax.Array
    second: jax.Array


def random_params(seed=0, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(seed), 3)
    draw = lambda key, *shape: jax.random.normal(key, shape).astype(dtype)  # noqa: E731
    return {
        "a": {"kernel": draw(keys[0], 16, 24), "bias": jnp.ones(24, dtype)},
        "b": Pair(draw(keys[1], 24, 10), jnp.ones(10, dtype)),
        "c": [Scaled(draw(keys[2], 3, 7), jnp.ones(2, dtype)), None],
    }


def weights_of(tree):
    return [tree["a"]["kernel"], tree["b"].first, tree["c"][0].weight]


TOTAL = 16 * 24 + 24 * 10 + 3 * 7


def train(tx, params, steps=7, grads=lambda p: jax.tree.map(lambda x: x - 1, p), state=None):
    """Trains under `jit`; checks that nothing is traced twice and that the state keeps its form."""
    traces = []

    @jax.jit
    def step(params, state):
        traces.append(0)
        updates, state = tx.update(grads(params), state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params) if state is None else state
    form = jax.tree.map(lambda x: (x.shape, x.dtype), (params, state))
    for _ in range(steps):
        params, state = step(params, state)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), (params, state)) == form
    assert len(traces) == 1
    return params, state


def check_zeros(params, state, sparsity=0.75):
    """Weights are zero where the masks say, and as many as asked for."""
    masks = prune.masks_of(state)
    pruned = 0
    for weight, mask in zip(weights_of(params), [masks["a"]["kernel"], masks["b"].first,
                                                 masks["c"][0]], strict=True):  # fmt: skip
        mask = np.broadcast_to(mask, weight.shape)
        np.testing.assert_array_equal(np.asarray(weight)[~mask], 0)
        pruned += np.sum(~mask)
    assert pruned == round(sparsity * TOTAL)
    assert np.all(np.asarray(params["a"]["bias"]) != 0)
    return masks
