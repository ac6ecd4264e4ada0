"""Values from the inside of a function, as extra outputs of it: `taps`, and what can be tapped."""

import difflib
import functools
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax

from jopt import trees

from . import compat
from .frame import Frame, Plan
from .origins import View
from .program import Program, program
from .stats import Recorder
from .visit import Place, visit
from .walk import evaluate

Kind = Literal["checkpoint", "module", "parameter"]


class Tap(NamedTuple):
    """A value inside a function that can be had by name."""

    name: str
    kind: Kind
    shape: tuple[int, ...]  # leading axes count the iterations of enclosing scans
    dtype: Any
    closed: str  # why it cannot leave the function after all; empty if it can
    scans: int = 0  # how many of the leading axes count iterations


Select = str | Sequence[str] | Callable[[Tap], bool]


def taps(
    apply: Callable[..., Any], select: Select
) -> Callable[..., tuple[Any, dict[str, jax.Array]]]:
    """Makes a function return values from its inside as well: features to distil or to look at.

    A value has up to three kinds of name, and a glob is matched with all of them:

    - *parameter*: the path of a parameter, such as `params/Dense_0/bias`, for what comes out where
      it first meets data: a kernel's product, the sum with a bias, an embedding's rows;
    - *module*: the name stack that linen, haiku and equinox leave, such as `MLP/Dense_0`, for the
      last value computed in it that is used outside of it: a layer's output;
    - *checkpoint*: what `jax.ad_checkpoint.checkpoint_name(value, name)` says.

    The second value of the same name is `NAME#1`, and so on. A value inside a `scan` comes stacked,
    one entry for each iteration in the order of the slices. Nothing about the function changes: its
    compiled program computes the same, and what was recomputed in a backward pass still is.

    Args:
      apply: any function `apply(params, *inputs)`.
      select: a glob or several, in which `*` stays within a segment and `**` crosses segments; or a
        predicate on `Tap`.

    Returns:
      A function with the arguments of `apply`, returning `(out, {name: value})`. Its leaves may be
      traced, differentiated and mapped; for typed leaves say `jopt.lift(taps(apply, select))`.

    Raises:
      ValueError: when it is called: if `select` matches nothing, or a value that cannot leave (one
        inside a `while` loop, a `shard_map`, a function with a derivative of its own, or one branch
        of several). It lists what there is.

    Example:
      >>> import jax.numpy as jnp
      >>> from jopt.trace import taps
      >>> apply = lambda p, x: jnp.tanh(x @ p["hidden"]) @ p["out"]
      >>> params = {"hidden": jnp.eye(2), "out": jnp.ones((2, 1))}
      >>> out, found = taps(apply, "hidden")(params, jnp.ones((1, 2)))
      >>> found
      {'hidden': Array([[1., 1.]], dtype=float32)}
    """

    @functools.wraps(apply)
    def tapped(*args: Any, **kwargs: Any) -> tuple[Any, dict[str, jax.Array]]:
        traced = program(apply, args, kwargs, opened=True)
        chosen, recorder = _selected(_found(traced), select), Recorder()
        frame = Frame(True, recorder, _plan(chosen))
        results = evaluate(frame, traced.jaxpr, [o.value for o in traced.operands])
        stats = recorder.stats()
        return traced.results(results), {name: stats[name].value for name in _names(chosen)}

    return tapped


def tappable(apply: Callable[..., Any], params: Any, *inputs: Any) -> tuple[Tap, ...]:
    """Lists what `taps` can name in `apply(params, *inputs)`, in the order of the function.

    Args:
      apply: any function.
      params: its parameters; arrays may be `jax.ShapeDtypeStruct`s.
      *inputs: its other arguments, likewise.

    Example:
      >>> import jax.numpy as jnp
      >>> from jopt.trace import tappable
      >>> apply = lambda p, x: x @ p["kernel"] + p["bias"]
      >>> params = {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}
      >>> [(tap.name, tap.shape) for tap in tappable(apply, params, jnp.ones((1, 2)))]
      [('kernel', (1, 3)), ('bias', (1, 3))]
    """
    return tuple(found.tap for found in _found(program(apply, (params, *inputs), opened=True)))


class _Found(NamedTuple):
    """A tap, and where its value is computed."""

    tap: Tap
    trail: tuple[tuple[Any, int], ...]
    variable: Any


class _Finder:
    """Notes every value that has a name while a program is visited."""

    def __init__(self) -> None:
        self.found: list[_Found] = []

    def equation(self, equation: Any, operands: Sequence[View], place: Place) -> None:
        if equation.primitive is compat.NAME:
            self._add("checkpoint", equation.params["name"], equation.outvars[0], place)
        if _is_whole(equation) or equation.primitive.name not in _HAVE_BODIES:
            kept = [v for v in equation.outvars if not isinstance(v, compat.DropVar)]
            for path in _first_met(operands) if kept else ():
                self._add("parameter", path, kept[0], place)

    def body(self, jaxpr: Any, known: dict[Any, View], place: Place) -> None:
        for scope, variable in _outputs(jaxpr, place):
            self._add("module", scope, variable, place)

    def _add(self, kind: Kind, name: str, variable: Any, place: Place) -> None:
        closed = place.closed
        if any(_is_whole(equation) for equation, _ in place.trail):
            if kind != "checkpoint":
                return  # the whole has the name
            closed = "a function with a derivative of its own, or one for a platform"
        lengths = tuple(
            equation.params["length"] for equation, _ in place.trail if _is_scan(equation)
        )
        tap = Tap(
            name, kind, (*lengths, *variable.aval.shape), variable.aval.dtype, closed, len(lengths)
        )
        self.found.append(_Found(tap, place.trail, variable))


_HAVE_BODIES = {
    *(primitive.name for primitive in compat.CALLS),
    *(compat.SCAN.name, compat.WHILE.name, compat.COND.name, compat.SHARD_MAP.name),
}


def _is_scan(equation: Any) -> bool:
    return equation.primitive is compat.SCAN


def _is_whole(equation: Any) -> bool:
    """Whether an equation with bodies is taken as one operation.

    A choice by platform is: its branches are one thing computed in several ways. So is a function
    with a derivative of its own, which evaluating its body again would lose.
    """
    if equation.primitive is compat.COND:
        return compat.branch_platforms(equation) is not None
    return equation.primitive in (compat.CUSTOM_JVP, compat.CUSTOM_VJP)


def _first_met(operands: Sequence[View]) -> list[str]:
    """The parameters that meet data in an equation of these operands."""
    if all(view.constant for view in operands):
        return []
    origins = (origin for view in operands if view.constant for origin in view.origins)
    return list(dict.fromkeys(origin.path for origin in origins))


def _outputs(jaxpr: Any, place: Place) -> list[tuple[str, Any]]:
    """What each module called in a body computes last of all that is used outside of it."""
    stacks = [segments(place.of(equation)) for equation in jaxpr.eqns]
    outside = len(segments(place.name))
    used: dict[Any, list[int]] = {}
    for position, equation in enumerate(jaxpr.eqns):
        for atom in equation.invars:
            if not isinstance(atom, compat.Literal):
                used.setdefault(atom, []).append(position)
    for atom in jaxpr.outvars:
        if not isinstance(atom, compat.Literal):
            used.setdefault(atom, []).append(len(jaxpr.eqns))
    found = []
    for first, last, depth in _runs(stacks, outside):
        made = [v for equation in jaxpr.eqns[first:last] for v in equation.outvars]
        leaving = [v for v in made if any(position >= last for position in used.get(v, ()))]
        if leaving:
            found.append((last, -depth, "/".join(stacks[first][:depth]), leaving[-1]))
    found.sort(key=lambda entry: entry[:2])
    return [(scope, variable) for _, _, scope, variable in found]


def _runs(stacks: Sequence[Sequence[str]], outside: int) -> list[tuple[int, int, int]]:
    """Stretches of consecutive equations inside one module: first, end, depth of its name."""
    runs, begun = [], []  # begun[i]: where the module of depth `outside + i + 1` was entered
    before: Sequence[str] = stacks[0][:outside] if stacks else ()
    for position, stack in enumerate([*stacks, ()]):
        same = outside
        while same < min(len(before), len(stack)) and before[same] == stack[same]:
            same += 1
        while len(begun) > max(same - outside, 0):
            runs.append((begun.pop(), position, outside + len(begun) + 1))
        while outside + len(begun) < len(stack):
            begun.append(position)
        before = stack
    return runs


def segments(name: str) -> list[str]:
    """The modules of a name stack, without the transformations that `vmap` and `grad` write.

    Example:
      >>> segments("jvp(MLP)/vmap(Dense_0)/jit(relu)")
      ['MLP', 'Dense_0']
    """
    segments = []
    for part in name.split("/"):
        while wrapped := re.fullmatch(r"(?:vmap|jvp|transpose|rematted_computation)\((.*)\)", part):
            part = wrapped[1]
        if part and not re.fullmatch(r"(jit|pjit|checkpoint|remat|custom_\w+)(\(.*\))?", part):
            segments.append(part)
    return segments


def _found(traced: Program) -> list[_Found]:
    """Every tap of a program, numbered where a name occurs again."""
    finder = _Finder()
    visit(traced, finder)
    typed = {operand.path for operand in traced.operands if operand.typed and operand.parameter}
    taken = {(found.tap.kind, found.tap.name) for found in finder.found}
    seen: dict[tuple[str, str], int] = {}
    numbered = []
    for found in finder.found:
        tap = found.tap
        if tap.kind == "parameter" and tap.name in typed:
            tap = tap._replace(closed="a typed leaf's own operations; say `lift(taps(...))`")
        name, count = tap.name, seen.get((tap.kind, tap.name), 0)
        while count and (tap.kind, name := f"{tap.name}#{count}") in taken:
            count += 1  # that is what another one is called
        seen[tap.kind, tap.name] = count + 1
        numbered.append(found._replace(tap=tap._replace(name=name)))
    return numbered


def _selected(found: Sequence[_Found], select: Select) -> list[_Found]:
    """The taps that are asked for; each name once, checkpoint names first, then modules."""
    if callable(select):
        chosen = _once([one for one in found if select(one.tap)])
        if not chosen:
            raise ValueError(_nothing("`taps(apply, <predicate>)`", found))
    else:
        known = _once(found)
        globs = [select] if isinstance(select, str) else list(select)
        for glob in globs:
            if not any(trees.matches(glob, one.tap.name, None) for one in known):
                raise ValueError(_nothing(f'`taps(apply, "{glob}")`', found, glob))
        chosen = [one for one in known if trees.matches(globs, one.tap.name, None)]
    for one in chosen:
        if one.tap.closed:
            raise ValueError(
                f"`taps(...)` cannot bring out `{one.tap.name}`: it is inside {one.tap.closed}. "
                "Tap a value outside of it, or return this one from the function itself."
            )
    return chosen


def _once(found: Sequence[_Found]) -> list[_Found]:
    by_name: dict[str, _Found] = {}
    for kind in ("checkpoint", "module", "parameter"):
        for one in found:
            if one.tap.kind == kind:
                by_name.setdefault(one.tap.name, one)
    return [one for one in found if by_name[one.tap.name] is one]


def _nothing(call: str, found: Sequence[_Found], glob: str = "") -> str:
    names = {kind: [] for kind in ("checkpoint", "module", "parameter")}
    for one in found:
        names[one.tap.kind].append(one.tap.name)
    every = [name for group in names.values() for name in group]
    near = difflib.get_close_matches(glob, every, n=1, cutoff=0.5)
    hint = f" Did you mean `{near[0]}`?" if near else ""
    lines = []
    for kind, group in names.items():
        shown = ", ".join(f"`{name}`" for name in group[:8])
        more = f", and {len(group) - 8} more" if len(group) > 8 else ""
        lines.append(f"{kind}: {shown}{more}" if group else f"{kind}: none")
    if not names["module"]:
        lines[1] += " (flax.nnx and plain functions leave no names in the program)"
    return (
        f"{call} matched no value.{hint}\nThere are, by kind:\n  "
        + "\n  ".join(lines)
        + "\n`jopt.trace.tappable(apply, params, *inputs)` lists all, with shapes."
    )


def _names(chosen: Sequence[_Found]) -> list[str]:
    return [one.tap.name for one in chosen]


def _plan(chosen: Sequence[_Found], depth: int = 0) -> Plan:
    """Where to record what, body by body."""
    points = tuple((one.tap.name, one.variable) for one in chosen if len(one.trail) == depth)
    deeper: dict[tuple[int, int], list[_Found]] = {}
    for one in chosen:
        if len(one.trail) > depth:
            equation, body = one.trail[depth]
            deeper.setdefault((id(equation), body), []).append(one)
    return Plan(points, {key: _plan(inside, depth + 1) for key, inside in deeper.items()})
