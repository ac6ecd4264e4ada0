"""Divergences between the distributions of a student and of a teacher, the direction in the name.

`kd` is KL(teacher ‖ student), which covers all that the teacher allows; `reverse_kl` is
KL(student ‖ teacher), which keeps to what it prefers; `js` lies between them.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from ._examples import check_logits, check_weight, dtype_of, kept, reduced


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
    log_q, log_p, scale = softened(student, teacher, temperature, where)
    return reduced(scale**2 * divergence(log_p, log_q), reduction, where)


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
    log_q, log_p, scale = softened(student, teacher, temperature, where)
    return reduced(scale**2 * divergence(log_q, log_p), reduction, where)


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
    log_q, log_p, scale = softened(student, teacher, temperature, where)
    return reduced(scale**2 * _weighed(log_p, log_q, weight), reduction, where)


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
    divides by one less.

    Args:
      student: finite logits `[..., classes]`.
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
    student, teacher = (_standardized(kept(x, where, dtype)) for x in (student, teacher))
    log_q, log_p, scale = softened(student, teacher, temperature, where)
    return reduced(scale**2 * divergence(log_p, log_q), reduction, where)


# Helpers, in order of use.


def softened(
    student: jax.Array, teacher: jax.Array, temperature: Any, where: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The logarithms of both distributions, the student's first, and the temperature."""
    dtype = dtype_of(student, teacher)
    scale = jnp.asarray(temperature, dtype)
    teacher = jax.lax.stop_gradient(teacher)
    log_q, log_p = (
        jax.nn.log_softmax(kept(x, where, dtype) / scale, axis=-1) for x in (student, teacher)
    )
    return log_q, log_p, scale


def divergence(log_p: jax.Array, log_q: jax.Array) -> jax.Array:
    """KL(p ‖ q) over the last axis."""
    p = jnp.exp(log_p)
    # Both logarithms are replaced where p is 0, or the gradient would meet 0 · infinity.
    possible = p > 0
    ratio = jnp.where(possible, log_p, 0.0) - jnp.where(possible, log_q, 0.0)
    return jnp.sum(p * ratio, axis=-1)


def _weighed(log_p: jax.Array, log_q: jax.Array, weight: Any) -> jax.Array:
    if isinstance(weight, Tracer):
        loss = _between(log_p, log_q, jnp.clip(weight.astype(log_p.dtype), 1e-6, 1 - 1e-6))
        loss = jnp.where(weight == 0, divergence(log_p, log_q), loss)
        return jnp.where(weight == 1, divergence(log_q, log_p), loss)
    if float(weight) in (0.0, 1.0):
        return divergence(log_q, log_p) if float(weight) else divergence(log_p, log_q)
    return _between(log_p, log_q, jnp.asarray(weight, log_p.dtype))


def _between(log_p: jax.Array, log_q: jax.Array, weight: jax.Array) -> jax.Array:
    weight = jax.lax.stop_gradient(weight)
    # What neither allows counts nothing, and its logarithms have no derivative.
    possible = (jnp.exp(log_p) > 0) | (jnp.exp(log_q) > 0)
    safe_p, safe_q = (jnp.where(possible, x, 0.0) for x in (log_p, log_q))
    log_m = jnp.logaddexp(safe_p + jnp.log(weight), safe_q + jnp.log1p(-weight))
    return weight * divergence(log_p, log_m) + (1 - weight) * divergence(log_q, log_m)


def _standardized(logits: jax.Array) -> jax.Array:
    centered = logits - jnp.mean(logits, axis=-1, keepdims=True)
    variance = jnp.mean(centered**2, axis=-1, keepdims=True)
    return centered * jax.lax.rsqrt(variance + 1e-14)
