"""The choice of what goes: pattern, scope and policy applied to scores."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jopt import trees
from jopt.trace import Site

from . import _scopes, _select, _threshold
from ._patterns import Pattern, Unstructured
from ._scopes import Part
from ._scores import Score, magnitude
from ._select import Selection

PyTree = Any
MAGNITUDE = magnitude(1)
UNSTRUCTURED = Unstructured()


class Plan(NamedTuple):
    """What is known of a tree before there are scores."""

    selection: Selection
    axes: list[int]  # of each chosen weight, the axis that its products sum over
    parts: list[Part]
    dense: tuple[bool, ...]  # of each chosen weight, whether its scope leaves it alone
    shapes: list[tuple[int, ...]]  # of one layer of each chosen weight
    pattern: Pattern
    scope: str

    def choose(self, scores: Sequence[jax.Array], levels: Sequence[Any]) -> list[jax.Array]:
        """The masks, given scores and the sparsity of each part."""
        kept: dict[int, jax.Array] = {}
        for part, level in zip(self.parts, levels, strict=True):
            own = [scores[i] for i in part.members]
            kept.update(zip(part.members, self._part(own, level, part.members), strict=True))
        return [kept[i] for i in range(len(scores))]

    def _part(self, scores: list[jax.Array], level: Any, members: Sequence[int]) -> list[jax.Array]:
        axes = [self.axes[i] for i in members]
        dense = [self.dense[i] for i in members]
        shapes = [self.shapes[i] for i in members]
        gone: list[jax.Array] | None = None
        for pattern, reached in self.pattern.steps:
            if gone is not None:
                pairs = zip(gone, scores, strict=True)
                scores = [jnp.where(g, -jnp.inf, _wide(s)) for g, s in pairs]
            part = level * reached if reached != 1 else level
            levels = [part]
            if self.scope != "global":
                sizes = [score.size for score in scores]
                levels = _scopes.fractions(part, self.scope, shapes, dense, sizes)
            kept = _chosen(scores, levels, pattern, axes, self.scope, down=reached < 1)
            lost = [~k for k in kept]
            gone = lost if gone is None else [a | b for a, b in zip(gone, lost, strict=True)]
        assert gone is not None
        return [~g for g in gone]


@dataclasses.dataclass(frozen=True)
class Choice:
    """The options that all of pruning shares."""

    pattern: Pattern
    scope: str
    where: trees.Where | None
    sites: Sequence[Site] | None
    unfit: str
    caller: str
    pooled: bool = False  # whether the state keeps all masks in one array

    def check(self, sparsity: Any, score: Score) -> None:
        """Raises if an option is out of its range, as far as it is known without tracing."""
        caller, pattern = self.caller, self.pattern
        if not isinstance(score, Score):
            raise TypeError(
                f"`{caller}(..., score={score!r})` expects a score such as `prune.magnitude(1)`; "
                "make one of a function with `prune.Score(lambda state, params: ...)`."
            )
        if self.scope not in _scopes.SCOPES:
            raise ValueError(
                f'`{caller}(..., scope={self.scope!r})`: `scope` is "global" (all leaves are '
                'ranked together), "layer" (each leaf loses the same fraction), "uniform" (but '
                'the first and the last layer) or "erk" (small leaves keep more).'
            )
        if self.unfit not in ("error", "skip"):
            raise ValueError(f'`{caller}(..., unfit={self.unfit!r})` expects "error" or "skip".')
        if not isinstance(pattern, Pattern):
            raise TypeError(
                f"`{caller}(..., pattern={pattern!r})` expects a pattern such as "
                "`prune.Unstructured()` or `prune.NM(2, 4)`."
            )
        _scopes.allowed(sparsity, pattern.share, caller=caller, of=str(pattern))

    def plan(self, params: PyTree, sparsity: Any) -> Plan:
        """Finds the leaves, their axes and parts.

        Raises:
          ValueError, TypeError: if `where` or a policy selects nothing, or the pattern does not
            fit.
        """
        caller, sites = self.caller, self.sites
        selection = _select.select(params, self.where, caller=caller)
        selection = _scopes.governed(selection, sparsity, caller=caller)
        skip = self.unfit == "skip"
        selection, axes = _select.fitted(selection, self.pattern, sites, caller=caller, skip=skip)
        dense = _scopes.ends(selection, self.scope, sites, caller=caller)
        parts = _scopes.parts(selection, sparsity, caller=caller)
        shapes = _scopes.layers(selection, sites)
        return Plan(selection, axes, parts, dense, shapes, self.pattern, self.scope)


def ranked(score: Score, state: PyTree, weights: PyTree, *, caller: str) -> list[jax.Array]:
    """The scores of the chosen weights, in order."""
    weights = jax.lax.stop_gradient(weights)
    scores = score.rank(jax.lax.stop_gradient(state), weights)
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


# Helpers, in order of use.


def _chosen(
    scores: list[jax.Array],
    levels: list[Any],
    pattern: Pattern,
    axes: list[int],
    scope: str,
    *,
    down: bool,
) -> list[jax.Array]:
    units = [pattern.units(score, axis) for score, axis in zip(scores, axes, strict=True)]
    sizes = [unit.size for unit in units]
    together = scope == "global"
    lowest = _scopes.counts(levels, pattern.share, [sum(sizes)] if together else sizes, down=down)
    kept = _threshold.keep(_threshold.common(units), lowest, together=together)
    triples = zip(kept, scores, axes, strict=True)
    return [pattern.spread(mask, score, axis) for mask, score, axis in triples]


def _wide(scores: jax.Array) -> jax.Array:
    return scores.astype(jnp.promote_types(scores.dtype, jnp.float32))
