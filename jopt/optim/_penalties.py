"""Penalties: their gradients, added to those of the loss. FIRST in the chain."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

from jopt import schedules, trees

from ._regularize import Level, checked, level, regularizer, wide

PyTree = Any


def l1_penalty(
    strength: Level, *, where: trees.Where | None = None
) -> optax.GradientTransformation:
    """Adds the gradient of `strength · Σ |w|`, which is `strength · sign(w)`.

    Weights come near zero and swing about it; `proximal_l1` lands on it.

    Args:
      strength: 0 or more, or a schedule of the step.
      where: the leaves; by default those with two axes or more.

    Returns:
      A gradient transformation with state `RegularizeState`, to stand before the optimizer.

    Raises:
      ValueError: if `strength` is negative, `where` selects nothing, or `update` gets no `params`.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from jopt import optim
      >>> tx = optax.chain(optim.l1_penalty(0.5), optax.sgd(1.0))
      >>> params = jnp.array([[2.0, -3.0, 0.0]])
      >>> tx.update(jnp.zeros_like(params), tx.init(params), params)[0]
      Array([[-0.5,  0.5, -0. ]], dtype=float32)
    """
    checked(strength, "strength", caller="l1_penalty")

    def change(update: jax.Array, weight: jax.Array, state: Any, path: str) -> jax.Array:
        pull = level(strength, state.step) * jnp.sign(wide(weight))
        return (wide(update) + pull.astype(wide(update).dtype)).astype(update.dtype)

    return regularizer(change, where, caller="l1_penalty")


def l2_penalty(
    strength: Level, *, where: trees.Where | None = None
) -> optax.GradientTransformation:
    """Adds the gradient of `strength / 2 · Σ w²`, which is `strength · w`.

    As `optax.add_decayed_weights`, with leaves chosen by path and a strength that may grow.

    Args:
      strength: 0 or more, or a schedule of the step.
      where: the leaves; by default those with two axes or more.

    Returns:
      A gradient transformation with state `RegularizeState`, to stand before the optimizer.

    Raises:
      ValueError: if `strength` is negative, `where` selects nothing, or `update` gets no `params`.
    """
    checked(strength, "strength", caller="l2_penalty")

    def change(update: jax.Array, weight: jax.Array, state: Any, path: str) -> jax.Array:
        return _decayed(update, weight, level(strength, state.step))

    return regularizer(change, where, caller="l2_penalty")


def growing_l2(
    masks: PyTree, *, delta: float, every: int = 1, limit: float = float("inf")
) -> optax.GradientTransformation:
    """Drives the weights that are to be pruned to zero by an L2 penalty that grows.

        λ(t) = min(delta · ⌊t / every⌋, limit),   g ← g + λ(t) · w where the mask is False

    When they are small, `prune.hold(masks)` or `prune.apply_masks` removes them at little loss.

    Args:
      masks: a mask tree of the structure of the parameters, from `prune.masks`: False is to go; a
        scalar True leaves its leaf alone.
      delta: by how much the penalty grows, above 0.
      every: steps between two increases, at least 1.
      limit: where it stops.

    Returns:
      A gradient transformation with state `RegularizeState`, to stand before the optimizer.

    Raises:
      ValueError: if an option is out of its range, at `init` and `update` if a mask is missing,
        belongs to no parameter, is not boolean or does not broadcast to its weight, and if `update`
        gets no `params`.

    References:
      Wang, Qin, Zhang, Fu, "Neural Pruning via Growing Regularization", 2020, arXiv 2012.09243.
    """
    if not (delta > 0 and schedules.whole_steps(every) and limit > 0):
        raise ValueError(
            f"`growing_l2(..., delta={delta}, every={every}, limit={limit})` expects `delta > 0`, "
            "a number of steps, at least 1, and `limit > 0`."
        )
    rows = {trees.bare(path): mask for path, mask in trees.items(masks)}

    def change(update: jax.Array, weight: jax.Array, state: Any, path: str) -> jax.Array:
        times = (state.step // every).astype(jnp.float32)
        strength = jnp.minimum(jnp.float32(delta) * times, limit)
        decayed = _decayed(update, weight, strength)
        return jnp.where(jnp.broadcast_to(rows[trees.bare(path)], weight.shape), update, decayed)

    def acted(path: str, leaf: Any) -> bool:
        mask = rows.get(trees.bare(path))
        return isinstance(mask, Tracer) or mask is None or jnp.ndim(mask) > 0 or not bool(mask)

    def check(params: PyTree, chosen: list[bool]) -> None:
        _check(rows, params)

    return regularizer(change, acted, caller="growing_l2", check=check)


# Helpers, in order of use.


def _check(masks: dict[str, Any], params: PyTree) -> None:
    """Raises unless each parameter has a mask that fits, and each mask a parameter."""
    if not jax.tree.leaves(params):
        return
    stop = lambda node: trees.is_typed(node) or isinstance(node, optax.MaskedNode)  # noqa: E731
    flat, _ = jax.tree_util.tree_flatten_with_path(params, is_leaf=stop)
    spelled = [
        (trees.bare(jax.tree_util.keystr(path, simple=True, separator="/")), leaf)
        for path, leaf in flat
    ]
    left_out = tuple(path for path, leaf in spelled if isinstance(leaf, optax.MaskedNode))
    found = {path: leaf for path, leaf in spelled if path not in left_out}
    for path, leaf in found.items():
        if path not in masks:
            raise ValueError(
                f"`growing_l2(masks, ...)`: there is no mask for `{path}`; the masks have the "
                "structure of `params`, with a scalar True for leaves to leave alone."
            )
        shape, mask = jnp.shape(trees.weight_of(leaf)), masks[path]
        if jnp.result_type(mask) != jnp.bool_ or not trees.broadcasts(jnp.shape(mask), shape):
            raise ValueError(
                f"`growing_l2(masks, ...)`: the mask of `{path}` is {jnp.result_type(mask)}"
                f"{list(jnp.shape(mask))}, and its weight has shape {list(shape)}. A mask is "
                "boolean and broadcasts to its weight."
            )
    # What `optax.masked` leaves out may be a whole subtree.
    beneath = tuple(f"{path}/" for path in left_out)
    spare = [p for p in masks if p not in found and p not in left_out and not p.startswith(beneath)]
    if spare:
        raise ValueError(
            f"`growing_l2(masks, ...)`: the masks name `{spare[0]}`, and `params` have no such "
            "path. `jopt.trees.paths(params)` lists them all."
        )


def _decayed(update: jax.Array, weight: jax.Array, strength: jax.Array) -> jax.Array:
    pull = strength * wide(weight)
    return (wide(update) + pull.astype(wide(update).dtype)).astype(update.dtype)
