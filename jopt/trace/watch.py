"""A weight under watch: every product that it meets measures the activation on its other side.

What GPTQ, AWQ, SparseGPT, Wanda and bias correction need to know of a layer's inputs is a sum over
them: a Gram matrix, means, largest values. `Watched` is a dense weight that records it, in the
order of the weight's own rows, however the function has transposed, reshaped or sliced the weight
on its way to the product.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .layered import Layered
from .rules import rule
from .stats import Stat


class Activation(NamedTuple):
    """What a product multiplies with a watched weight."""

    raw: jax.Array  # as the function has it
    rows: Callable[[], jax.Array]  # float32 `[blocks, examples, inputs]`, inputs as the weight's


Measure = Callable[[Activation], Any]  # a pytree of `Stat`; a function that hashes, kept by value


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["value", "inputs", "blocks"],
    meta_fields=["names", "measure", "total"],
)
@dataclasses.dataclass(frozen=True)
class Watched(Layered):
    """A dense weight whose products record `measure(activation)` under its names."""

    value: jax.Array
    inputs: jax.Array  # int32, 1 along axes that are not summed: the number of each summed entry
    blocks: jax.Array  # int32, 1 along axes that are not batched: the number of each block
    names: tuple[str, ...]
    measure: Measure
    total: tuple[int, int]  # how many inputs and blocks the whole weight has

    def materialise(self) -> jax.Array:
        """The weight."""
        return jnp.asarray(self.value)

    def split(self) -> tuple[jax.Array, Any]:
        """The weight, and where its entries were."""
        return self.value, (self.inputs, self.blocks)

    def joined(self, array: jax.Array, coarse: Any) -> "Watched":
        """This leaf with other arrays."""
        inputs, blocks = coarse
        return dataclasses.replace(self, value=array, inputs=inputs, blocks=blocks)


def watched(
    value: jax.Array,
    name: str,
    measure: Measure,
    *,
    contracted: Sequence[int],
    batched: Sequence[int] = (),
) -> Watched:
    """Puts a weight under watch.

    Args:
      value: the weight.
      name: of its statistics in what `collect` returns.
      measure: a function from an `Activation` to a pytree of `Stat`, such as `gram`.
      contracted: the axes that its products sum over, counted from the end; from `sites`.
      batched: the axes that its products share with the activation, such as experts.
    """
    inputs, blocks = (_places(value.shape, axes) for axes in (contracted, batched))
    total = (inputs.size, blocks.size)
    return Watched(value, jnp.asarray(inputs), jnp.asarray(blocks), (name,), measure, total)


def gram(activation: Activation) -> dict[str, Stat]:
    """`gram`: Σ x xᵀ, float32 `[blocks, inputs, inputs]`; `count`: how many x, `[]`."""
    rows = activation.rows()
    product = jnp.einsum("bni,bnj->bij", rows, rows, precision=jax.lax.Precision.HIGHEST)
    return {"gram": Stat(product, "sum"), "count": _count(rows)}


def moments(activation: Activation) -> dict[str, Stat]:
    """Of each input, float32 `[blocks, inputs]`: `sum`, `absolute` Σ|x|, `square` Σx², `largest`.

    `largest` is that of |x|; `count` is how many x there were.
    """
    rows = activation.rows()
    sizes = jnp.abs(rows)
    return {
        "sum": Stat(jnp.sum(rows, 1), "sum"),
        "absolute": Stat(jnp.sum(sizes, 1), "sum"),
        "square": Stat(jnp.sum(rows * rows, 1), "sum"),
        "largest": Stat(jnp.max(sizes, 1, initial=0.0), "max"),
        "count": _count(rows),
    }


def _count(rows: jax.Array) -> Stat:
    return Stat(jnp.full_like(rows, rows.shape[1], shape=()), "sum")


def _places(shape: Sequence[int], axes: Sequence[int]) -> np.ndarray:
    """The row-major number of each entry along `axes`; 1 along the others."""
    axes = sorted(axis % len(shape) for axis in axes)
    numbers = np.arange(math.prod(shape[a] for a in axes), dtype=np.int32)
    return numbers.reshape([size if a in axes else 1 for a, size in enumerate(shape)])


# Rules.


@rule(jax.lax.convert_element_type_p, Watched)
def _convert(call: Any, leaf: Watched) -> Any:
    return dataclasses.replace(leaf, value=call.bind(leaf.value))


@rule(jax.lax.concatenate_p, Watched)
def _concatenate(call: Any, *operands: Any) -> Any:
    """Weights side by side share their inputs; along the inputs they would not."""
    leaves = [x for x in operands if isinstance(x, Watched)]
    axis, first = call.params["dimension"], leaves[0]
    for leaf in leaves:
        if leaf.measure != first.measure or leaf.total != first.total:
            return NotImplemented
        if leaf.inputs.shape[axis] != 1:
            return NotImplemented
        if leaf.blocks.shape[axis] != 1 or leaf.inputs.shape != first.inputs.shape:
            return NotImplemented
    names = tuple(name for leaf in leaves for name in leaf.names)
    values = [x.value if isinstance(x, Watched) else x for x in operands]
    return dataclasses.replace(first, value=call.bind(*values), names=names)


@rule(jax.lax.dot_general_p, Watched)
def _dot(call: Any, *operands: Any) -> Any:
    side = 0 if isinstance(operands[0], Watched) else 1
    leaf, x = operands[side], operands[1 - side]
    if isinstance(x, Layered):
        return NotImplemented
    summed, shared = call.params["dimension_numbers"]
    if _lie(leaf, summed[side], shared[side]):
        free = [a for a in range(x.ndim) if a not in summed[1 - side] and a not in shared[1 - side]]

        def rows() -> jax.Array:
            moved = jnp.transpose(x, (*shared[1 - side], *free, *summed[1 - side]))
            sizes = [x.shape[a] for a in (*shared[1 - side], *free)]
            blocks = math.prod(sizes[: len(shared[0])])
            return moved.reshape(blocks, math.prod(sizes[len(shared[0]) :]), -1)

        inputs, blocks = _along(leaf.inputs, summed[side]), _along(leaf.blocks, shared[side])
        _record(call, leaf, x, rows, inputs, blocks)
    return call.bind(*((leaf.value, x) if side == 0 else (x, leaf.value)))


@rule(jax.lax.conv_general_dilated_p, Watched)
def _conv(call: Any, x: Any, leaf: Any) -> Any:
    if not isinstance(leaf, Watched) or isinstance(x, Layered):
        return NotImplemented
    params = call.params
    numbers, groups = params["dimension_numbers"], params["feature_group_count"]
    window = numbers.rhs_spec[1:]
    if params["batch_group_count"] == 1 and _lie(leaf, window, ()):

        def rows() -> jax.Array:
            patches = jax.lax.conv_general_dilated_patches(
                x,
                [leaf.value.shape[axis] for axis in numbers.rhs_spec[2:]],
                params["window_strides"],
                params["padding"],
                lhs_dilation=params["lhs_dilation"],
                rhs_dilation=params["rhs_dilation"],
                dimension_numbers=numbers,
                precision=jax.lax.Precision.HIGHEST,
            )
            last = jnp.moveaxis(patches, numbers.out_spec[1], -1)
            return jnp.moveaxis(last.reshape(-1, groups, last.shape[-1] // groups), 1, 0)

        _record(call, leaf, x, rows, _along(leaf.inputs, window), None)
    return call.bind(x, leaf.value)


def _record(
    call: Any,
    leaf: Watched,
    x: jax.Array,
    rows: Callable[[], jax.Array],
    inputs: jax.Array,
    blocks: jax.Array | None,
) -> None:
    """Records what is measured of rows in the weight's own order."""

    def ordered() -> jax.Array:
        found = rows().astype(jnp.float32)
        found = found[:, :, jnp.argsort(inputs)]
        return found if blocks is None else found[jnp.argsort(blocks)]

    stats = leaf.measure(Activation(x, ordered))
    # The axes that enclosing scans add to `calls` are those by which the weight is stacked.
    stats = {"calls": Stat(jnp.ones_like(x, shape=(), dtype=jnp.float32), "sum"), **stats}
    for name in leaf.names:
        call.record(name, stats)


def _lie(leaf: Watched, summed: Sequence[int], shared: Sequence[int]) -> bool:
    """Whether a product that runs along these axes meets all inputs, and all blocks."""
    whole = (leaf.inputs.size, leaf.blocks.size) == leaf.total
    return whole and all(
        size == 1 or axis in axes
        for places, axes in ((leaf.inputs, summed), (leaf.blocks, shared))
        for axis, size in enumerate(places.shape)
    )


def _along(places: jax.Array, axes: Sequence[int]) -> jax.Array:
    """The numbers in the order in which a product goes through its axes."""
    rest = [axis for axis in range(places.ndim) if axis not in axes]
    return jnp.transpose(places, (*axes, *rest)).reshape(-1)
