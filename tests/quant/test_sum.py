"""An array added to a quantized weight inside a lifted function: the integers stay integers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from jopt import quant
from jopt.trace import explain, lift

RNG = np.random.default_rng(0)
X, W = (jnp.asarray(RNG.normal(size=shape), jnp.float32) for shape in ((4, 6), (6, 8)))
DOWN, UP = (jnp.asarray(RNG.normal(size=shape), jnp.float32) for shape in ((6, 2), (2, 8)))
PARAMS = {"w": W, "down": DOWN, "up": UP}
CODED = PARAMS | {"w": quant.quantize(W, quant.Spec(quant.Int(8), quant.Int(8)))}
WEIGHTS = PARAMS | {"w": quant.quantize(W, quant.Int(8))}


def merged(p, x):
    return x @ (p["w"] + p["down"] @ p["up"])


def merged_twice(p, x):
    return x @ (p["down"] @ p["up"] + (p["w"] + 1.0 * p["down"] @ p["up"]))


def seen_differently(p, x):
    kernel = (p["w"] + p["down"] @ p["up"]).reshape(6, 2, 4)
    return jnp.einsum("bi,ihd->bhd", x, kernel[:, :, :3]) @ (2.0 * jnp.ones((3, 1)))


def convolved(p, x):
    kernel = (p["w"] + p["down"] @ p["up"]).reshape(2, 3, 1, 8)
    image = jnp.broadcast_to(x[:, :, None, None], (4, 6, 5, 1))
    numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(image, kernel, (1, 1), "SAME", dimension_numbers=numbers)


def fused(p, x):
    kernel = jnp.concatenate([p["w"] + p["down"] @ p["up"], p["w"] - 1.0 * p["down"] @ p["up"]], 1)
    first, second = jnp.split(x @ kernel, 2, axis=1)
    return first * second


def fused_with_a_plain_one(p, x):
    kernel = jnp.concatenate([p["w"], p["w"] + p["down"] @ p["up"]], axis=1)
    return x @ kernel


def taken_apart(p, x):
    first, second = jnp.split(p["w"] + p["down"] @ p["up"], 2, axis=1)
    return jnp.concatenate([x @ first, x @ second], axis=1)


def stacked(p, x):
    kernels = jnp.stack([p["w"] + p["down"] @ p["up"], p["w"]])
    return jnp.einsum("bi,kio->kbo", x, kernels)


FUNCTIONS = [merged, merged_twice, seen_differently, convolved]
TOGETHER = [(fused, 1), (fused_with_a_plain_one, 1), (taken_apart, 2), (stacked, 1)]


@pytest.mark.parametrize("function", [*FUNCTIONS, *(function for function, _ in TOGETHER)])
def test_equals_the_sum_of_the_dequantized_weight(function):
    expected = function(WEIGHTS | {"w": WEIGHTS["w"].materialise()}, X)
    np.testing.assert_allclose(jax.jit(lift(function))(WEIGHTS, X), expected, 1e-4, 1e-4)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_the_product_is_one_of_integers_and_close(function):
    assert not any(met.dense for met in explain(function, CODED, X))
    found = [met.how for met in explain(function, CODED, X)]
    assert found.count("a product of integers") == 1
    expected = function(PARAMS, X)
    error = jnp.abs(jax.jit(lift(function))(CODED, X) - expected).max()
    assert 0 < error < 0.02 * jnp.abs(expected).max()


@pytest.mark.parametrize(("function", "products"), TOGETHER)
def test_sums_side_by_side_and_apart_stay_integers(function, products):
    found = explain(function, CODED, X)
    assert not any(met.dense for met in found)
    assert [met.how for met in found].count("a product of integers") == products
    expected = function(PARAMS, X)
    error = jnp.abs(jax.jit(lift(function))(CODED, X) - expected).max()
    assert 0 < error < 0.04 * jnp.abs(expected).max()


def test_rows_of_a_sum_are_rows_of_either():
    def rows(p, places):
        return (p["w"] + p["down"] @ p["up"])[places]

    places = jnp.array([5, 0, 5])
    dense = WEIGHTS | {"w": WEIGHTS["w"].materialise()}
    np.testing.assert_allclose(lift(rows)(WEIGHTS, places), rows(dense, places), 1e-6, 1e-6)
    assert not any(met.dense for met in explain(rows, WEIGHTS, places))


def test_adapters_over_integers_have_the_derivatives_of_the_dense_sum():
    adapters = {"down": DOWN, "up": UP}

    def loss(adapters, w):
        return jnp.sum(lift(merged)({"w": w, **adapters}, X) ** 2)

    ours = jax.jit(jax.grad(loss))(adapters, WEIGHTS["w"])
    theirs = jax.grad(loss)(adapters, WEIGHTS["w"].materialise())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-3, 1e-3), ours, theirs)


def test_under_vmap_and_exported():
    batches = jnp.stack([X, 2 * X])
    mapped = jax.vmap(lift(merged), (None, 0))(CODED, batches)
    alone = jnp.stack([lift(merged)(CODED, x) for x in batches])
    np.testing.assert_allclose(mapped, alone, 0.05, 0.05)  # one dynamic range for both under vmap
    whole = export.export(jax.jit(lift(merged)), platforms=("cpu", "cuda", "tpu"))(WEIGHTS, X)
    assert whole.platforms == ("cpu", "cuda", "tpu")


def test_a_bias_that_meets_activations_is_no_weight():
    bias = quant.quantize(jnp.ones((1, 8)), [("", quant.Int(8, granularity="tensor"))])
    with pytest.raises(ValueError, match="for `add` cannot serve these operands"):
        lift(lambda b, x: jax.lax.add(x @ W, jnp.broadcast_to(b, (1, 8))))(bias, X)


def test_scalars_and_differences():
    def function(p, x):
        return x @ ((p["w"] - p["w2"] + 1.0) - 2.0 * p["w2"])

    params = {"w": WEIGHTS["w"], "w2": W}
    expected = function({"w": WEIGHTS["w"].materialise(), "w2": W}, X)
    np.testing.assert_allclose(jax.jit(lift(function))(params, X), expected, 1e-4, 1e-4)


def test_what_is_not_linear_is_dense():
    with pytest.raises(ValueError, match="`tanh` has no rule for `Sum`"):
        lift(lambda p, x: x @ jnp.tanh(p["w"] + 1.0 * p["w2"]))({**WEIGHTS, "w2": W}, X)
