"""Divergences between the distributions of a student and of a teacher, the direction in the name.

`kd` is KL(teacher ‖ student), which covers all that the teacher allows; `reverse_kl` is
KL(student ‖ teacher), which keeps to what it prefers; `js` lies between them.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from ._divergence import divergence, softened
from ._examples import check_logits, check_weight, dtype_of, kept, reduced, spread


def kd(
    student: jax.Array,
    teacher: jax.Array,
    *,
    temperature: jax.typing.ArrayLike = 1.0,
    reduction: str | None = "mean",
    where: jax.Array | None = None,
) -> jax.Array:
    """Makes the student's distribution cover the teacher's: KL(teacher ‖ student), softened.

        T² · sum_i p_i · (log p_i - log q_i),   p = softmax(teacher / T),   q = softmax(student / T)

    over the last axis, in float32. The factor T² keeps the gradient's scale as T grows. No gradient
    flows to the teacher. A class with p_i = 0 (a logit of minus infinity) counts nothing; where the
    student rules out what the teacher allows, the loss is infinite, as it should be.

    Args:
      student: logits `[..., classes]`.
      teacher: logits of the same shape.
      temperature: T, above 0; a number or a scalar array.
      reduction: `"mean"` over the examples (all leading axes), or None for one loss an example.
      where: booleans `[...]`, False for examples that do not count, such as padding; what their
        logits hold does not matter, NaN included.

    Returns:
      A float32 scalar, or `[...]` without reduction, zero where `where` is False. The mean of no
      examples is zero.

    Raises:
      ValueError: if the shapes differ, `temperature` is not above 0, or `reduction` is unknown.
      TypeError: if logits are not floats, or `where` is not boolean.

    Example:
      >>> import jax.numpy as jnp
      >>> from jopt import distill
      >>> student, teacher = jnp.array([[0.0, 0.0]]), jnp.array([[0.0, 2.0]])
      >>> print(f"{distill.kd(student, teacher, temperature=2.0):.4f}")
      0.4438

    References:
      Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015, arXiv 1503.02531.
    """
    check_logits("kd", student, teacher, temperature, reduction, where)
    log_q, log_p, gap, scale = softened(student, teacher, temperature, where)
    return reduced(scale**2 * divergence(log_p, log_q, gap), reduction, where)


def reverse_kl(
    student: jax.Array,
    teacher: jax.Array,
    *,
    temperature: jax.typing.ArrayLike = 1.0,
    reduction: str | None = "mean",
    where: jax.Array | None = None,
) -> jax.Array:
    """Keeps the student to what the teacher prefers: KL(student ‖ teacher), softened.

        T² · sum_i q_i · (log q_i - log p_i),   p = softmax(teacher / T),   q = softmax(student / T)

    A student too small to cover all modes then takes one of them well, where `kd` would spread over
    all. Where the teacher rules out what the student allows, the loss is infinite.

    Args:
      student: logits `[..., classes]`.
      teacher: logits of the same shape; no gradient flows to them.
      temperature: as of `kd`.
      reduction: as of `kd`.
      where: as of `kd`.

    Returns:
      A float32 scalar, or `[...]` without reduction.

    Raises:
      ValueError, TypeError: as `kd` does.

    Example:
      >>> import jax.numpy as jnp
      >>> from jopt import distill
      >>> two, one = jnp.array([4.0, 4.0, -4.0]), jnp.array([4.0, -4.0, -4.0])
      >>> bool(distill.reverse_kl(one, two) < distill.kd(one, two))
      True

    References:
      Gu, Dong, Wei, Huang, "MiniLLM: Knowledge Distillation of Large Language Models", 2023, arXiv
      2306.08543.
    """
    check_logits("reverse_kl", student, teacher, temperature, reduction, where)
    log_q, log_p, gap, scale = softened(student, teacher, temperature, where)
    return reduced(scale**2 * divergence(log_q, log_p, -gap), reduction, where)


def js(
    student: jax.Array,
    teacher: jax.Array,
    *,
    weight: jax.typing.ArrayLike = 0.5,
    temperature: jax.typing.ArrayLike = 1.0,
    reduction: str | None = "mean",
    where: jax.Array | None = None,
) -> jax.Array:
    """The generalised Jensen–Shannon divergence, between `kd` and `reverse_kl`, never infinite.

        T² · (w · KL(p ‖ m) + (1 - w) · KL(q ‖ m)),   m = w · p + (1 - w) · q

    with p the teacher and q the student as of `kd`. Towards w = 0 it behaves as w · `kd`, towards
    w = 1 as (1 - w) · `reverse_kl`. At the ends themselves, where the formula is zero, it is by
    convention `kd` (w = 0) and `reverse_kl` (w = 1) without that factor.

    Args:
      student: logits `[..., classes]`.
      teacher: logits of the same shape; no gradient flows to them.
      weight: w, from 0 to 1; 0.5 is the symmetric divergence. No gradient flows to it.
      temperature: as of `kd`.
      reduction: as of `kd`.
      where: as of `kd`.

    Returns:
      A float32 scalar, or `[...]` without reduction; at most T² log 2 between the ends.

    Raises:
      ValueError: if `weight` is not a scalar from 0 to 1; and as `kd` does.
      TypeError: as `kd` does.

    Example:
      >>> import jax.numpy as jnp
      >>> from jopt import distill
      >>> student, teacher = jnp.array([30.0, 0.0]), jnp.array([0.0, 30.0])
      >>> print(f"{distill.js(student, teacher):.4f}")
      0.6931

    References:
      Agarwal, Vieillard, Zhou, Stanczyk, Ramos, Geist, Bachem, "On-Policy Distillation of Language
      Models: Learning from Self-Generated Mistakes", 2023, arXiv 2306.13649.
    """
    check_logits("js", student, teacher, temperature, reduction, where)
    check_weight("js", "weight", weight)
    log_q, log_p, gap, scale = softened(student, teacher, temperature, where)
    return reduced(scale**2 * _weighed(log_p, log_q, gap, weight), reduction, where)


def standardized_kd(
    student: jax.Array,
    teacher: jax.Array,
    *,
    temperature: jax.typing.ArrayLike = 2.0,
    reduction: str | None = "mean",
    where: jax.Array | None = None,
) -> jax.Array:
    """`kd` on logits with zero mean and unit deviation, which leaves the student its own scale.

        kd(z(student), z(teacher)),   z(x) = (x - mean(x)) / sqrt(mean((x - mean(x))²) + ε²)

    over the last axis, ε = 1e-7. The student is taught relations between classes, not the size of
    the teacher's logits. The paper's deviation divides by the number of classes, as here; its code
    divides by one less. A class of one side that is ruled out (a logit of minus infinity, or of
    less than half the least number of its dtype) is left out of that side's mean and deviation. A
    mask of another size, such as -1e9, is a logit like any other here: replace it.

    Args:
      student: logits `[..., classes]`.
      teacher: logits of the same shape; no gradient flows to them.
      temperature: as of `kd`.
      reduction: as of `kd`.
      where: as of `kd`.

    Returns:
      A float32 scalar, or `[...]` without reduction.

    Raises:
      ValueError, TypeError: as `kd` does.

    Example:
      >>> import jax.numpy as jnp
      >>> from jopt import distill
      >>> teacher = jnp.array([[1.0, 2.0, 4.0]])
      >>> print(f"{distill.standardized_kd(3 * teacher + 1, teacher):.4f}")
      0.0000

    References:
      Sun, Ren, Li, Wang, Cao, "Logit Standardization in Knowledge Distillation", 2024, arXiv
      2403.01216.
    """
    check_logits("standardized_kd", student, teacher, temperature, reduction, where)
    dtype = dtype_of(student, teacher)
    student, teacher = (_standardized(x, where, dtype) for x in (student, teacher))
    log_q, log_p, gap, scale = softened(student, teacher, temperature, where)
    return reduced(scale**2 * divergence(log_p, log_q, gap), reduction, where)


# Helpers, in order of use.


def _weighed(log_p: jax.Array, log_q: jax.Array, gap: jax.Array, weight: Any) -> jax.Array:
    if not isinstance(weight, Tracer):
        if float(weight) == 0:
            return divergence(log_p, log_q, gap)
        if float(weight) == 1:
            return divergence(log_q, log_p, -gap)
        return _between(log_p, log_q, gap, jnp.asarray(weight, log_p.dtype))
    weight = jax.lax.stop_gradient(weight.astype(log_p.dtype))
    first, last = weight == 0, weight == 1
    # An end that is not asked for compares a distribution with itself: it may be infinite, and a
    # derivative of infinity that nobody asks for would still be NaN.
    forward = jnp.where(first, log_p, log_q), log_q, jnp.where(first, gap, 0.0)
    backward = log_q, jnp.where(last, log_p, log_q), jnp.where(last, -gap, 0.0)
    inside = _between(log_p, log_q, gap, jnp.where(first | last, 0.5, weight))
    loss = jnp.where(first, divergence(*forward), inside)
    return jnp.where(last, divergence(*backward), loss)


def _between(log_p: jax.Array, log_q: jax.Array, gap: jax.Array, weight: jax.Array) -> jax.Array:
    weight = jax.lax.stop_gradient(weight)
    # What neither allows counts nothing, and its logarithms have no derivative.
    possible = (jnp.exp(log_p) > 0) | (jnp.exp(log_q) > 0)
    safe_p, safe_q = (jnp.where(possible, x, 0.0) for x in (log_p, log_q))
    log_m = jnp.logaddexp(safe_p + jnp.log(weight), safe_q + jnp.log1p(-weight))
    log_m = jnp.where(possible, log_m, -jnp.inf)
    # log p - log m and log q - log m; where p and q are near, from their gap, as exact as that is.
    near = possible & (jnp.abs(gap) < 1)
    small = jnp.where(near, gap, 0.0)
    of_p = jnp.where(near, -jnp.log1p((1 - weight) * jnp.expm1(-small)), safe_p - log_m)
    of_q = jnp.where(near, -jnp.log1p(weight * jnp.expm1(small)), safe_q - log_m)
    forward, backward = divergence(log_p, log_m, of_p), divergence(log_q, log_m, of_q)
    return weight * forward + (1 - weight) * backward


def _standardized(logits: jax.Array, where: jax.Array | None, dtype: Any) -> jax.Array:
    # What a model writes instead of minus infinity: its square would be infinite.
    allowed = logits > jnp.finfo(jnp.result_type(logits)).min / 2
    if where is not None:
        allowed = allowed | ~spread(where, allowed.ndim)
    logits = jnp.where(allowed, kept(logits, where, dtype), 0.0)
    classes = jnp.maximum(jnp.sum(allowed, axis=-1, keepdims=True, dtype=dtype), 1.0)
    mean = jnp.sum(logits, axis=-1, keepdims=True) / classes
    centered = jnp.where(allowed, logits - mean, 0.0)
    variance = jnp.sum(centered**2, axis=-1, keepdims=True) / classes
    return jnp.where(allowed, centered * jax.lax.rsqrt(variance + 1e-14), -jnp.inf)
