"""What each operation entails when one of its values shall have a factor for each channel.

A rule looks at which operands and results have wishes, and adds what follows from them; one that
would not keep its results raises `Stuck`. An operation without a rule ends the search.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from .dataflow import SLICE, Literal, Node, Value
from .wishes import Search, Stuck, Wish


def _alike(search: Search, node: Node) -> None:
    """All operands and the result go together."""
    (out,) = node.outputs
    dtype = node.params.get("new_dtype", np.float32)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise Stuck(f"`{node.name}` to {dtype} ({node.source})")
    for value in (*node.inputs, out):
        if isinstance(value, Value) and value in search.wishes:
            for other in (*node.inputs, out):
                search.wish(node, other, search.wishes[value])
            return


def _quotient(search: Search, node: Node) -> None:
    top, bottom = node.inputs
    if isinstance(bottom, Value) and bottom in search.wishes:
        raise Stuck(f"`div` by the activation ({node.source})")
    _pair(search, node, top, node.outputs[0])


def _pair(search: Search, node: Node, one: Any, other: Any) -> None:
    for value, partner in ((one, other), (other, one)):
        if isinstance(value, Value) and value in search.wishes:
            search.wish(node, partner, search.wishes[value])


def _select(search: Search, node: Node) -> None:
    which, *cases = node.inputs
    if isinstance(which, Value) and which in search.wishes:
        raise Stuck(f"`select_n` by the activation ({node.source})")
    _alike(search, dataclasses.replace(node, inputs=tuple(cases)))


def _comparison(search: Search, node: Node) -> None:
    """A factor above zero does not change on which side of zero a value is."""
    one, other = node.inputs
    if node.outputs[0] in search.wishes:
        raise Stuck(f"`{node.name}` makes it ({node.source})")
    if not (_is_zero(one) or _is_zero(other)):
        raise Stuck(f"`{node.name}` with other than zero ({node.source})")


def _is_zero(atom: Any) -> bool:
    if isinstance(atom, Literal):
        return atom.zero
    maker = atom.maker
    return maker is not None and maker.name == "broadcast_in_dim" and _is_zero(maker.inputs[0])


def _mapped(axes: Callable[[Node], Sequence[tuple[int, int]]]) -> Callable[[Search, Node], None]:
    """A rule from which axis of the first operand becomes which of the result."""

    def rule(search: Search, node: Node) -> None:
        source, (out,) = node.inputs[0], node.outputs
        pairs = list(axes(node))
        if isinstance(source, Literal):
            if out in search.wishes:
                search.wish(node, source, search.wishes[out])
            return
        forth = {a - len(source.shape): b - len(out.shape) for a, b in pairs}
        back = {b: a for a, b in forth.items()}
        for value, other, move in ((source, out, forth), (out, source, back)):
            if (wish := search.wishes.get(value)) is not None:
                if any(axis not in move for axis in wish.axes):
                    raise Stuck(f"`{node.name}` of the channels ({node.source})")
                moved = tuple(move[axis] for axis in wish.axes)
                search.wish(node, other, wish._replace(axes=moved))

    return rule


def _broadcast(node: Node) -> Any:
    source, out = node.inputs[0], node.outputs[0]
    for axis, to in enumerate(node.params["broadcast_dimensions"]):
        if isinstance(source, Value) and source.shape[axis] == out.shape[to]:
            yield axis, to


def _transpose(node: Node) -> Any:
    return ((axis, to) for to, axis in enumerate(node.params["permutation"]))


def _squeeze(node: Node) -> Any:
    gone, rank = node.params["dimensions"], len(_shape(node))
    return ((axis, to) for to, axis in enumerate(a for a in range(rank) if a not in gone))


def _reduce(node: Node) -> Any:
    gone, rank = node.params["axes"], len(_shape(node))
    return ((axis, to) for to, axis in enumerate(a for a in range(rank) if a not in gone))


def _whole(node: Node) -> Any:
    """Axes that keep their length; another one is cut, padded or joined along."""
    sizes = zip(_shape(node), node.outputs[0].shape, strict=True)
    return ((axis, axis) for axis, (size, out) in enumerate(sizes) if size == out)


def _slice(search: Search, node: Node) -> None:
    """What a scan slices: s then differs from layer to layer."""
    (whole,), (part,) = node.inputs, node.outputs
    if isinstance(whole, Value) and (wish := search.wishes.get(whole)) is not None:
        if not wish.stack:
            raise Stuck(f"a scan slices what shall have one factor for all layers ({node.source})")
        search.wish(node, part, wish._replace(stack=wish.stack - 1))
    if (wish := search.wishes.get(part)) is not None:
        search.wish(node, whole, wish._replace(stack=wish.stack + 1))


def _concatenate(search: Search, node: Node) -> None:
    axis = node.params["dimension"] - len(node.outputs[0].shape)
    for value in (*node.inputs, *node.outputs):
        wish = search.wishes.get(value) if isinstance(value, Value) else None
        if wish is not None and axis in wish.axes:
            raise Stuck(f"`concatenate` along the channels ({node.source})")
    _alike(search, node)


def _pad(search: Search, node: Node) -> None:
    if not _is_zero(node.inputs[1]):
        raise Stuck(f"`pad` with other than zero ({node.source})")
    _mapped(_whole)(search, node)


def _reshape(search: Search, node: Node) -> None:
    source, (out,) = node.inputs[0], node.outputs
    if isinstance(source, Literal) or node.params.get("dimensions") is not None:
        raise Stuck(f"`reshape` in another order ({node.source})")
    for value, other in ((source, out), (out, source)):
        if (wish := search.wishes.get(value)) is not None:
            axes = _regrouped(value.shape, other.shape, wish.axes)
            if axes is None:
                raise Stuck(f"`reshape` of the channels with other axes ({node.source})")
            search.wish(node, other, wish._replace(axes=axes))


def _regrouped(
    shape: tuple[int, ...], new: tuple[int, ...], axes: tuple[int, ...]
) -> tuple[int, ...] | None:
    """The axes that hold after a reshape what consecutive `axes` held before."""
    places = [axis % len(shape) for axis in axes]
    if places != list(range(places[0], places[0] + len(places))) or 0 in shape:
        between = shape[places[0] : places[-1] + 1]
        if places != sorted(places) or math.prod(between) != math.prod(shape[p] for p in places):
            return None
    outer, inner = math.prod(shape[: places[0]]), math.prod(shape[places[-1] + 1 :])
    found = [
        i
        for i, size in enumerate(new)
        if size != 1 and math.prod(new[:i]) >= outer and math.prod(new[i + 1 :]) >= inner
    ]
    if not found or math.prod(new[: found[0]]) != outer:
        return None
    if math.prod(new[found[-1] + 1 :]) != inner:
        return None
    return tuple(i - len(new) for i in found)


def _dot(search: Search, node: Node) -> None:
    """Channels kept go with the result; channels summed over, inversely with the other side."""
    (out,), sides = node.outputs, _sides(node)
    for k, value in enumerate(node.inputs):
        wish = search.wishes.get(value) if isinstance(value, Value) else None
        if wish is None:
            continue
        places = {axis % len(_shape(node, k)) for axis in wish.axes}
        summed = bool(places & sides[k].summed.keys())
        if not summed and not places & sides[k].free.keys():
            raise Stuck(f"`dot_general` with the channels as a batch ({node.source})")
        move = sides[k].summed | sides[k].shared if summed else sides[k].kept
        rank = len(_shape(node, 1 - k)) if summed else len(out.shape)
        if not places <= move.keys():
            raise Stuck(f"`dot_general` over a part of the channels ({node.source})")
        axes = tuple(move[axis % len(_shape(node, k))] - rank for axis in wish.axes)
        power = -wish.power if summed else wish.power
        search.wish(node, node.inputs[1 - k] if summed else out, Wish(axes, power, wish.stack))
    if (wish := search.wishes.get(out)) is not None:
        places = {axis % len(out.shape) for axis in wish.axes}
        for k, side in enumerate(sides):
            back = {to: axis for axis, to in side.kept.items()}
            if places <= back.keys() and any(back[p] in side.free for p in places):
                rank = len(_shape(node, k))
                axes = tuple(back[axis % len(out.shape)] - rank for axis in wish.axes)
                search.wish(node, node.inputs[k], wish._replace(axes=axes))
                return
        raise Stuck(f"`dot_general` makes the channels of both sides ({node.source})")


class _Side(NamedTuple):
    """Where each axis of one operand of a `dot_general` goes."""

    summed: dict[int, int]  # to the axis of the other operand
    shared: dict[int, int]  # likewise, batch axes
    free: dict[int, int]  # to the axis of the result
    kept: dict[int, int]  # likewise, batch axes and free ones


def _sides(node: Node) -> list[_Side]:
    summed, shared = node.params["dimension_numbers"]
    start, sides = len(shared[0]), []
    for k in (0, 1):
        taken = (*summed[k], *shared[k])
        free = [axis for axis in range(len(_shape(node, k))) if axis not in taken]
        onto = {axis: start + i for i, axis in enumerate(free)}
        start += len(free)
        batch = {axis: i for i, axis in enumerate(shared[k])}
        sums, shares = (dict(zip(pair[k], pair[1 - k], strict=True)) for pair in (summed, shared))
        sides.append(_Side(sums, shares, onto, batch | onto))
    return sides


def _conv(search: Search, node: Node) -> None:
    (image, kernel), (out,), numbers = node.inputs, node.outputs, node.params["dimension_numbers"]
    if node.params["feature_group_count"] != 1 or node.params["batch_group_count"] != 1:
        raise Stuck(f"a convolution in groups ({node.source})")
    rank = len(out.shape)
    features = {
        image: (numbers.lhs_spec[1] - rank, kernel, numbers.rhs_spec[1] - rank, -1),
        kernel: (numbers.rhs_spec[0] - rank, out, numbers.out_spec[1] - rank, 1),
        out: (numbers.out_spec[1] - rank, kernel, numbers.rhs_spec[0] - rank, 1),
    }
    ways = [(value, *way) for value, way in features.items()]
    ways.append((kernel, numbers.rhs_spec[1] - rank, image, numbers.lhs_spec[1] - rank, -1))
    for value in (image, kernel, out):
        wish = search.wishes.get(value) if isinstance(value, Value) else None
        if wish is None:
            continue
        way = [w for w in ways if w[0] is value and wish.axes == (w[1],)]
        if not way:
            raise Stuck(f"a convolution over the channels ({node.source})")
        _, _, other, axis, sign = way[0]
        search.wish(node, other, Wish((axis,), sign * wish.power, wish.stack))


def _shape(node: Node, operand: int = 0) -> tuple[int, ...]:
    value = node.inputs[operand]
    return value.shape if isinstance(value, Value) else ()


_ALIKE = (
    *("add", "sub", "add_any", "max", "min", "neg", "abs", "copy", "name", "stop_gradient"),
    *("convert_element_type", "reduce_precision", "sharding_constraint"),
)
RULES: dict[str, Callable[[Search, Node], None]] = {
    **dict.fromkeys(_ALIKE, _alike),
    **dict.fromkeys(("gt", "ge", "lt", "le"), _comparison),
    **dict.fromkeys(("reduce_sum", "reduce_max", "reduce_min"), _mapped(_reduce)),
    "slice": _mapped(_whole),
    "div": _quotient,
    "select_n": _select,
    "broadcast_in_dim": _mapped(_broadcast),
    "transpose": _mapped(_transpose),
    "squeeze": _mapped(_squeeze),
    "reshape": _reshape,
    "concatenate": _concatenate,
    "pad": _pad,
    "dot_general": _dot,
    "conv_general_dilated": _conv,
    SLICE: _slice,
}
