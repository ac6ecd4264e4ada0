"""GPTQ: inputs are rounded one after another, and what is left makes good the error so far."""

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jopt.trace.layered import coarse_map

from .._formats.base import Format, Grid
from .layerwise import EXACT, Rounded, checked, fitted, known, nearest, over_layers, sound

_PANEL = 16  # rows rounded between two products within a block
_STAGES = 4  # products grow with the rows done; so many sizes of them are compiled

_cut, _put = jax.lax.dynamic_slice_in_dim, jax.lax.dynamic_update_slice_in_dim
# `begin(block, rows, target, feedback, state)`: the grid of each of its rows, and a new state.
Begin = Callable[..., tuple[Callable[[Any], Grid], Any]]


def gptq(
    weight: jax.Array,
    hessian: jax.Array,
    format: Format,
    *,
    damping: float = 0.01,
    order: bool = False,
    block: int = 128,
) -> Rounded:
    """Rounds a weight so that the outputs of its layer change little, by second-order information.

    Inputs i are rounded in turn. With H = Σ x xᵀ over the layer's inputs, damped, and H = R Rᵀ, R
    upper triangular, the error of the outputs is Σ_i ‖(Rᵀ D)_i‖², D = weight - rounded, and row i
    of it depends on the first i rows of D alone. Each step makes its own row as small as it can:

        target_i  = weight_i + Σ_{j<i} (R_ji / R_ii) D_j
        rounded_i = nearest(target_i),  D_i = weight_i - rounded_i

    These are the codes of the paper in exact arithmetic, which updates the rows to come by the
    Cholesky factor of H⁻¹ instead; here nothing is inverted, and float32 suffices. The sums run in
    blocks as products of matrices.

    Scales are fitted to the weight beforehand; those of a group, unless `order`, when the group is
    reached, to what its weights would have to be by then. A Hessian of zeros rounds to nearest,
    and so does an input that was always zero (the authors set such weights to zero, although later
    data may use them).

    Args:
      weight: `[..., in, out]`; each matrix of leading axes is a layer of its own.
      hessian: `[..., in, in]`, or `[in, in]` for all; need not be normalized.
      format: any format; its codes are chosen as the nearest ones whatever its `rounding`.
      damping: added to the diagonal, as a part of its mean.
      order: take the inputs by falling diagonal of H. The layout of the codes stays as it was.
      block: rows whose errors are held back until they go into one product. Groups without `order`
        are blocks themselves.

    Returns:
      Codes and grid, of which `format.decode(codes, grid)` is the new weight. Where the damped
      Hessian is not positive definite, which tracing cannot see, scales are NaN.

    Raises:
      TypeError: if the weight or the Hessian is not floating, or the format is none.
      ValueError: if shapes do not fit, a group does not divide, the Hessian is not finite, or its
        damped form is not positive definite.

    Example:
      >>> import jax.numpy as jnp
      >>> from jopt.quant import Int, gptq
      >>> hessian = jnp.eye(3) + 9.0  # what the rows add up to matters most
      >>> gptq(jnp.array([[0.45], [0.45], [1.0]]), hessian, Int(2)).codes[:, 0]
      Array([0, 1, 1], dtype=int4)

    References:
      Elias Frantar et al., GPTQ: accurate post-training quantization for generative pre-trained
      transformers, 2022, arXiv:2210.17323. Jiale Chen et al., The geometry of LLM quantization:
      GPTQ as Babai's nearest plane algorithm, 2025, arXiv:2507.18553 (the form without an inverse).
    """
    weight, hessian, format = checked("gptq", weight, hessian, format)
    if damping < 0 or block < 1:
        raise ValueError(f"`gptq(damping={damping}, block={block})`: at least 0, and at least 1.")
    result, fine = _layers(weight, hessian, damping, format=format, order=order, block=block)
    if known(result.codes) and not bool(jnp.all(fine)):
        raise ValueError(
            f"`gptq(...)`: the Hessian with damping={damping} is not positive definite in float32. "
            "Raise `damping`, or calibrate on more data."
        )
    return result


# One matrix.


@functools.partial(jax.jit, static_argnames=("format", "order", "block"))
def _layers(weight: jax.Array, hessian: jax.Array, damping: Any, **options: Any) -> Any:
    def matrix(weight: jax.Array, hessian: jax.Array) -> Any:
        return _matrix(weight.astype(jnp.float32), hessian, damping, **options)

    return over_layers(matrix, weight, (hessian, 2))


def _matrix(
    weight: jax.Array, hessian: jax.Array, damping: Any, format: Format, order: bool, block: int
) -> tuple[Rounded, jax.Array]:
    """Codes and grid, and whether the Hessian was positive definite."""
    hessian, rows = damped(hessian, damping), jnp.arange(weight.shape[0])
    if order:
        rows = jnp.argsort(-jnp.diagonal(hessian))
        hessian = hessian[rows][:, rows]
    feedback, rounding = _feedback(hessian), nearest(format)
    if format.group_size is not None and not order:
        grid, errors = _by_groups(weight, feedback, rounding)
    else:
        grid = fitted(format, weight)
        errors = _on_grid(weight[rows] if order else weight, feedback, rounding, grid, rows, block)
    # The grid's values are far apart beside float32's precision: encoding finds them again.
    errors = jnp.zeros_like(errors).at[rows].set(errors) if order else errors
    codes = rounding.encode(weight - errors, grid).astype(format.container)
    fine = jnp.all(jnp.isfinite(feedback))
    return Rounded(codes, sound(grid, fine)), fine


def damped(hessian: jax.Array, damping: Any) -> jax.Array:
    """H with a part of its mean diagonal added to it; inputs that are always zero get the mean."""
    diagonal = jnp.diagonal(hessian)
    mean = jnp.mean(diagonal)
    mean = jnp.where(mean > 0, mean, 1.0)
    extra = jnp.where(diagonal == 0, mean, damping * mean)
    return hessian + jnp.diag(extra)


def _feedback(hessian: jax.Array) -> jax.Array:
    """Row i: how the errors of rows before i enter its target, R_ji / R_ii; NaN if H is unfit."""
    # The lower factor of H read backwards, read backwards, is the upper factor R.
    factor = jax.lax.linalg.cholesky(jnp.flip(hessian), symmetrize_input=False)
    transposed = jnp.flip(factor).T
    return jnp.tril(transposed, -1) / jnp.diagonal(transposed)[:, None]


def _on_grid(
    weight: jax.Array, feedback: jax.Array, format: Format, grid: Grid, rows: jax.Array, block: int
) -> jax.Array:
    """The errors on a grid that is given; row i of the weight has row `rows[i]` of the grid."""
    inputs = weight.shape[0]
    block = min(-(-block // _PANEL) * _PANEL, -(-inputs // _PANEL) * _PANEL)
    more = -inputs % block

    def begin(number: Any, weights: Any, target: Any, inner: Any, state: Any) -> Any:
        def grid_of(row: Any) -> Grid:
            at = rows[jnp.minimum(number * block + row, inputs - 1)]
            return coarse_map(lambda coarse: _row(coarse, at, inputs), grid)

        return grid_of, state

    weight = jnp.pad(weight, ((0, more), (0, 0)))
    feedback = jnp.pad(feedback, ((0, more), (0, more)))
    return _sweep(weight, feedback, format, block, begin, ())[0][:inputs]


def _row(coarse: jax.Array, at: Any, inputs: int) -> jax.Array:
    return coarse if coarse.shape[0] == 1 else _cut(coarse, at // (inputs // coarse.shape[0]), 1, 0)


def _by_groups(weight: jax.Array, feedback: jax.Array, format: Format) -> tuple[Grid, jax.Array]:
    """The grid and the errors, each group's scales fitted to its targets; groups are the blocks."""
    assert format.group_size is not None

    def begin(number: Any, rows: jax.Array, target: Any, inner: jax.Array, grids: Grid) -> Any:
        # What the rows would become if none were rounded any more: errors that cancel those before.
        cancelling = jax.lax.linalg.triangular_solve(
            inner, rows - target, left_side=True, lower=True, unit_diagonal=True
        )
        grid = fitted(format, rows - cancelling)
        grids = jax.tree.map(lambda all, one: _put(all, one, number, 0), grids, grid)
        return lambda row: grid, grids

    errors, grids = _sweep(
        weight, feedback, format, format.group_size, begin, fitted(format, weight)
    )
    return grids, errors


# The sweep over rows: blocks, panels within a block, rows within a panel. What rows before a block
# (a panel) add to its targets is one product; only a panel's own errors go row by row.


def _sweep(
    weight: jax.Array, feedback: jax.Array, format: Format, block: int, begin: Begin, state: Any
) -> tuple[jax.Array, Any]:
    """The errors of all rows, and the last state."""

    def step(limit: int, number: Any, carry: Any) -> Any:
        errors, state = carry
        start = number * block
        before = jax.lax.dynamic_slice(feedback, (start, 0), (block, limit))
        inner = jax.lax.dynamic_slice(feedback, (start, start), (block, block))
        rows = _cut(weight, start, block)
        target = rows + jnp.dot(before, errors[:limit], precision=EXACT)
        grid_of, state = begin(number, rows, target, inner, state)
        return _put(errors, _block(rows, target, inner, format, grid_of), start, 0), state

    blocks = weight.shape[0] // block
    stages = min(_STAGES, blocks)
    ends = [blocks * k // stages for k in range(stages + 1)]
    carry = (jnp.zeros_like(weight), state)
    for first, last in itertools.pairwise(ends):
        carry = jax.lax.fori_loop(first, last, functools.partial(step, last * block), carry)
    return carry


def _block(
    rows: jax.Array, target: jax.Array, feedback: jax.Array, format: Format, grid_of: Any
) -> jax.Array:
    """The errors of one block, whose targets know of all rows before it."""
    size = rows.shape[0]
    panel = math.gcd(size, _PANEL)

    def step(number: Any, errors: jax.Array) -> jax.Array:
        start = number * panel
        before = _cut(feedback, start, panel)
        targets = _cut(target, start, panel) + jnp.dot(before, errors, precision=EXACT)
        inner, weights = _cut(before, start, panel, 1), _cut(rows, start, panel)

        def row(i: Any, errors: jax.Array) -> jax.Array:
            value = _cut(targets, i, 1) + jnp.dot(_cut(inner, i, 1), errors, precision=EXACT)
            grid = grid_of(start + i)
            rounded = format.decode(format.encode(value, grid), grid)
            return _put(errors, _cut(weights, i, 1) - rounded, i, 0)

        own = jax.lax.fori_loop(0, panel, row, jnp.zeros_like(weights))
        return _put(errors, own, start, 0)

    return jax.lax.fori_loop(0, size // panel, step, jnp.zeros_like(rows))
