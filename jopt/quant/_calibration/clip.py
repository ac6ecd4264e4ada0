"""Weights' grids chosen by the squared error of rounding, in place of covering every value."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jopt.trace.layered import spread

from .._formats.base import Format, Grid
from .._formats.floats import to_one

# What part of the whole range is tried. Two bits of normal weights want about a half.
RATIOS = np.linspace(1.0, 0.2, 81, dtype=np.float32)


@functools.partial(jax.jit, static_argnames=("format", "axes"))
def least_error_grid(weight: jax.Array, format: Format, axes: tuple[int, ...]) -> Grid:
    """The grid whose rounding of `weight` has the least squared error, scale by scale.

        argmin_r Σ (decode(encode(w, grid(r·low, r·high))) - w)²,   r = 1, 0.99, … 0.2

    Args:
      weight: float array.
      format: one whose grid follows from a range (no `needs_values`).
      axes: that share a scale, as in `Format.fit`.
    """
    low, high = format.extent(weight, axes)
    exact, unit = weight.astype(jnp.float32), to_one(jnp.maximum(-low, high))

    def error(ratio: jax.Array) -> jax.Array:
        grid = format.grid(low * ratio, high * ratio)
        rounded = format.decode(format.encode(weight, grid), grid)
        off = (rounded - exact) * spread(unit, weight.shape)
        return _summed(jnp.square(off), low.shape)

    errors = jax.lax.map(error, jnp.asarray(RATIOS))
    best = jnp.asarray(RATIOS)[jnp.argmin(errors, axis=0)]
    return format.grid(low * best, high * best)


def _summed(x: jax.Array, coarse: Sequence[int]) -> jax.Array:
    """Sums over all values that share an entry of a coarse array of that shape."""
    shape = [n for axis, parts in enumerate(coarse) for n in (parts, x.shape[axis] // parts)]
    return jnp.sum(x.reshape(shape), axis=tuple(range(1, 2 * len(coarse), 2)))
