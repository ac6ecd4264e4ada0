"""AWQ: inputs whose activations are large get finer steps, by scales that the layer undoes."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jopt.trace import reductions

from .._formats.base import Format, Grid
from .._formats.floats import to_one
from .._formats.layout import shared_axes
from .layerwise import (
    EXACT,
    Rounded,
    adjustable,
    by_output,
    checked,
    fitted,
    nearest,
    over_layers,
    pooled,
    sound,
)


def awq(
    weight: jax.Array,
    hessian: jax.Array,
    magnitude: jax.Array,
    format: Format,
    *,
    points: int = 20,
    clip: float | None = 0.5,
    clips: int = 10,
) -> tuple[Rounded, jax.Array]:
    """Rounds `weight · s`, to be met by `x / s`, with s chosen for the least error of the outputs.

    The scales are those of `awq_scales`. Then what each grid covers is narrowed: of `clips` parts
    of its interval, from 1 down to `clip`, the one is taken that costs least by the block of the
    Hessian that belongs to the inputs of that grid; all or none, whichever is better in the end.

    Args:
      weight: `[..., in, out]`. Weights that meet one activation share their scales: concatenate
        them along their outputs.
      hessian: `[..., in, in]` or `[in, in]`, Σ x xᵀ.
      magnitude: `[..., in]` or `[in]`, the mean of |x|.
      format: any; with `clip`, one whose grid is that of an interval.
      points: exponents tried.
      clip: the smallest part of an interval tried; None leaves the grids as they are.
      clips: parts tried.

    Returns:
      Codes and grid of `weight * scales[..., None]`, and `scales`, `[..., in]` in float32. Fold
      1 / scales into what makes the activation, or let the leaf `Scaled` multiply by it.

    Raises:
      TypeError: if an array is not floating, or the format is none, or clips are asked of one that
        has no interval.
      ValueError: if shapes do not fit, the Hessian is not finite, or an option is out of its range.

    Example:
      >>> import jax.numpy as jnp
      >>> from jopt.quant import Int, awq
      >>> weight, x = jnp.array([[0.3], [1.0]]), jnp.array([[8.0, 0.1], [4.0, -0.1]])
      >>> rounded, scales = awq(weight, x.T @ x, jnp.mean(jnp.abs(x), 0), Int(2))
      >>> bool(scales[0] > scales[1])
      True

    References:
      Ji Lin et al., AWQ: activation-aware weight quantization for LLM compression and acceleration,
      2023, arXiv:2306.00978.
    """
    weight, hessian, magnitude = _arguments("awq", weight, hessian, magnitude, format, points)
    if clip is not None:
        adjustable("awq", format)
        if not 0 < clip <= 1 or clips < 1:
            raise ValueError(f"`awq(clip={clip}, clips={clips})`: 0 < clip <= 1, and at least 1.")
    options = {"format": format, "points": points, "clip": clip, "clips": clips}
    return _awq(weight, hessian, magnitude, **options)


def awq_scales(
    weight: jax.Array,
    hessian: jax.Array,
    magnitude: jax.Array,
    format: Format,
    *,
    points: int = 20,
) -> jax.Array:
    """The scales of AWQ: a power of the mean activation, chosen for the least error of the outputs.

        s = (m / geometric mean of m)^α,   α = argmin tr(Dᵀ H D),   D = W - Q(W · s) / s

    over `points` values of α from 0 (rounding to nearest) to 1. Inputs that were always zero keep
    s = 1. The paper normalizes by √(max s · min s) instead, which does not matter to a format whose
    steps are proportional to the values.

    Args:
      weight: as in `awq`.
      hessian: as in `awq`.
      magnitude: as in `awq`.
      format: any.
      points: exponents tried.

    Returns:
      float32 `[..., in]`.

    Raises:
      TypeError: as in `awq`.
      ValueError: as in `awq`.

    References:
      As of `awq`.
    """
    weight, hessian, magnitude = _arguments(
        "awq_scales", weight, hessian, magnitude, format, points
    )
    return _scales(weight, hessian, magnitude, format=format, points=points)


def _arguments(
    caller: str, weight: Any, hessian: Any, magnitude: Any, format: Any, points: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    weight, hessian, _ = checked(caller, weight, hessian, format)
    magnitude = jnp.asarray(magnitude)
    if magnitude.shape not in (weight.shape[-2:-1], weight.shape[:-1]):
        raise ValueError(
            f"`{caller}(weight, hessian, magnitude, ...)`: the mean of |x| is "
            f"{list(weight.shape[:-1])} for a weight {list(weight.shape)}, got "
            f"{list(magnitude.shape)}."
        )
    if points < 1:
        raise ValueError(f"`{caller}(points={points})`: at least one exponent must be tried.")
    return weight, hessian, magnitude.astype(jnp.float32)


# One matrix.


@functools.partial(jax.jit, static_argnames=("format", "points"))
def _scales(
    weight: jax.Array, hessian: jax.Array, magnitude: jax.Array, *, format: Format, points: int
) -> jax.Array:
    def matrix(weight: jax.Array, hessian: jax.Array, magnitude: jax.Array) -> jax.Array:
        return _best(weight.astype(jnp.float32), hessian, magnitude, format, points)

    return over_layers(matrix, weight, (hessian, 2), (magnitude, 1))


@functools.partial(jax.jit, static_argnames=("format", "points", "clip", "clips"))
def _awq(
    weight: jax.Array,
    hessian: jax.Array,
    magnitude: jax.Array,
    *,
    format: Format,
    points: int,
    clip: float | None,
    clips: int,
) -> tuple[Rounded, jax.Array]:
    def matrix(weight: jax.Array, hessian: jax.Array, magnitude: jax.Array) -> Any:
        weight = weight.astype(jnp.float32)
        scales = _best(weight, hessian, magnitude, format, points)
        weight, hessian = weight * scales[:, None], hessian / (scales[:, None] * scales[None])
        rounding, grid = nearest(format), fitted(format, weight)
        if clip is not None:
            grid = _clipped(weight, hessian, rounding, grid, jnp.linspace(1.0, clip, clips))
        codes = rounding.encode(weight, grid).astype(format.container)
        return Rounded(codes, sound(grid, jnp.all(jnp.isfinite(hessian)))), scales

    return over_layers(matrix, weight, (hessian, 2), (magnitude, 1))


def _best(
    weight: jax.Array, hessian: jax.Array, magnitude: jax.Array, format: Format, points: int
) -> jax.Array:
    live = magnitude > 0
    logs = jnp.where(live, jnp.log(jnp.where(live, magnitude, 1.0)), 0.0)
    middle = jnp.sum(logs) / jnp.maximum(jnp.sum(live, dtype=jnp.float32), 1.0)
    logs = jnp.where(live, logs - middle, 0.0)
    rounding, unit = nearest(format), to_one(reductions.largest(weight, range(weight.ndim)))

    def error(power: jax.Array) -> jax.Array:
        scales = jnp.exp(power * logs)[:, None]
        scaled = weight * scales
        rounded = _rounded(scaled, rounding, fitted(format, scaled)) / scales
        return jnp.sum(by_output((weight - rounded) * unit, hessian))

    powers = jnp.linspace(0.0, 1.0, points)
    return jnp.exp(powers[jnp.argmin(jax.lax.map(error, powers))] * logs)


def _rounded(weight: jax.Array, format: Format, grid: Grid) -> jax.Array:
    return format.decode(format.encode(weight, grid), grid)


def _clipped(
    weight: jax.Array, hessian: jax.Array, format: Format, whole: Grid, parts: jax.Array
) -> Grid:
    """The grid of the best part of each interval, if that is better than the whole intervals."""
    low, high = format.extent(weight, shared_axes(format.granularity, 2, (-2,), 0))
    shape = (low.shape[0], low.shape[1])
    unit = to_one(reductions.largest(weight, range(weight.ndim)))

    def off(grid: Grid) -> jax.Array:
        return (weight - _rounded(weight, format, grid)) * unit

    def cost(part: jax.Array) -> jax.Array:
        return _own_error(off(format.grid(low * part, high * part)), hessian, shape)

    best = parts[jnp.argmin(jax.lax.map(cost, parts), axis=0)]
    narrow = format.grid(low * best, high * best)
    errors = [jnp.sum(by_output(off(grid), hessian)) for grid in (narrow, whole)]
    return jax.tree.map(lambda a, b: jnp.where(errors[0] < errors[1], a, b), narrow, whole)


def _own_error(difference: jax.Array, hessian: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """The error of what shares a grid, as if nothing else had one."""
    groups, (inputs, outputs) = shape[0], difference.shape
    if not difference.size:
        return jnp.zeros(shape)
    size, every = inputs // groups, jnp.arange(groups)
    blocks = hessian.reshape(groups, size, groups, size)[every, :, every]
    split = difference.reshape(groups, size, outputs)
    product = jnp.einsum("gij,gjo->gio", blocks, split, precision=EXACT)
    return pooled(jnp.sum(split * product, axis=1), shape)
