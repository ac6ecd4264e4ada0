"""A function as values and the operations between them, calls inlined, bodies of scans included.

What a search for neighbours needs of a jaxpr: of each value who makes it and who reads it. A scan
is entered: the slices of what it slices are values made by a `slice`. Its carry and results, and
whatever is inside other loops and branches, have no maker: nothing can be followed through them.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from jopt.trace import compat
from jopt.trace.program import Program

SLICE = "a scan's slice"


@dataclasses.dataclass(eq=False)
class Value:
    """One value of the function."""

    shape: tuple[int, ...]
    path: str | None = None  # of the parameter that it is
    unmade: str = "it is an input of the function"  # what it is, if nothing makes it
    maker: "Node | None" = None
    readers: list["Node"] = dataclasses.field(default_factory=list)
    result: bool = False  # the function returns it, or a body does


@dataclasses.dataclass(eq=False)
class Literal:
    """A number in the program."""

    value: Any

    @property
    def zero(self) -> bool:
        """Whether it is zero."""
        return getattr(self.value, "size", 1) == 1 and float(self.value) == 0.0


Atom = Value | Literal


@dataclasses.dataclass(eq=False)
class Node:
    """One operation."""

    name: str  # of the primitive; `SLICE` for what a scan slices
    params: dict[str, Any]
    inputs: tuple[Atom, ...]
    outputs: tuple[Value, ...]
    source: str


def dataflow(program: Program) -> tuple[list[Value], list[Node]]:
    """The values of the parameters, and all operations in order."""
    nodes: list[Node] = []
    jaxpr = compat.opened(program.jaxpr)[0]
    inputs = [
        Value(tuple(variable.aval.shape), operand.path if operand.parameter else None)
        for operand, variable in zip(program.operands, jaxpr.invars, strict=True)
    ]
    for value in _built(program.jaxpr, inputs, nodes):
        if isinstance(value, Value):
            value.result = True
    return [value for value in inputs if value.path is not None], nodes


def _built(jaxpr: Any, inputs: Sequence[Atom], nodes: list[Node]) -> list[Atom]:
    """Adds the operations of a body; returns its results."""
    jaxpr, constants = compat.opened(jaxpr)
    known: dict[Any, Atom] = dict(zip(jaxpr.invars, inputs, strict=True))
    for variable in jaxpr.constvars[: len(constants)]:
        known[variable] = Value(tuple(variable.aval.shape), unmade="it is a constant")

    def read(atom: Any) -> Atom:
        return Literal(atom.val) if isinstance(atom, compat.Literal) else known[atom]

    for equation in jaxpr.eqns:
        operands = [read(v) for v in equation.invars]
        if equation.primitive in compat.CALLS:
            results = _built(compat.body_of(equation), operands, nodes)
        elif equation.primitive == compat.SCAN:
            results = _scan(equation, operands, nodes)
        else:
            unmade = f"it comes out of `{equation.primitive}`"
            results = [Value(tuple(v.aval.shape), unmade=unmade) for v in equation.outvars]
            _add(nodes, equation, equation.primitive.name, operands, results)
        known.update(zip(equation.outvars, results, strict=True))
    return [read(v) for v in jaxpr.outvars]


def _scan(equation: Any, operands: Sequence[Atom], nodes: list[Node]) -> list[Atom]:
    split, carried = compat.scan_counts(equation)
    body = compat.opened(equation.params["jaxpr"])[0]
    inside = list(operands[:split])
    for variable in body.invars[split : split + carried]:
        inside.append(Value(tuple(variable.aval.shape), unmade="a scan carries it"))
    for operand, variable in zip(
        operands[split + carried :], body.invars[split + carried :], strict=True
    ):
        part = Value(tuple(variable.aval.shape))
        _add(nodes, equation, SLICE, [operand], [part])
        inside.append(part)
    for value in _built(equation.params["jaxpr"], inside, nodes):
        if isinstance(value, Value):
            value.result = True
    unmade = "it comes out of a `scan`"
    results = [Value(tuple(v.aval.shape), unmade=unmade) for v in equation.outvars]
    _add(nodes, equation, "scan", operands[split : split + carried], results)
    return list(results)


def _add(
    nodes: list[Node],
    equation: Any,
    name: str,
    operands: Sequence[Atom],
    results: Sequence[Value],
) -> None:
    node = Node(name, equation.params, tuple(operands), tuple(results), compat.source_of(equation))
    nodes.append(node)
    for operand in dict.fromkeys(o for o in operands if isinstance(o, Value)):
        operand.readers.append(node)
    for result in results:
        result.maker = node
