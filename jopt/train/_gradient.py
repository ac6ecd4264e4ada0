"""Value, gradient, collections and metrics of the user's loss, on a batch or on microbatches."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jopt.train import _loopable as loopable
from jopt.train._state import Aux, merged

PyTree = Any
Loss = Callable[..., Any]


class Evaluated(NamedTuple):
    """One evaluation of a loss and its gradient."""

    value: jax.Array  # float32 scalar
    gradient: PyTree  # like the trained part of the parameters
    collections: PyTree  # the new mutable collections
    metrics: dict[str, jax.Array]  # float32 scalars, the loss among them


def evaluator(loss: Loss, params: PyTree) -> Callable[..., Evaluated]:
    """Returns `f(trained, batch, collections, key)`, the gradient with respect to `trained`."""

    def objective(
        trained: PyTree, batch: PyTree, collections: PyTree, key: jax.Array | None
    ) -> tuple[jax.Array, tuple[PyTree, dict[str, jax.Array]]]:
        options = {} if collections is None else {"collections": collections}
        options |= {} if key is None else {"key": key}
        value, aux = _parts(loss(merged(trained, params), batch, **options), collections)
        metrics = {"loss": value} | dict(aux.metrics or {})
        return value, (aux.collections, {name: _scalar(name, x) for name, x in metrics.items()})

    def evaluate(*args: Any) -> Evaluated:
        (value, (collections, metrics)), gradient = jax.value_and_grad(objective, has_aux=True)(
            *args
        )
        return Evaluated(value.astype(jnp.float32), gradient, collections, metrics)

    return evaluate


def accumulated(
    evaluate: Callable[..., Evaluated], count: int, platform: str
) -> Callable[..., Evaluated]:
    """`evaluate` over `count` microbatches in turn, with the float32 mean of their gradients.

    Collections pass from one microbatch to the next; each draws from its own key.
    """

    def whole(
        trained: PyTree, batch: PyTree, collections: PyTree, key: jax.Array | None
    ) -> Evaluated:
        parts = jax.tree.map(lambda x: _split(x, count), batch)

        def one(carry: tuple[PyTree, PyTree], xs: tuple[jax.Array, PyTree]) -> tuple[Any, Any]:
            sums, collections = carry
            index, part = xs
            folded = None if key is None else jax.random.fold_in(key, index)
            got = evaluate(trained, part, collections, folded)
            sums = jax.tree.map(lambda total, g: total + g.astype(total.dtype), sums, got.gradient)
            return (sums, got.collections), (got.value, got.metrics)

        xs = (jnp.arange(count), parts)
        carry = (jax.tree.map(lambda x: jnp.zeros_like(x, _wide(x)), trained), collections)
        jaxpr = jax.make_jaxpr(one)(carry, jax.tree.map(lambda x: x[0], xs))
        unroll = 1 if loopable.loops(jaxpr, platform) else count
        (sums, collections), history = jax.lax.scan(one, carry, xs, unroll=unroll)
        value, metrics = jax.tree.map(lambda x: jnp.mean(x, axis=0), history)
        gradient = jax.tree.map(lambda x, total: (total / count).astype(x.dtype), trained, sums)
        return Evaluated(value, gradient, collections, metrics)

    return evaluate if count == 1 else whole


def _parts(returned: Any, collections: PyTree) -> tuple[jax.Array, Aux]:
    """The value and `Aux` of what a loss returned, checked."""
    value, aux = returned, Aux()
    if isinstance(returned, tuple):
        if len(returned) != 2 or not isinstance(returned[1], Aux):
            kinds = ", ".join(type(part).__name__ for part in returned)
            raise TypeError(
                f"`make_step(loss, ...)`: the loss returned a tuple of ({kinds}). Return a scalar, "
                "or `(scalar, train.Aux(collections=..., metrics={...}))`."
            )
        value, aux = returned
    if jnp.shape(value) != () or not jnp.issubdtype(jnp.result_type(value), jnp.floating):
        raise TypeError(
            f"`make_step(loss, ...)`: the loss is {jnp.result_type(value)}"
            f"{list(jnp.shape(value))}, expected one floating-point number. "
            "Take the mean over the batch."
        )
    if aux.collections is None:
        aux = aux._replace(collections=collections)
    elif collections is None:
        raise ValueError(
            "`make_step(loss, ...)`: the loss returned collections, but the state has none. "
            "Give them at the start: `train.init(params, tx, collections=...)`."
        )
    if aux.metrics is not None and (
        not isinstance(aux.metrics, Mapping) or "loss" in aux.metrics or "step" in aux.metrics
    ):
        raise ValueError(
            "`Aux(metrics=...)` expects a mapping from names to scalars, without `loss` and "
            f"`step`, which are added; got {aux.metrics!r}."
        )
    return jnp.asarray(value), aux


def _scalar(name: str, x: Any) -> jax.Array:
    if jnp.shape(x) != ():
        raise ValueError(
            f"`Aux(metrics=...)`: `{name}` has shape {list(jnp.shape(x))}, expected a scalar. "
            "Take the mean over the batch."
        )
    return jnp.asarray(x).astype(jnp.float32)


def _split(x: jax.Array, count: int) -> jax.Array:
    """`[batch, ...]` as `[count, batch / count, ...]`; each device keeps the examples it holds."""
    if not jnp.ndim(x) or x.shape[0] % count:
        raise ValueError(
            f"`make_step(..., accumulate={count})` needs a batch that {count} divides, "
            f"got an array of shape {list(jnp.shape(x))}."
        )
    return jnp.moveaxis(x.reshape(x.shape[0] // count, count, *x.shape[1:]), 1, 0)


def _wide(x: jax.Array) -> Any:
    """The dtype to add gradients in: never less than 32 bits."""
    return jnp.float32 if x.dtype.itemsize < 4 else x.dtype
