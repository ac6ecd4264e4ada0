"""The state of training: what it holds, how it begins, and on which devices it lies."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jax.sharding import Mesh, NamedSharding, PartitionSpec

PyTree = Any
AXIS = "batch"  # the name of the device axis under `parallel="pmap"`


class State(NamedTuple):
    """Everything that one step changes, and the key that it draws from."""

    step: jax.Array  # int32: steps done
    params: PyTree  # arrays and typed leaves
    opt_state: PyTree  # of the optax chain
    collections: PyTree  # mutable collections such as batch statistics, or None
    key: jax.Array | None  # root of the loss's randomness, or None; it never changes


class Aux(NamedTuple):
    """What a loss returns beside its value."""

    collections: PyTree = None  # the new mutable collections; None keeps the old ones
    metrics: Mapping[str, jax.Array] | None = None  # scalars: means over the batch


def init(
    params: PyTree,
    tx: optax.GradientTransformation,
    *,
    collections: PyTree = None,
    key: jax.Array | None = None,
    mesh: Mesh | None = None,
) -> State:
    """Begins training at step 0.

    Every array is copied, since steps donate their state: the caller's `params` stay alive.

    Args:
      params: any tree of arrays and typed leaves. Leaves without a derivative (integer, boolean)
        stay as they are; `tx` sees `optax.MaskedNode()` in their place.
      tx: the transformation that the step will use.
      collections: mutable collections, such as `{"batch_stats": ...}`; given to the loss.
      key: root of the loss's randomness, such as `jax.random.key(0)`.
      mesh: where the state lies. Leaves already sharded over it keep their sharding; the others are
        copied to every device.

    Returns:
      A `State`.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from jopt import train
      >>> state = train.init({"w": jnp.zeros(3)}, optax.sgd(0.1))
      >>> int(state.step)
      0
    """
    params = place(owned(params), mesh)
    opt_state = tx.init(trained(params))
    rest = (jnp.zeros((), jnp.int32), opt_state, collections, key)
    step, opt_state, collections, key = owned(rest)
    return place(State(step, params, opt_state, collections, key), mesh)


def trained(params: PyTree) -> PyTree:
    """`params` as the optimizer sees them: `optax.MaskedNode()` where a leaf has no derivative."""
    return jax.tree.map(lambda leaf: leaf if _differentiable(leaf) else optax.MaskedNode(), params)


def merged(new: PyTree, params: PyTree) -> PyTree:
    """`params` with the leaves of `new`, a tree made by `trained`."""
    leaves, structure = jax.tree.flatten(params)
    fresh = iter(jax.tree.leaves(new))
    return jax.tree.unflatten(
        structure, [next(fresh) if _differentiable(leaf) else leaf for leaf in leaves]
    )


def auto(mesh: Mesh) -> Mesh:
    """The same mesh with automatic axes: the compiler, not the loss, spreads the operations."""
    return Mesh(mesh.devices, mesh.axis_names)


def place(tree: PyTree, mesh: Mesh | None) -> PyTree:
    """Puts every leaf on the devices of `mesh`: as it is sharded there already, else one copy each.

    Without a mesh, arrays bound to one device bind the others to it too: a state of which only a
      part
    is bound would be compiled for twice.
    """
    if mesh is not None:
        return jax.device_put(tree, jax.tree.map(lambda leaf: _on(leaf, auto(mesh)), tree))
    bound = [_committed(x) for x in jax.tree.leaves(tree)]
    if all(bound) or not any(bound):
        return tree
    devices = devices_of(tree)
    return jax.device_put(tree, devices.pop()) if len(devices) == 1 else tree


def devices_of(tree: PyTree) -> set[Any]:
    """The devices to which arrays of the tree are bound, or on which they happen to lie."""
    arrays = [x for x in jax.tree.leaves(tree) if isinstance(x, jax.Array) and not _traced(x)]
    bound = [x for x in arrays if x.committed]
    return {device for x in bound or arrays for device in x.devices()}


def replicate(state: PyTree, devices: Sequence[Any] | None = None) -> PyTree:
    """Copies the state to every device, along a new leading axis, for `parallel="pmap"`."""
    devices = jax.local_devices() if devices is None else devices
    spread = NamedSharding(Mesh(np.array(devices), (AXIS,)), PartitionSpec(AXIS))
    return jax.tree.map(
        lambda x: jax.device_put(jnp.broadcast_to(x, (len(devices), *jnp.shape(x))), spread), state
    )


def unreplicate(state: PyTree) -> PyTree:
    """The first device's copy of a state made by `replicate`, as an ordinary state."""
    first = jax.local_devices()[0]
    return jax.tree.map(lambda x: jax.device_put(x[0], first), state)


def owned(tree: PyTree) -> PyTree:
    """A copy, each array with a buffer of its own and a dtype that promotion will not change."""

    def own(x: Any) -> jax.Array:
        dtype = x.dtype if isinstance(x, jax.Array) else jnp.result_type(x)
        return jnp.array(x, dtype=dtype, copy=True)

    return jax.tree.map(own, tree)


def _differentiable(leaf: Any) -> bool:
    return jnp.issubdtype(getattr(leaf, "dtype", jnp.result_type(leaf)), jnp.inexact)


def _traced(x: Any) -> bool:
    return isinstance(x, Tracer)


def _committed(x: Any) -> bool:
    return isinstance(x, jax.Array) and not _traced(x) and x.committed


def _on(leaf: Any, mesh: Mesh) -> NamedSharding:
    sharding = getattr(leaf, "sharding", None)
    if (
        isinstance(sharding, NamedSharding)
        and isinstance(sharding.mesh, Mesh)
        and auto(sharding.mesh) == mesh
    ):
        return NamedSharding(mesh, sharding.spec)
    return NamedSharding(mesh, PartitionSpec())
