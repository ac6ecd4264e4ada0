"""Losses that take a classifier's logits apart: `dkd` by the target, `dist` by rows and columns."""

import jax
import jax.numpy as jnp

from ._divergence import divergence, softened
from ._examples import (
    check_labels,
    check_logits,
    dtype_of,
    kept,
    numbers,
    reduced,
)


def dkd(
    student: jax.Array,
    teacher: jax.Array,
    labels: jax.Array,
    *,
    alpha: jax.typing.ArrayLike = 1.0,
    beta: jax.typing.ArrayLike = 8.0,
    temperature: jax.typing.ArrayLike = 4.0,
    reduction: str | None = "mean",
    where: jax.Array | None = None,
) -> jax.Array:
    """Decoupled distillation: how sure the teacher is of the target, apart from the other classes.

        T² · (α · KL(b(p) ‖ b(q)) + β · KL(p̂ ‖ q̂))

    with p and q the softened distributions of teacher and student, b(p) = (p_t, 1 - p_t) for the
    target t, and p̂ the distribution over the other classes alone. `kd` is α = 1, β = 1 - p_t, which
    mutes the second part exactly where the teacher is sure.

    Args:
      student: logits `[..., classes]`, two classes or more.
      teacher: logits of the same shape; no gradient flows to them.
      labels: integers `[...]`, the targets.
      alpha: weight of the target's part.
      beta: weight of the other classes' part. The paper raises both from zero during the first 20
        epochs: pass arrays, from a schedule.
      temperature: T, above 0; a number or a scalar array.
      reduction: `"mean"` over the examples (all leading axes), or None for one loss an example.
      where: booleans `[...]`, False for examples that do not count, whatever their label.

    Returns:
      A float32 scalar, or `[...]` without reduction. It is NaN where a label that counts names no
      class.

    Raises:
      ValueError: if shapes differ, there is one class, or an option is not one of those above.
      TypeError: if logits are not floats, labels not integers, or `where` is not boolean.

    Example:
      >>> import jax.numpy as jnp
      >>> from jopt import distill
      >>> student, teacher = jnp.array([[1.0, 0.0, 0.0]]), jnp.array([[9.0, 2.0, 1.0]])
      >>> print(f"{distill.dkd(student, teacher, jnp.array([0]), temperature=1.0):.4f}")
      1.4298

    References:
      Zhao, Cui, Song, Qiu, Liang, "Decoupled Knowledge Distillation", 2022, arXiv 2203.08679. Their
      code subtracts 1000 from the target's logit; here it is left out exactly.
    """
    check_logits("dkd", student, teacher, temperature, reduction, where)
    check_labels("dkd", labels, jnp.shape(student)[:-1])
    classes = jnp.shape(student)[-1]
    if classes < 2:
        raise ValueError(f"`dkd(student, ...)` expects two classes or more; student has {classes}.")
    log_q, log_p, gap, scale = softened(student, teacher, temperature, where)
    index, _ = numbers(labels, classes)
    target = index[..., None] == jnp.arange(classes, dtype=index.dtype).reshape(
        *(1,) * index.ndim, -1
    )
    (sure_q, others_q, rest_q), (sure_p, others_p, rest_p) = (
        _apart(x, target) for x in (log_q, log_p)
    )
    others = divergence(others_p, others_q, jnp.where(target, 0.0, gap) - (rest_p - rest_q))
    alpha, beta = (jnp.asarray(x, scale.dtype) for x in (alpha, beta))
    loss = alpha * divergence(sure_p, sure_q) + beta * others
    loss = jnp.where(jnp.any(target, axis=-1), scale**2 * loss, jnp.nan)
    return reduced(loss, reduction, where)


def dist(
    student: jax.Array,
    teacher: jax.Array,
    *,
    inter: jax.typing.ArrayLike = 1.0,
    intra: jax.typing.ArrayLike = 1.0,
    temperature: jax.typing.ArrayLike = 1.0,
    reduction: str | None = "mean",
    where: jax.Array | None = None,
) -> jax.Array:
    """Asks for correlated probabilities, not equal ones, which suits a much stronger teacher.

        T² · (inter · mean_e (1 - ρ(q_e, p_e)) + intra · mean_c (1 - ρ(q_·c, p_·c)))

    ρ is Pearson's correlation, of the classes of one example e and, over all examples, of one class
    c. Where one side does not vary, by more than float32 rounds, ρ is zero and has no gradient.

    Args:
      student: logits `[..., classes]`.
      teacher: logits of the same shape; no gradient flows to them.
      inter: weight of the correlation between the classes of an example.
      intra: weight of the correlation between the examples, class by class.
      temperature: T, above 0; a number or a scalar array.
      reduction: `"mean"` over the examples (all leading axes), or None for one loss an example,
        its own first term plus the second, which all share.
      where: booleans `[...]`, False for examples that do not count.

    Returns:
      A float32 scalar, or `[...]` without reduction.

    Raises:
      ValueError, TypeError: as `kd` does.

    Example:
      >>> import jax.numpy as jnp
      >>> from jopt import distill
      >>> teacher = jnp.array([[2.0, 0.0, 1.0], [0.0, 1.0, 3.0]])
      >>> print(f"{abs(distill.dist(teacher, teacher)):.4f}")
      0.0000

    References:
      Huang, You, Wang, Qian, Xu, "Knowledge Distillation from A Stronger Teacher", 2022, arXiv
      2205.10536. Their code adds 1e-8 to the denominator of ρ, so that rare classes hardly count.
    """
    check_logits("dist", student, teacher, temperature, reduction, where)
    dtype = dtype_of(student, teacher)
    scale = jnp.asarray(temperature, dtype)
    q, p = (
        jax.nn.softmax(kept(x, where, dtype) / scale, axis=-1)
        for x in (student, jax.lax.stop_gradient(teacher))
    )
    own = 1 - _correlation(q, p, -1)
    # All examples in one column, those that do not count at their class's mean.
    columns = (x.reshape(-1, x.shape[-1]) for x in (q, p))
    chosen = None if where is None else jnp.reshape(where, (-1, 1))
    shared = jnp.mean(1 - _correlation(*columns, axis=0, where=chosen))
    inter, intra = (jnp.asarray(x, dtype) for x in (inter, intra))
    return reduced(scale**2 * (inter * own + intra * shared), reduction, where)


# Helpers, in order of use.


def _apart(log_p: jax.Array, target: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Logarithms of (target, the others together), of the others among themselves, and of both's
    ratio."""
    others = jnp.where(target, -jnp.inf, log_p)
    possible = jnp.any(others > -jnp.inf, axis=-1, keepdims=True)
    # Where the target has everything, logsumexp of nothing but -inf would have no derivative.
    safe = jnp.where(possible, others, 0.0)
    rest = jax.nn.logsumexp(safe, axis=-1, keepdims=True)
    own = jnp.sum(jnp.where(target, log_p, 0.0), axis=-1, keepdims=True)
    sure = jnp.concatenate([own, jnp.where(possible, rest, -jnp.inf)], axis=-1)
    return sure, jnp.where(possible, safe - rest, -jnp.inf), rest


def _correlation(
    x: jax.Array, y: jax.Array, axis: int, where: jax.Array | None = None
) -> jax.Array:
    x, y = (_direction(a, axis, where) for a in (x, y))
    return jnp.sum(x * y, axis=axis)


def _direction(x: jax.Array, axis: int, where: jax.Array | None) -> jax.Array:
    """`x` without its mean, divided by its norm; zero where it varies by rounding alone."""
    chosen = jnp.ones((1,) * x.ndim, bool) if where is None else where
    total = jnp.maximum(jnp.sum(jnp.broadcast_to(chosen, x.shape), axis, x.dtype, keepdims=True), 1)

    def mean(x: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(chosen, x, 0.0), axis=axis, keepdims=True) / total

    middle = mean(x)
    rest = jnp.where(chosen, x - middle, 0.0)
    rest = jnp.where(chosen, rest - mean(rest), 0.0)  # a long sum is rounded more than its terms
    noise = 8 * jnp.finfo(x.dtype).eps * jnp.abs(middle)
    square = jnp.sum(rest * rest, axis=axis, keepdims=True)
    varies = square > total * noise**2
    return jnp.where(varies, rest * jax.lax.rsqrt(jnp.where(varies, square, 1.0)), 0.0)
