"""What XLA:CPU is to have before it goes on: parts in turn, and arrays of their own."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp


def in_order(x: jax.Array) -> bool:
    """Whether parts of a product with [rows, inputs] can be written out that wait for each other.

    What a part waits for would have to be sent to all devices, where there are several.
    """
    return isinstance(x.shape[0], int) and x.shape[0] > 0 and jax.device_count() == 1


@jax.custom_batching.custom_vmap
def once_there(index: jax.Array, value: jax.Array) -> jax.Array:
    """The index, in a way that XLA cannot tell it before there is a value.

    An `optimization_barrier` is gone before XLA:CPU puts operations into an order; the weights of
    all layers were made dense first.
    """
    if not value.size:
        return index
    bits = jax.lax.bitcast_convert_type(value[(0,) * value.ndim].astype(jnp.float32), jnp.uint32)
    return index + ((bits >> 31) >> 1).astype(index.dtype)


@once_there.def_vmap
def _once_there_batched(
    size: int, batched: Sequence[bool], index: jax.Array, value: jax.Array
) -> tuple[jax.Array, bool]:
    # One index for all: a batch of them would make a slice of codes for each.
    index = index[0] if batched[0] else index
    if batched[1]:
        value = value[0] if size else jnp.zeros(0)
    return once_there(index, value), False


def settled(x: jax.Array) -> jax.Array:
    """[rows, inputs], as an array of its own, where parts of a product can wait for it.

    XLA:CPU would make it again for each output, in a kernel too long for its vectorizer.
    """
    if not in_order(x):
        return x
    # A branch ends a kernel; that there is only one way to go is not known beforehand.
    there = once_there(jnp.asarray(0), x) == 0
    return jax.lax.cond(there, lambda x: x, jnp.zeros_like, x)
