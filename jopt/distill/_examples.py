"""What the losses share: float32 inside, examples that do not count, the mean over the others.

An *example* is an entry of all leading axes: a row of a batch, or a token of a row.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer


def dtype_of(*arrays: Any) -> Any:
    """What to compute in: float32, or float64 where an array already is."""
    return jnp.float64 if any(jnp.result_type(x) == jnp.float64 for x in arrays) else jnp.float32


def kept(x: jax.Array, where: jax.Array | None, dtype: Any) -> jax.Array:
    """`x` in `dtype`, zero where examples do not count.

    Padding is replaced before anything is computed, so that no NaN of it reaches the gradient.
    """
    x = jnp.asarray(x).astype(dtype)
    return x if where is None else jnp.where(spread(where, x.ndim), x, jnp.zeros((), dtype))


def spread(where: jax.Array, rank: int) -> jax.Array:
    """Booleans of leading axes, with axes of size 1 behind them."""
    return jnp.reshape(where, (*jnp.shape(where), *(1,) * (rank - jnp.ndim(where))))


def flattened(x: jax.Array) -> jax.Array:
    """One row an example, no examples included."""
    return jnp.reshape(x, (x.shape[0], math.prod(x.shape[1:])))


def count(where: jax.Array, dtype: Any) -> jax.Array:
    """How many count, at least one, to divide by."""
    return jnp.maximum(jnp.sum(where, dtype=dtype), 1.0)


def reduced(loss: jax.Array, reduction: str | None, where: jax.Array | None) -> jax.Array:
    """One loss an example, or the mean over those that count."""
    if where is not None:
        loss = jnp.where(where, loss, 0.0)
    if reduction is None:
        return loss
    if where is None:
        return jnp.sum(loss) / max(loss.size, 1)
    return jnp.sum(loss) / count(where, loss.dtype)


def numbers(x: Any, size: int) -> tuple[jax.Array, jax.Array]:
    """Integers of any dtype as int32, -1 or `size` where they are below 0 or too large; which fit.

    A dtype too small for `size` would wrap in comparisons, and one too large in the conversion.
    """
    x = jnp.asarray(x)
    limits = jnp.iinfo(x.dtype)
    x = jnp.clip(x, max(-1, int(limits.min)), min(size, int(limits.max))).astype(jnp.int32)
    return x, (x >= 0) & (x < size)


def unit(x: jax.Array, axis: int | tuple[int, ...]) -> jax.Array:
    """`x` divided by its norm along `axis`; zero, with a zero gradient, where that is zero."""
    square = jnp.sum(x * x, axis=axis, keepdims=True)
    some = square > 0
    return jnp.where(some, x * jax.lax.rsqrt(jnp.where(some, square, 1.0)), 0.0)


def check_floats(name: str, arrays: dict[str, Any], what: str) -> None:
    """Refuses arrays that are not floating."""
    for who, x in arrays.items():
        if not jnp.issubdtype(jnp.result_type(x), jnp.floating):
            raise TypeError(
                f"`{name}({', '.join(arrays)})` expects {what}; {who} is {jnp.result_type(x)}."
            )


def check_logits(
    name: str,
    student: Any,
    teacher: Any,
    temperature: Any,
    reduction: str | None,
    where: Any,
) -> None:
    """Refuses what is no pair of logits of one shape, and options that make no sense."""
    check_floats(name, {"student": student, "teacher": teacher}, "logits")
    found, expected = jnp.shape(student), jnp.shape(teacher)
    if found != expected or not found:
        what = "have the same classes" if found[-1:] != expected[-1:] else "have the same shape"
        raise ValueError(
            f"`{name}(student, teacher)` expects logits [..., classes] that {what}: student is "
            f"{list(found)}, teacher is {list(expected)}."
        )
    check_temperature(name, temperature)
    check_options(name, reduction, where, found[:-1])


def check_temperature(name: str, temperature: Any) -> None:
    """Refuses a temperature that is no scalar above 0."""
    if jnp.ndim(temperature) or (
        not isinstance(temperature, Tracer) and not float(temperature) > 0
    ):
        raise ValueError(
            f"`{name}(..., temperature={temperature})` expects a scalar above 0; 1 leaves the "
            "distributions as they are, more makes them softer."
        )


def check_weight(name: str, option: str, weight: Any) -> None:
    """Refuses a weight that is no scalar from 0 to 1."""
    if jnp.ndim(weight) or (not isinstance(weight, Tracer) and not 0 <= float(weight) <= 1):
        raise ValueError(f"`{name}(..., {option}={weight})` expects a scalar from 0 to 1.")


def check_labels(name: str, labels: Any, examples: Sequence[int], what: str = "labels") -> None:
    """Refuses labels that are not one integer an example."""
    if not jnp.issubdtype(jnp.result_type(labels), jnp.integer):
        raise TypeError(
            f"`{name}(...)` expects {what} that number classes; they are "
            f"{jnp.result_type(labels)}, not integers."
        )
    if jnp.shape(labels) != tuple(examples):
        raise ValueError(
            f"`{name}(...)` expects {what} {list(examples)}, one for each example; they are "
            f"{list(jnp.shape(labels))}."
        )


def check_options(name: str, reduction: str | None, where: Any, examples: Sequence[int]) -> None:
    """Refuses an unknown reduction, and a `where` that is not one boolean an example."""
    if reduction not in ("mean", None):
        raise ValueError(
            f'`{name}(..., reduction={reduction!r})` expects "mean", or None for the loss of '
            "each example."
        )
    check_where(name, where, examples)


def check_where(name: str, where: Any, examples: Sequence[int]) -> None:
    """Refuses a `where` that is not one boolean an example."""
    if where is None:
        return
    if jnp.result_type(where) != jnp.bool_:
        raise TypeError(f"`{name}(..., where=...)` expects booleans, not {jnp.result_type(where)}.")
    if jnp.shape(where) != tuple(examples):
        raise ValueError(
            f"`{name}(..., where=...)` expects one boolean an example, {list(examples)}; it is "
            f"{list(jnp.shape(where))}."
        )
