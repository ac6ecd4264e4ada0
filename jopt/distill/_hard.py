"""The loss of true labels or of a teacher's words, and how it is weighed against soft ones."""

import jax
import jax.numpy as jnp

from ._examples import (
    check_floats,
    check_labels,
    check_options,
    check_weight,
    dtype_of,
    kept,
    numbers,
    reduced,
)


def hard(
    student: jax.Array,
    labels: jax.Array,
    *,
    smoothing: jax.typing.ArrayLike = 0.0,
    reduction: str | None = "mean",
    where: jax.Array | None = None,
) -> jax.Array:
    """Cross-entropy of true labels, smoothed if asked.

        -sum_i y_i · log q_i,   y = (1 - s) · onehot(label) + s / classes,   q = softmax(student)

    Args:
      student: logits `[..., classes]`.
      labels: integers `[...]`.
      smoothing: s, from 0 to 1. Above 0, a class whose logit is minus infinity makes the loss
        infinite.
      reduction: `"mean"` over the examples (all leading axes), or None for one loss an example.
      where: booleans `[...]`, False for examples that do not count, whatever their label.

    Returns:
      A float32 scalar, or `[...]` without reduction. It is NaN where a label that counts names no
      class.

    Raises:
      ValueError: if shapes differ, or an option is not one of those above.
      TypeError: if logits are not floats, labels not integers, or `where` is not boolean.

    Example:
      >>> import jax.numpy as jnp
      >>> from jopt import distill
      >>> print(f"{distill.hard(jnp.zeros((1, 4)), jnp.array([2]), smoothing=0.1):.4f}")
      1.3863

    References:
      Szegedy, Vanhoucke, Ioffe, Shlens, Wojna, "Rethinking the Inception Architecture for Computer
      Vision", 2015, arXiv 1512.00567 (smoothing).
    """
    _check("hard", student, labels, "labels")
    check_options("hard", reduction, where, jnp.shape(labels))
    check_weight("hard", "smoothing", smoothing)
    log_q = _log_q(student, where)
    share = jnp.asarray(smoothing, log_q.dtype)
    even = jnp.where(share > 0, -jnp.mean(log_q, axis=-1), 0.0)
    return reduced((1 - share) * _surprise(log_q, labels) + share * even, reduction, where)


def sequence(
    student: jax.Array,
    tokens: jax.Array,
    *,
    normalize: bool = False,
    reduction: str | None = "mean",
    where: jax.Array | None = None,
) -> jax.Array:
    """Sequence-level distillation: the student learns what the teacher wrote, word for word.

        -sum_t log q_t[tokens_t],   q_t = softmax(student_t)

    The tokens are the teacher's own output, by beam search or by sampling, and `student` holds the
    student's logits for them, each given those before it. (Word-level distillation is `kd` over the
    tokens.)

    Args:
      student: logits `[..., time, classes]`.
      tokens: integers `[..., time]`.
      normalize: divide by the number of tokens that count.
      reduction: `"mean"` over the sequences, or None for one loss a sequence, `[...]`.
      where: booleans `[..., time]`, False for tokens that do not count.

    Returns:
      A float32 scalar, or `[...]` without reduction. The mean is over all sequences, those without
      a token that counts included, whose loss is zero.

    Raises:
      ValueError: if shapes differ, or `reduction` is unknown.
      TypeError: if logits are not floats, tokens not integers, or `where` is not boolean.

    Example:
      >>> import jax.numpy as jnp
      >>> from jopt import distill
      >>> print(f"{distill.sequence(jnp.zeros((1, 3, 4)), jnp.array([[2, 0, 1]])):.4f}")
      4.1589

    References:
      Kim, Rush, "Sequence-Level Knowledge Distillation", 2016, arXiv 1606.07947.
    """
    _check("sequence", student, tokens, "tokens")
    if jnp.ndim(tokens) < 1:
        raise ValueError("`sequence(student, tokens)` expects tokens [..., time]; they are [].")
    check_options("sequence", reduction, where, jnp.shape(tokens))
    each = reduced(_surprise(_log_q(student, where), tokens), None, where)
    loss = jnp.sum(each, axis=-1)
    if normalize:
        counted = jnp.ones(each.shape, bool) if where is None else where
        loss = loss / jnp.maximum(jnp.sum(counted, axis=-1, dtype=loss.dtype), 1.0)
    return reduced(loss, reduction, None)


def mixed(hard: jax.Array, soft: jax.Array, *, weight: jax.typing.ArrayLike) -> jax.Array:
    """Weighs the loss of the labels against the loss of the teacher: (1 - w) · hard + w · soft.

    Args:
      hard: a loss, one for all or one an example.
      soft: another of the same shape.
      weight: w, from 0 to 1; a number, or a scalar array such as a schedule gives.

    Raises:
      ValueError: if `weight` is not a scalar from 0 to 1, or the shapes differ.

    Example:
      >>> import jax.numpy as jnp
      >>> from jopt import distill
      >>> float(distill.mixed(jnp.array(1.0), jnp.array(3.0), weight=0.75))
      2.5
    """
    check_weight("mixed", "weight", weight)
    if jnp.shape(hard) != jnp.shape(soft):
        raise ValueError(
            "`mixed(hard, soft)` expects losses of one shape: hard is "
            f"{list(jnp.shape(hard))}, soft is {list(jnp.shape(soft))}."
        )
    share = jnp.asarray(weight, jnp.result_type(soft))
    return (1 - share) * hard + share * soft


# Helpers, in order of use.


def _check(name: str, student: jax.Array, labels: jax.Array, what: str) -> None:
    check_floats(name, {"student": student}, "logits")
    if not jnp.ndim(student):
        raise ValueError(f"`{name}(student, {what})` expects logits [..., classes]; they are [].")
    check_labels(name, labels, jnp.shape(student)[:-1], what)


def _log_q(student: jax.Array, where: jax.Array | None) -> jax.Array:
    return jax.nn.log_softmax(kept(student, where, dtype_of(student)), axis=-1)


def _surprise(log_q: jax.Array, labels: jax.Array) -> jax.Array:
    """-log q of each label; NaN where it names no class."""
    index, named = numbers(labels, log_q.shape[-1])
    own = jnp.take_along_axis(log_q, jnp.where(named, index, 0)[..., None], axis=-1)[..., 0]
    return jnp.where(named, -own, jnp.nan)
