"""`shard_map` inside a lifted function: leaves split like their values, statistics over shards."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, PartitionSpec
from toy_functions import close, normal
from toy_leaves import Scaled, Watched, dense, products, scaled

from jopt import quant
from jopt.trace import Leaf, collect, explain, lift, rule, sites

W = scaled(normal(0, 6, 8))
X = normal(1, 8, 6)
P = PartitionSpec


def mesh_of(**sizes):
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), (AxisType.Auto,) * len(sizes))


def rows(p, x):
    """Data split over devices, weights whole."""
    body = jax.shard_map(
        lambda w, x: jnp.tanh(x @ w), mesh=mesh_of(d=4), in_specs=(P(), P("d")), out_specs=P("d")
    )
    return body(p["w"], x)


def summed(p, x):
    """The summed axis split: partial products are added up over devices."""
    body = jax.shard_map(
        lambda w, x: lax.psum(x @ w, "m"),
        mesh=mesh_of(d=4, m=2),
        in_specs=(P("m"), P("d", "m")),
        out_specs=P("d"),
    )
    return body(p["w"], x)


def columns(p, x):
    """Outputs split over two mesh axes at once."""
    body = jax.shard_map(
        lambda w, x: x @ w,
        mesh=mesh_of(a=2, b=4),
        in_specs=(P(None, ("a", "b")), P()),
        out_specs=P(None, ("a", "b")),
    )
    return body(p["w"], x)


def in_a_scan(p, x):
    def layer(h, w):
        return rows({"w": w}, h)[:, :6], None

    return lax.scan(layer, x, p["w"])[0]


CASES = [(rows, W), (summed, W), (columns, W), (in_a_scan, scaled(normal(2, 3, 6, 8)))]


@pytest.mark.parametrize(("function", "weight"), CASES)
def test_equals_the_dense_function_on_integers(function, weight):
    params = {"w": weight}
    close(jax.jit(lift(function))(params, X), jax.jit(function)(dense(params), X), 1e-5)
    assert products(jax.make_jaxpr(lift(function))(params, X)) == [True]


@pytest.mark.parametrize("function", [rows, summed, columns])
def test_derivatives(function):
    ours = jax.jit(jax.grad(lambda x: jnp.sum(lift(function)({"w": W}, x) ** 2)))(X)
    close(ours, jax.grad(lambda x: jnp.sum(function(dense({"w": W}), x) ** 2))(X), 1e-4)


def test_arrays_that_do_not_divide_make_the_leaf_dense():
    odd = Scaled(W.codes, jnp.repeat(jnp.ones((3, 8)), 1, 0))  # three groups over two shards
    with pytest.raises(ValueError, match="a `shard_map` splits an axis along which"):
        lift(summed)({"w": Grouped(odd.codes, odd.scale)}, X)
    (met,) = explain(summed, {"w": Grouped(odd.codes, odd.scale)}, X)
    assert met.refused and met.operation == "shard_map"
    with pytest.raises(ValueError, match=r"\(.*test_lift_shards\.py:[0-9:]+ \(summed"):
        lift(summed)({"w": Grouped(odd.codes, odd.scale)}, X)


@pytest.mark.parametrize("tiled", [True, False])
@pytest.mark.parametrize("checked", [True, False])
@pytest.mark.parametrize("group_size", [None, 4, 2])
def test_shards_are_gathered_as_codes(tiled, checked, group_size):
    """Weights split over the devices that hold them, whole only where they are used."""

    def layer(w, x):
        w = lax.all_gather(w, "d", tiled=tiled)
        return x @ w.reshape(16, 6)

    def apply(p, x):
        return jax.shard_map(
            layer,
            mesh=mesh_of(d=4),
            in_specs=(P("d"), P("d")),
            out_specs=P("d"),
            check_vma=checked,
        )(p["w"], x)

    how = "channel" if group_size is None else "group"
    form = quant.Int(8, granularity=how, group_size=group_size)
    params, x = {"w": normal(2, 16, 6)}, normal(3, 8, 16)
    leaves = quant.quantize(params, form, sites=sites(apply, params, x))
    shape = (1, 6) if group_size is None else (16 // group_size, 6)
    assert leaves["w"].scale.shape == shape
    close(jax.jit(lift(apply))(leaves, x), apply({"w": leaves["w"].materialise()}, x), 1e-5)
    text = jax.jit(lift(apply)).lower(leaves, x).as_text()
    gathered = re.findall(r'"stablehlo.all_gather".*-> tensor<[0-9x]*x(\w+)>', text)
    assert "i8" in gathered
    assert not any("16x6xf32" in line for line in text.splitlines() if "all_gather" in line)
    assert not any(met.dense for met in explain(apply, leaves, x))


class Grouped(Scaled):
    """Codes whose scale serves groups of rows."""

    def materialise(self):
        scale = jnp.repeat(self.scale, self.codes.shape[0] // self.scale.shape[0], 0)
        return self.codes.astype(scale.dtype) * scale


jax.tree_util.register_dataclass(Grouped, data_fields=["codes", "scale"], meta_fields=[])


@pytest.mark.parametrize("function", [rows, summed, columns])
def test_statistics_are_those_of_all_shards(function):
    leaf = Watched(dense(W), "w")
    _, stats = jax.jit(collect(function))({"w": leaf}, X)
    np.testing.assert_allclose(stats["w"]["low"].value, X.min(), rtol=1e-6)
    np.testing.assert_allclose(stats["w"]["high"].value, X.max(), rtol=1e-6)


def test_a_sum_needs_to_know_where_values_differ():
    def unchecked(p, x):
        return jax.shard_map(
            jnp.matmul, mesh=mesh_of(d=4), in_specs=(P("d"), P()), out_specs=P("d"), check_vma=False
        )(x, p)

    close(lift(unchecked)(W, X), X @ dense(W))
    with pytest.raises(ValueError, match="`check_vma=False`, which does not know"):
        collect(unchecked)(Watched(dense(W), "w"), X)


def test_a_leaf_with_an_axis_of_its_own_is_not_split_along_it():
    """A low-rank factor `[rank, out]` has the value's rank, but its first axis is no input."""
    factors = Factors(normal(0, 8, 4), normal(1, 4, 8))
    mesh = jax.make_mesh((2, 2), ("d", "e"), axis_types=(AxisType.Auto,) * 2)

    def product(w, x):
        return lax.psum(x @ w, "d")

    sharded = jax.shard_map(
        product,
        mesh=mesh,
        in_specs=(PartitionSpec("d", "e"), PartitionSpec(None, "d")),
        out_specs=PartitionSpec(None, "e"),
    )
    x = normal(2, 3, 8)
    with pytest.raises(ValueError, match="a `shard_map` splits an axis along which"):
        lift(sharded)(factors, x)
    found = lift(sharded, allow_dense=True)(factors, x)
    np.testing.assert_allclose(found, x @ factors.materialise(), 1e-4, 1e-4)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["down", "up"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Factors(Leaf):
    down: jax.Array
    up: jax.Array

    def materialise(self):
        return self.down @ self.up


@rule(lax.dot_general_p, Factors)
def _thin(call, x, w):
    last = (((x.ndim - 1,), (0,)), ((), ()))
    return lax.dot_general(lax.dot_general(x, w.down, last), w.up, last)
