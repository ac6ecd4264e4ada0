"""KL divergences that float32 does not cancel away, however near the two distributions are."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from ._examples import dtype_of, kept

_NEAR = 0.5  # below this a series, beyond it the plain difference


def softened(
    student: jax.Array, teacher: jax.Array, temperature: Any, where: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """The logarithms of both distributions, the student's first; their `gap`; the temperature.

    The gap is log p - log q, taken from the difference of the logits, which is exact where the
    logarithms are rounded.
    """
    dtype = dtype_of(student, teacher)
    scale = jnp.asarray(temperature, dtype)
    s, t = (kept(x, where, dtype) for x in (student, jax.lax.stop_gradient(teacher)))
    (log_q, best_q, total_q), (log_p, best_p, total_p) = (_logarithms(x / scale) for x in (s, t))
    gap = (t - s) / scale - (best_p - best_q) - (total_p - total_q)
    return log_q, log_p, gap, scale


def divergence(log_p: jax.Array, log_q: jax.Array, gap: jax.Array | None = None) -> jax.Array:
    """KL(p ‖ q) over the last axis, for distributions that sum to 1.

        sum_i p_i · (exp(-g_i) - 1 + g_i),   g = log p - log q

    which is sum_i p_i · g_i, because both sum to 1, in terms of which none is negative. `gap` is g
    where it is known better than the difference of the logarithms.
    """
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    # Both logarithms are replaced where p is 0, or the gradient would meet 0 · infinity.
    possible = p > 0
    if gap is None:
        gap = jnp.where(possible, log_p, 0.0) - jnp.where(possible, log_q, 0.0)
    gap = jnp.where(possible, gap, 0.0)
    near = possible & (jnp.abs(gap) < _NEAR)
    # The sum of p - q, zero but for the rounding of the two totals, which it takes out of the gap.
    change = jnp.where(near, q * jnp.expm1(jnp.where(near, gap, 0.0)), p - q)
    gap = gap - jax.lax.stop_gradient(jnp.sum(change, axis=-1, keepdims=True))
    series = p * _bregman(jnp.where(near, gap, 0.0))
    return jnp.sum(jnp.where(near, series, q - p + p * jnp.where(near, 0.0, gap)), axis=-1)


# Helpers, in order of use.


def _logarithms(z: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """log softmax, the largest logit, and what is to be added to it for the log-sum-exp."""
    best = jax.lax.stop_gradient(jnp.max(z, axis=-1, keepdims=True))
    total = jnp.log(jnp.sum(jnp.exp(z - best), axis=-1, keepdims=True))
    return z - best - total, best, total


@jax.custom_jvp
def _bregman(x: jax.Array) -> jax.Array:
    """exp(-x) - 1 + x for small x, by its series: the difference would leave nothing at 1e-4."""
    terms = 15 if x.dtype == jnp.float64 else 8
    result = jnp.zeros_like(x)
    for k in reversed(range(terms)):
        result = (-1) ** k / math.factorial(k + 2) + x * result
    return x * x * result


@_bregman.defjvp
def _bregman_jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> Any:
    (x,), (dx,) = primals, tangents
    return _bregman(x), -jnp.expm1(-x) * dx
