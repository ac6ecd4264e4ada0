"""A small network with batch norm and dropout, its data, and a counter of compilations."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jopt import train


def data(examples=64, features=5, classes=3, seed=0):
    """Random inputs and labels, as host arrays."""
    rng = np.random.default_rng(seed)
    return {
        "x": rng.standard_normal((examples, features)).astype(np.float32),
        "y": rng.integers(0, classes, examples).astype(np.int32),
    }


def params(features=5, hidden=8, classes=3, seed=1):
    """Weights of a two-layer network."""
    rng = np.random.default_rng(seed)
    return {
        "first": {"kernel": rng.standard_normal((features, hidden)).astype(np.float32) * 0.5},
        "last": {
            "kernel": rng.standard_normal((hidden, classes)).astype(np.float32) * 0.5,
            "bias": np.zeros(classes, np.float32),
        },
    }


def collections(hidden=8):
    """Running statistics of the batch norm, and a count of batches."""
    return {
        "mean": jnp.zeros(hidden),
        "var": jnp.ones(hidden),
        "batches": jnp.zeros((), jnp.int32),
    }


def logits(params, hidden):
    """The last layer."""
    return hidden @ params["last"]["kernel"] + params["last"]["bias"][None]


def cross_entropy(logits, labels):
    """Mean over the batch."""
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))


def plain(params, batch):
    """No state, no randomness."""
    hidden = jnp.tanh(batch["x"] @ params["first"]["kernel"])
    return cross_entropy(logits(params, hidden), batch["y"])


def full(axis=None, dropout=True):
    """A loss with batch norm, whose statistics run over `axis` too, and dropout."""

    def loss(params, batch, *, collections, key):
        hidden = batch["x"] @ params["first"]["kernel"]
        mean, square = jnp.mean(hidden, 0), jnp.mean(hidden**2, 0)
        if axis is not None:
            mean, square = jax.lax.pmean((mean, square), axis)
        var = square - mean**2
        hidden = jnp.tanh((hidden - mean[None]) / jnp.sqrt(var + 1e-3)[None])
        if dropout:
            hidden *= jax.random.bernoulli(key, 0.5, hidden.shape).astype(jnp.float32) * 2
        out = logits(params, hidden)
        accuracy = jnp.mean((jnp.argmax(out, -1) == batch["y"]).astype(jnp.float32))
        new = {
            "mean": 0.9 * collections["mean"] + 0.1 * mean,
            "var": 0.9 * collections["var"] + 0.1 * var,
            "batches": collections["batches"] + 1,
        }
        aux = train.Aux(collections=new, metrics={"accuracy": accuracy})
        return cross_entropy(out, batch["y"]), aux

    return loss


def batch(examples=16, seed=0):
    """One batch."""
    return data(examples, seed=seed)


def same(first, second):
    """Whether two trees have the same types and the same bits."""
    left, right = jax.tree.leaves(first), jax.tree.leaves(second)
    assert jax.tree.structure(first) == jax.tree.structure(second)
    return all(x.dtype == y.dtype and bits(x) == bits(y) for x, y in zip(left, right, strict=True))


def bits(x):
    """The bytes of an array or key."""
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    return np.asarray(x).tobytes()


def close(first, second, tolerance=2e-6):
    """Asserts that two trees of numbers agree."""
    for x, y in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_allclose(np.asarray(x), np.asarray(y), rtol=tolerance, atol=tolerance)


@contextlib.contextmanager
def compilations():
    """Yields a list that gains the name of each function that XLA compiles."""
    seen = []

    def note(event, _seconds, **about):
        if event.endswith("backend_compile_duration"):
            seen.append(about.get("fun_name"))

    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        yield seen
    finally:
        jax.monitoring.unregister_event_duration_listener(note)
