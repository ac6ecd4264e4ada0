"""What travels through an evaluation: typed leaves, and how the body at hand is evaluated."""

import dataclasses
import functools
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


class Plan(NamedTuple):
    """Which values of a body are to be recorded, and which bodies inside it have such values."""

    points: tuple[tuple[str, Any], ...]  # name, variable
    inside: dict[tuple[int, int], "Plan"]  # by the id of an equation and the number of its body

    def enters(self, equation: Any) -> bool:
        """Whether something is to be recorded inside an equation."""
        return (id(equation), 0) in self.inside


_NO_PLAN = Plan((), {})


class Met(NamedTuple):
    """An operation that met a typed leaf, and what became of it."""

    path: str  # of the leaf, such as `params/Dense_0/kernel`
    operation: str  # such as `dot_general`
    dense: bool  # whether the leaf was materialised
    how: str  # what the rule says, or why there was none to answer
    source: str  # the user's line


@dataclasses.dataclass(frozen=True)
class Frame:
    """How one body is evaluated."""

    allow_dense: bool
    recorder: Recorder | None = None
    plan: Plan = _NO_PLAN
    scans: int = 0  # that enclose the body
    met: dict[Any, Met] | None = None  # filled for `explain`

    def inner(self, equation: Any, body: int = 0, *, scans: int = 0) -> "Frame":
        """The frame of a nested body, which records on its own."""
        return dataclasses.replace(
            self.inline(equation, body),
            recorder=None if self.recorder is None else Recorder(),
            scans=self.scans + scans,
        )

    def inline(self, equation: Any, body: int = 0) -> "Frame":
        """The frame of a nested body that is evaluated as a part of this one."""
        return dataclasses.replace(self, plan=self.plan.inside.get((id(equation), body), _NO_PLAN))

    def silent(self) -> "Frame":
        """The same, recording nothing."""
        return dataclasses.replace(self, recorder=None, plan=_NO_PLAN)

    def records(self) -> dict[str, Record]:
        """What has been recorded in this frame."""
        return {} if self.recorder is None else self.recorder.records

    def note(self, equation: Any, origin: Tracked, dense: bool, how: str) -> None:
        """Notes what became of a leaf, each place in the function once; no equation: at its end."""
        if self.met is not None:
            name, source = "return", ""
            if equation is not None:
                name, source = str(equation.primitive), compat.source_of(equation)
            found = Met(origin.path, name, dense, how, source)
            self.met.setdefault((id(equation), origin.path, compat.current_scope()), found)
