"""Masks in one array of the state: the same masks, whatever keeps them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from toy_sparse import RAMP, TOTAL, Pair, random_params, train

from jopt import optim, prune


@pytest.fixture(autouse=True)
def standard_promotion():
    # optax's own transformations promote implicitly.
    with jax.numpy_dtype_promotion("standard"):
        yield


KEY = jax.random.key(7)
SGD = optax.sgd(0.1, momentum=0.9)
MOVES = {"inner": SGD, "key": KEY, "drop": 0.5, "every": 2}
LABELS = {"a": "x", "b": Pair("y", "x"), "c": "y"}


def parts(pooled):
    return optax.multi_transform(
        {
            "x": optax.chain(SGD, prune.sparsify(0.5, where="a/kernel", pooled=pooled)),
            "y": prune.sparsify(0.5, inner=SGD, pooled=pooled),
        },
        LABELS,
    )


KEEPERS = {
    "sparsify": lambda pooled: optax.chain(SGD, prune.sparsify(RAMP, pooled=pooled)),
    "some": lambda pooled: optax.chain(SGD, prune.sparsify(0.5, where="b/**", pooled=pooled)),
    "movement": lambda pooled: prune.sparsify(
        RAMP, score=prune.movement(), inner=SGD, regrow=True, pooled=pooled
    ),
    "hold": lambda pooled: optax.chain(
        SGD, prune.hold(prune.masks(random_params(3), 0.6), pooled=pooled)
    ),
    "parts": parts,
    "rigl": lambda pooled: prune.rigl(0.5, until=9, pooled=pooled, **MOVES),
    "set": lambda pooled: prune.set(0.5, pooled=pooled, **MOVES),
    "static": lambda pooled: prune.static(0.5, inner=SGD, key=KEY, pooled=pooled),
    "ac_dc": lambda pooled: prune.ac_dc(
        0.5, inner=SGD, begin=1, period=2, end=5, pooled=pooled
    ),
}  # fmt: skip


def pools(state):
    nodes = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, prune.Pooled))
    return [node for node in nodes if isinstance(node, prune.Pooled)]


def equal(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", KEEPERS)
def test_training_and_masks_are_those_of_separate_arrays(name):
    apart, pooled = (KEEPERS[name](pooled) for pooled in (False, True))
    expected, states = train(apart, random_params())
    params, state = train(pooled, random_params())
    equal(params, expected)
    equal(prune.masks_of(state), prune.masks_of(states))
    found = pools(state)
    assert len(found) == (2 if name == "parts" else 1)
    assert sum(node.words.size for node in found) < TOTAL / 8 + 16
    words = [x for x in jax.tree.leaves(state) if x.dtype == jnp.uint8]
    assert len(words) == len(found)


@pytest.mark.parametrize("name", ["sparsify", "rigl"])
def test_reductions_do_not_grow_with_leaves(name):
    """On CPU every call handles three buffers for each reduction, whether it runs or not."""
    tx = KEEPERS[name](True)

    def reductions(leaves):
        params = {str(i): jnp.ones((8, 4 + i % 2)) for i in range(leaves)}
        step = jax.jit(tx.update).lower(params, tx.init(params), params)
        return step.as_text().count("stablehlo.reduce(")

    assert reductions(4) == reductions(12) > 0


@pytest.mark.parametrize("name", ["sparsify", "rigl", "parts"])
def test_rewinding(name):
    apart, pooled = (KEEPERS[name](pooled) for pooled in (False, True))
    masks = prune.masks(random_params(9), 0.7)
    if name == "parts":  # its first part keeps `a/kernel` only
        masks["b"] = jax.tree.map(lambda m: jnp.ones((), bool), masks["b"])
    found = []
    for tx in (apart, pooled):
        early, state = train(tx, random_params(), steps=2)
        ticket, back = prune.rewind(tx, early, state, masks)
        found.append((ticket, prune.masks_of(back), train(tx, ticket, steps=2, state=back)[0]))
    for one, other in zip(*found, strict=True):
        equal(one, other)


def test_rewinding_does_not_prune_what_the_state_leaves_dense():
    tx = KEEPERS["some"](True)
    params = random_params()
    with pytest.raises(ValueError, match=r"`a/kernel`.*dense"):
        prune.rewind(tx, params, tx.init(params), prune.masks(params, 0.5))


def test_ensembles_and_scans():
    tx = KEEPERS["sparsify"](True)
    many = jax.vmap(lambda key: {"w": jax.random.normal(key, (9, 5)), "b": jnp.ones(5)})(
        jax.random.split(KEY, 3)
    )

    def run(params):
        def step(carry, _):
            params, state = carry
            updates, state = tx.update(params, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), None, length=6)[0]

    params, state = jax.jit(jax.vmap(run))(many)
    masks = prune.masks_of(state)
    assert masks["w"].shape == (3, 9, 5)
    for i in range(3):
        one, own = run(jax.tree.map(lambda x, i=i: x[i], many))
        np.testing.assert_array_equal(masks["w"][i], prune.masks_of(own)["w"])
        np.testing.assert_allclose(params["w"][i], one["w"], rtol=1e-6)


def test_eight_devices():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    params = {"w": jax.random.normal(KEY, (16, 24)), "v": jax.random.normal(KEY, (5, 7))}
    spots = {"w": NamedSharding(mesh, P("x")), "v": NamedSharding(mesh, P())}
    tx = KEEPERS["sparsify"](True)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(params, state, params)
        return optax.apply_updates(params, updates), state

    runs = []
    for placed in (params, jax.device_put(params, spots)):
        state = tx.init(placed)
        for _ in range(5):
            placed, state = step(placed, state)
        runs.append((placed, prune.masks_of(state)))
    for name in params:
        np.testing.assert_allclose(runs[1][0][name], runs[0][0][name], rtol=1e-5, atol=1e-6)
    equal(runs[1][1], runs[0][1])


def test_mapping_over_what_belongs_to_parameters():
    tx = KEEPERS["rigl"](True)
    params = random_params()
    state = tx.init(params)
    doubled = optax.tree_map_params(tx, lambda x: x + 1, state)
    equal(prune.masks_of(doubled), prune.masks_of(state))
    assert any(np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (doubled, state)), strict=True))


def test_export():
    params = {"w": jax.random.normal(KEY, (9, 5))}
    for name in ("sparsify", "rigl"):
        tx = KEEPERS[name](True)
        step = jax.jit(lambda p, s, tx=tx: tx.update(p, s, p))
        exported = jax.export.export(step, platforms=("cpu", "cuda", "tpu"))
        flat, _ = jax.tree.flatten((params, tx.init(params)))
        assert len(exported(params, tx.init(params)).in_avals) == len(flat)


def test_masks_are_read_outside_jit():
    tx = KEEPERS["sparsify"](True)
    state = tx.init({"w": jnp.ones((4, 4))})
    with pytest.raises(TypeError, match="outside `jit`"):
        jax.jit(prune.masks_of)(state)


@pytest.mark.parametrize("spec", [P("x", None), P(None, "x")], ids=str)
def test_weights_that_a_mesh_of_explicit_axes_shares_out(spec):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Explicit,))
    weight = jax.random.normal(KEY, (64, 64))
    with jax.set_mesh(mesh):
        params = {"kernel": jax.device_put(weight, NamedSharding(mesh, spec))}
        for tx in (
            optax.chain(SGD, prune.sparsify(0.5, pooled=True)),
            prune.rigl(0.5, until=9, pooled=True, **MOVES),
        ):
            with pytest.raises(ValueError, match=r"pooled=True.*explicit axes(?s:.*)`kernel`: P"):
                tx.init(params)
        whole = {"kernel": jax.device_put(weight, NamedSharding(mesh, P()))}
        tx = optax.chain(SGD, prune.sparsify(0.5, pooled=True))
        updates, _ = jax.jit(tx.update)(whole, tx.init(whole), whole)
        assert int((optax.apply_updates(whole, updates)["kernel"] == 0).sum()) == 64 * 32


def test_masks_in_the_state_of_an_nnx_optimizer():
    nnx = pytest.importorskip("flax.nnx")
    masks = []
    for pooled in (False, True):
        model = nnx.Linear(8, 16, rngs=nnx.Rngs(0))
        tx = optax.chain(SGD, prune.sparsify(0.5, pooled=pooled))
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        grads = nnx.grad(lambda m: (m(jnp.ones((2, 8))) ** 2).sum())(model)
        optimizer.update(model, grads)
        found = prune.masks_of(optimizer.opt_state)
        masks.append([np.asarray(leaf) for leaf in jax.tree.leaves(found)])
        kernel = np.asarray(model.kernel[...])
        assert any(m.shape == kernel.shape and ((kernel == 0) == ~m).all() for m in masks[-1])
        # They fit the parameters, though they lie in variables of another class.
        params = nnx.state(model, nnx.Param)
        assert jax.tree.structure(prune.apply_masks(params, found)) == jax.tree.structure(params)
        prune.hold(found).init(params)
        early, state = prune.rewind(tx, params, optimizer.opt_state, found)
        assert jax.tree.structure(state) == jax.tree.structure(optimizer.opt_state)
        nnx.update(model, early)
        optimizer.opt_state = state
        held = nnx.Optimizer(
            model,
            optax.chain(optim.growing_l2(found, delta=0.1), SGD, prune.hold(found)),
            wrt=nnx.Param,
        )
        for each in (optimizer, held):
            each.update(model, grads)
            np.testing.assert_array_equal(np.asarray(model.kernel[...]) == 0, kernel == 0)
    for one, other in zip(*masks, strict=True):
        np.testing.assert_array_equal(one, other)
