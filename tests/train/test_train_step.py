"""One step: its numbers, on one device and on many, and what it does with the state."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy_training as toy
from jax.sharding import NamedSharding, PartitionSpec

from jopt import train

SGD = optax.sgd(0.1, momentum=0.9)


def mesh():
    return jax.make_mesh((8,), ("data",))


def started(loss=None, *, tx=SGD, key=None, collections=None, **options):
    loss = toy.plain if loss is None else loss
    step = train.make_step(loss, tx, **options)
    state = train.init(toy.params(), tx, collections=collections, key=key, mesh=options.get("mesh"))
    return step, train.replicate(state) if options.get("parallel") == "pmap" else state


def run(step, state, steps=3, examples=16):
    metrics = []
    for i in range(steps):
        state, got = step(state, toy.batch(examples, seed=i))
        metrics.append(got)
    if step.layout.parallel == "pmap":
        state = train.unreplicate(state)
    return state, metrics


def test_the_step_is_momentum_sgd_as_numpy_has_it():
    def loss(params, batch):
        return jnp.mean((batch["x"] @ params - batch["y"]) ** 2)

    rng = np.random.default_rng(0)
    batches = [
        {"x": rng.standard_normal((8, 4)).astype("f"), "y": rng.standard_normal(8).astype("f")}
        for _ in range(5)
    ]
    step = train.make_step(loss, SGD)
    state = train.init(jnp.ones(4), SGD)
    w, v = np.ones(4), np.zeros(4)
    for batch in batches:
        state, metrics = step(state, batch)
        error = batch["x"].astype("d") @ w - batch["y"]
        np.testing.assert_allclose(metrics["loss"], np.mean(error**2), rtol=1e-5)
        v = 0.9 * v + 2 * batch["x"].astype("d").T @ error / 8
        w = w - 0.1 * v
    np.testing.assert_allclose(state.params, w, rtol=1e-5)
    assert int(state.step) == 5


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_mesh_of_eight_gives_the_numbers_of_one(key, accumulate):
    # Batch norm over the whole batch and dropout included.
    options = {"key": key, "collections": toy.collections(), "accumulate": accumulate}
    one = run(*started(toy.full(), **options))
    eight = run(*started(toy.full(), mesh=mesh(), **options))
    for leaf in jax.tree.leaves(eight[0]):
        assert len(leaf.devices()) == 8
    toy.close(one[0]._replace(key=None), eight[0]._replace(key=None))
    toy.close(one[1], eight[1])
    assert int(eight[0].collections["batches"]) == 3 * accumulate


def test_pmap_on_eight_gives_the_numbers_of_one(key):
    options = {"key": key, "collections": toy.collections()}
    one = run(*started(toy.full(dropout=False), **options))
    loss = toy.full(axis="batch", dropout=False)
    eight = run(*started(loss, parallel="pmap", **options))
    toy.close(one[0]._replace(key=None), eight[0]._replace(key=None))
    toy.close(one[1], eight[1])


def test_each_device_under_pmap_drops_other_units(key):
    def loss(params, batch, *, key):
        return jnp.mean(params * batch), train.Aux(metrics={"draw": jax.random.uniform(key)})

    step = train.make_step(loss, SGD, parallel="pmap")
    state = train.replicate(train.init(jnp.ones(()), SGD, key=key))
    _, metrics = step(state, np.ones(8, np.float32))
    folded = jax.random.fold_in(key, 0)
    draws = [jax.random.uniform(jax.random.fold_in(folded, i)) for i in range(8)]
    np.testing.assert_allclose(metrics["draw"], np.mean(draws), rtol=1e-6)


def test_the_key_is_folded_with_the_step_and_the_microbatch(key):
    def loss(params, batch, *, key):
        return jnp.mean(params * batch), train.Aux(metrics={"draw": jax.random.uniform(key)})

    state = train.init(jnp.ones(()), SGD, key=key)
    _, metrics = train.make_step(loss, SGD, donate=False)(state, np.ones(4, np.float32))
    folded = jax.random.fold_in(key, 0)
    assert float(metrics["draw"]) == float(jax.random.uniform(folded))
    _, metrics = train.make_step(loss, SGD, accumulate=2)(state, np.ones(4, np.float32))
    draws = [jax.random.uniform(jax.random.fold_in(folded, i)) for i in range(2)]
    np.testing.assert_allclose(metrics["draw"], np.mean(draws), rtol=1e-6)


@pytest.mark.parametrize("accumulate", [2, 4, 16])
def test_accumulated_microbatches_equal_the_whole_batch(accumulate):
    whole = run(*started())
    parts = run(*started(accumulate=accumulate))
    toy.close(whole, parts)


def test_accumulation_is_in_float32():
    # In bfloat16 the sum of 1 and 64 times 1/256 would stay 1: each part is below half a unit.
    def loss(params, batch):
        return jnp.sum(params * jnp.mean(batch))

    batch = np.full(65, 1 / 256, np.float32)
    batch[0] = 1
    step = train.make_step(loss, optax.sgd(1.0), accumulate=65)
    state = train.init(jnp.zeros((), jnp.bfloat16), optax.sgd(1.0))
    state, _ = step(state, jnp.asarray(batch, jnp.bfloat16))
    assert state.params.dtype == jnp.bfloat16
    np.testing.assert_allclose(float(state.params), -batch.mean(), rtol=4e-3)


def test_a_step_consumes_its_state_unless_told_not_to():
    mine = jax.tree.map(jnp.asarray, toy.params())
    step = train.make_step(toy.plain, SGD)
    state = train.init(mine, SGD)
    step(state, toy.batch())
    assert all(x.is_deleted() for x in jax.tree.leaves((state.params, state.opt_state)))
    assert not any(x.is_deleted() for x in jax.tree.leaves(mine))
    step, state = started(donate=False)
    step(state, toy.batch())
    assert not any(x.is_deleted() for x in jax.tree.leaves(state))


def test_a_state_that_shares_an_array_can_be_donated():
    shared = jnp.ones(3)
    step = train.make_step(lambda params, batch: jnp.sum(params["a"] * params["b"] * batch), SGD)
    state = train.init({"a": shared, "b": shared}, SGD)
    state, _ = step(state, np.ones(3, np.float32))
    np.testing.assert_allclose(state.params["a"], state.params["b"])


@pytest.mark.parametrize("options", [{}, {"mesh": True}, {"parallel": "pmap"}, {"accumulate": 2}])
def test_one_step_is_compiled_once(key, options):
    options = options | ({"mesh": mesh()} if "mesh" in options else {})
    axis = "batch" if "parallel" in options else None
    step, state = started(toy.full(axis), key=key, collections=toy.collections(), **options)
    batches = [toy.batch(seed=i) for i in range(4)]
    with toy.compilations() as seen:
        for batch in batches:
            state, _ = step(state, batch)
    assert len(seen) == 1, seen


def test_a_weakly_typed_or_partly_bound_state_is_compiled_for_once():
    params = {"a": 0.5, "b": jax.device_put(jnp.ones(()), jax.devices()[0])}
    step = train.make_step(lambda p, batch: jnp.mean(p["a"] * p["b"] * batch), SGD)
    state = train.init(params, SGD)
    with toy.compilations() as seen:
        for _ in range(3):
            state, _ = step(state, np.ones(3, np.float32))
    assert seen == ["jit(one)"]


def test_integer_leaves_stay_and_the_optimizer_does_not_see_them():
    params = {"w": jnp.ones(3), "codes": jnp.array([1, -2, 3], jnp.int8), "used": jnp.array(True)}

    def loss(params, batch):
        codes = params["codes"].astype(jnp.float32)
        return jnp.mean((params["w"] * codes - batch) ** 2)

    tx = optax.chain(optax.add_decayed_weights(1e-2), optax.trace(0.9), optax.scale(-0.1))
    step = train.make_step(loss, tx)
    state = train.init(params, tx)
    assert jax.tree.leaves(state.opt_state)[0].shape == (3,)
    for _ in range(2):
        state, _ = step(state, np.zeros(3, np.float32))
    np.testing.assert_array_equal(state.params["codes"], [1, -2, 3])
    assert state.params["codes"].dtype == jnp.int8 and bool(state.params["used"])
    w, v, codes = np.ones(3), np.zeros(3), np.array([1.0, -2, 3])
    for _ in range(2):
        v = 0.9 * v + 2 * codes**2 * w / 3 + 1e-2 * w
        w = w - 0.1 * v
    np.testing.assert_allclose(state.params["w"], w, rtol=1e-5)


def test_adam_keeps_its_state_with_integer_leaves_about():
    tx = optax.adamw(1e-2)
    params = {"w": jnp.ones(3), "codes": jnp.ones(3, jnp.int8)}
    with jax.numpy_dtype_promotion("standard"):  # optax's bias correction needs it
        step = train.make_step(lambda p, batch: jnp.mean(p["w"] * batch), tx)
        state = train.init(params, tx)
        state, _ = step(state, np.ones(3, np.float32))
        state, _ = step(state, np.ones(3, np.float32))
    np.testing.assert_allclose(state.params["w"], 1 - 2 * 1e-2 - 2e-6, rtol=1e-5)


def test_a_frozen_field_of_a_typed_leaf_keeps_its_bits():
    @functools.partial(
        jax.tree_util.register_dataclass, data_fields=["weight", "range"], meta_fields=[]
    )
    class Ranged:
        def __init__(self, weight, range):
            self.weight, self.range = weight, range

        def materialise(self):
            return jnp.clip(self.weight, -1, 1) * jax.lax.stop_gradient(self.range)

    def loss(params, batch):
        return jnp.mean(params.materialise() * batch)

    step = train.make_step(loss, SGD)
    state = train.init(Ranged(jnp.full(3, 0.5), jnp.full(3, 2.0)), SGD)
    state, _ = step(state, np.ones(3, np.float32))
    np.testing.assert_array_equal(state.params.range, 2.0)
    np.testing.assert_allclose(state.params.weight, 0.5 - 0.1 * 2 / 3)


def test_the_loss_reaches_transformations_that_ask_for_it():
    def update(updates, state, params=None, *, value, **extra):
        return jax.tree.map(jnp.zeros_like, updates), value

    tx = optax.GradientTransformationExtraArgs(lambda params: jnp.zeros(()), update)
    step, state = started(tx=tx)
    state, metrics = step(state, toy.batch())
    assert float(state.opt_state) == float(metrics["loss"])


def test_parameters_sharded_over_the_mesh_stay_so():
    columns = NamedSharding(mesh(), PartitionSpec(None, "data"))
    params = toy.params()
    params["first"]["kernel"] = jax.device_put(params["first"]["kernel"], columns)
    state = train.init(params, SGD, mesh=mesh())
    step = train.make_step(toy.plain, SGD, mesh=mesh())
    with toy.compilations() as seen:
        sharded, metrics = run(step, state)
    assert sharded.params["first"]["kernel"].sharding.spec == PartitionSpec(None, "data")
    assert sharded.opt_state[0].trace["first"]["kernel"].sharding.spec[-1] == "data"
    assert len([name for name in seen if "one" in name]) == 1
    whole = run(*started())
    toy.close(whole, (sharded, metrics))


def test_the_body_vmaps_and_lowers_everywhere(key):
    step, state = started(toy.full(), key=key, collections=toy.collections(), donate=False)
    states = jax.tree.map(lambda x: jnp.stack([x, x]), state)
    many, _ = jax.jit(jax.vmap(step.body, in_axes=(0, None)))(states, toy.batch())
    one, _ = step(state, toy.batch())
    toy.close(jax.tree.map(lambda x: x[1], many)._replace(key=None), one._replace(key=None))
    exported = jax.export.export(
        jax.jit(lambda state, batch: step.body(state, batch)[1]["loss"]),
        platforms=("cpu", "cuda", "tpu"),
    )(state, toy.batch())
    assert exported.platforms == ("cpu", "cuda", "tpu")


def test_errors_say_what_was_expected(key):
    def stepped(loss, *, examples=16, collections=None, **options):
        step, state = started(loss, collections=collections, **options)
        step(state, toy.batch(examples))

    with pytest.raises(ValueError, match='expects "jit" or "pmap"'):
        train.make_step(toy.plain, SGD, parallel="xmap")
    with pytest.raises(ValueError, match=r"accumulate=0\)` expects at least 1"):
        train.make_step(toy.plain, SGD, accumulate=0)
    with pytest.raises(ValueError, match=r"accumulate=3\)` needs a batch that 3 divides"):
        stepped(None, accumulate=3)
    with pytest.raises(
        ValueError, match="on 8 devices expects arrays whose leading axis 8 divides"
    ):
        stepped(None, examples=12, mesh=mesh())
    with pytest.raises(
        ValueError, match="on 8 devices expects arrays whose leading axis 8 divides"
    ):
        stepped(None, examples=12, parallel="pmap")
    with pytest.raises(ValueError, match=r"begin with `state = train.replicate\(state\)`"):
        train.make_step(toy.plain, SGD, parallel="pmap")(train.init(toy.params(), SGD), toy.batch())
    with pytest.raises(TypeError, match=r"the loss is float32\[16\], expected one"):
        stepped(lambda p, batch: batch["x"][:, 0])
    with pytest.raises(TypeError, match=r"the loss is int32\[\], expected one floating-point"):
        stepped(lambda p, batch: batch["y"][0])
    with pytest.raises(TypeError, match=r"a tuple of \(\w+, dict\)"):
        stepped(lambda p, batch: (toy.plain(p, batch), {}))
    with pytest.raises(ValueError, match=r"but the state has none.*`train.init\(params, tx, coll"):
        stepped(lambda p, batch: (toy.plain(p, batch), train.Aux(collections={"a": jnp.ones(1)})))
    with pytest.raises(ValueError, match=r"`Aux\(metrics=...\)`: `a` has shape \[2\]"):
        stepped(lambda p, batch: (toy.plain(p, batch), train.Aux(metrics={"a": jnp.ones(2)})))
    with pytest.raises(ValueError, match="without `loss` and `step`"):
        stepped(lambda p, batch: (toy.plain(p, batch), train.Aux(metrics={"loss": 1.0})))

    def grows(params, batch, *, collections):
        return toy.plain(params, batch), train.Aux(collections={"a": jnp.ones(3), "b": 0})

    with pytest.raises(TypeError, match=r"lost \[\] and gained \['collections/b'\]"):
        stepped(grows, collections={"a": jnp.ones(3)})

    def widens(params, batch, *, collections):
        return toy.plain(params, batch), train.Aux(collections={"a": jnp.ones(4)})

    with pytest.raises(TypeError, match=r"`collections/a` went from float32\[3\] to float32\[4\]"):
        stepped(widens, collections={"a": jnp.ones(3)})
