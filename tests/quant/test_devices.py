"""Quantized products on eight devices: automatic and explicit shardings, and shard_map."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jopt.quant import MX, NF4, Codebook, Int, Piecewise, Spec, calibrate, qat, quantize
from jopt.trace import lift

W8A8 = Spec(Int(8), Int(8))


def test_eight_devices_agree_with_one():
    auto = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=auto)

    def put(tree, *spec):
        return jax.device_put(tree, NamedSharding(mesh, PartitionSpec(*spec)))

    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        "a": jax.random.normal(keys[0], (16, 8)),
        "b": jax.random.normal(keys[1], (8, 4)),
    }
    x = jax.random.normal(keys[2], (8, 16))

    def apply(p, x):
        return jax.nn.relu(x @ p["a"]) @ p["b"]

    for spec in (W8A8, Spec(Int(8, symmetric=False), Int(8, symmetric=False)), Int(4)):
        stored = quantize(params, spec)
        one = jax.jit(lift(apply))(stored, x)
        spread = {
            "a": jax.tree.map(lambda a: put(a, None, "model"), stored["a"]),
            "b": jax.tree.map(lambda a: put(a, "model" if a.shape[0] == 8 else None), stored["b"]),
        }
        many = jax.jit(lift(apply))(spread, put(x, "data"))
        assert len(many.sharding.device_set) == 8
        np.testing.assert_allclose(many, one, rtol=1e-5, atol=1e-5)
        # Quantizing sharded weights gives the same codes.
        again = jax.jit(lambda p, spec=spec: quantize(p, spec))(
            {"a": put(params["a"], None, "model"), "b": put(params["b"], "model")}
        )
        np.testing.assert_array_equal(again["a"].codes, stored["a"].codes)


def test_shardings_in_types():
    mesh = jax.make_mesh((4, 2), ("data", "model"))  # explicit axes
    x = jax.random.normal(jax.random.key(2), (8, 16))
    w = jax.random.normal(jax.random.key(0), (16, 8))
    for spec in (W8A8, Spec(Int(8, symmetric=False), Int(8, symmetric=False)), Int(4)):
        stored = quantize({"w": w}, spec)
        f = jax.jit(lift(lambda p, x: x @ p["w"]))
        one = f(stored, x)
        with jax.set_mesh(mesh):
            many = f(
                jax.device_put(stored, PartitionSpec(None, "model")),
                jax.device_put(x, PartitionSpec("data")),
            )
        assert many.sharding.spec == PartitionSpec("data", "model")
        np.testing.assert_allclose(many, one, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "format, spec",
    [
        (NF4(4), ("data", None)),
        (MX("mxint8"), ("data", None)),
        (Int(4, granularity="group", group_size=16), ("data", None)),
        (Codebook(4), (None, "data")),
        (Codebook(20), ("data", None)),
        (Piecewise(4, granularity="group", group_size=16), (None, "data")),
    ],
    ids=["nf4", "mx", "groups", "kmeans", "many", "pieces"],
)
def test_formats_that_reshape_or_gather_run_on_explicit_axes(format, spec):
    mesh = jax.make_mesh((8,), ("data",))
    w = jax.random.normal(jax.random.key(0), (32, 8))
    placed = jax.device_put(w, NamedSharding(mesh, PartitionSpec(*spec)))
    store = jax.jit(lambda w: quantize({"w": w}, format)["w"])
    one, many = store(w), store(placed)
    assert many.codes.sharding.spec == PartitionSpec(*spec)
    np.testing.assert_array_equal(many.codes.astype(np.float32), one.codes.astype(np.float32))
    trained = jax.jit(lambda w: qat({"w": w}, format)["w"].materialise())(placed)
    np.testing.assert_array_equal(trained, one.materialise())
    np.testing.assert_array_equal(jax.jit(lambda w: w.materialise())(many), one.materialise())


@pytest.mark.parametrize(
    "spec",
    [
        NF4(64),
        MX("mxint8"),
        Int(4, granularity="group", group_size=64, symmetric=False),
        Spec(Int(4, granularity="group", group_size=64), Int(8)),
    ],
    ids=["nf4", "mx", "groups", "w4a8"],
)
def test_groups_that_are_sharded_themselves(spec):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    w = jax.random.normal(jax.random.key(0), (512, 8))
    x = jax.random.normal(jax.random.key(1), (4, 512))
    store = jax.jit(lambda w: quantize({"w": w}, spec))
    dense, product = jax.jit(lambda p: p["w"].materialise()), lift(lambda p, x: x @ p["w"])
    one = store(w)
    placed = jax.device_put(w, NamedSharding(mesh, PartitionSpec("data", None)))
    with jax.set_mesh(mesh):
        many = store(placed)
        assert many["w"].scale.sharding.spec == PartitionSpec("data", None)
        whole, y = dense(many), jax.jit(product)(many, jax.device_put(x, PartitionSpec()))
    np.testing.assert_array_equal(many["w"].codes.astype(np.float32), one["w"].codes)
    np.testing.assert_array_equal(whole, dense(one))
    np.testing.assert_allclose(y, jax.jit(product)(one, x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["gptq", "smoothquant"])
@pytest.mark.parametrize(
    "of_weights, of_inputs", [(("data", None), (None, None)), ((None, None), ("data", None))]
)
def test_methods_run_on_explicit_axes(method, of_weights, of_inputs):
    mesh = jax.make_mesh((8,), ("data",))

    def put(array, spec):
        return jax.device_put(array, NamedSharding(mesh, PartitionSpec(*spec)))

    def apply(p, x):
        return jax.nn.relu(x @ p["a"]) @ p["b"]

    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        "a": jax.random.normal(keys[0], (16, 8)),
        "b": jax.random.normal(keys[1], (8, 4)),
    }
    x = jax.random.normal(keys[2], (16, 16))
    policy = [("b", Int(4))]
    one, _ = calibrate(apply, params, [x], policy, method=method)
    spread = {name: put(weight, of_weights) for name, weight in params.items()}
    many, _ = calibrate(apply, spread, [put(x, of_inputs)], policy, method=method)
    assert many["b"].codes.sharding.spec == PartitionSpec(*of_weights)
    np.testing.assert_array_equal(many["b"].codes, one["b"].codes)


def test_shard_map():
    mesh = jax.make_mesh((8,), ("data",))
    w = jax.random.normal(jax.random.key(0), (16, 4))
    x = jax.random.normal(jax.random.key(1), (8, 16))
    stored = quantize({"w": w}, Spec(Int(8, symmetric=False), Int(8, symmetric=False)))
    data = PartitionSpec("data")
    mapped = jax.shard_map(
        lift(lambda p, x: x @ p["w"]), mesh=mesh, in_specs=(PartitionSpec(), data), out_specs=data
    )
    rows = [lift(lambda p, x: x @ p["w"])(stored, x[i : i + 1]) for i in range(8)]
    x = jax.device_put(x, NamedSharding(mesh, data))
    np.testing.assert_allclose(
        jax.jit(mapped)(stored, x), jnp.concatenate(rows), rtol=1e-5, atol=1e-5
    )
