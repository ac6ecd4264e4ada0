"""Pruning while training: gradient transformations whose updates land on masked weights."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jopt import schedules, trees
from jopt.trace import Site

from . import _landing, _masks, _packed, _scopes
from ._choice import MAGNITUDE, UNSTRUCTURED, Choice, Plan, ranked
from ._packed import Packed, Pooled, Words
from ._patterns import Pattern
from ._scopes import Level, Policy
from ._scores import Score
from ._select import Selection, selection_of

PyTree = Any
Mode = Literal["grow", "anew", "phases"]


class SparsifyState(NamedTuple):
    """State of `sparsify`."""

    step: jax.Array  # int32, updates so far
    sparsity: jax.Array  # float32, what the masks were last made for; of a policy, one for each row
    masks: Packed | Pooled  # one bit a weight
    score: PyTree  # the score's own state
    inner: PyTree = ()  # the state of the optimizer inside, if there is one


class HoldState(NamedTuple):
    """State of `hold`."""

    masks: Packed | Pooled  # one bit a weight
    inner: PyTree = ()  # the state of the optimizer inside, if there is one


def sparsify(
    sparsity: Level | Policy,
    *,
    score: Score = MAGNITUDE,
    pattern: Pattern = UNSTRUCTURED,
    scope: str = "global",
    where: trees.Where | None = None,
    every: int | jax.Array = 1,
    sites: Sequence[Site] | None = None,
    unfit: str = "error",
    regrow: bool = False,
    inner: optax.GradientTransformation | None = None,
    pooled: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Prunes while training: LAST in the chain, it makes `optax.apply_updates` land on zeros.

    At steps 0, `every`, 2·`every`, ... at which the schedule has risen, the lowest scores of the
    weights as they are before the update are added to the masks. The update of a pruned weight w
    becomes `-w`, whatever came in, NaN included; others pass unchanged:

        updates = where(pruned, -params, updates)

    What comes after it in a chain would change `-w`, and weights would miss zero. A pruned weight
    stays pruned: masks only grow, and a schedule that falls leaves them as they are. Between steps
    at which masks grow only bits are read. A weight that is NaN or infinite before it is pruned
    cannot be brought to zero by an addition; `apply_masks` can.

    With `inner=tx` it stands around the optimizer instead of behind it. That is for scores that
    need gradients (what reaches the end of a chain are updates) and second moments; and the
    optimizer then never sees a pruned weight: its gradient, its moments and its value are zero to
    it. So global norms and trust ratios are those of the sparse model, the averages of
    `optax.contrib.schedule_free` are sparse too, and what comes back starts afresh. Gradient
    transformations that the score should see the effect of (clipping, accumulation) go before it.

    Args:
      sparsity: the fraction of weights to prune, in [0, 1), or a schedule of the step that gives it
        (`jopt.schedules.cubic_sparsity`, `steps_sparsity`); or a policy, as of `masks`, a list of
        `(where, fraction or schedule)`.
      score: how much each weight matters.
      pattern: which weights may only go together.
      scope: `"global"`, `"layer"`, `"uniform"` or `"erk"`, as of `masks`.
      where: the leaves to prune; by default those with two axes or more.
      every: steps between looks at the weights, at least 1.
      sites: from `jopt.sites`, as of `masks`.
      unfit: `"error"` or `"skip"`, as of `masks`.
      regrow: choose the masks anew at each look, so that pruned weights may come back (at zero),
        and follow a schedule that falls. For scores that pruned weights can win by: `movement`,
        `taylor` with `straight_through` in the loss, a random one, or any at sparsity 0. A pruned
        weight whose score is NaN comes back last.
      inner: an optimizer to wrap.
      pooled: keep the bits of all masks in one array of the state, and rank leaves of one shape as
        one array. For hundreds of small leaves, each of which takes longer to hand to a compiled
        step than its bits take to read; not for parameters that are sharded, whose masks otherwise
        lie where the weights do.

    Returns:
      A gradient transformation with state `SparsifyState`; `masks_of` reads the masks from any
      chain's state.

    Raises:
      ValueError: as `masks` does, if `every` is no number of steps, if `update` gets no `params`,
        and for `pooled` parameters that a mesh of explicit axes shares out.
      TypeError: if `inner` is no gradient transformation.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from jopt import prune
      >>> params = {"kernel": jnp.array([[1.0, -4.0], [3.0, -2.0]])}
      >>> tx = optax.chain(optax.adam(0.1), prune.sparsify(0.5))
      >>> updates, state = tx.update(params, tx.init(params), params)
      >>> optax.apply_updates(params, updates)["kernel"] == 0
      Array([[ True, False],
             [False,  True]], dtype=bool)

    References:
      Zhu, Gupta, "To prune, or not to prune: exploring the efficacy of pruning for model
      compression", 2017, arXiv 1710.01878 (pruning during training on a schedule). Their pruned
      weights still receive gradient updates; here they do not.
    """
    caller = "prune.sparsify"
    choice = Choice(pattern, scope, where, sites, unfit, caller, pooled)
    choice.check(sparsity, score)
    if not schedules.whole_steps(every):
        raise ValueError(f"`{caller}(..., every={every})` expects a number of steps, at least 1.")
    return gradual(choice, sparsity, score, every, inner, "anew" if regrow else "grow")


def hold(
    masks: PyTree, *, inner: optax.GradientTransformation | None = None, pooled: bool = False
) -> optax.GradientTransformationExtraArgs:
    """Keeps given masks while training goes on: put it LAST in the chain, as `sparsify`.

    For fine-tuning and quantization-aware training after pruning. The first update brings pruned
    weights to zero, if they are not there yet; one that is NaN or infinite stays so, as with
    `sparsify`, until `apply_masks`.

    What stands before it in a chain sees the gradients of pruned weights: in a global norm they
    count, and a NaN among them spreads to all weights. With `inner=tx`, as of `sparsify`, the
    optimizer never sees them: put clipping inside, `hold(masks, inner=optax.chain(clip, adam))`.

    Args:
      masks: a mask tree from `masks` or `masks_of`; a leaf may stand for a whole subtree. What
        `optax.masked` leaves out may be in it.
      inner: an optimizer to wrap.
      pooled: as of `sparsify`.

    Returns:
      A gradient transformation with state `HoldState`; `masks_of` reads the masks from any chain's
      state.

    Raises:
      ValueError: at `init` and `update`, if the masks do not fit the parameters or prune a scalar,
        and if `update` gets no `params`.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from jopt import prune
      >>> params = {"kernel": jnp.array([[1.0, -4.0], [3.0, -2.0]])}
      >>> tx = optax.chain(optax.sgd(0.5), prune.hold(prune.masks(params, 0.5)))
      >>> updates, state = tx.update(params, tx.init(params), params)
      >>> optax.apply_updates(params, updates)["kernel"]
      Array([[ 0. , -2. ],
             [ 1.5,  0. ]], dtype=float32)
    """
    caller = "prune.hold"
    wrapped = None if inner is None else _landing.wrapped(inner, caller)

    def selected(params: PyTree) -> tuple[Selection, list[jax.Array]]:
        found = _masks.aligned(masks, params, caller=caller)
        for (path, leaf), mask in zip(trees.items(params), found, strict=True):
            if not (_masks.is_dense(mask) or jnp.ndim(trees.weight_of(leaf))):
                raise ValueError(
                    f"`{caller}(...)` keeps masks of arrays, and `{path}` is a scalar: its mask is "
                    f"`True`, and was {mask}. Where a mask stands for a whole subtree, give one "
                    "for each leaf of it."
                )
        selection = selection_of(params, [not _masks.is_dense(mask) for mask in found])
        return selection, [mask for mask in found if not _masks.is_dense(mask)]

    def init(params: PyTree) -> HoldState:
        within = () if wrapped is None else wrapped.init(params)
        if not jax.tree.leaves(params):
            return HoldState(_packed.placeholder(params, pooled=pooled), within)
        selection, found = selected(params)
        gone = [
            ~jnp.broadcast_to(mask, jnp.shape(weight))
            for mask, weight in zip(found, selection.chosen_weights, strict=True)
        ]
        packed = _packed.blank(params, selection, pooled=pooled)
        words = _packed.pack_all(gone, pooled=pooled)
        return HoldState(_packed.with_words(packed, selection, words), within)

    def update(
        updates: PyTree, state: Any, params: PyTree | None = None, **extra_args: Any
    ) -> tuple[PyTree, HoldState]:
        params = _landing.needed(params, caller)
        if not jax.tree.leaves(params):
            return updates, state
        selection, _ = selected(params)
        _landing.check(updates, selection, caller=caller)
        gone = _landing.pruned(
            _packed.words_of(state.masks, selection, pooled=pooled, caller=caller), selection
        )
        if wrapped is not None:
            updates, within = _landing.stepped(
                wrapped, updates, state.inner, params, gone, selection, extra_args
            )
            state = state._replace(inner=within)
        return _landing.landed(updates, gone, selection), state

    return optax.GradientTransformationExtraArgs(init, update)


def gradual(
    choice: Choice,
    sparsity: Any,
    score: Score,
    every: int | jax.Array,
    inner: optax.GradientTransformation | None,
    mode: Mode,
) -> optax.GradientTransformationExtraArgs:
    """`sparsify` with masks that only grow, or new ones at each look, or as sparsity changes."""
    wrapped = None if inner is None else _landing.wrapped(inner, choice.caller)

    def init(params: PyTree) -> SparsifyState:
        step, reached = jnp.zeros([], jnp.int32), jnp.zeros([], jnp.float32)
        within = () if wrapped is None else wrapped.init(params)
        if not jax.tree.leaves(params):
            words = _packed.placeholder(params, pooled=choice.pooled)
            return SparsifyState(step, reached, words, score.init(params), within)
        plan = choice.plan(params, sparsity)
        if len(plan.parts) > 1:
            reached = jnp.zeros([len(plan.parts)], jnp.float32)
        scoring = score.init(plan.selection.weights(params))
        words = _packed.blank(params, plan.selection, pooled=choice.pooled)
        return SparsifyState(step, reached, words, scoring, within)

    def update(
        updates: PyTree, state: Any, params: PyTree | None = None, **extra_args: Any
    ) -> tuple[PyTree, SparsifyState]:
        params = _landing.needed(params, choice.caller)
        if not jax.tree.leaves(params):
            return updates, state
        plan = choice.plan(params, sparsity)
        selection = plan.selection
        _landing.check(updates, selection, caller=choice.caller)
        weights = selection.weights(params)
        seen = extra_args
        if wrapped is not None:
            seen = {**extra_args, "grad": updates, "inner_state": state.inner}
        scoring = score.update(selection.weights(updates), state.score, weights, **seen)
        targets = [_scopes.at(p.sparsity, state.step, caller=choice.caller) for p in plan.parts]
        aim, moved = _aimed(targets, state.sparsity, mode)
        due = (state.step % every == 0) & moved
        before = _packed.words_of(
            state.masks, selection, pooled=choice.pooled, caller=choice.caller
        )

        def look() -> Words:
            statistics = score.observe(scoring, weights, **seen, steps=state.step)
            scores = ranked(score, statistics, weights, caller=choice.caller)
            if mode == "grow":
                lost = _grown(before, scores, targets, plan)
            else:
                lost = _anew(before, scores, targets, plan)
            return _packed.pack_all(lost, pooled=choice.pooled)

        words = jax.lax.cond(due, look, lambda: before)
        gone = _landing.pruned(words, selection)
        within = state.inner
        if wrapped is not None:
            updates, within = _landing.stepped(
                wrapped, updates, within, params, gone, selection, extra_args
            )
        reached = jnp.maximum(aim, state.sparsity) if mode == "grow" else aim
        state = SparsifyState(
            step=jnp.asarray(optax.safe_increment(state.step)),
            sparsity=jnp.where(due, reached, state.sparsity),
            masks=_packed.with_words(state.masks, selection, words),
            score=scoring,
            inner=within,
        )
        return _landing.landed(updates, gone, selection), state

    return optax.GradientTransformationExtraArgs(init, update)


def _aimed(targets: Sequence[Any], reached: jax.Array, mode: Mode) -> tuple[jax.Array, jax.Array]:
    """The sparsity to reach, shaped like that reached, and whether masks are due for it."""
    aims = [jnp.asarray(target).astype(jnp.float32) for target in targets]
    aim = jnp.stack(aims) if reached.ndim else aims[0]
    risen, changed = aim > reached, aim != reached
    moved = {"grow": risen, "anew": changed | (aim > 0), "phases": changed}[mode]
    return aim, jnp.any(moved)


def _grown(
    before: Words, scores: Sequence[jax.Array], targets: Sequence[Any], plan: Plan
) -> list[jax.Array]:
    """What is pruned, and the lowest of the rest."""
    gone = _landing.pruned(before, plan.selection)
    lowered = [jnp.where(g, -jnp.inf, s) for g, s in zip(gone, scores, strict=True)]
    kept = plan.choose(lowered, targets)
    return [g | ~k for g, k in zip(gone, kept, strict=True)]


def _anew(
    before: Words, scores: Sequence[jax.Array], targets: Sequence[Any], plan: Plan
) -> list[jax.Array]:
    """The lowest of all; but of what is pruned, a score that is no number is no reason to grow."""
    gone = _landing.pruned(before, plan.selection)
    pairs = zip(gone, scores, strict=True)
    scores = [jnp.where(g & jnp.isnan(s), -jnp.inf, s) for g, s in pairs]
    return [~kept for kept in plan.choose(scores, targets)]
