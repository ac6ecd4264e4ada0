"""Leaves whose steps train with their weights, or whose products train in few bits.

`qat` makes them where a `Spec` says `weight_step`, `activation_step` or `backward`; their products
are in `_training`.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jopt import trees
from jopt.trace import collect, merge

from .._formats.base import Format, Grid, Int
from .._leaves.weights import FakeQuant, Range, WeightLeaf
from .steps import Moments, Step, StepMethod, moments_of, stepped

PyTree = Any


class Meets(NamedTuple):
    """The arrays of a weight that its products need beside its values; all of its rank."""

    range: Range | None  # of the activation
    step: Step | None  # of the activation, where it is learned
    scale: jax.Array | None  # of the weight: values are whole multiples of it
    key: jax.Array | None  # for what is rounded at random in the backward pass


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["weight", "range", "key", "keep", "bits", "step", "activation_step"],
    meta_fields=[
        *("format", "axes", "activation", "static"),
        *("weight_method", "activation_method", "backward"),
    ],
)
@dataclasses.dataclass(frozen=True)
class TrainedQuant(FakeQuant):
    """A fake-quantized weight with learned steps, or with products in few bits both ways."""

    step: Step | None = None  # of the weight
    activation_step: Step | None = None  # of the activation; None: not learned, or not yet begun
    weight_method: StepMethod | None = None
    activation_method: StepMethod | None = None
    backward: Format | None = None  # of what comes back through products

    def rounded(self) -> jax.Array:
        """The weight on the grid of its learned step."""
        if self.weight_method is None or self.step is None:
            return super().rounded()
        assert isinstance(self.format, Int)
        count = self.weight.size // max(self.step.size.size, 1)
        options: dict[str, Any] = {"key": self.weight_key, "bits": self.bits}
        method = self.weight_method
        return stepped(self.weight, self.format, method, self.step, count, **options)

    def weight_grid(self) -> Grid:
        """Where the codes of the weight lie."""
        if self.weight_method is None or self.step is None:
            return super().weight_grid()
        assert isinstance(self.format, Int)
        return self.weight_method.grid(self.step, self.format)

    def activation_range(self) -> Range | None:
        """The activation's range: what its learned step covers, or what was measured."""
        if self.activation_method is None or self.activation_step is None:
            return self.range
        assert isinstance(self.activation, Int)
        return Range(*self.activation_method.ends(self.activation_step, self.activation))

    @property
    def trained(self) -> tuple[str, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Fields that an optimizer may change."""
        own = self.weight_method is not None and self.weight_method.trains
        return ("weight", "step", "activation_step") if own else ("weight", "activation_step")

    def split(self) -> tuple[jax.Array, Any]:
        """The rounded weight, and what its products need."""
        scale = None
        if self.backward is not None and self.keep is None and self.bits is None:
            grid = jax.lax.stop_gradient(self.weight_grid())
            scale = grid.scale.astype(jnp.float32) if grid.zero_point is None else None
        key = None if self.backward is None else self.key
        return self.materialise(), Meets(self.range, self.activation_step, scale, key)

    def joined(self, array: jax.Array, coarse: Any) -> "TrainedValue":  # pyright: ignore
        """The rounded weight seen otherwise."""
        return TrainedValue(
            array,
            coarse,
            self.format,
            self.activation,
            self.static,
            self.activation_method,
            self.backward,
        )


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["value", "meets"],
    meta_fields=[
        *("format", "activation", "static", "activation_method", "backward", "observed"),
    ],
)
@dataclasses.dataclass(frozen=True)
class TrainedValue(WeightLeaf):
    """The rounded weight of a `TrainedQuant`, as products and views see it. Made by rules only."""

    value: jax.Array
    meets: Meets
    format: Format | None
    activation: Format | None
    static: bool
    activation_method: StepMethod | None
    backward: Format | None
    observed: str = ""  # record the activation's moments under this name, leave it as it is

    always_dense: ClassVar[bool] = False

    @property
    def range(self) -> Range | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The activation's measured range."""
        return self.meets.range

    def materialise(self) -> jax.Array:
        """The weight."""
        return jnp.asarray(self.value)

    def split(self) -> tuple[jax.Array, Any]:
        """The weight, and what its products need."""
        return self.value, self.meets

    def joined(self, array: jax.Array, coarse: Any) -> "TrainedValue":
        """This leaf with other arrays."""
        return dataclasses.replace(self, value=array, meets=coarse)


def init_steps(apply: Callable[..., Any], params: PyTree, batches: Iterable[Any]) -> PyTree:
    """Gives the learned steps of activations their first values, from what `batches` are.

    `apply` runs on each batch with rounded weights and float activations; each product with a
    learned activation step hands over mean |x|, smallest and largest value, from which the method
    starts (see `LSQ`, `LSQPlus`, `PACT`). Layers stacked under `scan` get a step each. One batch is
    what the papers take. Call it before `tx.init(params)`.

    Args:
      apply: any function `apply(params, *inputs)`; not lifted, this does it.
      params: made by `qat` with a policy that has `Spec(..., activation_step=...)`.
      batches: each a tuple of the inputs, or the one input if it is no tuple.

    Returns:
      `params` with every activation step that a product met begun anew. One that no product met
      stays None, and a product that meets it later says so.

    Raises:
      ValueError: if there is nothing to begin, no batch, or an activation is not finite.

    Example:
      >>> import jax.numpy as jnp
      >>> from jopt.quant import LSQ, Int, Spec, init_steps, qat
      >>> spec = Spec(Int(4), Int(8), weight_step=LSQ(), activation_step=LSQ())
      >>> params = qat({"kernel": jnp.ones((4, 2))}, spec)
      >>> params = init_steps(lambda p, x: x @ p["kernel"], params, [jnp.ones((3, 4))])
      >>> params["kernel"].activation_step.size.shape
      (1, 1)
    """
    learned = {
        path: leaf
        for path, leaf in trees.items(params)
        if isinstance(leaf, TrainedQuant) and leaf.activation_method is not None
    }
    if not learned:
        raise ValueError(
            "`init_steps(apply, params, batches)` begins the learned steps of activations, and "
            "there are none.\nMake some with `qat(params, Spec(..., activation_step=LSQ()))`."
        )
    moments = _moments(apply, params, batches, set(learned))

    def begin(path: str, leaf: Any) -> Any:
        if path not in moments:
            return leaf
        step = leaf.activation_method.first(moments[path], leaf.activation)

        def shaped(array: jax.Array) -> jax.Array:
            return array.reshape(array.shape + (1,) * (leaf.weight.ndim - array.ndim))

        return dataclasses.replace(leaf, activation_step=jax.tree.map(shaped, step))

    return trees.map_with_path(begin, params)


def steps(params: PyTree) -> PyTree:
    """Marks the learned steps, for a learning rate or a decay of their own.

    For `optax.masked(optax.add_decayed_weights(1e-4), steps(params))`, or as the labels of
    `optax.multi_transform` by `jax.tree.map(lambda s: "step" if s else "weight", steps(params))`.

    Example:
      >>> import jax.numpy as jnp
      >>> from jopt.quant import LSQ, Int, Spec, qat, steps
      >>> params = qat({"kernel": jnp.ones((4, 2))}, Spec(Int(4), weight_step=LSQ()))
      >>> steps(params)["kernel"].step.size, steps(params)["kernel"].weight
      (True, False)
    """
    return marked(params, lambda leaf: [name for name in leaf.trained if name != "weight"], False)


def marked(params: PyTree, names: Callable[[FakeQuant], Iterable[str]], arrays: bool) -> PyTree:
    """True for the named fields of leaves in training, and `arrays` for floating arrays."""

    def mark(leaf: Any) -> Any:
        if hasattr(type(leaf), "trainable"):  # a node that knows itself, such as `LoRA`
            return leaf.trainable(lambda part: marked(part, names, arrays))
        if not trees.is_typed(leaf):
            return arrays and bool(jnp.issubdtype(jnp.result_type(leaf), jnp.floating))
        frozen = jax.tree.map(lambda _: False, leaf)
        if isinstance(leaf, FakeQuant):
            chosen = {
                name: jax.tree.map(lambda _: True, getattr(leaf, name)) for name in names(leaf)
            }
            return dataclasses.replace(frozen, **chosen)
        return trees.with_weight(frozen, arrays) if hasattr(leaf, "with_weight") else frozen

    def whole(node: Any) -> bool:
        return trees.is_typed(node) or hasattr(type(node), "trainable")

    return jax.tree.map(mark, params, is_leaf=whole)


def first_step(
    weight: jax.Array, format: Format, axes: tuple[int, ...], method: StepMethod
) -> Step:
    """The step that a weight starts with."""
    assert isinstance(format, Int)
    return method.first(moments_of(weight, format, axes), format)


# Helpers, in order of use.


def _moments(
    apply: Callable[..., Any], params: PyTree, batches: Iterable[Any], learned: set[str]
) -> dict[str, Moments]:
    def watch(path: str, leaf: Any) -> Any:
        if not isinstance(leaf, FakeQuant):
            return leaf
        value = leaf.nearest().materialise()
        name = path if path in learned else ""
        return TrainedValue(
            value, Meets(None, None, None, None), None, None, False, None, None, name
        )

    @jax.jit
    def observe(params: PyTree, inputs: tuple[Any, ...]) -> dict[str, Any]:
        watched = trees.map_with_path(watch, params)
        return collect(apply, allow_dense=True)(watched, *inputs)[1]

    fold, stats = jax.jit(merge), None
    for batch in batches:
        new = observe(params, batch if isinstance(batch, tuple) else (batch,))
        stats = new if stats is None else fold(stats, new)
    if stats is None:
        raise ValueError("`init_steps(apply, params, batches)` got no batch to begin from.")
    found = {}
    for path in stats.keys() & learned:
        total, count, low, high = (stat.value for stat in stats[path])
        found[path] = Moments(total / jnp.maximum(count, 1.0), low, high)
        if not all(np.all(np.isfinite(np.asarray(array))) for array in found[path]):
            raise ValueError(
                f"`init_steps(...)`: the activation that meets `{path}` has a NaN or an infinity."
                "\nCheck the batches and the parameters."
            )
    return found
