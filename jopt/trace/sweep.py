"""The inputs of a layer settled in turn, so that those to come make good the error so far.

What rounding by GPTQ and pruning by SparseGPT share. With H = Σ x xᵀ over the layer's inputs and
H = R Rᵀ, R upper triangular, the error of the outputs is Σ_i ‖(Rᵀ D)_i‖², D = weight - settled, and
row i of it depends on the first i rows of D alone. Settled in turn, each row aims at what makes its
own as small as it can be:

    target_i = weight_i + Σ_{j<i} (R_ji / R_ii) D_j

In exact arithmetic these are the updates by the Cholesky factor of H⁻¹ of both papers; here nothing
is inverted, and float32 suffices. The sums run in blocks and panels as products of matrices.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

EXACT = jax.lax.Precision.HIGHEST  # float32 products on every backend
_STAGES = 4  # products grow with the rows done; so many sizes of them are compiled

_cut, _put = jax.lax.dynamic_slice_in_dim, jax.lax.dynamic_update_slice_in_dim

# What rows would become if none were settled any more, given those that are.
Current = Callable[[], jax.Array]
Settle = Callable[[Any, jax.Array], jax.Array]  # of a row's number in its panel, and its target
Enter = Callable[[Any, Current], Settle]  # of a panel's first row in its block
Begin = Callable[[Any, Current, Any], tuple[Enter, Any]]  # of a block's number, and the state


def damped(hessian: jax.Array, damping: Any) -> jax.Array:
    """H with a part of its mean diagonal added to it; inputs that are always zero get the mean."""
    diagonal = jnp.diagonal(hessian)
    mean = jnp.mean(diagonal)
    mean = jnp.where(mean > 0, mean, 1.0)
    extra = jnp.where(diagonal == 0, mean, damping * mean)
    return hessian + jnp.diag(extra)


def feedback_of(hessian: jax.Array) -> tuple[jax.Array, jax.Array]:
    """R_ji / R_ii for all j < i, how errors enter later targets, and R_ii; NaN if H is unfit."""
    # The lower factor of H read backwards, read backwards, is the upper factor R.
    factor = jax.lax.linalg.cholesky(jnp.flip(hessian), symmetrize_input=False)
    transposed = jnp.flip(factor).T
    diagonal = jnp.diagonal(transposed)
    return jnp.tril(transposed, -1) / diagonal[:, None], diagonal


def sweep(
    weight: jax.Array, feedback: jax.Array, begin: Begin, state: Any, *, block: int, panel: int
) -> tuple[jax.Array, Any]:
    """Settles the rows of a weight in turn.

    Args:
      weight: float32 `[in, out]`.
      feedback: of the damped Hessian.
      begin: is called before each block, `begin(number, current, state) -> (enter, state)`; then
        `enter(start, current)` before each of its panels gives `settle(i, target)`, which is asked
        row by row what becomes of it, `[1, out]`.
      state: a pytree of arrays, handed from block to block.
      block: rows whose errors are held back until they go into one product; divides `in`.
      panel: rows within a block for which the same is done once more; divides `block`.

    Returns:
      The errors, weight - settled, and the last state.
    """

    def step(limit: int, number: Any, carry: Any) -> Any:
        errors, state = carry
        start = number * block
        before = jax.lax.dynamic_slice(feedback, (start, 0), (block, limit))
        inner = jax.lax.dynamic_slice(feedback, (start, start), (block, block))
        rows = _cut(weight, start, block)
        target = rows + jnp.dot(before, errors[:limit], precision=EXACT)
        enter, state = begin(number, functools.partial(_current, rows, target, inner), state)
        return _put(errors, _block(rows, target, inner, enter, panel), start, 0), state

    blocks = weight.shape[0] // block
    stages = min(_STAGES, blocks)
    ends = [blocks * k // stages for k in range(stages + 1)]
    carry = (jnp.zeros_like(weight), state)
    for first, last in itertools.pairwise(ends):
        carry = jax.lax.fori_loop(first, last, functools.partial(step, last * block), carry)
    return carry


# Helpers, in order of use. What rows before a block (a panel) add to its targets is one product;
# only a panel's own errors go row by row.


def _current(rows: jax.Array, target: jax.Array, inner: jax.Array) -> jax.Array:
    """The weights whose errors cancel those of the rows before."""
    cancelling = jax.lax.linalg.triangular_solve(
        inner, rows - target, left_side=True, lower=True, unit_diagonal=True
    )
    return rows - cancelling


def _block(
    rows: jax.Array, target: jax.Array, feedback: jax.Array, enter: Enter, panel: int
) -> jax.Array:
    """The errors of one block, whose targets know of all rows before it."""

    def step(number: Any, errors: jax.Array) -> jax.Array:
        start = number * panel
        before = _cut(feedback, start, panel)
        targets = _cut(target, start, panel) + jnp.dot(before, errors, precision=EXACT)
        inner, weights = _cut(before, start, panel, 1), _cut(rows, start, panel)
        settle = enter(start, functools.partial(_current, weights, targets, inner))

        def row(i: Any, errors: jax.Array) -> jax.Array:
            value = _cut(targets, i, 1) + jnp.dot(_cut(inner, i, 1), errors, precision=EXACT)
            return _put(errors, _cut(weights, i, 1) - settle(i, value), i, 0)

        own = jax.lax.fori_loop(0, panel, row, jnp.zeros_like(weights))
        return _put(errors, own, start, 0)

    return jax.lax.fori_loop(0, rows.shape[0] // panel, step, jnp.zeros_like(rows))
