"""`sparsify` and `hold`: exact zeros, masks that grow, states that keep their form, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from toy_sparse import RAMP, Scaled, check_zeros, random_params, train

from jopt import prune, schedules


@pytest.fixture(autouse=True)
def standard_promotion():
    # optax's own transformations promote implicitly.
    with jax.numpy_dtype_promotion("standard"):
        yield


# Exactness.


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_zeros_are_exact_at_any_precision_whatever_comes_in(dtype):
    broken = lambda p: jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), p)  # noqa: E731
    params = random_params(dtype=dtype)
    params, state = train(prune.sparsify(0.75), params, steps=2, grads=broken)
    masks = prune.masks_of(state)
    weight, mask = np.asarray(params["a"]["kernel"], np.float32), masks["a"]["kernel"]
    assert np.all(weight[~mask] == 0) and np.all(np.isnan(weight[mask]))


@pytest.mark.parametrize(("weights", "updates"), [
    (jnp.bfloat16, jnp.float32), (jnp.float32, jnp.bfloat16), (jnp.bfloat16, jnp.float16),
])  # fmt: skip
def test_updates_of_another_dtype(weights, updates):
    params = jax.random.normal(jax.random.key(0), (8, 8)).astype(weights)
    tx = prune.sparsify(0.5)
    change, _ = tx.update(jnp.ones((8, 8), updates), tx.init(params), params)
    assert int(jnp.sum(optax.apply_updates(params, change) == 0)) == 32


def test_dense_leaves_and_kept_weights_pass_unchanged():
    params = random_params()
    tx = prune.sparsify(0.5)
    given = jax.tree.map(lambda x: x * 0.3, params)
    updates, state = tx.update(given, tx.init(params), params)
    masks = prune.masks_of(state)
    np.testing.assert_array_equal(updates["a"]["bias"], given["a"]["bias"])
    np.testing.assert_array_equal(updates["c"][0].range, given["c"][0].range)
    mask = np.asarray(masks["c"][0])
    expected = np.where(mask, given["c"][0].weight, -params["c"][0].weight)
    np.testing.assert_array_equal(updates["c"][0].weight, expected)


def test_first_masks_are_those_of_masks():
    params = random_params()
    for options in ({}, {"scope": "layer", "score": prune.random(jax.random.key(0))}):
        tx = prune.sparsify(0.6, **options)
        _, state = jax.jit(tx.update)(params, tx.init(params), params)
        found, expected = prune.masks_of(state), prune.masks(params, 0.6, **options)
        for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_array_equal(x, y)


def test_masks_only_grow_even_among_ties():
    # Every weight is the same, so the index alone orders them; noise would unprune the early ones.
    params = {"kernel": jnp.ones((8, 8))}
    levels = jnp.array([0.25, 0.5, 0.4, 0.75])
    tx = prune.sparsify(lambda step: levels[step])
    state, before = tx.init(params), np.ones((8, 8), bool)
    for step, count in enumerate([16, 32, 32, 48]):
        grads = {"kernel": jax.random.normal(jax.random.key(step), (8, 8))}
        updates, state = jax.jit(tx.update)(grads, state, params)
        params = optax.apply_updates(params, updates)
        mask = np.asarray(prune.masks_of(state)["kernel"])
        assert np.sum(~mask) == count and not np.any(mask & ~before)
        before = mask
    assert state.sparsity == 0.75 and state.step == 4


def test_pruned_weights_stay_before_new_zeros():
    params = jnp.array([[5.0, 6.0, 7.0, 8.0, 1.0, 2.0, 3.0, 4.0]])
    tx = prune.sparsify(schedules.steps_sparsity([(0, 0.5), (1, 0.625)]))
    _, state = tx.update(jnp.zeros_like(params), tx.init(params), params)
    np.testing.assert_array_equal(prune.masks_of(state), [[1, 1, 1, 1, 0, 0, 0, 0]])
    # The others have become zero too: just one more goes, after those that went before.
    _, state = tx.update(jnp.zeros_like(params), state, jnp.zeros_like(params))
    np.testing.assert_array_equal(prune.masks_of(state), [[0, 1, 1, 1, 0, 0, 0, 0]])


def test_every():
    params = {"kernel": jax.random.normal(jax.random.key(0), (10, 10))}
    tx = prune.sparsify(lambda step: 0.1 * (step + 1), every=3)
    state, counts = tx.init(params), []
    for _ in range(7):
        updates, state = jax.jit(tx.update)(params, state, params)
        params = optax.apply_updates(params, updates)
        counts.append(int(jnp.sum(params["kernel"] == 0)))
    assert counts == [10, 10, 10, 40, 40, 40, 70]


def test_nm_through_a_schedule():
    params = jax.random.normal(jax.random.key(0), (16, 12))
    tx = optax.chain(optax.sgd(0.1), prune.sparsify(
        schedules.cubic_sparsity(0.5, begin=0, end=4), pattern=prune.NM(2, 4)
    ))  # fmt: skip
    params, state = train(tx, params, steps=3)
    assert 0 < jnp.mean(params == 0) < 0.5
    params, state = train(tx, params, steps=4, state=state)
    groups = np.asarray(prune.masks_of(state)).reshape(4, 4, 12).sum(1)
    np.testing.assert_array_equal(groups, 2)


def test_a_score_with_state():
    # Movement: a running sum of -w · g, fed by the updates that reach the transformation.
    movement = prune.Score(
        rank=lambda state, params: state,
        init=lambda params: jax.tree.map(jnp.zeros_like, params),
        update=lambda updates, state, params, **extra: jax.tree.map(
            lambda s, u, p: s - u * p * extra["scale"], state, updates, params
        ),
    )
    params = {"kernel": jnp.array([[1.0, 2.0], [3.0, 4.0]]), "bias": jnp.ones(2)}
    grads = {"kernel": jnp.array([[1.0, -1.0], [1.0, -1.0]]), "bias": jnp.ones(2)}
    tx = prune.sparsify(schedules.steps_sparsity([(1, 0.5)]), score=movement)
    state = tx.init(params)
    for _ in range(2):
        _, state = jax.jit(tx.update)(grads, state, params, scale=2.0)
    np.testing.assert_array_equal(state.score["kernel"], [[-4, 8], [-12, 16]])
    np.testing.assert_array_equal(prune.masks_of(state)["kernel"], [[False, True]] * 2)


# The state.


def test_one_bit_a_weight():
    params = {f"w{i}": jnp.zeros(shape) for i, shape in enumerate(
        [(64, 10), (10, 64), (3, 3, 3, 16), (5, 12, 40), (64, 64)]
    )}  # fmt: skip
    state = prune.sparsify(0.5).init(params)
    for name, words in state.masks.words.items():
        assert words.dtype == jnp.uint8 and words.ndim == params[name].ndim
        assert words.size * 8 == params[name].size
    odd = prune.sparsify(0.5).init(jnp.zeros((49, 7)))
    assert odd.masks.words.shape == (7, 7)


def test_frameworks():
    equinox = pytest.importorskip("equinox")
    from flax import nnx

    mlp = equinox.nn.MLP(4, 2, 8, 2, key=jax.random.key(0))
    arrays = equinox.filter(mlp, equinox.is_array)
    linear = nnx.state(nnx.Linear(4, 8, rngs=nnx.Rngs(0)), nnx.Param)
    for params in (arrays, linear):
        tx = optax.chain(optax.adam(0.1), prune.sparsify(0.5))
        trained, state = train(tx, params, steps=2)
        masks = prune.masks_of(state)
        assert jax.tree.structure(masks) == jax.tree.structure(params)
        zeros = sum(int(jnp.sum(x == 0)) for x in jax.tree.leaves(trained) if x.ndim > 1)
        assert zeros == sum(x.size for x in jax.tree.leaves(params) if x.ndim > 1) // 2


def test_scan_over_steps_and_vmap_over_models():
    tx = optax.chain(optax.sgd(0.1), prune.sparsify(RAMP))

    def run(params):
        def step(carry, _):
            params, state = carry
            updates, state = tx.update(jax.tree.map(lambda x: x - 1, params), state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), None, length=6)[0]

    params, state = jax.jit(run)(random_params())
    check_zeros(params, state)
    looped, _ = train(tx, random_params(), steps=6)
    for x, y in zip(jax.tree.leaves(params), jax.tree.leaves(looped), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-6)
    stacked = jax.tree.map(lambda *x: jnp.stack(x), random_params(0), random_params(1))
    params, state = jax.jit(jax.vmap(run))(stacked)
    masks = prune.masks_of(state)
    for i in range(2):
        own = jax.tree.map(lambda x: x[i], params)  # noqa: B023
        alone, _ = jax.jit(run)(random_params(i))
        np.testing.assert_allclose(own["a"]["kernel"], alone["a"]["kernel"], rtol=1e-5)
        np.testing.assert_array_equal(own["a"]["kernel"] == 0, ~masks["a"]["kernel"][i])


def test_orbax(tmp_path):
    checkpoint = pytest.importorskip("orbax.checkpoint")
    tx = optax.chain(optax.adam(0.1), prune.sparsify(RAMP))
    _, state = train(tx, random_params(), steps=3)
    with checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", jax.tree.map(jnp.zeros_like, state))
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    for x, y in zip(jax.tree.leaves(restored), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(x, y)


# Holding masks.


def test_hold():
    params = random_params()
    masks = prune.masks(params, 0.6)
    tx = optax.chain(optax.adam(0.1), prune.hold(masks))
    trained, state = train(tx, params)
    found = check_zeros(trained, state, 0.6)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(masks), strict=True):
        np.testing.assert_array_equal(x, y)
    # On from another chain's masks, and with a leaf that stands for a subtree.
    tx = optax.chain(optax.sgd(0.1, momentum=0.9), prune.hold({**found, "b": True}))
    trained, state = train(tx, params, steps=3)
    np.testing.assert_array_equal(trained["a"]["kernel"] == 0, ~masks["a"]["kernel"])
    assert jnp.all(trained["b"].first != 0)
    optax.tree_map_params(tx, lambda x, y: x, state, params)


def test_hold_in_training_after_quantization():
    # Masks of plain weights hold on typed leaves that came in their place.
    plain = {"kernel": jax.random.normal(jax.random.key(0), (8, 8)), "bias": jnp.ones(8)}
    masks = prune.masks(plain, 0.5)
    params = {**plain, "kernel": Scaled(plain["kernel"], None)}
    trained, state = train(optax.chain(optax.adam(0.1), prune.hold(masks)), params)
    np.testing.assert_array_equal(trained["kernel"].weight == 0, ~masks["kernel"])
    np.testing.assert_array_equal(prune.masks_of(state)["kernel"], masks["kernel"])


def test_hold_around_an_optimizer():
    params = jnp.arange(1.0, 9.0).reshape(2, 4)
    masks = prune.masks(params, 0.5)
    sgd = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1, momentum=0.9))
    tx = prune.hold(masks, inner=sgd)
    grads = jnp.where(masks, 1.0, jnp.nan)
    updates, state = jax.jit(tx.update)(grads, tx.init(params), params)
    # The norm is of what is left: 4 ones make 2.
    np.testing.assert_allclose(
        optax.apply_updates(params, updates), jnp.where(masks, params - 0.05, 0), rtol=1e-6
    )
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(state.inner))
    np.testing.assert_array_equal(prune.masks_of(state), masks)
    trained, state = train(tx, params, state=state)
    np.testing.assert_array_equal(trained == 0, ~masks)
    optax.tree_map_params(tx, lambda x: x, state)


@pytest.mark.parametrize("pooled", [False, True])
def test_hold_where_subtrees_are_left_out(pooled):
    params = {"a": {"w": jnp.ones((4, 4)), "b": jnp.ones(4)}, "c": (jnp.ones((4, 2)), jnp.ones(2))}
    masks = {"a": {"w": jnp.eye(4, dtype=bool), "b": True}, "c": (jnp.zeros((4, 2), bool), True)}
    held = prune.hold(masks, pooled=pooled)
    tx = optax.chain(optax.sgd(0.1), optax.masked(held, {"a": True, "c": False}))
    trained, state = train(tx, params)
    np.testing.assert_array_equal(trained["a"]["w"] == 0, ~jnp.eye(4, dtype=bool))
    assert jnp.all(trained["c"][0] != 0)
    np.testing.assert_array_equal(prune.masks_of(state)["a"]["w"], jnp.eye(4, dtype=bool))
    with pytest.raises(ValueError, match="another structure"):
        optax.masked(held, {"a": True, "c": False}).init({"a": {"w": jnp.ones((4, 4))}, "c": 0.0})


@pytest.mark.parametrize("pooled", [False, True])
def test_hold_of_nothing(pooled):
    params = {"w": jnp.ones((4, 4)), "none": jnp.ones(0), "b": jnp.ones(4)}
    masks = {"w": jnp.eye(4, dtype=bool), "none": False, "b": True}
    for given in (True, {**masks, "w": True}):
        held = prune.hold(given, pooled=pooled)
        trained, _ = train(optax.chain(optax.sgd(0.1), held), params)
        assert jnp.all(trained["w"] != 0) and trained["none"].shape == (0,)
    # A part without a matrix.
    parts = {"x": prune.hold(masks, pooled=pooled), "y": prune.hold(masks, pooled=pooled)}
    tx = optax.multi_transform(parts, {"w": "x", "none": "y", "b": "y"})
    trained, state = train(tx, params)
    np.testing.assert_array_equal(trained["w"] == 0, ~jnp.eye(4, dtype=bool))
    np.testing.assert_array_equal(prune.masks_of(state)["w"], jnp.eye(4, dtype=bool))


def test_converges():
    target = jnp.array([[3.0, -0.1, 2.0, 0.2], [-4.0, 0.3, 0.1, 5.0]])
    tx = optax.chain(
        optax.adam(0.1), prune.sparsify(schedules.cubic_sparsity(0.5, begin=50, end=99))
    )
    params, _ = train(
        tx, jnp.zeros((2, 4)), steps=300, grads=lambda p: jax.grad(
            lambda q: jnp.sum((q - target) ** 2))(p),
    )  # fmt: skip
    np.testing.assert_allclose(params, jnp.where(jnp.abs(target) > 1, target, 0), atol=1e-2)


# Errors.


def test_errors():
    params = random_params()
    tx = prune.sparsify(0.5)
    with pytest.raises(ValueError, match=r"`prune.sparsify\(...\)` acts on weights: .* `params`"):
        tx.update(params, tx.init(params))
    held = prune.hold(prune.masks(params, 0.5))
    with pytest.raises(ValueError, match=r"`prune.hold\(...\)` acts on weights"):
        held.update(params, held.init(params))
    with pytest.raises(ValueError, match="another structure"):
        held.init({"other": jnp.ones((2, 2))})
    with pytest.raises(ValueError, match=r"mask of `a/kernel` is bool\[16, 24\]"):
        held.init({**params, "a": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}})
    with pytest.raises(ValueError, match=r"`s/scale` is a scalar: .* `True`, and was False"):
        prune.hold({"s": False}).init({"s": {"scale": jnp.ones(()), "kernel": jnp.ones((2, 2))}})
    with pytest.raises(ValueError, match=r"in \[0, 1\)"):
        prune.sparsify(1.5)
    for every in (0, 1.5, float("nan"), None, True):
        with pytest.raises(ValueError, match=rf"every={every}.*at least 1"):
            prune.sparsify(0.5, every=every)
    with pytest.raises(TypeError, match=r"`prune.sparsify\(..., inner=5\)` expects a gradient tr"):
        prune.sparsify(0.5, inner=5)
    with pytest.raises(ValueError, match="matched none of 5"):
        prune.sparsify(0.5, where="nothing").init(params)
    with pytest.raises(ValueError, match="does not fit 2 of 3 weights"):
        prune.sparsify(0.5, pattern=prune.NM(2, 8)).init(
            {"x": jnp.ones((9, 8)), "y": jnp.ones((8, 9)), "z": jnp.ones((12, 8))}
        )


def test_errors_of_masks_of():
    params = random_params()
    with pytest.raises(ValueError, match="found no masks"):
        prune.masks_of(optax.adam(0.1).init(params))
    twice = optax.chain(prune.sparsify(0.5), prune.hold(prune.masks(params, 0.5)))
    with pytest.raises(ValueError, match="several masks for the same leaves"):
        prune.masks_of(twice.init(params))
    with pytest.raises(TypeError, match="outside `jit`"):
        jax.jit(prune.masks_of)(prune.sparsify(0.5).init(params))


@pytest.mark.parametrize("value", [float("nan"), jnp.array([0.5])], ids=["nan", "vector"])
def test_a_schedule_gives_one_number(value):
    params = {"w": jnp.ones((4, 4))}
    tx = prune.sparsify(lambda step: value)
    for update in (tx.update, jax.jit(tx.update)):
        with pytest.raises(ValueError, match=r"`prune.sparsify\(<schedule>\)`: a schedule gives"):
            update(params, tx.init(params), params)
