"""What travels through an evaluation: typed leaves, and how the body at hand is evaluated."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax

from . import compat
from .stats import Record, Recorder


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["leaf"], meta_fields=["path", "stacked"]
)
@dataclasses.dataclass(frozen=True)
class Tracked:
    """A typed leaf on its way through a function, with where it came from.

    It is a pytree, so it passes through `scan`, `cond` and `checkpoint` as an operand and comes out
    inside the body with its arrays sliced and its origin intact.
    """

    leaf: Any
    path: str
    stacked: tuple[bool, ...] = ()

    def materialise(self) -> jax.Array:
        """The array that the leaf stands for."""
        return self.leaf.materialise()


Swap = Callable[["Frame", Any, Sequence[Any]], Any]  # f(frame, equation, operands) -> results


class Plan(NamedTuple):
    """What is special in a body: values to be recorded, and equations that compute otherwise."""

    points: tuple[tuple[str, Any], ...]  # name, variable
    inside: Mapping[tuple[int, int], "Plan"]  # by the id of an equation and the number of its body
    swaps: Mapping[int, tuple[str, Swap]] = MappingProxyType({})  # by the id of an equation

    def enters(self, equation: Any) -> bool:
        """Whether an equation is special or has something special inside."""
        return id(equation) in self.swaps or any(i == id(equation) for i, _ in self.inside)

    def names(self) -> set[str]:
        """The names of all swaps, those in bodies inside included."""
        own = {name for name, _ in self.swaps.values()}
        return own.union(*(plan.names() for plan in self.inside.values()))


_NO_PLAN = Plan((), {})


class Met(NamedTuple):
    """An operation that met a typed leaf, and what became of it."""

    path: str  # of the leaf, such as `params/Dense_0/kernel`
    operation: str  # such as `dot_general`
    dense: bool  # whether the leaf was materialised
    how: str  # what the rule says, or why there was none to answer
    source: str  # the user's line
    refused: bool = False  # whether `lift` raises here unless it is given `allow_dense=True`


@dataclasses.dataclass(frozen=True)
class Frame:
    """How one body is evaluated."""

    allow_dense: bool
    recorder: Recorder | None = None
    plan: Plan = _NO_PLAN
    loops: tuple[bool, ...] = ()  # that enclose the body, outermost first: is it a scan?
    met: dict[Any, Met] | None = None  # filled for `explain`
    around: tuple[Any, ...] = ()  # the equations that enclose the body, outermost first
    given: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # for swaps; scans slice it

    def inner(self, equation: Any, body: int = 0, *, loop: tuple[bool, ...] = ()) -> "Frame":
        """The frame of a nested body, which records on its own."""
        return dataclasses.replace(
            self.inline(equation, body),
            recorder=None if self.recorder is None else Recorder(),
            loops=self.loops + loop,
        )

    def inline(self, equation: Any, body: int = 0) -> "Frame":
        """The frame of a nested body that is evaluated as a part of this one."""
        plan = self.plan.inside.get((id(equation), body), _NO_PLAN)
        return dataclasses.replace(self, plan=plan, around=(*self.around, equation))

    def source_of(self, equation: Any) -> str:
        """The user's line of an equation, or of what encloses it where JAX does not know."""
        lines = map(compat.source_of, (equation, *reversed(self.around)))
        return next(filter(None, lines), "")

    def silent(self, equation: Any) -> "Frame":
        """The frame of a nested body, the first of an equation, that records nothing."""
        return dataclasses.replace(self.inline(equation), recorder=None)

    def given_inside(self, equation: Any) -> dict[str, Any]:
        """What the swaps inside the body of an equation are given."""
        names = self.inline(equation).plan.names()
        return {name: value for name, value in self.given.items() if name in names}

    def records(self) -> dict[str, Record]:
        """What has been recorded in this frame."""
        return {} if self.recorder is None else self.recorder.records

    def note(
        self, equation: Any, origin: Tracked, dense: bool, how: str, *, refused: bool = False
    ) -> None:
        """Notes what became of a leaf, each place in the function once; no equation: at its end."""
        if self.met is not None:
            name, source = "return", ""
            if equation is not None:
                name, source = str(equation.primitive), self.source_of(equation)
            found = Met(origin.path, name, dense, how, source, refused)
            self.met.setdefault((id(equation), origin.path, compat.current_scope()), found)
