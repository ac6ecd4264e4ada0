"""Scores from statistics, against float64 NumPy; where they get them from in training; errors."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from toy_sparse import RAMP, Scaled, check_zeros, random_params, train, weights_of

from jopt import prune, schedules


@pytest.fixture(autouse=True)
def standard_promotion():
    # optax's own transformations promote implicitly.
    with jax.numpy_dtype_promotion("standard"):
        yield


def as_numpy(tree):
    return [np.asarray(w, np.float64) for w in weights_of(tree)]


def brute(scores, k):
    flat = np.concatenate([s.ravel() for s in scores])
    kept = np.ones(flat.size, bool)
    kept[np.argsort(flat, kind="stable")[:k]] = False
    ends = np.cumsum([s.size for s in scores])[:-1]
    return [m.reshape(s.shape) for m, s in zip(np.split(kept, ends), scores, strict=True)]


def equal(masks, scores, sparsity):
    found = [masks["a"]["kernel"], masks["b"].first, masks["c"][0]]
    for x, y in zip(found, brute(scores, round(sparsity * 645)), strict=True):
        np.testing.assert_array_equal(x, y)


def random_grads(seed):
    return jax.tree.map(lambda x: x * 0.5, random_params(seed))


FORMULAS = {
    "snip": (prune.snip, lambda w, g: np.abs(w * g)),
    "taylor": (prune.taylor, lambda w, g: np.abs(w * g)),
    "movement": (prune.movement, lambda w, g: -w * g),
    "fisher": (prune.fisher, lambda w, g: w**2 * g / 2),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_masks_from_given_statistics(name):
    make, formula = FORMULAS[name]
    params, given = random_params(0), random_grads(1)
    if name == "fisher":
        given = jax.tree.map(jnp.square, given)
    masks = jax.jit(lambda p, g: prune.masks(p, 0.6, score=make(g)))(params, given)
    pairs = zip(as_numpy(params), as_numpy(given), strict=True)
    equal(masks, [formula(w, g) for w, g in pairs], 0.6)


def test_snip_is_a_share_of_one():
    params, grads = random_params(0), random_grads(1)
    weights = {"x": params["a"]["kernel"], "y": params["b"].first}
    given = {"x": grads["a"]["kernel"], "y": grads["b"].first}
    score = prune.snip(given)
    ranks = score.rank(score.observe((), weights), weights)
    total = sum(float(jnp.sum(rank)) for rank in jax.tree.leaves(ranks))
    assert total == pytest.approx(1, abs=1e-5)
    still = score.rank(jax.tree.map(jnp.zeros_like, given), weights)
    assert all(bool(jnp.all(rank == 0)) for rank in jax.tree.leaves(still))


def test_snip_keeps_the_order_at_the_ends_of_float32():
    weight = jnp.array([[2.0, 1.5, 0.1, 0.5]])
    keeps = lambda g: np.asarray(prune.masks(weight, 0.5, score=prune.snip(g)))[0].tolist()  # noqa: E731
    ones = jnp.ones((1, 4))
    assert keeps(ones) == keeps(ones * 1e38) == keeps(ones * 1e-37) == [True, True, False, False]
    assert keeps(ones.at[0, 2].set(jnp.inf)) == [True, False, True, False]
    assert keeps(ones.at[0, 2].set(-jnp.inf)) == [True, False, True, False]


def test_activation_norms():
    rng = np.random.default_rng(0)
    weight, norms = rng.normal(size=(6, 4)), rng.uniform(size=(6, 1))
    params = {"bias": jnp.ones(4), "kernel": jnp.asarray(weight, jnp.float32)}
    given = {"bias": None, "kernel": jnp.asarray(norms, jnp.float32)}
    found = prune.masks(params, 0.5, score=prune.activation_norm(given))["kernel"]
    np.testing.assert_array_equal(found, brute([np.abs(weight) * norms], 12)[0])
    # Running mean squares, given at each step.
    tx = prune.sparsify(schedules.steps_sparsity([(2, 0.5)]),
                        score=prune.activation_norm(decay=0.5))  # fmt: skip
    state, mean = tx.init(params), np.zeros((6, 1))
    step = jax.jit(lambda s, a: tx.update(params, s, params, activations=a)[1])
    for seed in range(3):
        squares = np.random.default_rng(seed).uniform(size=(6, 1))
        state = step(state, {"bias": None, "kernel": jnp.asarray(squares, jnp.float32)})
        mean = 0.5 * mean + 0.5 * squares
    expected = brute([np.abs(weight) * np.sqrt(mean)], 12)[0]
    np.testing.assert_array_equal(prune.masks_of(state)["kernel"], expected)


def run(tx, steps, extra=False):
    """Three steps with known gradients; the weights that each step began with."""
    params = random_params(0)
    state, before, given = tx.init(params), [], []
    step = jax.jit(lambda g, s, p: tx.update(g, s, p, **({"grad": g} if extra else {})))
    for seed in range(steps):
        grads = random_grads(seed + 5)
        before.append(as_numpy(params))
        given.append(as_numpy(grads))
        updates, state = step(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params, state, before, given


LATE = schedules.steps_sparsity([(2, 0.5)])


@pytest.mark.parametrize("extra", [False, True])
def test_training_takes_gradients_not_updates(extra):
    # Adam's updates have all one size, so |w · update| would rank otherwise than |w · g|.
    makers = {
        "snip": (prune.snip(), lambda w, g: np.abs(w[2] * g[2])),
        "taylor": (prune.taylor(), lambda w, g: np.abs(w[2] * g[2])),
        "mean": (
            prune.taylor(decay=0.5),
            lambda w, g: sum(0.5 ** (3 - t) * np.abs(w[t] * g[t]) for t in range(3)),
        ),
        "movement": (prune.movement(), lambda w, g: -sum(w[t] * g[t] for t in range(3))),
        "fisher": (
            prune.fisher(decay=0.5),
            lambda w, g: w[2] ** 2 * sum(0.5 ** (3 - t) * g[t] ** 2 for t in range(3)),
        ),
    }
    for score, formula in makers.values():
        adam = optax.adam(0.01)
        if extra:
            tx = optax.chain(adam, prune.sparsify(LATE, score=score))
        else:
            tx = prune.sparsify(LATE, score=score, inner=adam)
        params, state, before, given = run(tx, 3, extra)
        scores = [formula([w[leaf] for w in before], [g[leaf] for g in given]) for leaf in range(3)]
        equal(prune.masks_of(state), scores, 0.5)
        check_zeros(params, state, 0.5)


RUNNING = {
    "taylor": lambda: prune.taylor(decay=0.9),
    "movement": prune.movement,
    "fisher": lambda: prune.fisher(decay=0.9),
}


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
@pytest.mark.parametrize("score", [*RUNNING.values(), prune.taylor], ids=[*RUNNING, "of a step"])
def test_a_pruned_weights_bad_gradient_goes_nowhere(score, bad):
    params = {"w": jax.random.normal(jax.random.key(0), (8, 8))}
    tx = prune.sparsify(0.5, score=score(), inner=optax.adam(0.01), regrow=True)
    state = tx.init(params)
    for step in range(5):
        grads = {"w": jnp.cos(params["w"] + step)}
        if step == 2:
            gone = ~prune.masks_of(state)["w"]
            at = tuple(np.argwhere(np.asarray(gone))[0])
            grads["w"] = grads["w"].at[at].set(bad)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        assert step != 2 or not prune.masks_of(state)["w"][at]
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves((params, state)))


@pytest.mark.parametrize("name", RUNNING)
def test_running_scores_pass_over_what_is_not_finite(name):
    def trained(batches):
        tx = prune.sparsify(
            LATE, score=RUNNING[name](), inner=optax.apply_if_finite(optax.sgd(0.01), 10)
        )
        params = random_params(0)
        state = tx.init(params)
        for scale in batches:
            grads = jax.tree.map(lambda x: x * scale, random_grads(5))  # noqa: B023
            _, state = tx.update(grads, state, params)
        return state

    for x, y in zip(
        jax.tree.leaves(trained([1.0, jnp.nan, 1.0]).score),
        jax.tree.leaves(trained([1.0, 1.0]).score),
        strict=True,
    ):
        np.testing.assert_array_equal(x, y)
    # A weight that is itself NaN is still kept to be seen.
    params = {"w": jnp.array([[jnp.nan, 1.0], [2.0, 3.0]])}
    tx = prune.sparsify(0.5, score=RUNNING[name](), inner=optax.sgd(0.1))
    _, state = tx.update(params, tx.init(params), params)
    assert prune.masks_of(state)["w"][0, 0]


def test_activation_norms_pass_over_what_is_not_finite():
    params = {"k": jnp.ones((2, 3))}
    tx = prune.sparsify(0.0, score=prune.activation_norm(decay=0.5))
    state = tx.init(params)
    for squares in ([2.0, 4.0], [jnp.nan, 8.0]):
        given = {"k": jnp.array(squares)[:, None]}
        _, state = tx.update(params, state, params, activations=given)
    np.testing.assert_array_equal(state.score["k"], [[1.0] * 3, [5.0] * 3])


def test_fisher_from_adams_second_moments():
    tx = prune.sparsify(LATE, score=prune.fisher(), inner=optax.adam(0.01, b2=0.9))
    _, state, before, given = run(tx, 3)
    # Moments as they are when masks are due: those of the steps before.
    moments = [sum(0.1 * 0.9 ** (1 - t) * given[t][i] ** 2 for t in range(2)) for i in range(3)]
    equal(prune.masks_of(state), [w**2 * m for w, m in zip(before[2], moments, strict=True)], 0.5)
    parts = {"x": optax.adam(0.01, b2=0.9), "y": optax.rmsprop(0.01, decay=0.9)}
    labels = {"a": "x", "b": "x", "c": "y"}
    split = prune.sparsify(LATE, score=prune.fisher(), inner=optax.multi_transform(parts, labels))
    _, state, before, given = run(split, 3)
    moments = [sum(0.1 * 0.9 ** (1 - t) * given[t][i] ** 2 for t in range(2)) for i in range(3)]
    equal(prune.masks_of(state), [w**2 * m for w, m in zip(before[2], moments, strict=True)], 0.5)


def test_fisher_at_the_first_step_takes_its_gradient():
    params, grads = random_params(0), random_grads(1)
    tx = prune.sparsify(0.5, score=prune.fisher(), inner=optax.adam(0.1))
    _, state = jax.jit(tx.update)(grads, tx.init(params), params)
    pairs = zip(as_numpy(params), as_numpy(grads), strict=True)
    equal(prune.masks_of(state), [w**2 * g**2 for w, g in pairs], 0.5)


def test_state_is_arrays_and_keeps_its_form():
    for score in (prune.movement(), prune.taylor(decay=0.9), prune.fisher(decay=0.9)):
        tx = prune.sparsify(RAMP, score=score, inner=optax.adam(0.1))
        params, state = train(tx, random_params())
        check_zeros(params, state)
        assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(state))
        assert {x.dtype for x in jax.tree.leaves(state.score)} == {jnp.dtype(jnp.float32)}
    assert prune.sparsify(0.5, score=prune.taylor()).init(random_params()).score == ()


def test_half_precision_products_are_wide():
    params = {"k": jnp.full((2, 2), 1e-4, jnp.float16)}
    grads = {"k": jnp.array([[1e-4, 2e-4], [3e-4, 4e-4]], jnp.float16)}
    found = prune.masks(params, 0.5, score=prune.taylor(grads))
    np.testing.assert_array_equal(found["k"], [[False, False], [True, True]])


def test_typed_leaves_and_maps():
    params = {"k": Scaled(jnp.array([[1.0, 2.0], [3.0, 4.0]]), jnp.ones(1)), "b": jnp.ones(2)}
    grads = {"k": Scaled(jnp.array([[9.0, 1.0], [1.0, 2.0]]), jnp.ones(1)), "b": jnp.ones(2)}
    found = prune.masks(params, 0.5, score=prune.taylor(grads))["k"]
    np.testing.assert_array_equal(found, [[True, False], [False, True]])
    tx = optax.masked(
        prune.sparsify(0.5, score=prune.taylor(), inner=optax.sgd(0.1)), {"k": True, "b": False}
    )
    updates, _ = tx.update(grads, tx.init(params), params)
    after = optax.apply_updates(params, updates)["k"].weight
    np.testing.assert_array_equal(after == 0, [[False, True], [True, False]])


def test_errors():
    params = random_params()
    for score in (prune.snip(), prune.taylor(), prune.taylor(decay=0.9), prune.movement()):
        with pytest.raises(ValueError, match=r"`prune.(snip|taylor|movement)\(\)`.*`prune.masks`"):
            prune.masks(params, 0.5, score=score)
        tx = optax.chain(optax.adam(0.1), prune.sparsify(0.5, score=score))
        with pytest.raises(ValueError, match=r"what reaches the end of a chain are updates"):
            tx.update(params, tx.init(params), params)
    with pytest.raises(ValueError, match="found no second moments"):
        prune.masks(params, 0.5, score=prune.fisher())
    tx = prune.sparsify(0.5, score=prune.fisher(), inner=optax.sgd(0.1))
    with pytest.raises(ValueError, match=r"inner=optax.adam"):
        tx.update(params, tx.init(params), params)
    with pytest.raises(ValueError, match="one of the two"):
        prune.fisher(params, decay=0.9)
    with pytest.raises(ValueError, match=r"taylor\(decay=1.0\)"):
        prune.taylor(decay=1.0)
    tx = prune.sparsify(0.5, score=prune.activation_norm())
    with pytest.raises(ValueError, match="`activations=`"):
        tx.update(params, tx.init(params), params)
