"""What is added to and multiplied with a product's result, channel by channel: bias and norms."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .flow import Flow, Node, Product, Value, channels, is_view, moved, onto_weight, per_channel
from .origins import Axes, Part

_POOLS = ("reduce_window_max", "reduce_max")


class Tail(NamedTuple):
    """Equations that a product's result goes through, one after the other, and no other way."""

    product: Product
    nodes: tuple[Node, ...]
    end: Value
    axes: Axes  # of the end, in terms of the weight's axes

    def added(self) -> list[str]:
        """The parameters that are added or subtracted as they are, in order."""
        return [
            value.parameter
            for node in self.nodes
            if node.name in ("add", "sub")
            for value in node.operands
            if value.parameter is not None
        ]

    def made_of(self) -> list[Value]:
        """What enters the flow and goes into the constants of the tail, in order."""
        found: dict[Value, None] = {}

        def collect(value: Value) -> None:
            if value.literal is None and value.made is None:
                found[value] = None
            for operand in value.made.operands if value.made is not None else ():
                collect(operand)

        for node in self.nodes:
            for value in node.operands:
                if value.view.constant:
                    collect(value)
        return list(found)


def tail(
    flow: Flow,
    product: Product,
    shape: tuple[int, ...],
    *,
    pools: bool = False,
    until: Node | None = None,
) -> Tail:
    """What follows a product: views, sums and products with constants of its channels.

    Args:
      flow: where the product is.
      product: one of `products(flow)`.
      shape: of the weight, as it is in `params`.
      pools: whether a maximum over other axes than channels may be among it.
      until: an equation before which it ends.
    """
    nodes, value, axes = [], product.result, product.axes
    while value not in flow.leaving and len(users := flow.uses.get(value, ())) == 1:
        (node,) = users
        if node is until:
            break
        after = _after(node, value, axes, shape, pools)
        if after is None or channels(after, shape) is None:
            break
        nodes.append(node)
        value, axes = node.results[0], after
    return Tail(product, tuple(nodes), value, axes)


def _after(
    node: Node, value: Value, axes: Axes, shape: tuple[int, ...], pools: bool
) -> Axes | None:
    """The axes of what an equation makes of a product's result, if it is one that is known."""
    places = channels(axes, shape)
    if places is None or len(node.results) != 1:
        return None
    result = node.results[0]
    if not jnp.issubdtype(result.dtype, jnp.floating):
        return None
    if is_view(node):
        return moved(node, axes)
    if node.name in ("add", "sub", "mul", "div"):
        others = [other for other in node.operands if other is not value]
        fits = len(others) == 1 and per_channel(others[0], places) and result.shape == value.shape
        if fits and not (node.name == "div" and node.operands[0] is not value):
            return axes
    if pools and node.name in _POOLS:
        return pooled(node, axes, places)
    return None


def pooled(node: Node, axes: Axes, places: Mapping[int, Any]) -> Axes | None:
    """The axes after a reduction over windows, or over axes, that are no channels."""
    params, shape = node.equation.params, node.results[0].shape
    if "axes" in params:
        if set(params["axes"]) & set(places):
            return None
        return tuple(parts for i, parts in enumerate(axes) if i not in params["axes"])
    if any(params["window_dimensions"][place] != 1 for place in places):
        return None
    if any(params["padding"][place] != (0, 0) for place in places):
        return None
    if any(params["window_strides"][place] != 1 for place in places):
        return None
    if any(params[name][place] != 1 for name in _DILATIONS for place in places):
        return None
    return tuple(axes[i] if i in places else (Part(None, size),) for i, size in enumerate(shape))


_DILATIONS = ("base_dilation", "window_dilation")


def affine(
    flow: Flow, tail: Tail, arrays: Mapping[str, jax.Array], shape: tuple[int, ...]
) -> tuple[jax.Array, jax.Array]:
    """What a tail without pools does, `y ↦ a y + b`: `(a, b)` with the weight's rank.

    Args:
      flow: where the tail is.
      tail: of a product.
      arrays: the parameters that it is made of, by path, as they are in `params`.
      shape: of the weight, without the leading axes that scans slice.
    """
    entered = {value: arrays[value.parameter or ""] for value in tail.made_of()}
    slices = {value: array.ndim - len(value.shape) for value, array in entered.items()}

    def one(entered: Mapping[Value, jax.Array]) -> Any:
        result = tail.product.result
        places = channels(tail.axes, shape) or {}

        def run(y: jax.Array) -> jax.Array:
            return flow.evaluate(tail.end, {**entered, result: y})

        zeros = jnp.zeros(result.shape, result.dtype)
        b, a = jax.jvp(run, (zeros,), (jnp.ones_like(zeros),))
        return onto_weight(a, places, shape), onto_weight(b, places, shape)

    values = list(entered)
    mapped: Any = lambda arrays: one(dict(zip(values, arrays, strict=True)))  # noqa: E731
    for depth in range(max(slices.values(), default=0)):
        mapped = jax.vmap(mapped, in_axes=([0 if slices[v] > depth else None for v in values],))
    return mapped([entered[value] for value in values])
