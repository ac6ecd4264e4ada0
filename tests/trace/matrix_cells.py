"""The operations of the matrix, written by hand on a dict of raw parameters.

Each framework's module holds these in its own way where it has no idiom of its own for one.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

BATCH, WIDTH = 8, 8


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def kernel(seed: int, *shape: int) -> jax.Array:
    return normal(seed, *shape) / np.sqrt(np.float32(shape[-2]))


def filled(shapes: Any) -> Any:
    """A tree of arrays from one of shapes: quicker than a framework's own initializers."""
    leaves, structure = jax.tree.flatten(shapes)
    drawn = [normal(i, *leaf.shape) * np.float32(0.4) for i, leaf in enumerate(leaves, 10)]
    return jax.tree.unflatten(structure, drawn)


class Cell(NamedTuple):
    """A function of one framework, and what lifting it is to give."""

    apply: Callable[..., Any]
    params: Any  # weights are the leaves of rank 2 or more that `WEIGHTS` matches
    x: jax.Array  # the leading axis is the batch, of `BATCH` examples
    int8: int = 1  # how many products of integers
    dense: str = ""  # the first operation that needs the weight as an array, if one does
    forward: bool = False  # differentiable forwards only


WEIGHTS = r"(.*/)?(w\w*|kernel|weight\w*|embeddings?)(/value)?"

X = normal(0, BATCH, WIDTH)
SEQUENCE = normal(1, BATCH, 4, WIDTH)
IMAGE = normal(2, BATCH, 5, 5, 4)
TOKENS = jnp.asarray(np.random.default_rng(3).integers(0, 11, (BATCH, 3)))

RAW: dict[str, Cell] = {}


def raw(x: jax.Array = X, **options: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers `function(p, x)`; its defaults are seeds and shapes that become parameters."""
    told = {name: options.pop(name) for name in ("int8", "dense", "forward") if name in options}

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        params = {n: kernel(i, *shape) for i, (n, shape) in enumerate(options.items(), 10)}
        RAW[function.__name__] = Cell(function, params, x, **told)
        return function

    return register


@raw(w=(8, 6), b=(1, 6))
def dense(p, x):
    return x @ p["w"] + p["b"]


def convolve(x, w, groups=1):
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(
        x, w, (2, 2), "SAME", dimension_numbers=numbers, feature_group_count=groups
    )


@raw(IMAGE, w=(3, 3, 4, 6))
def conv(p, x):
    return convolve(x, p["w"])


@raw(IMAGE, w_depthwise=(3, 3, 1, 4), w_grouped=(3, 3, 2, 6), int8=2)
def grouped_conv(p, x):
    return convolve(jax.nn.relu(convolve(x, p["w_depthwise"], 4)), p["w_grouped"], 2)


@raw(w=(8, 8))
def einsum_of_three(p, x):
    return jnp.einsum("bi,io,bo->b", x, p["w"], jnp.cos(x))


@raw(SEQUENCE, w=(4, 8, 6))
def tensordot(p, x):
    return jnp.tensordot(x, p["w"], 2)


@raw(w=(6, 8))
def transposed(p, x):
    return x @ p["w"].T


@raw(w=(6, 8))
def weight_on_the_left(p, x):
    return (p["w"] @ x.T).T


@raw(TOKENS, w=(11, 8))
def tied_embedding(p, x):
    return jnp.tanh(p["w"][x]) @ p["w"].T


def rotated(x):
    """Rotary position embedding of `[..., time, heads, size]`."""
    half = x.shape[-1] // 2
    angles = np.outer(np.arange(x.shape[-3]), 100.0 ** -(np.arange(half) / half))
    cos, sin = (jnp.asarray(f(angles), x.dtype)[:, None] for f in (np.cos, np.sin))
    cos, sin = (jnp.broadcast_to(a, (*x.shape[:-1], half)) for a in (cos, sin))
    left, right = x[..., :half], x[..., half:]
    return jnp.concatenate([left * cos - right * sin, left * sin + right * cos], -1)


def attended(q, k, v):
    """Attention with rotary positions; each group of query heads shares one of keys and values."""
    shared = q.shape[-2] // k.shape[-2]
    q = rotated(q).reshape(*q.shape[:-2], k.shape[-2], shared, q.shape[-1])
    scores = jnp.einsum("btgrd,bsgd->bgrts", q, rotated(k)) / np.float32(np.sqrt(q.shape[-1]))
    mixed = jnp.einsum("bgrts,bsgd->btgrd", jax.nn.softmax(scores), v)
    return mixed.reshape(*mixed.shape[:2], -1, mixed.shape[-1])


@raw(SEQUENCE, w_q=(8, 4, 4), w_k=(8, 2, 4), w_v=(8, 2, 4), w_out=(4, 4, 8), int8=4)
def attention(p, x):
    heads = [jnp.einsum("btc,chd->bthd", x, p[name]) for name in ("w_q", "w_k", "w_v")]
    return jnp.einsum("bthd,hdc->btc", attended(*heads), p["w_out"])


@raw(SEQUENCE, w_input=(8, 24), w_hidden=(6, 24), int8=2)
def lstm(p, x):
    def step(carry, x):
        h, c = carry
        i, f, g, o = jnp.split(x @ p["w_input"] + h @ p["w_hidden"], 4, -1)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (h, c), h

    zeros = jnp.zeros((x.shape[0], 6))
    return lax.scan(step, (zeros, zeros), x.swapaxes(0, 1))[1].swapaxes(0, 1)


@raw(w_in=(3, 8, 6), w_out=(3, 6, 8), int8=2)
def stacked_layers(p, x):
    @jax.checkpoint
    def layer(h, w):
        return h + jax.nn.gelu(h @ w["w_in"]) @ w["w_out"], None

    return lax.scan(layer, x, p)[0]


@raw(w_one=(8, 6), w_two=(6, 8), int8=2)
def branches(p, x):
    return lax.cond(x.sum() > 0, lambda x: x @ p["w_one"], lambda x: x @ p["w_two"].T, x)


@raw(w=(8, 8))
def fori(p, x):
    return lax.fori_loop(0, 3, lambda i, h: jnp.tanh(h @ p["w"]), x)


@raw(w=(8, 8), forward=True)
def while_loop(p, x):
    def body(carry):
        i, h = carry
        return i + 1, jnp.tanh(h @ p["w"])

    return lax.while_loop(lambda carry: carry[0] < 3, body, (0, x))[1]


@raw(w=(8, 6))
def vmap_data(p, x):
    return jax.vmap(lambda row: jnp.tanh(row @ p["w"]))(x)


@raw(w=(3, 8, 6))
def vmap_ensemble(p, x):
    return jax.vmap(lambda w: jnp.tanh(x @ w), out_axes=1)(p["w"])


@jax.custom_vjp
def doubled(x, w):
    return x @ w


def _doubled_backwards(saved, g):  # twice the derivative, on purpose
    x, w = saved
    return 2 * g @ w.T, 2 * x.T @ g


doubled.defvjp(lambda x, w: (x @ w, (x, w)), _doubled_backwards)


@raw(w=(8, 6), w_next=(6, 4), dense="custom_vjp_call")
def custom_vjp(p, x):
    return doubled(x, p["w"]) @ p["w_next"]


@jax.jit
def _helper(x, w):
    return jnp.tanh(x @ w)


@raw(w=(8, 8), w_same_shape=(8, 8), int8=3)
def jitted(p, x):
    return _helper(_helper(_helper(x, p["w"]), p["w_same_shape"]), p["w"])


@raw(w=(8, 6), mask=(8, 6), w_next=(6, 4), dense="mul")
def masked(p, x):
    return x @ (p["w"] * lax.stop_gradient((p["mask"] > 0).astype(x.dtype))) @ p["w_next"]


@raw(w=(8, 6), gain=(1, 6), w_next=(6, 4), dense="square")
def weight_norm(p, x):
    norm = jnp.sqrt(jnp.sum(jnp.square(p["w"]), 0, keepdims=True))
    return x @ (p["gain"] * p["w"] / norm) @ p["w_next"]


@raw(w=(8, 6), down=(8, 2), up=(2, 6), w_next=(6, 4), int8=2)
def lora_merge(p, x):
    return x @ (p["w"] + p["down"] @ p["up"]) @ p["w_next"]


def mixed(q, k, v):
    """Three projections as one result, so that each counts."""
    return jax.nn.softmax(q) * k + v


@raw(SEQUENCE, w=(8, 24), int8=3)
def qkv_split(p, x):
    return mixed(*(x @ part for part in jnp.split(p["w"], 3, axis=1)))


@raw(SEQUENCE, w=(8, 24))
def qkv_reshape(p, x):
    heads = jnp.einsum("btc,cnhd->nbthd", x, p["w"].reshape(8, 3, 2, 4))
    return mixed(*heads)


OPERATIONS = tuple(RAW)
