"""Losses on features, position by position or map by map: hints, attention transfer, FSP.

Features are `[batch, ..., channels]`: images `[batch, height, width, channels]`, words `[batch,
time, channels]`. A *position* is an entry of all axes but the last.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ._examples import (
    check_floats,
    check_options,
    count,
    dtype_of,
    flattened,
    kept,
    reduced,
    unit,
)

Projection = dict[str, jax.Array]


def projection(key: jax.Array, inputs: int, outputs: int, *, dtype: Any = None) -> Projection:
    """Parameters of a linear map from the student's channels to the teacher's.

    They are learned with the student: put them beside its parameters, under the same optimizer, and
    leave them behind when it is done. On images it is a 1×1 convolution.

    Args:
      key: for the kernel, normal with variance 1 / inputs.
      inputs: the student's channels.
      outputs: the teacher's.
      dtype: of the parameters, float32 by default.

    Returns:
      `{"kernel": [inputs, outputs], "bias": [outputs]}`.

    Example:
      >>> import jax
      >>> from jopt import distill
      >>> jax.tree.map(lambda x: x.shape, distill.projection(jax.random.key(0), 8, 32))
      {'bias': (32,), 'kernel': (8, 32)}
    """
    dtype = jnp.float32 if dtype is None else dtype
    kernel = jax.random.normal(key, (inputs, outputs), jnp.float32) / inputs**0.5
    return {"kernel": kernel.astype(dtype), "bias": jnp.zeros(outputs, dtype)}


def hints(
    student: jax.Array,
    teacher: jax.Array,
    projection: Projection | None = None,
    *,
    reduction: str | None = "mean",
    where: jax.Array | None = None,
) -> jax.Array:
    """The squared difference of features, the student's projected to the teacher's channels.

        mean_c (r(s)_c - t_c)²,   r(s) = s · kernel + bias

    Args:
      student: features `[..., channels]`.
      teacher: features with the same leading axes; no gradient flows to them.
      projection: from `projection`; None where the channels are the same.
      reduction: `"mean"` over all positions, or None for one loss a position, `[...]`.
      where: booleans `[...]`, False for positions that do not count.

    Returns:
      A float32 scalar, or `[...]` without reduction.

    Raises:
      ValueError: if shapes differ, or `projection` does not fit them.
      TypeError: if features are not floats, or `where` is not boolean.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jopt import distill
      >>> student, teacher = jnp.ones((2, 8, 8, 4)), jnp.ones((2, 8, 8, 16))
      >>> loss = distill.hints(student, teacher, distill.projection(jax.random.key(0), 4, 16))
      >>> loss.shape
      ()

    References:
      Romero, Ballas, Kahou, Chassang, Gatta, Bengio, "FitNets: Hints for Thin Deep Nets", 2014,
      arXiv 1412.6550.
    """
    _check("hints", student, teacher, alike="positions")
    check_options("hints", reduction, where, jnp.shape(student)[:-1])
    _check_projection(jnp.shape(student), jnp.shape(teacher), projection)
    dtype = dtype_of(student, teacher)
    ours, theirs = kept(student, where, dtype), kept(_stopped(teacher), where, dtype)
    if projection is not None:
        kernel, bias = (projection[name].astype(dtype) for name in ("kernel", "bias"))
        ours = ours @ kernel
        ours = ours + bias.reshape(*(1,) * (ours.ndim - 1), -1)
    return reduced(jnp.mean((ours - theirs) ** 2, axis=-1), reduction, where)


def attention_transfer(
    student: jax.Array,
    teacher: jax.Array,
    *,
    power: float = 2.0,
    reduction: str | None = "mean",
    where: jax.Array | None = None,
) -> jax.Array:
    """Where the student looks, against where the teacher looks; channels may differ in number.

        mean_x (a(s)_x / ‖a(s)‖ - a(t)_x / ‖a(t)‖)²,   a(f)_x = sum_c |f_xc|^power

    over the positions x of an example, norms over these too.

    Args:
      student: features `[batch, ..., channels]`.
      teacher: features with the same positions; no gradient flows to them.
      power: above 1 it weighs the strongest channels more; at least 1.
      reduction: `"mean"` over the examples, or None for one loss an example, `[batch]`.
      where: booleans `[batch]` or `[batch, ...]`, False for examples or positions that do not
        count.

    Returns:
      A float32 scalar, or `[batch]` without reduction.

    Raises:
      ValueError: if the positions differ, or there are none.
      TypeError: if features are not floats, or `where` is not boolean.

    Example:
      >>> import jax.numpy as jnp
      >>> from jopt import distill
      >>> student = jnp.array([[[1.0], [0.0]]])
      >>> teacher = jnp.array([[[0.0, 0.0], [2.0, 1.0]]])
      >>> float(distill.attention_transfer(student, teacher))
      1.0

    References:
      Zagoruyko, Komodakis, "Paying More Attention to Attention: Improving the Performance of
      Convolutional Neural Networks via Attention Transfer", 2016, arXiv 1612.03928. As in their
      code, the mean of squares, not the norm.
    """
    name = "attention_transfer"
    _check(name, student, teacher, alike="positions", least=3)
    if power < 1:
        raise ValueError(f"`{name}(..., power={power})` expects 1 or more.")
    dtype, shape = dtype_of(student, teacher), jnp.shape(student)[:-1]
    if 0 in shape[1:]:
        raise ValueError(
            f"`{name}(student, teacher)` expects positions; student is {list(jnp.shape(student))}."
        )
    places, examples = _places(name, reduction, where, shape)
    maps = []
    for features in (student, _stopped(teacher)):
        features = kept(features, places, dtype)
        # A power of the square has a derivative at zero where that of |f| has none.
        strength = features**2 if power == 2 else jnp.abs(features) ** power
        maps.append(unit(flattened(jnp.sum(strength, axis=-1)), -1))
    squared = (maps[0] - maps[1]) ** 2
    if places is None:
        loss = jnp.mean(squared, axis=-1)
    else:
        total = jnp.sum(flattened(places), axis=-1, dtype=dtype)
        loss = jnp.sum(squared, axis=-1) / jnp.maximum(total, 1.0)
    return reduced(loss, reduction, examples)


def fsp(
    student: tuple[jax.Array, jax.Array],
    teacher: tuple[jax.Array, jax.Array],
    *,
    reduction: str | None = "mean",
    where: jax.Array | None = None,
) -> jax.Array:
    """How features flow from one layer to a later one: products of their channels over positions.

        mean_ij (G(s)_ij - G(t)_ij)²,   G(f)_ij = mean_x f1_xi · f2_xj

    Where the two layers of a pair differ in positions, the larger is reduced by maxima over
    windows.

    Args:
      student: two features `[batch, ..., channels]`, an early and a late layer.
      teacher: two features with the channels of the student's; no gradient flows to them. Their
        positions may differ from the student's.
      reduction: `"mean"` over the examples, or None for one loss an example, `[batch]`.
      where: booleans `[batch]`, False for examples that do not count.

    Returns:
      A float32 scalar, or `[batch]` without reduction.

    Raises:
      ValueError: if channels or examples differ, or positions of a pair are no multiples.
      TypeError: if features are not floats, or `where` is not boolean.

    Example:
      >>> import jax.numpy as jnp
      >>> from jopt import distill
      >>> student = jnp.ones((2, 4, 4, 3)), jnp.ones((2, 2, 2, 5))
      >>> teacher = jnp.ones((2, 8, 8, 3)), jnp.zeros((2, 4, 4, 5))
      >>> float(distill.fsp(student, teacher))
      1.0

    References:
      Yim, Joo, Bae, Kim, "A Gift from Knowledge Distillation: Fast Optimization, Network
      Minimization and Transfer Learning", CVPR 2017.
    """
    for who, pair in (("student", student), ("teacher", teacher)):
        if len(pair) != 2:
            raise ValueError(
                f"`fsp(student, teacher)` expects two features each; {who} has {len(pair)}."
            )
    for ours, theirs in zip(student, teacher, strict=True):
        _check("fsp", ours, theirs, alike="batch", least=3)
        if jnp.shape(ours)[-1] != jnp.shape(theirs)[-1]:
            raise ValueError(
                "`fsp(student, teacher)` expects the same channels: student is "
                f"{list(jnp.shape(ours))}, teacher is {list(jnp.shape(theirs))}."
            )
    check_options("fsp", reduction, where, jnp.shape(student[0])[:1])
    dtype = dtype_of(*student, *teacher)
    flows = [_flow([kept(x, where, dtype) for x in pair]) for pair in (student, _stopped(teacher))]
    return reduced(jnp.mean((flows[0] - flows[1]) ** 2, axis=(-2, -1)), reduction, where)


def similarity(
    student: jax.Array,
    teacher: jax.Array,
    *,
    where: jax.Array | None = None,
) -> jax.Array:
    """Similarity-preserving: examples that are alike for the teacher are so for the student.

        sum_ij (G(s)_ij - G(t)_ij)² / n²,   G(f) = the rows of F · Fᵀ divided by their norms

    F holds one example a row, all else flattened, so neither channels nor positions need agree. A
    loss on the batch as a whole: it has no `reduction`.

    Args:
      student: features `[batch, ...]`.
      teacher: features of the same batch; no gradient flows to them.
      where: booleans `[batch]`, False for examples that do not count; n is the number of others.

    Returns:
      A float32 scalar.

    Raises:
      ValueError: if the batches differ.
      TypeError: if features are not floats, or `where` is not boolean.

    Example:
      >>> import jax.numpy as jnp
      >>> from jopt import distill
      >>> student = jnp.array([[1.0, 0.0], [0.0, 1.0]])
      >>> float(distill.similarity(student, 3 * student))
      0.0

    References:
      Tung, Mori, "Similarity-Preserving Knowledge Distillation", 2019, arXiv 1907.09682.
    """
    _check("similarity", student, teacher, alike="batch")
    check_options("similarity", "mean", where, jnp.shape(student)[:1])
    dtype = dtype_of(student, teacher)
    grams = []
    for features in (student, _stopped(teacher)):
        rows = flattened(kept(features, where, dtype))
        grams.append(unit(rows @ rows.T, -1))
    rows = max(len(grams[0]), 1) if where is None else count(where, dtype)
    return jnp.sum((grams[0] - grams[1]) ** 2) / rows**2


# Helpers, in order of use.


def _stopped(features: Any) -> Any:
    return jax.lax.stop_gradient(features)


def _check(name: str, student: Any, teacher: Any, *, alike: str, least: int = 2) -> None:
    check_floats(name, {"student": student, "teacher": teacher}, "features")
    ours, theirs = jnp.shape(student), jnp.shape(teacher)
    if min(len(ours), len(theirs)) < least:
        what = "[batch, ..., channels]" if least == 2 else "[batch, positions ..., channels]"
        raise ValueError(
            f"`{name}(student, teacher)` expects features {what}: student is {list(ours)}, teacher "
            f"is {list(theirs)}."
        )
    same = ours[:1] == theirs[:1] if alike == "batch" else ours[:-1] == theirs[:-1]
    if not same:
        what = "examples" if alike == "batch" else "positions (all axes but the last)"
        raise ValueError(
            f"`{name}(student, teacher)` expects the same {what}: student is {list(ours)}, "
            f"teacher is {list(theirs)}. Tap layers of one resolution, or pool one of them."
        )


def _check_projection(
    student: Sequence[int], teacher: Sequence[int], projection: Projection | None
) -> None:
    if projection is None:
        if student[-1] != teacher[-1]:
            raise ValueError(
                f"`hints(student, teacher)` expects the same channels: student is {list(student)}, "
                f"teacher is {list(teacher)}. Pass `projection(key, {student[-1]}, {teacher[-1]})`"
                " and learn it with the student."
            )
        return
    found = list(jnp.shape(projection["kernel"])), list(jnp.shape(projection["bias"]))
    if found != ([student[-1], teacher[-1]], [teacher[-1]]):
        raise ValueError(
            f"`hints(..., projection)` expects a kernel [{student[-1]}, {teacher[-1]}] and a bias "
            f"[{teacher[-1]}] for student {list(student)} and teacher {list(teacher)}; they are "
            f"{found[0]} and {found[1]}."
        )


def _places(
    name: str, reduction: str | None, where: Any, shape: Sequence[int]
) -> tuple[jax.Array | None, jax.Array | None]:
    """Which positions count, and which examples, of booleans for either."""
    if where is None or jnp.ndim(where) < 2:
        check_options(name, reduction, where, shape[:1])
        if where is None:
            return None, None
        where = jnp.asarray(where).reshape(-1, *(1,) * (len(shape) - 1))
        where = jnp.broadcast_to(where, tuple(shape))
    check_options(name, reduction, where, shape)
    return where, jnp.any(flattened(where), axis=-1)


def _flow(pair: Sequence[jax.Array]) -> jax.Array:
    early, late = pair
    if early.ndim != late.ndim:
        raise ValueError(
            f"`fsp(...)` expects two features of one rank; they are {list(early.shape)} and "
            f"{list(late.shape)}."
        )
    smaller = tuple(min(sizes) for sizes in zip(early.shape[1:-1], late.shape[1:-1], strict=True))
    early, late = (
        _pooled(x, smaller).reshape(len(x), math.prod(smaller), x.shape[-1]) for x in (early, late)
    )
    return jnp.einsum("bxi,bxj->bij", early, late) / early.shape[1]


def _pooled(x: jax.Array, positions: tuple[int, ...]) -> jax.Array:
    """Maxima over windows that leave `positions`."""
    if x.shape[1:-1] == positions:
        return x
    if any(size % small for size, small in zip(x.shape[1:-1], positions, strict=True)):
        raise ValueError(
            f"`fsp(...)` expects positions that are multiples of one another: {list(x.shape)} "
            f"cannot be reduced to {list(positions)}."
        )
    split = [
        part
        for size, small in zip(x.shape[1:-1], positions, strict=True)
        for part in (small, size // small)
    ]
    windows = x.reshape(len(x), *split, x.shape[-1])
    return jnp.max(windows, axis=tuple(range(2, 2 + 2 * len(positions), 2)))
