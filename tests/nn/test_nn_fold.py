"""Folding batch norm: the function stays, the weight takes the scales, in any framework."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen

from jopt import nn


def shaken(tree, seed=0):
    """Statistics and scales that differ from channel to channel, some scales negative or zero."""
    rng = np.random.default_rng(seed)

    def shake(path, leaf):
        name = jax.tree_util.keystr(path)
        if "var" in name:
            return jnp.asarray(rng.uniform(0.1, 4, leaf.shape), leaf.dtype)
        if leaf.ndim == 1:
            values = rng.normal(size=leaf.shape)
            values[0] = 0
            return jnp.asarray(values, leaf.dtype)
        return leaf

    return jax.tree_util.tree_map_with_path(shake, tree)


def same(apply, old, new, x, rtol=1e-4):
    wanted = np.asarray(jax.jit(apply)(old, x))
    got = np.asarray(jax.jit(apply)(new, x))
    np.testing.assert_allclose(got, wanted, rtol=rtol, atol=rtol * np.abs(wanted).max())


def test_the_convolutional_network():
    net = nn.ConvNet(widths=(4, 6), hidden=8)
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
    variables = shaken(net.init(jax.random.key(1), x))
    new, report = nn.fold_batch_norm(net.apply, variables, x)
    same(net.apply, variables, new, x)
    assert [row.reason for row in report] == [""] * 3
    assert report[0].path == "params/Conv_0/kernel"
    norm, old = new["params"]["BatchNorm_0"], variables["params"]["BatchNorm_0"]
    stats = variables["batch_stats"]["BatchNorm_0"]
    factor = np.asarray(old["scale"], np.float64) / np.sqrt(np.asarray(stats["var"]) + 1e-5)
    np.testing.assert_allclose(
        new["params"]["Conv_0"]["kernel"],
        np.asarray(variables["params"]["Conv_0"]["kernel"]) * factor,
        1e-5,
    )
    np.testing.assert_allclose(
        norm["bias"],
        np.asarray(old["bias"]) - np.asarray(stats["mean"]) * factor,
        rtol=1e-4,
        atol=1e-5,
    )
    np.testing.assert_array_equal(new["batch_stats"]["BatchNorm_0"]["mean"], 0)
    assert jax.tree.structure(new) == jax.tree.structure(variables)
    again, report = nn.fold_batch_norm(net.apply, new, x)
    assert {row.reason for row in report} == {"its factors are 1 already"}
    jax.tree.map(np.testing.assert_array_equal, again, new)
    with jax.numpy_rank_promotion("allow"):  # shapes will do for inputs
        shapes, _ = nn.fold_batch_norm(net.apply, variables, jax.ShapeDtypeStruct(x.shape, x.dtype))
    jax.tree.map(np.testing.assert_array_equal, shapes, new)


@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["dense", "conv", "depthwise", "heads"])
def test_every_kind_of_norm(kind, scale, bias):
    class Net(linen.Module):
        @linen.compact
        def __call__(self, x):
            if kind == "dense":
                x = linen.Dense(5)(x)
            elif kind == "conv":
                x = linen.Conv(5, (2, 2), strides=2)(x)
            elif kind == "depthwise":
                x = linen.Conv(4, (3, 3), feature_group_count=4)(x)
            else:
                x = linen.DenseGeneral((2, 3))(x).reshape(*x.shape[:-1], 6)
            norm = linen.BatchNorm(
                use_running_average=True, use_scale=scale, use_bias=bias, epsilon=1e-3
            )
            return jnp.tanh(norm(x))

    net = Net()
    x = jax.random.normal(jax.random.key(0), (2, 6, 6, 4))
    variables = shaken(net.init(jax.random.key(1), x))
    if kind == "heads" and scale:  # a zero scale, too
        variables["params"]["BatchNorm_0"]["scale"] = jnp.array([1.0, 2, 0, -1, 0.1, 3])
    new, (row,) = nn.fold_batch_norm(net.apply, variables, x)
    same(net.apply, variables, new, x)
    assert row.reason == "" and len(row.changed) >= 2
    weight = row.path.split("/")[1]
    assert not np.allclose(new["params"][weight]["kernel"], variables["params"][weight]["kernel"])


def plain(params, x, repeat=1):
    for _ in range(repeat):
        y = x @ params["w"]
        y = (y - params["mean"][None]) / jnp.sqrt(params["var"] + 1e-3)[None]
        x = jax.nn.relu(y * params["scale"][None] + params["bias"][None])
    return x


def plain_case(layers=()):
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=(*layers, *shape)), jnp.float32)

    params = {name: normal(6) for name in ("mean", "scale", "bias")}
    params |= {"w": normal(6, 6), "var": jnp.square(normal(6))}
    return params, jnp.asarray(rng.normal(size=(3, 6)), jnp.float32)


def test_a_plain_function():
    params, x = plain_case()
    new, (row,) = nn.fold_batch_norm(plain, params, x)
    same(plain, params, new, x)
    assert row.path == "w" and set(row.changed) == {"mean", "scale", "bias"}
    jitted = jax.jit(lambda p, x: jax.checkpoint(plain)(p, x))
    other, _ = nn.fold_batch_norm(jitted, params, x)
    jax.tree.map(np.testing.assert_array_equal, other, new)


def test_stacked_layers():
    params, x = plain_case((3,))

    def scanned(params, x):
        return jax.lax.scan(lambda x, p: (plain(p, x), None), x, params)[0]

    new, (row,) = nn.fold_batch_norm(scanned, params, x)
    assert row.reason == ""
    same(scanned, params, new, x, rtol=1e-3)
    one, _ = nn.fold_batch_norm(plain, jax.tree.map(lambda a: a[1], params), x)
    np.testing.assert_allclose(new["w"][1], one["w"], rtol=1e-5)
    np.testing.assert_allclose(new["bias"][1], one["bias"], rtol=1e-4, atol=1e-5)


def test_equinox():
    eqx = pytest.importorskip("equinox")
    linear = eqx.nn.Linear(4, 5, key=jax.random.key(0))
    norm = eqx.nn.LayerNorm(5)  # only its structure: scale and bias; the statistics are ours
    stats = {"mean": jnp.arange(5.0), "var": jnp.linspace(0.5, 3, 5)}
    arrays, rest = eqx.partition((linear, norm, stats), eqx.is_array)

    def apply(arrays, x):
        linear, norm, stats = eqx.combine(arrays, rest)

        def one(x):
            y = (linear(x) - stats["mean"]) * jax.lax.rsqrt(stats["var"] + 1e-5)
            return y * norm.weight + norm.bias

        return jax.vmap(one)(x)

    x = jax.random.normal(jax.random.key(1), (3, 4))
    new, (row,) = nn.fold_batch_norm(apply, arrays, x)
    assert row.reason == "" and row.path.endswith("weight")
    same(apply, arrays, new, x)


def test_what_cannot_be_folded_says_why():
    params, x = plain_case()
    twice, (row, *_) = nn.fold_batch_norm(lambda p, x: plain(p, x, 2), params, x)
    assert row.reason == "the weight is used elsewhere as well"
    jax.tree.map(np.testing.assert_array_equal, twice, params)

    def exposed(params, x):  # the scale is needed by someone else
        return plain(params, x), params["scale"], params["var"]

    _, (row,) = nn.fold_batch_norm(exposed, params, x)
    assert row.reason == "no scale or variance of its own makes the factor 1"
    frozen = {"w": params["w"], "scale": params["scale"], "var": params["var"]}
    _, (row,) = nn.fold_batch_norm(
        lambda p, x: (x @ p["w"]) * p["scale"][None] * (p["var"] + 1)[None], frozen, x
    )
    assert row.reason == "no mean or bias of its own takes the summand up"
    shared, _ = plain_case((3,))
    shared["scale"] = shared["scale"][0]

    def scanned(params, x):
        scale = params.pop("scale")
        return jax.lax.scan(lambda x, p: (plain({**p, "scale": scale}, x), None), x, params)[0]

    _, (row,) = nn.fold_batch_norm(lambda p, x: scanned(dict(p), x), shared, x)
    assert row.reason == "the layers of a scan share the norm, or the weight"

    def normed(p, y):
        return (y - p["mean"][None]) / jnp.sqrt(p["var"] + 1e-3)[None] * p["scale"][None]

    for apply in (
        lambda p, x: x @ p["w"],
        lambda p, x: normed(p, jax.nn.relu(x @ p["w"])),
        lambda p, x: normed(p, x) @ p["w"],
        lambda p, x: normed(p, y := x @ p["w"]) + y,
    ):
        with pytest.raises(ValueError, match=r"(?s)found no product that a norm.*read elsewhere"):
            nn.fold_batch_norm(apply, params, x)
