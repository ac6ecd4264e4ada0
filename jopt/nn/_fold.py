"""Batch normalization at inference, folded into the product before it."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jopt import trees
from jopt.trace.flow import Flow, Product, flows, products
from jopt.trace.tails import Tail, affine, tail

PyTree = Any
Arrays = dict[str, jax.Array]


class Folded(NamedTuple):
    """What became of one weight whose product is normalized."""

    path: str  # of the weight
    changed: tuple[str, ...]  # the other parameters that were changed
    reason: str  # why it was not folded; empty if it was


def fold_batch_norm(
    apply: Callable[..., Any], params: PyTree, *inputs: Any
) -> tuple[PyTree, tuple[Folded, ...]]:
    """Moves the scales of batch norms into the weights before them; the function stays the same.

    Where the result of a product y goes through a chain of sums and products with parameters,
    channel by channel, as batch norm with running statistics does,

        (y - mean) · scale / √(var + ε) + bias = a y + b,

    the weight becomes a·weight, and the norm's own parameters are set so that what is left of it
    only adds b: a scale that makes its factor 1, a mean (and a bias before it) of 0, the bias b.
    `apply` is not changed, nor the structure of `params`, and what quantizes the weight afterwards
    sees the values that the product really has. It is found in the jaxpr, in any framework, and
    under scans over stacked layers; in the program for TPUs, if platforms differ.

    Args:
      apply: any function, at inference: bind what says so, `lambda p, x: net.apply(p, x,
        train=False)`.
      params: its parameters with the running statistics among them, such as linen's variables.
      *inputs: its other arguments; shapes will do (`jax.ShapeDtypeStruct`). One example is enough.

    Returns:
      `(params, report)`: the parameters, and a `Folded` for each weight that a chain follows.

    Raises:
      ValueError: if no product is followed by a norm, directly and by nothing else.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import linen
      >>> from jopt import nn
      >>> net = linen.Sequential([linen.Dense(3), linen.BatchNorm(True, epsilon=1.0)])
      >>> x = jnp.ones((2, 4))
      >>> variables, report = nn.fold_batch_norm(net.apply, net.init(jax.random.key(0), x), x)
      >>> [(row.path, row.reason) for row in report]
      [('params/layers_0/kernel', '')]

    References:
      Benoit Jacob et al., Quantization and training of neural networks for efficient
      integer-arithmetic-only inference, 2017, arXiv:1712.05877, section 3.2.
    """
    arrays = {p: x for p, x in trees.items(params) if not trees.is_typed(x) and hasattr(x, "ndim")}
    report = []
    for flow in flows(apply, params, *inputs):
        for product in products(flow):
            if (row := _fold(flow, product, arrays)) is not None:
                report.append(row)
    if not report:
        raise ValueError(
            "`fold_batch_norm(apply, params, ...)` found no product that a norm with running "
            "statistics follows.\nA norm after an activation, before a product, or of a result "
            "that is read elsewhere as well cannot be folded.\nIf there is another, call the model "
            "at inference (`train=False`, `use_running_average=True`), with the statistics among "
            "`params`."
        )
    return trees.map_with_path(lambda path, leaf: arrays.get(path, leaf), params), tuple(report)


def _fold(flow: Flow, product: Product, arrays: Arrays) -> Folded | None:
    """Folds what follows a product, in `arrays`; None where no norm follows."""
    path = product.path
    if path not in arrays:
        return None
    weight = arrays[path]
    layers = flow.layers(path, weight.ndim)
    found = tail(flow, product, weight.shape[layers:])
    entered = found.made_of()
    # A norm multiplies; a bias alone, or a constant factor, is none.
    if not any(n.name in ("mul", "div") for n in found.nodes) or len(entered) < 2:
        return None
    if any(value.parameter is None or value.parameter not in arrays for value in entered):
        return Folded(path, (), "the norm is not made of parameters as they are in `params`")
    paths = [value.parameter or "" for value in entered]
    if not flow.alone(path, [product.node]):
        return Folded(path, (), "the weight is used elsewhere as well")
    if any(flow.layers(p, arrays[p].ndim) != layers for p in paths):
        return Folded(path, (), "the layers of a scan share the norm, or the weight")
    free = [p for p in paths if flow.alone(p, found.nodes)]
    new, changed, reason = _neutral(_Norm(flow, found, weight, layers), arrays, paths, free)
    if not reason:
        arrays.update(new)
    return Folded(path, changed, reason)


class _Norm(NamedTuple):
    """A norm, as a function of its parameters."""

    flow: Flow
    tail: Tail
    weight: jax.Array
    layers: int

    def at(self, arrays: Mapping[str, jax.Array]) -> tuple[np.ndarray, np.ndarray]:
        """Its factors and summands."""
        shape = self.weight.shape[self.layers :]
        a, b = affine(self.flow, self.tail, arrays, shape)
        return np.asarray(a, np.float32), np.asarray(b, np.float32)


def _neutral(
    norm: _Norm, arrays: Arrays, paths: list[str], free: list[str]
) -> tuple[Arrays, tuple[str, ...], str]:
    """The weight times the factors, and parameters with which only a summand is left."""
    old = {path: arrays[path] for path in paths}
    a, b = norm.at(old)
    added = [path for path in norm.tail.added() if path in free]
    if np.allclose(a, 1.0, atol=1e-5):
        return {}, (), "its factors are 1 already"
    if not added:
        return {}, (), "no mean or bias of its own takes the summand up"
    if any(old[path].size != a.size for path in added):
        return {}, (), "its mean or bias is not one a channel"
    new = _without_factor(norm, old, [path for path in free if path not in added], a)
    if new is None:
        return {}, (), "no scale or variance of its own makes the factor 1"
    *rest, last = added
    new.update({path: jnp.zeros_like(old[path]) for path in rest})
    start = norm.at({**new, last: jnp.zeros_like(old[last])})[1]
    slope = norm.at({**new, last: jnp.ones_like(old[last])})[1] - start
    new[last] = _like(old[last], (b - start) / np.where(slope == 0, 1, slope))
    found_a, found_b = norm.at(new)
    size = 1e-5 * (1 + np.abs(b).max(initial=0))
    if not (np.allclose(found_a, 1, atol=1e-5) and np.allclose(found_b, b, atol=size)):
        return {}, (), "its parameters do not act channel by channel"
    factor = jnp.asarray(a).reshape(a.shape)
    new[norm.tail.product.path] = (norm.weight * factor).astype(norm.weight.dtype)
    changed = tuple(path for path in paths if np.any(np.asarray(new[path] != old[path])))
    return new, changed, ""


def _without_factor(
    norm: _Norm, old: Arrays, candidates: list[str], a: np.ndarray
) -> Arrays | None:
    """The parameters with a scale, or else a variance, for which the factor is 1."""
    fitting = [path for path in candidates if old[path].size == a.size]
    for path in fitting:  # a scale: the factor is linear in it
        one, zero, two = (
            norm.at({**old, path: jnp.full_like(old[path], value)})[0] for value in (1, 0, 2)
        )
        if not zero.any() and np.allclose(two, 2 * one, rtol=1e-5) and one.all():
            return {**old, path: _like(old[path], 1 / one)}
    for path in fitting:  # a variance: the factor is 1 / √(var + ε)
        most = norm.at({**old, path: jnp.zeros_like(old[path])})[0]
        with np.errstate(divide="ignore", invalid="ignore"):
            epsilon = 1 / np.square(most)
            wanted = 1 / np.sqrt(np.asarray(old[path], np.float32).reshape(a.shape) + epsilon)
        if np.allclose(a, wanted, rtol=1e-4) and (epsilon < 1).all():
            return {**old, path: _like(old[path], 1 - epsilon)}
    return None


def _like(old: jax.Array, values: np.ndarray) -> jax.Array:
    return jnp.asarray(values, jnp.float32).reshape(old.shape).astype(old.dtype)
