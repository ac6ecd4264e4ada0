"""Augmentation inside the step, and batches from the host."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jopt import data


def test_random_shift_moves_whole_images_and_fills_with_zeros(key):
    images = jnp.arange(1, 2 * 6 * 5 * 2 + 1, dtype=jnp.float32).reshape(2, 6, 5, 2)
    shifted = np.asarray(jax.jit(data.random_shift, static_argnums=2)(images, key, 2))
    padded = np.pad(np.asarray(images), ((0, 0), (2, 2), (2, 2), (0, 0)))
    for image, source in zip(shifted, padded, strict=True):
        windows = [source[i : i + 6, j : j + 5] for i in range(5) for j in range(5)]
        assert sum(np.array_equal(image, window) for window in windows) == 1


def test_random_shift_draws_every_shift(key):
    image = jnp.zeros((1, 3, 3, 1)).at[0, 1, 1, 0].set(1.0)
    shifted = data.random_shift(jnp.repeat(image, 400, axis=0), key, 1)
    counts = np.asarray(shifted.sum(0))[..., 0]
    assert counts.sum() == 400 and counts.min() > 20  # 9 places, about 44 each


def test_random_flip_mirrors_about_half(key):
    image = jnp.arange(12.0).reshape(1, 2, 3, 2)
    flipped = np.asarray(data.random_flip(jnp.repeat(image, 400, axis=0), key))
    same = (flipped == np.asarray(image)).all((1, 2, 3))
    mirrored = (flipped == np.asarray(image)[:, :, ::-1]).all((1, 2, 3))
    assert (same ^ mirrored).all() and 150 < mirrored.sum() < 250


def test_augmentation_is_a_function_of_the_key(key):
    images = jax.random.normal(key, (8, 4, 4, 1))
    one, same = (data.random_shift(images, jax.random.key(3), 1) for _ in range(2))
    np.testing.assert_array_equal(one, same)
    assert not np.array_equal(one, data.random_shift(images, jax.random.key(4), 1))


def test_stream_sees_every_example_once_an_epoch_in_new_orders():
    pytest.importorskip("grain")
    arrays = {"x": np.arange(24), "y": np.arange(24) * 2}
    stream = data.Stream(arrays, 4, seed=1)
    epochs = [[stream[step] for step in range(6 * e, 6 * e + 6)] for e in range(2)]
    orders = [np.concatenate([batch["x"] for batch in epoch]) for epoch in epochs]
    for order in orders:
        np.testing.assert_array_equal(np.sort(order), np.arange(24))
    assert not np.array_equal(*orders)
    assert all((batch["y"] == 2 * batch["x"]).all() for epoch in epochs for batch in epoch)


def test_stream_is_a_function_of_seed_and_step():
    pytest.importorskip("grain")
    arrays = {"x": np.arange(50)}
    late = data.Stream(arrays, 8, seed=5)[17]["x"]  # the third epoch, nothing read before
    early = data.Stream(arrays, 8, seed=5)
    for step in range(17):
        early[step]
    np.testing.assert_array_equal(early[17]["x"], late)
    assert not np.array_equal(data.Stream(arrays, 8, seed=6)[17]["x"], late)


def test_stream_mistakes():
    pytest.importorskip("grain")
    with pytest.raises(ValueError, match=r"one length; got {'x': 3, 'y': 4}"):
        data.Stream({"x": np.zeros(3), "y": np.zeros(4)}, 2, seed=0)
    with pytest.raises(ValueError, match=r"batch_size=5.* expects 1 to 3"):
        data.Stream({"x": np.zeros(3)}, 5, seed=0)
