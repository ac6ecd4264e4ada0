"""Masks that move: over eight devices, in scans, in models of every framework, saved, restored."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from toy_sparse import Pair, random_params, train

from jopt import prune, trees

SPECS = {"a": P("x", "y"), "b": P("y", "x"), "bias": P("x")}


def matrices():
    keys = jax.random.split(jax.random.key(0))
    shapes = {"a": (64, 32), "b": (32, 64)}
    params = {n: jax.random.normal(k, s) for (n, s), k in zip(shapes.items(), keys, strict=True)}
    return {**params, "bias": jnp.ones(64)}


def places(axis_type=AxisType.Auto):
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(axis_type,) * 2)
    return {name: NamedSharding(mesh, spec) for name, spec in SPECS.items()}


def collectives(compiled):
    pattern = r"= (\S+) (all-gather|all-to-all|collective-permute|all-reduce|reduce-scatter)"
    return set(re.findall(pattern, compiled.as_text()))


KEY = jax.random.key(7)
OPTIONS = {"inner": optax.sgd(0.1, momentum=0.9), "key": KEY}
MOVING = {
    "rigl": lambda: prune.rigl(0.75, until=9, every=2, drop=0.5, **OPTIONS),
    "set": lambda: prune.set(0.75, every=2, drop=0.5, **OPTIONS),
    "sparsify": lambda: prune.sparsify(0.75, score=prune.movement(), inner=OPTIONS["inner"]),
    "ac_dc": lambda: prune.ac_dc(0.75, inner=OPTIONS["inner"], begin=1, period=2, end=7),
}


def step_of(tx):
    def step(params, state):
        grads = jax.tree.map(lambda x: jnp.sin(x * 7.0), params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("name", MOVING)
def test_eight_devices_agree_with_one_and_gather_nothing(name, axis_type):
    tx = MOVING[name]()
    alone, spots = matrices(), places(axis_type)
    sharded = jax.device_put(alone, spots)
    state, own = tx.init(sharded), tx.init(alone)
    jitted = jax.jit(step_of(tx))
    assert collectives(jitted.lower(sharded, state).compile()) == {("u32[]", "all-reduce")}
    for _ in range(5):
        sharded, state = jitted(sharded, state)
        alone, own = jitted(alone, own)
    for path, mask in trees.items(prune.masks_of(state)):
        np.testing.assert_array_equal(mask, dict(trees.items(prune.masks_of(own)))[path])
    for key in alone:
        np.testing.assert_allclose(sharded[key], alone[key], rtol=1e-5, atol=1e-6)
        assert sharded[key].sharding.spec == SPECS[key]
        assert state.masks.words[key].sharding.spec == SPECS[key]


@pytest.mark.parametrize("spec", [P("x", None), P(None, "x"), P("y", "x")], ids=str)
@pytest.mark.parametrize("name", ["rigl", "set"])
def test_first_masks_lie_where_weights_do_inside_a_mesh(name, spec):
    tx, alone = MOVING[name](), {"b": matrices()["b"]}
    expected = jax.jit(step_of(tx))(*jax.jit(step_of(tx))(alone, tx.init(alone)))
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        params = jax.device_put(alone, NamedSharding(mesh, spec))
        for init in (tx.init, jax.jit(tx.init)):
            state = init(params)
            assert jax.typeof(state.masks.words["b"]).sharding.spec == spec
            found = jax.jit(step_of(tx))(*jax.jit(step_of(tx))(params, state))
            np.testing.assert_allclose(found[0]["b"], expected[0]["b"], rtol=1e-5, atol=1e-6)


def test_pmap():
    params, tx = matrices(), MOVING["rigl"]()

    def step(params, state, scale):
        grads = jax.tree.map(lambda x: jnp.sin(x * 7.0) * scale, params)
        updates, state = tx.update(jax.lax.pmean(grads, "devices"), state, params)
        return optax.apply_updates(params, updates), state

    many = jax.pmap(step, axis_name="devices")
    copied = jax.tree.map(lambda x: jnp.stack([x] * 8), (params, tx.init(params)))
    for _ in range(5):
        copied = many(*copied, jnp.arange(8.0) * 2 / 7)
    alone, jitted = (params, tx.init(params)), jax.jit(step_of(tx))
    for _ in range(5):
        alone = jitted(*alone)
    masks, expected = prune.masks_of(copied[1]), prune.masks_of(alone[1])
    for name in ("a", "b"):
        assert masks[name].shape == (8, *params[name].shape)
        for device in range(8):
            np.testing.assert_array_equal(masks[name][device], expected[name])
        assert np.all(np.asarray(copied[0][name])[~np.asarray(masks[name])] == 0)


def test_scan_over_steps_and_vmap_over_models():
    tx = MOVING["rigl"]()

    def run(params):
        def body(carry, _):
            return step_of(tx)(*carry), None

        return jax.lax.scan(body, (params, tx.init(params)), None, length=5)[0]

    params, state = jax.jit(run)(matrices())
    looped, jitted = (matrices(), tx.init(matrices())), jax.jit(step_of(tx))
    for _ in range(5):
        looped = jitted(*looped)
    for x, y in zip(jax.tree.leaves((params, state)), jax.tree.leaves(looped), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)
    stacked = jax.tree.map(lambda x: jnp.stack([x, x * 0.5 + 0.1]), matrices())
    both, _ = jax.jit(jax.vmap(run))(stacked)
    np.testing.assert_array_equal(both["a"][0] == 0, params["a"] == 0)
    assert int(jnp.sum(both["a"][1] == 0)) == int(jnp.sum(params["a"] == 0))


def test_frameworks():
    equinox = pytest.importorskip("equinox")
    from flax import nnx

    mlp = equinox.filter(equinox.nn.MLP(4, 2, 8, 2, key=KEY), equinox.is_array)
    linear = nnx.state(nnx.Linear(8, 8, rngs=nnx.Rngs(0)), nnx.Param)
    pairs = (Pair(jax.random.normal(KEY, (8, 8)), jnp.ones(8)), [jnp.ones((4, 4)), None])
    with jax.numpy_dtype_promotion("standard"):
        for params in (mlp, linear, pairs):
            tx = prune.rigl(0.5, inner=optax.adam(0.1), until=9, every=2, drop=0.5, key=KEY)
            first = prune.masks_of(tx.init(params))
            trained, state = train(tx, params, steps=5)
            masks = prune.masks_of(state)
            assert jax.tree.structure(masks) == jax.tree.structure(params)
            counts = prune.report(masks)
            assert counts == prune.report(first) and counts
            after = dict(trees.items(trained))
            for path, mask in trees.items(masks):
                assert np.all(np.asarray(after[path])[~np.asarray(mask)] == 0)


@pytest.mark.parametrize("name", ["rigl", "sparsify"])
def test_orbax(name, tmp_path):
    checkpoint = pytest.importorskip("orbax.checkpoint")
    tx, params = MOVING[name](), random_params()
    state, step = tx.init(params), jax.jit(step_of(tx))
    for _ in range(2):
        params, state = step(params, state)
    with checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        blank = jax.tree.map(jnp.zeros_like, state)
        restored = checkpointer.restore(tmp_path / "state", blank)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    for x, y in zip(
        jax.tree.leaves(step(params, restored)), jax.tree.leaves(step(params, state)), strict=True
    ):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("name", MOVING)
def test_exports(name):
    tx = MOVING[name]()
    shapes = jax.eval_shape(lambda p: (p, tx.init(p)), matrices())
    platforms = ("cpu", "cuda", "tpu")
    exported = jax.export.export(jax.jit(step_of(tx)), platforms=platforms)(*shapes)
    assert exported.platforms == platforms and len(exported.out_avals) == len(exported.in_avals)
