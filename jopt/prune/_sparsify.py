"""Pruning while training: gradient transformations whose updates land on masked weights."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from jopt import trees
from jopt.trace import Site

from . import _masks, _packed
from ._masks import MAGNITUDE, UNSTRUCTURED
from ._packed import Packed
from ._patterns import Pattern
from ._scores import Score
from ._select import Selection, input_axes, select, selection_of

PyTree = Any


class SparsifyState(NamedTuple):
    """State of `sparsify`."""

    step: jax.Array  # int32, updates so far
    sparsity: jax.Array  # float32, what the masks were last made for
    masks: Packed  # one bit a weight
    score: PyTree  # the score's own state


class HoldState(NamedTuple):
    """State of `hold`."""

    masks: Packed  # one bit a weight


def sparsify(
    sparsity: jax.typing.ArrayLike | optax.Schedule,
    *,
    score: Score = MAGNITUDE,
    pattern: Pattern = UNSTRUCTURED,
    scope: str = "global",
    where: trees.Where | None = None,
    every: int | jax.Array = 1,
    sites: Sequence[Site] | None = None,
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

    Args:
      sparsity: the fraction of weights to prune, in [0, 1), or a schedule of the step that gives it
        (`jopt.schedules.cubic_sparsity`, `steps_sparsity`).
      score: how much each weight matters.
      pattern: which weights may only go together.
      scope: `"global"` or `"layer"`, as of `masks`.
      where: the leaves to prune; by default those with two axes or more.
      every: steps between looks at the weights, at least 1.
      sites: from `jopt.sites`, as of `masks`.

    Returns:
      A gradient transformation with state `SparsifyState`; `masks_of` reads the masks from any
      chain's state.

    Raises:
      ValueError: as `masks` does, if `every` is below 1, and if `update` gets no `params`.

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
    _masks.check(sparsity, score, pattern, scope, caller=caller)
    if not isinstance(every, Tracer) and every < 1:
        raise ValueError(f"`{caller}(..., every={every})` expects a number of steps, at least 1.")

    def init(params: PyTree) -> SparsifyState:
        step, reached = jnp.zeros([], jnp.int32), jnp.zeros([], jnp.float32)
        if not jax.tree.leaves(params):
            return SparsifyState(step, reached, _packed.placeholder(params), score.init(params))
        selection = select(params, where, caller=caller)
        input_axes(selection, pattern, sites, caller=caller)
        scoring = score.init(selection.weights(params))
        return SparsifyState(step, reached, _packed.blank(params, selection), scoring)

    def update(
        updates: PyTree, state: Any, params: PyTree | None = None, **extra_args: Any
    ) -> tuple[PyTree, SparsifyState]:
        params = _needed(params, caller)
        if not jax.tree.leaves(params):
            return updates, state
        selection = select(params, where, caller=caller)
        weights = selection.weights(params)
        scoring = score.update(selection.weights(updates), state.score, weights, **extra_args)
        target = sparsity(state.step) if callable(sparsity) else sparsity
        aim = jnp.asarray(target).astype(jnp.float32)
        due = (state.step % every == 0) & (aim > state.sparsity)
        before = _packed.words_of(state.masks, selection)

        def grow() -> list[jax.Array]:
            axes = input_axes(selection, pattern, sites, caller=caller)
            scores = _masks.ranked(score, scoring, weights, caller=caller)
            gone = _pruned(before, selection)
            lowered = [jnp.where(g, -jnp.inf, s) for g, s in zip(gone, scores, strict=True)]
            kept = _masks.choose(lowered, target, pattern=pattern, scope=scope, axes=axes)
            return [_packed.pack(g | ~k) for g, k in zip(gone, kept, strict=True)]

        words = jax.lax.cond(due, grow, lambda: before)
        state = SparsifyState(
            step=jnp.asarray(optax.safe_increment(state.step)),
            sparsity=jnp.where(due, aim, state.sparsity),
            masks=_packed.with_words(state.masks, selection, words),
            score=scoring,
        )
        return _landed(updates, words, selection), state

    return optax.GradientTransformationExtraArgs(init, update)


def hold(masks: PyTree) -> optax.GradientTransformationExtraArgs:
    """Keeps given masks while training goes on: put it LAST in the chain, as `sparsify`.

    For fine-tuning and quantization-aware training after pruning. The first update brings pruned
    weights to zero, if they are not there yet.

    Args:
      masks: a mask tree from `masks` or `masks_of`; a leaf may stand for a whole subtree.

    Returns:
      A gradient transformation with state `HoldState`; `masks_of` reads the masks from any chain's
      state.

    Raises:
      ValueError: at `init` and `update`, if the masks do not fit the parameters, and if `update`
        gets no `params`.

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

    def selected(params: PyTree) -> tuple[Selection, list[jax.Array]]:
        found = _masks.aligned(masks, params, caller=caller)
        selection = selection_of(params, [not _masks.is_dense(mask) for mask in found])
        return selection, [mask for mask in found if not _masks.is_dense(mask)]

    def init(params: PyTree) -> HoldState:
        if not jax.tree.leaves(params):
            return HoldState(_packed.placeholder(params))
        selection, found = selected(params)
        words = [
            _packed.pack(~jnp.broadcast_to(mask, jnp.shape(weight)))
            for mask, weight in zip(found, selection.chosen_weights, strict=True)
        ]
        return HoldState(_packed.with_words(_packed.blank(params, selection), selection, words))

    def update(
        updates: PyTree, state: Any, params: PyTree | None = None, **extra_args: Any
    ) -> tuple[PyTree, HoldState]:
        params = _needed(params, caller)
        if not jax.tree.leaves(params):
            return updates, state
        selection, _ = selected(params)
        return _landed(updates, _packed.words_of(state.masks, selection), selection), state

    return optax.GradientTransformationExtraArgs(init, update)


def _needed(params: PyTree | None, caller: str) -> PyTree:
    if params is None:
        raise ValueError(
            f"`{caller}(...)` acts on weights: call `update(updates, state, params)` with `params`."
        )
    return params


def _pruned(words: Sequence[jax.Array], selection: Selection) -> list[jax.Array]:
    """Booleans from bits, shaped like the chosen weights."""
    pruned = []
    for word, weight in zip(words, selection.chosen_weights, strict=True):
        axis = _packed.packed_axis(jnp.shape(weight))
        pruned.append(_packed.unpack(word, axis, jnp.shape(weight)[axis]))
    return pruned


def _landed(updates: PyTree, words: Sequence[jax.Array], selection: Selection) -> PyTree:
    """Updates that bring pruned weights to zero exactly."""
    landed = []
    leaves = selection.treedef.flatten_up_to(updates)
    own = iter(zip(_pruned(words, selection), selection.chosen_weights, strict=True))
    for leaf, mine in zip(leaves, selection.chosen, strict=True):
        if mine:
            pruned, weight = next(own)
            update = trees.weight_of(leaf)
            dtype = update.dtype
            if dtype != weight.dtype:
                # One that holds the weight exactly, or the sum would miss zero.
                dtype = np.promote_types(np.promote_types(dtype, np.float32), weight.dtype)
            update = jnp.where(pruned, -weight.astype(dtype), update.astype(dtype))
            leaf = trees.with_weight(leaf, update)
        landed.append(leaf)
    return selection.treedef.unflatten(landed)
