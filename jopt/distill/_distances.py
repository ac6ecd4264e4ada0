"""Distances between the probabilities, or the logits, of a student and of a teacher."""

from typing import Literal

import jax
import jax.numpy as jnp

from ._examples import check_logits, dtype_of, kept, reduced

Of = Literal["probabilities", "logits"]


def l1(
    student: jax.Array,
    teacher: jax.Array,
    *,
    of: Of = "probabilities",
    temperature: jax.typing.ArrayLike = 1.0,
    reduction: str | None = "mean",
    where: jax.Array | None = None,
) -> jax.Array:
    """The absolute difference of probabilities or logits, summed over the classes.

        sum_i |q_i - p_i|,   q, p = softmax(student / T), softmax(teacher / T), or the logits / T

    Of probabilities it is twice the total variation, at most 2. There is no factor for T.

    Args:
      student: logits `[..., classes]`.
      teacher: logits of the same shape; no gradient flows to them.
      of: `"probabilities"` or `"logits"`; logits must be finite then.
      temperature: T, above 0; a number or a scalar array.
      reduction: `"mean"` over the examples (all leading axes), or None for one loss an example.
      where: booleans `[...]`, False for examples that do not count.

    Returns:
      A float32 scalar, or `[...]` without reduction.

    Raises:
      ValueError: if the shapes differ, or an option is not one of those above.
      TypeError: if logits are not floats, or `where` is not boolean.

    Example:
      >>> import jax.numpy as jnp
      >>> from jopt import distill
      >>> student, teacher = jnp.array([[0.0, 3.0]]), jnp.array([[1.0, 1.0]])
      >>> float(distill.l1(student, teacher, of="logits"))
      3.0
    """
    difference = _difference("l1", student, teacher, of, temperature, reduction, where)
    return reduced(jnp.sum(jnp.abs(difference), axis=-1), reduction, where)


def mse(
    student: jax.Array,
    teacher: jax.Array,
    *,
    of: Of = "logits",
    temperature: jax.typing.ArrayLike = 1.0,
    reduction: str | None = "mean",
    where: jax.Array | None = None,
) -> jax.Array:
    """The squared difference of logits or probabilities, averaged over the classes.

        mean_i (s_i - t_i)²,   s, t = student / T, teacher / T, or the softmax of these

    There is no factor for T.

    Args:
      student: logits `[..., classes]`.
      teacher: logits of the same shape; no gradient flows to them.
      of: `"logits"`, which must be finite, or `"probabilities"`.
      temperature: as of `l1`.
      reduction: as of `l1`.
      where: as of `l1`.

    Returns:
      A float32 scalar, or `[...]` without reduction.

    Raises:
      ValueError, TypeError: as `l1` does.

    Example:
      >>> import jax.numpy as jnp
      >>> from jopt import distill
      >>> float(distill.mse(jnp.array([[0.0, 3.0]]), jnp.array([[1.0, 1.0]])))
      2.5

    References:
      Ba, Caruana, "Do Deep Nets Really Need to be Deep?", 2013, arXiv 1312.6184 (on logits).
    """
    difference = _difference("mse", student, teacher, of, temperature, reduction, where)
    return reduced(jnp.mean(difference**2, axis=-1), reduction, where)


def _difference(
    name: str,
    student: jax.Array,
    teacher: jax.Array,
    of: str,
    temperature: jax.typing.ArrayLike,
    reduction: str | None,
    where: jax.Array | None,
) -> jax.Array:
    check_logits(name, student, teacher, temperature, reduction, where)
    if of not in ("probabilities", "logits"):
        raise ValueError(f'`{name}(..., of={of!r})` expects "probabilities" or "logits".')
    dtype = dtype_of(student, teacher)
    scale = jnp.asarray(temperature, dtype)
    ours, theirs = (
        kept(x, where, dtype) / scale for x in (student, jax.lax.stop_gradient(teacher))
    )
    if of == "logits":
        return ours - theirs
    return jax.nn.softmax(ours, axis=-1) - jax.nn.softmax(theirs, axis=-1)
