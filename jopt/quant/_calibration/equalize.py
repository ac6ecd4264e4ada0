"""Cross-layer equalization: what a channel of one weight gives up in range, the next one takes."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jopt import trees
from jopt.trace import reductions
from jopt.trace.flow import Flow, Node, Product, channels, flows, products
from jopt.trace.scaling import Reader, Scaled, scaled

PyTree = Any


class Equalized(NamedTuple):
    """What became of one weight and those that read its channels."""

    first: str  # path of the weight whose channels are divided
    second: tuple[str, ...]  # paths of the weights that are multiplied
    biases: tuple[str, ...]  # paths of the biases that are divided
    scale: np.ndarray | None  # by what, with the rank of the first weight
    reason: str  # why nothing was done; empty if it was


def equalize(
    apply: Callable[..., Any],
    params: PyTree,
    *inputs: Any,
    pairs: Sequence[tuple[str, str]] | None = None,
    iterations: int = 20,
) -> tuple[PyTree, tuple[Equalized, ...]]:
    """Evens out the ranges of channels from weight to weight; the function stays the same.

    Where the channels of W₁ reach W₂ through nothing but operations with f(s·x) = s·f(x) for s > 0
    (ReLU, leaky ReLU, maximum and average over windows, reshapes, products with other values), with
    r₁, r₂ the largest magnitudes of a channel in W₁ and W₂,

        s = √(r₁ r₂) / r₂,    W₁ ← W₁ / s,   b₁ ← b₁ / s,   W₂ ← W₂ · s

    so that both ranges are √(r₁ r₂). Done for all pairs in turn until nothing moves. Found in the
    jaxpr, in any framework, and layer by layer under scans over stacked layers. Fold batch norms
    first (`jopt.nn.fold_batch_norm`).

    It pays for weights with one scale for the whole tensor, and for activations, which have one
    anyway. A weight with a scale for each output channel gains nothing as W₁.

    Args:
      apply: any function, at inference.
      params: its parameters, arrays.
      *inputs: its other arguments; shapes will do (`jax.ShapeDtypeStruct`).
      pairs: `(path of W₁, path of W₂)`s to equalize and no others. Default: all that are found.
      iterations: how often at most all pairs are gone through.

    Returns:
      `(params, report)`: the parameters, and an `Equalized` for each product's weight, with the
      reason where nothing was done.

    Raises:
      ValueError: if a pair asked for cannot be equalized, with the reason.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jopt import quant
      >>> apply = lambda p, x: jax.nn.relu(x @ p["up"]) @ p["down"]
      >>> params = {"up": jnp.array([[1.0, 16.0]]), "down": jnp.ones((2, 1))}
      >>> params, report = quant.equalize(apply, params, jnp.ones((1, 1)))
      >>> params["up"].tolist(), params["down"].tolist()
      ([[1.0, 4.0]], [[1.0], [4.0]])

    References:
      Markus Nagel, Mart van Baalen, Tijmen Blankevoort, Max Welling, Data-free quantization through
      weight equalization and bias correction, 2019, arXiv:1906.04721.
    """
    arrays = {p: x for p, x in trees.items(params) if not trees.is_typed(x) and hasattr(x, "ndim")}
    found = [
        _link(flow, product, arrays)
        for flow in flows(apply, params, *inputs)
        for product in products(flow)
    ]
    if pairs is not None:
        _check(pairs, found)
    asked = None if pairs is None else {first for first, _ in pairs}
    report, links = [], []
    for link in found:
        if isinstance(link, Equalized):
            report.append(link)
        elif asked is not None and link.first not in asked:
            report.append(Equalized(link.first, (), (), None, "not among `pairs`"))
        else:
            links.append(link)
    totals = {link.first: jnp.ones(()) for link in links}
    for _ in range(iterations):
        steps = [_even(link, arrays, totals) for link in links]
        if max(steps, default=0.0) < 1e-3:
            break
    report += [
        Equalized(k.first, tuple(k.second), tuple(k.biases), np.asarray(totals[k.first]), "")
        for k in links
    ]
    order = {link.first: -i for i, link in enumerate(reversed(found))}
    report.sort(key=lambda row: order[row.first])
    return trees.map_with_path(lambda path, leaf: arrays.get(path, leaf), params), tuple(report)


# Pairs.

Match = dict[int, int]  # axes of the first weight to those of another array, from the end


class _Link(NamedTuple):
    """A weight, and the arrays that its channels run along."""

    first: str
    axes: tuple[int, ...]  # of its channels, from the end
    layers: int  # leading axes over which layers are stacked
    second: Mapping[str, Match]
    biases: Mapping[str, Match]


def _link(flow: Flow, product: Product, arrays: Mapping[str, jax.Array]) -> _Link | Equalized:
    """How a product's channels go on, or why they cannot be scaled."""

    def no(reason: str) -> Equalized:
        return Equalized(product.path, (), (), None, reason)

    path = product.path
    if path not in arrays:
        return no("it is a typed leaf already")
    layers = flow.layers(path, arrays[path].ndim)
    places = channels(product.axes, arrays[path].shape[layers:])
    if places is None:
        return no("its channels are rearranged before the product")
    found = scaled(flow, product, arrays[path].shape[layers:])
    if isinstance(found, str):
        return no(found)
    if why := _shared(flow, product.node, path, found, arrays, layers):
        return no(why)
    axes = tuple(axis for place in sorted(places) for axis in places[place])
    second = {reader.path: reader.match for reader in found.readers}
    return _Link(path, axes, layers, second, {bias.path: bias.match for bias in found.biases})


def _shared(
    flow: Flow,
    node: Node,
    path: str,
    found: Scaled,
    arrays: Mapping[str, jax.Array],
    layers: int,
) -> str:
    """Why scaling one array would change another function as well; empty if it would not."""
    if not flow.alone(path, [node]):
        return "it is used elsewhere as well"
    if not found.readers:
        return "no weight reads its channels"
    every: list[Reader] = [*found.readers, *found.biases]
    if len({one.path for one in every} | {path}) <= len(every):
        return "its channels meet one array several times"
    for one in every:
        if one.path not in arrays:
            return f"`{one.path}` is a typed leaf already"
        if not flow.alone(one.path, [one.node]):
            return f"`{one.path}` is used elsewhere as well"
        if flow.layers(one.path, arrays[one.path].ndim) != layers:
            return f"layers share it, or `{one.path}`"
        sizes = [(arrays[path].shape[a], arrays[one.path].shape[b]) for a, b in one.match.items()]
        if any(here != there for here, there in sizes):
            return f"its channels are a part of `{one.path}`"
    return ""


def _check(pairs: Sequence[tuple[str, str]], found: Sequence[_Link | Equalized]) -> None:
    known = {link.first: link for link in found}
    for first, second in pairs:
        link = known.get(first)
        if link is None:
            raise ValueError(
                f"`equalize(..., pairs=...)`: `{first}` is the weight of no product. Weights are "
                f"{', '.join(f'`{path}`' for path in known)}."
            )
        if isinstance(link, Equalized):
            raise ValueError(f"`equalize(..., pairs=...)`: `{first}`: {link.reason}.")
        if second not in link.second:
            raise ValueError(
                f"`equalize(..., pairs=...)`: `{second}` does not read the channels of `{first}`; "
                f"{', '.join(f'`{path}`' for path in link.second)} does."
            )


# Scales.


def _even(link: _Link, arrays: dict[str, jax.Array], totals: dict[str, jax.Array]) -> float:
    """Equalizes one pair in `arrays`; returns how far the scales are from 1, as a logarithm."""
    weight = arrays[link.first]
    own = _largest(weight, link.axes, link.layers)
    shape = own.shape
    theirs = jnp.zeros(shape, jnp.float32)
    for path, match in link.second.items():
        other = _largest(arrays[path], tuple(match.values()), link.layers)
        back = {there: here for here, there in match.items()}
        theirs = jnp.maximum(theirs, laid(other, back, len(shape), link.layers))
    fits = (own > 0) & (theirs > 0) & jnp.isfinite(own) & jnp.isfinite(theirs)
    scale = jnp.where(fits, jnp.sqrt(jnp.where(fits, own, 1) / jnp.where(fits, theirs, 1)), 1.0)
    totals[link.first] = scale * totals[link.first]
    arrays[link.first] = _times(weight, 1 / scale)
    for path, match in (*link.biases.items(), *link.second.items()):
        here = laid(scale, match, arrays[path].ndim, link.layers)
        arrays[path] = _times(arrays[path], here if path in link.second else 1 / here)
    return float(jnp.max(jnp.abs(jnp.log(scale)), initial=0.0))


def _times(array: jax.Array, scale: jax.Array) -> jax.Array:
    return (jnp.asarray(array).astype(jnp.float32) * scale).astype(array.dtype)


def _largest(array: jax.Array, axes: Sequence[int], layers: int) -> jax.Array:
    """The largest magnitude of each channel, of the array's rank."""
    kept = {*range(layers), *(axis % array.ndim for axis in axes)}
    rest = tuple(axis for axis in range(array.ndim) if axis not in kept)
    return reductions.largest(jnp.asarray(array), rest, keepdims=True)


def laid(scale: jax.Array, match: Match, ndim: int, layers: int) -> jax.Array:
    """Scales of channels laid along the axes that match, with another rank."""
    here = [axis % scale.ndim for axis in match]
    order = sorted(match, key=lambda axis: match[axis] % ndim)
    rest = tuple(a for a in range(layers, scale.ndim) if a not in here)
    squeezed = jnp.squeeze(scale, rest)
    left = sorted(here)
    moved = squeezed.transpose(
        *range(layers), *(layers + left.index(axis % scale.ndim) for axis in order)
    )
    shape = [1] * ndim
    shape[:layers] = moved.shape[:layers]
    for axis, size in zip(order, moved.shape[layers:], strict=True):
        shape[match[axis]] = size
    return moved.reshape(shape)
