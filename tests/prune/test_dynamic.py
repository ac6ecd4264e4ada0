"""RigL and SET against NumPy; static masks, AC/DC, straight-through, top-KAST; errors."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from toy_sparse import random_params, train, weights_of

from jopt import prune
from jopt.train import init, make_step


@pytest.fixture(autouse=True)
def standard_promotion():
    # optax's own transformations promote implicitly.
    with jax.numpy_dtype_promotion("standard"):
        yield


def lowest(scores, k):
    marks = np.zeros(scores.size, bool)
    marks[np.argsort(scores.ravel(), kind="stable")[:k]] = True
    return marks.reshape(scores.shape)


def rigl_reference(weight, grad, kept, share):
    """A move: the least of the kept go, the largest gradients of all that is then pruned come."""
    moves = round(share * kept.sum())
    stay = ~lowest(np.where(kept, np.abs(weight), -np.inf), int((~kept).sum()) + moves)
    come = ~lowest(np.where(stay, -np.inf, np.abs(grad)), kept.size - moves)
    return stay | come


def run(tx, steps, params, grads):
    state, step, seen = tx.init(params), jax.jit(tx.update), []
    for t in range(steps):
        given = grads(t, params)
        updates, state = step(given, state, params)
        seen.append((params, given, prune.masks_of(state)))
        params = optax.apply_updates(params, updates)
    return params, state, seen


def random_grads(t, params):
    return random_params(t + 10)


def masks_list(masks):
    return [np.asarray(m) for m in (masks["a"]["kernel"], masks["b"].first, masks["c"][0])]


def test_rigl_moves_as_the_paper_says():
    tx = prune.rigl(0.7, inner=optax.adam(0.05), until=9, every=3, drop=0.4, key=jax.random.key(2))
    params, _, seen = run(tx, 12, random_params(), random_grads)
    for t in range(1, 12):
        before, after = masks_list(seen[t - 1][2]), masks_list(seen[t][2])
        weights, grads = weights_of(seen[t][0]), weights_of(seen[t][1])
        share = 0.2 * (1 + np.cos(np.pi * t / 9))
        for w, g, old, new in zip(weights, grads, before, after, strict=True):
            moved = t % 3 == 0 and t < 9
            expected = rigl_reference(np.asarray(w), np.asarray(g), old, share) if moved else old
            np.testing.assert_array_equal(new, expected)
            # What comes back is zero before its first step.
            assert np.all(np.asarray(w)[new & ~old] == 0)
    assert any(np.any(masks_list(seen[3][2])[i] != masks_list(seen[2][2])[i]) for i in range(3))
    for w, m in zip(weights_of(params), masks_list(seen[-1][2]), strict=True):
        np.testing.assert_array_equal(np.asarray(w)[~m], 0)


def test_moments_of_what_comes_back_are_fresh():
    tx = prune.rigl(0.5, inner=optax.adam(0.05), until=9, every=2, key=jax.random.key(0))
    params = {"k": jax.random.normal(jax.random.key(1), (12, 12))}
    grads = lambda t: {"k": jax.random.normal(jax.random.key(t + 2), (12, 12))}  # noqa: E731
    state, step = tx.init(params), jax.jit(tx.update)
    for t in range(3):
        before = prune.masks_of(state)["k"]
        updates, state = step(grads(t), state, params)
        params = optax.apply_updates(params, updates)
    back = np.asarray(prune.masks_of(state)["k"] & ~before)
    assert back.sum() > 0
    given = np.asarray(grads(2)["k"], np.float64)[back]
    moments = state.inner[0]
    np.testing.assert_allclose(np.asarray(moments.mu["k"])[back], 0.1 * given, rtol=1e-5)
    np.testing.assert_allclose(np.asarray(moments.nu["k"])[back], 0.001 * given**2, rtol=1e-4)


@pytest.mark.parametrize(
    "inner", [optax.adagrad(0.1), optax.rmsprop(0.1, initial_scale=1.0), optax.adam(0.1)]
)
def test_fresh_moments_are_those_of_init(inner):
    params = {"w": jax.random.normal(jax.random.key(0), (8, 8)), "b": jnp.ones(8)}
    tx = prune.static(0.5, inner=inner, key=jax.random.key(0))
    start, state = inner.init(params), tx.init(params)
    for _ in range(2):
        # Moments are reset before each step, of gradients that are zero where weights are pruned.
        gone = ~prune.masks_of(state)["w"]
        _, state = jax.jit(tx.update)(params, state, params)
        _, alone = inner.update(jax.tree.map(jnp.zeros_like, params), start, params)
        for own, other in zip(jax.tree.leaves(state.inner), jax.tree.leaves(alone), strict=True):
            if own.shape == (8, 8):
                np.testing.assert_array_equal(own[gone], other[gone])
    masks = prune.masks(params, 0.5)
    _, back = prune.rewind(inner, params, state.inner, masks)
    for own, other in zip(jax.tree.leaves(back), jax.tree.leaves(start), strict=True):
        if own.shape == (8, 8):
            np.testing.assert_array_equal(own[~masks["w"]], other[~masks["w"]])


def test_set_moves_at_random():
    key = jax.random.key(3)
    tx = prune.set(0.6, inner=optax.sgd(0.1), every=2, drop=0.5, key=key, scope="layer")
    _, _, seen = run(tx, 5, random_params(), random_grads)
    for t in (2, 4):
        pairs = zip(masks_list(seen[t - 1][2]), masks_list(seen[t][2]), strict=True)
        for i, (old, new) in enumerate(pairs):
            weight = np.asarray(weights_of(seen[t][0])[i])
            moves = round(0.5 * old.sum())
            stay = ~lowest(np.where(old, np.abs(weight), -np.inf), int((~old).sum()) + moves)
            assert np.all(new[stay]) and new.sum() == old.sum()
            # All that is pruned is equally likely: no more come of the dropped than of the rest.
            come = new & ~stay
            assert come.sum() == moves and (i == 2 or np.any(come & ~old))
    first, second = (masks_list(seen[t][2])[0] for t in (2, 4))
    assert np.any(first != second)
    again = prune.set(0.6, inner=optax.sgd(0.1), every=2, drop=0.5, key=key, scope="layer")
    _, _, other = run(again, 5, random_params(), random_grads)
    np.testing.assert_array_equal(masks_list(other[4][2])[0], second)


def test_static_and_the_first_masks():
    key, params = jax.random.key(4), random_params()
    expected = prune.masks(params, 0.8, score=prune.random(key), scope="erk")
    for tx in (
        prune.static(0.8, inner=optax.adam(0.1), key=key),
        prune.rigl(0.8, inner=optax.adam(0.1), key=key, until=3, every=100),
    ):
        trained, state = train(tx, params, steps=3)
        for x, y in zip(masks_list(prune.masks_of(state)), masks_list(expected), strict=True):
            np.testing.assert_array_equal(x, y)
        for w, m in zip(weights_of(trained), masks_list(expected), strict=True):
            np.testing.assert_array_equal(np.asarray(w) == 0, ~m)


def test_blocks_move_as_a_whole():
    params = {"k": jax.random.normal(jax.random.key(1), (10, 9))}
    tx = prune.rigl(0.5, inner=optax.sgd(0.1), until=9, every=1, drop=0.5, scope="layer",
                    pattern=prune.Block((4, 4)), key=jax.random.key(0))  # fmt: skip
    grads = lambda t, p: {"k": jax.random.normal(jax.random.key(t), (10, 9))}  # noqa: E731
    _, _, seen = run(tx, 4, params, grads)
    found = [np.asarray(masks["k"]) for _, _, masks in seen]
    assert any(np.any(x != y) for x, y in itertools.pairwise(found))
    for mask in found:
        tiles = [mask[i : i + 4, j : j + 4] for i in range(0, 10, 4) for j in range(0, 9, 4)]
        assert all(tile.all() or not tile.any() for tile in tiles)
        assert sum(tile.all() for tile in tiles) == 5  # of 9; 4.5 go, half to even


def test_policies_and_sharing_a_scan():
    params = {"x": jax.random.normal(jax.random.key(0), (8, 8)), "y": jnp.ones((8, 4))}
    tx = prune.rigl([("x", 0.75), ("y", 0.5)], inner=optax.sgd(0.1), until=5, every=2,
                    scope="layer", key=jax.random.key(0))  # fmt: skip

    @jax.jit
    def train_all(params):
        def step(carry, t):
            params, state = carry
            updates, state = tx.update(jax.tree.map(lambda x: x + t, params), state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), jnp.arange(5.0))[0]

    trained, state = train_all(params)
    masks = prune.masks_of(state)
    assert int(masks["x"].sum()) == 16 and int(masks["y"].sum()) == 16
    for name in params:
        assert bool(jnp.all(jnp.where(masks[name], 0, trained[name]) == 0))


def test_regrowth():
    # Straight-through gradients tell pruned weights from each other; masks follow the scores.
    target = jnp.array([[0.0, 3.0, 0.0, 3.0]])
    params = {"k": jnp.array([[1.0, 0.1, 1.2, 0.2]])}

    def loss(params, masks):
        used = prune.straight_through(params, masks)
        return jnp.sum((used["k"] - target) ** 2)

    for regrow in (False, True):
        tx = prune.sparsify(0.5, regrow=regrow, inner=optax.sgd(0.1))
        weights, state = params, tx.init(params)
        for _ in range(3):
            grads = jax.grad(loss)(weights, prune.masks_of(state))
            updates, state = tx.update(grads, state, weights)
            weights = optax.apply_updates(weights, updates)
        # By magnitude nothing comes back: what is pruned is zero.
        np.testing.assert_array_equal(prune.masks_of(state)["k"], [[True, False, True, False]])
    tx = prune.sparsify(0.5, score=_by_gradient(), regrow=True, inner=optax.sgd(0.1))
    weights, state = params, tx.init(params)
    for _ in range(2):
        grads = jax.grad(loss)(weights, prune.masks_of(state))
        updates, state = tx.update(grads, state, weights)
        weights = optax.apply_updates(weights, updates)
    np.testing.assert_array_equal(prune.masks_of(state)["k"], [[False, True, False, True]])


def _by_gradient():
    return prune.Score(
        lambda state, params: jax.tree.map(jnp.abs, state),
        observe=lambda state, params, **extra_args: extra_args["grad"],
    )


def test_ac_dc():
    params = {"k": jax.random.normal(jax.random.key(0), (6, 6)), "b": jnp.ones(6)}
    grads = lambda t, p: jax.tree.map(lambda x: x * 0.1 - 1, p)  # noqa: E731
    tx = prune.ac_dc(0.5, inner=optax.adam(0.05), begin=2, period=2, end=8)
    params, _, seen = run(tx, 10, params, grads)
    zeros = [int(jnp.sum(~jnp.broadcast_to(masks["k"], (6, 6)))) for _, _, masks in seen]
    assert zeros == [0, 0, 18, 18, 0, 0, 18, 18, 18, 18]
    for t in (2, 6):  # chosen by magnitude when a phase begins, and held
        expected = prune.masks(seen[t][0], 0.5)["k"]
        np.testing.assert_array_equal(seen[t][2]["k"], expected)
        np.testing.assert_array_equal(seen[t + 1][2]["k"], expected)
    # In a dense phase the pruned ones start from zero, and move.
    came = ~np.asarray(seen[3][2]["k"])
    assert np.all(np.asarray(seen[4][0]["k"])[came] == 0)
    assert np.all(np.asarray(seen[5][0]["k"])[came] != 0)
    assert int(jnp.sum(params["k"] == 0)) == 18


def test_straight_through():
    params = {"k": jnp.array([[1.0, jnp.nan], [jnp.inf, 2.0]]), "b": jnp.ones(2)}
    masks = {"k": jnp.array([[True, False], [False, True]]), "b": True}
    used = jax.jit(prune.straight_through)(params, masks)
    np.testing.assert_array_equal(used["k"], [[1, 0], [0, 2]])
    _, pull = jax.vjp(lambda p: prune.straight_through(p, masks), params)
    ones = jax.tree.map(jnp.ones_like, params)
    np.testing.assert_array_equal(pull(ones)[0]["k"], np.ones((2, 2)))
    back = {"k": jnp.array([[True, True], [False, True]]), "b": True}
    _, pull = jax.vjp(lambda p: prune.straight_through(p, masks, backward=back), params)
    np.testing.assert_array_equal(pull(ones)[0]["k"], [[1, 1], [0, 1]])
    _, tangent = jax.jvp(lambda p: prune.straight_through(p, masks), (params,), (ones,))
    np.testing.assert_array_equal(tangent["k"], np.ones((2, 2)))
    stacked = jax.vmap(lambda w: prune.straight_through(w, jnp.array([True, False])))(params["k"])
    np.testing.assert_array_equal(stacked, [[1, 0], [jnp.inf, 0]])
    with pytest.raises(ValueError, match="another structure"):
        prune.straight_through(params, {"k": True})


def test_top_kast():
    weight = jnp.asarray(np.random.default_rng(0).normal(size=(4, 8)), jnp.float32)
    params = {"k": weight, "b": jnp.ones(8)}

    @jax.jit
    def loss(params):
        used, penalty = prune.top_kast(params, 0.75, 0.5)
        return jnp.sum(used["k"] * 3.0) + penalty

    order = np.argsort(np.abs(np.asarray(weight)).ravel())
    ahead, back = np.zeros((2, 32), bool)
    ahead[order[24:]], back[order[16:]] = True, True
    flat = np.asarray(weight, np.float64).ravel()
    squares = np.where(ahead, flat**2 / 2, np.where(back, flat**2 / 2 / 0.25, 0))
    expected = (flat * ahead).sum() * 3 + squares.sum()
    np.testing.assert_allclose(loss(params), expected, rtol=1e-5)
    slope = np.where(back, 3.0, 0) + np.where(ahead, flat, np.where(back, flat / 0.25, 0))
    np.testing.assert_allclose(jax.grad(loss)(params)["k"].ravel(), slope, rtol=1e-5)
    with pytest.raises(ValueError, match="`backward` is a sparsity of at most `forward`"):
        prune.top_kast(params, 0.5, 0.75)


@pytest.mark.parametrize("name", ["rigl", "set", "static", "ac_dc"])
def test_options_may_be_traced(name):
    key = jax.random.key(0)
    make, options = {
        "rigl": (prune.rigl, {"until": 6, "every": 2, "drop": 0.4, "key": key}),
        "set": (prune.set, {"until": 6, "every": 2, "drop": 0.4, "key": key}),
        "static": (prune.static, {"key": key}),
        "ac_dc": (prune.ac_dc, {"begin": 2, "period": 2, "end": 5}),
    }[name]
    params = {"w": jax.random.normal(jax.random.key(1), (16, 12))}
    plain = make(0.5, inner=optax.sgd(0.1), **options)
    tx = optax.inject_hyperparams(make)(0.5, inner=optax.sgd(0.1), **options)
    wanted, injected, state, states = params, params, plain.init(params), tx.init(params)
    step, steps = jax.jit(plain.update), jax.jit(tx.update)
    for _ in range(7):
        updates, state = step(params, state, wanted)
        wanted = optax.apply_updates(wanted, updates)
        updates, states = steps(params, states, injected)
        injected = optax.apply_updates(injected, updates)
        np.testing.assert_array_equal(injected["w"] == 0, wanted["w"] == 0)
    assert int((wanted["w"] == 0).sum()) == 96


def test_in_the_train_step():
    target = jax.random.normal(jax.random.key(5), (8, 8))

    def loss(params, batch):
        return jnp.mean(
            (batch @ params["k"] + jnp.expand_dims(params["b"], 0) - batch @ target) ** 2
        )

    options = {"inner": optax.adam(0.05), "key": jax.random.key(0), "scope": "layer"}
    for tx in (
        prune.rigl(0.5, until=60, every=10, **options),
        prune.sparsify(0.5, score=prune.fisher(), inner=options["inner"]),
    ):
        step = make_step(loss, tx)
        state = init({"k": jax.random.normal(jax.random.key(1), (8, 8)), "b": jnp.zeros(8)}, tx)
        losses = []
        for seed in range(80):
            state, metrics = step(state, jax.random.normal(jax.random.key(seed), (16, 8)))
            losses.append(float(metrics["loss"]))
        masks = prune.masks_of(state.opt_state)["k"]
        np.testing.assert_array_equal(state.params["k"] == 0, ~masks)
        assert int(masks.sum()) == 32 and np.mean(losses[-5:]) < 0.5 * np.mean(losses[:5])


def test_errors():
    key, params = jax.random.key(0), random_params()
    options = {"inner": optax.sgd(0.1), "key": key}
    for call in (
        lambda **o: prune.rigl(0.5, until=9, **options, **o),
        lambda **o: prune.set(0.5, **options, **o),
        lambda **o: prune.static(0.5, **options, **o),
    ):
        with pytest.raises(ValueError, match=r"each leaf keeps the number of its weights"):
            call(scope="global")
        with pytest.raises(ValueError, match="units come and go as a whole"):
            call(pattern=prune.NM(2, 4))
        tx = call()
        with pytest.raises(ValueError, match="acts on weights"):
            tx.update(params, tx.init(params))
    for sparsity in (lambda step: 0.5, [("**", lambda step: 0.5)]):
        with pytest.raises(TypeError, match=r"`prune.set\(.*numbers, not schedules"):
            prune.set(sparsity, **options)
    with pytest.raises(TypeError, match=r"`prune.static\(..., inner=None\)` expects a gradient"):
        prune.static(0.5, inner=None, key=key)
    for none in (0, None, jnp.zeros(2), jnp.zeros(3, np.uint32), jax.random.split(key)):
        with pytest.raises(TypeError, match=r"`prune.static\(..., key=.*expects one random"):
            prune.static(0.5, inner=options["inner"], key=none)
        with pytest.raises(TypeError, match=r"`prune.random\(..., key=.* was given"):
            prune.random(none)
    prune.static(0.5, inner=options["inner"], key=jax.random.PRNGKey(0)).init(params)
    with pytest.raises(ValueError, match=r"`prune.rigl\(..., until=None\)`"):
        prune.rigl(0.5, until=None, **options)
    with pytest.raises(ValueError, match=r"`prune.set\(..., until=-1\)`"):
        prune.set(0.5, until=-1, **options)
    with pytest.raises(ValueError, match=r"every=0"):
        prune.rigl(0.5, until=9, every=0, **options)
    with pytest.raises(ValueError, match=r"drop=1.5"):
        prune.set(0.5, drop=1.5, **options)
    with pytest.raises(ValueError, match=r"until=0"):
        prune.rigl(0.5, until=0, **options)
    with pytest.raises(ValueError, match=r"(?s)`prune.rigl.*is smaller than a block"):
        tx = prune.rigl(0.5, until=9, pattern=prune.Block((99, 1)), **options)
        tx.init({"k": jnp.ones((2, 2))})
