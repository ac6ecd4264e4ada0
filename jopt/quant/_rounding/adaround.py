"""AdaRound: which weights go up and which go down is learned for the least error of the outputs."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jopt.trace import reductions

from .._formats.base import Format, Grid, Int
from .._formats.floats import to_one
from .layerwise import EXACT, Rounded, by_output, checked, fitted, nearest, over_layers, sound

_LOW, _HIGH = -0.1, 1.1  # the sigmoid is stretched to these ends, then cut at 0 and 1


def adaround(
    weight: jax.Array,
    hessian: jax.Array,
    format: Format,
    *,
    steps: int = 1000,
    rate: float = 0.01,
    strength: float = 10.0,
    sharpness: tuple[float, float] = (20.0, 2.0),
    warmup: float = 0.2,
) -> Rounded:
    """Rounds each weight up or down, as a relaxation trained by Adam decides.

        Ŵ = below + h(V) · (above - below),   h(V) = clip(1.2 σ(V) - 0.1, 0, 1)
        loss = tr(Dᵀ H D) / e + λ Σ (1 - |2h - 1|^β),   D = W - Ŵ

    with V from h(V) = the fraction of W between its neighbours on the grid, e the mean error of a
    weight rounded to nearest, and β falling from a value that leaves h alone to one that drives it
    to 0 or 1. In the end h is rounded, and an output on which rounding to nearest did better keeps
    that. The scales are those of rounding to nearest, and each weight stays within a step.

    The paper takes the error over batches of data, and after the layer's ReLU; H holds the sum over
    all data, before it. Its λ belongs to its scale of that error: here both terms are counted by
    weight, so that one λ serves layers of any size.

    Args:
      weight: `[..., in, out]`.
      hessian: `[..., in, in]` or `[in, in]`, Σ x xᵀ of the layer's inputs.
      format: one of consecutive integer codes, `Int`.
      steps: of Adam; each costs one product of H with the weight.
      rate: Adam's learning rate.
      strength: λ.
      sharpness: β at first and at last.
      warmup: the part of the steps without the second term.

    Returns:
      Codes and grid.

    Raises:
      TypeError: if an array is not floating or the format is not an `Int`.
      ValueError: if shapes do not fit, the Hessian is not finite, or an option is out of its range.

    Example:
      >>> import jax.numpy as jnp
      >>> from jopt.quant import Int, adaround
      >>> hessian = jnp.eye(3) + 9.0  # what the rows add up to matters most
      >>> adaround(jnp.array([[0.45], [0.4], [1.0]]), hessian, Int(2)).codes[:, 0]
      Array([1, 0, 1], dtype=int4)

    References:
      Markus Nagel et al., Up or down? Adaptive rounding for post-training quantization, 2020,
      arXiv:2004.10568.
    """
    weight, hessian, format = checked("adaround", weight, hessian, format)
    if not isinstance(format, Int):
        raise TypeError(
            f"`adaround(..., {format})` rounds up or down by one code: give it an `Int`."
        )
    if steps < 0 or rate <= 0 or strength < 0 or not 0 <= warmup <= 1:
        raise ValueError(
            f"`adaround(steps={steps}, rate={rate}, strength={strength}, warmup={warmup})`: steps "
            "and strength at least 0, rate above 0, warmup from 0 to 1."
        )
    options = (rate, strength, sharpness, warmup)
    return _layers(weight, hessian, options, format=format, steps=steps)


@functools.partial(jax.jit, static_argnames=("format", "steps"))
def _layers(
    weight: jax.Array, hessian: jax.Array, options: Any, *, format: Int, steps: int
) -> Rounded:
    def matrix(weight: jax.Array, hessian: jax.Array) -> Rounded:
        return _matrix(weight.astype(jnp.float32), hessian, options, format, steps)

    return over_layers(matrix, weight, (hessian, 2))


def _matrix(
    weight: jax.Array, hessian: jax.Array, options: Any, format: Int, steps: int
) -> Rounded:
    grid = fitted(format, weight)
    near, below, above = _neighbors(weight, format, grid)
    unit = to_one(reductions.largest(weight, range(weight.ndim)))

    def value(codes: jax.Array) -> jax.Array:
        return format.decode(codes, grid) * unit

    exact = weight * unit
    nearest_error = by_output(exact - value(near), hessian)
    ends = value(below), value(above)
    place = _learned(exact, hessian, *ends, jnp.sum(nearest_error), options, steps)
    codes = jnp.where(place > 0.5, above, below)
    error = by_output(exact - value(codes), hessian)
    codes = jnp.where(error < nearest_error, codes, near)
    fine = jnp.all(jnp.isfinite(hessian))
    return Rounded(codes.astype(format.container), sound(grid, fine))


def _neighbors(
    weight: jax.Array, format: Int, grid: Grid
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The nearest code of each weight, and the codes below and above it (alike at the ends)."""
    near = nearest(format).encode(weight, grid)
    up = (weight > format.decode(near, grid)).astype(near.dtype)
    below = jnp.clip(near - 1 + up, format.low, format.high)
    return near, below, jnp.clip(near + up, format.low, format.high)


def _learned(
    weight: jax.Array,
    hessian: jax.Array,
    low: jax.Array,
    high: jax.Array,
    error: jax.Array,
    options: Any,
    steps: int,
) -> jax.Array:
    """Where each weight ends between its neighbours: 0 the lower, 1 the upper one."""
    rate, strength, (first, last), warmup = options
    gap = high - low
    factor = weight.size / jnp.where(error > 0, error, 1.0)
    fraction = jnp.where(gap > 0, (weight - low) / jnp.where(gap > 0, gap, 1.0), 0.5)
    inner = (jnp.clip(fraction, 0.0, 1.0) - _LOW) / (_HIGH - _LOW)

    def step(number: Any, carry: Any) -> Any:
        logits, first_moment, second_moment = carry
        number = number.astype(jnp.float32)
        done = number / steps
        along = jnp.clip((done - warmup) / jnp.maximum(1.0 - warmup, 1e-6), 0.0, 1.0)
        beta = first + (last - first) * along
        place, back = jax.vjp(_place, logits)
        left = weight - low - place * gap
        slope = -2.0 * factor * gap * jnp.dot(hessian, left, precision=EXACT)
        sides = 2.0 * place - 1.0
        pull = -2.0 * beta * jnp.sign(sides) * jnp.abs(sides) ** (beta - 1.0)
        slope = slope + jnp.where(done < warmup, 0.0, strength) * pull
        slope = back(slope)[0]
        first_moment = 0.9 * first_moment + 0.1 * slope
        second_moment = 0.999 * second_moment + 0.001 * slope * slope
        mean = first_moment / (1.0 - 0.9 ** (number + 1.0))
        spread = jnp.sqrt(second_moment / (1.0 - 0.999 ** (number + 1.0)))
        return logits - rate * mean / (spread + 1e-8), first_moment, second_moment

    logits, zeros = jnp.log(inner) - jnp.log1p(-inner), jnp.zeros_like(inner)
    return _place(jax.lax.fori_loop(0, steps, step, (logits, zeros, zeros))[0])


def _place(logits: jax.Array) -> jax.Array:
    return jnp.clip(jax.nn.sigmoid(logits) * (_HIGH - _LOW) + _LOW, 0.0, 1.0)
