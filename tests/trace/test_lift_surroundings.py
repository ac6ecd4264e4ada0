"""`lift` inside scan, shard_map, pmap, meshes, exports of any batch size, and other wrappers."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from toy_functions import STACK, W, X, close, normal
from toy_leaves import LowRank, Scaled, dense, products

from jopt.trace import lift


def mesh_of(shape, names, kind=AxisType.Auto):
    return jax.make_mesh(shape, names, (kind,) * len(shape))


def steps(w, x):
    return lax.scan(lambda h, _: (jnp.tanh(h @ w), None), x, None, length=2)[0]


def layers(w, x):
    return lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, w)[0]


WRAPPED = {
    "jit": jax.jit(steps),
    "partial": functools.partial(steps),
    "lift": lift(steps),
    "checkpoint": jax.checkpoint(steps),
    "named call": jax.named_call(steps, name="steps"),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_of_wrapped_functions(name):
    lifted = lift(WRAPPED[name])
    close(jax.jit(lifted)(W, X), steps(dense(W), X))
    assert products(jax.make_jaxpr(lifted)(W, X)) == [True]


def test_inside_scan_and_checkpoint():
    step = lift(lambda w, h: jnp.tanh(h @ w))
    ours = lax.scan(lambda h, w: (jax.checkpoint(step)(w, h), None), X, STACK)[0]
    close(ours, layers(dense(STACK), X))


def test_inside_shard_map():
    rows, whole = PartitionSpec("data"), PartitionSpec()
    mesh = mesh_of((4,), ("data",))
    sharded = jax.shard_map(lift(layers), mesh=mesh, in_specs=(whole, rows), out_specs=rows)
    close(jax.jit(sharded)(STACK, X), layers(dense(STACK), X))
    assert products(jax.make_jaxpr(sharded)(STACK, X)) == [True]


def test_inside_pmap():
    ours = jax.pmap(lift(steps), in_axes=(None, 0))(W, X[:, None])
    close(ours[:, 0], steps(dense(W), X))


def test_inside_vmap_with_a_named_axis():
    ours = jax.vmap(lift(lambda p, x: lax.pmean(x @ p, "batch")), (None, 0), axis_name="batch")
    close(ours(W, X), jnp.broadcast_to((X @ dense(W)).mean(0), (4, 6)))


def test_leaves_on_a_mesh():
    mesh = mesh_of((2, 3), ("rows", "columns"))

    def place(x, *spec):
        return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))

    leaf = Scaled(place(W.codes, "rows", "columns"), place(W.scale, None, "columns"))
    out = jax.jit(lift(lambda w, x: x @ w))(leaf, place(X, "rows"))
    close(out, X @ dense(W))
    assert len(out.sharding.device_set) == 6


def test_explicit_shardings():
    mesh = mesh_of((2, 2), ("rows", "columns"), AxisType.Explicit)
    with jax.set_mesh(mesh):
        x = jax.device_put(X, PartitionSpec("rows", None))
        columns = PartitionSpec(None, "columns")
        leaf = Scaled(jax.device_put(W.codes, columns), jax.device_put(W.scale, columns))
        out = jax.jit(lift(lambda w, x: jnp.tanh(x @ w)))(leaf, x)
        assert jax.typeof(out).sharding.spec == PartitionSpec("rows", "columns")
        close(jax.device_get(out), jax.device_get(jnp.tanh(X @ dense(W))))


def test_a_constraint_places_the_arrays_of_a_leaf():
    mesh = mesh_of((2, 2), ("rows", "columns"))
    kernel = NamedSharding(mesh, PartitionSpec("rows", "columns"))
    jaxpr = jax.make_jaxpr(lift(lambda w, x: x @ lax.with_sharding_constraint(w, kernel)))(W, X)
    placed = [e for e in jaxpr.eqns if e.primitive.name == "sharding_constraint"]
    assert [(e.invars[0].aval.dtype, e.params["sharding"].spec) for e in placed] == [
        (jnp.int8, PartitionSpec("rows", "columns")),
        (jnp.float32, PartitionSpec(None, "columns")),
    ]
    assert products(jaxpr) == [True]


def test_jit_with_shardings_is_jitted_again():
    mesh = mesh_of((2, 2), ("rows", "columns"))
    kernel = NamedSharding(mesh, PartitionSpec("rows", "columns"))
    result = NamedSharding(mesh, PartitionSpec(None, "columns"))
    inner = jax.jit(lambda x, w: x @ w, in_shardings=(None, kernel), out_shardings=result)
    lifted = lift(lambda w, x: inner(x, w))
    (again,) = jax.make_jaxpr(lifted)(W, X).eqns
    specs = [getattr(s, "spec", None) for s in again.params["in_shardings"]]
    assert specs == [None, PartitionSpec("rows", "columns"), PartitionSpec(None, "columns")]
    out = jax.jit(lifted)(W, X)
    assert out.sharding.is_equivalent_to(result, 2)
    close(out, X @ dense(W))


def test_export_for_any_batch_size():
    (batch,) = jax.export.symbolic_shape("batch")
    shape = jax.ShapeDtypeStruct((batch, 6), jnp.float32)
    exported = jax.export.export(jax.jit(lift(steps)), platforms=["cpu", "cuda", "tpu"])(W, shape)
    close(exported.call(W, X), steps(dense(W), X))
    close(exported.call(W, X[:3]), steps(dense(W), X[:3]))


def test_mutable_references():
    def function(w, x):
        total = jax.new_ref(jnp.zeros_like(x))

        def body(i, carry):
            total[...] += x @ w
            return carry

        lax.fori_loop(0, 3, body, 0)
        return total[...]

    close(jax.jit(lift(function))(W, X), 3 * X @ dense(W))


def test_names_of_what_a_rule_runs():
    def model(p, x):
        with jax.named_scope("block"):
            return x @ p

    leaf = LowRank(W, normal(1, 6, 2), normal(2, 2, 6))
    text = jax.jit(lift(model)).lower(leaf, X).compile().as_text()
    names = set(re.findall(r'op_name="jit\(model\)/([^"]*)/[^/"]*"', text))
    assert names == {"block"}
