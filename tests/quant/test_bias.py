"""Bias correction against its definition: the mean error of each output channel, taken off."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen

from jopt import nn
from jopt.quant import Int, correct_biases, qat, quantize
from jopt.trace import lift

W3 = Int(3)


def mean_error(apply, params, quantized, x):
    """Of the outputs, over all but channels."""
    error = np.asarray(lift(apply, allow_dense=True)(quantized, x) - apply(params, x), np.float64)
    return error.mean(tuple(range(error.ndim - 1)))


def mlp(params, x):
    x = jax.nn.relu(x @ params["w"] + params["b"][None])
    return x @ params["v"] + params["c"][None]


def mlp_case():
    rng = np.random.default_rng(0)
    shapes = {"w": (8, 16), "b": (16,), "v": (16, 4), "c": (4,)}
    params = {k: jnp.asarray(rng.normal(size=s), jnp.float32) for k, s in shapes.items()}
    batches = [jnp.asarray(rng.normal(size=(n, 8)) + 1, jnp.float32) for n in (20, 30)]
    return params, batches


@pytest.mark.parametrize("leaves", [quantize, qat])
def test_the_definition(leaves):
    params, batches = mlp_case()
    quantized = leaves(params, [("w", W3), ("v", W3)])
    found, report = correct_biases(mlp, params, quantized, batches)
    x = np.concatenate(batches).astype(np.float64)
    hidden = np.maximum(x @ np.asarray(params["w"]) + np.asarray(params["b"]), 0)
    for (weight, bias, seen), row in zip(
        [("w", "b", x), ("v", "c", hidden)], sorted(report, key=lambda r: r.bias), strict=True
    ):
        error = np.asarray(quantized[weight].materialise(), np.float64) - params[weight]
        wanted = np.asarray(params[bias]) - seen.mean(0) @ error
        np.testing.assert_allclose(found[bias], wanted, rtol=1e-4, atol=1e-5)
        assert (row.path, row.bias, row.reason) == (weight, bias, "")
        np.testing.assert_allclose(row.shift, -seen.mean(0) @ error, rtol=1e-3, atol=1e-5)
    assert found["w"] is quantized["w"]


def test_the_last_layer_has_no_mean_error_left():
    params, batches = mlp_case()
    quantized = quantize(params, [("v", W3)])
    found, _ = correct_biases(mlp, params, quantized, batches)
    x = jnp.concatenate(batches)
    before = mean_error(mlp, params, quantized, x)
    after = mean_error(mlp, params, found, x)
    assert np.abs(before).max() > 0.05
    np.testing.assert_allclose(after, 0, atol=1e-4)


class Net(linen.Module):
    norm: bool = False

    @linen.compact
    def __call__(self, x):
        x = linen.Conv(6, (3, 3), use_bias=not self.norm)(x)
        return linen.BatchNorm(use_running_average=True)(x) if self.norm else x


@pytest.mark.parametrize("norm", [False, True])
def test_convolutions_with_their_padding_and_norms(norm):
    net = Net(norm)
    x = jax.random.uniform(jax.random.key(0), (4, 6, 6, 3))
    variables = net.init(jax.random.key(1), x)
    if norm:
        rng = np.random.default_rng(0)
        variables["params"]["BatchNorm_0"]["scale"] = jnp.asarray(rng.normal(size=6), jnp.float32)
    quantized = quantize(variables, [("**/kernel", W3)])
    found, (row,) = correct_biases(net.apply, variables, quantized, [x])
    assert row.reason == "" and row.bias.endswith("/bias") and ("BatchNorm" in row.bias) == norm
    before = mean_error(net.apply, variables, quantized, x)
    assert np.abs(before).max() > 0.01
    np.testing.assert_allclose(mean_error(net.apply, variables, found, x), 0, atol=1e-4)


def test_a_bias_behind_a_pool_and_heads():
    simple = nn.SimpleCNN(widths=(4, 6), hidden=8)
    x = jax.random.uniform(jax.random.key(0), (2, 8, 8, 3))
    variables = simple.init(jax.random.key(1), x)
    quantized = quantize(variables, [("**/kernel", W3)])
    _, report = correct_biases(simple.apply, variables, quantized, [x])
    assert [row.reason for row in report] == [""] * 4
    assert {row.bias for row in report} == {row.path.replace("kernel", "bias") for row in report}

    heads = linen.DenseGeneral((2, 3))
    x = jax.random.uniform(jax.random.key(0), (5, 7))
    variables = heads.init(jax.random.key(1), x)
    quantized = quantize(variables, [("**/kernel", W3)])
    found, (row,) = correct_biases(heads.apply, variables, quantized, [x])
    assert row.shift.shape == (2, 3)
    np.testing.assert_allclose(mean_error(heads.apply, variables, found, x), 0, atol=1e-5)


def test_stacked_layers():
    rng = np.random.default_rng(0)
    params = {
        "w": jnp.asarray(rng.normal(size=(3, 6, 6)), jnp.float32),
        "b": jnp.zeros((3, 6)),
    }

    def scanned(params, x):
        def block(x, p):
            return jnp.tanh(x @ p["w"] + p["b"][None]), None

        return jax.lax.scan(block, x, params)[0]

    x = jnp.asarray(rng.uniform(size=(9, 6)), jnp.float32)
    quantized = quantize(params, [("w", W3)])
    found, (row,) = correct_biases(scanned, params, quantized, [x])
    assert row.shift.shape == (3, 6)
    error = np.asarray(quantized["w"].materialise() - params["w"], np.float64)
    layer = np.asarray(x, np.float64)
    for i in range(3):
        np.testing.assert_allclose(found["b"][i], -layer.mean(0) @ error[i], rtol=1e-3, atol=1e-5)
        layer = np.tanh(layer @ np.asarray(params["w"][i]))


def test_equinox():
    eqx = pytest.importorskip("equinox")
    linear = eqx.nn.Linear(8, 5, key=jax.random.key(0))
    arrays, rest = eqx.partition(linear, eqx.is_array)

    def apply(arrays, x):
        return jax.vmap(eqx.combine(arrays, rest))(x)

    x = jax.random.uniform(jax.random.key(1), (9, 8))
    quantized = quantize(arrays, [("weight", W3)])
    found, (row,) = correct_biases(apply, arrays, quantized, [x])
    assert row.bias == "bias"
    np.testing.assert_allclose(mean_error(apply, arrays, found, x), 0, atol=1e-5)


def test_what_has_no_bias_says_so_and_what_is_refused():
    params, batches = mlp_case()
    quantized = quantize(params, [("w", W3)])
    x = jnp.ones((2, 8))
    for apply, reason in (
        (lambda p, x: x @ p["w"], "no bias of its own is added to its product"),
        (lambda p, x: x @ p["w"] + p["b"][None] * p["b"].sum(), "no bias of its own"),
        (lambda p, x: x @ p["w"] + p["w"].sum(), "the weight is used elsewhere as well"),
        (lambda p, x: jnp.tanh(x @ p["w"]) + p["b"][None], "no bias of its own"),
        (lambda p, x: x * p["b"][None, :8], "no product of its own was found"),
    ):
        found, (row,) = correct_biases(apply, params, quantized, [x])
        assert reason in row.reason and row.bias is None and row.shift is None
        np.testing.assert_array_equal(found["b"], params["b"])
    with pytest.raises(ValueError, match="got no batch"):
        correct_biases(mlp, params, quantized, [])
    with pytest.raises(ValueError, match="needs the weights as arrays"):
        correct_biases(mlp, params, params, batches)
    with pytest.raises(ValueError, match="must be `params` with"):
        correct_biases(mlp, params, {"w": quantized["w"]}, batches)
    with pytest.raises(ValueError, match="mean error of `w` has a NaN"):
        correct_biases(mlp, params, quantized, [jnp.full((2, 8), jnp.nan)])
