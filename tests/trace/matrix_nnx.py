"""The matrix in flax nnx."""

import jax
import jax.numpy as jnp
from flax import nnx
from matrix_cells import IMAGE, RAW, SEQUENCE, TOKENS, Cell, X, filled, mixed, rotated

MAKERS = {}


def made(make, x, *expected, concrete=False):
    """Parameters are those of `nnx.Param`; a module that holds more is made for real."""
    model = make() if concrete else nnx.eval_shape(make)
    graph, shapes, rest = nnx.split(model, nnx.Param, ...)

    def apply(params, x):  # a copy, since `nnx.WeightNorm` writes to its layer
        return nnx.merge(graph, params, rest, copy=True)(x)

    return Cell(apply, filled(shapes), x, *expected)


def held(cell):
    """The operation by hand, its parameters those of a module."""

    class Held(nnx.Module):
        def __init__(self):
            for name, value in cell.params.items():
                setattr(self, name, nnx.Param(value))

        def __call__(self, x):
            return cell.apply({name: getattr(self, name)[...] for name in cell.params}, x)

    graph, state = nnx.split(Held())
    return cell._replace(apply=lambda state, x: nnx.merge(graph, state)(x), params=state)


def idiom(x=X, *expected, concrete=False):
    """Registers `function(rngs)`, which makes the layers and what calls them."""

    def register(function):
        class Model(nnx.Module):
            def __init__(self):
                self.layers, self.call = function(nnx.Rngs(0))

            def __call__(self, x):
                return self.call(self.layers, x)

        MAKERS[function.__name__] = lambda: made(Model, x, *expected, concrete=concrete)
        return function

    return register


@idiom()
def dense(rngs):
    return nnx.Linear(8, 6, rngs=rngs), lambda layer, x: layer(x)


@idiom(IMAGE)
def conv(rngs):
    return nnx.Conv(4, 6, (3, 3), strides=2, rngs=rngs), lambda layer, x: layer(x)


@idiom(IMAGE, 2)
def grouped_conv(rngs):
    one = nnx.Conv(4, 4, (3, 3), feature_group_count=4, rngs=rngs)
    two = nnx.Conv(4, 6, (3, 3), feature_group_count=2, padding=1, input_dilation=2, rngs=rngs)
    return nnx.Sequential(one, nnx.relu, two), lambda layers, x: layers(x)


@idiom(SEQUENCE)
def tensordot(rngs):
    layer = nnx.LinearGeneral((4, 8), (2, 3), axis=(-2, -1), rngs=rngs)
    return layer, lambda layer, x: layer(x)


@idiom(TOKENS)
def tied_embedding(rngs):
    return nnx.Embed(11, 8, rngs=rngs), lambda embed, x: embed.attend(jnp.tanh(embed(x)))


@idiom(SEQUENCE, 4)
def attention(rngs):
    def grouped(q, k, v, **_):
        return jax.nn.dot_product_attention(rotated(q), rotated(k), v)

    layer = nnx.MultiHeadAttention(
        4, 8, 16, num_kv_heads=2, decode=False, attention_fn=grouped, rngs=rngs
    )
    return layer, lambda layer, x: layer(x)


@idiom(SEQUENCE, 8, concrete=True)
def lstm(rngs):
    return nnx.RNN(nnx.LSTMCell(8, 6, rngs=rngs)), lambda layer, x: layer(x)


class Layer(nnx.Module):
    def __init__(self, rngs):
        self.one, self.two = nnx.Linear(8, 6, rngs=rngs), nnx.Linear(6, 8, rngs=rngs)

    def __call__(self, h):
        return h + self.two(nnx.gelu(self.one(h)))


@idiom(SEQUENCE, 2)
def stacked_layers(rngs):
    layers = nnx.split_rngs(splits=3)(nnx.vmap(Layer))(rngs)
    step = nnx.remat(lambda h, layer: layer(h))
    scan = nnx.scan(step, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    return layers, lambda layers, x: scan(x, layers)


@idiom(X, 2)
def branches(rngs):
    layers = nnx.List([nnx.Linear(8, 6, rngs=rngs), nnx.Linear(8, 6, rngs=rngs)])

    def call(layers, x):
        return nnx.cond(x.sum() > 0, lambda m, x: m[0](x), lambda m, x: m[1](x), layers, x)

    return layers, call


@idiom()
def fori(rngs):
    def call(layer, x):
        def step(_, carry):
            layer, h = carry
            return layer, jnp.tanh(layer(h))

        return nnx.fori_loop(0, 3, step, (layer, x))[1]

    return nnx.Linear(8, 8, rngs=rngs), call


@idiom(X, 1, "", True)
def while_loop(rngs):
    def call(layer, x):
        def step(carry):
            i, layer, h = carry
            return i + 1, layer, jnp.tanh(layer(h))

        return nnx.while_loop(lambda carry: carry[0] < 3, step, (jnp.int32(0), layer, x))[2]

    return nnx.Linear(8, 8, rngs=rngs), call


@idiom()
def vmap_data(rngs):
    call = nnx.vmap(lambda layer, row: jnp.tanh(layer(row)), in_axes=(None, 0))
    return nnx.Linear(8, 6, rngs=rngs), call


@idiom()
def vmap_ensemble(rngs):
    make = nnx.vmap(lambda rngs: nnx.Linear(8, 6, rngs=rngs))
    layers = nnx.split_rngs(splits=3)(make)(rngs)
    return layers, nnx.vmap(lambda layer, x: layer(x), in_axes=(0, None), out_axes=1)


@nnx.custom_vjp
def doubled(layer, x):
    return layer(x)


def _backwards(saved, g):  # twice the derivative, on purpose
    layer, x = saved
    (updates, _), g = g
    updates = jax.tree.map(lambda a: a, updates)
    updates["kernel"][...] = 2 * x.T @ g
    updates["bias"][...] = 2 * g.sum(0)
    return updates, 2 * g @ layer.kernel[...].T


doubled.defvjp(lambda layer, x: (doubled(layer, x), (layer, x)), _backwards)


@idiom(X, 1, "custom_vjp_call")
def custom_vjp(rngs):
    layers = nnx.List([nnx.Linear(8, 6, rngs=rngs), nnx.Linear(6, 4, rngs=rngs)])
    return layers, lambda layers, x: layers[1](doubled(layers[0], x))


@nnx.jit
def _helper(layer, x):
    return jnp.tanh(layer(x))


@idiom(X, 3)
def jitted(rngs):
    layers = nnx.List([nnx.Linear(8, 8, rngs=rngs), nnx.Linear(8, 8, rngs=rngs)])

    def call(layers, x):
        return _helper(layers[0], _helper(layers[1], _helper(layers[0], x)))

    return layers, call


@idiom(X, 1, "mul", concrete=True)
def weight_norm(rngs):
    one = nnx.WeightNorm(nnx.Linear(8, 6, rngs=rngs), rngs=rngs)
    return nnx.Sequential(one, nnx.Linear(6, 4, rngs=rngs)), lambda layers, x: layers(x)


@idiom(SEQUENCE)
def qkv_split(rngs):
    def call(layer, x):
        return mixed(*jnp.split(layer(x), 3, -1))

    return nnx.Linear(8, 24, rngs=rngs), call


@idiom(SEQUENCE)
def qkv_reshape(rngs):
    layer = nnx.LinearGeneral(8, (3, 2, 4), rngs=rngs)
    return layer, lambda layer, x: mixed(*jnp.moveaxis(layer(x), 2, 0))


for _name in RAW:
    MAKERS.setdefault(_name, lambda name=_name: held(RAW[name]))
