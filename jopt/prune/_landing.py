"""Updates that land on zeros, and an optimizer inside that never sees what is pruned."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jopt import trees

from . import _bits, _packed
from ._packed import Words
from ._select import Selection

PyTree = Any


def needed(params: PyTree | None, caller: str) -> PyTree:
    """The parameters, or an error that asks for them."""
    if params is None:
        raise ValueError(
            f"`{caller}(...)` acts on weights: call `update(updates, state, params)` with `params`."
        )
    return params


def wrapped(inner: Any, caller: str) -> optax.GradientTransformationExtraArgs:
    """The optimizer inside, which takes any arguments, or an error that says what was given."""
    if not (hasattr(inner, "init") and hasattr(inner, "update")):
        raise TypeError(
            f"`{caller}(..., inner={inner!r})` expects a gradient transformation, such as "
            "`optax.adam(1e-3)`."
        )
    return optax.with_extra_args_support(inner)


def pruned(words: Words, selection: Selection) -> list[jax.Array]:
    """Booleans from bits, shaped like the chosen weights."""
    weights = selection.chosen_weights
    found = _packed.unpack_all(words, [jnp.shape(weight) for weight in weights])
    return [_bits.placed(mask, weight) for mask, weight in zip(found, weights, strict=True)]


def check(updates: PyTree, selection: Selection, *, caller: str) -> None:
    """Raises unless the updates of the chosen weights are shaped like them."""
    rows = zip(
        selection.chosen_paths, selection.among(updates), selection.chosen_weights, strict=True
    )
    for path, leaf, weight in rows:
        if leaf is None:
            raise ValueError(f"`{caller}(...)`: the updates have none for `{path}`, a weight.")
        shape, expected = jnp.shape(trees.weight_of(leaf)), jnp.shape(weight)
        if shape != expected:
            raise ValueError(
                f"`{caller}(...)`: the update of `{path}` has shape {list(shape)}, and the weight "
                f"{list(expected)}."
            )


def landed(updates: PyTree, gone: Sequence[jax.Array], selection: Selection) -> PyTree:
    """Updates that bring pruned weights to zero exactly."""
    found = []
    leaves = selection.treedef.flatten_up_to(updates)
    own = iter(zip(gone, selection.chosen_weights, strict=True))
    for leaf, mine in zip(leaves, selection.chosen, strict=True):
        if mine:
            zero, weight = next(own)
            update = trees.weight_of(leaf)
            dtype = update.dtype
            if dtype != weight.dtype:
                # One that holds the weight exactly, or the sum would miss zero.
                dtype = np.promote_types(np.promote_types(dtype, np.float32), weight.dtype)
            # Both signs at once, as an update's ends in a factor that has one, and a compiler adds
            # what is left by subtracting it: one operation less for each weight than `-weight`.
            update = -jnp.where(zero, weight.astype(dtype), -update.astype(dtype))
            leaf = trees.with_weight(leaf, update)
        found.append(leaf)
    return selection.treedef.unflatten(found)


def zeroed(tree: PyTree, gone: Sequence[jax.Array], selection: Selection) -> PyTree:
    """A tree of the parameters' structure with zeros where weights are pruned."""
    found, own = [], iter(gone)
    leaves = selection.treedef.flatten_up_to(tree)
    for leaf, mine in zip(leaves, selection.chosen, strict=True):
        if mine:
            array = trees.weight_of(leaf)
            leaf = trees.with_weight(leaf, jnp.where(next(own), jnp.zeros_like(array), array))
        found.append(leaf)
    return selection.treedef.unflatten(found)


def forgotten(
    tx: optax.GradientTransformation,
    state: PyTree,
    params: PyTree,
    gone: Sequence[jax.Array],
    selection: Selection,
) -> PyTree:
    """An optimizer's state with what it starts from where weights are pruned: zeros, mostly.

    `params` are zero there already.

    Whatever is shaped like a weight counts: moments, traces, averages, the other sequence of
    `schedule_free`; also with axes before it, as a history has. Factored statistics stay.
    """
    found, own = [], iter(gone)
    for leaf, mine in zip(selection.leaves, selection.chosen, strict=True):
        none = jax.tree.map(lambda x: np.zeros((), bool), leaf)
        found.append(trees.with_weight(none, next(own)) if mine else none)

    starts: list[Any] = []

    def forget(kept: Any, zero: Any) -> Any:
        fresh: Any = next(first, None)
        zero = trees.weight_of(zero)
        if _is_masked(kept) or not jnp.ndim(zero):
            return kept
        if not jnp.issubdtype(jnp.result_type(kept), jnp.inexact):
            return kept
        tail = jnp.shape(kept)[max(jnp.ndim(kept) - jnp.ndim(zero), 0) :]
        if tail != jnp.shape(zero):
            return kept
        shape = (1,) * (jnp.ndim(kept) - jnp.ndim(zero)) + jnp.shape(zero)
        if jnp.shape(fresh) != jnp.shape(kept):
            fresh = jnp.zeros_like(kept)
        return jnp.where(zero.reshape(shape), fresh.astype(kept.dtype), kept)

    marks = selection.treedef.unflatten(found)
    try:
        start = _start(tx, params)
        if jax.tree.structure(start) == jax.tree.structure(state):
            optax.tree_utils.tree_map_params(tx, starts.append, start, is_leaf=_is_masked)
        first = iter(starts)
        return optax.tree_utils.tree_map_params(tx, forget, state, marks, is_leaf=_is_masked)
    except ValueError as error:
        raise ValueError(
            "`optax.tree_map_params` cannot tell which parts of this optimizer's state belong to "
            "which weights, so moments of pruned weights cannot be reset. In place of `inner=` put "
            f"`prune.sparsify` or `prune.hold` behind it, in `optax.chain`.\n{error}"
        ) from error


def stepped(
    tx: optax.GradientTransformationExtraArgs,
    grads: PyTree,
    state: PyTree,
    params: PyTree,
    gone: Sequence[jax.Array],
    selection: Selection,
    extra_args: dict[str, Any],
) -> tuple[PyTree, PyTree]:
    """A step of the optimizer inside, as if pruned weights were not there.

    Their gradients and they themselves are zero to it, and their moments as at the start. So
    clipping and trust ratios are of what is left, a NaN in a pruned weight's gradient does not
    spread, and a weight that comes back starts from zero with fresh moments.
    """
    params = zeroed(params, gone, selection)
    state = forgotten(tx, state, params, gone, selection)
    return tx.update(zeroed(grads, gone, selection), state, params, **extra_args)


def _start(tx: optax.GradientTransformation, params: PyTree) -> PyTree:
    try:
        return tx.init(params)
    except jax.errors.ConcretizationTypeError:  # it looks at values
        return None


def _is_masked(node: Any) -> bool:
    return isinstance(node, optax.MaskedNode)
