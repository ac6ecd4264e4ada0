"""A uniform grid whose bits are an array: one program for all bits of a schedule."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jopt.trace.layered import spread

from .base import Int, over, scale_between, scale_of

MOST = 16  # codes of more bits than these would not be told apart in bfloat16 anyway


class Bits(NamedTuple):
    """The ends of a grid's codes, as float32 arrays of size 1 that have the weight's rank."""

    low: jax.Array
    high: jax.Array
    inverse: jax.Array  # one over the number of steps that cover the range

    def rounded(
        self,
        x: jax.Array,
        format: Int,
        low: jax.Array,
        high: jax.Array,
        key: jax.Array | None = None,
    ) -> jax.Array:
        """`x` on the grid that covers `[low, high]`, float32: with the format's bits, its values.

        The sums and products are those of `Int`, one by one, so that the last bit agrees.
        """
        low, high = jnp.minimum(low, 0.0), jnp.maximum(high, 0.0)
        if format.symmetric:
            scale = scale_of(jnp.maximum(-low, high), self.inverse)
        else:
            scale = scale_between(low, high, self.inverse)
        codes = _whole(over(x, scale), format, key)
        if format.symmetric:
            codes = jnp.clip(codes, self.low, self.high).astype(jnp.int32)
            return codes.astype(jnp.float32) * spread(scale, x.shape)
        zero = jnp.clip(self.low - jnp.round(over(low, scale)), self.low, self.high)
        zero = spread(zero.astype(jnp.int32), x.shape).astype(jnp.float32)
        codes = jnp.clip(codes + zero, self.low, self.high).astype(jnp.int32)
        return (codes.astype(jnp.float32) - zero) * spread(scale, x.shape)


def bits_for(bits: jax.Array, format: Int, ndim: int) -> Bits:
    """The grid's ends for a number of bits, rounded to a whole one from 2 to 16; NaN of NaN."""
    bits = jnp.asarray(bits, jnp.float32)
    number = jnp.clip(jnp.round(bits), 2, MOST).astype(jnp.int32)
    tops = [2 ** (b - 1) - 1 for b in range(2, MOST + 1)]
    steps = [top if format.symmetric else 2 * top + 1 for top in tops]
    # The reciprocals as Int takes them: rounded once, from the exact ones.
    high = jnp.asarray(np.array(tops, np.float32))[number - 2]
    inverse = jnp.asarray(np.array([1.0 / n for n in steps], np.float32))[number - 2]
    inverse = jnp.where(jnp.isnan(bits), jnp.nan, inverse)  # so that the trouble shows
    low = -high if format.symmetric else -high - 1
    return Bits(*(array.reshape((1,) * ndim) for array in (low, high, inverse)))


def _whole(steps: jax.Array, format: Int, key: jax.Array | None) -> jax.Array:
    if format.rounding == "floor":
        return jnp.floor(steps)
    if key is None:
        return jnp.round(steps)
    below = jnp.floor(steps)
    return below + (jax.random.uniform(key, steps.shape) < steps - below).astype(jnp.float32)
