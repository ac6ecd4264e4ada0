"""Penalties and proximal steps, against float64 NumPy and the conditions of optimality."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jopt import optim, prune


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scaled:
    """A typed leaf that trains."""

    weight: jax.Array
    scale: jax.Array

    def materialise(self):
        return self.weight * self.scale

    def with_weight(self, weight):
        return dataclasses.replace(self, weight=weight)


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def landed(tx, params, updates, steps=1):
    state = tx.init(params)
    for _ in range(steps):
        change, state = jax.jit(tx.update)(updates, state, params)
        params = optax.apply_updates(params, change)
    return params, state


def soft(z, t):
    return np.sign(z) * np.maximum(np.abs(z) - t, 0)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 999), st.floats(0, 3, width=32), st.floats(0, 1, width=32))
def test_proximal_l1(seed, strength, rate):
    weight, update = draw(seed, 5, 7), draw(seed + 1, 5, 7) * 0.1
    found, _ = landed(optim.proximal_l1(strength, rate), weight, update)
    z = np.asarray(weight, np.float64) + np.asarray(update, np.float64)
    expected = soft(z, strength * rate)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    sure = np.abs(np.abs(z) - strength * rate) > 1e-6
    np.testing.assert_array_equal((np.asarray(found) == 0)[sure], (expected == 0)[sure])


@pytest.mark.parametrize("axis", [-1, -2, 0])
def test_proximal_group_lasso(axis):
    weight, update = draw(0, 3, 4, 6), draw(1, 3, 4, 6) * 0.1
    found, _ = landed(optim.proximal_group_lasso(2.5, 0.4, axis=axis), weight, update)
    z = np.moveaxis(np.asarray(weight, np.float64) + np.asarray(update, np.float64), axis, 0)
    expected = []
    for group in z:
        norm, cut = np.linalg.norm(group), 2.5 * 0.4 * np.sqrt(group.size)
        expected.append(group * max(1 - cut / norm, 0))
    expected = np.moveaxis(np.stack(expected), 0, axis)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    np.testing.assert_array_equal(np.asarray(found) == 0, expected == 0)


@pytest.mark.parametrize("size", [1e-25, 1e25])
@pytest.mark.parametrize("strength", [0.0, 0.5])
def test_groups_at_the_ends_of_float32(size, strength):
    weight = jnp.array([[3.0, 0.0], [4.0, 0.0]]) * size
    found, _ = landed(optim.proximal_group_lasso(strength, size), weight, jnp.zeros_like(weight))
    scale = 1 - strength * np.sqrt(2) / 5
    np.testing.assert_allclose(found, np.float64(weight) * scale, rtol=1e-6)


def test_complex_weights():
    weight = jnp.array([[3j], [4j]])
    found, _ = landed(optim.proximal_group_lasso(1.0, 1.0), weight, jnp.zeros_like(weight))
    np.testing.assert_allclose(found, np.asarray(weight) * (1 - np.sqrt(2) / 5), rtol=1e-6)
    found, _ = landed(optim.proximal_l1(3.5, 1.0), weight, jnp.zeros_like(weight))
    np.testing.assert_allclose(found, [[0], [0.5j]], atol=1e-6)
    found, _ = landed(optim.proximal_nuclear_norm(1.0, 1.0), weight, jnp.zeros_like(weight))
    np.testing.assert_allclose(found, np.asarray(weight) * 0.8, rtol=1e-5)


def test_groups_go_together():
    weight = draw(0, 8, 6) * jnp.array([[0.1, 1.0, 0.1, 1.0, 0.1, 2.0]])
    found, _ = landed(optim.proximal_group_lasso(0.5, 1.0), weight, jnp.zeros_like(weight))
    zero = np.all(np.asarray(found) == 0, axis=0)
    np.testing.assert_array_equal(zero, [True, False, True, False, True, False])
    assert np.all(np.asarray(found)[:, ~zero] != 0)


@pytest.mark.parametrize("shape", [(6, 4), (2, 4, 5)])
def test_proximal_nuclear_norm(shape):
    weight, update = draw(0, *shape), draw(1, *shape) * 0.1
    found, _ = landed(optim.proximal_nuclear_norm(2.0, 0.5), weight, update)
    z = np.asarray(weight, np.float64) + np.asarray(update, np.float64)
    left, values, right = np.linalg.svd(z, full_matrices=False)
    expected = (left * np.maximum(values - 1.0, 0)[..., None, :]) @ right
    np.testing.assert_allclose(found, expected, atol=1e-5)
    ranks = np.linalg.matrix_rank(np.asarray(found), tol=1e-4)
    np.testing.assert_array_equal(ranks, (values > 1.0).sum(-1))


def test_decompositions_now_and_then():
    weight, none = draw(0, 6, 4), jnp.zeros((6, 4))
    often, _ = landed(optim.proximal_nuclear_norm(0.3, 0.5), weight, none, steps=4)
    seldom, _ = landed(optim.proximal_nuclear_norm(0.3, 0.5, every=2), weight, none, steps=4)
    np.testing.assert_allclose(seldom, often, atol=1e-5)
    first, _ = landed(optim.proximal_nuclear_norm(0.3, 0.5, every=2), weight, none)
    np.testing.assert_array_equal(first, weight)


@pytest.mark.parametrize("rates", [(1, 1, 1, 0), (0, 0, 0, 1), (0.5, 2, 0.25, 1)])
def test_thresholds_put_off_are_those_of_the_steps_passed(rates):
    rate = lambda t: jnp.asarray(rates, jnp.float32)[t % 4]  # noqa: E731
    weight, none = 10 * jnp.eye(3), jnp.zeros((3, 3))
    for every in (1, 2, 4):
        found, state = landed(optim.proximal_nuclear_norm(0.5, rate, every=every), weight, none, 8)
        np.testing.assert_allclose(found, (10 - sum(rates)) * np.eye(3), atol=1e-5)
        assert every == 1 or float(state.owed) == 0
    tx = optim.proximal_nuclear_norm(0.5, rate, every=4)
    assert float(landed(tx, weight, none, 3)[1].owed) == sum(rates[:3]) / 2


def test_groups_that_are_not_there():
    empty = {"k": jnp.ones((3, 0)), "m": jnp.ones((2, 2))}
    found, _ = landed(
        optim.proximal_group_lasso(0.1, 1.0), empty, jax.tree.map(jnp.zeros_like, empty)
    )
    assert found["k"].shape == (3, 0) and float(found["m"][0, 0]) == pytest.approx(0.9)
    tx = optim.proximal_group_lasso(0.1, 1.0, axis=2, where="m")
    with pytest.raises(ValueError, match=r"`proximal_group_lasso\(..., axis=2\)`: `m` has shape"):
        tx.init(empty)


@pytest.mark.parametrize(
    ("masks", "words"),
    [
        ({"k": np.zeros((3, 3), bool), "b": True}, r"mask of `k` is bool\[3, 3\].*\[2, 2\]"),
        ({"k": np.ones((2, 2), np.float32), "b": True}, r"mask of `k` is float32\[2, 2\]"),
        ({"k": np.zeros((2, 2), bool)}, "no mask for `b`"),
        ({"k": False, "b": True, "typo": False}, "the masks name `typo`"),
        (False, "no mask for `b`"),
    ],
)
def test_masks_that_do_not_fit_are_refused_at_init(masks, words):
    params = {"k": jnp.ones((2, 2)), "b": jnp.ones(2)}
    with pytest.raises(ValueError, match=words):
        optim.growing_l2(masks, delta=0.1).init(params)


def test_masks_of_what_is_left_out():
    params = {"k": jnp.ones((2, 2)), "b": {"x": jnp.ones(2)}}
    masks = {"k": jnp.eye(2, dtype=bool), "b": {"x": jnp.array(True)}}
    tx = optax.masked(optim.growing_l2(masks, delta=0.5), {"k": True, "b": False})
    state = tx.init(params)
    for _ in range(2):
        updates, state = tx.update(jax.tree.map(jnp.zeros_like, params), state, params)
    np.testing.assert_array_equal(updates["k"], [[0, 0.5], [0.5, 0]])


def test_penalties_are_gradients():
    params = {"k": draw(0, 4, 5), "b": draw(1, 5)}
    grads = {"k": draw(2, 4, 5), "b": draw(3, 5)}
    for tx, penalty in (
        (optim.l1_penalty(0.3), lambda w: 0.3 * jnp.sum(jnp.abs(w))),
        (optim.l2_penalty(0.3), lambda w: 0.15 * jnp.sum(w**2)),
    ):
        updates, _ = tx.update(grads, tx.init(params), params)
        expected = grads["k"] + jax.grad(penalty)(params["k"])
        np.testing.assert_allclose(updates["k"], expected, rtol=1e-6)
        np.testing.assert_array_equal(updates["b"], grads["b"])
    decayed, _ = optax.add_decayed_weights(0.3).update(grads, optax.EmptyState(), params)
    np.testing.assert_allclose(updates["k"], decayed["k"], rtol=1e-6)


def test_strengths_and_rates_may_be_schedules():
    weight, none = jnp.full((2, 2), 10.0), jnp.zeros((2, 2))
    grow = lambda t: jnp.asarray(t, jnp.float32)  # noqa: E731
    rate = lambda t: 1.0 / (1 + jnp.asarray(t, jnp.float32))  # noqa: E731
    found, state = landed(optim.proximal_l1(grow, rate), weight, none, steps=3)
    np.testing.assert_allclose(found, 10 - (0 + 1 / 2 + 2 / 3), rtol=1e-6)
    assert state.step == 3
    tx = optax.chain(optim.l2_penalty(grow), optax.sgd(0.1))
    found, _ = landed(tx, weight, none, steps=3)
    np.testing.assert_allclose(found, 10 * 1 * 0.9 * 0.8, rtol=1e-6)


def test_growing_l2():
    params = {"k": jnp.full((2, 2), 4.0), "b": jnp.full(2, 4.0)}
    masks = {"k": jnp.array([[True, False], [False, True]]), "b": jnp.array(True)}
    tx = optim.growing_l2(masks, delta=0.1, every=2, limit=0.15)
    none, state, pulls = jax.tree.map(jnp.zeros_like, params), tx.init(params), []
    for _ in range(6):
        updates, state = jax.jit(tx.update)(none, state, params)
        np.testing.assert_array_equal(updates["b"], [0, 0])
        np.testing.assert_array_equal(updates["k"] == 0, masks["k"] | (updates["k"] == 0))
        pulls.append(float(updates["k"][0, 1]))
    np.testing.assert_allclose(pulls, [0, 0, 0.4, 0.4, 0.6, 0.6], rtol=1e-6)
    with pytest.raises(ValueError, match="no mask for `k`"):
        optim.growing_l2({"b": jnp.zeros(2, bool)}, delta=0.1).update(none, state, params)


def test_lasso_reaches_its_optimum():
    # 0 in gradient + strength · sign(w) where w is not 0; |gradient| <= strength where it is.
    rng = np.random.default_rng(0)
    inputs = jnp.asarray(rng.normal(size=(40, 8)), jnp.float32)
    truth = np.zeros((8, 1))
    truth[:3, 0] = [2.0, -1.5, 1.0]
    targets = jnp.asarray(inputs @ truth + 0.01 * rng.normal(size=(40, 1)), jnp.float32)
    slope = jax.grad(lambda w: 0.5 * jnp.mean((inputs @ w - targets) ** 2))
    tx = optax.chain(optax.sgd(0.3), optim.proximal_l1(0.1, 0.3))

    @jax.jit
    def run(w):
        def step(carry, _):
            w, state = carry
            updates, state = tx.update(slope(w), state, w)
            return (optax.apply_updates(w, updates), state), None

        return jax.lax.scan(step, (w, tx.init(w)), None, length=400)[0][0]

    found = run(jnp.ones((8, 1)))
    gradient, zero = np.asarray(slope(found)), np.asarray(found) == 0
    assert zero[3:].sum() >= 4 and not zero[:3].any()
    np.testing.assert_allclose(gradient[~zero], -0.1 * np.sign(found)[~zero], atol=1e-4)
    assert np.all(np.abs(gradient[zero]) <= 0.1 + 1e-4)


ALL = {
    "l1": lambda: optax.chain(optim.l1_penalty(0.1), optax.sgd(0.1)),
    "l2": lambda: optax.chain(optim.l2_penalty(0.1), optax.sgd(0.1)),
    "growing": lambda: optax.chain(
        optim.growing_l2({"k": jnp.zeros((8, 8), bool), "b": True}, delta=0.1), optax.sgd(0.1)
    ),
    "proximal l1": lambda: optax.chain(optax.sgd(0.1), optim.proximal_l1(0.5, 0.1)),
    "group": lambda: optax.chain(optax.sgd(0.1), optim.proximal_group_lasso(0.5, 0.1)),
    "nuclear": lambda: optax.chain(optax.sgd(0.1), optim.proximal_nuclear_norm(0.5, 0.1)),
}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("name", ALL)
def test_battery(name, dtype):
    tx = ALL[name]()
    params = {"k": draw(0, 8, 8).astype(dtype), "b": jnp.ones(8, dtype)}
    traces = []

    @jax.jit
    def step(params, state):
        traces.append(0)
        grads = jax.tree.map(lambda x: x * 0.1, params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    form = jax.tree.map(lambda x: (x.shape, x.dtype), (params, state))
    before = float(jnp.sum(params["k"].astype(jnp.float32) ** 2))
    for _ in range(3):
        params, state = step(params, state)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), (params, state)) == form
    assert len(traces) == 1
    assert float(jnp.sum(params["k"].astype(jnp.float32) ** 2)) < before
    same = optax.tree_map_params(tx, lambda x: x, state)
    assert jax.tree.structure(same) == jax.tree.structure(state)


@pytest.mark.parametrize("name", ALL)
def test_lowers_everywhere(name):
    tx = ALL[name]()
    params = {"k": draw(0, 8, 8), "b": jnp.ones(8)}
    shapes = jax.eval_shape(lambda p: (p, tx.init(p), p), params)
    exported = jax.export.export(jax.jit(tx.update), platforms=("cpu", "cuda", "tpu"))(*shapes)
    assert exported.platforms == ("cpu", "cuda", "tpu")
    assert [x.shape for x in exported.out_avals[:2]] == [(8,), (8, 8)]


def test_zeros_are_exact_with_updates_of_another_dtype():
    for weights, updates in ((jnp.float32, jnp.bfloat16), (jnp.bfloat16, jnp.float32)):
        weight = draw(0, 8, 8).astype(weights)
        tx = optim.proximal_l1(0.5, 1.0)
        change, _ = tx.update(jnp.zeros((8, 8), updates), tx.init(weight), weight)
        with jax.numpy_dtype_promotion("standard"):  # optax adds what has two dtypes
            after = np.asarray(optax.apply_updates(weight, change), np.float64)
        small = np.abs(np.asarray(weight, np.float64)) <= 0.5
        assert small.sum() > 10 and np.all(after[small] == 0) and np.all(after[~small] != 0)


def test_typed_leaves_and_paths():
    params = {"a": Scaled(draw(0, 4, 4), jnp.ones(1)), "c": draw(1, 4, 4)}
    none = jax.tree.map(jnp.zeros_like, params)
    after, _ = landed(optim.proximal_l1(100.0, 1.0, where="a"), params, none)
    assert np.all(np.asarray(after["a"].weight) == 0) and float(after["a"].scale[0]) == 1
    np.testing.assert_array_equal(after["c"], params["c"])


def test_devices_agree():
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    weight = draw(0, 16, 8)
    sharded = jax.device_put(weight, NamedSharding(mesh, P("x", "y")))
    for tx in (optim.proximal_l1(0.5, 1.0), optim.proximal_group_lasso(0.25, 1.0)):
        found, _ = landed(tx, sharded, sharded * 0.1)
        expected, _ = landed(tx, weight, weight * 0.1)
        np.testing.assert_allclose(found, expected, atol=1e-6)
        assert found.sharding.spec == P("x", "y")


def test_zeros_that_group_lasso_makes_can_be_held():
    weight = draw(0, 8, 6) * jnp.array([[0.1, 1.0, 0.1, 1.0, 0.1, 2.0]])
    after, _ = landed(optim.proximal_group_lasso(0.5, 1.0), weight, jnp.zeros_like(weight))
    held = prune.hold(after != 0)
    updates, _ = held.update(jnp.ones((8, 6)), held.init(after), after)
    np.testing.assert_array_equal(optax.apply_updates(after, updates) == 0, after == 0)


def test_errors():
    params = jnp.ones((2, 2))
    for make in (optim.proximal_l1, optim.proximal_group_lasso, optim.proximal_nuclear_norm):
        with pytest.raises(ValueError, match=r"strength=-1.*0 or more"):
            make(-1.0, 0.1)
        with pytest.raises(ValueError, match=r"learning_rate=-1"):
            make(1.0, -1.0)
        tx = make(1.0, 0.1)
        with pytest.raises(ValueError, match="acts on weights"):
            tx.update(params, tx.init(params))
    with pytest.raises(ValueError, match="matched none of 1"):
        optim.l1_penalty(0.1, where="nothing").init({"k": params})
    with pytest.raises(ValueError, match="every=0"):
        optim.proximal_nuclear_norm(1.0, 0.1, every=0)
    with pytest.raises(ValueError, match="delta=0"):
        optim.growing_l2(True, delta=0)
