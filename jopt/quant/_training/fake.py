"""Fake quantization: values on a format's grid, with a straight-through gradient."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jopt.trace.layered import coarse_map, full_along

from .._formats.base import Format, Grid, reciprocals
from .._formats.bits import Bits
from .._formats.layout import shared_axes


@jax.custom_jvp
def _through(x: jax.Array, y: jax.Array) -> jax.Array:
    del x
    return y


@_through.defjvp
def _through_jvp(primals, tangents):
    # The value is `y` to the last bit, which `x + stop_gradient(y - x)` is not.
    return _through(*primals), tangents[0]


def straight_through(x: jax.Array, y: jax.Array, inside: jax.Array | None = None) -> jax.Array:
    """`y`, whose derivative is that of `x` (0 where `inside` is given and False)."""
    if inside is not None:
        x = clipped(x, inside)
    return _through(x, jax.lax.stop_gradient(y))


def clipped(x: jax.Array, inside: jax.Array) -> jax.Array:
    """`x`, whose derivative is 0 where `inside` is False."""
    return jnp.where(inside, x, jax.lax.stop_gradient(x))


def fake_quant(
    x: jax.Array,
    format: Format,
    *,
    key: jax.Array | None = None,
    axes: tuple[int, ...] | None = None,
    range: tuple[jax.Array, jax.Array] | None = None,
) -> jax.Array:
    """Rounds `x` to the values that `format` can hold; the gradient passes straight through.

        fake_quant(x) = decode(encode(x, grid), grid),   grid from the extreme values of x

    The grid covers all of `x`, so nothing is clipped and the gradient is 1 everywhere. Of a given
    range it covers that, values beyond are clipped to its ends, and their gradient is 0. The grid
    is a constant to the gradient. Computed in float32, returned in the dtype of `x`.

    Args:
      x: float array `"[..., in, out]"`.
      format: such as `Int(8)`.
      key: rounds up with the probability of the fraction, so that the mean over keys is `x`.
      axes: the axes that share a scale, counted from the end; for groups, the axis they lie along.
        Default: what the granularity of `format` means for the layout `[..., in, out]`.
      range: the lowest and the highest value, scalars or arrays of the rank of `x` with n, 1 or the
        number of groups along each axis.

    Returns:
      An array like `x`. With a range NaN stays NaN.

    Raises:
      TypeError: if `x` is no array, or not floating.
      ValueError: if `x` is a scalar, if groups do not divide, if a stochastic format has no key, or
        if the range is of another rank or, as far as it can be seen while tracing, reversed.

    Example:
      >>> import jax.numpy as jnp
      >>> from jopt.quant import Int, fake_quant
      >>> fake_quant(jnp.array([[-1.0, 0.1], [0.6, 1.0]]), Int(2)).tolist()
      [[-1.0, 0.0], [1.0, 1.0]]

    References:
      Yoshua Bengio, Nicholas Léonard, Aaron Courville, Estimating or propagating gradients through
      stochastic neurons for conditional computation, 2013, arXiv:1308.3432.
    """
    if not hasattr(x, "dtype"):
        raise TypeError(
            f"`fake_quant(x, ...)` needs an array, got {type(x).__name__}; pass `jnp.asarray(x)`."
        )
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"`fake_quant(x, ...)` needs a floating x, got {x.dtype}.")
    x = jnp.asarray(x)
    if x.ndim == 0:
        raise ValueError("`fake_quant(x, ...)` needs an array of rank 1 or more, got a scalar.")
    if axes is None:
        axes = shared_axes(format.granularity, x.ndim)
    fixed = jax.lax.stop_gradient(x)
    if range is None:
        return straight_through(x, on_grid(fixed, format, axes, key))
    _check_order(*range)
    grid = format.grid(*(_end(end, x) for end in range))
    values = format.decode(format.encode(fixed, grid, key=key), grid).astype(x.dtype)
    values = jnp.where(jnp.isnan(fixed), fixed, values)
    return straight_through(x, values, format.inside(fixed, grid))


def on_grid(
    x: jax.Array,
    format: Format,
    axes: tuple[int, ...],
    key: jax.Array | None = None,
    bits: Bits | None = None,
) -> jax.Array:
    """`fake_quant` without its derivative. Goes through integers, so that zero has one sign."""
    if bits is not None:
        ends = format.extent(x, axes)
        values = keyed(lambda x, c, k: c[1].rounded(x, format, *c[0], k), x, (ends, bits), key)
    else:
        values = on_this(x, format, format.fit(x, axes), key)
    return values.astype(x.dtype)


def on_this(x: jax.Array, format: Format, grid: Grid, key: jax.Array | None) -> jax.Array:
    """The float32 values of `x` on a grid."""
    return keyed(lambda x, g, k: format.decode(format.encode(x, g, key=k), g), x, grid, key)


def keyed(
    function: Callable[[jax.Array, Any, jax.Array | None], jax.Array],
    x: jax.Array,
    coarse: Any,
    key: jax.Array | None,
) -> jax.Array:
    """`function(x, coarse, key)`, or one for each key where there is one for every matrix in `x`.

    Then slices of `x` with their keys give what all of it gives.
    """
    if key is None or key.ndim == 0:
        return function(x, coarse, key)
    if x.ndim <= 2:
        return function(x, coarse, key.reshape(()))
    whole = coarse_map(lambda c: full_along(c, x.shape, [0]), coarse)
    return jax.vmap(lambda x, c, k: keyed(function, x, c, k))(x, whole, key)


def _check_order(low: Any, high: Any) -> None:
    if any(isinstance(end, Tracer) for end in (low, high)):
        return
    if np.any(np.asarray(low, np.float32) > np.asarray(high, np.float32)):
        raise ValueError(
            f"`fake_quant(x, ..., range=({low}, {high}))`: the lowest value is above the highest. "
            "Pass `range=(low, high)`."
        )


def _end(end: jax.Array, x: jax.Array) -> jax.Array:
    end = jnp.asarray(end, jnp.float32)
    if end.ndim not in (0, x.ndim):
        raise ValueError(
            f"`fake_quant(x, ..., range=...)`: an end of the range has shape {end.shape}; it must "
            f"be a scalar or of the rank of x {x.shape}."
        )
    return end.reshape((1,) * x.ndim) if end.ndim == 0 else end


def fake_quant_affine(
    x: jax.Array, scale: jax.Array, zero_point: jax.Array, qmin: int, qmax: int
) -> jax.Array:
    """Rounds `x` to a given affine grid; the gradient is 1 on the grid's range and 0 beyond.

        q = clip(round(x / scale) + zero_point, qmin, qmax),  result (q - zero_point) * scale

    The values of `torch.fake_quantize_per_tensor_affine` and `per_channel_affine`, for any integer
    ends. Scale and zero point are constants to the gradient. NaN stays NaN.

    Args:
      x: float array.
      scale: positive; a scalar, or of the rank of `x` and broadcasting to it.
      zero_point: whole numbers of the shape of `scale`.
      qmin: the lowest code.
      qmax: the highest code.

    Returns:
      An array like `x`.

    Raises:
      ValueError: if `qmin >= qmax`, or if the shapes do not fit.

    Example:
      >>> import jax.numpy as jnp
      >>> from jopt.quant import fake_quant_affine
      >>> fake_quant_affine(jnp.array([-9.0, 0.3]), jnp.array(0.5), jnp.array(0), -2, 1).tolist()
      [-1.0, 0.5]
    """
    if qmin >= qmax:
        raise ValueError(f"`fake_quant_affine(..., {qmin}, {qmax})`: qmin must be below qmax.")
    scale, zero_point = jnp.asarray(scale), jnp.asarray(zero_point)
    if scale.ndim not in (0, x.ndim) or zero_point.shape != scale.shape:
        raise ValueError(
            f"`fake_quant_affine(x, scale, zero_point, ...)`: scale {scale.shape} and zero_point "
            f"{zero_point.shape} must be alike, and scalars or of the rank of x {x.shape}."
        )
    fixed = jax.lax.stop_gradient(x).astype(jnp.float32)
    scale, zero = scale.astype(jnp.float32), zero_point.astype(jnp.float32)
    power, rest = reciprocals(scale)
    place = jnp.round(fixed * power * rest) + zero
    codes = jnp.clip(place, qmin, qmax).astype(jnp.int32)
    values = (codes.astype(jnp.float32) - zero) * scale
    values = jnp.where(jnp.isnan(fixed), jnp.nan, values).astype(x.dtype)
    return straight_through(x, values, (place >= qmin) & (place <= qmax))
