"""Arrays on a mesh with explicit axes: what an operation cannot split is put together first.

On automatic axes, on one device and inside a `shard_map` nothing here does anything.
"""

import math
from collections.abc import Sequence

import jax
from jax.sharding import NamedSharding, PartitionSpec


def whole(x: jax.Array, axes: Sequence[int] | None = None) -> jax.Array:
    """`x`, not sharded along `axes`; along none of its axes by default."""
    sharding = jax.typeof(x).sharding
    names = [*sharding.spec, *[None] * (x.ndim - len(sharding.spec))]
    free = range(x.ndim) if axes is None else [axis % x.ndim for axis in axes]
    if all(names[axis] is None for axis in free):
        return x
    kept = [None if axis in free else name for axis, name in enumerate(names)]
    return jax.sharding.reshard(x, NamedSharding(sharding.mesh, PartitionSpec(*kept)))


def parts(x: jax.Array, axis: int) -> int:
    """Into how many parts an axis is sharded."""
    sharding = jax.typeof(x).sharding
    names = dict(enumerate(sharding.spec)).get(axis % x.ndim)
    names = names if isinstance(names, tuple) else (names,)
    return math.prod(sharding.mesh.shape[name] for name in names if name is not None)


def placed_like(x: jax.Array, other: jax.Array) -> jax.Array:
    """`x`, sharded as `other` of its shape is."""
    sharding = jax.typeof(other).sharding
    if all(name is None for name in sharding.spec):
        return x
    return jax.sharding.reshard(x, NamedSharding(sharding.mesh, sharding.spec))
