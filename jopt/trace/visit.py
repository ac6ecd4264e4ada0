"""A walk over all equations of a function, bodies included, that knows where values come from.

It binds nothing. `sites` and `taps` are visitors of it.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax

from . import compat, origins
from .origins import View
from .program import Program


class Place(NamedTuple):
    """Where in the program a body runs."""

    name: str = ""
    trips: int = 1
    exact: bool = True
    trail: tuple[tuple[Any, int], ...] = ()  # the equations around it, and which body of each
    closed: str = ""  # why no value can leave it, if none can

    def within(self, equation: Any, body: int = 0, **changes: Any) -> "Place":
        """The place of a body of an equation here."""
        trail = (*self.trail, (equation, body))
        return self._replace(name=self.of(equation), trail=trail, **changes)

    def of(self, equation: Any) -> str:
        """The whole name stack of an equation here, such as `MLP/Dense_0`."""
        return "/".join(part for part in (self.name, compat.name_of(equation)) if part)


class Visitor(Protocol):
    """What looks at a program."""

    def equation(self, equation: Any, operands: Sequence[View], place: Place) -> None:
        """Called for each equation whose results are used, before its bodies are visited."""

    def body(self, jaxpr: Any, known: dict[Any, View], place: Place) -> None:
        """Called for each body when all of it has been visited; `known` has views of variables."""


def visit(program: Program, visitor: Visitor) -> None:
    """Shows a program to a visitor, in order."""
    views = [
        origins.parameter(o.path, v.aval) if o.parameter else origins.NOTHING
        for o, v in zip(program.operands, compat.opened(program.jaxpr)[0].invars, strict=True)
    ]
    _visit(program.jaxpr, views, Place(), visitor)


def _visit(jaxpr: Any, views: Sequence[View], place: Place, visitor: Visitor) -> list[View]:
    """Visits a body; returns the views of its results."""
    jaxpr, constants = compat.opened(jaxpr)
    known = dict(zip(jaxpr.constvars, [origins.CONSTANT] * len(constants), strict=False))
    known.update(zip(jaxpr.invars, views, strict=True))

    def read(atom: Any) -> View:
        return origins.CONSTANT if isinstance(atom, compat.Literal) else known[atom]

    for equation, wanted in zip(jaxpr.eqns, _live(jaxpr), strict=True):
        operands = [read(v) for v in equation.invars]
        results = [origins.NOTHING] * len(equation.outvars)
        if wanted:
            visitor.equation(equation, operands, place)
            enter = _BODIES.get(equation.primitive.name)
            if enter is None:
                results = origins.follow(equation, operands)
            else:
                results = enter(equation, operands, place, visitor)
        known.update(zip(equation.outvars, results, strict=True))
    visitor.body(jaxpr, known, place)
    return [read(v) for v in jaxpr.outvars]


def _live(jaxpr: Any) -> list[bool]:
    """Whether each equation's results are used; XLA drops the others."""
    needed = {v for v in jaxpr.outvars if not isinstance(v, compat.Literal)}
    live = []
    for equation in reversed(jaxpr.eqns):
        live.append(bool(equation.effects) or any(v in needed for v in equation.outvars))
        if live[-1]:
            needed.update(v for v in equation.invars if not isinstance(v, compat.Literal))
    return live[::-1]


# Constructs with bodies.


def _enter_call(equation: Any, views: Sequence[View], place: Place, visitor: Visitor) -> list[View]:
    return _visit(compat.body_of(equation), views, place.within(equation), visitor)


def _enter_scan(equation: Any, views: Sequence[View], place: Place, visitor: Visitor) -> list[View]:
    split, carried = compat.scan_counts(equation)
    inside = [*views[:split], *[origins.NOTHING] * carried]
    inside += [origins.sliced(view) for view in views[split + carried :]]
    place = place.within(equation, trips=place.trips * equation.params["length"])
    _visit(equation.params["jaxpr"], inside, place, visitor)
    return [origins.NOTHING] * len(equation.outvars)


def _enter_while(
    equation: Any, views: Sequence[View], place: Place, visitor: Visitor
) -> list[View]:
    params = equation.params
    first, second = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
    carry = [origins.NOTHING] * len(views[second:])
    closed = "a `while` loop, whose iterations nobody counts in advance"
    condition, body = (place.within(equation, k, exact=False, closed=closed) for k in range(2))
    _visit(params["cond_jaxpr"], [*views[:first], *carry], condition, visitor)
    _visit(params["body_jaxpr"], [*views[first:second], *carry], body, visitor)
    return [origins.NOTHING] * len(equation.outvars)


def _enter_cond(equation: Any, views: Sequence[View], place: Place, visitor: Visitor) -> list[View]:
    bodies = compat.branches_on(equation, jax.default_backend())
    one = len(bodies) == 1  # chosen by platform: known here
    closed = place.closed or ("" if one else "one branch of a `cond`")
    branches = []
    for k, branch in enumerate(equation.params["branches"]):
        if any(branch is body for body in bodies):
            inside = place.within(equation, k, exact=place.exact and one, closed=closed)
            branches.append(_visit(branch, views[1:], inside, visitor))
    constant = views[0].constant
    return [
        view._replace(constant=view.constant and constant)
        for view in map(origins.joined, zip(*branches, strict=True))
    ]


def _enter_shards(
    equation: Any, views: Sequence[View], place: Place, visitor: Visitor
) -> list[View]:
    body = compat.body_of(equation)
    trips = place.trips * compat.shard_count(equation)
    place = place.within(equation, trips=trips, closed="a `shard_map`, which sees one shard only")
    inside = [
        origins.resized(view, variable.aval.shape)
        for view, variable in zip(views, body.invars, strict=True)
    ]
    _visit(body, inside, place, visitor)
    return [origins.NOTHING] * len(equation.outvars)


_BODIES: dict[str, Callable[..., list[View]]] = {
    **{primitive.name: _enter_call for primitive in compat.CALLS},
    compat.SCAN.name: _enter_scan,
    compat.WHILE.name: _enter_while,
    compat.COND.name: _enter_cond,
    compat.SHARD_MAP.name: _enter_shards,
}
