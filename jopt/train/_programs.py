"""The compiled programs around one step: on a given batch, on a feed's batch, on many in a loop."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jopt.train import _loopable as loopable
from jopt.train._feed import Order
from jopt.train._layout import Layout
from jopt.train._state import AXIS, State

PyTree = Any
Metrics = dict[str, jax.Array]
Body = Callable[[State, PyTree], tuple[State, Metrics]]

CAPACITY = 4096  # steps that one call of the loop can take: the length of its metric buffers


class Fixed(NamedTuple):
    """What a program is compiled for, besides the shapes of its arguments."""

    shardings: tuple[Any, ...] | None  # of the state's leaves, which a step keeps
    order: Order | None = None


class Programs:
    """Compiles each program when it is first called, and once.

    Attributes:
      one: `(fixed, state, batch) -> (state, metrics)`.
      fed: `(fixed, state, arrays) -> (state, metrics)`: one step on the batch that the order picks.
      many: `(fixed, state, arrays, steps) -> (state, metrics)`: as many such steps in a compiled
        loop, each metric an array of `CAPACITY` numbers of which the first `steps` count.
    """

    def __init__(self, body: Body, layout: Layout, *, donate: bool):
        def one(fixed: Fixed, state: State, batch: PyTree) -> tuple[State, Metrics]:
            state, metrics = body(state, batch)
            if fixed.shardings is not None:
                leaves, structure = jax.tree.flatten(state)
                kept = map(jax.lax.with_sharding_constraint, leaves, fixed.shardings)
                state = jax.tree.unflatten(structure, list(kept))
            return state, metrics

        # Jitted so that JAX remembers its trace: inspection, stepping and looping share it.
        @functools.partial(jax.jit, static_argnums=0)
        def fed(fixed: Fixed, state: State, arrays: PyTree) -> tuple[State, Metrics]:
            assert fixed.order is not None
            return one(fixed, state, layout.share(fixed.order.batch(arrays, state.step)))

        def many(
            fixed: Fixed, state: State, arrays: PyTree, steps: jax.Array
        ) -> tuple[State, Metrics]:
            def go(i: jax.Array, carry: tuple[State, Metrics]) -> tuple[State, Metrics]:
                state, buffers = carry
                state, metrics = fed(fixed, state, arrays)
                return state, jax.tree.map(lambda b, x: b.at[i].set(x), buffers, metrics)

            _, shapes = jax.eval_shape(fed, fixed, state, arrays)
            buffers = jax.tree.map(lambda x: jnp.zeros(CAPACITY, x.dtype), shapes)
            return jax.lax.fori_loop(0, steps, go, (state, buffers))

        self.one = _compiled(one, layout, donate, (0,))
        self.fed = _compiled(fed, layout, donate, (None,))
        self.many = _compiled(many, layout, donate, (None, None))
        self._platform = layout.platform

    def loops(self, fixed: Fixed, state: State, arrays: PyTree) -> bool:
        """Whether the platform runs `many` at the speed of `fed`."""
        jaxpr = jax.make_jaxpr(self.fed, static_argnums=0)(fixed, state, arrays)
        return loopable.loops(jaxpr, self._platform)


def _compiled(
    f: Callable[..., Any], layout: Layout, donate: bool, axes: tuple[int | None, ...]
) -> Callable[..., Any]:
    """`f(fixed, state, *rest)` compiled; under `pmap`, `axes` says how `rest` is split."""
    donated = (1,) if donate else ()
    if layout.parallel == "jit":
        return jax.jit(f, static_argnums=0, donate_argnums=donated)
    return jax.pmap(
        f,
        axis_name=AXIS,
        devices=layout.devices,
        static_broadcasted_argnums=0,
        donate_argnums=donated,
        in_axes=(None, 0, *axes),
        out_axes=(0, None),
    )
