"""What the rounding methods share: the error that a layer's Hessian measures, and their checks."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer

from jopt.trace import reductions
from jopt.trace.sweep import EXACT as EXACT

from .._formats.base import Format, Grid
from .._formats.floats import to_one
from .._formats.layout import shared_axes


class Rounded(NamedTuple):
    """A weight in a format; `format.decode(codes, grid)` is its value."""

    codes: jax.Array  # of the format's container, the shape of the weight
    grid: Grid


def output_error(weight: jax.Array, rounded: jax.Array, hessian: jax.Array) -> jax.Array:
    """The squared error of a layer's outputs on the data behind its Hessian.

    With H = Σ x xᵀ over the inputs x of the layer and D = weight - rounded,

        Σ ‖xᵀ D‖² = tr(Dᵀ H D).

    Args:
      weight: `[..., in, out]`.
      rounded: the same with other values.
      hessian: `[..., in, in]`, or `[in, in]` for all.

    Returns:
      float32 of the leading axes.

    Example:
      >>> import jax.numpy as jnp
      >>> from jopt.quant import output_error
      >>> float(output_error(jnp.ones((2, 3)), jnp.zeros((2, 3)), jnp.eye(2)))
      6.0
    """
    difference = weight.astype(jnp.float32) - rounded.astype(jnp.float32)
    return jnp.sum(by_output(difference, hessian), axis=-1)


# Below: for the methods in this folder.


def by_output(difference: jax.Array, hessian: jax.Array) -> jax.Array:
    """dᵀ H d of each output: float32 `[..., out]`."""
    hessian = hessian.astype(jnp.float32)
    product = jnp.einsum("...ij,...jo->...io", hessian, difference, precision=EXACT)
    return jnp.sum(difference * product, axis=-2)


def checked(
    caller: str, weight: Any, hessian: Any, format: Any
) -> tuple[jax.Array, jax.Array, Format]:
    """The arguments of a method, or an error that says what is wrong with them.

    The Hessian, whose unit matters to no method, is multiplied by a power of two.
    """
    weight, format = checked_weight(caller, weight, format)
    hessian = jnp.asarray(hessian)
    inputs = weight.shape[-2]
    if hessian.shape not in ((inputs, inputs), (*weight.shape[:-2], inputs, inputs)):
        raise ValueError(
            f"`{caller}(weight, hessian, ...)`: a weight {list(weight.shape)} has {inputs} inputs "
            f"(axis -2), so its Hessian is [{inputs}, {inputs}], with or without the leading axes "
            f"of the weight; got {list(hessian.shape)}."
        )
    if not jnp.issubdtype(hessian.dtype, jnp.floating):
        raise TypeError(f"`{caller}(...)`: the Hessian is {hessian.dtype}; make it float32.")
    if known(hessian) and not bool(jnp.all(jnp.isfinite(hessian))):
        raise ValueError(
            f"`{caller}(...)`: the Hessian has a NaN or an infinity. Check the batches that it was "
            "summed over."
        )
    hessian = hessian.astype(jnp.float32)
    largest = reductions.largest(hessian, (-2, -1), keepdims=True)
    return weight, hessian * to_one(largest), format


def checked_weight(caller: str, weight: Any, format: Any) -> tuple[jax.Array, Format]:
    """The weight and the format of a method, or an error that says what is wrong with them."""
    weight = jnp.asarray(weight)
    if not isinstance(format, Format):
        raise TypeError(f"`{caller}(..., {format!r})`: expected a format, such as `Int(4)`.")
    if not jnp.issubdtype(weight.dtype, jnp.floating):
        raise TypeError(f"`{caller}(...)`: the weight is {weight.dtype}; it must be floating.")
    if weight.ndim < 2:
        raise ValueError(
            f"`{caller}(...)`: the weight is `[..., in, out]`, got shape {list(weight.shape)}."
        )
    size = format.group_size
    if size is not None and weight.shape[-2] % size:
        raise ValueError(
            f"`{caller}(...)`: group_size={size} does not divide the {weight.shape[-2]} inputs of "
            f"a weight {list(weight.shape)} (axis -2). Choose a divisor."
        )
    return weight, format


def known(*arrays: Any) -> bool:
    """Whether values can be looked at, because nothing is being traced."""
    return not any(isinstance(array, Tracer) for array in arrays)


def over_layers(
    matrix: Callable[..., Any], weight: jax.Array, *others: tuple[jax.Array, int]
) -> Any:
    """Maps a function of one `[in, out]` weight over leading axes.

    Each other array comes with the rank that belongs to one weight; it may lack leading axes.
    """
    axes = (0, *(0 if array.ndim > rank else None for array, rank in others))
    for _ in range(weight.ndim - 2):
        matrix = jax.vmap(matrix, in_axes=axes)
    return matrix(weight, *(array for array, _ in others))


def adjustable(caller: str, format: Format) -> None:
    """Raises unless the format's grid is that of an interval, which a method may then choose."""
    if format.needs_values:
        raise TypeError(
            f"`{caller}(..., {format})`: {type(format).__name__} fits its values to the weight by "
            "itself; this method needs a format whose grid covers an interval, such as `Int(4)`."
        )


def nearest(format: Format) -> Format:
    """The format, rounding to nearest: methods that choose codes choose among all of them."""
    if format.rounding == "nearest":
        return format
    changed: Any = format
    return dataclasses.replace(changed, rounding="nearest")


def fitted(format: Format, weight: jax.Array) -> Grid:
    """The grid of one `[in, out]` weight."""
    return format.fit(weight, shared_axes(format.granularity, 2, (-2,), 0))


def pooled(values: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Sums `[in, out]` values over what shares one entry of a coarse array of `shape`."""
    rows, columns = shape
    inputs, outputs = values.shape
    if not values.size:
        return jnp.zeros(shape, values.dtype)
    split = values.reshape(rows, inputs // rows, columns, outputs // columns)
    return jnp.sum(split, axis=(1, 3))


def sound(grid: Grid, fine: jax.Array) -> Grid:
    """The grid, or one of NaN where a method came to nothing, so that the trouble shows."""
    return grid._replace(scale=jnp.where(fine, grid.scale, jnp.full_like(grid.scale, jnp.nan)))
