"""A teacher that is the student's own average, kept in the optimizer's state."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

from jopt import trees

PyTree = Any


class MeanTeacherState(NamedTuple):
    """State of `mean_teacher`."""

    step: jax.Array  # int32, updates so far
    average: PyTree  # like params, in float32 where these have less


def mean_teacher(
    decay: float | jax.Array | optax.Schedule = 0.999, *, ramp: bool = True
) -> optax.GradientTransformationExtraArgs:
    """Keeps a moving average of the parameters: LAST in the chain. Updates pass unchanged.

        average ← d · average + (1 - d) · (params + updates),   d = min(decay, t / (t + 1))

    at update t = 0, 1, ..., so that at first it is the plain mean of what has been. Before any
    update it is the parameters themselves. Leaves that are no floats are the newest.

    Args:
      decay: from 0 to 1, an array too (`optax.inject_hyperparams`), or a schedule of t that gives
        it.
      ramp: False for d = decay from the first update on.

    Returns:
      A gradient transformation with state `MeanTeacherState`; `teacher_of` reads the average.

    Raises:
      ValueError: if `decay` is not from 0 to 1, and if `update` gets no `params`.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from jopt import distill
      >>> tx = optax.chain(optax.sgd(1.0), distill.mean_teacher(0.9, ramp=False))
      >>> params = jnp.array(1.0)
      >>> updates, state = tx.update(jnp.array(1.0), tx.init(params), params)
      >>> print(f"{distill.teacher_of(state):.1f}")
      0.9

    References:
      Tarvainen, Valpola, "Mean teachers are better role models", 2017, arXiv 1703.01780.
    """
    traced = isinstance(decay, Tracer)  # by `optax.inject_hyperparams`, under `jit`
    if not callable(decay) and not traced and not 0 <= float(decay) <= 1:
        raise ValueError(f"`mean_teacher({decay})` expects a number from 0 to 1, such as 0.999.")

    def init(params: PyTree) -> MeanTeacherState:
        # Copies, so that donating both the parameters and this state gives no buffer twice.
        return MeanTeacherState(jnp.zeros([], jnp.int32), jax.tree.map(_widened, params))

    def update(
        updates: PyTree, state: Any, params: PyTree | None = None, **extra_args: Any
    ) -> tuple[PyTree, MeanTeacherState]:
        del extra_args
        if params is None:
            raise ValueError("`mean_teacher(...).update` needs `params`: pass them as the third.")
        step = jnp.asarray(state.step, jnp.float32)
        wanted = decay(state.step) if callable(decay) else decay
        keep = jnp.asarray(wanted, jnp.float32)
        if ramp:
            keep = jnp.minimum(keep, step / (step + 1))

        def mean(old: jax.Array, param: jax.Array, change: jax.Array) -> jax.Array:
            if not jnp.issubdtype(old.dtype, jnp.floating):
                return jnp.asarray(param)
            new = (param + change.astype(param.dtype)).astype(old.dtype)
            return old + (1 - keep).astype(old.dtype) * (new - old)

        average = jax.tree.map(mean, state.average, params, updates)
        return updates, MeanTeacherState(jnp.asarray(optax.safe_increment(state.step)), average)

    return optax.GradientTransformationExtraArgs(init, update)


def teacher_of(opt_state: PyTree, params: PyTree | None = None) -> PyTree:
    """Finds the average that `mean_teacher` keeps, in the state of any chain it is part of.

    The parts of `optax.multi_transform` are put together.

    Args:
      opt_state: an optimizer state.
      params: where given, the average takes their dtypes; and they stand for what no average is
        kept of, because `optax.masked` or `multi_transform` left it out.

    Returns:
      A tree like the parameters, for the same function.

    Raises:
      ValueError: if there is no average in the state, or more than one of the same leaf; without
        `params`, if there is none of some leaf.
    """
    is_state = lambda node: isinstance(node, MeanTeacherState)  # noqa: E731
    found = [node for node in jax.tree.leaves(opt_state, is_leaf=is_state) if is_state(node)]
    if not found:
        raise ValueError(
            "`teacher_of(opt_state)` found 0 averages in the state "
            f"({type(opt_state).__name__}); `distill.mean_teacher` belongs into the chain, once."
        )
    clash = (
        "`teacher_of(opt_state)` found more than one average of the same parameters; "
        "`distill.mean_teacher` belongs into the chain, once."
    )
    average = found[0].average
    for node in found[1:]:
        average = trees.merged(average, node.average, _is_absent, clash)
    if params is None:
        if any(map(_is_absent, jax.tree.leaves(average, is_leaf=_is_absent))):
            raise ValueError(
                "`teacher_of(opt_state)` found an average of some parameters alone, for "
                "`mean_teacher` is inside `optax.masked` or `multi_transform`: say "
                "`teacher_of(opt_state, params)`, which stand for the others."
            )
        return average
    return _filled(average, params)


# Helpers, in order of use.


def _widened(param: jax.typing.ArrayLike) -> jax.Array:
    dtype = jnp.result_type(param)
    low = jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 32
    return jnp.array(param, jnp.float32 if low else dtype, copy=True)


def _is_absent(node: Any) -> bool:
    return isinstance(node, optax.MaskedNode)


def _filled(average: PyTree, params: PyTree) -> PyTree:
    """The average in the dtypes of the parameters, which stand for what it leaves out."""

    def fill(own: Any, param: Any) -> Any:
        if _is_absent(own):
            return param
        return own.astype(jnp.result_type(param))

    return jax.tree.map(fill, average, params, is_leaf=_is_absent)
