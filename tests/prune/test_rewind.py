"""Lottery tickets: an earlier checkpoint with later masks, through chains of optax."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from toy_sparse import Pair, random_params, train, weights_of

from jopt import prune, schedules


@pytest.fixture(autouse=True)
def standard_promotion():
    # optax's own transformations promote implicitly.
    with jax.numpy_dtype_promotion("standard"):
        yield


def masks_list(masks):
    return [np.asarray(m) for m in (masks["a"]["kernel"], masks["b"].first, masks["c"][0])]


def rate(step):
    return 0.1 / (1 + step)


LABELS = {"a": "x", "b": Pair("y", "x"), "c": "y"}
CHAINS = {
    "behind": lambda: optax.chain(optax.adam(rate), prune.sparsify(0.5)),
    "around": lambda: prune.sparsify(0.5, inner=optax.adam(rate)),
    "parts": lambda: optax.multi_transform(
        {
            "x": optax.chain(optax.adam(rate), prune.sparsify(0.5, where="a/kernel")),
            "y": prune.sparsify(0.5, inner=optax.sgd(rate, momentum=0.9)),
        },
        LABELS,
    ),
    "movement": lambda: prune.sparsify(0.5, score=prune.movement(), inner=optax.adam(rate)),
    "moving": lambda: prune.static(0.5, inner=optax.adam(rate), key=jax.random.key(0)),
}


@pytest.mark.parametrize("name", CHAINS)
def test_weights_moments_masks_and_counts(name):
    tx = CHAINS[name]()
    early, state = train(tx, random_params(), steps=2)
    late, _ = train(tx, early, steps=3, state=state)
    masks = prune.masks(jax.tree.map(lambda x, y: x + y, late, random_params(9)), 0.7)
    ticket, back = prune.rewind(tx, early, state, masks)
    for w, e, m in zip(weights_of(ticket), weights_of(early), masks_list(masks), strict=True):
        np.testing.assert_array_equal(w, np.where(m, e, 0))
    for x, y in zip(masks_list(prune.masks_of(back)), masks_list(masks), strict=True):
        np.testing.assert_array_equal(x, y)
    counts = [int(x) for x in jax.tree.leaves(back) if x.dtype == jnp.int32 and x.ndim == 0]
    assert counts and all(count == 2 for count in counts)
    shapes = [m.shape for m in masks_list(masks)]
    seen = 0
    for old, new in zip(jax.tree.leaves(state), jax.tree.leaves(back), strict=True):
        if new.shape in shapes and new.dtype == jnp.float32:
            mask = masks_list(masks)[shapes.index(new.shape)]
            np.testing.assert_array_equal(new, np.where(mask, old, 0))
            seen += 1
    assert seen >= 3
    # Training goes on from there and keeps at least these zeros, the first step included.
    trained, after = train(tx, ticket, steps=3, state=back)
    for w, m in zip(weights_of(trained), masks_list(masks), strict=True):
        assert np.all(np.asarray(w)[~m] == 0)
    again, _ = prune.rewind(tx, early, state, masks)
    np.testing.assert_array_equal(again["a"]["kernel"], ticket["a"]["kernel"])
    assert jax.tree.structure(after) == jax.tree.structure(state)


def test_iterative_pruning():
    # Rewind, train, prune a fifth of what is left: the schedule of the paper.
    tx = optax.chain(optax.sgd(0.1), prune.hold({"k": jnp.ones((10, 10), bool), "b": True}))
    start = {"k": jax.random.normal(jax.random.key(0), (10, 10)), "b": jnp.ones(10)}
    origin, params, state = tx.init(start), start, tx.init(start)
    gone = []
    for sparsity in (0.2, 0.36, 0.488):
        for _ in range(2):
            updates, state = tx.update(jax.tree.map(lambda x: x - 0.5, params), state, params)
            params = optax.apply_updates(params, updates)
        masks = prune.masks(params, sparsity)
        params, state = prune.rewind(tx, start, origin, masks)
        gone.append(np.asarray(params["k"]) == 0)
    assert [int(g.sum()) for g in gone] == [20, 36, 49]
    assert np.all(gone[1][gone[0]]) and np.all(gone[2][gone[1]])
    np.testing.assert_array_equal(np.asarray(params["k"])[~gone[2]],
                                  np.asarray(start["k"])[~gone[2]])  # fmt: skip


def test_without_masks_in_the_chain_and_under_jit():
    params = random_params()
    tx = optax.adam(0.1)
    early, state = train(tx, params, steps=2)
    masks = prune.masks(params, 0.5)
    ticket, back = jax.jit(lambda p, s: prune.rewind(tx, p, s, masks))(early, state)
    assert int(back[0].count) == 2
    held = optax.chain(tx, prune.hold(masks))
    after, _ = train(held, ticket, steps=2, state=(back, prune.hold(masks).init(ticket)))
    for w, m in zip(weights_of(after), masks_list(masks), strict=True):
        np.testing.assert_array_equal(np.asarray(w) == 0, ~m)


def test_a_ramp_starts_again_from_the_masks():
    ramp = schedules.cubic_sparsity(0.75, begin=0, end=4)
    tx = optax.chain(optax.sgd(0.1), prune.sparsify(ramp))
    params = random_params()
    _, state = train(tx, params, steps=6)
    masks = prune.masks_of(state)
    ticket, back = prune.rewind(tx, params, tx.init(params), masks)
    _, after = train(tx, ticket, steps=6, state=back)
    for x, y in zip(masks_list(prune.masks_of(after)), masks_list(masks), strict=True):
        np.testing.assert_array_equal(x, y)


def test_errors():
    params = random_params()
    tx = optax.chain(optax.sgd(0.1), prune.sparsify(0.5, where="a/kernel"))
    with pytest.raises(ValueError, match=r"prune `b/0`|prune `b/first`"):
        prune.rewind(tx, params, tx.init(params), prune.masks(params, 0.5))
    with pytest.raises(ValueError, match="another structure"):
        prune.rewind(tx, params, tx.init(params), {"x": True})
    big, small = {"w": jnp.ones((8, 8))}, {"w": jnp.ones((4, 4))}
    for tx in (optax.chain(optax.adam(0.1), prune.sparsify(0.5)), optax.adam(0.1)):
        with pytest.raises(ValueError, match=r"mu/w` of the state has shape \[8, 8\].*\[4, 4\]"):
            prune.rewind(tx, small, tx.init(big), {"w": jnp.eye(4).astype(bool)})
    with pytest.raises(ValueError, match="the state has another structure"):
        prune.rewind(tx, big, optax.sgd(0.1).init(big), {"w": jnp.eye(8).astype(bool)})
