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
    PyTorch. A window that holds a NaN gives NaN; which of its values takes the derivative then is
    not defined.

    Args:
      x: images `[batch, height, width, channels]`; numbers, no booleans.
      window: its height and width, the same or `(height, width)`.

    Returns:
      `[batch, height // h, width // w, channels]`.

    Raises:
      TypeError: if the window is not one integer or two, or the images are booleans.
      ValueError: if `x` has another rank, or the window is larger than the image.

    Example:
      >>> import jax.numpy as jnp
      >>> from jopt import nn
      >>> nn.max_pool(jnp.arange(9.0).reshape(1, 3, 3, 1)).ravel()
      Array([4.], dtype=float32)
    """
    sizes = window if isinstance(window, tuple) else (window, window)
    if len(sizes) != 2 or not all(isinstance(n, int | np.integer) for n in sizes):
        raise TypeError(f"`max_pool(x, {window!r})` expects an integer or two as the window.")
    h, w = (int(n) for n in sizes)
    if x.ndim != 4 or not (1 <= h <= x.shape[1] and 1 <= w <= x.shape[2]):
        raise ValueError(
            f"`max_pool(x, {window})` expects images `[batch, height, width, channels]`, no "
            f"smaller than the window; got shape {x.shape}."
        )
    if jnp.issubdtype(x.dtype, jnp.bool_):
        raise TypeError("`max_pool(x, window)` got booleans: convert them, `x.astype(jnp.int8)`.")
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

    JAX's own derivative of a maximum would share it among equal values, which costs XLA:CPU more
    than the rest of the pooling.
    """
    return _largest_and_place(windows)[0]


@_largest.defjvp
def _largest_jvp(
    primals: tuple[jax.Array], tangents: tuple[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    (windows,), (tangent,) = primals, tangents
    h, w = windows.shape[2], windows.shape[4]
    largest, place = jax.lax.optimization_barrier(_largest_and_place(windows))
    places = jnp.arange(h * w, dtype=place.dtype).reshape(1, 1, h, 1, w, 1)
    # Barriers, since XLA:CPU would fuse what comes before and after into the selection and compute
    # it once for each value of the window (transposed, they stand on both sides of it as well).
    tangent = jax.lax.optimization_barrier(tangent)
    chosen = jnp.where(places == jnp.expand_dims(place, (2, 4)), tangent, jnp.zeros_like(tangent))
    return largest, jax.lax.optimization_barrier(jnp.sum(chosen, axis=(2, 4)))


def _largest_and_place(windows: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The largest value of each window and its place, counted row by row; of equals the first.

    By comparisons from value to value, which XLA:CPU fuses and vectorizes; it does not so with
    reductions over the window's axes.
    """
    h, w = windows.shape[2], windows.shape[4]
    dtype = jnp.int8 if h * w <= 128 else jnp.int32
    numbers = jnp.broadcast_to(jnp.arange(w, dtype=dtype)[:, None], windows.shape)
    columns = [(windows[..., v, :], numbers[..., v, :]) for v in range(w)]
    largest, place = functools.reduce(_larger, columns)
    rows = [(largest[:, :, u], place[:, :, u] + jnp.array(u * w, dtype)) for u in range(h)]
    return functools.reduce(_larger, rows)


def _larger(
    a: tuple[jax.Array, jax.Array], b: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """The larger of two values and its place, elementwise; of equals the first."""
    (x, at), (y, to) = a, b
    return jnp.maximum(x, y), jnp.where(y > x, to, at)
