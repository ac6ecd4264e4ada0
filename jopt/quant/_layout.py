"""Which axes of a weight share a scale, and arrays that are coarser than the weight they belong to.

Scales, zero points and activation ranges have the rank of their weight. Along each axis they have
the weight's size, or 1 (shared), or the number of groups of consecutive entries. Axes count from
the end, so that scan and vmap may slice leading ones.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp


def contracted(ndim: int) -> tuple[int, ...]:
    """The axes that a product sums over, if the layout is `[..., in, out]`.

    Up to rank 3 that is the axis before the last, so that stacked matrices `[layers, in, out]` keep
    their own scales; from rank 4 it is a convolution kernel `[*window, in, out]`: all axes but the
    last.
    """
    if ndim == 1:
        return (-1,)
    return (-2,) if ndim <= 3 else tuple(range(-ndim, -1))


def shared_axes(
    granularity: str, ndim: int, contract: tuple[int, ...] | None = None, stacked: int | None = None
) -> tuple[int, ...]:
    """The axes along which one scale serves all values, counted from the end.

    Args:
      granularity: `"channel"`, `"tensor"` or `"group"` (whose groups lie along the axis returned).
      ndim: rank of the weight.
      contract: axes that products sum over. Default: `contracted(ndim)`.
      stacked: how many leading axes count layers. Default: one for rank 3, none for other ranks.
    """
    if contract is None:
        contract = contracted(ndim)
    if granularity == "group":
        return (max(contract),)
    if granularity == "channel":
        return contract
    if stacked is None:
        stacked = 1 if ndim == 3 else 0
    return tuple(range(stacked - ndim, 0))


def grouped(x: jax.Array, axes: Sequence[int], size: int) -> tuple[jax.Array, tuple[int, ...]]:
    """Splits the last of `axes` into groups of `size`; returns the axis inside a group as well."""
    axis = max(axes) % x.ndim
    if x.shape[axis] % size:
        raise ValueError(
            f"group_size={size} does not divide the {x.shape[axis]} inputs of a weight of shape "
            f"{x.shape} (axis {axis - x.ndim})."
        )
    shape = (*x.shape[:axis], x.shape[axis] // size, size, *x.shape[axis + 1 :])
    return x.reshape(shape), (axis + 1,)


def spread(coarse: jax.Array, shape: Sequence[int]) -> jax.Array:
    """Repeats groups, so that `coarse` broadcasts against `shape`; shared axes stay 1."""
    for axis, size in enumerate(shape):
        if coarse.shape[axis] not in (1, size):
            coarse = jnp.repeat(coarse, size // coarse.shape[axis], axis=axis)
    return coarse


def full_along(coarse: jax.Array, shape: Sequence[int], axes: Sequence[int]) -> jax.Array:
    """Repeats `coarse` to the whole size of `shape` along `axes`."""
    for axis in axes:
        if coarse.shape[axis] != shape[axis]:
            coarse = jnp.repeat(coarse, shape[axis] // coarse.shape[axis], axis=axis)
    return coarse


def shared_along(coarse: jax.Array | None, axes: Sequence[int]) -> bool:
    """Whether `coarse` is the same along `axes`."""
    return coarse is None or all(coarse.shape[axis] == 1 for axis in axes)
