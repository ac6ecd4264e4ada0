"""Pooling without overlap, lowered as each platform runs it fastest."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jopt.nn._lowering import by_platform


def max_pool(x: jax.Array, window: int | tuple[int, int] = 2) -> jax.Array:
    """The largest value of each window of an image; windows lie side by side.

    Rows and columns left over at the bottom and the right are dropped, as by `"VALID"`. Of several
    equal values the first, row by row, takes the derivative, as in `jax.lax.reduce_window` and
    PyTorch.

    Args:
      x: images `[batch, height, width, channels]`.
      window: its height and width, the same or `(height, width)`.

    Returns:
      `[batch, height // h, width // w, channels]`.

    Raises:
      ValueError: if `x` has another rank, or the window is larger than the image.

    Example:
      >>> import jax.numpy as jnp
      >>> from jopt import nn
      >>> nn.max_pool(jnp.arange(9.0).reshape(1, 3, 3, 1)).ravel()
      Array([4.], dtype=float32)
    """
    h, w = (window, window) if isinstance(window, int) else window
    if x.ndim != 4 or not (1 <= h <= x.shape[1] and 1 <= w <= x.shape[2]):
        raise ValueError(
            f"`max_pool(x, {window})` expects images `[batch, height, width, channels]`, no "
            f"smaller than the window; got shape {x.shape}."
        )
    implementations = {
        "lax": functools.partial(_by_lax, window=(h, w)),
        "reshape": functools.partial(_by_reshape, window=(h, w)),
    }
    return by_platform(lambda choices: choices.pooling, implementations, x)


def _by_lax(x: jax.Array, *, window: tuple[int, int]) -> jax.Array:
    least = -jnp.inf if jnp.issubdtype(x.dtype, jnp.inexact) else jnp.iinfo(x.dtype).min
    shape = (1, *window, 1)
    return jax.lax.reduce_window(x, np.array(least, x.dtype), jax.lax.max, shape, shape, "VALID")


def _by_reshape(x: jax.Array, *, window: tuple[int, int]) -> jax.Array:
    (h, w), (batch, height, width, channels) = window, x.shape
    rows, columns = height // h, width // w
    x = x[:, : rows * h, : columns * w]
    return _largest(x.reshape(batch, rows, h, columns, w, channels))


@jax.custom_jvp
def _largest(windows: jax.Array) -> jax.Array:
    """The maximum over axes 2 and 4 of `[batch, rows, h, columns, w, channels]`.

    JAX's own derivative would share it among equal values, which costs XLA:CPU more than the rest
    of the pooling.
    """
    return jnp.max(windows, axis=(2, 4))


@_largest.defjvp
def _largest_jvp(
    primals: tuple[jax.Array], tangents: tuple[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    (windows,), (tangent,) = primals, tangents
    largest = _largest(windows)
    h, w = windows.shape[2], windows.shape[4]
    place = jnp.arange(h * w, dtype=jnp.int32).reshape(1, 1, h, 1, w, 1)
    equal = windows == jnp.expand_dims(largest, (2, 4))
    first = jnp.min(jnp.where(equal, place, h * w), axis=(2, 4), keepdims=True)
    chosen = jnp.where(place == first, tangent, jnp.zeros((), tangent.dtype))
    return largest, jnp.sum(chosen, axis=(2, 4))
