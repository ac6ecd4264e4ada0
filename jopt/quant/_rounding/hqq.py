"""HQQ: scales and zero points that ignore outliers, found from the weight alone."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jopt.trace.layered import spread

from .._formats.base import Format, Grid
from .._formats.floats import to_one
from .._formats.layout import shared_axes
from .layerwise import Rounded, adjustable, checked_weight, nearest, over_layers, pooled

_SMALLEST = 1e-12  # beside sums of squares of numbers near 1
_NARROWEST = 1e-35  # range of weights, whose steps are still normal floats


def hqq(
    weight: jax.Array,
    format: Format,
    *,
    p: float = 0.7,
    beta: float = 10.0,
    growth: float = 1.01,
    steps: int = 20,
    starts: int = 4,
) -> Rounded:
    """Rounds a weight on a grid that gives up outliers for the sake of the rest, without any data.

    Half-quadratic splitting of min Σ |W - Ŵ|^p, p < 1, with an auxiliary error E:

        E = sign(r) max(|r| - |r|^(p-1) / beta, 0),   r = (W - Ŵ) / step
        grid ← argmin ‖W - E·step - Ŵ(grid)‖² for the codes at hand,  beta ← growth · beta

    The second line is a straight-line fit in closed form for all that share a scale: its slope for
    a symmetric format, slope and intercept for one with a zero point.

    The iteration ends near where it began, and the least Σ |W - Ŵ|^p of all is no aim: rounding
    there costs a language model more than rounding to nearest does. So it begins anew with 0.9,
    0.8, ... of the interval, and of all grids met on the way the one of least squared error is
    kept. Rounding to nearest is the first: no weights that share a scale get worse by that measure.

    The authors hold the scale and change a zero point in floating point. Here zero points are
    integers, as the formats store them, so that they could not move little by little: the scale is
    fitted as well. They measure r in weights, with beta in proportion to them; measured in steps of
    the grid, one beta does for weights of any size.

    Args:
      weight: `[..., in, out]`.
      format: one whose grid is that of an interval: `Int`, but not a codebook fitted to values.
      p: exponent of the error, above 0 and at most 1.
      beta: weight of the splitting, to begin with.
      growth: of beta, from step to step.
      steps: of the iteration.
      starts: intervals to begin with, from 1 to 10: the whole one, 0.9 of it, 0.8, and so on.

    Returns:
      Codes and grid.

    Raises:
      TypeError: if the weight is not floating, or the format none or without such a grid.
      ValueError: if a group does not divide, or an option is out of its range.

    Example:
      >>> import jax.numpy as jnp
      >>> from jopt.quant import Int, hqq
      >>> weight = jnp.array([[1.0], [1.1], [0.9], [-1.0], [3.7]])  # the last is an outlier
      >>> bool(hqq(weight, Int(3)).grid.scale < Int(3).fit(weight, (-2,)).scale)
      True

    References:
      Hicham Badri, Appu Shaji, Half-quadratic quantization of large machine learning models, 2023,
      https://mobiusml.github.io/hqq_blog/.
    """
    weight, format = checked_weight("hqq", weight, format)
    adjustable("hqq", format)
    whole = all(isinstance(n, int) and not isinstance(n, bool) for n in (steps, starts))
    if not (whole and 0 < p <= 1 and beta > 0 and growth > 0 and steps >= 0 and 1 <= starts <= 10):
        raise ValueError(
            f"`hqq(p={p}, beta={beta}, growth={growth}, steps={steps}, starts={starts})`: "
            "0 < p <= 1, beta and growth above 0, an integer of steps, at least 0, and one of "
            "starts, from 1 to 10."
        )
    return _layers(weight, p, beta, growth, format=format, steps=steps, starts=starts)


class _Interval(NamedTuple):
    """What a grid covers."""

    low: jax.Array
    high: jax.Array


class _Best(NamedTuple):
    interval: _Interval
    error: jax.Array  # Σ (W - Ŵ)² of what shares a scale, in its own unit


@functools.partial(jax.jit, static_argnames=("format", "steps", "starts"))
def _layers(weight: jax.Array, p: Any, beta: Any, growth: Any, **options: Any) -> Rounded:
    def matrix(weight: jax.Array) -> Rounded:
        return _matrix(weight.astype(jnp.float32), p, beta, growth, **options)

    return over_layers(matrix, weight)


def _matrix(
    weight: jax.Array, p: Any, beta: Any, growth: Any, format: Format, steps: int, starts: int
) -> Rounded:
    rounding = nearest(format)
    whole = _Interval(*format.extent(weight, shared_axes(format.granularity, 2, (-2,), 0)))
    shape = whole.low.shape
    # Each that shares a scale in a unit of its own, so that no other's size or NaN matters to it.
    unit = to_one(jnp.maximum(jnp.abs(whole.low), jnp.abs(whole.high)))
    each = spread(unit, weight.shape)

    def look(interval: _Interval) -> tuple[Grid, jax.Array, jax.Array]:
        grid = rounding.grid(*interval)
        value = rounding.decode(rounding.encode(weight, grid), grid)
        # Not their difference times the unit, which is flushed to zero where weights are tiny.
        return grid, value, pooled((weight * each - value * each) ** 2, shape)

    def better(best: _Best, interval: _Interval) -> _Best:
        new = _Best(interval, look(interval)[2])
        return jax.tree.map(lambda a, b: jnp.where(new.error < best.error, a, b), new, best)

    def step(number: Any, carry: tuple[_Interval, _Best]) -> tuple[_Interval, _Best]:
        interval, best = carry
        grid, value, _ = look(interval)
        width = jnp.maximum(interval.high - interval.low, _NARROWEST) / 2.0**format.bits
        width = spread(width, weight.shape)
        own = beta * growth ** number.astype(jnp.float32)
        rest = weight - width * _shrunk((weight - value) / width, p, own)
        slope, shift = _line(value * each, rest * each, shape, grid.zero_point is not None)
        interval = _Interval(*(end * slope + shift / unit for end in interval))
        return interval, better(best, interval)

    def start(number: Any, best: _Best) -> _Best:
        part = 1 - 0.1 * number.astype(jnp.float32)
        interval = _Interval(*(end * part for end in whole))
        return jax.lax.fori_loop(0, steps, step, (interval, better(best, interval)))[1]

    best = jax.lax.fori_loop(0, starts, start, _Best(whole, look(whole)[2]))
    grid = rounding.grid(*best.interval)
    return Rounded(rounding.encode(weight, grid).astype(format.container), grid)


def _shrunk(r: jax.Array, p: Any, beta: Any) -> jax.Array:
    size = jnp.abs(r)
    threshold = jnp.where(size > 0, jnp.maximum(size, _SMALLEST) ** (p - 1), 0.0) / beta
    return jnp.sign(r) * jnp.maximum(size - threshold, 0.0)


def _line(
    x: jax.Array, y: jax.Array, shape: tuple[int, ...], free: bool
) -> tuple[jax.Array, jax.Array]:
    """Slope and intercept of the least-squares line through (x, y), or through the origin too.

    Values are near 1 at most.
    """
    count = max(x.size, 1) / max(shape[0] * shape[1], 1)
    middle_x, middle_y = (pooled(v, shape) / count if free else jnp.zeros(shape) for v in (x, y))
    x, y = x - spread(middle_x, x.shape), y - spread(middle_y, y.shape)
    square, product = pooled(x * x, shape), pooled(x * y, shape)
    slope = jnp.where(square > _SMALLEST, product / jnp.maximum(square, _SMALLEST), 1.0)
    slope = jnp.where(slope > 0, slope, 1.0)
    return slope, middle_y - slope * middle_x
