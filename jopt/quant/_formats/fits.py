"""Code values fitted to data or to a density: k-means in one dimension, and Lloyd–Max."""

import functools
import math
from statistics import NormalDist

import jax
import jax.numpy as jnp
import numpy as np

from .exact import exact_cumsum, exact_sum

_FRACTION = 23  # bits of the whole numbers that stand for values in [-1, 1]
_SAMPLE = 1024  # quantiles that the start is made from


@functools.partial(jax.jit, static_argnames=("k", "zero", "iterations"))
def kmeans(rows: jax.Array, k: int, *, zero: bool, iterations: int) -> jax.Array:
    """Ascending centers of k clusters of each row of values in [-1, 1]: `[rows, n] -> [rows, k]`.

    Lloyd's iterations on the sorted row, until no value changes its cluster. A cluster that has
    lost all its values keeps its center. With `zero` the center next to zero is held there.
    """
    fit = functools.partial(_kmeans, k=k, zero=zero, iterations=iterations)
    return jax.vmap(fit)(jnp.nan_to_num(rows))


def root_mean_square(rows: jax.Array) -> jax.Array:
    """√(mean x²) of each row of values in [-1, 1]: `[rows, n] -> [rows]`."""
    # By way of integers: XLA multiplies two products with constants in another order.
    whole = jnp.round(rows * np.float32(2**24)).astype(jnp.int32).astype(jnp.float32)
    squares = jnp.round(whole * whole * np.float32(2.0**-18)).astype(jnp.int32)
    # A product, since XLA makes one of a division by a constant, but not of two constants.
    mean = exact_sum(squares, 31) * np.float32(2.0**-30 / max(rows.shape[-1], 1))
    return jnp.sqrt(mean)


@functools.cache
def normal_levels(k: int) -> tuple[float, ...]:
    """The k values that round a standard normal variable with the least mean squared error.

    Each is the mean of the density between the midpoints to its neighbors; found by Newton's method
    from the density that is best for many levels (the normal one, √3 times as wide).
    """
    normal = NormalDist()
    levels = np.array([math.sqrt(3) * normal.inv_cdf((j + 0.5) / k) for j in range(k)])
    for _ in range(100):
        step = np.linalg.solve(*_newton(levels, normal))
        # A whole step may cross neighbors; half the smallest gap a step may not.
        gap = np.diff(levels).min(initial=np.inf)
        levels = levels - step * min(1.0, gap / 4 / max(np.abs(step).max(), 1e-300))
        if np.abs(step).max() < 1e-10:  # the next one would be of its square
            break
    levels = (levels - levels[::-1]) / 2  # its own mirror image, to the last bit
    return tuple(float(np.float32(level)) for level in levels)


# Helpers, in order of use.


def _kmeans(values: jax.Array, k: int, zero: bool, iterations: int) -> jax.Array:
    ordered, n = jnp.sort(values), values.shape[0]
    if n == 0:
        return jnp.zeros(k, jnp.float32)
    whole = jnp.round(ordered * np.float32(2**_FRACTION)).astype(jnp.int32)
    between = exact_cumsum(whole, _FRACTION + 2)

    def improve(state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        centers, bounds, _, count = state
        middle = (centers[1:] + centers[:-1]) * 0.5
        inner = jnp.searchsorted(ordered, middle, side="right").astype(jnp.int32)
        new = jnp.pad(jnp.pad(inner, (0, 1), constant_values=n), (1, 0))
        sizes = jnp.diff(new)
        means = between(new) * np.float32(2.0**-_FRACTION)
        means = means / jnp.maximum(sizes, 1).astype(jnp.float32)
        moved = jnp.where((sizes > 0) & ~held, means, centers)
        return moved, new, jnp.any(new != bounds), count + 1

    start = _start(ordered, k)
    held = jnp.zeros(k, bool)
    if zero:  # in place of the center next to it, and where it belongs in the order
        rest = jnp.where(jnp.arange(k) == jnp.argmin(jnp.abs(start)), 0.0, start)
        start, held = jnp.sort(rest), jnp.arange(k) == jnp.sum(rest < 0)
    state = (start, jnp.zeros(k + 1, jnp.int32), jnp.ones((), bool), jnp.zeros((), jnp.int32))
    return jax.lax.while_loop(lambda s: s[2] & (s[3] < iterations), improve, state)[0]


def _start(ordered: jax.Array, k: int) -> jax.Array:
    """Centers whose density goes as a power of the values', near the best for many centers.

    That is the third root (Panter and Dite, 1951). Between neighboring quantiles d apart the
    density is 1/d, so they hold d^(2/3) of the centers; 5/8 is taken, which square roots give.
    """
    n = ordered.shape[0]
    if n <= k:
        return jnp.pad(ordered, (0, k - n), mode="edge")
    m = min(n, _SAMPLE)
    points = ordered[np.arange(m) * n // m]
    gaps = jnp.diff(jnp.concatenate([points, ordered[-1:]]))
    share = jnp.sqrt(gaps) * jnp.sqrt(jnp.sqrt(jnp.sqrt(gaps)))
    top = jnp.max(share)
    share = jnp.where(top > 0, share / top, 0.0)
    mass = jnp.pad(jnp.cumsum(jnp.round(share * np.float32(2**20)).astype(jnp.int32)), (1, 0))
    parts = ((np.arange(k) + 0.5) / k).astype(np.float32)
    wanted = (mass[-1].astype(jnp.float32) * parts).astype(jnp.int32)
    # Of the two ends of the gap that holds a center, the nearer: no value but the two is known.
    ends = jnp.concatenate([points, ordered[-1:]])
    return ends[jnp.searchsorted((mass[1:] + mass[:-1]) // 2, wanted, side="right")]


def _newton(levels: np.ndarray, normal: NormalDist) -> tuple[np.ndarray, np.ndarray]:
    """Jacobian and value of `level - mean of its cell`."""
    ends = [-math.inf, *((levels[1:] + levels[:-1]) / 2), math.inf]
    density = np.array([0.0, *map(normal.pdf, ends[1:-1]), 0.0])
    mass = np.diff([0.0, *map(normal.cdf, ends[1:-1]), 1.0])
    mean = -np.diff(density) / mass
    inner = np.array(ends[1:-1])
    right = np.append(density[1:-1] * (inner - mean[:-1]) / mass[:-1], 0.0)  # d mean / d upper end
    left = np.append(0.0, density[1:-1] * (mean[1:] - inner) / mass[1:])  # d mean / d lower end
    jacobian = np.diag(1 - (left + right) / 2)
    jacobian -= np.diag(right[:-1] / 2, 1) + np.diag(left[1:] / 2, -1)
    return jacobian, levels - mean
