"""Eight booleans to a byte, and back, each weight along one of its own axes."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec


def packed_axis(shape: tuple[int, ...]) -> int:
    """The axis to pack, from the end: of those that take the fewest bytes, the best to divide.

    That is one whose words the most devices can share, counted in powers of two; of equal ones the
    largest, then the first.
    """
    whole = math.prod(shape)
    axes = [axis for axis in range(-len(shape), 0) if shape[axis]]
    words = {axis: -(-shape[axis] // 8) for axis in axes}
    return min(
        axes,
        key=lambda axis: (
            whole // shape[axis] * words[axis],
            -twos(words[axis]),
            -shape[axis],
            axis,
        ),
        default=-1 if shape else 0,
    )


def twos(number: int) -> int:
    """The largest power of two that divides a positive number."""
    return number & -number


def devices_along(array: jax.Array, axis: int) -> int:
    """How many devices share an axis, where the type says so: 1 under a mesh of `Auto` axes."""
    place = jax.typeof(array).sharding
    names = place.spec[axis] if len(place.spec) == array.ndim else None
    names = () if names is None else names if isinstance(names, tuple) else (names,)
    return math.prod(place.mesh.shape[name] for name in names)


def whole(array: jax.Array, axis: int, length: int) -> jax.Array:
    """Gathers an axis that a mesh of `Explicit` axes shares out in parts of runs of a length."""
    devices = devices_along(array, axis)
    if devices == 1 or not array.shape[axis] % (length * devices):
        return array
    place = jax.typeof(array).sharding
    spec = list(place.spec)
    spec[axis] = None
    return jax.sharding.reshard(array, NamedSharding(place.mesh, PartitionSpec(*spec)))


def placed(array: jax.Array, like: jax.Array) -> jax.Array:
    """Undoes `whole`: where a mesh of `Explicit` axes has the other array of this shape."""
    axes = range(like.ndim)
    if all(devices_along(array, axis) == devices_along(like, axis) for axis in axes):
        return array
    if not (isinstance(array, Tracer) or isinstance(like, Tracer)):
        return jax.device_put(array, like.sharding)  # `reshard` would need the mesh around it
    return jax.sharding.reshard(array, jax.typeof(like).sharding)


def eights(array: jax.Array, axis: int) -> jax.Array:
    """[..., n, ...] to [..., n / 8, 8, ...]; `axis`, from the end, is then inside an eight."""
    at = array.ndim + axis
    shape = array.shape
    return array.reshape(*shape[:at], shape[at] // 8, 8, *shape[at + 1 :])


def by_shape(arrays: Sequence[jax.Array]) -> dict[tuple[int, ...], list[int]]:
    """The places of the arrays of each shape."""
    found: dict[tuple[int, ...], list[int]] = {}
    for place, array in enumerate(arrays):
        found.setdefault(array.shape, []).append(place)
    return found


def pack(pruned: jax.Array, axis: int | None = None) -> jax.Array:
    """Eight booleans to a byte, along `packed_axis`, the first in the lowest bit; padded.

    Where a mesh of `Explicit` axes shares that axis out in parts that are no whole bytes, it is
    gathered first.
    """
    axis = packed_axis(pruned.shape) if axis is None else axis
    pruned = whole(pruned, axis, 8)
    if rest := -pruned.shape[axis] % 8:
        at = axis + pruned.ndim
        pruned = jnp.pad(pruned, [(0, rest if i == at else 0) for i in range(pruned.ndim)])
    bits = eights(pruned, axis)
    return jnp.sum(bits.astype(jnp.uint8) << _places(bits.ndim, axis), axis=axis, dtype=jnp.uint8)


def unpack(words: jax.Array, axis: int, size: int) -> jax.Array:
    """The booleans again."""
    # Axes stay in their order (`jnp.unpackbits` moves one to the end and back), or XLA would lay
    # the words out that way, and what fuses with this would read them with strides.
    at = axis + words.ndim
    bits = jnp.expand_dims(words, at + 1) >> _places(words.ndim + 1, axis)
    shape = (*words.shape[:at], words.shape[at] * 8, *words.shape[at + 1 :])
    return jax.lax.slice_in_dim((bits & 1).astype(bool).reshape(shape), 0, size, axis=at)


def _places(ndim: int, axis: int) -> np.ndarray:
    """The numbers of a byte's bits, along one axis, counted from the end."""
    return np.arange(8, dtype=np.uint8).reshape([8 if i == ndim + axis else 1 for i in range(ndim)])
