"""Blocks with remainders, channels, trees of patterns, and leaves that a pattern does not fit."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jopt import prune, schedules


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def block_reference(weight, block, sparsity):
    """Blocks one by one in float64, those at the far edges as small as they are."""
    lead = weight.ndim - len(block)
    grid = [1 if i < lead else block[i - lead] for i in range(weight.ndim)]
    starts = [range(0, n, b) for n, b in zip(weight.shape, grid, strict=True)]
    places = [
        tuple(slice(a, a + b) for a, b in zip(at, grid, strict=True))
        for at in np.stack(np.meshgrid(*starts, indexing="ij"), -1).reshape(-1, weight.ndim)
    ]
    means = [np.abs(weight[p].astype(np.float64)).mean() for p in places]
    mask = np.ones(weight.shape, bool)
    for i in np.argsort(means, kind="stable")[: round(sparsity * len(places))]:
        mask[places[i]] = False
    return mask


@settings(deadline=None, max_examples=12)
@given(st.integers(0, 99), st.sampled_from([(8, 8), (9, 9), (5, 8), (7, 4)]))
def test_blocks_with_remainders(seed, shape):
    weight = draw(seed, *shape)
    found = prune.masks(weight, 0.5, pattern=prune.Block((4, 4)))
    np.testing.assert_array_equal(found, block_reference(weight, (4, 4), 0.5))


@pytest.mark.parametrize(
    ("shape", "block"), [((2, 6, 7), (3, 2)), ((10,), (4,)), ((3, 3, 5, 6), (2, 4))]
)
def test_blocks_of_other_ranks(shape, block):
    weight = draw(1, *shape)
    where = lambda path, leaf: True  # noqa: E731
    masks = jax.jit(
        lambda w, s: prune.masks(w, s, pattern=prune.Block(block), where=where, scope="layer")
    )(weight, 0.6)
    np.testing.assert_array_equal(masks, block_reference(weight, block, np.float32(0.6)))


def test_channels_equal_torch():
    torch = pytest.importorskip("torch")
    from torch.nn.utils import prune as peer

    weight = draw(0, 6, 5, 3, 7)
    for p in (1, 2):
        for axis in (0, 1, 3):
            module = torch.nn.Module()
            module.weight = torch.nn.Parameter(torch.tensor(weight))
            peer.ln_structured(module, "weight", 0.4, n=p, dim=axis)
            found = prune.masks(
                weight, 0.4, pattern=prune.Channel(axis - 4), score=prune.magnitude(p)
            )
            np.testing.assert_array_equal(found, module.weight_mask.numpy().astype(bool))


def test_channels_are_ranked_by_means_over_all_leaves():
    params = {"x": draw(0, 6, 4), "y": draw(1, 30, 5)}
    found = prune.masks(params, 0.4, pattern=prune.Channel())
    norms = np.concatenate([np.abs(params[n]).mean(0) for n in "xy"])
    lost = set(np.argsort(norms)[: round(0.4 * 9)])
    for name, first in (("x", 0), ("y", 4)):
        columns = np.asarray(found[name])
        assert np.all(columns == columns[:1])
        gone = {first + i for i in np.flatnonzero(~columns[0])}
        assert gone == {i for i in lost if first <= i < first + columns.shape[1]}


def tree_reference(weight, sparsity):
    """Channels to a third of the sparsity, blocks to two, weights to all of it."""
    size = np.abs(weight.astype(np.float64))
    gone = np.zeros(weight.shape, bool)

    def take(units, count):
        scores = [
            -np.inf if gone[u].all() else np.where(gone[u], 0, size[u]).sum() / size[u].size
            for u in units
        ]
        for i in np.argsort(scores, kind="stable")[:count]:
            gone[units[i]] = True

    rows, columns = weight.shape
    channels = [(slice(None), slice(j, j + 1)) for j in range(columns)]
    tiles = [
        (slice(i, i + 3), slice(j, j + 3)) for i in range(0, rows, 3) for j in range(0, columns, 3)
    ]
    single = [(slice(i, i + 1), slice(j, j + 1)) for i in range(rows) for j in range(columns)]
    take(channels, int(sparsity / 3 * columns))
    take(tiles, int(sparsity * 2 / 3 * len(tiles)))
    take(single, round(sparsity * rows * columns))
    return ~gone


TREE = prune.Tree([prune.Channel(-1), prune.Block((3, 3)), prune.Unstructured()])


@pytest.mark.parametrize("sparsity", [0.2, 0.5, 0.9])
def test_trees(sparsity):
    weight = draw(3, 11, 13)
    found = np.asarray(prune.masks(weight, sparsity, pattern=TREE))
    np.testing.assert_array_equal(found, tree_reference(weight, sparsity))
    assert np.sum(~found) == round(sparsity * weight.size)


def test_trees_grow_in_training_and_may_end_in_groups():
    weight = jnp.asarray(draw(3, 16, 12))
    ramp = schedules.steps_sparsity([(0, 0.3), (1, 0.6), (2, 0.9)])
    tx = prune.sparsify(ramp, pattern=TREE)
    state, before = tx.init(weight), np.ones((16, 12), bool)
    for level in (0.3, 0.6, 0.9):
        _, state = tx.update(weight, state, weight)
        mask = np.asarray(prune.masks_of(state))
        assert np.sum(~mask) == round(np.float32(level) * 192) and not np.any(mask & ~before)
        before = mask
    groups = prune.Tree([prune.Channel(-1), prune.NM(2, 4)], parts=(0.4, 0.6))
    assert groups.share == pytest.approx(0.625)
    mask = np.asarray(prune.masks(weight, 0.625, pattern=groups))
    assert np.all(mask.reshape(4, 4, 12).sum(1) <= 2)
    assert np.sum(~mask.any(0)) == int(0.25 * 12)
    assert np.all(mask.reshape(4, 4, 12).sum(1)[:, mask.any(0)] == 2)


@pytest.mark.parametrize(("scope", "groups", "coarse"), [
    ("global", prune.NM(2, 4), prune.Block((8, 1))), ("layer", prune.NM(1, 4), prune.Channel(-1)),
    ("erk", prune.NM(5, 8), prune.Channel(-1)),
])  # fmt: skip
def test_trees_that_end_in_groups_keep_to_the_count(groups, coarse, scope):
    params = {"a": jnp.asarray(draw(0, 32, 16)), "b": jnp.asarray(draw(1, 64, 40))}
    tree = prune.Tree([coarse, groups])
    traced = jax.jit(lambda p, s: prune.masks(p, s, pattern=tree, scope=scope))
    for sparsity in (0.1, 0.3, 0.5 if groups.share > 0.4 else 0.4):
        for found in (
            prune.masks(params, sparsity, pattern=tree, scope=scope),
            traced(params, sparsity),
        ):
            lost = sum(int((~mask).sum()) for mask in found.values())
            slack = (groups.m - groups.n) / 2 * (1 if scope == "global" else 2)
            assert abs(lost - round(sparsity * 3072)) <= slack
    blocks = prune.Tree([prune.Block((4, 1)), prune.NM(2, 4)])
    assert int((~prune.masks(params["a"], 0.5, pattern=blocks)).sum()) == 256
    with pytest.raises(ValueError, match=r"at most a fraction of 0\.666667"):
        prune.masks(params, 0.7, pattern=blocks)
    ramp = schedules.steps_sparsity([(0, 0.2), (1, 0.4), (2, 0.6)])
    tx = prune.sparsify(ramp, pattern=blocks)
    state = tx.init(params)
    for level in (0.2, 0.4, 0.6):
        _, state = tx.update(params, state, params)
        lost = sum(int((~mask).sum()) for mask in prune.masks_of(state).values())
        assert abs(lost - level * 3072) <= 2


@pytest.mark.parametrize("pattern", [prune.Block((2, 2)), prune.Channel(-1), TREE])
def test_training_lands_and_lowers(pattern):
    params = {"k": jnp.asarray(draw(0, 9, 10)), "b": jnp.ones(10)}
    tx = optax.chain(optax.sgd(0.1), prune.sparsify(0.5, pattern=pattern))
    step = jax.jit(tx.update)
    state = tx.init(params)
    for _ in range(2):
        updates, state = step(params, state, params)
        params = optax.apply_updates(params, updates)
    mask = prune.masks_of(state)["k"]
    np.testing.assert_array_equal(params["k"] == 0, ~mask)
    assert 0.4 < 1 - float(mask.mean()) < 0.6
    shapes = jax.eval_shape(lambda p: (p, tx.init(p), p), params)
    jax.export.export(step, platforms=("cpu", "cuda", "tpu"))(*shapes)


def test_unfit_leaves_are_listed_or_skipped_and_reported():
    params = {"a": jnp.ones((3, 9)), "b": jnp.ones((8, 9)), "c": jnp.ones((2, 2)), "d": jnp.ones(3)}
    with pytest.raises(ValueError) as error:
        prune.masks(params, 0.5, pattern=prune.Block((4, 4)))
    message = str(error.value)
    assert "does not fit 2 of 3 weights" in message and '`unfit="skip"`' in message
    assert "`a`: shape (3, 9) is smaller than a block of (4, 4)" in message
    assert "`c`: shape (2, 2) is smaller" in message and "`b`" not in message
    found = prune.masks(params, 0.5, pattern=prune.Block((4, 4)), unfit="skip")
    reasons = prune.misfits(params, prune.Block((4, 4)))
    assert set(reasons) == {"a", "c"}
    rows = prune.report(found, skipped=reasons)
    assert rows["a"].sparsity == 0 and rows["a"].reason == reasons["a"] and "d" not in rows
    assert rows["b"].reason == "" and rows["b"].kept < 72
    tx = prune.sparsify(0.5, pattern=prune.NM(2, 4), unfit="skip")
    state = tx.init(params)
    assert prune.masks_of(state)["a"].shape == () and prune.masks_of(state)["b"].shape == (8, 9)
    with pytest.raises(ValueError, match="does not fit 1 of 1"):
        prune.masks({"a": params["a"]}, 0.5, pattern=prune.NM(2, 4), unfit="skip")
    with pytest.raises(ValueError, match="unfit='warn'"):
        prune.masks(params, 0.5, unfit="warn")


def test_errors():
    with pytest.raises(ValueError, match="lengths of 1 or more"):
        prune.Block((0, 4))
    with pytest.raises(ValueError, match="counted from the end"):
        prune.Channel(0)
    with pytest.raises(ValueError, match=r"shape \(4, 4\) has no axis -3"):
        prune.masks(jnp.ones((4, 4)), 0.5, pattern=prune.Channel(-3))
    with pytest.raises(ValueError, match="two patterns or more"):
        prune.Tree([prune.Channel(-1)])
    with pytest.raises(ValueError, match="of whole units"):
        prune.Tree([prune.NM(2, 4), prune.Unstructured()])
    with pytest.raises(ValueError, match="with sum 1"):
        prune.Tree([prune.Channel(-1), prune.Unstructured()], parts=(0.5, 0.6))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: prune.NM("2", 4), r"`NM\('2', 4\)` expects two integers"),
        (lambda: prune.NM(2.0, 4), r"`NM\(2\.0, 4\)` expects two integers"),
        (lambda: prune.Block(4), r"`Block\(4\)` expects integers in a tuple"),
        (lambda: prune.Block((4.0, 4)), r"`Block\(\(4\.0, 4\)\)` expects integers"),
        (lambda: prune.Channel(-1.0), r"`Channel\(-1\.0\)` expects an integer"),
        (lambda: prune.masks(jnp.ones((4, 4)), None), r"sparsity=None\)` expects a number"),
        (lambda: prune.masks(jnp.ones((4, 4)), "0.5"), r"sparsity='0\.5'\)` expects a number"),
        (lambda: prune.sparsify([("**", "0.5")]), r"sparsity='0\.5'\)` expects a number"),
    ],
)
def test_types_of_options(make, message):
    with pytest.raises(TypeError, match=message):
        make()
    prune.masks(jnp.ones((4, 4)), np.float32(0.5), pattern=prune.NM(np.int64(2), 4))
