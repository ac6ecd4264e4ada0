"""Pruning layer by layer on data: each weight as the layers before it, pruned already, meet it."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jopt import trees
from jopt.trace import Measure, Site, Stop, staged, target_of
from jopt.trace.stops import stacked

from . import _scopes, _select
from ._choice import MAGNITUDE, Choice
from ._patterns import NM, Pattern, Unstructured
from ._scopes import Policy

PyTree = Any

_FAINT = 1e-20  # what an input that was always zero counts for, beside 1


class Aim(NamedTuple):
    """What one weight shall lose."""

    sparsity: float
    axis: int  # along which its groups of inputs lie, counted from the end


def layer_by_layer(
    apply: Callable[..., Any],
    params: PyTree,
    batches: Iterable[Any],
    paths: Iterable[str],
    measure: Measure,
    settle: Callable[[Stop], Any],
    *,
    found: Sequence[Site],
    caller: str,
) -> PyTree:
    """The parameters with what `settle(stop)` makes of each layer of the weights at `paths`.

    That is an array like the layer's weight, or a typed leaf that stands for one.

    Raises:
      ValueError: if the function does not meet a weight as it is, or a statistic is not finite.
    """
    paths = list(paths)
    unknown = {path: why for path in paths if isinstance(why := target_of(path, found), str)}
    _check_met(unknown, caller)
    parts: dict[str, dict[tuple[int, ...], Any]] = {path: {} for path in paths}

    def visit(stop: Stop) -> jax.Array:
        if not all(bool(jnp.all(jnp.isfinite(stat))) for stat in jax.tree.leaves(stop.stats)):
            raise ValueError(
                f"`{caller}(...)`: the activations that meet `{name_of(stop)}` have a NaN or an "
                "infinity, or the sum of their squares is beyond float32 (3e38).\nCheck the "
                "batches, and the parameters before it; scale down activations above 1e18."
            )
        new = settle(stop)
        parts[stop.path][stop.index] = new
        return new.materialise() if trees.is_typed(new) else new

    _, missed = staged(apply, params, batches, paths, measure, visit, caller=caller)
    _check_met(missed, caller)
    return trees.map_with_path(
        lambda path, leaf: stacked(parts[path]) if path in parts else leaf, params
    )


def listed(params: PyTree, batches: Iterable[Any], caller: str) -> list[tuple[Any, ...]]:
    """The batches as tuples of inputs.

    Raises:
      ValueError: if there is none, or one holds no rows.
      TypeError: under `jit`.
    """
    inputs = [batch if isinstance(batch, tuple) else (batch,) for batch in batches]
    if not inputs:
        raise ValueError(f"`{caller}(apply, params, batches, ...)` got no batch.")
    if any(isinstance(array, Tracer) for array in jax.tree.leaves((params, inputs))):
        raise TypeError(
            f"`{caller}(apply, params, batches, ...)` looks at values, layer by layer: call it "
            "outside `jit`. What it runs is compiled anyway."
        )
    for number, batch in enumerate(inputs):
        shapes = [jnp.shape(array) for array in jax.tree.leaves(batch) if jnp.ndim(array)]
        if shapes and not any(map(math.prod, shapes)):
            raise ValueError(
                f"`{caller}(apply, params, batches, ...)`: batch {number} holds no rows, "
                f"{', '.join(str(list(shape)) for shape in shapes)}: there is nothing to measure."
            )
    return inputs


def aims(
    params: PyTree,
    found: Sequence[Site],
    sparsity: float | Policy,
    pattern: Pattern,
    scope: str,
    where: trees.Where | None,
    unfit: str,
    *,
    caller: str,
) -> dict[str, Aim]:
    """What each chosen weight shall lose, in the order of the tree.

    Raises:
      ValueError, TypeError: as `prune.masks` does, and for what is not done layer by layer.
    """
    if scope == "global":
        raise ValueError(
            f'`{caller}(..., scope="global")`: layers are pruned one after another, so how much of '
            'each must be settled by "layer", "uniform" or "erk", or by a policy of sparsities.'
        )
    if isinstance(pattern, Pattern) and not isinstance(pattern, Unstructured | NM):
        raise ValueError(
            f"`{caller}(..., pattern={pattern})` takes `Unstructured()` and `NM(n, m)`; for other "
            "patterns find masks and then `prune.reconstruct(apply, params, batches, masks)`."
        )
    fed = {use.path for site in found for use in site.uses if use.contracted}
    choice = Choice(pattern, scope, where or (lambda path, leaf: path in fed), found, unfit, caller)
    choice.check(sparsity, MAGNITUDE)
    plan = choice.plan(params, sparsity)
    check_plain(plan.selection, caller)
    levels: dict[int, float] = {}
    for part in plan.parts:
        if callable(part.sparsity):
            raise ValueError(f"`{caller}(...)` prunes once: `sparsity` is a number, no schedule.")
        shapes = [plan.shapes[i] for i in part.members]
        dense = [plan.dense[i] for i in part.members]
        sizes = [plan.selection.chosen_weights[i].size for i in part.members]
        fractions = _scopes.fractions(part.sparsity, scope, shapes, dense, sizes)
        levels.update(zip(part.members, fractions, strict=True))
    rows = zip(plan.selection.chosen_paths, plan.axes, strict=True)
    wanted = {path: Aim(float(levels[i]), axis) for i, (path, axis) in enumerate(rows)}
    for path, aim in wanted.items():
        if isinstance(pattern, NM) and aim.sparsity and abs(aim.sparsity - pattern.share) > 1e-6:
            raise ValueError(
                f"`{caller}(..., pattern={pattern})` prunes `{path}` to exactly {pattern.share:.6g}"
                f", and was asked for {aim.sparsity:.6g}."
            )
    return {path: aim for path, aim in wanted.items() if aim.sparsity > 0}


def check_plain(selection: _select.Selection, caller: str) -> None:
    """Raises if a chosen leaf is no plain array."""
    for path, leaf in zip(selection.paths, selection.leaves, strict=True):
        if path in selection.chosen_paths and trees.is_typed(leaf):
            raise TypeError(
                f"`{caller}(...)` changes weights, and `{path}` is a `{type(leaf).__name__}`: "
                "prune before quantizing, or choose leaves with `where=`."
            )


def in_groups(stop: Stop, axis: int) -> np.ndarray:
    """The order of the inputs of `stop.matrices()` in which those along `axis` are consecutive."""
    along = sorted(axis % stop.weight.ndim for axis in stop.target.contracted)
    numbers = np.arange(np.prod([stop.weight.shape[a] for a in along]), dtype=np.int32)
    shaped = numbers.reshape([stop.weight.shape[a] for a in along])
    place = axis % stop.weight.ndim
    return np.moveaxis(shaped, along.index(place), -1).reshape(-1) if place in along else numbers


def lifted(sizes: jax.Array) -> jax.Array:
    """Sizes of inputs, with next to nothing for those that were always zero.

    So their weights go first, and among themselves by magnitude.
    """
    mean = jnp.mean(sizes, axis=-1, keepdims=True)
    return jnp.where(sizes > 0, sizes, _FAINT * jnp.where(mean > 0, mean, 1.0))


def name_of(stop: Stop) -> str:
    """The path, and the number of the layer."""
    return "/".join([stop.path, *map(str, stop.index)])


def _check_met(missed: Mapping[str, str], caller: str) -> None:
    if missed:
        raise ValueError(
            f"`{caller}(...)` cannot tell what {len(missed)} of the chosen weights meet:\n"
            + "\n".join(f"  `{path}`: {why}" for path, why in missed.items())
            + "\nLeave them out with `where=`."
        )
