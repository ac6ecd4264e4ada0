"""Dynamic sparse training: masks of a fixed number of weights that move while training goes on.

An optimizer is wrapped; it never sees a pruned weight (`_landing.stepped`), so one that comes back
starts from zero with fresh moments, whatever the optimizer keeps.
"""

import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from jopt import schedules, trees
from jopt.trace import Site

from . import _bits, _landing, _packed, _threshold, _wide
from ._choice import MAGNITUDE, UNSTRUCTURED, Choice, Plan, ranked
from ._packed import Packed, Pooled, Words
from ._patterns import Pattern
from ._scopes import Policy, is_policy
from ._scores import check_key, random

PyTree = Any
Grow = Callable[[list[jax.Array], list[str], jax.Array], list[jax.Array]]


class Moves(NamedTuple):
    """When masks move, how far, and what decides where to."""

    every: int | jax.Array
    until: int | jax.Array | None
    share: Callable[[jax.Array], jax.Array]  # of the step: the share of weights that moves
    grow: Grow  # of gradients, paths and the step: the score of what may come back


class DynamicState(NamedTuple):
    """State of `rigl`, `set` and `static`."""

    step: jax.Array  # int32, updates so far
    masks: Packed | Pooled  # one bit a weight
    inner: PyTree  # the state of the optimizer inside


def rigl(
    sparsity: float | Policy,
    *,
    inner: optax.GradientTransformation,
    until: int,
    key: jax.Array,
    every: int = 100,
    drop: float = 0.3,
    scope: str = "erk",
    pattern: Pattern = UNSTRUCTURED,
    where: trees.Where | None = None,
    sites: Sequence[Site] | None = None,
    unfit: str = "error",
    pooled: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Trains a sparse network whose weights move to where the gradient is largest.

    Masks start at random. At steps `every`, 2·`every`, ... below `until` each leaf loses the share

        f(t) = drop / 2 · (1 + cos(π t / until))

    of its weights, those of least magnitude, and gains as many, those of the largest gradient among
    all that are then pruned. A weight that comes back is zero, and so are its moments. The number
    of weights in a leaf never changes. Under a `Block` it is the number of blocks that stays: where
    blocks do not divide the shape, those at the far edge are smaller, and the number of weights
    changes as they come and go.

    The first step begins from the parameters as they are, dense ones maybe, and lands on the masks;
    `prune.apply_masks(params, prune.masks_of(tx.init(params)))` starts sparse. Put clipping and
    accumulation before it in a chain, and nothing behind it.

    Args:
      sparsity: the fraction of weights to prune, in [0, 1), or a policy of numbers, as of `masks`.
      inner: the optimizer.
      until: the step from which masks stay; three quarters of the training in the paper.
      key: for the first masks.
      every: steps between moves, at least 1.
      drop: the share that moves at first, in [0, 1].
      scope: `"erk"`, `"uniform"` or `"layer"`.
      pattern: `Unstructured()`, or one of whole units: `Block`, `Channel`.
      where: the leaves to prune; by default those with two axes or more.
      sites: from `jopt.sites`, as of `masks`.
      unfit: `"error"` or `"skip"`, as of `masks`.
      pooled: keep the bits of all masks in one array of the state, as `sparsify` does.

    Returns:
      A gradient transformation with state `DynamicState`; `masks_of` reads the masks.

    Raises:
      ValueError: as `masks` does; for `every` or `until` that is no number of steps, or `drop`
        outside [0, 1]; for a `scope` or a `pattern` that leaves the number of a leaf's weights
        open; for `pooled`, as of `sparsify`.
      TypeError: for a schedule of sparsities, if `inner` is no gradient transformation, or if `key`
        is no random key.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from jopt import prune
      >>> params = {"kernel": jax.random.normal(jax.random.key(0), (8, 8)), "bias": jnp.zeros(8)}
      >>> tx = prune.rigl(0.75, inner=optax.sgd(0.1), until=75, every=10, key=jax.random.key(1))
      >>> updates, state = tx.update(params, tx.init(params), params)
      >>> int((optax.apply_updates(params, updates)["kernel"] != 0).sum())
      16

    Note:
      In the paper a step at which masks move makes no update. Here it does, as weights that stay
      have a gradient like any other.

    References:
      Evci, Gale, Menick, Castro, Elsen, "Rigging the Lottery: Making All Tickets Winners", 2019,
      arXiv 1911.11134.
    """
    choice = _dynamic("prune.rigl", pattern, scope, where, sites, unfit, pooled, every, drop)
    _check_until("prune.rigl", until)

    def share(step: jax.Array) -> jax.Array:
        angle = np.float32(np.pi) * step.astype(jnp.float32) / jnp.asarray(until, jnp.float32)
        return jnp.asarray(drop, jnp.float32) / 2 * (1 + jnp.cos(angle))

    def grow(grads: list[jax.Array], paths: list[str], step: jax.Array) -> list[jax.Array]:
        return [jnp.abs(grad) for grad in grads]

    return _moving(choice, sparsity, inner, key, Moves(every, until, share, grow))


def set(
    sparsity: float | Policy,
    *,
    inner: optax.GradientTransformation,
    key: jax.Array,
    until: int | None = None,
    every: int = 100,
    drop: float = 0.3,
    scope: str = "erk",
    pattern: Pattern = UNSTRUCTURED,
    where: trees.Where | None = None,
    sites: Sequence[Site] | None = None,
    unfit: str = "error",
    pooled: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Trains a sparse network whose weights move at random (sparse evolutionary training).

    As `rigl`, but each move takes the same share `drop` of a leaf's weights, those of least
    magnitude, and gains as many at random (as many blocks, some of which may be smaller).

    Args:
      sparsity: the fraction of weights to prune, in [0, 1), or a policy of numbers, as of `masks`.
      inner: the optimizer.
      key: for the first masks and for what comes back.
      until: the step from which masks stay; `None`: never.
      every: steps between moves, at least 1.
      drop: the share that moves, in [0, 1].
      scope, pattern, where, sites, unfit, pooled: as of `rigl`.

    Returns:
      A gradient transformation with state `DynamicState`; `masks_of` reads the masks.

    Raises:
      ValueError: as `rigl` does.
      TypeError: as `rigl` does.

    References:
      Mocanu, Mocanu, Stone, Nguyen, Gibescu, Liotta, "Scalable Training of Artificial Neural
      Networks with Adaptive Sparse Connectivity inspired by Network Science", 2017,
      arXiv 1707.04780.
    """
    choice = _dynamic("prune.set", pattern, scope, where, sites, unfit, pooled, every, drop)
    if until is not None:
        _check_until("prune.set", until)

    def grow(grads: list[jax.Array], paths: list[str], step: jax.Array) -> list[jax.Array]:
        own = jax.random.fold_in(key, step)
        return [
            jax.random.uniform(jax.random.fold_in(own, zlib.crc32(path.encode())), grad.shape)
            for path, grad in zip(paths, grads, strict=True)
        ]

    def share(step: jax.Array) -> jax.Array:
        return jnp.asarray(drop, jnp.float32)

    return _moving(choice, sparsity, inner, key, Moves(every, until, share, grow))


def static(
    sparsity: float | Policy,
    *,
    inner: optax.GradientTransformation,
    key: jax.Array,
    scope: str = "erk",
    pattern: Pattern = UNSTRUCTURED,
    where: trees.Where | None = None,
    sites: Sequence[Site] | None = None,
    unfit: str = "error",
    pooled: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Trains a sparse network on random masks that never change: what `rigl` is measured against.

    Args:
      sparsity: the fraction of weights to prune, in [0, 1), or a policy of numbers, as of `masks`.
      inner: the optimizer.
      key: for the masks.
      scope, pattern, where, sites, unfit, pooled: as of `rigl`.

    Returns:
      A gradient transformation with state `DynamicState`; `masks_of` reads the masks.

    Raises:
      ValueError: as `rigl` does.
      TypeError: as `rigl` does.
    """
    choice = _dynamic("prune.static", pattern, scope, where, sites, unfit, pooled)
    return _moving(choice, sparsity, inner, key, None)


# Helpers, in order of use.


def _dynamic(
    caller: str,
    pattern: Pattern,
    scope: str,
    where: trees.Where | None,
    sites: Sequence[Site] | None,
    unfit: str,
    pooled: bool,
    every: int | jax.Array = 1,
    drop: float | jax.Array = 0.0,
) -> Choice:
    if scope == "global":
        raise ValueError(
            f'`{caller}(..., scope="global")`: each leaf keeps the number of its weights, so how '
            'many must be settled by "erk", "uniform" or "layer", or by a policy of sparsities.'
        )
    if isinstance(pattern, Pattern) and (pattern.share < 1 or len(pattern.steps) > 1):
        raise ValueError(
            f"`{caller}(..., pattern={pattern})`: units come and go as a whole, so the pattern is "
            "`Unstructured()`, `Block(shape)` or `Channel(axis)`."
        )
    if not schedules.whole_steps(every) or not _is_share(drop):
        raise ValueError(
            f"`{caller}(..., every={every}, drop={drop})` expects a number of steps, at least 1, "
            "and a share in [0, 1]."
        )
    return Choice(pattern, scope, where, sites, unfit, caller, pooled)


def _is_share(drop: Any) -> bool:
    return schedules.is_number(drop) and (isinstance(drop, Tracer) or bool(0 <= drop <= 1))


def _check_until(caller: str, until: Any) -> None:
    if not schedules.whole_steps(until) and until != np.inf:
        raise ValueError(f"`{caller}(..., until={until})` expects a number of steps, at least 1.")


def _moving(
    choice: Choice,
    sparsity: Any,
    inner: optax.GradientTransformation,
    key: jax.Array,
    moves: Moves | None,
) -> optax.GradientTransformationExtraArgs:
    choice.check(sparsity, MAGNITUDE)
    check_key(key, choice.caller)
    levels = [level for _, level in sparsity] if is_policy(sparsity) else [sparsity]
    if any(callable(level) for level in levels):
        raise TypeError(
            f"`{choice.caller}(sparsity, ...)`: a leaf keeps the number of its weights, so "
            "sparsities are numbers, not schedules."
        )
    wrapped = _landing.wrapped(inner, choice.caller)

    def init(params: PyTree) -> DynamicState:
        step = jnp.zeros([], jnp.int32)
        if not jax.tree.leaves(params):
            words = _packed.placeholder(params, pooled=choice.pooled)
            return DynamicState(step, words, wrapped.init(params))
        plan = choice.plan(params, sparsity)
        weights = plan.selection.weights(params)
        scores = ranked(random(key), (), weights, caller=choice.caller)
        kept = plan.choose(scores, [part.sparsity for part in plan.parts])
        # Scores at random lie nowhere in particular.
        pairs = zip(kept, plan.selection.chosen_weights, strict=True)
        lost = [_bits.placed(~mask, weight) for mask, weight in pairs]
        words = _packed.pack_all(lost, pooled=choice.pooled)
        packed = _packed.blank(params, plan.selection, pooled=choice.pooled)
        packed = _packed.with_words(packed, plan.selection, words)
        return DynamicState(step, packed, wrapped.init(params))

    def update(
        updates: PyTree, state: Any, params: PyTree | None = None, **extra_args: Any
    ) -> tuple[PyTree, DynamicState]:
        params = _landing.needed(params, choice.caller)
        if not jax.tree.leaves(params):
            return updates, state
        plan = choice.plan(params, sparsity)
        selection = plan.selection
        _landing.check(updates, selection, caller=choice.caller)
        words = _packed.words_of(state.masks, selection, pooled=choice.pooled, caller=choice.caller)
        if moves is not None:
            grads = jax.tree.leaves(selection.weights(updates))
            words = _next(moves, plan, words, grads, state.step, choice.pooled)
        gone = _landing.pruned(words, selection)
        updates, within = _landing.stepped(
            wrapped, updates, state.inner, params, gone, selection, extra_args
        )
        step = jnp.asarray(optax.safe_increment(state.step))
        packed = _packed.with_words(state.masks, selection, words)
        return _landing.landed(updates, gone, selection), DynamicState(step, packed, within)

    return optax.GradientTransformationExtraArgs(init, update)


def _next(
    moves: Moves,
    plan: Plan,
    words: Words,
    grads: list[jax.Array],
    step: jax.Array,
    pooled: bool,
) -> Words:
    """The words of the masks at this step."""
    selection = plan.selection

    def move() -> Words:
        gained = moves.grow(grads, selection.chosen_paths, step)
        gone = _landing.pruned(words, selection)
        lost = _moved(plan, gone, moves.share(step), gained)
        return _packed.pack_all(lost, pooled=pooled)

    due = (step % moves.every == 0) & (step > 0)
    if moves.until is not None:
        due &= step < moves.until
    return jax.lax.cond(due, move, lambda: words)


def _moved(
    plan: Plan, gone: list[jax.Array], share: jax.Array, gained: list[jax.Array]
) -> list[jax.Array]:
    """What is pruned after a move; leaf by leaf as much as before."""
    pattern, axes, weights = plan.pattern, plan.axes, plan.selection.chosen_weights
    stay, best, whole = [], [], []
    for mask, weight, score, axis in zip(gone, weights, gained, axes, strict=True):
        size = jnp.abs(jax.lax.stop_gradient(weight))
        stay.append(pattern.units(jnp.where(mask, -jnp.inf, size), axis))
        # A gradient that is no number is no reason to grow.
        score = jnp.where(jnp.isnan(score), -1, score.astype(jnp.float32))
        best.append(pattern.units(score, axis))
        whole.append(pattern.units(jnp.where(mask, -jnp.inf, 0.0), axis) == 0)
    active = _threshold.counts(whole, stacked=plan.stacked)
    sizes = np.asarray([units.size for units in stay], np.uint32)

    def lowest(active: jax.Array, sizes: Any) -> tuple[jax.Array, jax.Array]:
        moves = jnp.round(share * active.astype(jnp.float32)).astype(jnp.uint32)
        return sizes - active + moves, sizes - moves

    if plan.stacked:
        leave, enter = lowest(active, sizes)
    else:  # by scalars, of which programs are made that XLA compiles once
        pairs = [lowest(count, size) for count, size in zip(active, sizes, strict=True)]
        leave, enter = (jnp.stack(column) for column in zip(*pairs, strict=True))
    kept = _keep(stay, leave, plan)
    rest = [jnp.where(keep, -jnp.inf, score) for keep, score in zip(kept, best, strict=True)]
    new = [keep | grown for keep, grown in zip(kept, _keep(rest, enter, plan), strict=True)]
    quads = zip(new, weights, axes, strict=True)
    return [~pattern.spread(keep, weight, axis) for keep, weight, axis in quads]


def _keep(scores: list[jax.Array], lowest: jax.Array, plan: Plan) -> list[jax.Array]:
    scores = _threshold.common(scores)
    return _threshold.keep(scores, _wide.widen(lowest), together=False, stacked=plan.stacked)
