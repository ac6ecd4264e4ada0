"""KL divergences that float32 does not cancel away, however near the two distributions are."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

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
    if gap is None:
        possible = log_p > -jnp.inf
        gap = jnp.where(possible, log_p, 0.0) - jnp.where(possible, log_q, 0.0)
    return _divergence(log_p, log_q, gap)


# Helpers, in order of use.


def _logarithms(z: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """log softmax, the largest logit, and what is to be added to it for the log-sum-exp."""
    best = jax.lax.stop_gradient(jnp.max(z, axis=-1, keepdims=True))
    total = jnp.log(jnp.sum(jnp.exp(z - best), axis=-1, keepdims=True))
    return z - best - total, best, total


@jax.custom_jvp
def _divergence(log_p: jax.Array, log_q: jax.Array, gap: jax.Array) -> jax.Array:
    p, q, gap, near = _prepared(log_p, log_q, gap)
    series = p * _bregman(jnp.where(near, gap, 0.0))
    return jnp.sum(jnp.where(near, series, q - p + p * jnp.where(near, 0.0, gap)), axis=-1)


@functools.partial(_divergence.defjvp, symbolic_zeros=True)
def _divergence_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    """The derivative along both logarithms, of which the gap is a function."""
    p, q, gap, near = _prepared(*primals)
    away = jnp.where(near, p * jnp.expm1(-jnp.where(near, gap, 0.0)), q - p)
    value = _divergence(*primals)
    slope = jnp.zeros_like(value)
    for tangent, factor in zip(tangents[:2], (p * gap, away), strict=True):
        if not isinstance(tangent, SymbolicZero):
            slope = slope + jnp.sum(factor * tangent, axis=-1)
    return value, slope


def _prepared(
    log_p: jax.Array, log_q: jax.Array, gap: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """p, q, the gap where p is not 0, and where it is small."""
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    # What is 0 · infinity counts nothing.
    possible = p > 0
    gap = jnp.where(possible, gap, 0.0)
    near = possible & (jnp.abs(gap) < _NEAR)
    # The sum of p - q, zero but for the rounding of the two totals, which it takes out of the gap.
    change = jnp.where(near, q * jnp.expm1(jnp.where(near, gap, 0.0)), p - q)
    change = jax.lax.stop_gradient(jnp.sum(change, axis=-1, keepdims=True))
    return p, q, jnp.where(possible, gap - change, 0.0), near


def _bregman(x: jax.Array) -> jax.Array:
    """exp(-x) - 1 + x for small x, by its series: the difference would leave nothing at 1e-4."""
    terms = 15 if x.dtype == jnp.float64 else 8
    result = jnp.zeros_like(x)
    for k in reversed(range(terms)):
        result = (-1) ** k / math.factorial(k + 2) + x * result
    return x * x * result
