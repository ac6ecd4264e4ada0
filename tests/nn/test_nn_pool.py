"""`max_pool`: both lowerings against NumPy, XLA's windows and PyTorch, with ties."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from jopt import nn
from jopt.nn import _pooling

CASES = [
    *[((8, 8), 2), ((7, 9), 2), ((9, 7), 3), ((6, 8), (3, 2)), ((5, 5), (1, 2)), ((5, 5), (2, 1))],
    *[((4, 4), 4), ((13, 12), 12)],
]


def images(size, dtype=np.float32):
    return np.random.default_rng(0).standard_normal((2, *size, 3)).astype(dtype)


def largest(x, window):
    h, w = (window, window) if isinstance(window, int) else window
    y = np.empty((x.shape[0], x.shape[1] // h, x.shape[2] // w, x.shape[3]), x.dtype)
    for i, j in np.ndindex(y.shape[1:3]):
        y[:, i, j] = x[:, i * h : (i + 1) * h, j * w : (j + 1) * w].max((1, 2))
    return y


@pytest.mark.parametrize(("size", "window"), CASES)
def test_max_pool_equals_numpy(size, window):
    x = images(size)
    np.testing.assert_array_equal(
        jax.jit(nn.max_pool, static_argnums=1)(x, window), largest(x, window)
    )


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.int32, jnp.bfloat16])
def test_max_pool_of_other_dtypes(dtype):
    x = jnp.asarray(10 * images((6, 6)), dtype)
    y = nn.max_pool(x)
    assert y.dtype == dtype
    np.testing.assert_array_equal(y, largest(np.asarray(x), 2))
    np.testing.assert_array_equal(_pooling._by_lax(x, window=(2, 2)), y)


@pytest.mark.parametrize(("size", "window"), CASES)
@pytest.mark.parametrize("ties", [False, True])
def test_both_lowerings_have_the_same_derivative(size, window, ties):
    x = np.round(images(size)) if ties else images(size)
    shape = (window, window) if isinstance(window, int) else window
    g = np.random.default_rng(1).standard_normal(largest(x, window).shape).astype(np.float32)

    @jax.jit
    def both(x, g):
        found = []
        for lowering in (_pooling._by_lax, _pooling._by_reshape):
            y, pullback = jax.vjp(functools.partial(lowering, window=shape), x)
            found.append((y, pullback(g)[0]))
        return found

    (by_lax, slope_lax), (ours, slope) = both(x, g)
    np.testing.assert_array_equal(ours, by_lax)
    np.testing.assert_array_equal(slope, slope_lax)


def test_max_pool_equals_pytorch_with_ties():
    torch = pytest.importorskip("torch")
    x = np.round(images((7, 8)))
    theirs = torch.tensor(x.transpose(0, 3, 1, 2).copy(), requires_grad=True)
    weights = np.random.default_rng(1).standard_normal((2, 3, 4, 3)).astype(np.float32)
    pooled = torch.nn.functional.max_pool2d(theirs, 2)
    (pooled * torch.tensor(weights.transpose(0, 3, 1, 2).copy())).sum().backward()
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(nn.max_pool(x) * weights)))(x)
    np.testing.assert_array_equal(gradient, theirs.grad.numpy().transpose(0, 2, 3, 1))


def test_max_pool_forward_and_second_derivatives(key):
    x = jax.random.normal(key, (1, 4, 4, 2))
    direction = jnp.ones_like(x)
    pooled, change = jax.jvp(nn.max_pool, (x,), (direction,))
    np.testing.assert_array_equal(change, jnp.ones_like(pooled))

    def loss(x):
        return jnp.sum(nn.max_pool(x) ** 2)

    _, product = jax.jvp(jax.grad(loss), (x,), (direction,))
    np.testing.assert_allclose(product, jnp.where(jax.grad(loss)(x) != 0, 2.0, 0.0))


def test_max_pool_under_vmap_and_exported_with_a_symbolic_batch():
    x = images((6, 6))
    stacked = jax.vmap(nn.max_pool)(np.stack([x, -x]))
    np.testing.assert_array_equal(stacked, [largest(x, 2), largest(-x, 2)])
    (batch,) = export.symbolic_shape("b")
    spec = jax.ShapeDtypeStruct((batch, 6, 6, 3), jnp.float32)
    whole = export.export(jax.jit(nn.max_pool), platforms=("cpu", "cuda", "tpu"))(spec)
    np.testing.assert_array_equal(whole.call(x), largest(x, 2))


@pytest.mark.parametrize(
    ("shape", "window"), [((6, 6, 3), 2), ((1, 3, 3, 1), 4), ((1, 3, 3, 1), 0)]
)
def test_max_pool_says_what_does_not_fit(shape, window):
    with pytest.raises(ValueError, match=rf"`max_pool\(x, {window}\)` expects images"):
        nn.max_pool(jnp.zeros(shape), window)


@pytest.mark.parametrize("window", [(2,), 2.0, "22", (2, 2.0)])
def test_a_window_is_one_integer_or_two(window):
    with pytest.raises(TypeError, match="expects an integer or two as the window"):
        nn.max_pool(jnp.zeros((1, 4, 4, 1)), window)
    np.testing.assert_array_equal(nn.max_pool(jnp.ones((1, 4, 4, 1)), np.int64(2)), 1)
