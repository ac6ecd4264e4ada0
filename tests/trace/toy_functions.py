"""A table of functions for the tests of `lift`, each with typed parameters and what to expect."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from toy_leaves import LowRank, scaled


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


W = scaled(normal(0, 6, 6))
ROWS = scaled(normal(1, 6, 6), (-1,))  # one scale a row: (out, in) kernels, embeddings
STACK = scaled(normal(2, 3, 6, 6))
X = normal(3, 4, 6)

CELLS = {}  # name -> (function, params, x, int8 products of how many, allow_dense)


def cell(params, x=X, int8=(1, 1), allow_dense=False):
    def register(function):
        CELLS[function.__name__] = (function, params, x, int8, allow_dense)
        return function

    return register


@cell({"w": W, "b": normal(4, 6)})
def linear(p, x):
    return x @ p["w"] + p["b"][None]


@cell({"w": ROWS})
def transposed(p, x):
    return x @ p["w"].T


@cell({"w": ROWS})
def weight_on_the_left(p, x):
    return p["w"] @ x.T


@cell({"w": W}, int8=(1, 2))
def einsum_of_three(p, x):
    return jnp.einsum("bi,io,bo->b", x, p["w"], x)


@cell({"w": scaled(normal(5, 6, 2, 3), (0,))})
def einsum_heads(p, x):
    return jnp.einsum("bi,ihd->bhd", x, p["w"])


@cell({"w": scaled(normal(6, 2, 3, 6), (0, 1))})
def einsum_merged(p, x):
    return jnp.einsum("bhd,hdo->bo", x.reshape(4, 2, 3), p["w"])


@cell({"w": W})
def tensordot(p, x):
    return jnp.tensordot(x, p["w"], 1)


@cell({"w": W})
def weight_in_parts(p, x):
    return x @ p["w"][:, :4]


@cell({"e": ROWS}, x=jnp.array([[0, 2], [5, 1]]))
def tied_embedding(p, x):
    return jnp.tanh(p["e"][x]) @ p["e"].T


@cell({"w": W}, int8=(2, 2))
def jitted_helper(p, x):
    return _helper(_helper(x, p["w"]), p["w"])


@jax.jit
def _helper(x, w):
    return jnp.tanh(x @ w)


@cell({"w": STACK})
def scan_over_layers(p, x):
    return lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["w"])[0]


@cell({"w": STACK})
def scan_remat(p, x):
    body = jax.checkpoint(lambda h, w: (jax.nn.gelu(h @ w), h.sum()))
    return lax.scan(body, x, p["w"], reverse=True, unroll=2)


@cell({"i": W, "h": W}, x=normal(7, 5, 4, 6), int8=(2, 2))
def recurrence(p, x):
    def step(h, x):
        h = jnp.tanh(x @ p["i"] + h @ p["h"])
        return h, h

    return lax.scan(step, jnp.zeros((4, 6)), x)


@cell({"w": W})
def scan_over_steps(p, x):
    return lax.scan(lambda h, _: (jnp.tanh(h @ p["w"]), None), x, None, length=3)[0]


@cell({"w": W, "v": ROWS}, int8=(2, 2))
def branches(p, x):
    return lax.cond(x.sum() > 0, lambda x: x @ p["w"], lambda x: x @ p["v"].T, x)


@cell({"w": W}, int8=(1, 1))
def switch(p, x):
    cases = [lambda x: x, lambda x: x @ p["w"], lambda x: 2.0 * x]
    return lax.switch(jnp.argmax(x[0]) % 3, cases, x)


@cell({"w": W})
def fori(p, x):
    return lax.fori_loop(0, 3, lambda i, h: jnp.tanh(h @ p["w"]), x)


@cell({"w": W})
def inner_vmap(p, x):
    return jax.vmap(lambda row: row @ p["w"])(x)


@cell({"w": STACK})
def inner_ensemble(p, x):
    return jax.vmap(lambda w: x @ w)(p["w"])


@cell({"w": W})
def activations(p, x):
    return jax.nn.softmax(jax.nn.silu(jax.nn.relu(x @ p["w"])))


@jax.custom_jvp
def _clipped(x, w):
    return jnp.clip(x @ w, -1.0, 1.0)


@_clipped.defjvp
def _(primals, tangents):
    (x, w), (dx, dw) = primals, tangents
    return _clipped(x, w), dx @ w + x @ dw  # straight through the clip


@cell({"w": W}, int8=(1, 1))
def custom_jvp_of_weight(p, x):
    return _clipped(x, p["w"])


@jax.custom_vjp
def _halved(x, w):
    return x @ w


_halved.defvjp(
    lambda x, w: (x @ w, (x, w)),
    lambda saved, g: (0.5 * g @ saved[1].T, 0.5 * saved[0].T @ g),  # not the derivative, on purpose
)


@cell({"w": W}, int8=(0, 1), allow_dense=True)
def custom_vjp_of_weight(p, x):
    return _halved(x, p["w"])


@cell({"w": W}, int8=(1, 2), allow_dense=True)
def inner_grad(p, x):  # the scale of `W` is per output, so the product with its transpose is dense
    return jax.grad(lambda x: jnp.sum(jnp.tanh(x @ p["w"]) ** 2))(x)


@cell({"w": W}, int8=(0, 1), allow_dense=True)
def squared(p, x):
    return x @ (p["w"] * p["w"])


@cell({"w": W}, int8=(0, 1))
def in_the_carry(p, x):
    return lax.fori_loop(0, 2, lambda i, c: (c[0] @ c[1], c[1] + 1.0), (x, p["w"]))[0]


@cell({"w": W}, int8=(1, 1))
def invariant_in_the_carry(p, x):
    return lax.fori_loop(0, 2, lambda i, c: (c[0] @ c[1], c[1]), (x, p["w"]))[0]


@cell({"w": W}, int8=(0, 1))
def out_of_a_branch(p, x):
    return x @ lax.cond(x.sum() > 0, lambda w: w, lambda w: w.T, p["w"])


@cell({"w": LowRank(W, normal(8, 6, 2), normal(9, 2, 6))}, int8=(1, 3))
def nested(p, x):
    return x @ p["w"]


@cell({"w": W})
def marked(p, x):
    w = checkpoint_name(lax.stop_gradient(p["w"]), "kernel")
    w, x = lax.optimization_barrier((w, x))
    return x @ jnp.array(w, copy=True)


@cell({"k": scaled(normal(10, 3, 3, 2, 4), (0, 1, 2))}, x=normal(11, 2, 5, 5, 2))
def convolution(p, x):
    return lax.conv_general_dilated(
        x, p["k"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


@cell({"k": scaled(normal(12, 3, 3, 1, 4), (0, 1, 2))}, x=normal(13, 2, 5, 5, 4))
def depthwise(p, x):
    return lax.conv_general_dilated(
        x,
        p["k"],
        (2, 2),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=4,
    )


@cell({"w": W})
def kernel_cast(p, x):
    return (x.astype(jnp.bfloat16) @ p["w"].astype(jnp.bfloat16)).astype(jnp.float32)


def close(one, other, tolerance=2e-5):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        np.testing.assert_allclose(a, b, tolerance, tolerance * max(1.0, np.abs(b).max(initial=0)))
