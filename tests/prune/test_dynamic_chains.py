"""Masks that move, and `sparsify` around an optimizer, with every optimizer and wrapper of optax.

What the optimizer keeps for a pruned weight is zero, whatever it is; what comes back starts there.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from toy_sparse import RAMP, Pair, check_zeros, random_params, train, weights_of

from jopt import prune


@pytest.fixture(autouse=True)
def standard_promotion():
    # optax's own transformations promote implicitly.
    with jax.numpy_dtype_promotion("standard"):
        yield


LABELS = {"a": {"kernel": "x", "bias": "y"}, "b": Pair("y", "x"), "c": "x"}
MARKS = {"a": {"kernel": True, "bias": False}, "b": Pair(True, False), "c": True}
INNER = {
    "sgd": lambda: optax.sgd(0.1),
    "momentum": lambda: optax.sgd(0.1, momentum=0.9),
    "adam": lambda: optax.adam(0.1),
    "adamw": lambda: optax.adamw(0.1),
    "adafactor": lambda: optax.adafactor(0.1, min_dim_size_to_factor=8),
    "lion": lambda: optax.lion(0.1),
    "rmsprop": lambda: optax.rmsprop(0.1),
    "lamb": lambda: optax.lamb(0.1),
    "muon": lambda: optax.contrib.muon(0.1),
    "schedule_free": lambda: optax.contrib.schedule_free(optax.sgd(0.1), 0.1),
    "multisteps": lambda: optax.MultiSteps(optax.adam(0.1), 2).gradient_transformation(),
    "inject": lambda: optax.inject_hyperparams(optax.adam)(learning_rate=0.1),
    "multi_transform": lambda: optax.multi_transform(
        {"x": optax.adam(0.1), "y": optax.sgd(0.1, momentum=0.9)}, LABELS
    ),
    "masked": lambda: optax.chain(
        optax.masked(optax.scale_by_adam(), MARKS), optax.scale_by_learning_rate(0.1)
    ),
    "if finite": lambda: optax.apply_if_finite(optax.adam(0.1), 3),
    "clipped": lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.1)),
}


def rigl(inner):
    return prune.rigl(0.75, inner=inner, until=6, every=2, drop=0.5, key=jax.random.key(0))


def masks_list(masks):
    return [np.asarray(m) for m in (masks["a"]["kernel"], masks["b"].first, masks["c"][0])]


def check_forgotten(state, masks):
    """Everything that is shaped like the weights is zero where they are pruned."""
    kept = masks_list(masks)
    shapes = [m.shape for m in kept]
    seen = 0
    for array in jax.tree.leaves(state):
        if array.shape in shapes and array.dtype != np.uint8:
            mask = kept[shapes.index(array.shape)]
            # Adafactor adds 1e-30 to what it squares.
            np.testing.assert_allclose(np.asarray(array)[~mask], 0, atol=1e-29)
            seen += 1
    return seen


@pytest.mark.parametrize("name", INNER)
def test_rigl(name):
    inner = INNER[name]()
    first = prune.masks_of(rigl(inner).init(random_params()))
    params, state = train(rigl(inner), random_params())
    masks = prune.masks_of(state)
    moved = 0
    for w, m, f in zip(weights_of(params), masks_list(masks), masks_list(first), strict=True):
        np.testing.assert_array_equal(np.asarray(w)[~m], 0)
        assert np.sum(m) == np.sum(f)
        moved += int(np.sum(m & ~f))
    assert moved > 20
    assert all(bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves(params))
    seen = check_forgotten(state.inner, masks)
    assert seen >= {"sgd": 0, "adafactor": 1}.get(name, 3)
    if name == "schedule_free":
        averaged = optax.contrib.schedule_free_eval_params(state.inner, params)
        for w, m in zip(weights_of(averaged), masks_list(masks), strict=True):
            np.testing.assert_array_equal(np.asarray(w)[~m], 0)


@pytest.mark.parametrize("name", INNER)
def test_sparsify_around(name):
    tx = prune.sparsify(RAMP, inner=INNER[name]())
    params, state = train(tx, random_params())
    check_forgotten(state.inner, check_zeros(params, state))
    assert all(bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves(params))


OUTER = {
    "multisteps": lambda: optax.MultiSteps(rigl(optax.adam(0.1)), 2).gradient_transformation(),
    "inject": lambda: optax.inject_hyperparams(lambda rate: rigl(optax.adam(rate)))(rate=0.1),
    "masked": lambda: optax.masked(rigl(optax.adam(0.1)), MARKS),
    "if finite": lambda: optax.apply_if_finite(rigl(optax.adam(0.1)), 3),
    "clipped": lambda: optax.chain(optax.clip_by_global_norm(1.0), rigl(optax.adam(0.1))),
    "multi_transform": lambda: optax.multi_transform(
        {"x": rigl(optax.adam(0.1)), "y": optax.sgd(0.1)},
        {"a": {"kernel": "x", "bias": "y"}, "b": Pair("x", "y"), "c": "x"},
    ),
}


@pytest.mark.parametrize("name", OUTER)
def test_rigl_inside(name):
    tx = OUTER[name]()
    params, state = train(tx, random_params(), steps=12)
    masks = prune.masks_of(state)
    for w, m in zip(weights_of(params), masks_list(masks), strict=True):
        np.testing.assert_array_equal(np.asarray(w)[~m], 0)
    same = optax.tree_map_params(tx, lambda x: x, state)
    assert jax.tree.structure(same) == jax.tree.structure(state)


def test_nan_gradients_of_pruned_weights_go_nowhere():
    params = random_params()
    for tx in (rigl(optax.adam(0.1)), prune.sparsify(0.75, inner=optax.lamb(0.1))):
        state, weights, step = tx.init(params), params, jax.jit(tx.update)
        grads = jax.tree.map(jnp.ones_like, weights)
        for _ in range(4):
            updates, state = step(grads, state, weights)
            weights = optax.apply_updates(weights, updates)
            grads["a"]["kernel"] = jnp.where(prune.masks_of(state)["a"]["kernel"], 1.0, jnp.nan)
        found = jax.tree.leaves((weights, state.inner))
        assert all(bool(jnp.all(jnp.isfinite(x))) for x in found)


def test_an_optimizer_whose_state_cannot_be_told_apart():
    params = {"k": jnp.ones((4, 4)), "b": jnp.ones(4)}
    tx = prune.sparsify(0.5, inner=optax.sm3(0.1))
    with pytest.raises(ValueError, match=r"`optax.tree_map_params` cannot tell"):
        tx.update(params, tx.init(params), params)
    chained = optax.chain(optax.sm3(0.1), prune.sparsify(0.5))
    updates, _ = chained.update(params, chained.init(params), params)
    assert int(jnp.sum(optax.apply_updates(params, updates)["k"] == 0)) == 8
