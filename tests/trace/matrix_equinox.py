"""The matrix in equinox."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from matrix_cells import IMAGE, RAW, SEQUENCE, TOKENS, Cell, X, attended, filled, mixed

MAKERS = {}


class Model(eqx.Module):
    layers: Any
    call: Callable[..., Any] = eqx.field(static=True)

    def __call__(self, x):
        return self.call(self.layers, x)


def made(make, x, *expected):
    shapes, static = eqx.partition(
        eqx.filter_eval_shape(make), lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct)
    )
    params = filled(shapes)
    return Cell(lambda params, x: eqx.combine(params, static)(x), params, x, *expected)


def held(cell):
    """The operation by hand, its parameters those of a module."""
    return cell._replace(apply=lambda model, x: model(x), params=Model(cell.params, cell.apply))


def idiom(x=X, *expected):
    """Registers `function(keys)`, which makes the layers and what calls them."""

    def register(function):
        def make():
            return Model(*function(iter(jax.random.split(jax.random.key(0), 8))))

        MAKERS[function.__name__] = lambda: made(make, x, *expected)
        return function

    return register


def each(layer, x):
    return jax.vmap(layer)(x)


@idiom()
def dense(keys):
    return eqx.nn.Linear(8, 6, key=next(keys)), each


def images(layers, x):
    return jax.vmap(layers)(jnp.moveaxis(x, -1, 1))


@idiom(IMAGE)
def conv(keys):
    return eqx.nn.Conv2d(4, 6, 3, stride=2, padding=1, key=next(keys)), images


@idiom(IMAGE, 2)
def grouped_conv(keys):
    one = eqx.nn.Conv2d(4, 4, 3, groups=4, key=next(keys))
    two = eqx.nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2, key=next(keys))
    return eqx.nn.Sequential([one, eqx.nn.Lambda(jax.nn.relu), two]), images


@idiom()
def weight_on_the_left(keys):
    return eqx.nn.Linear(8, 6, use_bias=False, key=next(keys)), lambda m, x: (m.weight @ x.T).T


@idiom(TOKENS)
def tied_embedding(keys):
    embed = eqx.nn.Embedding(11, 8, key=next(keys))
    table = eqx.nn.Linear(8, 11, use_bias=False, key=next(keys))
    both = (embed, table)
    shared = eqx.nn.Shared(both, lambda pair: pair[1].weight, lambda pair: pair[0].weight)

    def call(shared, x):
        embed, table = shared()
        return jax.vmap(jax.vmap(lambda token: table(jnp.tanh(embed(token)))))(x)

    return shared, call


@idiom(SEQUENCE, 4)
def attention(keys):
    sizes = {"q": (8, 16), "k": (8, 8), "v": (8, 8), "out": (16, 8)}
    layers = {
        name: eqx.nn.Linear(*size, use_bias=False, key=next(keys)) for name, size in sizes.items()
    }

    def call(layers, x):
        q, k, v = (jax.vmap(jax.vmap(layers[name]))(x) for name in "qkv")
        mixed = attended(*(a.reshape(*a.shape[:2], -1, 4) for a in (q, k, v)))
        return jax.vmap(jax.vmap(layers["out"]))(mixed.reshape(*mixed.shape[:2], -1))

    return layers, call


@idiom(SEQUENCE, 2)
def lstm(keys):
    def call(cell, x):
        def run(x):
            def step(carry, x):
                carry = cell(x, carry)
                return carry, carry[0]

            return lax.scan(step, (jnp.zeros(6), jnp.zeros(6)), x)[1]

        return jax.vmap(run)(x)

    return eqx.nn.LSTMCell(8, 6, key=next(keys)), call


@idiom(SEQUENCE, 2)
def stacked_layers(keys):
    @eqx.filter_vmap
    def layers(key):
        return eqx.nn.MLP(8, 8, 6, 1, jax.nn.gelu, key=key)

    def call(stacked, x):
        arrays, static = eqx.partition(stacked, eqx.is_array)

        @eqx.filter_checkpoint
        def step(h, arrays):
            return h + jax.vmap(jax.vmap(eqx.combine(arrays, static)))(h), None

        return lax.scan(step, x, arrays)[0]

    return layers(jax.random.split(next(keys), 3)), call


@idiom(X, 2)
def branches(keys):
    pair = (eqx.nn.Linear(8, 6, key=next(keys)), eqx.nn.Linear(8, 6, key=next(keys)))

    def call(pair, x):
        one, two = (jax.vmap(layer) for layer in pair)
        return lax.cond(x.sum() > 0, one, two, x)

    return pair, call


@idiom()
def fori(keys):
    def call(layer, x):
        return lax.fori_loop(0, 3, lambda i, h: jnp.tanh(jax.vmap(layer)(h)), x)

    return eqx.nn.Linear(8, 8, key=next(keys)), call


@idiom()
def while_loop(keys):  # one that is differentiable backwards
    def call(layer, x):
        def body(carry):
            return carry[0] + 1, jnp.tanh(jax.vmap(layer)(carry[1]))

        loop = eqx.internal.while_loop
        return loop(lambda c: c[0] < 3, body, (jnp.int32(0), x), max_steps=3, kind="bounded")[1]

    return eqx.nn.Linear(8, 8, key=next(keys)), call


@idiom()
def vmap_data(keys):
    call = eqx.filter_vmap(lambda layer, row: jnp.tanh(layer(row)), in_axes=(None, 0))
    return eqx.nn.Linear(8, 6, key=next(keys)), call


@idiom()
def vmap_ensemble(keys):
    layers = eqx.filter_vmap(lambda key: eqx.nn.Linear(8, 6, key=key))(
        jax.random.split(next(keys), 3)
    )
    call = eqx.filter_vmap(each, in_axes=(eqx.if_array(0), None), out_axes=1)
    return layers, call


@eqx.filter_custom_vjp
def doubled(pair):
    return each(*pair)


@doubled.def_fwd
def _(perturbed, pair):
    return doubled(pair), None


@doubled.def_bwd
def _(saved, g, perturbed, pair):  # twice the derivative, on purpose
    _, pullback = eqx.filter_vjp(each, *pair)
    return jax.tree.map(lambda a: 2 * a, pullback(g))


@idiom(X, 1, "custom_vjp_call")
def custom_vjp(keys):
    layers = (eqx.nn.Linear(8, 6, key=next(keys)), eqx.nn.Linear(6, 4, key=next(keys)))
    return layers, lambda layers, x: each(layers[1], doubled((layers[0], x)))


@eqx.filter_jit
def _helper(layer, x):
    return jnp.tanh(each(layer, x))


@idiom(X, 3)
def jitted(keys):
    pair = (eqx.nn.Linear(8, 8, key=next(keys)), eqx.nn.Linear(8, 8, key=next(keys)))
    return pair, lambda pair, x: _helper(pair[0], _helper(pair[1], _helper(pair[0], x)))


@idiom(X, 1, "mul")
def weight_norm(keys):
    one = eqx.nn.WeightNorm(eqx.nn.Linear(8, 6, key=next(keys)))
    layers = eqx.nn.Sequential([one, eqx.nn.Linear(6, 4, key=next(keys))])
    return layers, each


@idiom(SEQUENCE)
def qkv_split(keys):
    def call(layer, x):
        return mixed(*jnp.split(jax.vmap(jax.vmap(layer))(x), 3, -1))

    return eqx.nn.Linear(8, 24, key=next(keys)), call


for _name in RAW:
    MAKERS.setdefault(_name, lambda name=_name: held(RAW[name]))
