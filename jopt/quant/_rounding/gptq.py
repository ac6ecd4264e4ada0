"""GPTQ: inputs are rounded one after another, and what is left makes good the error so far."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from jopt.trace.layered import coarse_map, coarse_row
from jopt.trace.sweep import damped, feedback_of, sweep

from .._formats.base import Format, Grid
from .layerwise import Rounded, checked, fitted, known, nearest, over_layers, sound

_PANEL = 16  # rows rounded between two products within a block


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
    Cholesky factor of H⁻¹ instead.

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
    (feedback, _), rounding = feedback_of(hessian), nearest(format)
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


def _on_grid(
    weight: jax.Array, feedback: jax.Array, format: Format, grid: Grid, rows: jax.Array, block: int
) -> jax.Array:
    """The errors on a grid that is given; row i of the weight has row `rows[i]` of the grid."""
    inputs = weight.shape[0]
    block = min(-(-block // _PANEL) * _PANEL, -(-inputs // _PANEL) * _PANEL)
    more = -inputs % block

    def begin(number: Any, current: Any, state: Any) -> Any:
        def enter(start: Any, current: Any) -> Any:
            def settle(i: Any, target: jax.Array) -> jax.Array:
                at = rows[jnp.minimum(number * block + start + i, inputs - 1)]
                return _rounded(
                    target, coarse_map(lambda c: coarse_row(c, at, inputs), grid), format
                )

            return settle

        return enter, state

    weight = jnp.pad(weight, ((0, more), (0, 0)))
    feedback = jnp.pad(feedback, ((0, more), (0, more)))
    return sweep(weight, feedback, begin, (), block=block, panel=_PANEL)[0][:inputs]


def _by_groups(weight: jax.Array, feedback: jax.Array, format: Format) -> tuple[Grid, jax.Array]:
    """The grid and the errors, each group's scales fitted to its targets; groups are the blocks."""
    assert format.group_size is not None

    def begin(number: Any, current: Any, grids: Grid) -> Any:
        grid = fitted(format, current())
        grids = jax.tree.map(
            lambda all, one: jax.lax.dynamic_update_slice_in_dim(all, one, number, 0), grids, grid
        )
        return lambda start, current: lambda i, target: _rounded(target, grid, format), grids

    size = format.group_size
    errors, grids = sweep(
        weight,
        feedback,
        begin,
        fitted(format, weight),
        block=size,
        panel=math.gcd(size, _PANEL),
    )
    return grids, errors


def _rounded(target: jax.Array, grid: Grid, format: Format) -> jax.Array:
    return format.decode(format.encode(target, grid), grid)
