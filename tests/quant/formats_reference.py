"""Number formats in float64 NumPy, from the papers and the specification, and one list of all."""

import functools

import jax
import ml_dtypes
import numpy as np

from jopt.quant import FP8, MX, NF4, Codebook, Int, Piecewise, PowerOfTwo, fake_quant, quantize

# One of each kind, small enough for weights with 64 inputs.
FORMATS = [
    Int(3),
    Int(8, symmetric=False),
    FP8("e4m3"),
    FP8("e5m2", granularity="group", group_size=16),
    NF4(32),
    Codebook(16),
    Codebook(20, granularity="channel", zero=True),
    Codebook(4, granularity="group", group_size=32),
    Codebook(8, method="lloyd_max", granularity="channel"),
    Codebook(values=(-1.0, -0.25, 0.0, 0.5, 1.5)),
    Piecewise(4),
    Piecewise(6, granularity="group", group_size=16),
    Piecewise(boundaries=(-np.inf, -0.5, 0.5, np.inf), values=(-1.0, 0.0, 1.0)),
    PowerOfTwo(4),
    PowerOfTwo(6, granularity="tensor"),
    MX("mxfp8"),
    MX("mxfp8_e5m2"),
    MX("mxfp4"),
    MX("mxint8"),
]

ELEMENTS = {
    "mxfp8": (ml_dtypes.float8_e4m3fn, 8),
    "mxfp8_e5m2": (ml_dtypes.float8_e5m2, 15),
    "mxfp4": (ml_dtypes.float4_e2m1fn, 2),
}

# Compiled whole: operation by operation XLA takes ten times as long to compile.
faked = jax.jit(fake_quant, static_argnums=1, static_argnames="axes")


@functools.partial(jax.jit, static_argnums=1)
def stored(x, format):
    """The leaf of a weight."""
    return quantize({"w": x}, format)["w"]


def small_float(x, dtype):
    """Float64 values rounded once to a small float, saturating."""
    top = float(ml_dtypes.finfo(dtype).max)
    grid = np.arange(2 ** ml_dtypes.finfo(dtype).bits, dtype=np.uint8).view(dtype)
    grid = grid.astype(np.float64)
    grid = np.unique(grid[np.isfinite(grid)])
    x = np.clip(np.asarray(x, np.float64), -top, top)
    upper = np.clip(np.searchsorted(grid, x), 1, len(grid) - 1)
    low, high = grid[upper - 1], grid[upper]
    # Of two as near that with the even code: on either side of zero codes count up.
    even = np.where(np.searchsorted(grid[grid >= 0], np.abs(low)) % 2 == 0, low, high)
    off = (x - low) - (high - x)
    return np.where(off == 0, even, np.where(off < 0, low, high))


def mx(x, kind, axis):
    """The OCP specification, section 6.3: blocks of 32 along `axis`."""
    x = np.moveaxis(np.asarray(x, np.float64), axis, -1)
    blocks = x.reshape(*x.shape[:-1], -1, 32)
    top = np.abs(blocks).max(-1, keepdims=True)
    largest = 0 if kind == "mxint8" else ELEMENTS[kind][1]
    with np.errstate(divide="ignore"):
        scale = 2.0 ** np.maximum(np.floor(np.log2(top)) - largest, -126)
    place = blocks / scale
    if kind == "mxint8":
        element = np.clip(np.rint(place * 64), -127, 127) / 64
    else:
        element = small_float(place, ELEMENTS[kind][0])
    values = (element * scale).reshape(x.shape)
    return np.moveaxis(values, -1, axis), np.moveaxis(scale[..., 0], -1, axis)


def nearest(x, levels):
    """The nearest of ascending levels, the lower of two as near."""
    middle = (levels[1:] + levels[:-1]) / 2
    return levels[np.searchsorted(middle, x, side="left")]


def lloyd(x, centers, held=None):
    """Lloyd's iterations in one dimension from given ascending centers, to the fixed point."""
    x, centers, old = np.asarray(x, np.float64), np.array(centers, np.float64), None
    for _ in range(1000):
        label = np.searchsorted((centers[1:] + centers[:-1]) / 2, x, side="left")
        if old is not None and np.array_equal(label, old):
            return centers
        for j in range(len(centers)):
            if j != held and np.any(label == j):
                centers[j] = x[label == j].mean()
        old = label
    raise AssertionError("no convergence")


def two_regions(x, bits, parts):
    """Levels of a center and tails, from the formula; and the sum of squared errors of `x`."""
    m = np.abs(x).max()
    p, n = m * parts / 64, 2 ** (bits - 2)
    half = [j * p / n for j in range(n)] + [p + j * (m - p) / (n - 1) for j in range(n)]
    levels = np.array(sorted({-v for v in half} | set(half)))
    error = np.abs(x[:, None] - levels).min(1)
    return levels, float((error**2).sum())


def powers(x, bits):
    """Incremental network quantization's grid: zero, and powers from the one nearest to max|x|."""
    top = 2.0 ** np.floor(np.log2(4 / 3 * np.abs(x).max()))
    half = top * 2.0 ** -np.arange(2 ** (bits - 1) - 1)
    return np.array(sorted({-v for v in half} | {0.0} | set(half)))
