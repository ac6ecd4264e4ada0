"""The matrix in haiku."""

import haiku as hk
import jax
import jax.numpy as jnp
from matrix_cells import (
    BATCH,
    IMAGE,
    RAW,
    SEQUENCE,
    TOKENS,
    Cell,
    X,
    attended,
    doubled,
    filled,
    mixed,
)

MAKERS = {}


def made(function, x, *expected):
    model = hk.without_apply_rng(hk.transform(function))
    params = filled(jax.eval_shape(model.init, jax.random.key(0), x))
    return Cell(model.apply, params, x, *expected)


def held(cell):
    """The operation by hand, its parameters those of a module."""

    class Held(hk.Module):
        def __call__(self, x):
            def parameter(name):
                value = cell.params[name]
                return hk.get_parameter(name, value.shape, init=lambda *_: value)

            return cell.apply({name: parameter(name) for name in cell.params}, x)

    model = hk.without_apply_rng(hk.transform(lambda x: Held()(x)))
    return cell._replace(apply=model.apply, params={"held": cell.params})


def idiom(x=X, *expected):
    """Registers a function that is transformed."""

    def register(function):
        MAKERS[function.__name__] = lambda: made(function, x, *expected)
        return function

    return register


@idiom()
def dense(x):
    return hk.Linear(6)(x)


@idiom(IMAGE)
def conv(x):
    return hk.Conv2D(6, 3, stride=2)(x)


@idiom(IMAGE, 2)
def grouped_conv(x):
    x = jax.nn.relu(hk.DepthwiseConv2D(1, 3)(x))
    return hk.Conv2D(6, 3, feature_group_count=2)(x)


@idiom(TOKENS)
def tied_embedding(x):
    embed = hk.Embed(11, 8)
    return jnp.tanh(embed(x)) @ embed.embeddings.T


@idiom(SEQUENCE, 4)
def attention(x):
    def projected(heads):
        return hk.Linear(4 * heads, with_bias=False)(x).reshape(*x.shape[:2], heads, 4)

    mixed = attended(projected(4), projected(2), projected(2))
    return hk.Linear(8)(mixed.reshape(*x.shape[:2], -1))


@idiom(SEQUENCE)
def lstm(x):
    core = hk.LSTM(6)
    return hk.dynamic_unroll(core, x, core.initial_state(BATCH), time_major=False)[0]


@idiom(SEQUENCE, 2)
def stacked_layers(x):
    @hk.layer_stack(3)
    @hk.remat
    def layers(h):
        return h + hk.Linear(8)(jax.nn.gelu(hk.Linear(6)(h)))

    return layers(x)


@idiom(X, 2)
def branches(x):
    one, two = hk.Linear(6, name="one"), hk.Linear(6, name="two")
    if hk.running_init():
        return one(x) + two(x)
    return hk.cond(x.sum() > 0, one, two, x)


@idiom()
def fori(x):
    layer = hk.Linear(8)
    if hk.running_init():
        return layer(x)
    return hk.fori_loop(0, 3, lambda i, h: jnp.tanh(layer(h)), x)


@idiom(X, 1, "", True)
def while_loop(x):
    layer = hk.Linear(8)
    if hk.running_init():
        return layer(x)

    def body(carry):
        return carry[0] + 1, jnp.tanh(layer(carry[1]))

    return hk.while_loop(lambda carry: carry[0] < 3, body, (0, x))[1]


@idiom()
def vmap_data(x):
    return hk.vmap(hk.Linear(6), split_rng=False)(x)


@idiom()
def vmap_ensemble(x):
    w = hk.get_parameter("w", (3, 8, 6), init=hk.initializers.RandomNormal())
    return hk.vmap(lambda w: jnp.tanh(x @ w), out_axes=1, split_rng=False)(w)


@idiom(X, 1, "custom_vjp_call")
def custom_vjp(x):
    w = hk.get_parameter("w", (8, 6), init=hk.initializers.RandomNormal())
    return hk.Linear(4)(doubled(x, w))


_jitted = jax.jit(hk.without_apply_rng(hk.transform(lambda x: jnp.tanh(hk.Linear(8)(x)))).apply)


@idiom(X, 3)
def jitted(x):
    init = hk.transform(lambda x: hk.Linear(8)(x)).init
    key = hk.next_rng_key() if hk.running_init() else None
    one, two = (hk.lift(init, name=name)(key, x) for name in ("one", "same_shape"))
    return _jitted(one, _jitted(two, _jitted(one, x)))


@idiom(SEQUENCE)
def qkv_split(x):
    return mixed(*jnp.split(hk.Linear(24)(x), 3, -1))


@idiom(SEQUENCE)
def qkv_reshape(x):
    heads = hk.Linear(24)(x).reshape(BATCH, -1, 3, 2, 4)
    return mixed(*jnp.moveaxis(heads, 2, 0))


for _name in RAW:
    MAKERS.setdefault(_name, lambda name=_name: held(RAW[name]))
