"""Wanda: pruning by weight times activation, nothing updated."""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from jopt import trees
from jopt.trace import Activation, Stop, moments, sites

from . import _threshold, _wide
from ._choice import UNSTRUCTURED
from ._layerwise import aims, in_groups, layer_by_layer, lifted, listed
from ._patterns import NM, Pattern
from ._scopes import Policy

PyTree = Any


def wanda(
    apply: Callable[..., Any],
    params: PyTree,
    batches: Iterable[Any],
    sparsity: float | Policy,
    *,
    pattern: Pattern = UNSTRUCTURED,
    scope: str = "layer",
    where: trees.Where | None = None,
    unfit: str = "error",
) -> PyTree:
    """Prunes after training by what each weight adds to its output on data; the rest stays as is.

        score_ij = |w_ij| · ‖x_i‖,   ‖x_i‖ = √(Σ x_i² over all batches)

    Scores are compared within each output: of its `in` weights exactly `round(sparsity · in)` go,
    or those that lose in their groups under `NM`. The function is run in stages, so that each layer
    is judged on what the pruned ones before it give; stacked layers under `scan` are judged one by
    one. Of equal scores the first go first. Weights that are zero stay zero and count as gone. A
    NaN is kept, to be seen; a product that meets what comes of it is an error. Squares are summed
    in float32: of activations above 1e18 the sum may overflow, which is an error; those below 1e-19
    count as zero.

    Args:
      apply: any function `apply(params, *inputs)`.
      params: its parameters; chosen leaves are plain arrays.
      batches: each a tuple of the inputs, or the one input; all of the same shapes.
      sparsity: the fraction to prune, or a policy of fractions, as of `prune.masks`; for `NM(n, m)`
        it is `1 - n / m`.
      pattern: `Unstructured()` or `NM(n, m)`.
      scope: `"layer"`, `"uniform"` or `"erk"`, as of `prune.masks`.
      where: the leaves to prune; by default those that a product reads as its weight.
      unfit: `"error"` or `"skip"`, as of `prune.masks`.

    Returns:
      `params` with zeros; `jax.tree.map(lambda w: w != 0, ...)` of them are masks for
      `prune.hold`.

    Raises:
      ValueError: as `prune.masks` does, if a batch has no rows, a chosen weight is met by no
        product as it is, or a sum of squares is not finite.
      TypeError: if a chosen leaf is no array of floats, and under `jit`.

    Example:
      >>> import jax.numpy as jnp
      >>> from jopt import prune
      >>> params = {"kernel": jnp.array([[1.0, 2.0], [3.0, 4.0]])}
      >>> apply = lambda params, x: x @ params["kernel"]
      >>> prune.wanda(apply, params, [jnp.array([[9.0, 1.0]])], 0.5)["kernel"]
      Array([[1., 2.],
             [0., 0.]], dtype=float32)

    References:
      Mingjie Sun, Zhuang Liu, Anna Bair, J. Zico Kolter, "A Simple and Effective Pruning Approach
      for Large Language Models", 2023, arXiv 2306.11695.
    """
    caller = "prune.wanda"
    inputs = listed(params, batches, caller)
    found = sites(apply, params, *inputs[0])
    wanted = aims(params, found, sparsity, pattern, scope, where, unfit, caller=caller)

    def settle(stop: Stop) -> jax.Array:
        aim, matrices = wanted[stop.path], stop.matrices()
        order = in_groups(stop, aim.axis)
        lowest = round(aim.sparsity * len(order))
        pruned = _pruned(matrices, stop.stats["square"], order, pattern=pattern, lowest=lowest)
        return stop.restored(pruned)

    return layer_by_layer(
        apply, params, inputs, wanted, _squares, settle, found=found, caller=caller
    )


# Helpers, in order of use.


def _squares(activation: Activation) -> dict[str, Any]:
    return {"square": moments(activation)["square"]}


@functools.partial(jax.jit, static_argnames=("pattern", "lowest"))
def _pruned(
    weight: jax.Array, squares: jax.Array, order: jax.Array, *, pattern: Pattern, lowest: int
) -> jax.Array:
    """`[blocks, in, out]` with zeros, given Σ x² of each input, `[blocks, in]`."""
    scores = jnp.abs(weight.astype(jnp.float32)) * lifted(jnp.sqrt(squares))[..., None]
    if isinstance(pattern, NM):
        scores = scores[:, order]
        none = jnp.zeros_like(scores[:, :: pattern.m], bool)
        kept = jnp.zeros_like(scores, bool).at[:, order].set(pattern.spread(none, scores, -2))
    else:
        count = _wide.wide([lowest])

        def column(own: jax.Array) -> jax.Array:
            return _threshold.keep([own], count, together=False)[0]

        kept = jax.vmap(jax.vmap(column, -1, -1))(scores)
    return jnp.where(kept, weight, jnp.zeros_like(weight))
