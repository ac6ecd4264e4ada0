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
from jax.sharding import NamedSharding, PartitionSpec

from . import reductions
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
    data_fields=["value", "places"],
    meta_fields=["names", "measure", "total", "layers", "viewed"],
)
@dataclasses.dataclass(frozen=True)
class Watched(Layered):
    """A dense weight whose products record `measure(activation)` under its names."""

    value: jax.Array
    places: tuple["Places", ...]  # for each name
    names: tuple[str, ...]
    measure: Measure
    total: tuple[int, int]  # how many inputs and blocks the whole weight has
    layers: bool  # records a statistic a layer where a scan slices it
    viewed: bool = False  # whether an operation has rearranged it

    def materialise(self) -> jax.Array:
        """The weight."""
        return jnp.asarray(self.value)

    def split(self) -> tuple[jax.Array, Any]:
        """The weight, and where its entries were."""
        return self.value, self.places

    def joined(self, array: jax.Array, coarse: Any) -> "Watched":
        """This leaf with other arrays."""
        return dataclasses.replace(self, value=array, places=coarse, viewed=True)


class Places(NamedTuple):
    """Where the entries of a weight are in it; int32 of its rank."""

    inputs: jax.Array  # 1 along axes that are not summed: the number of each summed entry
    blocks: jax.Array  # 1 along axes that are not batched: the number of each block


def watched(
    value: jax.Array,
    name: str,
    measure: Measure,
    *,
    contracted: Sequence[int],
    batched: Sequence[int] = (),
    layers: bool = False,
) -> Watched:
    """Puts a weight under watch.

    Args:
      value: the weight.
      name: of its statistics in what `collect` returns.
      measure: a function from an `Activation` to a pytree of `Stat`, such as `gram`.
      contracted: the axes that its products sum over, counted from the end; from `sites`.
      batched: the axes that its products share with the activation, such as experts.
      layers: where a scan slices the weight, record a statistic a layer, stacked in the order of
        the scan, which is that of the weight only if the scan slices it as it is. Else nothing is
        recorded but that this was so, under the name and `SLICED`.
    """
    inputs, blocks = (_places(value.shape, axes) for axes in (contracted, batched))
    total = (inputs.size, blocks.size)
    places = Places(jnp.asarray(inputs), jnp.asarray(blocks))
    return Watched(value, (places,), (name,), measure, total, layers)


def gram(activation: Activation) -> dict[str, Stat]:
    """`gram`: Σ x xᵀ, float32 `[blocks, inputs, inputs]`; `count`: how many x, `[]`."""
    rows = activation.rows()
    sharding = jax.typeof(rows).sharding
    out = None
    if any(name is not None for name in sharding.spec):  # examples on explicit axes of a mesh
        out = NamedSharding(sharding.mesh, PartitionSpec(None, None, None))
    highest = jax.lax.Precision.HIGHEST
    product = jnp.einsum("bni,bnj->bij", rows, rows, precision=highest, out_sharding=out)
    return {"gram": Stat(product, "sum"), "count": _count(rows)}


def moments(activation: Activation) -> dict[str, Stat]:
    """Of each input, float32 `[blocks, inputs]`: `sum`, `absolute` Σ|x|, `square` Σx², `largest`.

    `largest` is that of |x|; `count` is how many x there were.
    """
    rows = activation.rows()
    return {
        "sum": Stat(jnp.sum(rows, 1), "sum"),
        "absolute": Stat(jnp.sum(jnp.abs(rows), 1), "sum"),
        "square": Stat(jnp.sum(rows * rows, 1), "sum"),
        "largest": Stat(reductions.largest(rows, 1), "max"),
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
        if any(part.shape[axis] != 1 for places in leaf.places for part in places):
            return NotImplemented
    values = [x.value if isinstance(x, Watched) else x for x in operands]
    return dataclasses.replace(
        first,
        value=call.bind(*values),
        places=tuple(places for leaf in leaves for places in leaf.places),
        names=tuple(name for leaf in leaves for name in leaf.names),
        viewed=True,
    )


@rule(jax.lax.dot_general_p, Watched)
def _dot(call: Any, *operands: Any) -> Any:
    side = 0 if isinstance(operands[0], Watched) else 1
    leaf, x = operands[side], operands[1 - side]
    if isinstance(x, Layered):
        return NotImplemented
    summed, shared = call.params["dimension_numbers"]
    free = [a for a in range(x.ndim) if a not in summed[1 - side] and a not in shared[1 - side]]

    def rows() -> jax.Array:
        moved = jnp.transpose(x, (*shared[1 - side], *free, *summed[1 - side]))
        parts = (shared[1 - side], free, summed[1 - side])
        return moved.reshape([math.prod(x.shape[a] for a in axes) for axes in parts])

    _record(call, leaf, x, rows, summed[side], shared[side])
    return call.bind(*((leaf.value, x) if side == 0 else (x, leaf.value)))


@rule(jax.lax.conv_general_dilated_p, Watched)
def _conv(call: Any, x: Any, leaf: Any) -> Any:
    if not isinstance(leaf, Watched) or isinstance(x, Layered):
        return NotImplemented
    params = call.params
    numbers, groups = params["dimension_numbers"], params["feature_group_count"]
    window = numbers.rhs_spec[1:]
    # Of a weight that was rearranged nobody knows which features are those of a group.
    if params["batch_group_count"] == 1 and not (groups > 1 and leaf.viewed):

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

        _record(call, leaf, x, rows, window, ())
    return call.bind(x, leaf.value)


def _record(
    call: Any,
    leaf: Watched,
    x: jax.Array,
    rows: Callable[[], jax.Array],
    summed: Sequence[int],
    shared: Sequence[int],
) -> None:
    """Records what is measured of rows, in the order of each weight's own inputs and blocks.

    Nothing where the product does not run along all inputs and blocks of a weight, each once.
    """
    for name, places in zip(leaf.names, leaf.places, strict=True):
        if not _lie(leaf, places, summed, shared):
            continue
        if any(call.stacked) and not leaf.layers:
            call.record(name + SLICED, Stat(jnp.ones_like(x, shape=(), dtype=jnp.float32), "sum"))
            continue
        inputs, blocks = _along(places.inputs, summed), _along(places.blocks, shared)

        def ordered(inputs: jax.Array = inputs, blocks: jax.Array = blocks) -> jax.Array:
            found = rows().astype(jnp.float32)[:, :, jnp.argsort(inputs)]
            return found if not shared else found[jnp.argsort(blocks)]

        call.record(name, leaf.measure(Activation(x, ordered)))


# After the name of a weight that a scan slices, whose layers nobody can tell apart then.
SLICED = " (sliced)"


def _lie(leaf: Watched, places: Places, summed: Sequence[int], shared: Sequence[int]) -> bool:
    """Whether a product that runs along these axes meets all inputs, and all blocks, once."""
    sizes = tuple(math.prod(leaf.value.shape[a] for a in axes) for axes in (summed, shared))
    if sizes != leaf.total or tuple(part.size for part in places) != leaf.total:
        return False
    return all(
        size == 1 or axis in axes
        for part, axes in zip(places, (summed, shared), strict=True)
        for axis, size in enumerate(part.shape)
    )


def _along(places: jax.Array, axes: Sequence[int]) -> jax.Array:
    """The numbers in the order in which a product goes through its axes."""
    rest = [axis for axis in range(places.ndim) if axis not in axes]
    return jnp.transpose(places, (*axes, *rest)).reshape(-1)
