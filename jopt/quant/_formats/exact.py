"""Sums that come out the same in whatever order XLA adds: whole numbers, in limbs of few bits.

A float sum over many values depends on how it was compiled. A fit that hangs on one would give
training and storing different grids; so fits add integers, and turn only totals into floats.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np


def limbs(values: jax.Array, bits: int, count: int) -> tuple[list[jax.Array], list[float]]:
    """Splits int32 values of `bits` bits so that `count` of each part add up in int32.

    Returns:
      The parts, all but the last not negative, and what one of each is worth.

    Raises:
      ValueError: if there are too many values.
    """
    width = 31 - count.bit_length()
    if width < 1:
        raise ValueError(f"{count} values share one grid; fits take less than 2^30.")
    starts = list(range(0, bits, width))
    parts = [(values >> start) & (2**width - 1) for start in starts[:-1]]
    return [*parts, values >> starts[-1]], [float(2**start) for start in starts]


def combined(sums: list[jax.Array], worth: list[float]) -> jax.Array:
    """The float32 total of sums of limbs; worths are powers of two, so only sums round."""
    total = jnp.zeros_like(sums[0], jnp.float32)
    for part, one in zip(sums[::-1], worth[::-1], strict=True):
        total = total + part.astype(jnp.float32) * np.float32(one)
    return total


def exact_sum(values: jax.Array, bits: int, axis: int = -1) -> jax.Array:
    """The sum of int32 values of `bits` bits along `axis`, as float32."""
    parts, worth = limbs(values, bits, values.shape[axis])
    return combined([jnp.sum(part, axis=axis) for part in parts], worth)


def exact_cumsum(values: jax.Array, bits: int) -> Callable[[jax.Array], jax.Array]:
    """For a vector of int32: a function of ascending bounds, the sum between each two of them."""
    parts, worth = limbs(values, bits, values.shape[0])
    before = [jnp.pad(jnp.cumsum(part), (1, 0)) for part in parts]
    return lambda bounds: combined([jnp.diff(sums[bounds]) for sums in before], worth)
