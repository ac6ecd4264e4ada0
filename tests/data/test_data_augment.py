"""Augmentation on every platform and dtype, and streams from files."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from jopt import data


def images(dtype=np.float32):
    """Eight images without zeros, every pixel different."""
    return (1 + np.arange(8 * 5 * 6 * 2)).reshape(8, 5, 6, 2).astype(dtype)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32, jnp.bfloat16])
def test_shift_by_nothing_is_nothing(key, dtype):
    x = images(dtype)
    y = data.random_shift(x, key, 0)
    assert y.dtype == x.dtype
    np.testing.assert_array_equal(y, x)


def test_augmentation_lowers_everywhere_and_maps(key):
    def augment(x, key):
        return data.random_flip(data.random_shift(x, key, 2), key)

    x = images()
    exported = export.export(jax.jit(augment), platforms=("cpu", "cuda", "tpu"))(x, key)
    expected = augment(x, key)
    np.testing.assert_array_equal(exported.call(x, key), expected)
    keys = jnp.stack([key, jax.random.key(1)])
    both = jax.vmap(augment, (None, 0))(x, keys)
    np.testing.assert_array_equal(both[0], expected)
    assert not np.array_equal(both[0], both[1])


def test_only_the_rows_of_the_batch_are_read_from_a_file(tmp_path):
    pytest.importorskip("grain")
    path = tmp_path / "images.npy"
    np.save(path, np.arange(40).reshape(20, 2))
    mapped = np.load(path, mmap_mode="r")
    batch = data.Stream({"x": mapped}, 4, seed=0)[0]["x"]
    assert type(batch) is np.ndarray and not isinstance(batch, np.memmap)
    np.testing.assert_array_equal(batch[:, 1], batch[:, 0] + 1)
