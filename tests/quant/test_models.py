"""Models written in flax linen, flax nnx, equinox and haiku, untouched."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quant_reference import int8_products

import jopt
from jopt import trees
from jopt.quant import (
    FakeQuant,
    Int,
    QArray,
    Spec,
    calibrate,
    correct_biases,
    qat,
    quantize,
    smooth,
)
from jopt.trace import lift, sites

W8A8 = Spec(Int(8), Int(8))
X = jax.random.normal(jax.random.key(9), (4, 8))


def linen_mlp():
    linen = pytest.importorskip("flax.linen")

    class MLP(linen.Module):
        @linen.compact
        def __call__(self, x):
            x = linen.relu(linen.Dense(16)(x))
            return linen.Dense(3)(x)

    model = MLP()
    return model.apply, model.init(jax.random.key(0), X), X, 2


def linen_conv():
    linen = pytest.importorskip("flax.linen")

    class Net(linen.Module):
        @linen.compact
        def __call__(self, x):
            x = linen.relu(linen.Conv(6, (3, 3))(x))
            x = linen.relu(linen.Conv(6, (3, 3), feature_group_count=6)(x))
            return linen.Dense(3)(x.mean((1, 2)))

    model, x = Net(), jax.random.normal(jax.random.key(9), (2, 6, 6, 3))
    return model.apply, model.init(jax.random.key(0), x), x, 3


def linen_scan():
    linen = pytest.importorskip("flax.linen")

    class Block(linen.Module):
        @linen.compact
        def __call__(self, x, _):
            return x + linen.Dense(8)(linen.relu(linen.Dense(16)(x))), None

    class Net(linen.Module):
        @linen.compact
        def __call__(self, x):
            block = linen.remat(Block, prevent_cse=False)
            layers = linen.scan(
                block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3
            )
            return layers()(x, None)[0]

    model = Net()
    return model.apply, model.init(jax.random.key(0), X), X, 2


def linen_tied():
    linen = pytest.importorskip("flax.linen")

    class Net(linen.Module):
        @linen.compact
        def __call__(self, ids):
            embed = linen.Embed(11, 8)
            return embed.attend(linen.Dense(8)(embed(ids)))

    model, ids = Net(), jnp.array([[1, 2, 3], [4, 5, 10]])
    return model.apply, model.init(jax.random.key(0), ids), ids, 2


def nnx_mlp():
    nnx = pytest.importorskip("flax.nnx")

    class MLP(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Linear(8, 16, rngs=rngs)
            self.second = nnx.Linear(16, 3, rngs=rngs)

        def __call__(self, x):
            return self.second(nnx.relu(self.first(x)))

    graph, state = nnx.split(MLP(nnx.Rngs(0)))

    def apply(params, x):
        return nnx.merge(graph, nnx.State(params))(x)

    return apply, nnx.to_pure_dict(state), X, 2


def equinox_mlp():
    eqx = pytest.importorskip("equinox")
    model = eqx.nn.MLP(8, 3, 16, 1, key=jax.random.key(0))
    arrays, static = eqx.partition(model, eqx.is_array)

    def apply(params, x):
        return jax.vmap(eqx.combine(params, static))(x)

    return apply, arrays, X, 2


def haiku_mlp():
    hk = pytest.importorskip("haiku")
    model = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([16, 3])(x)))
    return model.apply, model.init(jax.random.key(0), X), X, 2


MODELS = [linen_mlp, linen_conv, linen_scan, linen_tied, nnx_mlp, equinox_mlp, haiku_mlp]


@pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)
def test_models_of_every_framework(make):
    apply, params, x, products = make()
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        wanted = apply(params, x)
        found = sites(apply, params, x)
        policy = [(tuple(dict.fromkeys(site.path for site in found)), W8A8)]
        stored = quantize(params, policy, sites=found)
        assert sum(isinstance(leaf, QArray) for _, leaf in trees.items(stored)) == products
        assert int8_products(lift(apply), stored, x) == products
        trained = qat(params, policy, sites=found)
        y, z = jax.jit(lambda *ps: [lift(apply)(p, x) for p in ps])(stored, trained)
        spread = np.abs(np.asarray(wanted)).max()
        assert np.abs(np.asarray(y) - wanted).max() < 0.03 * spread
        np.testing.assert_allclose(z, y, atol=1e-4 * spread, rtol=1e-4)
        grads = jax.jit(jax.grad(lambda p: jnp.sum(lift(apply)(p, x) ** 2)))(trained)
        leaves = [leaf for _, leaf in trees.items(grads) if isinstance(leaf, FakeQuant)]
        assert len(leaves) == products and all(np.any(np.asarray(g.weight)) for g in leaves)

        static = [(policy[0][0], Spec(Int(8), Int(8, symmetric=False), static=True))]
        filled, report = calibrate(apply, params, [(x,)], static, sites=found)
        assert [row.reason for row in report if row.weight] == [""] * products
        y = jax.jit(lift(apply))(filled, x)
        assert np.abs(np.asarray(y) - wanted).max() < 0.03 * spread
        np.testing.assert_array_equal(apply(params, x), wanted)  # and the float model is untouched


def test_a_module_that_holds_functions():
    eqx = pytest.importorskip("equinox")
    model = eqx.nn.MLP(8, 3, 16, 1, key=jax.random.key(0))

    def apply(model, x):
        return jax.vmap(model)(x)

    rounded, report = calibrate(apply, model, [X], [("**/weight", Int(4))], method="gptq")
    assert isinstance(rounded.layers[0].weight, QArray)
    assert [row.bits for row in report if "activation" in row.path] == [0, 0]
    assert np.all(np.isfinite(jopt.lift(apply)(rounded, X)))
    static = Spec(Int(8), Int(8), static=True)
    ranged, _ = calibrate(apply, model, [X], [("**/weight", static)])
    corrected, _ = correct_biases(apply, model, ranged, [X])
    assert corrected.activation is model.activation
    assert np.all(np.isfinite(jopt.lift(apply)(ranged, X)))
    smoothed, rows = smooth(apply, model, [X])
    assert len(rows) == 2 and smoothed.activation is model.activation
    np.testing.assert_allclose(jopt.lift(apply)(smoothed, X), apply(model, X), atol=1e-5)


@pytest.mark.parametrize("format", [Int(8), Int(4, granularity="group", group_size=4)], ids=str)
def test_weights_alone_in_a_scan(format):
    apply, params, x, _ = linen_scan()
    found = sites(apply, params, x)
    with jax.numpy_rank_promotion("allow"):
        stored = quantize(params, format, sites=found)
        dense = jax.tree.map(
            lambda leaf: leaf.materialise() if trees.is_typed(leaf) else leaf,
            stored,
            is_leaf=trees.is_typed,
        )
        y, z = jax.jit(lift(apply))(stored, x), jax.jit(apply)(dense, x)
        np.testing.assert_allclose(y, z, rtol=1e-5, atol=1e-5)
    assert jopt.size(stored).bits < 0.5 * jopt.size(params).bits
