"""The matrix in flax linen."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from matrix_cells import IMAGE, RAW, SEQUENCE, TOKENS, Cell, X, attended, filled, mixed

MAKERS = {}


def held(cell):
    """The operation by hand, its parameters those of a module."""

    class Held(nn.Module):
        @nn.compact
        def __call__(self, x):
            names = cell.params
            return cell.apply({n: self.param(n, lambda _, n=n: names[n]) for n in names}, x)

    return cell._replace(apply=Held().apply, params={"params": cell.params})


def made(model, x, *expected):
    params = filled(jax.eval_shape(model.init, jax.random.key(0), x))
    return Cell(model.apply, params, x, *expected)


def idiom(x=X, *expected):
    """Registers a compact `__call__` under the name of its operation."""

    def register(function):
        module = type(function.__name__, (nn.Module,), {"__call__": nn.compact(function)})
        MAKERS[function.__name__] = lambda: made(module(), x, *expected)
        return function

    return register


@idiom()
def dense(self, x):
    return nn.Dense(6)(x)


@idiom(IMAGE)
def conv(self, x):
    return nn.Conv(6, (3, 3), strides=2)(x)


@idiom(IMAGE, 2)
def grouped_conv(self, x):
    x = nn.relu(nn.Conv(4, (3, 3), feature_group_count=4)(x))
    return nn.Conv(6, (3, 3), feature_group_count=2, kernel_dilation=2)(x)


@idiom(SEQUENCE)
def tensordot(self, x):
    return nn.DenseGeneral((2, 3), axis=(-2, -1))(x)


@idiom(TOKENS)
def tied_embedding(self, x):
    embed = nn.Embed(11, 8)
    return embed.attend(jnp.tanh(embed(x)))


@idiom(SEQUENCE, 4)
def attention(self, x):
    q, k, v = (nn.DenseGeneral((heads, 4))(x) for heads in (4, 2, 2))
    return nn.DenseGeneral(8, axis=(-2, -1))(attended(q, k, v))


@idiom(SEQUENCE, 2)
def lstm(self, x):
    return nn.RNN(nn.OptimizedLSTMCell(6))(x)


class Layer(nn.Module):
    @nn.compact
    def __call__(self, h, _):
        return h + nn.Dense(8)(nn.gelu(nn.Dense(6)(h))), None


@idiom(SEQUENCE, 2)
def stacked_layers(self, x):
    layers = nn.scan(
        nn.remat(Layer), variable_axes={"params": 0}, split_rngs={"params": True}, length=3
    )
    return layers()(x, None)[0]


class Two(nn.Module):
    def setup(self):
        self.one, self.two = nn.Dense(8), nn.Dense(8)

    def __call__(self, x):
        if self.is_initializing():
            self.two(x)
            return self.one(x)
        return nn.cond(x.sum() > 0, lambda m, x: m.one(x), lambda m, x: m.two(x), self, x)


MAKERS["branches"] = lambda: made(Two(), X, 2)


@idiom()
def fori(self, x):
    step = nn.scan(
        lambda dense, h, _: (jnp.tanh(dense(h)), None),
        variable_broadcast="params",
        split_rngs={"params": False},
        length=3,
    )
    return step(nn.Dense(8), x, None)[0]


@idiom(X, 1, "", True)
def while_loop(self, x):
    layer = nn.Dense(8)
    if self.is_initializing():
        return layer(x)

    def body(layer, carry):
        return carry[0] + 1, jnp.tanh(layer(carry[1]))

    return nn.while_loop(lambda _, carry: carry[0] < 3, body, layer, (0, x))[1]


def vmapped(size, axis, inputs):
    return nn.vmap(
        nn.Dense,
        in_axes=inputs,
        out_axes=1 if size else 0,
        axis_size=size,
        variable_axes={"params": axis},
        split_rngs={"params": axis is not None},
    )


@idiom()
def vmap_data(self, x):
    return vmapped(None, None, 0)(6)(x)


@idiom()
def vmap_ensemble(self, x):
    return vmapped(3, 0, None)(6)(x)


@idiom(X, 1, "custom_vjp_call")
def custom_vjp(self, x):
    def call(layer, x):
        return layer(x)

    def backwards(pullback, g):
        return jax.tree.map(lambda a: 2 * a, pullback(g))

    doubled = nn.custom_vjp(call, forward_fn=functools.partial(nn.vjp, call), backward_fn=backwards)
    return nn.Dense(4)(doubled(nn.Dense(6), x))


@idiom(X, 3)
def jitted(self, x):
    layer = nn.jit(nn.Dense)(8, name="one")
    return layer(jnp.tanh(nn.jit(nn.Dense)(8, name="same_shape")(jnp.tanh(layer(x)))))


@idiom(X, 1, "mul")
def weight_norm(self, x):
    return nn.Dense(4)(nn.WeightNorm(nn.Dense(6))(x))


@idiom(SEQUENCE)
def qkv_split(self, x):
    return mixed(*jnp.split(nn.Dense(24)(x), 3, -1))


@idiom(SEQUENCE)
def qkv_reshape(self, x):
    return mixed(*jnp.moveaxis(nn.DenseGeneral((3, 2, 4))(x), 2, 0))


for _name in RAW:
    MAKERS.setdefault(_name, lambda name=_name: held(RAW[name]))
