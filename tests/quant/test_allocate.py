"""Allocation of bits: sensitivities against loops in float64, the choice against all choices."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen

import jopt
from jopt import quant
from jopt.quant import Int
from jopt.quant._allocate import Budget, _knapsack, allocate

RNG = np.random.default_rng(0)
FORMATS = [Int(2), Int(4), Int(8)]


def f32(*shape, scale=1.0):
    return jnp.asarray(RNG.normal(size=shape) * scale / shape[0] ** 0.5, jnp.float32)


PARAMS = {"first": f32(24, 32), "second": f32(32, 32, scale=0.2), "last": f32(32, 5, scale=3.0)}
BATCHES = [f32(12, 24), f32(12, 24)]


def apply(p, x):
    return jnp.tanh(jnp.tanh(x @ p["first"]) @ p["second"]) @ p["last"]


def log_softmax(z):
    z = np.asarray(z, np.float64)
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def divergence(old, new):
    before, after = log_softmax(old), log_softmax(new)
    return np.mean(np.sum(np.exp(before) * (before - after), -1))


def worse(path, format):
    changed = PARAMS | {path: quant.fake_quant(PARAMS[path], format)}
    return np.mean([divergence(apply(PARAMS, x), apply(changed, x)) for x in BATCHES])


def test_measured_sensitivities_are_those_of_each_weight_alone():
    found = allocate(apply, PARAMS, BATCHES, budget=Budget(bits=5), formats=FORMATS)
    assert [row.path for row in found.rows] == ["first", "last", "second"]
    for row in found.rows:
        expected = [worse(row.path, format) for format in FORMATS]
        np.testing.assert_allclose(row.sensitivity, expected, rtol=2e-2, atol=1e-6)


def test_a_loss_of_ones_own_is_measured_as_it_is():
    labels = jnp.asarray(RNG.integers(0, 5, 12))
    batches = [(x, labels) for x in BATCHES]

    def loss(p, batch):
        x, y = batch
        return -jnp.mean(jax.nn.log_softmax(apply(p, x))[jnp.arange(12), y])

    sites = jopt.sites(apply, PARAMS, BATCHES[0])
    found = allocate(
        apply, PARAMS, batches, budget=Budget(bits=8.5), formats=FORMATS, loss=loss, sites=sites
    )
    for row in found.rows:
        for format, value in zip(FORMATS, row.sensitivity, strict=True):
            changed = PARAMS | {row.path: quant.fake_quant(PARAMS[row.path], format)}
            expected = np.mean([loss(changed, b) - loss(PARAMS, b) for b in batches])
            np.testing.assert_allclose(value, expected, atol=2e-6)


def test_fisher_sensitivities_are_the_second_order_of_the_divergence():
    x = [f32(4000, 24)]
    found = allocate(
        apply, PARAMS, x, budget=Budget(bits=5), formats=[Int(3), Int(4)], estimate="fisher"
    )
    exact = allocate(apply, PARAMS, x, budget=Budget(bits=5), formats=[Int(3), Int(4)])
    for one, other in zip(found.rows, exact.rows, strict=True):
        np.testing.assert_allclose(one.sensitivity[0], other.sensitivity[0], rtol=0.15)


@pytest.mark.parametrize("seed", range(5))
def test_the_choice_is_the_best_of_all(seed):
    rng = np.random.default_rng(seed)
    gain, cost = rng.exponential(size=(5, 3)), rng.uniform(1, 9, size=(5, 3))
    limit = float(np.sum(np.median(cost, axis=1)))
    chosen = _knapsack(gain, cost, limit, Budget(bits=1.0))
    every = [
        (sum(gain[j, c] for j, c in enumerate(choice)), choice)
        for choice in itertools.product(range(3), repeat=5)
        if sum(cost[j, c] for j, c in enumerate(choice)) <= limit
    ]
    assert tuple(chosen) == min(every)[1]


def test_the_budget_of_bytes_is_what_size_says():
    sites = jopt.sites(apply, PARAMS, BATCHES[0])
    params = PARAMS | {"bias": jnp.zeros(7)}
    for limit in (900, 1200, 2500):
        found = allocate(
            apply,
            params,
            BATCHES,
            budget=Budget(bytes=limit),
            formats=[*FORMATS, None],
            sites=sites,
        )
        quantized = quant.quantize(params, found.policy, sites=sites)
        assert jopt.size(quantized).bytes <= limit
        np.testing.assert_allclose(found.cost, jopt.size(quantized).bits / 8)


def test_more_bits_are_never_worse_and_mixed_beats_uniform():
    spent = [
        allocate(apply, PARAMS, BATCHES, budget=Budget(bits=b), formats=FORMATS).predicted
        for b in (5, 6, 7, 9)
    ]
    assert spent == sorted(spent, reverse=True)
    found = allocate(apply, PARAMS, BATCHES, budget=Budget(bits=6), formats=FORMATS)
    assert len({format for _, format in found.policy}) > 1  # mixed
    uniform = sum(row.sensitivity[1] for row in found.rows)  # 4 bits, 5.3 with the scales
    assert found.predicted <= uniform
    assert 0 <= found.measured < 3 * found.predicted + 1e-3


def test_operations_and_seconds():
    found = allocate(apply, PARAMS, BATCHES, budget=Budget(operations=1e9), formats=FORMATS)
    assert all(row.chosen == Int(8) for row in found.rows)
    assert found.rows[0].cost[0] == 12 * 24 * 32 * 2 * 16
    timed = allocate(apply, PARAMS, BATCHES, budget=Budget(seconds=10.0), formats=FORMATS)
    assert all(np.all(row.cost > 0) for row in timed.rows) and timed.cost < 10


def test_stacked_layers_of_a_flax_model_and_one_compilation():
    class Layer(linen.Module):
        @linen.compact
        def __call__(self, x, _):
            return x + linen.Dense(8)(jnp.tanh(x)), None

    class Model(linen.Module):
        @linen.compact
        def __call__(self, x):
            scanned = linen.scan(
                Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=3
            )
            x, _ = scanned(name="layers")(x, None)
            return linen.Dense(4, name="head")(x)

    model, x = Model(), f32(5, 8)
    params = model.init(jax.random.key(0), x)
    found = allocate(model.apply, params, [x], budget=Budget(bits=6), formats=FORMATS)
    assert [path for path, _ in found.policy] == [
        "params/head/kernel",
        "params/layers/Dense_0/kernel",
    ]
    assert found.cost <= 6
    quantized = quant.quantize(params, found.policy)
    assert jnp.all(jnp.isfinite(jax.jit(jopt.lift(model.apply))(quantized, x)))


def test_clear_errors():
    with pytest.raises(ValueError, match="smallest formats cost"):
        allocate(apply, PARAMS, BATCHES, budget=Budget(bits=1.0), formats=FORMATS)
    with pytest.raises(ValueError, match="no batch"):
        allocate(apply, PARAMS, [], budget=Budget(bits=4.0), formats=FORMATS)
    with pytest.raises(TypeError, match="sequence of formats"):
        allocate(apply, PARAMS, BATCHES, budget=Budget(bits=4.0), formats=[4])
    with pytest.raises(ValueError, match="one positive limit"):
        Budget()
    with pytest.raises(ValueError, match="one positive limit"):
        Budget(bits=4, bytes=100)
    with pytest.raises(TypeError, match=r"a limit is a number, .* not a `str`"):
        Budget(bits="4")
    with pytest.raises(ValueError, match="not finite"):
        params = PARAMS | {"first": PARAMS["first"].at[0, 0].set(jnp.nan)}
        allocate(apply, params, BATCHES, budget=Budget(bits=8.5), formats=FORMATS)
    with pytest.raises(ValueError, match="no weight"):
        allocate(
            lambda p, x: x + p[None], jnp.ones(24), BATCHES, budget=Budget(bits=8), formats=FORMATS
        )
