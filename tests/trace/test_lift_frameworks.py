"""`lift` and `sites` over models of flax linen, flax nnx, equinox and haiku."""

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from toy_functions import close, normal
from toy_leaves import LowRank, Scaled, dense, products, scaled

from jopt import trees
from jopt.trace import lift, sites

KEY = jax.random.key(0)
X = normal(0, 2, 5, 8)


def quantized(apply, params, *inputs):
    """Every weight that only products read, as int8, its scale laid out by what they sum."""
    axes = {}
    for site in sites(apply, params, *inputs):
        if site.path is not None:
            axes.setdefault(site.path, set()).add(site.contracted)

    def convert(path, leaf):
        summed = axes.get(path, set())
        return scaled(leaf, *summed) if len(summed) == 1 and None not in summed else leaf

    return trees.map_with_path(convert, params)


class Block(nn.Module):
    """Attention and a gated unit, to be scanned."""

    @nn.compact
    def __call__(self, x, _):
        x = x + nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(x))
        h = nn.silu(nn.Dense(16)(x)) * nn.Dense(16)(x)
        return x + nn.Dense(8)(h), None


class Linen(nn.Module):
    """Scanned and checkpointed blocks, a recurrent layer and a tied embedding."""

    @nn.compact
    def __call__(self, tokens, train: bool):
        embed = nn.Embed(11, 8)
        x = embed(tokens)
        blocks = nn.scan(
            nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=2
        )
        x, _ = blocks()(x, None)
        x = nn.RNN(nn.LSTMCell(8))(x)
        return embed.attend(nn.Dropout(0.5, deterministic=not train)(x))


def linen():
    model, tokens = Linen(), jnp.arange(6).reshape(2, 3)
    params = jax.jit(model.init, static_argnums=2)(KEY, tokens, False)
    return lambda p, x: model.apply(p, x, train=False), params, tokens


def nnx_model():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.one, self.two = nnx.Linear(8, 16, rngs=rngs), nnx.Linear(16, 8, rngs=rngs)

        def __call__(self, x):
            return self.two(nnx.relu(self.one(x)))

    graph, state = nnx.split(Model(nnx.Rngs(0)))
    return lambda p, x: nnx.merge(graph, p)(x), state, X


def equinox():
    model = eqx.nn.MLP(8, 4, 16, 2, key=KEY)
    params, static = eqx.partition(model, eqx.is_array)
    return lambda p, x: jax.vmap(jax.vmap(eqx.combine(p, static)))(x), params, X


def haiku():
    def forward(x):
        x = hk.nets.MLP([16, 8])(x)
        core = hk.LSTM(8)
        return hk.dynamic_unroll(core, x, core.initial_state(x.shape[1]))[0]

    model = hk.without_apply_rng(hk.transform(forward))
    return model.apply, model.init(KEY, X), X


# int8 products, of how many; the products of activations alone stay as they are
MODELS = {linen: (16, 18), nnx_model: (2, 2), equinox: (3, 3), haiku: (3, 3)}


@pytest.mark.parametrize("make", MODELS)
def test_equals_the_dense_model_with_int8_in_its_products(make):
    apply, params, x = make()
    typed = quantized(apply, params, x)
    before = str(jax.make_jaxpr(apply)(params, x))
    found = products(jax.make_jaxpr(lift(apply))(typed, x))
    assert (sum(found), len(found)) == MODELS[make]
    close(jax.jit(lift(apply))(typed, x), jax.jit(apply)(dense(typed), x), 1e-4)
    assert str(jax.make_jaxpr(apply)(params, x)) == before


def test_a_whole_equinox_model_with_functions_among_its_leaves():
    model = eqx.nn.MLP(8, 4, 16, 2, key=KEY)
    kernel = scaled(model.layers[0].weight, (-1,))
    typed = eqx.tree_at(lambda m: m.layers[0].weight, model, kernel)
    close(lift(lambda m, x: m(x))(typed, X[0, 0]), dense(typed)(X[0, 0]))


def test_low_rank_adapters_train_over_an_int8_base():
    apply, params, x = nnx_model()
    base = quantized(apply, params, x)

    def adapted(adapters):
        pair = iter(adapters)

        def wrap(leaf):
            return LowRank(leaf, *next(pair)) if isinstance(leaf, Scaled) else leaf

        return jax.tree.map(wrap, base, is_leaf=lambda leaf: isinstance(leaf, Scaled))

    shapes = [leaf.shape for _, leaf in trees.items(base) if isinstance(leaf, Scaled)]
    adapters = [(normal(1, rows, 2), jnp.zeros((2, columns))) for rows, columns in shapes]
    assert sum(products(jax.make_jaxpr(lift(apply))(adapted(adapters), x))) == 2

    def loss(adapters):
        return jnp.mean((lift(apply)(adapted(adapters), x) - 1.0) ** 2)

    step = jax.jit(jax.value_and_grad(loss))
    values = []
    for _ in range(5):
        value, gradients = step(adapters)
        adapters = jax.tree.map(lambda p, g: p - 0.1 * g, adapters, gradients)
        values.append(float(value))
    assert values == sorted(values, reverse=True) and values[-1] < 0.9 * values[0]
