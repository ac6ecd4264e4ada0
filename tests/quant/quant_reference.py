"""Products of quantized operands as integers in NumPy, from the definition."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from jopt.quant import Int, Range, Spec
from jopt.quant._quantize import coded

W8 = Int(8)
SPECS = {
    "w8a8": Spec(W8, W8),
    "w4a8": Spec(Int(4), W8),
    "w3a5": Spec(Int(3), Int(5)),
    "affine weight": Spec(Int(8, symmetric=False), W8),
    "affine activation": Spec(W8, Int(8, symmetric=False)),
    "both affine": Spec(Int(4, symmetric=False), Int(8, symmetric=False)),
    "tensor": Spec(Int(8, granularity="tensor"), W8),
}


_coded = functools.partial(jax.jit, static_argnums=(1, 2))(coded)


def weight(array, spec, contract, static=None):
    """A `QArray` whose products sum over `contract`."""
    axes = tuple(range(-array.ndim, 0)) if spec.weight.granularity == "tensor" else contract
    leaf = _coded(jnp.asarray(array), spec, axes)
    if static is None:
        return leaf
    ends = [jnp.full((1,) * array.ndim, end, jnp.float32) for end in static]
    return dataclasses.replace(leaf, range=Range(*ends), static=True)


def integers(x, format, low=None, high=None):
    """Shifted codes and scale of an activation, by the definition, rounding as float32 does."""
    x = np.asarray(x, np.float32)
    low = min(float(x.min()), 0.0) if low is None else low
    high = max(float(x.max()), 0.0) if high is None else high
    n = 2 ** (format.bits - 1)
    if format.symmetric:
        scale = np.float32(max(-low, high)) * np.float32(1 / (n - 1))
        codes = np.clip(np.rint(x * (np.float32(1) / scale)), -(n - 1), n - 1)
        return codes.astype(np.int64), scale
    scale = np.float32(np.float32(high) - np.float32(low)) * np.float32(1 / (2 * n - 1))
    zero = -n - np.rint(np.float32(low) * (np.float32(1) / scale))
    codes = np.clip(np.rint(x * (np.float32(1) / scale)) + zero, -n, n - 1)
    return (codes - zero).astype(np.int64), scale


def shifted(leaf):
    """Codes minus zero points of a weight, in int64, and scales in float64."""
    codes = np.asarray(leaf.codes).astype(np.int64)
    if leaf.zero_point is not None:
        codes = codes - np.asarray(leaf.zero_point, np.int64)
    return codes, np.asarray(leaf.scale, np.float64)


def int8_products(f, *args):
    """How many products of int8 operands into int32 a function has, bodies included."""
    text = str(jax.make_jaxpr(f)(*args))
    return text.count("preferred_element_type=int32")
