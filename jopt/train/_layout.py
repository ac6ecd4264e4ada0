"""Which devices take part in a step, and how its batch is split over them."""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from jopt.train import _state as states
from jopt.train._state import AXIS, State

PyTree = Any


class Layout(NamedTuple):
    """A mesh or none, under `jit` or `pmap`."""

    mesh: Mesh | None  # with automatic axes; the batch is split over the first
    parallel: Literal["jit", "pmap"]

    @property
    def devices(self) -> list[Any]:
        """The devices that take part."""
        if self.mesh is not None:
            return list(self.mesh.devices.flat)
        return jax.local_devices() if self.parallel == "pmap" else jax.local_devices()[:1]

    @property
    def platform(self) -> str:
        """Name of the platform, such as `"cpu"`."""
        return self.devices[0].platform

    @property
    def shares(self) -> int:
        """Into how many parts a batch is split."""
        if self.parallel == "pmap":
            return len(self.devices)
        return 1 if self.mesh is None else self.mesh.devices.shape[0]

    def enter(self, state: State) -> State:
        """The state on the layout's devices: one copy each under `pmap`."""
        if self.parallel == "pmap":
            return states.replicate(state, self.devices)
        return states.place(state, self.mesh)

    def leave(self, state: State) -> State:
        """The state as one copy, whatever the layout."""
        return states.unreplicate(state) if self.parallel == "pmap" else state

    def shardings(self, state: State) -> tuple[Sharding, ...] | None:
        """Where each leaf of a placed state lies, and has to stay."""
        if self.mesh is None or self.parallel == "pmap":
            return None
        return tuple(leaf.sharding for leaf in jax.tree.leaves(state))

    def settle(self, state: State) -> State:
        """A copy of the state, bound to the layout's devices, or without a mesh to its own one."""
        state = self.enter(states.owned(state))
        if self.mesh is not None or self.parallel == "pmap":
            return state
        devices = states.devices_of(state)
        if len(devices) != 1:
            raise ValueError(
                f"`fit(step, state, ...)`: the state lies on {len(devices)} devices, but the step "
                "was made for one. Give their mesh: `make_step(..., mesh=mesh)`."
            )
        return jax.device_put(state, devices.pop())

    def beside(self, state: State, arrays: PyTree) -> PyTree:
        """The arrays, whole, on every device of a settled state."""
        if self.parallel == "pmap":
            mesh = Mesh(np.array(self.devices), (AXIS,))
        elif self.mesh is None:
            return jax.device_put(arrays, states.devices_of(state).pop())
        else:
            mesh = self.mesh
        return jax.device_put(arrays, NamedSharding(mesh, PartitionSpec()))

    def spread(self, batch: PyTree) -> PyTree:
        """A batch, from wherever it is, on the devices of the layout."""
        self.check(batch)
        if self.parallel == "pmap":
            return jax.tree.map(lambda x: x.reshape(self.shares, -1, *x.shape[1:]), batch)
        if self.mesh is None:
            return batch
        return jax.device_put(batch, NamedSharding(self.mesh, self._split()))

    def constrain(self, batch: PyTree) -> PyTree:
        """A traced batch, which the compiler is told to split over the mesh."""
        if self.mesh is None or self.parallel == "pmap":
            return batch
        self.check(batch)
        return jax.lax.with_sharding_constraint(batch, NamedSharding(self.mesh, self._split()))

    def share(self, batch: PyTree) -> PyTree:
        """The part of a traced batch that is this device's under `pmap`."""
        if self.parallel == "jit":
            return batch
        self.check(batch)
        index = jax.lax.axis_index(AXIS)

        def part(x: jax.Array) -> jax.Array:
            rows = x.shape[0] // self.shares
            return jax.lax.dynamic_slice_in_dim(x, index * rows, rows)

        return jax.tree.map(part, batch)

    def fold(self, key: jax.Array | None, step: jax.Array) -> jax.Array | None:
        """The key of one step, and under `pmap` of one device."""
        if key is None:
            return None
        key = jax.random.fold_in(key, step)
        if self.parallel == "jit":
            return key
        return jax.random.fold_in(key, jax.lax.axis_index(AXIS))

    def mean(self, tree: PyTree) -> PyTree:
        """Means over the devices under `pmap`; what is not a float is alike on all, and stays."""
        if self.parallel == "jit":
            return tree
        return jax.tree.map(
            lambda x: jax.lax.pmean(x, AXIS) if jnp.issubdtype(x.dtype, jnp.inexact) else x, tree
        )

    def check(self, batch: PyTree) -> None:
        """Raises where a batch does not divide over the devices."""
        for x in jax.tree.leaves(batch):
            if self.shares > 1 and (not jnp.ndim(x) or jnp.shape(x)[0] % self.shares):
                raise ValueError(
                    f"`step(state, batch)` on {self.shares} devices expects arrays whose leading "
                    f"axis {self.shares} divides, got one of shape {list(jnp.shape(x))}."
                )

    def _split(self) -> PartitionSpec:
        assert self.mesh is not None
        return PartitionSpec(self.mesh.axis_names[0])
