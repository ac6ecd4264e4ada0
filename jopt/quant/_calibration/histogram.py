"""Histograms of values as arrays: counting, laying one onto another range, and searches on them.

Counts are float32 `[..., bins]` over equal bins from `low` to `high`, both `[...]`. What counts and
moves runs under `jit`; the searches that choose a range are NumPy in float64 on one histogram.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._formats.base import Format
from .._formats.floats import to_one

FINE = 16  # parts that a bin is cut into before it is laid onto another range


def count(x: jax.Array, low: jax.Array, high: jax.Array, bins: int) -> jax.Array:
    """How many values fall into each bin; those beyond the ends, and NaN, into none.

    Where the ends are equal the bins go from one below to one above.

    Args:
      x: values `[..., N]`.
      low: lower end `[...]`.
      high: upper end `[...]`, which belongs to the last bin.
      bins: how many.

    Returns:
      `[..., bins]`, float32.
    """
    flat = x.reshape(math.prod(x.shape[:-1]), x.shape[-1]).astype(jnp.float32)
    one = functools.partial(_count, bins=bins)
    counts = jax.vmap(one)(flat, jnp.reshape(low, -1), jnp.reshape(high, -1))
    return counts.reshape(*x.shape[:-1], bins)


def _count(x: jax.Array, low: jax.Array, high: jax.Array, bins: int) -> jax.Array:
    low, high = _apart(low, high)
    counted = (x >= low) & (x <= high)
    unit = to_one(jnp.maximum(jnp.abs(low), jnp.abs(high)))  # products of large values overflow
    x, low, high = x * unit, low * unit, high * unit
    # The barrier keeps XLA from multiplying by a reciprocal, which moves values on a bin's edge.
    stretched = (jnp.where(counted, x, low) - low) * bins
    pair = jax.lax.optimization_barrier((stretched, jnp.broadcast_to(high - low, x.shape)))
    place = jnp.minimum(jnp.divide(*pair).astype(jnp.int32), bins - 1)
    zeros = jnp.zeros_like(place, shape=(bins,))
    return zeros.at[place].add(counted.astype(jnp.int32)).astype(jnp.float32)


def _apart(low: jax.Array, high: jax.Array) -> tuple[jax.Array, jax.Array]:
    same = (low == high).astype(jnp.float32)
    return low - same, high + same


def moved(
    counts: jax.Array, low: jax.Array, high: jax.Array, new_low: jax.Array, new_high: jax.Array
) -> jax.Array:
    """The histogram over a range that contains the old one.

    Each bin is cut into 16 equal parts, and each part goes whole into the new bin that has its
    middle, as in PyTorch's `HistogramObserver`. A range of one value goes into one bin.
    """
    bins = counts.shape[-1]
    ends = [jnp.reshape(end, -1) for end in (low, high, new_low, new_high)]
    result = jax.vmap(_moved)(counts.reshape(-1, bins), *ends)
    return result.reshape(counts.shape)


def _moved(
    counts: jax.Array, low: jax.Array, high: jax.Array, new_low: jax.Array, new_high: jax.Array
) -> jax.Array:
    bins = counts.shape[-1]
    parts = jnp.repeat(counts, FINE) / FINE
    middles = _linspace(low, high, bins * FINE)[:-1] + 0.5 * ((high - low) / (bins * FINE))
    bounds = _linspace(new_low, new_high, bins)
    # The last bound that is not above: guessed, then compared, which is faster than a search.
    place = (middles - new_low) * (bins / jnp.where(low == high, 1.0, new_high - new_low))
    place = jnp.clip(place.astype(jnp.int32), 0, bins - 1)
    place = jnp.where(bounds[place] > middles, place - 1, place)
    place = jnp.where(bounds[place + 1] <= middles, place + 1, place)
    place = jnp.clip(place, 0, bins - 1)
    spread = jnp.zeros_like(counts).at[place].add(parts)
    single = _count(low[None], new_low, new_high, bins) * jnp.sum(counts)
    spread = jnp.where(low == high, single, spread)
    return jnp.where((low == new_low) & (high == new_high), counts, spread)


def _linspace(low: jax.Array, high: jax.Array, steps: int) -> jax.Array:
    """`steps + 1` points, counted from the nearer end."""
    step, i = (high - low) / steps, jnp.arange(steps + 1, dtype=jnp.float32)
    return jnp.where(i < (steps + 1) // 2, low + step * i, high - step * (steps - i))


# Searches: one histogram on the host gives one range.


def least_squares(counts: np.ndarray, low: float, high: float, levels: int) -> tuple[float, float]:
    """The range that PyTorch's `HistogramObserver` finds for `levels` quantization levels.

    From both ends the fraction 1e-5 of all values is given up at a time, at the end where that
    takes more bins, for as long as the squared error of values spread evenly within their bins,
    rounded to `levels` steps, does not rise.
    """
    bins, step = len(counts), 1e-5
    low32, high32 = np.float32(low), np.float32(high)
    width = float(high32) - float(low32)
    total, below = counts.sum(dtype=np.float64), np.cumsum(counts, dtype=np.float64)
    alpha, beta, start, end, least = 0.0, 1.0, 0, bins - 1, math.inf
    while alpha < beta:
        next_alpha, next_beta = alpha + step, beta - step
        left, right = start, end
        while left < end and below[left] < np.float32(next_alpha * total):
            left += 1
        while right > start and below[right] > np.float32(next_beta * total):
            right -= 1
        next_start, next_end = start, end
        if left - start > end - right:
            next_start, alpha = left, next_alpha
        else:
            next_end, beta = right, next_beta
        if (next_start, next_end) == (start, end):
            continue
        error = _squared_error(counts, width / bins, next_start, next_end, levels)
        if error > least:
            break
        least, start, end = error, next_start, next_end
    bin_width = (high32 - low32) / np.float32(bins)
    return float(low32 + bin_width * np.float32(start)), float(
        low32 + bin_width * np.float32(end + 1)
    )


def _squared_error(counts: np.ndarray, width: float, start: int, end: int, levels: int) -> float:
    """Of rounding to `levels` steps across the bins from `start` to `end`."""
    step = width * (end - start + 1) / levels
    if step == 0.0:
        return 0.0
    begin = (np.arange(len(counts)) - start) * width
    finish = begin + width
    first = np.clip(np.floor(begin / step), 0, levels - 1)
    last = np.clip(np.floor(finish / step), 0, levels - 1)
    density = counts / width

    def cubes(a: Any, b: Any) -> Any:
        return (b**3 - a**3) / 3

    error = cubes(begin - (first + 0.5) * step, step / 2)
    error = error + (last - first - 1) * cubes(-step / 2, step / 2)
    error = error + cubes(-step / 2, finish - (last + 0.5) * step)
    return float(np.sum(density * error))


def entropy(counts: np.ndarray, levels: int) -> float:
    """The clipping threshold of least divergence, as a fraction of the histogram's range.

    `counts` are of magnitudes, from 0. For each number i of bins kept, from `levels` on,

        P = the first i counts, all beyond added to the last;  Q = the first i counts, merged into
        `levels` equal stretches, each spread evenly over its non-empty bins;  KL(P ‖ Q)

    both normalized. Bin b belongs to stretch ⌊b·levels/i⌋. Where P has values and Q has none the
    divergence is infinite. The threshold is (m + ½) bins for the best m < the number of bins, and
    the whole range where nothing is clipped.
    """
    counts, bins = counts.astype(np.float64), len(counts)
    total = counts.sum()
    if total == 0 or bins <= levels:
        return 1.0
    kept = np.arange(levels, bins + 1)
    # Sums over any run of bins are differences of running sums, so that all i are done at once.
    sums = np.concatenate([[0.0], np.cumsum(counts)])
    filled = np.concatenate([[0], np.cumsum(counts > 0)])
    logs = np.concatenate([[0.0], np.cumsum(_xlogx(counts))])
    bounds = -(-np.arange(levels + 1)[None] * kept[:, None] // levels)
    mass = np.diff(sums[bounds], axis=1)
    many = np.maximum(np.diff(filled[bounds], axis=1), 1)
    inside = sums[kept]  # counts that Q is made of
    with np.errstate(divide="ignore", invalid="ignore"):
        log_q = np.log(mass / many)  # of every non-empty bin of the stretch
        cross = np.where(mass > 0, mass * log_q, 0.0).sum(axis=1)
        divergence = logs[kept] - cross
        # The last bin holds what lies beyond as well.
        last, beyond = counts[kept - 1], total - inside
        extra = (
            _xlogx(last + beyond)
            - _xlogx(last)
            - np.where(beyond > 0, beyond * np.where(last > 0, log_q[:, -1], -np.inf), 0.0)
        )
        divergence = (divergence + extra) / total + np.log(inside / total)
    divergence = np.where(inside > 0, divergence, np.inf)
    best = kept[np.argmin(divergence)]
    return min((best + 0.5) / bins, 1.0)


def _xlogx(x: np.ndarray) -> np.ndarray:
    return np.where(x > 0, x * np.log(np.where(x > 0, x, 1.0)), 0.0)


def quantile(counts: np.ndarray, low: float, high: float, fraction: float) -> float:
    """The value below which `fraction` of the counts lie, even within a bin."""
    total = counts.sum(dtype=np.float64)
    if total == 0:
        return low
    below = np.concatenate([[0.0], np.cumsum(counts, dtype=np.float64)]) / total
    bin = int(np.clip(np.searchsorted(below, fraction, side="left") - 1, 0, len(counts) - 1))
    part = below[bin + 1] - below[bin]
    within = (fraction - below[bin]) / part if part > 0 else 0.0
    return low + (high - low) * (bin + min(max(within, 0.0), 1.0)) / len(counts)


def rounded_least_squares(
    counts: np.ndarray, low: float, high: float, format: Format, steps: int
) -> tuple[float, float]:
    """The range, of `steps` × `steps` parts of the whole one, whose rounding errs least.

    Every value is taken to lie in the middle of its bin. First both ends shrink together, then one
    after the other until neither gets better.
    """
    middles = low + (high - low) * (np.arange(len(counts)) + 0.5) / len(counts)
    weights, middles = jnp.asarray(counts), jnp.asarray(middles, jnp.float32)
    low, high = min(low, 0.0), max(high, 0.0)
    unit = to_one(jnp.float32(max(-low, high)))
    parts = np.arange(1, steps + 1) / steps

    def best(pairs: np.ndarray) -> tuple[float, float]:
        ends = jnp.asarray(pairs * [low, high], jnp.float32)
        return tuple(pairs[int(np.argmin(_errors(middles, weights, ends, unit, format)))])

    a, b = best(np.stack([parts, parts], 1))
    for _ in range(0 if format_is_symmetric(format) else 8):
        before = a, b
        a, b = best(np.stack([parts, np.full(steps, b)], 1))
        a, b = best(np.stack([np.full(steps, a), parts], 1))
        if (a, b) == before:
            break
    return a * low, b * high


def format_is_symmetric(format: Format) -> bool:
    """Whether a format's grid is its own mirror image; what has no zero point is."""
    return getattr(format, "symmetric", True)


@functools.partial(jax.jit, static_argnames="format")
def _errors(
    middles: jax.Array, weights: jax.Array, ends: jax.Array, unit: jax.Array, format: Format
) -> jax.Array:
    def error(pair: jax.Array) -> jax.Array:
        grid = format.grid(pair[:1], pair[1:])
        rounded = format.decode(format.encode(middles, grid), grid)
        return jnp.sum(weights * jnp.square((rounded - middles) * unit))

    return jax.lax.map(error, ends, batch_size=16)
