"""Masks from scores, patterns and scopes; masks applied; masks counted."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jopt import trees
from jopt.trace import Site

from . import _threshold, _wide
from ._patterns import Pattern, Unstructured
from ._scores import Score, magnitude
from ._select import input_axes, select

PyTree = Any
MAGNITUDE = magnitude(1)
UNSTRUCTURED = Unstructured()
SCOPES = ("global", "layer")


class Kept(NamedTuple):
    """What a mask leaves of one weight."""

    kept: int
    total: int

    @property
    def sparsity(self) -> float:
        """The fraction that is pruned."""
        return 1 - self.kept / self.total


def masks(
    params: PyTree,
    sparsity: jax.typing.ArrayLike,
    *,
    score: Score = MAGNITUDE,
    pattern: Pattern = UNSTRUCTURED,
    scope: str = "global",
    where: trees.Where | None = None,
    sites: Sequence[Site] | None = None,
) -> PyTree:
    """Marks the weights to keep: all but the lowest scores.

    Of n weights exactly `round(sparsity * n)` go. Halves round to even. Among equal scores the
    first go first: in the order of the leaves, and of a leaf's elements, row by row. A threshold is
    found by counting alone, so weights sharded over devices stay where they are. Pure: works under
    `jit` and `vmap`, where `sparsity` may be traced; it is then taken as float32 and clipped to
    what the pattern allows, where a number would be an error.

    Args:
      params: any pytree; typed leaves that train (`jopt.quant.FakeQuant`) are masked on their
        weight.
      sparsity: the fraction of weights to prune, in [0, 1).
      score: how much each weight matters.
      pattern: which weights may only go together.
      scope: `"global"` ranks the weights of all leaves together, `"layer"` prunes each leaf alike.
      where: the leaves to prune; by default those with two axes or more.
      sites: from `jopt.sites`, tells patterns along which axis a weight's inputs lie; by default
        weights are `[..., in, out]`.

    Returns:
      A mask tree: boolean arrays shaped like the weights, False where pruned, and a scalar True for
      leaves that are not pruned. A typed leaf has one mask.

    Raises:
      ValueError: if `sparsity` is outside [0, 1) or above what the pattern allows, `where` selects
        nothing, `scope` is unknown, or the pattern does not fit; then every such path is listed.
      TypeError: if a selected leaf cannot be pruned.

    Example:
      >>> import jax.numpy as jnp
      >>> from jopt import prune
      >>> params = {"kernel": jnp.array([[1.0, -4.0], [3.0, -2.0]]), "bias": jnp.zeros(2)}
      >>> prune.masks(params, 0.5)["kernel"]
      Array([[False,  True],
             [ True, False]], dtype=bool)
    """
    caller = "prune.masks"
    check(sparsity, score, pattern, scope, caller=caller)
    selection = select(params, where, caller=caller)
    axes = input_axes(selection, pattern, sites, caller=caller)
    weights = selection.weights(params)
    scores = ranked(score, score.init(weights), weights, caller=caller)
    kept = choose(scores, sparsity, pattern=pattern, scope=scope, axes=axes)
    return selection.filled(kept, lambda leaf: jnp.ones((), bool))


def apply_masks(params: PyTree, masks: PyTree) -> PyTree:
    """Sets pruned weights to zero, whatever they were, NaN included.

    Args:
      params: any pytree.
      masks: a mask tree of its structure; a leaf may stand for a whole subtree.

    Returns:
      `params` with zeros where the masks are False.

    Raises:
      ValueError: if a mask does not fit.

    Example:
      >>> import jax.numpy as jnp
      >>> from jopt import prune
      >>> prune.apply_masks(jnp.array([1.0, jnp.nan]), jnp.array([True, False]))
      Array([1., 0.], dtype=float32)
    """
    treedef = jax.tree.structure(params, is_leaf=trees.is_typed)
    leaves = treedef.flatten_up_to(params)
    applied = []
    for leaf, mask in zip(leaves, aligned(masks, params, caller="apply_masks"), strict=True):
        if not is_dense(mask):
            weight = trees.weight_of(leaf)
            kept = jnp.broadcast_to(mask, jnp.shape(weight))
            leaf = trees.with_weight(leaf, jnp.where(kept, weight, jnp.zeros_like(weight)))
        applied.append(leaf)
    return treedef.unflatten(applied)


def report(masks: PyTree) -> dict[str, Kept]:
    """Counts what each mask keeps, by path; leaves that stay dense (a scalar True) have no entry.

    Example:
      >>> import jax.numpy as jnp
      >>> from jopt import prune
      >>> prune.report({"kernel": jnp.array([[True, False]]), "bias": jnp.array(True)})
      {'kernel': Kept(kept=1, total=2)}
    """
    return {
        path: Kept(int(np.count_nonzero(mask)), int(np.size(mask)))
        for path, mask in trees.items(masks)
        if not is_dense(mask)
    }


def check(sparsity: Any, score: Score, pattern: Pattern, scope: str, *, caller: str) -> None:
    """Raises if an option is out of its range, as far as it is known without tracing."""
    if not isinstance(score, Score):
        raise TypeError(
            f"`{caller}(..., score={score!r})` expects a score such as `prune.magnitude(1)`; make "
            "one of a function with `prune.Score(lambda state, params: ...)`."
        )
    if scope not in SCOPES:
        raise ValueError(
            f'`{caller}(..., scope={scope!r})`: `scope` is "global" (all leaves are ranked '
            'together) or "layer" (each leaf loses the same fraction).'
        )
    if not isinstance(pattern, Pattern):
        raise TypeError(
            f"`{caller}(..., pattern={pattern!r})` expects a pattern such as "
            "`prune.Unstructured()` or `prune.NM(2, 4)`."
        )
    if callable(sparsity) or isinstance(sparsity, Tracer):
        return
    if jnp.ndim(sparsity) != 0 or not 0 <= float(sparsity) < 1:
        raise ValueError(
            f"`{caller}(sparsity={sparsity})` expects the fraction of weights to prune, in [0, 1)."
        )
    if float(sparsity) > pattern.share * (1 + 1e-6):
        raise ValueError(
            f"`{caller}(sparsity={sparsity}, pattern={pattern})`: the pattern prunes at most "
            f"a fraction of {pattern.share:.6g}."
        )


def ranked(score: Score, state: PyTree, weights: PyTree, *, caller: str) -> list[jax.Array]:
    """The scores of the chosen weights, in order."""
    weights = jax.lax.stop_gradient(weights)
    scores = score.rank(state, weights)
    known = [leaf for _, leaf in trees.items(weights)]
    found = jax.tree.leaves(scores)
    alike = jax.tree.structure(scores) == jax.tree.structure(weights) and all(
        jnp.shape(s) == jnp.shape(w) and jnp.issubdtype(jnp.result_type(s), jnp.floating)
        for s, w in zip(found, known, strict=True)
    )
    if not alike:
        raise ValueError(
            f"`{caller}(..., score=...)`: `score.rank(state, params)` must give an array of floats "
            "for each weight, in a tree of the same structure. It gave "
            f"{jax.tree.map(jnp.shape, scores)} for {jax.tree.map(jnp.shape, weights)}."
        )
    return [jnp.asarray(s) for s in found]


def choose(
    scores: Sequence[jax.Array],
    sparsity: jax.typing.ArrayLike,
    *,
    pattern: Pattern,
    scope: str,
    axes: Sequence[int],
) -> list[jax.Array]:
    """The masks, given the scores."""
    units = [pattern.units(score, axis) for score, axis in zip(scores, axes, strict=True)]
    sizes = [unit.size for unit in units]
    together = scope == "global"
    lowest = _lowest(sparsity, pattern.share, [sum(sizes)] if together else sizes)
    kept = _threshold.keep(_threshold.common(units), lowest, together=together)
    triples = zip(kept, scores, axes, strict=True)
    return [pattern.spread(mask, score, axis) for mask, score, axis in triples]


def _lowest(sparsity: Any, share: float, sizes: Sequence[int]) -> _wide.Wide:
    """How many of so many units go."""
    if isinstance(sparsity, Tracer):
        fraction = jnp.clip(sparsity.astype(jnp.float32) / share, 0.0, 1.0)
        return _wide.shares(fraction, sizes)
    fraction = min(max(float(sparsity) / share, 0.0), 1.0)
    return _wide.wide([round(fraction * size) for size in sizes])


def is_dense(mask: Any) -> bool:
    """Whether a mask is known to keep all: a scalar True."""
    known = not isinstance(mask, Tracer)
    return known and jnp.ndim(mask) == 0 and bool(mask)


def aligned(masks: PyTree, params: PyTree, *, caller: str) -> list[Any]:
    """The mask of each leaf of `params`, a typed leaf having one; shapes are checked."""
    try:
        full = jax.tree.map(
            lambda mask, below: jax.tree.map(lambda leaf: mask, below, is_leaf=trees.is_typed),
            masks,
            params,
        )
    except ValueError as error:
        raise ValueError(
            f"`{caller}(...)`: the masks have another structure than `params`:\n{error}"
        ) from error
    found = jax.tree.structure(params, is_leaf=trees.is_typed).flatten_up_to(full)
    for (path, leaf), mask in zip(trees.items(params), found, strict=True):
        if is_dense(mask):
            continue
        shape, expected = jnp.shape(mask), jnp.shape(trees.weight_of(leaf))
        if jnp.result_type(mask) != jnp.bool_ or not _broadcasts(shape, expected):
            raise ValueError(
                f"`{caller}(...)`: the mask of `{path}` is {jnp.result_type(mask)}{list(shape)}, "
                f"and its weight has shape {list(expected)}. A mask is boolean and broadcasts to "
                "its weight."
            )
    return found


def _broadcasts(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    tail = to[len(to) - len(shape) :]
    return len(shape) <= len(to) and all(a in (1, b) for a, b in zip(shape, tail, strict=True))
