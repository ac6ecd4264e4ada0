"""Losses between the logits of a student and of a teacher."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer


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
    _check("kd", student, teacher, temperature, reduction, where)
    if where is not None:
        where = jnp.broadcast_to(where, student.shape[:-1])
    # float32, or wider if the logits are.
    wide = jnp.float64 in (student.dtype, teacher.dtype)
    dtype = jnp.float64 if wide else jnp.float32
    scale = jnp.asarray(temperature, dtype)
    log_p = _log_softmax(jax.lax.stop_gradient(teacher), scale, where)
    log_q = _log_softmax(student, scale, where)
    p = jnp.exp(log_p)
    # Both logarithms are replaced where p is 0, or the gradient would meet 0 · infinity.
    possible = p > 0
    ratio = jnp.where(possible, log_p, 0.0) - jnp.where(possible, log_q, 0.0)
    return _reduced(scale**2 * jnp.sum(p * ratio, axis=-1), reduction, where)


def _log_softmax(logits: jax.Array, scale: jax.Array, where: jax.Array | None) -> jax.Array:
    logits = logits.astype(scale.dtype)
    if where is not None:
        # Before anything else, so that no NaN of padding reaches the gradient.
        logits = jnp.where(where[..., None], logits, 0.0)
    return jax.nn.log_softmax(logits / scale, axis=-1)


def _reduced(loss: jax.Array, reduction: str | None, where: jax.Array | None) -> jax.Array:
    """One loss an example, or the mean over those that count."""
    if where is not None:
        loss = jnp.where(where, loss, 0.0)
    if reduction is None:
        return loss
    if where is None:
        return jnp.mean(loss)
    return jnp.sum(loss) / jnp.maximum(jnp.sum(where, dtype=loss.dtype), 1.0)


def _check(
    name: str,
    student: jax.Array,
    teacher: jax.Array,
    temperature: Any,
    reduction: str | None,
    where: jax.Array | None,
) -> None:
    for who, logits in (("student", student), ("teacher", teacher)):
        if not jnp.issubdtype(jnp.result_type(logits), jnp.floating):
            raise TypeError(
                f"`{name}(student, teacher)` expects logits; {who} is {jnp.result_type(logits)}."
            )
    found, expected = jnp.shape(student), jnp.shape(teacher)
    if found != expected or not found:
        what = "have the same classes" if found[-1:] != expected[-1:] else "have the same shape"
        raise ValueError(
            f"`{name}(student, teacher)` expects logits [..., classes] that {what}: student is "
            f"{list(found)}, teacher is {list(expected)}."
        )
    if jnp.ndim(temperature) or (
        not isinstance(temperature, Tracer) and not float(temperature) > 0
    ):
        raise ValueError(
            f"`{name}(..., temperature={temperature})` expects a scalar above 0; 1 leaves the "
            "distributions as they are, more makes them softer."
        )
    if reduction not in ("mean", None):
        raise ValueError(
            f'`{name}(..., reduction={reduction!r})` expects "mean", or None for the loss of '
            "each example."
        )
    if where is None:
        return
    if jnp.result_type(where) != jnp.bool_:
        raise TypeError(f"`{name}(..., where=...)` expects booleans, not {jnp.result_type(where)}.")
    if jnp.shape(where) != found[:-1]:
        raise ValueError(
            f"`{name}(..., where=...)` expects one boolean an example, {list(found[:-1])}; it is "
            f"{list(jnp.shape(where))}."
        )
