"""One compiled training step, the same on one device and on many."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from jopt.train import _gradient as gradient
from jopt.train import _state as states
from jopt.train._layout import Layout
from jopt.train._programs import Fixed, Programs
from jopt.train._state import State

PyTree = Any
Metrics = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True, eq=False)
class Step:
    """A compiled step: `state, metrics = step(state, batch)`; made by `make_step`.

    A step that donates consumes the state it is given: go on with the one returned.

    Attributes:
      body: the pure function `(state, batch) -> (state, metrics)`, for loops of one's own; under
        `"pmap"` it needs the device axis `"batch"`.
      layout: the devices that take part.
      donate: whether the memory of the given state is reused.
    """

    body: Callable[[State, PyTree], tuple[State, Metrics]]
    layout: Layout
    donate: bool

    def __call__(self, state: State, batch: PyTree) -> tuple[State, Metrics]:
        """Takes one step on `batch`, whose arrays lead with the example axis."""
        if self.layout.parallel == "jit":
            state = self.layout.enter(state)
        elif jnp.ndim(state.step) == 0:
            raise ValueError(
                '`step(state, batch)` with `parallel="pmap"` expects one copy of the state for '
                "each device: begin with `state = train.replicate(state)`."
            )
        fixed = Fixed(self.layout.shardings(state))
        return self.programs.one(fixed, state, self.layout.spread(batch))

    @functools.cached_property
    def programs(self) -> Programs:
        """The compiled programs, kept with the step so that a second `fit` compiles nothing."""
        return Programs(self.body, self.layout, donate=self.donate)


def make_step(
    loss: gradient.Loss,
    tx: optax.GradientTransformation,
    *,
    mesh: Mesh | None = None,
    parallel: Literal["jit", "pmap"] = "jit",
    accumulate: int = 1,
    donate: bool = True,
) -> Step:
    """Compiles one step of training: the gradient of `loss`, and the update that `tx` makes of it.

    With `g` the gradient of the loss over the batch: `u, s = tx.update(g, s, params,
    value=loss)`, then `params + u`. Masks, schedules and low-bit states act inside `tx`; fake
    quantization inside the loss.

    Args:
      loss: `loss(params, batch)`, with `collections=` where the state has mutable collections and
        `key=` where it has a key (already folded with the step, and with the microbatch and the
        device where there are several). Returns a scalar, the mean over the batch, or `(scalar,
        Aux(collections, metrics))`.
      tx: any optax transformation. It sees `optax.MaskedNode()` for leaves without a derivative,
        and the loss as `value=` if it takes extra arguments.
      mesh: devices over which to split the batch, along the first axis. The numbers are those of
        one device, to rounding: batch statistics are of the whole batch, dropout draws the same
        bits.
      parallel: `"jit"`, or `"pmap"`: each device evaluates the loss on its share, and gradients,
        metrics and collections are averaged over the axis `"batch"`. Batch norm then needs
        `axis_name="batch"`.
      accumulate: split the batch into this many parts, take them one after another, and average the
        gradients in float32: the whole batch in less memory, unless a statistic runs over it.
      donate: reuse the memory of the state given to a step, which is then gone.

    Returns:
      A `Step`, `step(state, batch) -> (state, metrics)`. Metrics are float32 scalars: `loss` and
      the loss's own.

    Raises:
      ValueError, TypeError: for an unknown `parallel`, or `accumulate` below 1. While tracing,
        for a loss that does not return what it should, a batch that does not divide, or an update
        that changes the types of the state.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from jopt import train
      >>> def loss(params, batch):
      ...   return jnp.mean((params["w"] * batch["x"] - batch["y"]) ** 2)
      >>> tx = optax.sgd(0.5)
      >>> step = train.make_step(loss, tx)
      >>> batch = {"x": jnp.array([1.0, -1.0]), "y": jnp.array([2.0, -2.0])}
      >>> state, metrics = step(train.init({"w": jnp.array(0.0)}, tx), batch)
      >>> float(state.params["w"]), float(metrics["loss"])
      (2.0, 4.0)
    """
    if parallel not in ("jit", "pmap"):
        raise ValueError(f'`make_step(..., parallel={parallel!r})` expects "jit" or "pmap".')
    if accumulate < 1:
        raise ValueError(f"`make_step(..., accumulate={accumulate})` expects at least 1.")
    layout = Layout(None if mesh is None else states.auto(mesh), parallel)
    extended = optax.with_extra_args_support(tx)

    def body(state: State, batch: PyTree) -> tuple[State, Metrics]:
        evaluate = gradient.evaluator(loss, state.params)
        evaluate = gradient.accumulated(evaluate, accumulate, layout.platform)
        trained = states.trained(state.params)
        key = layout.fold(state.key, state.step)
        got = layout.mean(evaluate(trained, layout.constrain(batch), state.collections, key))
        updates, opt_state = extended.update(
            got.gradient, state.opt_state, trained, value=got.value
        )
        params = states.merged(optax.apply_updates(trained, updates), state.params)
        after = State(state.step + 1, params, opt_state, got.collections, state.key)
        return _kept(after, state), got.metrics

    return Step(body, layout, donate)


def _kept(after: State, before: State) -> State:
    """`after`, checked to have the shapes and dtypes of `before`, so that steps can be looped."""
    old, structure = jax.tree_util.tree_flatten_with_path(before)
    new, changed = jax.tree_util.tree_flatten_with_path(after)
    if structure != changed:
        ours, theirs = ({_spell(path) for path, _ in side} for side in (old, new))
        raise TypeError(
            "`step(state, batch)` must keep the structure of its state; it lost "
            f"{sorted(ours - theirs)[:4]} and gained {sorted(theirs - ours)[:4]}. Return "
            "collections like those given, and begin with `train.init` and the `tx` of the step."
        )
    for (path, x), (_, y) in zip(old, new, strict=True):
        if (jnp.shape(x), x.dtype) != (jnp.shape(y), y.dtype):
            raise TypeError(
                f"`step(state, batch)` must keep the types of its state; `{_spell(path)}` went "
                f"from {x.dtype}{list(jnp.shape(x))} to {y.dtype}{list(jnp.shape(y))}."
            )
    # A weakly typed result would be compiled for anew at the next step.
    return jax.tree.map(lambda x: jax.lax.convert_element_type(x, x.dtype), after)


def _spell(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
