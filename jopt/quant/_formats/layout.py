"""Which axes of a weight share a scale, counted from the end; and groups of consecutive inputs."""

from collections.abc import Sequence

import jax

from .placed import parts, whole


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
      granularity: `"channel"`, `"tensor"`, `"token"` (an activation's last axis) or `"group"`,
        whose groups lie along the axis returned.
      ndim: rank of the weight.
      contract: axes that products sum over. Default: `contracted(ndim)`.
      stacked: how many leading axes count layers. Default: one for rank 3, none for other ranks.
    """
    if contract is None:
        contract = contracted(ndim)
    if granularity == "group":
        return (max(contract),)
    if granularity == "token":
        return (-1,)
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
    if x.shape[axis] // size % parts(x, axis):
        x = whole(x, [axis])  # else a group would lie on several devices
    shape = (*x.shape[:axis], x.shape[axis] // size, size, *x.shape[axis + 1 :])
    return x.reshape(shape), (axis + 1,)
