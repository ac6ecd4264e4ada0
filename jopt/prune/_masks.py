"""Masks from scores, patterns and scopes; masks applied; masks counted."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from jopt import trees
from jopt.trace import Site

from . import _select
from ._choice import MAGNITUDE, UNSTRUCTURED, Choice, ranked
from ._patterns import Pattern
from ._scopes import Level, Policy
from ._scores import Score

PyTree = Any


class Kept(NamedTuple):
    """What a mask leaves of one weight."""

    kept: int
    total: int
    reason: str = ""  # why it was left dense though it was asked for

    @property
    def sparsity(self) -> float:
        """The fraction that is pruned."""
        return 1 - self.kept / self.total if self.total else 0.0


def masks(
    params: PyTree,
    sparsity: Level | Policy,
    *,
    score: Score = MAGNITUDE,
    pattern: Pattern = UNSTRUCTURED,
    scope: str = "global",
    where: trees.Where | None = None,
    sites: Sequence[Site] | None = None,
    unfit: str = "error",
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
      sparsity: the fraction of weights to prune, in [0, 1); or a policy of such fractions, a list
        of `(where, fraction)` in which the first match counts, and leaves without one, or with
        `None`, stay dense. A scope then acts within each row's leaves.
      score: how much each weight matters.
      pattern: which weights may only go together.
      scope: `"global"` ranks the weights of all leaves together; `"layer"` prunes each leaf alike;
        `"uniform"` does so but leaves the first and the last layer dense, as `sites` has them;
        `"erk"` keeps a density of each leaf in proportion to Σ dims / Π dims, at most 1, so that
        small leaves keep more, and all together have the sparsity (each count is rounded); layers
        stacked in one leaf are told apart with `sites`.
      where: the leaves to prune; by default those with two axes or more.
      sites: from `jopt.sites`, tells patterns along which axis a weight's inputs lie (by default
        weights are `[..., in, out]`), and scopes in which order weights are used.
      unfit: what to do where the pattern does not fit: `"error"` lists all such leaves, `"skip"`
        leaves them dense, and `misfits` says which and why.

    Returns:
      A mask tree: boolean arrays shaped like the weights, False where pruned, and a scalar True for
      leaves that are not pruned. A typed leaf has one mask.

    Raises:
      ValueError: if `sparsity` is outside [0, 1) or above what the pattern allows, `where` selects
        nothing, `scope` is unknown, or the pattern does not fit; then every such path is listed.
        If a score needs statistics that it was not given.
      TypeError: if a selected leaf cannot be pruned.

    Example:
      >>> import jax.numpy as jnp
      >>> from jopt import prune
      >>> params = {"kernel": jnp.array([[1.0, -4.0], [3.0, -2.0]]), "bias": jnp.zeros(2)}
      >>> prune.masks(params, 0.5)["kernel"]
      Array([[False,  True],
             [ True, False]], dtype=bool)
    """
    choice = Choice(pattern, scope, where, sites, unfit, caller="prune.masks")
    choice.check(sparsity, score)
    plan = choice.plan(params, sparsity)
    for part in plan.parts:
        if callable(part.sparsity):
            raise ValueError(
                f"`{choice.caller}(params, <schedule>)` prunes once: `sparsity` is a number. Give "
                "`schedule(step)`; schedules are for `prune.sparsify`."
            )
    weights = plan.selection.weights(params)
    statistics = score.observe(score.init(weights), weights)
    scores = ranked(score, statistics, weights, caller=choice.caller)
    kept = plan.choose(scores, [part.sparsity for part in plan.parts])
    return plan.selection.filled(kept, lambda leaf: jnp.ones((), bool))


def misfits(
    params: PyTree,
    pattern: Pattern,
    *,
    where: trees.Where | None = None,
    sites: Sequence[Site] | None = None,
) -> dict[str, str]:
    """Says which weights a pattern does not fit, and why: what `unfit="skip"` leaves dense.

    Args:
      params: any pytree.
      pattern: which weights may only go together.
      where: the leaves to prune, as of `masks`.
      sites: from `jopt.sites`, as of `masks`.

    Returns:
      The reason by path.

    Example:
      >>> import jax.numpy as jnp
      >>> from jopt import prune
      >>> prune.misfits({"a": jnp.ones((6, 2)), "b": jnp.ones((8, 2))}, prune.NM(2, 4))
      {'a': 'shape (6, 2): 6 inputs (axis -2) are not a multiple of 4'}
    """
    selection = _select.select(params, where, caller="prune.misfits")
    return _select.reasons(selection, pattern, sites)


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


def report(masks: PyTree, *, skipped: Mapping[str, str] | None = None) -> dict[str, Kept]:
    """Counts what each mask keeps, by path.

    Leaves that stay dense (a scalar True) have no entry, except those named in `skipped`.

    Args:
      masks: a mask tree.
      skipped: the reasons from `misfits`, to be reported with the leaves, as 0 of 0 weights.

    Raises:
      TypeError: if a leaf is not of booleans.

    Example:
      >>> import jax.numpy as jnp
      >>> from jopt import prune
      >>> prune.report({"kernel": jnp.array([[True, False]]), "bias": jnp.array(True)})
      {'kernel': Kept(kept=1, total=2, reason='')}
    """
    skipped = skipped or {}
    rows = {}
    for path, mask in trees.items(masks):
        if jnp.result_type(mask) != jnp.bool_:
            raise TypeError(
                f"`prune.report(masks)`: `{path}` is {jnp.result_type(mask)}, and a mask is of "
                "booleans. `prune.masks` makes one, `prune.masks_of` finds those of an optimizer."
            )
        if not is_dense(mask):
            rows[path] = Kept(int(np.count_nonzero(mask)), int(np.size(mask)))
        elif path in skipped:
            rows[path] = Kept(0, 0, skipped[path])  # a scalar does not tell how many there are
    return rows


def is_dense(mask: Any) -> bool:
    """Whether a mask is known to keep all: a scalar True."""
    known = not isinstance(mask, Tracer)
    return known and jnp.ndim(mask) == 0 and bool(mask)


def aligned(masks: PyTree, params: PyTree, *, caller: str) -> list[Any]:
    """The mask of each leaf of `params`, a typed leaf having one; shapes are checked."""
    try:
        full = _spread(masks, params)
    except ValueError as error:
        # Those of `nnx.Optimizer` fit its parameters in all but the kind of their variables.
        if list(map(trees.bare, trees.paths(masks))) != list(map(trees.bare, trees.paths(params))):
            raise ValueError(
                f"`{caller}(...)`: the masks have another structure than `params`:\n{error}"
            ) from error
        found = jax.tree.leaves(masks)
    else:
        found = jax.tree.structure(params, is_leaf=trees.is_typed).flatten_up_to(full)
    for (path, leaf), mask in zip(trees.items(params), found, strict=True):
        if is_dense(mask):
            continue
        shape, expected = jnp.shape(mask), jnp.shape(trees.weight_of(leaf))
        if jnp.result_type(mask) != jnp.bool_ or not trees.broadcasts(shape, expected):
            raise ValueError(
                f"`{caller}(...)`: the mask of `{path}` is {jnp.result_type(mask)}{list(shape)}, "
                f"and its weight has shape {list(expected)}. A mask is boolean and broadcasts to "
                "its weight."
            )
    return found


def _spread(masks: PyTree, params: PyTree) -> PyTree:
    """A mask for each leaf; nothing for what `optax.masked` left out, be it a whole subtree."""
    if isinstance(params, optax.MaskedNode):
        return params
    if jax.tree_util.all_leaves([masks]):
        return jax.tree.map(lambda leaf: masks, params, is_leaf=trees.is_typed)
    children, treedef = jax.tree.flatten(masks, is_leaf=lambda node: node is not masks)
    pairs = zip(children, treedef.flatten_up_to(params), strict=True)
    return treedef.unflatten([_spread(mask, below) for mask, below in pairs])
