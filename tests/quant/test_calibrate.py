"""Static ranges: what is measured where, what the report says, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quant_reference import int8_products

from jopt.quant import FakeQuant, Int, QArray, Range, Spec, calibrate, qat, quantize
from jopt.trace import lift

W8A8 = Spec(Int(8), Int(8), static=True)
AFFINE = Spec(Int(8), Int(8, symmetric=False), static=True)


def apply(params, x):
    x = jax.nn.relu(x @ params["a"]["kernel"] + params["a"]["bias"][None])
    return x @ params["b"]["kernel"]


def case(seed=0):
    keys = jax.random.split(jax.random.key(seed), 4)
    params = {
        "a": {"kernel": jax.random.normal(keys[0], (8, 16)), "bias": jnp.ones(16)},
        "b": {"kernel": jax.random.normal(keys[1], (16, 4))},
    }
    batches = [(jax.random.normal(keys[2], (5, 8)),), (3 * jax.random.normal(keys[3], (7, 8)),)]
    return params, batches


def test_ranges_are_those_of_all_batches():
    params, batches = case()
    found, report = calibrate(apply, params, batches, [("**/kernel", AFFINE)])
    inputs = np.concatenate([np.asarray(x) for (x,) in batches])
    hidden = np.maximum(inputs @ np.asarray(params["a"]["kernel"]) + 1, 0)
    for leaf, seen in ((found["a"]["kernel"], inputs), (found["b"]["kernel"], hidden)):
        assert isinstance(leaf, QArray) and leaf.range.low.shape == (1, 1)
        np.testing.assert_allclose(leaf.range.low, min(seen.min(), 0), rtol=1e-5)
        np.testing.assert_allclose(leaf.range.high, seen.max(), rtol=1e-5)
    rows = {row.path: row for row in report}
    assert set(rows) == {"a/kernel", "a/bias", "b/kernel"}
    assert rows["a/bias"].reason == "not in the policy" and rows["a/bias"].weight is None
    row = rows["a/kernel"]
    assert (row.weight, row.activation, row.reason) == (Int(8), AFFINE.activation, "")
    assert row.bits == 8 * 128 + 32 * 16 + 2 * 32
    np.testing.assert_array_equal(row.high, found["a"]["kernel"].range.high.reshape(()))
    # On what was measured, the static product is near the float one.
    f = lift(apply)
    assert int8_products(f, found, inputs) == 2
    wanted = apply(params, jnp.asarray(inputs))
    error = np.abs(np.asarray(jax.jit(f)(found, inputs)) - wanted).max()
    assert error < 0.02 * np.abs(wanted).max()


def test_one_compilation_for_each_shape():
    params, _ = case()
    traces = []

    def counted(params, x):
        traces.append(x.shape)
        return apply(params, x)

    batches = [jnp.ones((n, 8)) for n in (5, 5, 7, 5, 7)]
    calibrate(counted, params, batches, [("**/kernel", W8A8)])
    assert traces == [(5, 8), (7, 8)]


def test_leaves_that_train_keep_training():
    params, batches = case()
    trained = qat(params, [("**/kernel", W8A8)])
    found, report = calibrate(apply, trained, batches)
    leaf = found["b"]["kernel"]
    assert isinstance(leaf, FakeQuant)
    # The activation comes from the fake-quantized first layer.
    inputs = np.concatenate([np.asarray(x) for (x,) in batches])
    hidden = np.maximum(inputs @ np.asarray(trained["a"]["kernel"].materialise()) + 1, 0)
    np.testing.assert_allclose(leaf.range.high, hidden.max(), rtol=1e-5)
    assert [row.reason for row in report if row.weight is not None] == ["", ""]
    stored = quantize(found)
    np.testing.assert_array_equal(stored["b"]["kernel"].range.high, leaf.range.high)
    x = batches[0][0]
    one, other = (jax.jit(lift(apply))(p, x) for p in (found, stored))
    np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


def test_quantized_leaves_can_be_filled_in_later():
    params, batches = case()
    stored = quantize(params, [("**/kernel", W8A8)])
    found, _ = calibrate(apply, stored, batches)
    np.testing.assert_array_equal(found["a"]["kernel"].codes, stored["a"]["kernel"].codes)
    assert isinstance(found["a"]["kernel"].range, Range)
    wider, _ = calibrate(apply, found, [tuple(10 * x for x in batch) for batch in batches])
    assert wider["a"]["kernel"].range.high > 5 * found["a"]["kernel"].range.high


def test_stacked_layers_have_their_own_ranges():
    weights = jax.random.normal(jax.random.key(0), (4, 6, 6))

    def scanned(params, x):
        return jax.lax.scan(lambda x, w: (x @ w, None), x, params["w"])[0]

    x = jax.random.normal(jax.random.key(1), (5, 6))
    found, report = calibrate(scanned, {"w": weights}, [(x,)], W8A8)
    high, low, layer = [], [], np.asarray(x)
    for w in np.asarray(weights):
        high.append(max(layer.max(), 0))
        low.append(min(layer.min(), 0))
        layer = layer @ w
    assert found["w"].range.high.shape == (4, 1, 1)
    np.testing.assert_allclose(found["w"].range.high[:, 0, 0], high, rtol=1e-5)
    np.testing.assert_allclose(found["w"].range.low[:, 0, 0], low, rtol=1e-5)
    assert report[0].high.shape == (4,)
    y = jax.jit(lift(scanned))(found, x)
    assert int8_products(lift(scanned), found, x) == 1
    assert np.abs(np.asarray(y) - layer).max() < 0.05 * np.abs(layer).max()
    # The same weights closed over, layer after layer, without scan.
    unrolled = lift(lambda p, x: x @ p["w"][0] @ p["w"][1] @ p["w"][2] @ p["w"][3])
    np.testing.assert_allclose(jax.jit(unrolled)(found, x), y, rtol=1e-3, atol=1e-3)


def test_a_shared_weight_covers_its_uses():
    w = jnp.eye(6)
    found, _ = calibrate(
        lambda p, x: jax.lax.fori_loop(0, 3, lambda i, x: 2 * x @ p["w"], x),
        {"w": w},
        [(jnp.ones((2, 6)),)],
        W8A8,
    )
    np.testing.assert_allclose(found["w"].range.high, [[8.0]])


def test_dynamic_and_weight_only_leaves_are_reported():
    params, batches = case()
    policy = [("a/kernel", Spec(Int(4), Int(8))), ("b/kernel", Int(4))]
    found, report = calibrate(apply, params, iter(batches), policy)
    reasons = {row.path: row.reason for row in report}
    assert reasons == {
        "a/bias": "not in the policy",
        "a/kernel": "dynamic: the range is found in each call",
        "b/kernel": "weight only",
    }
    assert not any(row.undone for row in report)
    assert found["a"]["kernel"].range is None


def test_a_weight_that_no_product_meets_is_reported():
    params, batches = case()
    params["c"] = {"kernel": jnp.ones((8, 8))}
    found, report = calibrate(apply, params, batches, [("**/kernel", W8A8)])
    (row,) = [row for row in report if row.path == "c/kernel"]
    assert "no product met this weight" in row.reason and row.undone == row.reason
    assert found["c"]["kernel"].range is None


def test_several_inputs_and_a_tree():
    def two(params, batch, scale):
        return scale * (batch["x"] @ params["w"])

    found, _ = calibrate(two, {"w": jnp.ones((3, 2))}, [({"x": jnp.ones((1, 3))}, 2.0)], W8A8)
    np.testing.assert_array_equal(found["w"].range.high, [[1.0]])


def test_what_is_refused():
    params, batches = case()
    policy = [("**/kernel", W8A8)]
    with pytest.raises(
        ValueError, match=r'`calibrate\(..., method="optq"\)`: method is one of "rtn", "gptq"'
    ):
        calibrate(apply, params, batches, policy, method="optq")
    with pytest.raises(TypeError, match="expected a name"):
        calibrate(apply, params, batches, policy, method=4)
    with pytest.raises(
        ValueError, match=r"(?s)`calibrate\(.*batch 1 has.*Batches must have one shape"
    ):
        uneven = [(jnp.ones((2, 8)),), (jnp.ones((3, 8)),)]
        calibrate(apply, params, uneven, policy, method="gptq")
    with pytest.raises(ValueError, match="pass a policy"):
        calibrate(apply, params, batches, method="gptq")
    with pytest.raises(ValueError, match=r'observer is one of "minmax"'):
        calibrate(apply, params, batches, policy, observer="kl")
    with pytest.raises(ValueError, match="got no batch"):
        calibrate(apply, params, [], policy)
    with pytest.raises(ValueError, match="and there are none"):
        calibrate(apply, params, batches)
    with pytest.raises(ValueError, match=r"(?s)meets `a/kernel` has a NaN"):
        calibrate(apply, params, [(jnp.full((2, 8), jnp.nan),)], policy)
    many = jnp.ones((512, 8)).at[500, 3].set(jnp.nan)  # more than XLA:CPU's `max` sees it among
    for observer in ("minmax", "moving_average", "percentile", "mse", "entropy", "histogram"):
        with pytest.raises(ValueError, match="has a NaN"):
            calibrate(apply, params, [(many,)], policy, observer=observer)
    with pytest.raises(ValueError, match="matched none of 3 parameters"):
        calibrate(apply, params, batches, [("**/weight", W8A8)])
