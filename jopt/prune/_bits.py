"""Eight booleans to a byte, and back, each weight along one of its own axes."""

import math

import jax
import jax.numpy as jnp
import numpy as np


def packed_axis(shape: tuple[int, ...]) -> int:
    """The axis to pack, from the end: the largest of those that take the fewest bytes."""
    whole = math.prod(shape)
    axes = [axis for axis in range(-len(shape), 0) if shape[axis]]
    words = {axis: whole // shape[axis] * -(-shape[axis] // 8) for axis in axes}
    return min(axes, key=lambda axis: (words[axis], -shape[axis], axis), default=0)


def eights(array: jax.Array, axis: int) -> jax.Array:
    """[..., n, ...] to [..., n / 8, 8, ...]; `axis`, from the end, is then inside an eight."""
    at = array.ndim + axis
    shape = array.shape
    return array.reshape(*shape[:at], shape[at] // 8, 8, *shape[at + 1 :])


def pack(pruned: jax.Array) -> jax.Array:
    """Eight booleans to a byte, along `packed_axis`, the first in the lowest bit; padded."""
    axis = packed_axis(pruned.shape)
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
