"""Scopes and policies: how much of which leaf goes.

A scope turns one sparsity into one for each leaf, or ranks all leaves together; a policy gives
paths sparsities of their own. Numbers known in Python stay float64; traced ones are float32.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from jopt import schedules, trees
from jopt.trace import Site

from . import _wide
from ._select import Selection

SCOPES = ("global", "layer", "uniform", "erk")
Level = jax.typing.ArrayLike | optax.Schedule
Policy = Sequence[tuple[trees.Where, Level | None]]


class Part(NamedTuple):
    """Leaves that one sparsity is for."""

    members: tuple[int, ...]  # places among the chosen leaves
    sparsity: Any  # a number, an array or a schedule


def is_policy(sparsity: Any) -> bool:
    """Whether a sparsity is a list of pairs rather than one number or schedule."""
    return isinstance(sparsity, list | tuple)


def allowed(sparsity: Any, share: float, *, caller: str, of: str) -> None:
    """Raises if a sparsity, or one in a policy, is out of range, as far as that is known."""
    if is_policy(sparsity):
        for row in sparsity:
            if not isinstance(row, list | tuple) or len(row) != 2:
                raise TypeError(
                    f"`{caller}(...)`: a policy of sparsities is a list of `(where, sparsity)`, "
                    f"such as `[('**/attention/**', 0.5), ('**', 0.9)]`. It holds {row!r}."
                )
            if row[1] is not None:
                allowed(row[1], share, caller=caller, of=of)
        return
    if callable(sparsity) or isinstance(sparsity, Tracer):
        return
    if isinstance(sparsity, str | bytes | bool) or not hasattr(sparsity, "__float__"):
        raise TypeError(
            f"`{caller}(sparsity={sparsity!r})` expects a number, the fraction of weights to "
            "prune, in [0, 1), or a policy, a list of `(where, fraction)`."
        )
    if jnp.ndim(sparsity) != 0 or not 0 <= float(sparsity) < 1:
        raise ValueError(
            f"`{caller}(sparsity={sparsity})` expects the fraction of weights to prune, in [0, 1)."
        )
    if float(sparsity) > share * (1 + 1e-6):
        raise ValueError(
            f"`{caller}(sparsity={sparsity}, pattern={of})`: the pattern prunes at most "
            f"a fraction of {share:.6g}."
        )


def at(sparsity: Any, step: jax.Array, *, caller: str) -> Any:
    """A number, or what a schedule gives at this step: a number, as far as that is known."""
    if not callable(sparsity):
        return sparsity
    value: Any = sparsity(step)
    if not (schedules.is_number(value) and (isinstance(value, Tracer) or value == value)):
        raise ValueError(
            f"`{caller}(<schedule>)`: a schedule gives the fraction of weights to prune at a step, "
            f"one number in [0, 1); it gave {value!r}."
        )
    return value


def governed(selection: Selection, sparsity: Any, *, caller: str) -> Selection:
    """The selection without the leaves that a policy leaves dense."""
    if not is_policy(sparsity):
        return selection
    rows = _rows(selection, sparsity, caller=caller)
    rest = iter(rows)
    chosen = [mine and next(rest) is not None for mine in selection.chosen]
    if not any(chosen):
        raise ValueError(f"`{caller}(...)`: the policy of sparsities leaves all weights dense.")
    return selection._replace(chosen=chosen)


def parts(selection: Selection, sparsity: Any, *, caller: str) -> list[Part]:
    """The chosen leaves (of a governed selection) by the sparsity that is for them."""
    if not is_policy(sparsity):
        return [Part(tuple(range(sum(selection.chosen))), sparsity)]
    rows = _rows(selection, sparsity, caller=caller)
    found = [
        Part(tuple(i for i, row in enumerate(rows) if row == r), level)
        for r, (_, level) in enumerate(sparsity)
    ]
    return [part for part in found if part.members]


def ends(
    selection: Selection, scope: str, sites: Sequence[Site] | None, *, caller: str
) -> tuple[bool, ...]:
    """Which chosen weights the scope keeps dense: under `"uniform"`, the first and the last used.

    Raises:
      ValueError: if `sites` does not tell the order of use.
    """
    paths = selection.chosen_paths
    if scope != "uniform":
        return (False,) * len(paths)
    used = [site.path for site in sites or () if site.path in paths]
    if not used:
        raise ValueError(
            f'`{caller}(..., scope="uniform")` keeps the first and the last layer dense, and the '
            "order of a tree's leaves is not that of their use: pass "
            "`sites=jopt.sites(apply, params, *inputs)`."
            + (" The given `sites` hold no product of a chosen weight." if sites else "")
        )
    return tuple(path in (used[0], used[-1]) for path in paths)


def layers(selection: Selection, sites: Sequence[Site] | None) -> list[tuple[int, ...]]:
    """The shape of one layer of each chosen weight, where `sites` shows that layers are stacked."""
    found = []
    for path, weight in zip(selection.chosen_paths, selection.chosen_weights, strict=True):
        shape = tuple(jnp.shape(weight))
        for site in sites or ():
            for use in site.uses:
                own = site.shapes[use.operand]
                if use.path == path and 1 < len(own) < len(shape) and shape[-len(own) :] == own:
                    shape = own
        found.append(shape)
    return found


def fractions(
    sparsity: Any,
    scope: str,
    shapes: Sequence[tuple[int, ...]],
    dense: Sequence[bool],
    sizes: Sequence[int] | None = None,
) -> list[Any]:
    """The sparsity of each leaf: Python floats, or float32 scalars if `sparsity` is traced.

    `shapes` are of one layer, `sizes` of the whole leaves.
    """
    if scope == "erk":
        return _erk(sparsity, shapes, sizes or [math.prod(shape) for shape in shapes])
    none = 0.0 if not isinstance(sparsity, Tracer) else jnp.zeros((), jnp.float32)
    one = sparsity if isinstance(sparsity, Tracer) else float(sparsity)
    return [none if mine else one for mine in dense]


def counts(
    levels: Sequence[Any], share: float, sizes: Sequence[int], *, down: bool = False
) -> _wide.Wide:
    """How many of so many units go: `round(level / share * size)`, half to even, or rounded down.

    Rounded down a traced count is exact up to 2**24 only, which is enough for coarse units.
    """
    if any(isinstance(level, Tracer) for level in levels):
        traced = jnp.stack([jnp.asarray(level).astype(jnp.float32) for level in levels])
        part = jnp.clip(traced / np.float32(share), 0.0, 1.0)
        if down:
            whole = jnp.floor(part * np.asarray(sizes, np.float32) + np.float32(1e-3))
            return _wide.widen(whole.astype(jnp.uint32))
        return _wide.shares(part, sizes)
    to_whole = (lambda x: math.floor(x + 1e-3)) if down else round
    exact = [
        to_whole(min(max(float(level) / share, 0.0), 1.0) * size)
        for level, size in zip(levels, sizes, strict=True)
    ]
    return _wide.wide(exact)


# Helpers, in order of use.


def _rows(selection: Selection, policy: Policy, *, caller: str) -> list[int | None]:
    """For each chosen leaf the first row that names it; `None` if that is none, or says `None`."""
    leaves = [x for x, mine in zip(selection.leaves, selection.chosen, strict=True) if mine]
    tree = selection.treedef.unflatten(selection.leaves)
    for where, _ in policy:
        trees.select(tree, where, caller=caller)  # a row that matches no leaf is an error
    found: list[int | None] = []
    for path, leaf in zip(selection.chosen_paths, leaves, strict=True):
        named = (r for r, (where, _) in enumerate(policy) if trees.matches(where, path, leaf))
        row = next(named, None)
        found.append(None if row is None or policy[row][1] is None else row)
    return found


def _erk(sparsity: Any, shapes: Sequence[tuple[int, ...]], wholes: Sequence[int]) -> list[Any]:
    """Erdős–Rényi-Kernel: density eps · Σ dims / Π dims, with what exceeds 1 given to the rest.

    Leaves in the order of their raw densities; were the first j dense, the rest would share what is
    left with one eps. The right j is the first at which nobody in the rest exceeds 1.
    """
    if not all(wholes):  # leaves without weights have nothing to share
        rows = [(shape, size) for shape, size in zip(shapes, wholes, strict=True) if size]
        found = iter(_erk(sparsity, *zip(*rows, strict=True)) if rows else [])
        return [next(found) if size else 0.0 for size in wholes]
    raw = np.array([sum(shape) / math.prod(shape) for shape in shapes], np.float64)
    sizes = np.array(wholes, np.float64)
    sums = raw * sizes
    order = np.argsort(-raw, kind="stable")
    filled = np.concatenate([[0.0], np.cumsum(sizes[order])[:-1]])
    spread = np.cumsum(sums[order][::-1])[::-1]
    if not isinstance(sparsity, Tracer):
        eps = ((1 - float(sparsity)) * sizes.sum() - filled) / spread
        first = int(np.argmax(eps * raw[order] <= 1 + 1e-12))
        return [float(level) for level in 1 - np.minimum(eps[first] * raw, 1)]
    # The sums are of the order of the model's size: divided by it, float32 has digits to spare.
    total, small = sizes.sum(), np.float32
    kept = 1 - sparsity.astype(jnp.float32)
    eps = (kept - (filled / total).astype(small)) / (spread / total).astype(small)
    first = jnp.argmax(eps * raw[order].astype(small) <= small(1 + 1e-6))
    levels = 1 - jnp.minimum(eps[first] * raw.astype(small), small(1))
    return [levels[i] for i in range(len(shapes))]
