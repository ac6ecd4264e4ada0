"""Random chains of layouts over quantized weights of every kind: no value changes, none is lost."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st
from jax import lax

from jopt import quant
from jopt.quant import Int
from jopt.trace import lift

N = 8
RNG = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


X = normal(N, N)
ORDERS = jnp.asarray(RNG.permuted(np.tile(np.arange(N), (N, 1)), axis=1))


def along_rows(weight, format):
    """Quantized with the last axis as the summed one: groups and scales lie across."""
    leaf = quant.quantize(weight.T, format)
    return jax.tree.map(lambda array: jnp.swapaxes(array, 0, 1), leaf)


W = normal(N, N)
LEAVES = {
    "channel": quant.quantize(W, Int(8)),
    "channel across": along_rows(W, Int(8)),
    "affine": quant.quantize(W, Int(5, symmetric=False)),
    "groups": quant.quantize(W, Int(4, granularity="group", group_size=2)),
    "groups across": along_rows(W, Int(4, symmetric=False, granularity="group", group_size=4)),
    "nf4": quant.quantize(W, quant.NF4(group_size=4)),
    "codebook": quant.quantize(W, quant.Codebook(4)),
    "codebook of channels": quant.quantize(W, quant.Codebook(4, granularity="channel")),
    "fp8": quant.quantize(W, quant.FP8("e4m3")),
}
LAYOUTS = {
    "transpose": lambda w: w.T,
    "reshape": lambda w: w.reshape(4, 2 * N // 8, N).reshape(2, 4, N).reshape(N, N),
    "fold": lambda w: w.reshape(2, 4, 4, 2).transpose(2, 3, 0, 1).reshape(N, N),
    "fortran": lambda w: lax.reshape(w, (4, 16), (1, 0)).reshape(N, N),
    "slice": lambda w: jnp.concatenate([w[:4], w[4:]]),
    "swap": lambda w: jnp.concatenate([w[:, 3:], w[:, :3]], axis=1),
    "strided": lambda w: jnp.stack([w[::2], w[1::2]], 1).reshape(N, N),
    "reverse": lambda w: w[::-1],
    "split": lambda w: jnp.concatenate(jnp.split(w, 2, axis=1)[::-1], axis=1),
    "dynamic": lambda w: jnp.concatenate(
        [lax.dynamic_slice(w, (i, 0), (2, N)) for i in (6, 0, 2, 4)]
    ),
    "broadcast": lambda w: jnp.broadcast_to(w[None], (3, N, N))[1],
    "cast": lambda w: w.astype(jnp.bfloat16).astype(jnp.float32),
    "jit": lambda w: jax.jit(lambda w: w.T)(w),
}
LAST = {  # from a weight to an array of activations
    "product": lambda w, x: x @ w,
    "left": lambda w, x: w @ x,
    "heads": lambda w, x: jnp.einsum("bi,ihd->bhd", x, w.reshape(N, 2, 4)),
    "batched": lambda w, x: jnp.einsum(
        "hbi,hio->hbo", x.reshape(2, 4, N)[:, :, :4], w.reshape(2, 4, N)
    ),
    "rows": lambda w, x: w[ORDERS[0]],
    "rows of each": lambda w, x: jax.vmap(lambda row, i: row[i])(w, ORDERS),
    "taken along": lambda w, x: jnp.take_along_axis(w, ORDERS, 0),
    "scan": lambda w, x: lax.scan(lambda h, row: (h + 1, x @ row), 0, w)[1],
    "vmap": lambda w, x: jax.vmap(lambda w: x[:, :4] @ w)(w.reshape(2, 4, N)),
}


@hypothesis.given(
    st.sampled_from(sorted(LEAVES)),
    st.lists(st.sampled_from(sorted(LAYOUTS)), max_size=3),
    st.sampled_from(sorted(LAST)),
)
@hypothesis.settings(max_examples=25, deadline=None, derandomize=True)
def test_any_chain_of_layouts_gives_the_dequantized_answer(name, chain, last):
    def function(w, x):
        w = functools.reduce(lambda w, step: LAYOUTS[step](w), chain, w)
        return LAST[last](w, x)

    leaf = LEAVES[name]
    ours = lift(function)(leaf, X)  # nothing of this makes the weight dense
    theirs = function(leaf.materialise(), X)
    assert ours.shape == theirs.shape
    np.testing.assert_allclose(ours, theirs, 1e-5, 1e-5)
