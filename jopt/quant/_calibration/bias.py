"""Bias correction: what rounding a weight adds to a product on average is taken off its bias."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jopt import trees
from jopt.trace import Layered, Stat, collect, merge, rule
from jopt.trace.flow import Flow, Product, channels, flows, products
from jopt.trace.scaling import added
from jopt.trace.tails import affine, tail

from .._leaves.weights import WeightLeaf
from .equalize import laid

PyTree = Any


class Corrected(NamedTuple):
    """What became of the mean error of one quantized weight."""

    path: str  # of the weight
    bias: str | None  # path of the bias
    shift: np.ndarray | None  # what was added to it
    reason: str  # why nothing was done; empty if it was


def correct_biases(
    apply: Callable[..., Any],
    params: PyTree,
    quantized: PyTree,
    batches: Iterable[Any],
) -> tuple[PyTree, tuple[Corrected, ...]]:
    """Takes the mean error that rounded weights make off the biases behind their products.

        b ← b - E[W_q x - W x] = b - (W_q - W) E[x]

    The mean is over all positions and batches, with the x that the model with the weights `params`
    has, one mean for each output channel; of a convolution it is of its true outputs, padding
    included. The bias is found in the jaxpr (in the program for TPUs, if platforms differ): a
    parameter that is added to each channel of the product, directly, behind a maximum over windows,
    or behind the factors of a norm; layer by layer under a scan over stacked layers.

    Args:
      apply: any function `apply(params, *inputs)`.
      params: its parameters before quantization.
      quantized: the same with quantized leaves, from `quantize`, `calibrate` or `qat`.
      batches: each a tuple of the inputs, or the one input if it is no tuple.

    Returns:
      `(quantized, report)`: with other biases, and a `Corrected` for each quantized weight, with
      the reason where it has none: no bias that is its own, or no product as `lift` would run it.

    Raises:
      ValueError: if nothing is quantized, if there is no batch, if the trees do not fit together,
        or a mean is not finite.

    References:
      Markus Nagel, Mart van Baalen, Tijmen Blankevoort, Max Welling, Data-free quantization through
      weight equalization and bias correction, 2019, arXiv:1906.04721, section 4.2; E[x] is measured
      here, as in their appendix D, not derived from batch norms.
    """
    before, after = dict(trees.items(params)), dict(trees.items(quantized))
    if list(before) != list(after):
        raise ValueError(
            "`correct_biases(apply, params, quantized, ...)`: `quantized` must be `params` with "
            f"quantized leaves; it has {len(after)} leaves, and `params` {len(before)}."
        )
    coded = {path for path, leaf in after.items() if isinstance(leaf, WeightLeaf)}
    if not coded or any(trees.is_typed(before[path]) for path in coded):
        raise ValueError(
            "`correct_biases(apply, params, quantized, ...)` needs the weights as arrays in "
            "`params` and as quantized leaves in `quantized`."
        )
    errors, inputs = _errors(apply, params, quantized, coded, batches)
    arrays = {p: x for p, x in before.items() if not trees.is_typed(x) and hasattr(x, "ndim")}
    places = {p: _Place(None, {}, "no product of its own was found") for p in coded}
    for flow in flows(apply, params, *inputs):
        for product in products(flow):
            if product.path in coded:
                places[product.path] = _bias(flow, product, arrays)
    rows, biases = [], {}
    for path in (path for path in before if path in coded):
        if trees.is_typed(after.get(places[path].bias or "")):
            places[path] = _Place(None, {}, f"its bias `{places[path].bias}` is a typed leaf")
        row = _corrected(path, places[path], errors.get(path), arrays)
        rows.append(row)
        if row.bias is not None:
            old = biases.get(row.bias, after[row.bias])
            biases[row.bias] = (old.astype(jnp.float32) + row.shift).astype(old.dtype)
    found = trees.map_with_path(lambda path, leaf: biases.get(path, leaf), quantized)
    return found, tuple(rows)


# The error of each channel.


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["value", "error"], meta_fields=["name"]
)
@dataclasses.dataclass(frozen=True)
class Compared(Layered):
    """A dense weight that records what its error makes of the activations it meets."""

    value: jax.Array
    error: jax.Array  # of the same shape
    name: str

    def materialise(self) -> jax.Array:
        """The weight."""
        return self.value

    def split(self) -> tuple[jax.Array, Any]:
        """The weight, and the error."""
        return self.value, self.error

    def joined(self, array: jax.Array, coarse: Any) -> "Compared":
        """This leaf with other arrays."""
        return Compared(array, coarse, self.name)


@rule(jax.lax.dot_general_p, Compared)
@rule(jax.lax.conv_general_dilated_p, Compared)
def _product(call: Any, *operands: Any) -> Any:
    leaves = [i for i, x in enumerate(operands) if isinstance(x, Compared)]
    if len(leaves) != 1 or sum(trees.is_typed(x) for x in operands) != 1:
        return NotImplemented
    (side,) = leaves
    leaf = operands[side]
    if call.primitive is jax.lax.conv_general_dilated_p:
        if side != 1:
            return NotImplemented
        kept = {call.params["dimension_numbers"].out_spec[1]}
    else:
        contract, batch = call.params["dimension_numbers"]
        free = [x.ndim - len(contract[i]) - len(batch[i]) for i, x in enumerate(operands)]
        start = len(batch[0]) + (free[0] if side == 1 else 0)
        kept = {*range(len(batch[0])), *range(start, start + free[side])}
    error = call.bind(*(leaf.error if x is leaf else x for x in operands)).astype(jnp.float32)
    summed = tuple(axis for axis in range(error.ndim) if axis not in kept)
    count = math.prod(error.shape[axis] for axis in summed)
    total = jnp.sum(error, axis=summed).reshape(-1)
    call.record(leaf.name, (Stat(total, "sum"), Stat(jnp.full_like(total, count), "sum")))
    return call.bind(*(leaf.value if x is leaf else x for x in operands))


def _errors(
    apply: Callable[..., Any],
    params: PyTree,
    quantized: PyTree,
    coded: set[str],
    batches: Iterable[Any],
) -> tuple[dict[str, jax.Array], tuple[Any, ...]]:
    """The mean error of each channel `[*layers, channels]`, and one batch of inputs."""

    @trees.jitted
    def observe(params: PyTree, quantized: PyTree, inputs: tuple[Any, ...]) -> Any:
        def compare(path: str, leaf: Any, other: Any) -> Any:
            if path not in coded:
                return leaf
            return Compared(leaf, (other.materialise() - leaf).astype(leaf.dtype), path)

        compared = trees.map_with_path(compare, params, quantized)
        return collect(apply, allow_dense=True)(compared, *inputs)[1]

    fold, stats, inputs = jax.jit(merge), None, ()
    for batch in batches:
        inputs = batch if isinstance(batch, tuple) else (batch,)
        new = observe(params, quantized, inputs)
        stats = new if stats is None else fold(stats, new)
    if stats is None:
        raise ValueError("`correct_biases(apply, params, quantized, batches)` got no batch.")
    means = {path: total.value / count.value for path, (total, count) in stats.items()}
    for path, mean in means.items():
        if not jnp.all(jnp.isfinite(mean)):
            raise ValueError(
                f"`correct_biases(...)`: the mean error of `{path}` has a NaN or an infinity.\n"
                "Check the batches and the parameters."
            )
    return means, inputs


# The bias of each weight.


class _Place(NamedTuple):
    """Where a mean error goes."""

    bias: str | None
    match: Mapping[int, int]  # axes of the weight's channels to axes of the bias, from the end
    reason: str
    axes: tuple[int, ...] = ()  # of the channels, in the order of the product's result
    layers: int = 0
    factor: jax.Array | float = 1.0  # from the product's result to where the bias is added


def _bias(flow: Flow, product: Product, arrays: Mapping[str, jax.Array]) -> _Place:
    weight = arrays[product.path]
    layers = flow.layers(product.path, weight.ndim)
    shape = weight.shape[layers:]
    if not flow.alone(product.path, [product.node]):
        return _Place(None, {}, "the weight is used elsewhere as well")
    places = channels(product.axes, shape)
    if places is None:
        return _Place(None, {}, "its channels are rearranged before the product")
    order = tuple(axis for place in sorted(places) for axis in places[place])
    # Of several the last: of a norm that is the bias, which is no statistic.
    for node in reversed(tail(flow, product, shape, pools=True).nodes):
        before = tail(flow, product, shape, pools=True, until=node)
        bias = added(node, {before.end: before.axes}, shape)
        if bias is None or bias.path not in arrays or not flow.alone(bias.path, [node]):
            continue
        if flow.layers(bias.path, arrays[bias.path].ndim) != layers:
            continue
        sizes = math.prod(shape[axis] for axis in order)
        if math.prod(arrays[bias.path].shape[layers:]) != sizes:
            continue
        factor: Any = 1.0 if node.name == "add" else -1.0
        if any(other.name in ("mul", "div", "sub") for other in before.nodes):
            before = tail(flow, product, shape, until=node)
            paths = [value.parameter or "" for value in before.made_of()]
            if node.operands[0] is not before.end or not all(path in arrays for path in paths):
                continue
            factor = factor * affine(flow, before, {p: arrays[p] for p in paths}, shape)[0]
        elif node.name == "sub" and node.operands[0] is not before.end:
            continue
        return _Place(bias.path, bias.match, "", order, layers, factor)
    return _Place(None, {}, "no bias of its own is added to its product")


def _corrected(
    path: str, place: _Place, error: jax.Array | None, arrays: Mapping[str, jax.Array]
) -> Corrected:
    if place.bias is None:
        return Corrected(path, None, None, place.reason)
    if error is None:
        return Corrected(path, None, None, "no product met this weight as `lift` would run it")
    weight, bias = arrays[path], arrays[place.bias]
    layers, shape = place.layers, weight.shape
    lead = shape[:layers]
    core = error.reshape(*lead, *(shape[axis] for axis in place.axes))
    order = sorted(range(len(place.axes)), key=lambda i: place.axes[i] % weight.ndim)
    core = core.transpose(*range(layers), *(layers + i for i in order))
    kept = {axis % weight.ndim for axis in place.axes}
    full = core.reshape([n if i < layers or i in kept else 1 for i, n in enumerate(shape)])
    shift = laid(-full * place.factor, dict(place.match), bias.ndim, layers)
    return Corrected(path, place.bias, np.asarray(shift.reshape(bias.shape)), "")
