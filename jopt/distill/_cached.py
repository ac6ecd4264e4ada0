"""What is kept of a teacher that is absent: its best classes, and the mass of all the others."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from ._divergence import divergence
from ._examples import (
    check_floats,
    check_options,
    check_temperature,
    dtype_of,
    kept,
    reduced,
    spread,
)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["log_p", "indices", "tail"],
    meta_fields=["temperature", "classes"],
)
@dataclasses.dataclass(frozen=True)
class TopK:
    """A teacher's distribution: its k most likely classes and the rest in one. From `top_k`."""

    log_p: Any  # float [..., k], logarithms of probabilities at the temperature
    indices: Any  # integers [..., k], which classes these are
    tail: Any  # float [...], logarithm of what the others have together; -inf if there are none
    temperature: float = 1.0  # what the distribution was softened with
    classes: int = 0  # how many the teacher knows


def top_k(logits: jax.Array, k: int, *, temperature: float = 1.0) -> TopK:
    """Keeps a teacher's k most likely classes, and the mass of the others as one more.

    Softened at `temperature`, once for all: what the tail holds at another cannot be known later.

    Args:
      logits: the teacher's, `[..., classes]`.
      k: from 1 to the number of classes.
      temperature: a number above 0.

    Returns:
      A `TopK`, float32 and int32. No gradient flows to `logits`.

    Raises:
      ValueError: if `k` or `temperature` is out of range.
      TypeError: if logits are not floats.

    Example:
      >>> import jax.numpy as jnp
      >>> from jopt import distill
      >>> found = distill.top_k(jnp.log(jnp.array([0.1, 0.6, 0.3])), 1)
      >>> int(found.indices[0]), round(float(jnp.exp(found.tail)), 3)
      (1, 0.4)
    """
    check_floats("top_k", {"logits": logits}, "logits")
    classes = jnp.shape(logits)[-1] if jnp.ndim(logits) else 0
    if not 1 <= k <= classes:
        raise ValueError(f"`top_k(logits, {k})` expects 1 to {classes}, the teacher's classes.")
    if isinstance(temperature, Tracer):
        raise ValueError("`top_k(..., temperature=...)` expects a number, not a traced array.")
    check_temperature("top_k", temperature)
    logits = jax.lax.stop_gradient(logits).astype(jnp.float32) / jnp.float32(temperature)
    log_p = jax.nn.log_softmax(logits, axis=-1)
    best, indices = jax.lax.top_k(log_p, k)
    return TopK(best, indices, log_rest(log_p, indices), float(temperature), classes)


def cached_kd(
    student: jax.Array,
    cached: TopK,
    *,
    reduction: str | None = "mean",
    where: jax.Array | None = None,
) -> jax.Array:
    """`kd` against what `top_k` kept of the teacher: k classes, and all others as one.

        T² · (sum_{i in top} p_i · (log p_i - log q_i) + p_rest · (log p_rest - log q_rest))

    with q the student's distribution at the temperature T of the cache and q_rest what it gives to
    all other classes together. It is at most `kd`, and equal to it where k is all classes, or where
    both agree on the odds among the others. Leaving the rest out instead, or scaling the top up to
    1, would teach the student to be too sure.

    Args:
      student: logits `[..., classes]`.
      cached: a `TopK` of the same leading axes, arrays of JAX or NumPy.
      reduction: `"mean"` over the examples (all leading axes), or None for one loss an example.
      where: booleans `[...]`, False for examples that do not count.

    Returns:
      A float32 scalar, or `[...]` without reduction.

    Raises:
      ValueError: if shapes, or the numbers of classes, disagree.
      TypeError: if logits are not floats, or `where` is not boolean.

    Example:
      >>> import jax.numpy as jnp
      >>> from jopt import distill
      >>> teacher = jnp.array([[3.0, 1.0, 0.0, 0.0]])
      >>> print(f"{abs(distill.cached_kd(teacher, distill.top_k(teacher, 2))):.4f}")
      0.0000
    """
    check_cached("cached_kd", student, cached)
    check_options("cached_kd", reduction, where, jnp.shape(student)[:-1])
    dtype = dtype_of(student)
    scale = jnp.asarray(cached.temperature, dtype)
    log_q = jax.nn.log_softmax(kept(student, where, dtype) / scale, axis=-1)
    best, indices, tail = safe(cached, where, dtype)
    log_p = jnp.concatenate([best, tail[..., None]], axis=-1)
    ours = jnp.take_along_axis(log_q, indices, axis=-1)
    log_q = jnp.concatenate([ours, log_rest(log_q, indices)[..., None]], axis=-1)
    return reduced(scale**2 * divergence(log_p, log_q), reduction, where)


# Helpers, in order of use.


def log_rest(log_p: jax.Array, indices: jax.Array) -> jax.Array:
    """The logarithm of what all classes but those have together, summed, not subtracted from 1."""
    others = jnp.put_along_axis(
        log_p, indices, jnp.full(indices.shape, -jnp.inf, log_p.dtype), axis=-1, inplace=False
    )
    some = jnp.any(others > -jnp.inf, axis=-1)
    safely = jnp.where(some[..., None], others, 0.0)
    return jnp.where(some, jax.nn.logsumexp(safely, axis=-1), -jnp.inf)


def check_cached(name: str, student: Any, cached: TopK) -> None:
    """Refuses logits and cached classes that do not fit together."""
    check_floats(name, {"student": student}, "logits")
    shape = jnp.shape(student)
    if not shape or shape[-1] != cached.classes:
        raise ValueError(
            f"`{name}(student, cached)` expects logits of the {cached.classes} classes that the "
            f"teacher knew: student is {list(shape)}."
        )
    found = jnp.shape(cached.log_p)[:-1], jnp.shape(cached.indices)[:-1], jnp.shape(cached.tail)
    if set(found) != {shape[:-1]} or jnp.shape(cached.log_p) != jnp.shape(cached.indices):
        raise ValueError(
            f"`{name}(student, cached)` expects a cache of {list(shape[:-1])} examples: it is "
            f"{list(found[0])}."
        )


def safe(
    cached: TopK, where: jax.Array | None, dtype: Any
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The arrays of a cache; what stands where examples do not count names class 0, 1, ..."""
    best, tail = (
        kept(jax.lax.stop_gradient(jnp.asarray(x)), where, dtype)
        for x in (cached.log_p, cached.tail)
    )
    indices = jnp.asarray(cached.indices).astype(jnp.int32)
    if where is not None:
        plain = jnp.broadcast_to(np.arange(indices.shape[-1], dtype=np.int32), indices.shape)
        indices = jnp.where(spread(where, indices.ndim), indices, plain)
    return best, indices, tail
