"""Products that no parameter feeds, by name; and functions in which some compute otherwise."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from . import compat
from .frame import Frame, Plan, Swap, Tracked
from .origins import View
from .program import Program, program
from .sites import Site, Sites
from .stats import Record, Recorder
from .taps import segments
from .visit import Place, visit
from .walk import run


class Product(NamedTuple):
    """A product in a function, and where it is computed."""

    site: Site  # whose name is its own among all products without a weight
    equation: Any
    trail: tuple[tuple[Any, int], ...]
    closed: str  # why it cannot be swapped; empty if it can


@dataclasses.dataclass(frozen=True)
class Swapped:
    """A product that computes otherwise, as the function in its place sees it."""

    name: str
    equation: Any
    frame: Frame

    @property
    def params(self) -> dict[str, Any]:
        """The product's parameters, such as `dimension_numbers`."""
        return self.equation.params

    @property
    def dtype(self) -> Any:
        """The result's dtype."""
        return self.equation.outvars[0].aval.dtype

    @property
    def given(self) -> Any:
        """What the caller gave for this name, sliced by the scans around; None if nothing."""
        return self.frame.given.get(self.name)

    def bind(self, *operands: Any) -> Any:
        """The product itself, on any operands."""
        return compat.bind(self.equation, operands)[0]

    def record(self, stat: Any) -> None:
        """Hands over a statistic: one entry for each iteration of the scans around."""
        if self.frame.recorder is not None:
            self.frame.recorder.add(self.name, Record(stat, self.frame.loops))


Computation = Callable[..., Any]  # f(swapped, left, right) -> result
Choose = Callable[[Sequence[Product]], Mapping[str, Computation]]


def products(traced: Program) -> list[Product]:
    """Every `dot_general` of a function, in order; those with a weight keep their module's name."""
    finder = _Finder()
    visit(traced, finder)
    taken: dict[str, int] = {}
    found = []
    for one in finder.found:
        if one.site.operation != "dot_general":
            continue
        name = "/".join(segments(one.site.name)) or one.site.operation
        if not weighs(one.site):
            count = taken.get(name, 0)
            taken[name] = count + 1
            name = f"{name}#{count}" if count else name
        found.append(one._replace(site=dataclasses.replace(one.site, name=name)))
    return found


def weighs(site: Site) -> bool:
    """Whether a product has a weight: a parameter, or rows of one, feeds it."""
    return bool(site.uses)


def swapped(
    apply: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    choose: Choose,
    *,
    given: Mapping[str, Any] | None = None,
    allow_dense: bool = False,
) -> tuple[Any, dict[str, Any]]:
    """Calls `apply` with other computations in place of the products that `choose` names.

    Args:
      apply: any function; typed leaves among its arguments are served as by `lift`.
      args: its arguments.
      kwargs: likewise.
      choose: of all products, gives what computes instead, by name.
      given: arrays for each name. Inside scans each has a leading axis for every one of them.
      allow_dense: as in `lift`.

    Returns:
      What `apply` returns, and the statistics that were recorded.
    """
    traced, recorder = program(apply, args, kwargs), Recorder()
    found = products(traced)
    chosen = choose(found)
    planned = [
        (one, chosen[one.site.name])
        for one in found
        if one.site.name in chosen and not weighs(one.site)
    ]
    frame = Frame(allow_dense, recorder, _plan(planned), given=given or {})
    out = run(traced, frame)
    return out, recorder.stats()


# Helpers, in order of use.


class _Finder:
    """Notes every product, and where it is."""

    def __init__(self) -> None:
        self.found: list[Product] = []

    def equation(self, equation: Any, operands: Sequence[View], place: Place) -> None:
        one = Sites()
        one.equation(equation, operands, place)
        own = (compat.CUSTOM_JVP, compat.CUSTOM_VJP)
        inside = any(outer.primitive in own for outer, _ in place.trail)
        closed = "a function with a derivative of its own" if inside else ""
        self.found += [Product(site, equation, place.trail, closed) for site in one.found]

    def body(self, jaxpr: Any, known: dict[Any, View], place: Place) -> None:
        pass


def _plan(planned: Sequence[tuple[Product, Computation]], depth: int = 0) -> Plan:
    """What computes otherwise, body by body."""
    here = [(one, compute) for one, compute in planned if len(one.trail) == depth]
    deeper: dict[tuple[int, int], list[tuple[Product, Computation]]] = {}
    for one, compute in planned:
        if len(one.trail) > depth:
            equation, body = one.trail[depth]
            deeper.setdefault((id(equation), body), []).append((one, compute))
    return Plan(
        (),
        {key: _plan(inside, depth + 1) for key, inside in deeper.items()},
        {id(one.equation): (one.site.name, _swap(one.site.name, f)) for one, f in here},
    )


def _swap(name: str, compute: Computation) -> Swap:
    def swap(frame: Frame, equation: Any, operands: Sequence[Any]) -> Any:
        if any(isinstance(x, Tracked) for x in operands):
            return NotImplemented  # a typed leaf's own rules go first
        return [compute(Swapped(name, equation, frame), *operands)]

    return swap
