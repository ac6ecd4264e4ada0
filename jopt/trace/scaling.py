"""Which arrays a channel of a product reaches, through operations that pass a factor on.

An operation passes a positive factor on if f(s·x) = s·f(x). What depends on x but not on s, such as
x > 0, is like any other data.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp

from . import compat
from .flow import Flow, Node, Product, Value, channels, is_view, moved, weight_axes
from .origins import Axes
from .tails import pooled


class Reader(NamedTuple):
    """An array that channels run along."""

    path: str
    node: Node
    match: dict[int, int]  # axes of the product's weight to axes of the array, from the end


class Scaled(NamedTuple):
    """What must be scaled for a factor in the channels of a product to cancel."""

    readers: tuple[Reader, ...]  # weights, times the inverse
    biases: tuple[Reader, ...]  # what is added on the way, times the factor


def scaled(flow: Flow, product: Product, shape: tuple[int, ...]) -> Scaled | str:
    """Follows the channels of a product to the weights that read them, or says why it cannot.

    Args:
      flow: where the product is.
      product: one of `products(flow)`.
      shape: of its weight, without the leading axes that scans slice.
    """
    reached: dict[Value, Axes] = {product.result: product.axes}
    readers: list[Reader] = []
    biases: list[Reader] = []
    for node in flow.nodes:
        if not any(value in reached for value in node.operands):
            continue
        if (reader := _reader(node, reached, shape)) is not None:
            readers.append(reader)
            continue
        if (bias := added(node, reached, shape)) is not None:
            biases.append(bias)
            reached[node.results[0]] = _axes(node, reached)
            continue
        after = _after(node, reached, shape)
        if after == "free":
            continue
        if after is None or isinstance(after, str) or channels(after, shape) is None:
            return f"its channels meet `{node.name}` ({compat.source_of(node.equation)})"
        reached[node.results[0]] = after
    if any(value in reached for value in flow.leaving):
        return "its channels leave the function, or the body of a loop"
    return Scaled(tuple(readers), tuple(biases))


def _axes(node: Node, reached: dict[Value, Axes]) -> Axes:
    return next(reached[value] for value in node.operands if value in reached)


def _after(node: Node, reached: dict[Value, Axes], shape: tuple[int, ...]) -> Axes | str | None:
    """The axes of a result that passes the factor on; "free" if it does not depend on it."""
    axes = _axes(node, reached)
    places = channels(axes, shape)
    if places is None or len(node.results) != 1:
        return None
    result = node.results[0]
    mine = [value in reached for value in node.operands]

    def alike(value: Value) -> bool:
        """Whether a factor in this operand is the same as in the others."""
        return value in reached and channels(reached[value], shape) == places

    if node.name in _COMPARE:
        fine = all(alike(v) or _zero(v) for v in node.operands)
        return "free" if fine else None
    if node.name == "sign":
        return "free"
    if not jnp.issubdtype(result.dtype, jnp.floating):
        return None
    if is_view(node):
        return moved(node, axes)
    if node.name in ("neg", "abs"):
        return axes
    if node.name in ("max", "min", "add", "sub"):
        return axes if all(alike(v) or _zero(v) for v in node.operands) else None
    if node.name == "mul":
        return axes if sum(mine) == 1 else None
    if node.name == "div":
        return axes if mine == [True, False] else None
    if node.name == "select_n":
        fine = not mine[0] and all(alike(v) or _zero(v) for v in node.operands[1:])
        return axes if fine else None
    if node.name in _POOLS and sum(mine) == 1 and len(mine) == 1:
        return pooled(node, axes, places)
    if node.name == "pad" and mine == [True, False] and _zero(node.operands[1]):
        padding = node.equation.params["padding_config"]
        return axes if all(tuple(padding[place]) == (0, 0, 0) for place in places) else None
    return None


_COMPARE = ("gt", "ge", "lt", "le", "eq", "ne")
_POOLS = (
    *("reduce_window_max", "reduce_window_min", "reduce_window_sum"),
    *("reduce_max", "reduce_min", "reduce_sum"),
)


def _zero(value: Value) -> bool:
    """Whether a value is known to be zero."""
    if value.literal is not None:
        return value.shape == () and float(value.literal) == 0
    made: Any = value.made
    return made is not None and is_view(made) and _zero(made.operands[0])


def added(node: Node, reached: dict[Value, Axes], shape: tuple[int, ...]) -> Reader | None:
    """The parameter that an equation adds or subtracts channel by channel, if it does."""
    if node.name not in ("add", "sub") or len(node.operands) != 2:
        return None
    others = [value for value in node.operands if value not in reached]
    if len(others) != 1 or others[0].parameter is None:
        return None
    axes, mine = weight_axes(others[0]), _axes(node, reached)
    places = channels(mine, shape)
    if axes is None or places is None or len(axes) != len(mine):
        return None
    match: dict[int, int] = {}
    for place, parts in enumerate(axes):
        real = [part for part in parts if part.axis is not None and part.size != 1]
        wanted = places.get(place, ())
        sizes = tuple(part.size for part in real)
        if sizes != tuple(shape[axis] for axis in wanted):
            return None
        match.update(zip(wanted, [part.axis or 0 for part in real], strict=True))
    return Reader(others[0].parameter, node, match)


def _reader(node: Node, reached: dict[Value, Axes], shape: tuple[int, ...]) -> Reader | None:
    """A product whose weight sums over all channels."""
    if node.name not in ("dot_general", "conv_general_dilated"):
        return None
    sides = [i for i, value in enumerate(node.operands) if value in reached]
    if len(sides) != 1 or node.operands[1 - sides[0]].parameter is None:
        return None
    (side,) = sides
    weight = node.operands[1 - side]
    axes, places = weight_axes(weight), channels(reached[node.operands[side]], shape)
    if axes is None or places is None:
        return None
    pairs = _along(node, side)
    match: dict[int, int] = {}
    for place, wanted in places.items():
        if place not in pairs:
            return None
        real = [p for p in axes[pairs[place]] if p.axis is not None and p.size != 1]
        if tuple(part.size for part in real) != tuple(shape[axis] for axis in wanted):
            return None
        match.update(zip(wanted, [part.axis or 0 for part in real], strict=True))
    if len(set(match.values())) != len(match):
        return None
    return Reader(weight.parameter or "", node, match)


def _along(node: Node, side: int) -> dict[int, int]:
    """The axes of a product's operand that meet an axis of the other one entry by entry."""
    params = node.equation.params
    if node.name == "dot_general":
        contract, batch = params["dimension_numbers"]
        return {
            **dict(zip(contract[side], contract[1 - side], strict=True)),
            **dict(zip(batch[side], batch[1 - side], strict=True)),
        }
    numbers, groups = params["dimension_numbers"], params["feature_group_count"]
    if side != 0 or params["batch_group_count"] != 1:
        return {}
    feature, kernel = numbers.lhs_spec[1], node.operands[1].shape
    if groups == 1:
        return {feature: numbers.rhs_spec[1]}
    # Depthwise: each channel has one kernel of its own.
    own = groups == node.operands[0].shape[feature] == kernel[numbers.rhs_spec[0]]
    return {feature: numbers.rhs_spec[0]} if own else {}
