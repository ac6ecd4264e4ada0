"""Which leaves are pruned, what array is pruned in each, and along which axis its inputs lie."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jopt import trees
from jopt.trace import Site

from ._patterns import Pattern

PyTree = Any

_WINDOW = "no axis of it is of the input features alone, as the convolution at {} reads it"


class Selection(NamedTuple):
    """The leaves of a tree, those that are pruned among them."""

    paths: tuple[str, ...]  # of all leaves, a typed leaf being one
    leaves: list[Any]
    chosen: list[bool]
    treedef: Any

    def among(self, tree: PyTree) -> list[Any]:
        """The leaves of `tree` at the chosen places; it has the structure of the selected tree."""
        leaves = self.treedef.flatten_up_to(tree)
        return [leaf for leaf, mine in zip(leaves, self.chosen, strict=True) if mine]

    def filled(self, chosen: Sequence[Any], other: Callable[[Any], Any]) -> PyTree:
        """A tree with `chosen` at the chosen places and `other(leaf)` elsewhere."""
        rest = iter(chosen)
        pairs = zip(self.leaves, self.chosen, strict=True)
        filled = [next(rest) if mine else other(leaf) for leaf, mine in pairs]
        return self.treedef.unflatten(filled)

    def weights(self, tree: PyTree) -> PyTree:
        """The arrays at the chosen places, `optax.MaskedNode` elsewhere: what scores are given."""
        chosen = [trees.weight_of(leaf) for leaf in self.among(tree)]
        return self.filled(chosen, lambda leaf: optax.MaskedNode())

    @property
    def chosen_weights(self) -> list[Any]:
        """The arrays that are pruned."""
        pairs = zip(self.leaves, self.chosen, strict=True)
        return [trees.weight_of(leaf) for leaf, mine in pairs if mine]

    @property
    def chosen_paths(self) -> list[str]:
        """The paths of the chosen leaves."""
        return [path for path, mine in zip(self.paths, self.chosen, strict=True) if mine]


def select(params: PyTree, where: trees.Where | None, *, caller: str) -> Selection:
    """Finds the leaves that `where` names, by default those of two axes and more.

    Raises:
      ValueError: if it names none.
      TypeError: if it names a leaf that holds no weight to prune.
    """
    marks = trees.select(params, _matrices if where is None else where, caller=caller)
    items = trees.items(params)
    chosen = jax.tree.leaves(marks)
    for (path, leaf), mine in zip(items, chosen, strict=True):
        if mine and not _prunable(leaf):
            raise TypeError(
                f"`{caller}(...)` cannot prune `{path}`, {_describe(leaf)}: it takes arrays of "
                "floats, and typed leaves that train. Choose leaves with `where=`; prune before "
                "quantizing."
            )
    return selection_of(params, chosen)


def selection_of(params: PyTree, chosen: list[bool]) -> Selection:
    """The selection of the leaves marked in `chosen`, which is in the order of `trees.items`."""
    items = trees.items(params)
    treedef = jax.tree.structure(params, is_leaf=trees.is_typed)
    return Selection(tuple(p for p, _ in items), [leaf for _, leaf in items], chosen, treedef)


def fitted(
    selection: Selection,
    pattern: Pattern,
    sites: Sequence[Site] | None,
    *,
    caller: str,
    skip: bool = False,
) -> tuple[Selection, list[int]]:
    """The axis of each chosen weight that its products sum over, counted from the end.

    With `skip` the selection is left without the weights that do not fit.

    Raises:
      ValueError: if `sites` does not tell an axis, or the pattern does not fit a weight; names all
        of them. With `skip`, if nothing fits.
    """
    axes, found = _fits(selection, pattern, sites)
    wrong = {i: reason for i, reason in enumerate(found) if reason}
    if wrong and not (skip and len(wrong) < len(axes)):
        paths = selection.chosen_paths
        advice = (
            "Nothing would be pruned: choose another pattern. "
            if skip
            else "Leave them out with `where=`, choose another pattern, or leave them dense with "
            '`unfit="skip"` (`prune.misfits` says which). '
        )
        raise ValueError(
            f"`{caller}(..., pattern={pattern})` does not fit {len(wrong)} of {len(axes)} "
            + "weights:\n"
            + "\n".join(f"  `{paths[i]}`: {reason}" for i, reason in wrong.items())
            + f"\n{advice}"
            + "`sites=jopt.sites(apply, params, *inputs)` says along which axis the inputs lie."
        )
    if wrong:
        places = [place for place, mine in enumerate(selection.chosen) if mine]
        out = {places[i] for i in wrong}
        chosen = [mine and i not in out for i, mine in enumerate(selection.chosen)]
        selection = selection._replace(chosen=chosen)
    return selection, [axis for i, axis in enumerate(axes) if i not in wrong]


def reasons(selection: Selection, pattern: Pattern, sites: Sequence[Site] | None) -> dict[str, str]:
    """Why the pattern does not fit, by the path of each weight that it does not fit."""
    found = _fits(selection, pattern, sites)[1]
    pairs = zip(selection.chosen_paths, found, strict=True)
    return {path: reason for path, reason in pairs if reason}


def summed(sites: Sequence[Site], path: str) -> tuple[int, str | None]:
    """The axis along which groups of inputs lie, or why it cannot be said."""
    found = set()
    for site in sites:
        for use in site.uses:
            if use.path != path or use.indexed:
                continue
            if not use.contracted:
                return -2, f"`{site.operation}` at {site.source} sums over parts of its axes"
            if site.operation == "conv_general_dilated":
                # The features, not the window.
                if not use.features:
                    return -2, _WINDOW.format(site.source)
                found.add(max(use.features))
            else:
                found.add(max(use.contracted))
    if len(found) > 1:
        return -2, f"its products sum over different axes: {sorted(found)}"
    return (found.pop(), None) if found else (-2, "no product in `sites` has it as its weight")


# Helpers, in order of use.


def _fits(
    selection: Selection, pattern: Pattern, sites: Sequence[Site] | None
) -> tuple[list[int], list[str | None]]:
    axes, found = [], []
    for path, weight in zip(selection.chosen_paths, selection.chosen_weights, strict=True):
        axis, reason = -2, None
        if pattern.along_inputs and sites is not None:
            axis, reason = summed(sites, path)
        axes.append(axis)
        found.append(reason or pattern.misfit(jnp.shape(weight), axis))
    return axes, found


def _matrices(path: str, leaf: Any) -> bool:
    return _prunable(leaf) and jnp.ndim(trees.weight_of(leaf)) >= 2


def _prunable(leaf: Any) -> bool:
    if trees.is_typed(leaf) and not hasattr(leaf, "with_weight"):
        return False
    weight = trees.weight_of(leaf)
    dtype = getattr(weight, "dtype", None)
    if dtype is None or dtype == jnp.float8_e8m0fnu:  # powers of two, none of which is zero
        return False
    return jnp.issubdtype(dtype, jnp.inexact) and jnp.ndim(weight) > 0


def _describe(leaf: Any) -> str:
    if trees.is_typed(leaf):
        return f"a typed leaf {type(leaf).__name__}"
    kind = "an array" if isinstance(leaf, jax.Array) else f"a {type(leaf).__name__}"
    return f"{kind} of dtype {getattr(leaf, 'dtype', type(leaf).__name__)}"
