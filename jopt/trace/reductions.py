"""Largest and smallest values, in which a NaN shows as an infinity.

XLA:CPU's reductions by `max` and `min` lose NaN for many shapes of 4,096 and more values (jaxlib
0.10: `jnp.max` of float32 `[8, 512]` with a NaN in its last row is that of the other rows), and
with it what they had seen before. Infinities they keep. So a NaN becomes one on its way in, which
costs nothing where that is fused into what makes the values.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp


def largest(x: jax.Array, axes: int | Sequence[int], *, keepdims: bool = False) -> jax.Array:
    """The largest |x| over `axes`, at least zero, float32; infinite where one of them is NaN."""
    x = x.astype(jnp.float32)
    sizes = jnp.where(jnp.isnan(x), jnp.inf, jnp.abs(x))
    return jnp.max(sizes, axis=_tuple(axes), keepdims=keepdims, initial=0.0)


def ends(
    x: jax.Array,
    axes: int | Sequence[int],
    *,
    keepdims: bool = False,
    initial: tuple[float, float] = (0.0, 0.0),
) -> tuple[jax.Array, jax.Array]:
    """The smallest and the largest x over `axes`, float32; both infinite where one of them is NaN.

    `initial` is what they are at most and at least, and of no values.
    """
    x, axes = x.astype(jnp.float32), _tuple(axes)
    lost = jnp.isnan(x)
    low = jnp.min(jnp.where(lost, -jnp.inf, x), axis=axes, keepdims=keepdims, initial=initial[0])
    high = jnp.max(jnp.where(lost, jnp.inf, x), axis=axes, keepdims=keepdims, initial=initial[1])
    return low, high


def _tuple(axes: int | Sequence[int]) -> tuple[int, ...]:
    return (axes,) if isinstance(axes, int) else tuple(axes)
