"""Proximal steps: updates that end on the minimizer of a penalty near where they led. LAST.

    w ← prox(w + u),   prox(z) = argmin_x ‖x - z‖² / 2 + η · strength · penalty(x)

with η the learning rate of the step. So thresholds shrink as the learning rate does, and the
penalty is the one of the loss that gradient descent lowers. With an adaptive optimizer it is the
penalty in the plain metric, not in that of its second moments.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jopt import schedules, trees

from ._regularize import Level, RegularizeState, checked, level, regularizer, wide

PyTree = Any


def proximal_l1(
    strength: Level, learning_rate: Level, *, where: trees.Where | None = None
) -> optax.GradientTransformation:
    """Lands on exact zeros: soft thresholding after each step, the proximal step of `Σ |w|`.

        w ← sign(z) · max(|z| - η · strength, 0),   z = w + u

    Args:
      strength: 0 or more, or a schedule of the step.
      learning_rate: η, a number or the optimizer's own schedule.
      where: the leaves; by default those with two axes or more.

    Returns:
      A gradient transformation with state `RegularizeState`, to stand last in the chain.

    Raises:
      ValueError: if a number is negative, `where` selects nothing, or `update` gets no `params`.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from jopt import optim
      >>> tx = optax.chain(optax.sgd(0.1), optim.proximal_l1(5.0, 0.1))
      >>> params = jnp.array([[2.0, -3.0, 0.25]])
      >>> updates, state = tx.update(jnp.zeros_like(params), tx.init(params), params)
      >>> optax.apply_updates(params, updates)
      Array([[ 1.5, -2.5,  0. ]], dtype=float32)

    References:
      Daubechies, Defrise, De Mol, "An iterative thresholding algorithm for linear inverse problems
      with a sparsity constraint", 2003, arXiv math/0307152.
    """

    def prox(z: jax.Array, threshold: jax.Array) -> jax.Array:
        return jnp.where(jnp.abs(z) <= threshold, 0, z - threshold.astype(z.dtype) * jnp.sign(z))

    return _proximal(prox, strength, learning_rate, where, "proximal_l1")


def proximal_group_lasso(
    strength: Level,
    learning_rate: Level,
    *,
    axis: int = -1,
    where: trees.Where | None = None,
) -> optax.GradientTransformation:
    """Lands on channels of zeros: the proximal step of `Σ √n · ‖w_g‖`, n the size of a group.

        w_g ← z_g · max(1 - η · strength · √n / ‖z_g‖, 0),   z = w + u,   ‖z_g‖² = Σ |z|²

    Args:
      strength: 0 or more, or a schedule of the step.
      learning_rate: η, a number or the optimizer's own schedule.
      axis: all weights at one index of this axis are a group; -1: the outputs of a kernel.
      where: the leaves; by default those with two axes or more.

    Returns:
      A gradient transformation with state `RegularizeState`, to stand last in the chain.

    Raises:
      ValueError: if a number is negative, `where` selects nothing or a leaf without that axis, or
        `update` gets no `params`.

    References:
      Yuan, Lin, "Model selection and estimation in regression with grouped variables", 2006. Wen,
      Wu, Wang, Chen, Li, "Learning Structured Sparsity in Deep Neural Networks", 2016,
      arXiv 1608.03665.
    """

    def check(params: PyTree, chosen: list[bool]) -> None:
        for (path, leaf), mine in zip(trees.items(params), chosen, strict=True):
            shape = jnp.shape(trees.weight_of(leaf)) if mine else ()
            if mine and not -len(shape) <= axis < len(shape):
                raise ValueError(
                    f"`proximal_group_lasso(..., axis={axis})`: `{path}` has shape {list(shape)}. "
                    "Name an axis that it has, or leave it out with `where=`."
                )

    def prox(z: jax.Array, threshold: jax.Array) -> jax.Array:
        if not z.size:
            return z
        others = tuple(i for i in range(z.ndim) if i != axis % z.ndim)
        size = np.float32(np.sqrt(z.size // z.shape[axis]))
        most = jnp.max(jnp.abs(z), axis=others, keepdims=True)
        # Relative to the largest, whose square neither overflows nor vanishes.
        unit = jnp.where((most > 0) & jnp.isfinite(most), most, 1)
        squares = jnp.square(jnp.abs(z) / unit)
        norm = unit * jnp.sqrt(jnp.sum(squares, axis=others, keepdims=True))
        gone = (norm <= threshold * size) & (threshold > 0)
        scale = 1 - threshold * size / jnp.where(norm == 0, 1, norm)
        return jnp.where(gone, 0, z * scale.astype(z.dtype))

    caller = "proximal_group_lasso"
    return _proximal(prox, strength, learning_rate, where, caller, check=check)


def proximal_nuclear_norm(
    strength: Level,
    learning_rate: Level,
    *,
    every: int = 1,
    where: trees.Where | None = None,
) -> optax.GradientTransformation:
    """Lowers the rank of matrices: soft thresholding of their singular values.

        w ← U · max(S - η · strength, 0) · Vᵀ,   z = w + u = U S Vᵀ

    Matrices are the last two axes; axes before them are many matrices. A decomposition at each step
    is dear, so `every` may space them out, each with the sum of the thresholds since the last.

    Args:
      strength: 0 or more, or a schedule of the step.
      learning_rate: η, a number or the optimizer's own schedule.
      every: steps between two decompositions, at least 1.
      where: the leaves; by default those with two axes or more.

    Returns:
      A gradient transformation with state `RegularizeState`, to stand last in the chain.

    Raises:
      ValueError: if a number is out of its range, `where` selects nothing, or `update` gets no
        `params`.

    References:
      Cai, Candès, Shen, "A Singular Value Thresholding Algorithm for Matrix Completion", 2008,
      arXiv 0810.3286.
    """
    if not schedules.whole_steps(every):
        raise ValueError(
            f"`proximal_nuclear_norm(..., every={every})` expects a number of steps, at least 1."
        )

    def check(params: PyTree, chosen: list[bool]) -> None:
        for (path, leaf), mine in zip(trees.items(params), chosen, strict=True):
            shape = jnp.shape(trees.weight_of(leaf))
            if mine and len(shape) < 2:
                raise ValueError(
                    f"`proximal_nuclear_norm(...)`: `{path}` has shape {list(shape)}, which is no "
                    "matrix. Leave it out with `where=`."
                )

    def prox(z: jax.Array, threshold: jax.Array) -> jax.Array:
        left, values, right = jnp.linalg.svd(z, full_matrices=False)
        values = jnp.maximum(values - threshold, 0)
        return (left * jnp.expand_dims(values, -2).astype(left.dtype)) @ right

    caller = "proximal_nuclear_norm"
    return _proximal(prox, strength, learning_rate, where, caller, every=every, check=check)


# Helpers, in order of use.


def _proximal(
    prox: Callable[[jax.Array, jax.Array], jax.Array],
    strength: Level,
    learning_rate: Level,
    where: trees.Where | None,
    caller: str,
    *,
    every: int = 1,
    check: Callable[[PyTree, list[bool]], None] = lambda params, chosen: None,
) -> optax.GradientTransformation:
    checked(strength, "strength", caller=caller)
    checked(learning_rate, "learning_rate", caller=caller)

    def threshold_of(state: RegularizeState) -> jax.Array:
        """That of this step, with those put off before."""
        own = level(strength, state.step) * level(learning_rate, state.step)
        return own if every == 1 else jnp.asarray(state.owed) + own

    def due(state: RegularizeState) -> jax.Array:
        # The last of every so many steps, so that none is without its threshold at the end.
        return (state.step + 1) % every == 0

    def owe(state: RegularizeState) -> jax.Array:
        return jnp.where(due(state), jnp.float32(0), threshold_of(state))

    def change(update: jax.Array, weight: jax.Array, state: Any, path: str) -> jax.Array:
        threshold = threshold_of(state)
        # A dtype that holds the weight exactly, or the sum would miss zero.
        dtype = update.dtype
        if dtype != weight.dtype:
            dtype = np.promote_types(np.promote_types(dtype, np.float32), weight.dtype)

        def landed() -> jax.Array:
            now, move = wide(weight), wide(update)
            kind = np.promote_types(now.dtype, move.dtype)
            now = now.astype(kind)
            real = jnp.finfo(kind).dtype  # of complex weights, that of their sizes
            there = prox(now + move.astype(kind), threshold.astype(real))
            return jnp.where(there == 0, -now, there - now).astype(dtype)

        if every == 1:
            return landed()
        return jax.lax.cond(due(state), landed, lambda: update.astype(dtype))

    later = None if every == 1 else owe
    return regularizer(change, where, caller=caller, check=check, owe=later)
