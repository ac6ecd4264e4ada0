"""A function as flat lists of equations, to follow what becomes of one value: bias, norm, pairs.

Calls and choices by platform are inlined; the body of each scan is a list of its own; other
constructs are one opaque equation. Values know which parameters they are made of. Nothing is bound
until `Flow.evaluate`.
"""

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax

from . import compat, origins
from .origins import Axes, Origin, Part, View
from .program import program
from .visit import _live


@dataclasses.dataclass(eq=False)
class Value:
    """A value of a flow."""

    shape: tuple[int, ...]
    dtype: Any
    view: View
    parameter: str | None = None  # the parameter that this is, seen otherwise at most
    made: "Node | None" = None
    literal: Any = None


@dataclasses.dataclass(eq=False)
class Node:
    """An equation of a flow."""

    equation: Any
    operands: tuple[Value, ...]
    results: tuple[Value, ...] = ()

    @property
    def name(self) -> str:
        """What it does, such as `add`."""
        return self.equation.primitive.name

    @property
    def constant(self) -> bool:
        """Whether it depends on parameters and constants alone."""
        return all(value.view.constant for value in self.operands)


@dataclasses.dataclass(eq=False)
class Flow:
    """The equations of a function, or of the body of a scan in it."""

    entered: dict[Value, Value | None]  # what is given, and what that is in the flow around
    around: "tuple[Flow, Node] | None" = None  # and the scan there
    nodes: list[Node] = dataclasses.field(default_factory=list)
    uses: dict[Value, list[Node]] = dataclasses.field(default_factory=dict)
    leaving: set[Value] = dataclasses.field(default_factory=set)

    def goes(self, value: Value) -> set[Node | None]:
        """The nodes that use a constant with data; None among them if it leaves the flow."""
        found: set[Node | None] = {None} if value in self.leaving else set()
        for node in self.uses.get(value, ()):
            if node.constant and node.name != compat.SCAN.name:
                for result in node.results:
                    found |= self.goes(result)
            else:
                found.add(node)
        return found

    def given(self, path: str) -> Value | None:
        """The parameter as it enters; None if it does not, or more than once."""
        values = [value for value in self.entered if value.parameter == path]
        return values[0] if len(values) == 1 else None

    def alone(self, path: str, nodes: Collection[Node]) -> bool:
        """Whether a parameter is used in this flow, by some of these nodes, and nowhere else."""
        value = self.given(path)
        if value is None or not self.goes(value) <= set(nodes):
            return False
        return self.around is None or self.around[0].alone(path, [self.around[1]])

    def layers(self, path: str, ndim: int) -> int:
        """How many leading axes of a parameter of that rank the scans around slice."""
        value = self.given(path)
        return 0 if value is None else ndim - len(value.shape)

    def evaluate(self, value: Value, arrays: Mapping[Value, Any]) -> Any:
        """A value computed from others."""
        known = dict(arrays)

        def compute(value: Value) -> Any:
            if value.literal is not None:
                return value.literal
            if value not in known:
                assert value.made is not None
                operands = [compute(operand) for operand in value.made.operands]
                results = compat.bind(value.made.equation, operands)
                known.update(zip(value.made.results, results, strict=True))
            return known[value]

        return compute(value)


def flows(
    apply: Callable[..., Any], params: Any, *inputs: Any, platform: str = "tpu"
) -> tuple[Flow, ...]:
    """The flow of `apply(params, *inputs)`, and one for the body of each scan in it.

    Args:
      apply: any function.
      params: its parameters; arrays may be `jax.ShapeDtypeStruct`s.
      *inputs: its other arguments.
      platform: whose branch is followed where a function differs from platform to platform.
    """
    traced, found = program(apply, (params, *inputs)), []
    jaxpr = compat.opened(traced.jaxpr)[0]
    values = [
        Value(
            v.aval.shape,
            v.aval.dtype,
            origins.parameter(o.path, v.aval) if o.parameter else origins.NOTHING,
            o.path if o.parameter else None,
        )
        for o, v in zip(traced.operands, jaxpr.invars, strict=True)
    ]
    flow = Flow(dict.fromkeys(values))
    found.append(flow)
    flow.leaving.update(_flatten(traced.jaxpr, values, flow, found, platform))
    return tuple(found)


def _flatten(
    jaxpr: Any, values: Sequence[Value], flow: Flow, found: list[Flow], platform: str
) -> list[Value]:
    jaxpr, constants = compat.opened(jaxpr)
    known = dict(zip(jaxpr.invars, values, strict=True))
    for variable, constant in zip(jaxpr.constvars, constants, strict=True):
        known[variable] = _literal(variable, constant)

    def read(atom: Any) -> Value:
        return _literal(atom, atom.val) if isinstance(atom, compat.Literal) else known[atom]

    for equation, wanted in zip(jaxpr.eqns, _live(jaxpr), strict=True):
        if wanted:
            results = _follow(equation, [read(v) for v in equation.invars], flow, found, platform)
            known.update(zip(equation.outvars, results, strict=True))
    return [read(v) for v in jaxpr.outvars]


def _literal(variable: Any, value: Any) -> Value:
    aval = variable.aval
    return Value(aval.shape, aval.dtype, origins.CONSTANT, literal=value)


def _follow(
    equation: Any, operands: Sequence[Value], flow: Flow, found: list[Flow], platform: str
) -> Sequence[Value]:
    primitive = equation.primitive
    if primitive in compat.CALLS:
        return _flatten(compat.body_of(equation), operands, flow, found, platform)
    if primitive is compat.COND and compat.branch_platforms(equation) is not None:
        branches = compat.branches_on(equation, platform)
        if len(branches) == 1:
            return _flatten(branches[0], operands[1:], flow, found, platform)
    node = Node(equation, tuple(operands))
    views = [operand.view for operand in operands]
    opaque = primitive in (compat.SCAN, compat.WHILE, compat.COND, compat.SHARD_MAP)
    seen = [origins.NOTHING] * len(equation.outvars) if opaque else origins.follow(equation, views)
    same = operands[0].parameter if operands and is_view(node) else None
    node.results = tuple(
        Value(v.aval.shape, v.aval.dtype, view, same, node)
        for v, view in zip(equation.outvars, seen, strict=True)
    )
    flow.nodes.append(node)
    for operand in dict.fromkeys(operands):
        flow.uses.setdefault(operand, []).append(node)
    if primitive is compat.SCAN:
        _scan(node, flow, found, platform)
    return node.results


def _scan(node: Node, flow: Flow, found: list[Flow], platform: str) -> None:
    split, carried = compat.scan_counts(node.equation)
    body = node.equation.params["jaxpr"]
    inside: dict[Value, Value | None] = {}
    for i, variable in enumerate(compat.opened(body)[0].invars):
        outer, aval = node.operands[i], variable.aval
        view = origins.NOTHING
        if not split <= i < split + carried:
            view = outer.view if i < split else origins.sliced(outer.view)
        path = outer.parameter if view is not origins.NOTHING and outer.made is None else None
        inside[Value(aval.shape, aval.dtype, view, path)] = outer
    inner = Flow(inside, (flow, node))
    found.append(inner)
    inner.leaving.update(_flatten(body, list(inside), inner, found, platform))


# Products, and the channels that come out of them.


def is_view(node: Node) -> bool:
    """Whether an equation only looks at its first operand differently, or casts it."""
    return len(node.operands) == 1 and (node.name in _VIEWS or node.name in origins._IDENTITIES)


_VIEWS = {"reshape", "transpose", "squeeze", "slice", "broadcast_in_dim"}


@dataclasses.dataclass(frozen=True)
class Product:
    """A product of data with a parameter, and how its result runs along the parameter's axes."""

    node: Node
    path: str
    weight: Value  # the operand
    side: int
    axes: Axes  # of the result: parts of the parameter's axes, counted from its end

    @property
    def result(self) -> Value:
        """What it computes."""
        return self.node.results[0]


def products(flow: Flow) -> list[Product]:
    """The `dot_general`s and convolutions of a flow that have one parameter for a weight."""
    found = []
    for node in flow.nodes:
        if node.name not in ("dot_general", "conv_general_dilated"):
            continue
        sides = [i for i, value in enumerate(node.operands[:2]) if value.parameter is not None]
        if len(sides) != 1 or node.operands[1 - sides[0]].view.constant:
            continue
        (side,) = sides
        weight = node.operands[side]
        axes = weight_axes(weight)
        if axes is not None and (result := _result_axes(node, side, axes)) is not None:
            assert weight.parameter is not None
            found.append(Product(node, weight.parameter, weight, side, result))
    return found


def weight_axes(value: Value) -> Axes | None:
    """How a parameter that is seen otherwise runs along its own axes; None where that is lost."""
    return value.view.origins[0].axes if len(value.view.origins) == 1 else None


def _result_axes(node: Node, side: int, axes: Axes) -> Axes | None:
    params, shape = node.equation.params, node.results[0].shape
    result: list[tuple[Part, ...]] = [(Part(None, size),) for size in shape]
    if node.name == "conv_general_dilated":
        numbers = params["dimension_numbers"]
        if side != 1 or params["batch_group_count"] != 1:
            return None
        result[numbers.out_spec[1]] = axes[numbers.rhs_spec[0]]
        return tuple(result)
    contract, batch = params["dimension_numbers"]
    free = [
        [a for a in range(len(value.shape)) if a not in (*contract[i], *batch[i])]
        for i, value in enumerate(node.operands)
    ]
    for place, axis in enumerate(batch[side]):
        result[place] = axes[axis]
    start = len(batch[side]) + (len(free[0]) if side == 1 else 0)
    for place, axis in enumerate(free[side], start):
        result[place] = axes[axis]
    return tuple(result)


def moved(node: Node, axes: Axes) -> Axes | None:
    """The axes of a view's result, from those of its operand; None where they are lost."""
    view = View((Origin("", axes, 0),), True)
    (found,) = origins.follow(node.equation, [view])
    return found.origins[0].axes if len(found.origins) == 1 else None


def channels(axes: Axes, shape: Sequence[int]) -> dict[int, tuple[int, ...]] | None:
    """For each axis of a value, the axes of the parameter (of that shape) that it runs along.

    None where one is there in part only, or in pieces, whose order is not known.
    """
    found: dict[int, tuple[int, ...]] = {}
    whole: list[int] = []
    for place, parts in enumerate(axes):
        real = [part for part in parts if part.axis is not None and part.size != 1]
        if any(part.axis is None and part.size != 1 for part in parts) and real:
            return None
        if any(shape[part.axis] != part.size for part in real):  # pyright: ignore
            return None
        if real:
            found[place] = tuple(part.axis for part in real if part.axis is not None)
            whole += found[place]
    return found if whole and len(set(whole)) == len(whole) else None


def per_channel(value: Value, places: Collection[int]) -> bool:
    """Whether a constant is the same along all axes but `places`."""
    if value.literal is not None:
        return value.shape == ()
    return (
        value.view.constant
        and all(
            origin.axes is not None
            and len(origin.axes) == len(value.shape)
            and all(
                part.axis is None or part.size == 1
                for place, parts in enumerate(origin.axes)
                if place not in places
                for part in parts
            )
            for origin in value.view.origins
        )
        and _grounded(value)
    )


def _grounded(value: Value) -> bool:
    """Whether a constant is made of parameters and scalars alone."""
    if value.literal is not None:
        return value.shape == ()
    if value.made is None:
        return True
    return bool(value.made.operands) and all(map(_grounded, value.made.operands))


def onto_weight(array: jax.Array, places: Mapping[int, Sequence[int]], shape: Any) -> jax.Array:
    """The entries of a value, the same along all axes but `places`, with the weight's rank."""
    index = tuple(slice(None) if place in places else 0 for place in range(array.ndim))
    axes = [axis for place in sorted(places) for axis in places[place]]
    flat = array[index].reshape([shape[axis] for axis in axes])
    order = sorted(range(len(axes)), key=lambda i: axes[i] % len(shape))
    kept = [axis % len(shape) for axis in axes]
    return flat.transpose(order).reshape([n if i in kept else 1 for i, n in enumerate(shape)])
