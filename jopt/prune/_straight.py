"""Sparse forward passes over dense weights: masks whose gradient passes straight through."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jopt import trees
from jopt.trace import Site

from . import _masks
from ._choice import MAGNITUDE, UNSTRUCTURED
from ._patterns import Pattern
from ._scores import Score

PyTree = Any


def straight_through(params: PyTree, masks: PyTree, *, backward: PyTree | None = None) -> PyTree:
    """Sets pruned weights to zero in the forward pass only; their gradients pass as if kept.

        forward  ŵ = where(mask, w, 0)
        backward ∂L/∂w = ∂L/∂ŵ, where `backward` is True

    Put it into the loss: weights stay dense in training, so that one whose mask is False now may
    win its place back. At the end `apply_masks` makes the zeros real.

    Args:
      params: any pytree.
      masks: a mask tree, as of `apply_masks`.
      backward: a mask tree of the weights that get gradients; `None`: all.

    Returns:
      `params` with zeros where the masks are False.

    Raises:
      ValueError: if a mask does not fit.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jopt import prune
      >>> def loss(w):
      ...   return jnp.sum(prune.straight_through(w, prune.masks(w, 0.5)) ** 2 + w)
      >>> jax.grad(loss)(jnp.array([[1.0, -4.0], [3.0, -2.0]]))
      Array([[ 1., -7.],
             [ 7.,  1.]], dtype=float32)

    References:
      Bengio, Léonard, Courville, "Estimating or Propagating Gradients Through Stochastic Neurons
      for Conditional Computation", 2013, arXiv 1308.3432.
    """
    treedef = jax.tree.structure(params, is_leaf=trees.is_typed)
    leaves = treedef.flatten_up_to(params)
    ahead = _masks.aligned(masks, params, caller="straight_through")
    back: list[Any] = [True] * len(leaves)
    if backward is not None:
        back = _masks.aligned(backward, params, caller="straight_through")
    applied = []
    for leaf, mask, own in zip(leaves, ahead, back, strict=True):
        if not (_masks.is_dense(mask) and _masks.is_dense(own)):
            weight = trees.weight_of(leaf)
            shape = jnp.shape(weight)
            pair = jnp.broadcast_to(mask, shape), jnp.broadcast_to(own, shape)
            leaf = trees.with_weight(leaf, _through(weight, *pair))
        applied.append(leaf)
    return treedef.unflatten(applied)


def top_kast(
    params: PyTree,
    forward: jax.typing.ArrayLike,
    backward: jax.typing.ArrayLike,
    *,
    score: Score = MAGNITUDE,
    pattern: Pattern = UNSTRUCTURED,
    scope: str = "layer",
    where: trees.Where | None = None,
    sites: Sequence[Site] | None = None,
    unfit: str = "error",
) -> tuple[PyTree, jax.Array]:
    """Computes with the weights of set A and learns those of a larger set B, both by magnitude.

    A holds all but the lowest `forward` of the weights, B all but the lowest `backward`:

        forward  ŵ = where(A, w, 0)
        backward ∂L/∂w = where(B, ∂L/∂ŵ, 0)
        penalty  Σ_A w² / 2 + Σ_(B∖A) w² / (2 (1 - forward))

    The penalty, times a small factor, belongs into the loss: it pulls harder at what is not in A,
    which keeps the sets moving. Both sets are chosen anew at each call.

    Args:
      params: any pytree.
      forward: the sparsity of A.
      backward: the sparsity of B, at most `forward`.
      score, pattern, scope, where, sites, unfit: as of `masks`.

    Returns:
      The parameters to compute the loss with, and the penalty, a float32 scalar.

    Raises:
      ValueError: as `masks` does, and if `backward` is above `forward`.

    References:
      Jayakumar, Pascanu, Rae, Osindero, Elsen, "Top-KAST: Top-K Always Sparse Training", 2021,
      arXiv 2106.03517.
    """
    known = not isinstance(forward, Tracer) and not isinstance(backward, Tracer)
    if known and bool(np.asarray(backward) > np.asarray(forward)):
        raise ValueError(
            f"`top_kast(params, {forward}, {backward})`: the backward set holds the forward set, "
            "so `backward` is a sparsity of at most `forward`."
        )
    options: dict[str, Any] = {"score": score, "pattern": pattern, "scope": scope, "where": where}
    options |= {"sites": sites, "unfit": unfit}
    ahead = _masks.masks(params, forward, **options)
    back = _masks.masks(params, backward, **options)
    used = straight_through(params, ahead, backward=back)
    treedef = jax.tree.structure(params, is_leaf=trees.is_typed)
    penalty = jnp.zeros((), jnp.float32)
    rows = (treedef.flatten_up_to(tree) for tree in (params, ahead, back))
    for leaf, a, b in zip(*rows, strict=True):
        if not jnp.ndim(a):  # dense; under `jit` its value is not known
            continue
        squares = trees.weight_of(leaf).astype(jnp.float32) ** 2 / 2
        weigh = jnp.where(a, squares, squares / (1 - jnp.asarray(forward, jnp.float32)))
        penalty += jnp.sum(jnp.where(b, weigh, 0))
    return used, penalty


# Helpers, in order of use.


@jax.custom_jvp
def _through(weight: jax.Array, mask: jax.Array, backward: jax.Array) -> jax.Array:
    return jnp.where(mask, weight, jnp.zeros_like(weight))


@_through.defjvp
def _through_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    weight, mask, backward = primals
    tangent = jnp.where(backward, tangents[0], jnp.zeros_like(tangents[0]))
    return _through(weight, mask, backward), tangent
