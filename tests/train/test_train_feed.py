"""Batches: every example once an epoch, well mixed, and a function of seed and step alone."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jopt import train


def rows(feed, steps):
    take = jax.jit(jax.vmap(lambda step: feed.batch(feed.arrays, step)))
    return np.asarray(take(jnp.asarray(list(steps)))).reshape(-1)


@pytest.mark.parametrize("examples", [1, 2, 3, 4, 7, 16, 101, 50_000])
def test_an_epoch_is_a_permutation(examples):
    feed = train.Feed(jnp.arange(examples), examples, seed=3)
    orders = rows(feed, range(2)).reshape(2, -1)
    for order in orders:
        np.testing.assert_array_equal(np.sort(order), np.arange(examples))
    if examples > 50:
        assert np.mean(orders[0] == orders[1]) < 0.1


def test_batches_of_an_epoch_do_not_overlap():
    feed = train.Feed(jnp.arange(103), 10, seed=0)
    assert feed.steps_per_epoch == 10
    epochs = [set(epoch) for epoch in rows(feed, range(50)).reshape(5, 100)]
    assert all(len(epoch) == 100 for epoch in epochs)
    assert len(set(map(frozenset, epochs))) > 1  # others are left out each time


def test_without_dropping_nothing_is_left_out():
    feed = train.Feed(jnp.arange(10), 4, seed=0, drop_last=False)
    assert feed.steps_per_epoch == 2.5
    seen = rows(feed, range(10)).reshape(4, 10)
    for epoch in seen:
        np.testing.assert_array_equal(np.sort(epoch), np.arange(10))
    assert feed.state(3)["epoch"] == 1 and feed.state(3)["position"] == 2
    # The epoch's order does not depend on where its batches are cut.
    whole = train.Feed(jnp.arange(10), 10, seed=0)
    np.testing.assert_array_equal(seen, rows(whole, range(4)).reshape(4, 10))


def test_late_steps_do_not_overflow():
    feed = train.Feed(jnp.arange(1000), 300, seed=0, drop_last=False)
    step = 10_000_000  # 3e9 examples
    seen = rows(feed, range(step, step + 10)).reshape(3, 1000)
    for epoch in seen:
        np.testing.assert_array_equal(np.sort(epoch), np.arange(1000))
    assert feed.state(step) | {"epoch": 3_000_000, "position": 0} == feed.state(step)


def test_orders_are_well_mixed():
    """Positions, neighbours and pairs are as even as chance makes them (chi-squared, z < 5)."""
    examples, epochs = 12, 2000
    feed = train.Feed(jnp.arange(examples), examples, seed=1)
    take = jax.jit(jax.vmap(lambda step: feed.batch(feed.arrays, step)))
    orders = np.asarray(take(jnp.arange(epochs)))
    assert len({tuple(order) for order in orders}) == epochs

    def z(counts):
        expected = counts.sum() / counts.size
        chi = np.sum((counts - expected) ** 2 / expected)
        return (chi - counts.size) / np.sqrt(2 * counts.size)

    places = np.zeros((examples, examples))
    pairs = np.zeros((examples, examples))
    for order in orders:
        places[np.arange(examples), order] += 1
        pairs[order[:-1], order[1:]] += 1
    assert abs(z(places)) < 5
    assert abs(z(pairs[~np.eye(examples, dtype=bool)])) < 5
    steps = np.diff(orders.astype(int), axis=1) % examples
    assert abs(z(np.bincount(steps.ravel(), minlength=examples)[1:])) < 5


def test_long_orders_have_no_trend_and_epochs_no_relation():
    feed = train.Feed(jnp.arange(5000), 5000, seed=2)
    orders = rows(feed, range(4)).reshape(4, -1).astype(float)
    everything = [np.arange(5000.0), *orders, *(np.roll(order, 1) for order in orders)]
    for a, b in itertools.combinations(everything, 2):
        assert abs(np.corrcoef(a, b)[0, 1]) < 5 / np.sqrt(5000)


def test_seeds_differ_and_repeat():
    feeds = [train.Feed(jnp.arange(100), 100, seed=seed) for seed in (0, 0, 1)]
    first, again, other = (rows(feed, [7]) for feed in feeds)
    np.testing.assert_array_equal(first, again)
    assert np.mean(first == other) < 0.1


def test_the_transform_has_a_key_for_each_step():
    def noisy(batch, key):
        return batch["x"].astype(jnp.float32) + jax.random.uniform(key, (4,))

    arrays = {"x": np.zeros(8, np.uint8)}
    feed = train.Feed(arrays, 4, seed=0, transform=noisy)
    take = jax.jit(feed.batch)
    batches = [take(feed.arrays, step) for step in (0, 1, 0)]
    np.testing.assert_array_equal(batches[0], batches[2])
    assert not np.any(np.asarray(batches[0]) == np.asarray(batches[1]))


def test_trees_and_dtypes_pass_through():
    arrays = {"image": np.arange(12, dtype=np.uint8).reshape(6, 2), "label": np.arange(6)}
    feed = train.Feed(arrays, 3, seed=0)
    batch = feed.batch(feed.arrays, 0)
    assert batch["image"].dtype == jnp.uint8 and batch["image"].shape == (3, 2)
    np.testing.assert_array_equal(batch["image"][:, 0], 2 * np.asarray(batch["label"]))


def test_lowers_everywhere():
    feed = train.Feed(jnp.arange(10), 4, seed=0, drop_last=False)
    exported = jax.export.export(jax.jit(feed.batch), platforms=("cpu", "cuda", "tpu"))
    assert exported(feed.arrays, jnp.int32(3)).platforms == ("cpu", "cuda", "tpu")


def test_errors():
    with pytest.raises(ValueError, match="a batch of 1 to 5 examples"):
        train.Feed(np.zeros(5), 6, seed=0)
    with pytest.raises(ValueError, match=r"share their leading axis.*'a': 5, 'b': 4"):
        train.Feed({"a": np.zeros(5), "b": np.zeros(4)}, 2, seed=0)
    with pytest.raises(ValueError, match=r"share their leading axis.*'b': 'a scalar'"):
        train.Feed({"a": np.zeros(5), "b": np.zeros(())}, 2, seed=0)
    with pytest.raises(ValueError, match="beyond 32 bits"):
        train.Feed(np.zeros(70_000), 65_000, seed=0, drop_last=False)
