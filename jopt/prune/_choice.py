"""The choice of what goes: pattern, scope and policy applied to scores."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer

from jopt import trees
from jopt.trace import Site

from . import _bits, _scopes, _select, _threshold
from . import _wide as wide
from ._patterns import Pattern, Unstructured
from ._scopes import Part
from ._scores import Score, magnitude
from ._select import Selection
from ._wide import Wide

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
    stacked: bool = False  # whether leaves of one shape may be put into one array to be ranked

    def choose(self, scores: Sequence[jax.Array], levels: Sequence[Any]) -> list[jax.Array]:
        """The masks, given scores and the sparsity of each part."""
        kept: dict[int, jax.Array] = {}
        for part, level in zip(self.parts, levels, strict=True):
            own = [scores[i] for i in part.members]
            kept.update(zip(part.members, self._part(own, level, part), strict=True))
        return [kept[i] for i in range(len(scores))]

    def levels(self, sparsity: Any, part: Part) -> list[Any]:
        """The sparsity of each leaf of a part; not for the scope `"global"`."""
        shapes = [self.shapes[i] for i in part.members]
        dense = [self.dense[i] for i in part.members]
        sizes = [self.selection.chosen_weights[i].size for i in part.members]
        return _scopes.fractions(sparsity, self.scope, shapes, dense, sizes)

    def _part(self, scores: list[jax.Array], level: Any, part: Part) -> list[jax.Array]:
        axes = [self.axes[i] for i in part.members]
        gone: list[jax.Array] | None = None
        for pattern, reached in self.pattern.steps:
            if gone is not None:
                pairs = zip(gone, scores, strict=True)
                scores = [jnp.where(g, -jnp.inf, _floats(s)) for g, s in pairs]
            own = level * reached if reached != 1 else level
            levels = [own] if self.scope == "global" else self.levels(own, part)
            options = {"down": reached < 1, "settles": gone is not None and reached == 1}
            kept = _chosen(
                scores, levels, pattern, axes, self.scope, stacked=self.stacked, **options
            )
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
        plan = Plan(
            selection, axes, parts, dense, shapes, self.pattern, self.scope, stacked=self.pooled
        )
        self._check_levels(plan)
        if self.pooled:
            self._check_places(selection)
        return plan

    def _check_places(self, selection: Selection) -> None:
        """Raises if masks in one array cannot lie where the weights do."""
        pairs = zip(selection.chosen_paths, selection.chosen_weights, strict=True)
        apart = [
            f"  `{path}`: {jax.typeof(weight).sharding.spec}"
            for path, weight in pairs
            if any(_bits.devices_along(weight, axis) > 1 for axis in range(jnp.ndim(weight)))
        ]
        if apart:
            raise ValueError(
                f"`{self.caller}(..., pooled=True)` has all masks in one array, and a mesh of "
                "explicit axes shares out these weights. Without it each mask lies where its "
                "weight does:\n" + "\n".join(apart)
            )

    def _check_levels(self, plan: Plan) -> None:
        """Raises if the scope asks more of a leaf than the pattern prunes, where that is known."""
        share = self.pattern.share
        known = [
            p for p in plan.parts if not (callable(p.sparsity) or isinstance(p.sparsity, Tracer))
        ]
        if self.scope == "global" or share == 1 or not known:
            return
        rows = zip(plan.selection.chosen_paths, plan.selection.chosen_weights, strict=True)
        paths, weights = zip(*rows, strict=True)
        over = []
        for part in known:
            for i, level in zip(part.members, plan.levels(part.sparsity, part), strict=True):
                if weights[i].size and level > share * (1 + 1e-6):
                    over.append(f"  `{paths[i]}`: {level:.6g}")
        if over:
            raise ValueError(
                f'`{self.caller}(..., pattern={self.pattern}, scope="{self.scope}")`: the pattern '
                f"prunes at most a fraction of {share:.6g}, and the scope asks more of {len(over)} "
                f"of {len(paths)} weights:\n" + "\n".join(over) + "\nLower `sparsity`, or take "
                '`scope="layer"` (each leaf alike) or `"global"`.'
            )


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
            f"{_typed(scores)} for {_typed(weights)}."
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
    stacked: bool,
    down: bool,
    settles: bool,
) -> list[jax.Array]:
    """The masks by one pattern; `settles`: the last of several, after what the others took."""
    units = [pattern.units(score, axis) for score, axis in zip(scores, axes, strict=True)]
    sizes = [unit.size for unit in units]
    together = scope == "global"
    if settles and pattern.share < 1:
        lowest = _rest(scores, units, levels, pattern.share, together=together, stacked=stacked)
    else:
        wholes = [sum(sizes)] if together else sizes
        lowest = _scopes.counts(levels, pattern.share, wholes, down=down)
    units = _threshold.common(units)
    kept = _threshold.keep(units, lowest, together=together, stacked=stacked)
    triples = zip(kept, scores, axes, strict=True)
    return [pattern.spread(mask, score, axis) for mask, score, axis in triples]


def _rest(
    scores: list[jax.Array],
    units: list[jax.Array],
    levels: list[Any],
    share: float,
    *,
    together: bool,
    stacked: bool,
) -> Wide:
    """How many units go, those gone already first, for all to lose what the levels ask for.

    A unit that is gone has lost all of its weights, and one that goes now a share of them.
    """

    def counted(arrays: list[jax.Array]) -> Wide:
        each = _threshold.counts([jnp.isneginf(array) for array in arrays], stacked=stacked)
        return jax.tree.map(lambda x: x[None], wide.total(each)) if together else wide.widen(each)

    def sizes(arrays: list[jax.Array]) -> list[int]:
        each = [array.size for array in arrays]
        return [sum(each)] if together else each

    members = next((s.size // u.size for s, u in zip(scores, units, strict=True) if u.size), 1)
    lost = round(share * members)
    wanted = _scopes.counts(levels, 1.0, sizes(scores))
    left = wide.remainder(wanted, counted(scores))
    more = wide.quotient(wide.add(left, wide.wide_like(left, lost // 2)), lost)
    return wide.minimum(wide.add(counted(units), more), wide.wide(sizes(units)))


def _typed(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda x: f"{jnp.result_type(x)}{list(jnp.shape(x))}", tree)


def _floats(scores: jax.Array) -> jax.Array:
    return scores.astype(jnp.promote_types(scores.dtype, jnp.float32))
