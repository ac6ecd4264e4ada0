"""2:4 packed: of every four weights along the inputs two values, and where they were."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from .sparse import Sparse, widened


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["values", "places"], meta_fields=["axis"]
)
@dataclasses.dataclass(frozen=True)
class NM24(Sparse):
    """A 2:4 weight: two values of every four inputs and two bits of place each.

    In float32 68 bits for every four weights in place of 128. Made by `jopt.prune.pack`; use it in
    `jopt.lift(apply)`. A product unpacks the weight and is dense: no platform's sparse units are
    used, so this saves memory and not time. Where fewer than two of four are left, zeros are among
    the values, which a gradient reaches: mask it if they are to stay zero.
    """

    values: jax.Array  # like the weight, half as long along `axis`
    places: jax.Array  # uint8, like the weight, ceil(length / 8) along `axis`: 4 bits a group
    axis: int  # along which groups lie, counted from the end

    arrays: ClassVar[tuple[str, ...]] = ("values", "places")

    @property
    def matrix_ndim(self) -> int:
        """Axes up to the groups'; at least those of a matrix."""
        return max(2, -self.axis)

    def materialise(self) -> jax.Array:
        """The weight: each value selected into its place, zeros elsewhere."""
        values, at = widened(self.values), self.values.ndim + self.axis
        groups = values.shape[at] // 2
        pairs = _divided(values, at, 2)  # [..., groups, 2, ...]
        first, second = (jax.lax.slice_in_dim(pairs, i, i + 1, axis=at + 1) for i in (0, 1))
        bytes = jnp.expand_dims(self.places, at + 1)
        shift = 4 * _iota(bytes, at + 1, 2)
        halves = jax.lax.slice_in_dim(_merged((bytes >> shift) & 15, at), 0, groups, axis=at)
        codes = jnp.expand_dims(halves, at + 1)
        place = _iota(codes, at + 1, 4)
        rest = jnp.where(codes >> 2 == place, second, jnp.zeros_like(second))
        dense = jnp.where(codes & 3 == place, first, rest)
        return _merged(dense, at).astype(self.values.dtype)

    def transposed(self, permutation: Sequence[int]) -> "NM24":
        """Both arrays transposed."""
        values, places = (jax.lax.transpose(a, permutation) for a in (self.values, self.places))
        ndim = len(permutation)
        return NM24(values, places, list(permutation).index(self.axis + ndim) - ndim)


def misfit(weight: np.ndarray, axis: int) -> str | None:
    """Why a weight is not 2:4 along `axis`, if it is not."""
    if weight.ndim < -axis or weight.shape[axis] % 4:
        return f"shape {weight.shape}: axis {axis} does not divide into groups of 4"
    kept = np.count_nonzero(_groups(np.moveaxis(weight, axis, -1)), axis=-1)
    if wrong := int(np.count_nonzero(kept > 2)):
        return (
            f"{wrong} of {kept.size} groups of 4 along axis {axis} have more than 2 weights "
            "that are not zero"
        )
    return None


def packed(weight: np.ndarray, axis: int) -> NM24:
    """Packs a weight that is 2:4 along `axis`."""
    moved = np.moveaxis(weight, axis, -1)
    groups = _groups(moved)
    # Those that are not zero first, each kind in the order of the inputs; of these the first two.
    two = np.sort(np.argsort(groups == 0, axis=-1, kind="stable")[..., :2], axis=-1)
    values = np.take_along_axis(groups, two, axis=-1)
    values = np.where(values == 0, np.zeros_like(values), values)  # +0 for -0
    codes = (two[..., 0] | two[..., 1] << 2).astype(np.uint8)
    codes = np.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, codes.shape[-1] % 2)])
    places = codes[..., 0::2] | codes[..., 1::2] << 4
    values = values.reshape(*moved.shape[:-1], moved.shape[-1] // 2)
    values, places = (jnp.asarray(np.moveaxis(array, -1, axis)) for array in (values, places))
    return NM24(values, places, axis)


# Helpers, in order of use.


def _groups(weight: np.ndarray) -> np.ndarray:
    return weight.reshape(*weight.shape[:-1], weight.shape[-1] // 4, 4)


def _divided(array: jax.Array, at: int, size: int) -> jax.Array:
    """[..., n, ...] to [..., n / size, size, ...]."""
    shape = array.shape
    return array.reshape(*shape[:at], shape[at] // size, size, *shape[at + 1 :])


def _iota(array: jax.Array, axis: int, size: int) -> jax.Array:
    """0 to `size` along `axis`, to broadcast against `array`, of its dtype."""
    shape = [1] * array.ndim
    shape[axis] = size
    return jax.lax.broadcasted_iota(array.dtype, shape, axis)


def _merged(array: jax.Array, at: int) -> jax.Array:
    """Undoes `_divided`."""
    shape = array.shape
    return array.reshape(*shape[:at], shape[at] * shape[at + 1], *shape[at + 2 :])
