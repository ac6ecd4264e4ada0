"""Pruning over eight devices: the same masks as on one, and no weight ever leaves its device."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jopt import prune, schedules

SPECS = {"a": P("x", "y"), "b": P("y", "x"), "bias": P("x")}
RAMP = schedules.cubic_sparsity(0.75, begin=0, end=3)


def random_params():
    keys = jax.random.split(jax.random.key(0))
    shapes = {"a": (64, 128), "b": (128, 64)}
    params = {n: jax.random.normal(k, s) for (n, s), k in zip(shapes.items(), keys, strict=True)}
    return {**params, "bias": jnp.ones(64)}


def shardings(axis_type):
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(axis_type,) * 2)
    return {name: NamedSharding(mesh, spec) for name, spec in SPECS.items()}


def collectives(compiled):
    """What every collective operation of the program sends."""
    pattern = r"= (\S+) (all-gather|all-to-all|collective-permute|all-reduce|reduce-scatter)"
    return set(re.findall(pattern, compiled.as_text()))


AXES = pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])


@AXES
@pytest.mark.parametrize("pattern", [prune.Unstructured(), prune.NM(2, 4)])
@pytest.mark.parametrize("ties", [False, True])
def test_global_masks_gather_nothing(axis_type, pattern, ties):
    params = random_params()
    if ties:
        params = jax.tree.map(jnp.round, params)
    sharded = jax.device_put(params, shardings(axis_type))
    jitted = jax.jit(lambda p: prune.masks(p, 0.4, pattern=pattern))
    assert collectives(jitted.lower(sharded).compile()) == {("u32[]", "all-reduce")}
    found, expected = jitted(sharded), prune.masks(params, 0.4, pattern=pattern)
    for name in params:
        np.testing.assert_array_equal(found[name], expected[name])
    assert found["a"].sharding.spec == P("x", "y")


@AXES
def test_masks_outside_jit(axis_type):
    params = random_params()
    sharded = jax.device_put(params, shardings(axis_type))
    for found, mask in zip(
        jax.tree.leaves(prune.masks(sharded, 0.4)),
        jax.tree.leaves(prune.masks(params, 0.4)),
        strict=True,
    ):
        np.testing.assert_array_equal(found, mask)


@AXES
def test_a_sharded_step(axis_type):
    params, places = random_params(), shardings(axis_type)
    tx = optax.chain(optax.sgd(0.1, momentum=0.9), prune.sparsify(RAMP))

    def step(params, state):
        updates, state = tx.update(jax.tree.map(lambda x: x - 1, params), state, params)
        return optax.apply_updates(params, updates), state

    sharded, alone = jax.device_put(params, places), params
    state, own = tx.init(sharded), tx.init(alone)
    words = state[1].masks.words
    assert {n: w.sharding.spec for n, w in words.items()} == SPECS
    jitted = jax.jit(step)
    assert collectives(jitted.lower(sharded, state).compile()) == {("u32[]", "all-reduce")}
    for _ in range(5):
        sharded, state = jitted(sharded, state)
        alone, own = jitted(alone, own)
    for name in params:
        np.testing.assert_allclose(sharded[name], alone[name], rtol=1e-6)
        assert sharded[name].sharding.spec == SPECS[name]
        assert state[1].masks.words[name].sharding.spec == SPECS[name]
    assert sum(int(jnp.sum(alone[n] == 0)) for n in "ab") == round(0.75 * 2 * 64 * 128)
    for name, mask in prune.masks_of(state).items():
        np.testing.assert_array_equal(mask, prune.masks_of(own)[name])


def test_the_shardings_of_params_do_for_the_state():
    places = shardings(AxisType.Auto)
    params = jax.device_put(random_params(), places)
    mesh = places["a"].mesh
    tx = optax.chain(optax.sgd(0.1, momentum=0.9), prune.sparsify(RAMP))
    wanted = optax.tree_map_params(
        tx,
        lambda _, place: place,
        jax.eval_shape(tx.init, params),
        places,
        transform_non_params=lambda _: NamedSharding(mesh, P()),
    )
    state = jax.jit(tx.init, out_shardings=wanted)(params)
    traces = []

    @jax.jit
    def step(params, state):
        traces.append(0)
        updates, state = tx.update(params, state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(3):
        params, state = step(params, state)
    assert len(traces) == 1
    assert state[1].masks.words["a"].sharding == places["a"]


def test_pmap():
    params = random_params()
    tx = optax.chain(optax.sgd(0.1), prune.sparsify(RAMP))

    def step(params, state, batch):
        grads = jax.tree.map(lambda x: x - jnp.mean(batch), params)
        updates, state = tx.update(jax.lax.pmean(grads, "devices"), state, params)
        return optax.apply_updates(params, updates), state

    many = jax.pmap(step, axis_name="devices")
    copied = jax.tree.map(lambda x: jnp.stack([x] * 8), (params, tx.init(params)))
    batch = jnp.ones((8, 4))
    for _ in range(5):
        copied = many(*copied, batch)
    alone = (params, tx.init(params))
    once = jax.jit(jax.vmap(step, axis_name="devices"))
    alone = jax.tree.map(lambda x: x[None], alone)
    for _ in range(5):
        alone = once(*alone, batch[:1])
    for x, y in zip(jax.tree.leaves(copied), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(np.asarray(x), np.broadcast_to(y, x.shape), rtol=1e-6)
    assert prune.masks_of(copied[1])["a"].shape == (8, 64, 128)


def test_exports():
    params = random_params()
    with jax.numpy_dtype_promotion("standard"):
        for tail in (prune.sparsify(RAMP, every=2), prune.hold(prune.masks(params, 0.5))):
            tx = optax.chain(optax.adam(0.1), tail)

            def step(params, state, tx=tx):
                updates, state = tx.update(params, state, params)
                return optax.apply_updates(params, updates), state

            shapes = jax.eval_shape(lambda p, tx=tx: (p, tx.init(p)), params)
            exported = jax.export.export(jax.jit(step), platforms=("cpu", "cuda", "tpu"))(*shapes)
            assert exported.platforms == ("cpu", "cuda", "tpu")
            assert len(exported.out_avals) == len(jax.tree.leaves(shapes))


@AXES
@pytest.mark.parametrize("shape", [(784, 512), (1000, 256), (1000, 1000)])
@pytest.mark.parametrize("spec", [P("d", None), P(None, "d")])
def test_axes_that_devices_share_in_parts_of_eights(axis_type, shape, spec):
    place = NamedSharding(jax.make_mesh((8,), ("d",), axis_types=(axis_type,)), spec)
    weight = jax.random.normal(jax.random.key(0), shape)
    sharded = jax.device_put(weight, place)
    expected = np.asarray(prune.masks(weight, 0.5))
    jitted = jax.jit(lambda w: prune.masks(w, 0.5))
    assert collectives(jitted.lower(sharded).compile()) == {("u32[]", "all-reduce")}
    for found in (jitted(sharded), prune.masks(sharded, 0.5)):
        np.testing.assert_array_equal(found, expected)
        assert found.sharding.is_equivalent_to(place, 2)
    tx = optax.chain(optax.sgd(0.1), prune.sparsify(0.5))
    state = tx.init(sharded)
    step = jax.jit(tx.update)
    if shape != (1000, 1000):  # whose rows no choice of words divides
        assert collectives(step.lower(sharded, state, sharded).compile()) == {
            ("u32[]", "all-reduce")
        }
    for update in (step, tx.update):
        updates, after = update(sharded, state, sharded)
        np.testing.assert_array_equal(optax.apply_updates(sharded, updates) != 0, expected)
        np.testing.assert_array_equal(prune.masks_of(after[1]), expected)
        assert updates.sharding.is_equivalent_to(place, 2)


@AXES
@pytest.mark.parametrize("pattern", [
    prune.Block((4, 4)), prune.Block((9, 2)), prune.NM(8, 16), prune.Channel(-1),
    prune.Tree([prune.Channel(-1), prune.NM(2, 4)]),
])  # fmt: skip
def test_units_that_devices_hold_parts_of(axis_type, pattern):
    place = NamedSharding(jax.make_mesh((8,), ("d",), axis_types=(axis_type,)), P("d", None))
    weight = jax.random.normal(jax.random.key(0), (784, 16))
    sharded = jax.device_put(weight, place)
    found = jax.jit(lambda w: prune.masks(w, 0.4, pattern=pattern))(sharded)
    expected = np.asarray(prune.masks(weight, 0.4, pattern=pattern))
    np.testing.assert_array_equal(found, expected)
    tx = optax.chain(optax.sgd(0.1), prune.sparsify(RAMP, pattern=prune.Block((4, 4))))
    state = tx.init(sharded)
    for _ in range(2):
        updates, state = jax.jit(tx.update)(sharded, state, sharded)
    assert updates.sharding.is_equivalent_to(place, 2)
