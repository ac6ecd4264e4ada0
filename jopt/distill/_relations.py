"""Relational distillation: distances between examples, and angles that three of them make."""

import jax
import jax.numpy as jnp

from ._examples import check_floats, check_options, dtype_of, flattened, kept, unit


def relational(
    student: jax.Array,
    teacher: jax.Array,
    *,
    distance: jax.typing.ArrayLike = 1.0,
    angle: jax.typing.ArrayLike = 2.0,
    where: jax.Array | None = None,
) -> jax.Array:
    """Keeps distances and angles between the examples of a batch; widths may differ.

        distance · mean_ij h(d(s)_ij - d(t)_ij) + angle · mean_ijk h(c(s)_ijk - c(t)_ijk)

    with d_ij = ‖f_i - f_j‖ over the mean of those above zero, c_ijk the cosine of the angle at f_k
    between f_i and f_j (zero where two of them are equal), and h(x) = x²/2 for |x| < 1, |x| - 1/2
    beyond. Means are over all pairs and triples, as in the authors' code, i = j included. A loss on
    the batch as a whole: it has no `reduction`. Angles take n² · width values.

    Args:
      student: features `[batch, width]`; more axes are flattened.
      teacher: features of the same batch; no gradient flows to them.
      distance: weight of the distances.
      angle: weight of the angles; a plain 0 leaves them out.
      where: booleans `[batch]`, False for examples that do not count.

    Returns:
      A float32 scalar. Where two examples are equal, their distance has a zero gradient.

    Raises:
      ValueError: if the batches differ.
      TypeError: if features are not floats, or `where` is not boolean.

    Example:
      >>> import jax.numpy as jnp
      >>> from jopt import distill
      >>> student = jnp.array([[0.0, 1.0], [2.0, 0.0], [0.0, 0.0]])
      >>> print(f"{distill.relational(student, 5 * student):.4f}")
      0.0000

    References:
      Park, Kim, Lu, Cho, "Relational Knowledge Distillation", 2019, arXiv 1904.05068.
    """
    check_floats("relational", {"student": student, "teacher": teacher}, "features")
    ours, theirs = jnp.shape(student), jnp.shape(teacher)
    if min(len(ours), len(theirs)) < 2 or ours[0] != theirs[0]:
        raise ValueError(
            "`relational(student, teacher)` expects features [batch, width] of one batch: student "
            f"is {list(ours)}, teacher is {list(theirs)}."
        )
    check_options("relational", "mean", where, ours[:1])
    dtype, size = dtype_of(student, teacher), ours[0]
    s, t = (flattened(kept(x, where, dtype)) for x in (student, jax.lax.stop_gradient(teacher)))
    chosen = jnp.ones(size, bool) if where is None else jnp.asarray(where)
    pairs = chosen[:, None] & chosen[None]
    total = jnp.zeros((), dtype)
    if not _is_zero(distance):
        apart = _huber(_distances(s, pairs) - _distances(t, pairs))
        total = total + jnp.asarray(distance, dtype) * _mean(apart, pairs)
    if not _is_zero(angle):
        triples = pairs[None] & chosen[:, None, None]
        turned = _huber(_cosines(s) - _cosines(t))
        total = total + jnp.asarray(angle, dtype) * _mean(turned, triples)
    return total


# Helpers, in order of use.


def _is_zero(weight: jax.typing.ArrayLike) -> bool:
    return isinstance(weight, int | float) and weight == 0


def _distances(x: jax.Array, pairs: jax.Array) -> jax.Array:
    difference = x[:, None] - x[None]
    square = jnp.sum(difference**2, axis=-1)
    some = pairs & (square > 0)
    distance = jnp.where(some, jnp.sqrt(jnp.where(some, square, 1.0)), 0.0)
    mean = _mean(distance, some)
    return distance / jnp.where(mean > 0, mean, 1.0)


def _cosines(x: jax.Array) -> jax.Array:
    """`[k, i, j]`: the angle at k between i and j."""
    directions = unit(x[None] - x[:, None], -1)
    return jnp.einsum("kid,kjd->kij", directions, directions)


def _huber(x: jax.Array) -> jax.Array:
    size = jnp.abs(x)
    return jnp.where(size < 1, 0.5 * x**2, size - 0.5)


def _mean(x: jax.Array, where: jax.Array) -> jax.Array:
    return jnp.sum(jnp.where(where, x, 0.0)) / jnp.maximum(jnp.sum(where, dtype=x.dtype), 1.0)
