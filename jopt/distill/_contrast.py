"""Contrastive distillation: an example's two embeddings against those of other examples."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ._examples import (
    check_floats,
    check_options,
    check_temperature,
    check_weight,
    count,
    dtype_of,
    kept,
    numbers,
    reduced,
    unit,
)


class Bank(NamedTuple):
    """What `crd` remembers of every example of the data set. Made by `crd_bank`."""

    student: jax.Array  # float32 [examples, width], rows of norm 1
    teacher: jax.Array  # float32 [examples, width], rows of norm 1
    scale: jax.Array  # float32 [2]: mean scores times examples, of either side; 0 until known


def crd_bank(key: jax.Array, examples: int, width: int) -> Bank:
    """A bank of random unit vectors, one for each example and side.

    Args:
      key: for the vectors.
      examples: in the data set, of which `crd` is given numbers.
      width: of the embeddings.
    """
    ours, theirs = (
        unit(jax.random.normal(k, (examples, width), jnp.float32), -1)
        for k in jax.random.split(key)
    )
    return Bank(ours, theirs, jnp.zeros(2, jnp.float32))


def crd(
    student: jax.Array,
    teacher: jax.Array,
    bank: Bank,
    indices: jax.Array,
    negatives: jax.Array,
    *,
    temperature: jax.typing.ArrayLike = 0.07,
    reduction: str | None = "mean",
    where: jax.Array | None = None,
) -> jax.Array:
    """Contrastive distillation: tells an example's teacher embedding from those of K others.

        -log h(s, t⁺) - sum_k log (1 - h(s, t_k)),   h(a, b) = g / (g + K / n),
        g = exp(a · b / T) / Z

    and the same with the sides exchanged, a being the embedding divided by its norm and b a row of
    the bank, n its examples. Z is the mean of exp(a · b / T) times n, of the first batch that
    `crd_update` was given; before that, of this batch.

    Both embeddings are linear maps (`projection`) of features, and *both maps are learned*: the
    gradient flows to `student` and to `teacher`. Stop it at the teacher's features, before its map.

    Args:
      student: embeddings `[batch, width]`.
      teacher: embeddings `[batch, width]`.
      bank: from `crd_bank`; after each step `crd_update` gives the next one.
      indices: integers `[batch]`, which examples of the data set these are.
      negatives: integers `[batch, K]`, other examples, of other classes where these are known.
      temperature: T, above 0.
      reduction: `"mean"` over the examples, or None for one loss an example, `[batch]`.
      where: booleans `[batch]`, False for examples that do not count.

    Returns:
      A float32 scalar, or `[batch]` without reduction. It is NaN where an example counts and one of
      its numbers is none of the bank's.

    Raises:
      ValueError: if shapes do not fit, or an option is not one of those above.
      TypeError: if embeddings are not floats, or indices not integers.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jopt import distill
      >>> bank = distill.crd_bank(jax.random.key(0), 10, 4)
      >>> s, t, mine = jnp.ones((2, 4)), jnp.ones((2, 4)), jnp.array([3, 7])
      >>> loss = distill.crd(s, t, bank, mine, jnp.array([[0, 1], [2, 4]]))
      >>> bank = distill.crd_update(bank, s, t, mine, jnp.array([[0, 1], [2, 4]]))

    References:
      Tian, Krishnan, Isola, "Contrastive Representation Distillation", 2019, arXiv 1910.10699.
    """
    _check("crd", student, teacher, bank, indices, negatives)
    check_temperature("crd", temperature)
    check_options("crd", reduction, where, jnp.shape(student)[:1])
    rows, known = _rows(bank, indices, negatives)
    scores = _scores(student, teacher, bank, rows, temperature, where)
    own = _scale(scores, bank, known if where is None else where & known)
    share = jnp.log(jnp.asarray(negatives.shape[-1] / len(bank.student), scores.dtype))
    logits = scores - jnp.log(own).reshape(2, 1, 1) - share
    # h is the logistic function of these; the first column is the example itself.
    right = jax.nn.log_sigmoid(logits[..., 0])
    wrong = jnp.sum(jax.nn.log_sigmoid(-logits[..., 1:]), axis=-1)
    loss = jnp.where(known, -jnp.sum(right + wrong, axis=0), jnp.nan)
    return reduced(loss, reduction, where)


def crd_update(
    bank: Bank,
    student: jax.Array,
    teacher: jax.Array,
    indices: jax.Array,
    negatives: jax.Array,
    *,
    temperature: jax.typing.ArrayLike = 0.07,
    momentum: jax.typing.ArrayLike = 0.5,
    where: jax.Array | None = None,
) -> Bank:
    """The bank after a step: rows of the batch moved to its embeddings, and Z if it was unknown.

        row ← unit(momentum · row + (1 - momentum) · unit(embedding))

    Args:
      bank: the bank that `crd` was given.
      student: the embeddings that `crd` was given; no gradient is kept.
      teacher: likewise.
      indices: likewise; of an example that comes twice, either embedding counts.
      negatives: likewise.
      temperature: as of `crd`.
      momentum: from 0 to 1.
      where: as of `crd`; the rows of examples that do not count stay, and so do those of an example
        one of whose numbers is none of the bank's.

    Raises:
      ValueError, TypeError: as `crd` does, and if `momentum` is not a scalar from 0 to 1.
    """
    _check("crd_update", student, teacher, bank, indices, negatives)
    check_temperature("crd_update", temperature)
    check_weight("crd_update", "momentum", momentum)
    check_options("crd_update", None, where, jnp.shape(student)[:1])
    student, teacher = (jax.lax.stop_gradient(x) for x in (student, teacher))
    rows, known = _rows(bank, indices, negatives)
    counted = known if where is None else where & known
    scores = _scores(student, teacher, bank, rows, temperature, counted)
    scale = _scale(scores, bank, counted).astype(jnp.float32)
    # A batch of nothing teaches nothing, an index out of range is dropped.
    scale = jnp.where(jnp.any(counted), scale, bank.scale)
    own = jnp.where(counted, rows[:, 0], len(bank.student))
    share = jnp.asarray(momentum, jnp.float32)

    def moved(memory: jax.Array, embedding: jax.Array) -> jax.Array:
        old = jnp.take(memory, own, axis=0, mode="clip")
        new = unit(share * old + (1 - share) * unit(kept(embedding, counted, jnp.float32), -1), -1)
        return memory.at[own].set(new, mode="drop")

    return Bank(moved(bank.student, student), moved(bank.teacher, teacher), scale)


# Helpers, in order of use.


def _check(
    name: str,
    student: jax.Array,
    teacher: jax.Array,
    bank: Bank,
    indices: jax.Array,
    negatives: jax.Array,
) -> None:
    check_floats(name, {"student": student, "teacher": teacher}, "embeddings")
    shape, width = jnp.shape(student), jnp.shape(bank.student)[-1]
    if jnp.shape(teacher) != shape or len(shape) != 2 or shape[-1] != width:
        raise ValueError(
            f"`{name}(...)` expects embeddings [batch, {width}], as wide as the bank: student is "
            f"{list(shape)}, teacher is {list(jnp.shape(teacher))}."
        )
    for what, integers, rank in (("indices", indices, 1), ("negatives", negatives, 2)):
        if not jnp.issubdtype(jnp.result_type(integers), jnp.integer):
            raise TypeError(
                f"`{name}(..., {what})` expects integers, not {jnp.result_type(integers)}."
            )
        if (
            jnp.ndim(integers) != rank
            or jnp.shape(integers)[0] != shape[0]
            or not jnp.size(integers)
        ):
            expected = f"[{shape[0]}]" if rank == 1 else f"[{shape[0]}, K]"
            raise ValueError(
                f"`{name}(..., {what})` expects integers {expected}; they are "
                f"{list(jnp.shape(integers))}."
            )


def _rows(bank: Bank, indices: jax.Array, negatives: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`[batch, 1 + K]` rows of the bank, int32; and for which examples all of them exist."""
    size = len(bank.student)
    (own, found), (others, there) = numbers(indices, size), numbers(negatives, size)
    rows = jnp.concatenate([own[:, None], others], axis=1)
    return jnp.clip(rows, 0, size - 1), found & jnp.all(there, axis=1)


def _scores(
    student: jax.Array,
    teacher: jax.Array,
    bank: Bank,
    rows: jax.Array,
    temperature: jax.typing.ArrayLike,
    where: jax.Array | None,
) -> jax.Array:
    """`[2, batch, 1 + K]`: products over T of the student with the teacher's rows, and v.v."""
    dtype = dtype_of(student, teacher)
    scores = []
    for embedding, memory in ((student, bank.teacher), (teacher, bank.student)):
        others = jax.lax.stop_gradient(memory.astype(dtype))[rows]
        scores.append(jnp.einsum("bd,bkd->bk", unit(kept(embedding, where, dtype), -1), others))
    return jnp.stack(scores) / jnp.asarray(temperature, dtype)


def _scale(scores: jax.Array, bank: Bank, where: jax.Array) -> jax.Array:
    """Z of either side, from this batch where the bank has none yet."""
    exponents = jax.lax.stop_gradient(jnp.exp(scores))
    total = count(where, scores.dtype) * scores.shape[-1]
    mean = jnp.sum(jnp.where(where[None, :, None], exponents, 0.0), axis=(1, 2)) / total
    known = bank.scale.astype(scores.dtype)
    return jnp.where(known > 0, known, jnp.maximum(mean, 1e-30) * len(bank.student))
