"""Largest and smallest values, in which a NaN shows as an infinity.

XLA:CPU's reductions by `max` and `min` lose NaN for many shapes of 4,096 and more values (jaxlib
0.10: `jnp.max` of float32 `[8, 512]` with a NaN in its last row is that of the other rows), and
with it what they had seen before. Infinities they keep. So a NaN becomes one on its way in, which
costs nothing where that is fused into what makes the values.

Nor do they share their work between threads where one number is left of many. So many values are
first laid over each other, in a few slices; `maximum` and `minimum` of two arrays keep NaN.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

# Of so many values and more, so many slices.
MANY, SLICES = 1 << 15, 8


def largest(x: jax.Array, axes: int | Sequence[int], *, keepdims: bool = False) -> jax.Array:
    """The largest |x| over `axes`, at least zero, float32; infinite where one of them is NaN."""
    axes = _tuple(axes)
    sizes = _folded(jnp.maximum, jnp.abs(x.astype(jnp.float32)), axes)
    sizes = jnp.where(jnp.isnan(sizes), jnp.inf, sizes)
    return jnp.max(sizes, axis=axes, keepdims=keepdims, initial=0.0)


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
    low, high = _folded(jnp.minimum, x, axes), _folded(jnp.maximum, x, axes)
    low, high = jnp.where(jnp.isnan(low), -jnp.inf, low), jnp.where(jnp.isnan(high), jnp.inf, high)
    low = jnp.min(low, axis=axes, keepdims=keepdims, initial=initial[0])
    return low, jnp.max(high, axis=axes, keepdims=keepdims, initial=initial[1])


def _folded(over: Callable[..., jax.Array], x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Slices of many values laid over each other, where all of them come to one number."""
    # Slices of what several devices share would be sent about.
    several = max(jax.device_count(), jax.typeof(x).sharding.mesh.size) > 1
    whole = {axis % max(x.ndim, 1) for axis in axes} == set(range(x.ndim))
    if several or not whole or not all(isinstance(size, int) for size in x.shape):
        return x
    axis = next((axis for axis, size in enumerate(x.shape) if size >= SLICES), None)
    if axis is None or x.size < MANY:
        return x
    size = x.shape[axis]
    width = -(-size // SLICES)
    begins = [i * (size - width) // (SLICES - 1) for i in range(SLICES)]  # they may overlap
    slices = [jax.lax.slice_in_dim(x, begin, begin + width, axis=axis) for begin in begins]
    return functools.reduce(over, slices)


def _tuple(axes: int | Sequence[int]) -> tuple[int, ...]:
    return (axes,) if isinstance(axes, int) else tuple(axes)
