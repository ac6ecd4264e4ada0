"""Largest and smallest values, in which a NaN shows.

XLA:CPU's reductions by `max` and `min` lose NaN for many shapes of 4,096 and more values (jaxlib
0.10: `jnp.max` of float32 `[8, 512]` with a NaN in its last row is that of the other rows), and
with it what they had seen before. Floats of one sign are in the order of their bits, NaN beyond
infinity, and reductions of integers lose nothing. They have no derivative.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np


def largest(x: jax.Array, axes: int | Sequence[int], *, keepdims: bool = False) -> jax.Array:
    """The largest |x| over `axes`, at least zero, float32; NaN where one of them is."""
    bits = _bits(jnp.abs(x.astype(jnp.float32)))
    return _floats(_reduced(jnp.max, bits, axes, keepdims, 0))


def ends(
    x: jax.Array,
    axes: int | Sequence[int],
    *,
    keepdims: bool = False,
    initial: tuple[float, float] = (0.0, 0.0),
) -> tuple[jax.Array, jax.Array]:
    """The smallest and the largest x over `axes`, float32; both NaN where one of them is.

    `initial` is what they are at most and at least, and of no values.
    """
    order = _ordered(_bits(x.astype(jnp.float32)))
    begin = _ordered(np.array(initial, np.float32).view(np.int32))
    low = _floats(_ordered(_reduced(jnp.min, order, axes, keepdims, int(begin[0]))))
    high = _floats(_ordered(_reduced(jnp.max, order, axes, keepdims, int(begin[1]))))
    lost = jnp.isnan(low) | jnp.isnan(high)  # the sign of a NaN says at which end it is
    return jnp.where(lost, jnp.nan, low), jnp.where(lost, jnp.nan, high)


def _reduced(
    reduce: ..., bits: jax.Array, axes: int | Sequence[int], keepdims: bool, initial: int
) -> jax.Array:
    axes = sorted(axis % bits.ndim for axis in ((axes,) if isinstance(axes, int) else axes))
    # Entry by entry first, then within the last axis: twice as fast on CPU as all at once.
    if len(axes) > 1 and axes[-1] == bits.ndim - 1:
        bits = reduce(bits, axis=tuple(axes[:-1]), keepdims=True, initial=initial)
        least = reduce(bits, axis=-1, keepdims=True, initial=initial)
        return least if keepdims else jnp.squeeze(least, tuple(axes))
    return reduce(bits, axis=tuple(axes), keepdims=keepdims, initial=initial)


def _bits(x: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(x, jnp.int32)


def _floats(bits: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def _ordered(bits: ...) -> ...:
    """Integers in the order of the floats whose bits they are; its own inverse."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)
