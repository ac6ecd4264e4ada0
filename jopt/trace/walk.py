"""Evaluation of a jaxpr whose values may be typed leaves: `lift` and `collect`.

An equation that meets no typed leaf goes back to JAX as it is. One that meets a typed leaf runs the
rule registered for (primitive, leaf type), or is one that `control` or `through` knows for leaves
of any type, or else materialises the leaf, which is an error unless allowed.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp

from jopt import trees

from . import compat, rules
from .constants import warn_of
from .frame import Frame, Met, Tracked
from .leaf import aval_of
from .program import Program, is_array, program
from .stats import Record, Recorder, Stat

P = ParamSpec("P")
T = TypeVar("T")


# Public: what a user calls.


def lift(apply: Callable[P, T], *, allow_dense: bool = False) -> Callable[P, T]:
    """Makes a function accept typed leaves wherever its arguments hold arrays.

    The function is traced anew at each call, with every typed leaf as the array it stands for;
    its operations are then evaluated on the leaves themselves. Call the result under `jax.jit`,
    since an eager call traces every time. Python values among the arguments (`train=True`) stay
    Python.

    Args:
      apply: any JAX function.
      allow_dense: materialise a leaf where an operation has no rule for its type, and do not
        raise.

    Returns:
      A function with the arguments and results of `apply`. Where no argument is typed, it calls
      `apply` and nothing else.

    Raises:
      ValueError: when the lifted function is called: if an operation has no rule for a typed leaf.

    Example:
      >>> import dataclasses, functools, jax, jax.numpy as jnp, jopt
      >>> from jopt.trace import Leaf, rule
      >>> @functools.partial(
      ...     jax.tree_util.register_dataclass, data_fields=["value"], meta_fields=[]
      ... )
      ... @dataclasses.dataclass(frozen=True)
      ... class Halved(Leaf):
      ...     value: jax.Array
      ...
      ...     def materialise(self):
      ...         return self.value / 2
      >>> @rule(jax.lax.dot_general_p, Halved)
      ... def product(call, x, kernel):
      ...     return call.bind(x, kernel.value) / 2
      >>> jopt.lift(lambda w, x: x @ w)(Halved(jnp.eye(2)), jnp.ones((1, 2)))
      Array([[0.5, 0.5]], dtype=float32)
    """

    @functools.wraps(apply)
    def lifted(*args: P.args, **kwargs: P.kwargs) -> T:
        return _call(apply, Frame(allow_dense), args, kwargs)

    return lifted


def collect(
    apply: Callable[P, T], *, allow_dense: bool = False
) -> Callable[P, tuple[T, dict[str, Any]]]:
    """Makes a function accept typed leaves and return the statistics that their rules record.

    A statistic recorded inside a scan is stacked over its iterations if the scan slices the leaf
    that recorded it, and merged over them otherwise. Branches and loops merge. The condition of a
    `while_loop` records nothing.

    Args:
      apply: any JAX function.
      allow_dense: as in `lift`.

    Returns:
      A function returning `(out, stats)`: what `apply` returns, and the statistics by name.
    """

    @functools.wraps(apply)
    def collected(*args: P.args, **kwargs: P.kwargs) -> tuple[T, dict[str, Any]]:
        recorder = Recorder()
        out = _call(apply, Frame(allow_dense, recorder), args, kwargs)
        return out, recorder.stats()

    return collected


def explain(apply: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Met, ...]:
    """Tells what becomes of each typed leaf: which operations it meets, and how they compute.

    Nothing is computed; arrays may be `jax.ShapeDtypeStruct`s. A leaf that an operation would
    materialise is listed as `dense` with the reason, and as `refused` where `lift` would raise. One
    that comes out of a body, goes into a carry or is returned is `dense` only: `lift` makes an
    array of it. Of an
    operation with a body what is inside is listed; one inside a loop is listed once.

    Args:
      apply: any JAX function, not lifted.
      *args: its arguments, typed leaves among them.
      **kwargs: likewise.

    Returns:
      A tuple of `Met`, in the order of the function.

    Example:
      >>> import jax.numpy as jnp
      >>> from jopt import quant, trace
      >>> kernel = quant.quantize(jnp.ones((4, 2)), quant.Int(8))
      >>> [(met.operation, met.refused) for met in trace.explain(lambda w: w.T * 2, kernel)]
      [('transpose', False), ('mul', True)]
    """
    met: dict[Any, Met] = {}
    leaves, structure = jax.tree.flatten((args, kwargs))
    arrays = [i for i, x in enumerate(leaves) if is_array(x)]

    def abstract(*values: Any) -> Any:
        for i, value in zip(arrays, values, strict=True):
            leaves[i] = value
        args, kwargs = jax.tree.unflatten(structure, leaves)
        return _call(apply, Frame(True, met=met), args, kwargs)

    jax.eval_shape(abstract, *(leaves[i] for i in arrays))
    return tuple(met.values())


@dataclasses.dataclass(frozen=True)
class Call:
    """An operation that met a typed leaf, as its rule sees it."""

    equation: Any
    frame: Frame
    path: str  # of the leaf whose rule runs, within its argument, such as `params/Dense_0/kernel`
    stacked: tuple[bool, ...]  # for each enclosing scan: does it slice the leaf?
    said: list[str] = dataclasses.field(default_factory=list)

    @property
    def primitive(self) -> Any:
        """The operation."""
        return self.equation.primitive

    @property
    def params(self) -> dict[str, Any]:
        """The operation's parameters, such as `dimension_numbers`."""
        return self.equation.params

    @property
    def out(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shape and dtype of each result in the function as traced."""
        return tuple(
            jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in self.equation.outvars
        )

    def bind(self, *operands: Any) -> Any:
        """Runs the operation on other operands; typed ones go through their own rules."""
        wrapped = [
            Tracked(x, self.path, self.stacked) if trees.is_typed(x) else x for x in operands
        ]
        if any(isinstance(x, Tracked) for x in wrapped):
            answers = _answer(self.frame, self.equation, wrapped, check=False)
            results = [_leaf(x) for x in answers]
        else:
            results = compat.bind(self.equation, operands)
        return results if self.primitive.multiple_results else results[0]

    def say(self, how: str) -> None:
        """Says how the rule computes, for `explain`: on integers, say, or why not on them."""
        self.said.append(how)

    def record(self, name: str, stat: Any) -> None:
        """Hands a statistic, a pytree of `Stat`, to `collect`; under plain `lift` does nothing."""
        if self.frame.recorder is not None:
            self.frame.recorder.add(name, Record(stat, self.stacked))


# The walk: what `control` and `through` build on.


def evaluate(frame: Frame, jaxpr: Any, operands: Sequence[Any]) -> list[Any]:
    """Evaluates a jaxpr, closed or not, on arrays and `Tracked` leaves; results are such, too.

    Equations that meet no leaf wait until the next one that does, then go to JAX in one piece.
    """
    jaxpr, constants = compat.opened(jaxpr)
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*constants, *operands], strict=True))
    tracked = {variable for variable, value in values.items() if isinstance(value, Tracked)}
    last_use = _last_use(jaxpr)
    last_use.update((variable, len(jaxpr.eqns)) for _, variable in frame.plan.points)
    waiting: list[Any] = []

    def flush(position: int) -> None:
        if waiting:
            made = [v for equation in waiting for v in equation.outvars]
            keep = [v for v in made if last_use.get(v, -1) >= position]
            values.update(zip(keep, compat.run(jaxpr, waiting, values, keep), strict=True))
            waiting.clear()

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, compat.Literal) else values[atom]

    for position, equation in enumerate(jaxpr.eqns):
        met = any(not isinstance(v, compat.Literal) and v in tracked for v in equation.invars)
        if not met and not frame.plan.enters(equation):
            waiting.append(equation)
            continue
        flush(position)
        results = dispatch(frame, equation, [read(v) for v in equation.invars])
        for variable, value in zip(equation.outvars, results, strict=True):
            values[variable] = value
            if isinstance(value, Tracked):
                tracked.add(variable)
    flush(len(jaxpr.eqns))
    if frame.recorder is not None:
        for name, variable in frame.plan.points:
            stat = Stat(materialised(values[variable]), "once")
            frame.recorder.add(name, Record(stat, frame.loops))
    return [read(v) for v in jaxpr.outvars]


def dispatch(frame: Frame, equation: Any, operands: Sequence[Any]) -> Sequence[Any]:
    """Runs one equation that has a typed operand or is special: as planned, built or by rule."""
    with compat.context(equation):
        if (swap := frame.plan.swaps.get(id(equation))) is not None:
            results = swap[1](frame, equation, operands)
            if results is not NotImplemented:
                return results
        return _answer(frame, equation, operands, check=True)


def _answer(frame: Frame, equation: Any, operands: Sequence[Any], *, check: bool) -> Sequence[Any]:
    """By rule, or as a construct, or on materialised leaves."""
    raw = [_leaf(x) for x in operands]
    for function, origin in _candidates(equation.primitive, operands):
        call = Call(equation, frame, origin.path, origin.stacked)
        result = function(call, *raw)
        if result is NotImplemented:
            continue
        for operand in operands:
            if isinstance(operand, Tracked):
                how = "; ".join(call.said) or f"rule `{_name(function)}`"
                frame.note(equation, operand, False, how)
        results = list(result) if equation.primitive.multiple_results else [result]
        if check:
            _check(equation, function, results)
        return [
            Tracked(x, origin.path, origin.stacked) if trees.is_typed(x) else x for x in results
        ]
    if (construct := rules.structure_of(equation.primitive)) is not None:
        return construct(frame, equation, operands)
    return dense(frame, equation, operands)


def dense(frame: Frame, equation: Any, operands: Sequence[Any], why: str = "") -> list[Any]:
    """Runs one equation on materialised leaves, if that is allowed."""
    for x in operands:
        if isinstance(x, Tracked):
            refused = not getattr(x.leaf, "always_dense", False)
            if refused and not frame.allow_dense:
                raise ValueError(_refusal(frame, equation, x, why))
            frame.note(equation, x, True, _reason(equation, x, why), refused=refused)
    return compat.bind(equation, [materialised(x) for x in operands])


def materialised(value: Any) -> Any:
    """The array that a `Tracked` leaf stands for; any other value unchanged."""
    return value.materialise() if isinstance(value, Tracked) else value


def leaving(frame: Frame, equation: Any, value: Any, how: str) -> Any:
    """The array of a leaf that cannot go on as a leaf: out of a body, into a carry."""
    if isinstance(value, Tracked) and getattr(value.leaf, "travels", False):
        return value
    return settled(frame, equation, value, how)


def settled(frame: Frame, equation: Any, value: Any, how: str) -> Any:
    """The array of any leaf."""
    if isinstance(value, Tracked):
        frame.note(equation, value, True, how)
    return materialised(value)


# Helpers, in order of use.


def _call(apply: Callable[..., T], frame: Frame, args: Any, kwargs: Any) -> T:
    leaves = jax.tree.leaves((args, kwargs), is_leaf=trees.is_typed)
    if not any(trees.is_typed(leaf) for leaf in leaves):
        return apply(*args, **kwargs)
    return run(program(apply, args, kwargs), frame)


def run(traced: Program, frame: Frame) -> Any:
    """Evaluates a traced function on its operands."""
    warn_of(traced.jaxpr, "lift(apply)")
    operands = [Tracked(o.value, o.path) if o.typed else o.value for o in traced.operands]
    results = evaluate(frame, traced.jaxpr, operands)
    results = [leaving(frame, None, x, "the function returns it") for x in results]
    results = [_leaf(x) for x in results]
    done = [isinstance(x, jax.Array) or trees.is_typed(x) for x in results]
    return traced.results(
        [x if ready else jnp.asarray(x) for x, ready in zip(results, done, strict=True)]
    )


def _last_use(jaxpr: Any) -> dict[Any, int]:
    """The position of the equation that reads each variable last; past the end for results."""
    last: dict[Any, int] = {}
    for position, equation in enumerate(jaxpr.eqns):
        for atom in equation.invars:
            if not isinstance(atom, compat.Literal):
                last[atom] = position
    for atom in jaxpr.outvars:
        if not isinstance(atom, compat.Literal):
            last[atom] = len(jaxpr.eqns)
    return last


def _leaf(value: Any) -> Any:
    return value.leaf if isinstance(value, Tracked) else value


def _candidates(primitive: Any, operands: Sequence[Any]) -> list[tuple[rules.Rule, Tracked]]:
    """The rules to ask, each once, with the operand that it is asked for."""
    found: dict[rules.Rule, Tracked] = {}
    for operand in operands:
        if isinstance(operand, Tracked):
            for function in rules.rules_of(primitive, type(operand.leaf)):
                found.setdefault(function, operand)
    return list(found.items())


def _check(equation: Any, function: rules.Rule, results: Sequence[Any]) -> None:
    """Raises where a rule's results have not the shapes and dtypes that the function expects."""
    for variable, value in zip(equation.outvars, results, strict=True):
        found = aval_of(value) if trees.is_typed(value) else jax.typeof(value)
        expected = variable.aval
        if found.shape != expected.shape or found.dtype != expected.dtype:
            raise TypeError(
                f"The rule `{function.__qualname__}` for `{equation.primitive}` returned "
                f"{found.dtype}{list(found.shape)}; the function expects "
                f"{expected.dtype}{list(expected.shape)} ({compat.source_of(equation)})."
            )


def _refusal(frame: Frame, equation: Any, tracked: Tracked, why: str) -> str:
    kind = type(tracked.leaf).__name__
    where = f"`{tracked.path}`" if tracked.path else "an argument"
    reason = _reason(equation, tracked, why)
    return (
        f"`lift(apply)` would make {where} dense: {reason} ({frame.source_of(equation)}).\n"
        f"Pass `lift(apply, allow_dense=True)` to allow it, register a rule with "
        f"`jopt.trace.rule({equation.primitive}_p, {kind})`, or keep this weight an array."
    )


def _reason(equation: Any, tracked: Tracked, why: str) -> str:
    """Why an operation needs the leaf as an array."""
    if why:
        return why
    if asked := _candidates(equation.primitive, [tracked]):
        names = ", ".join(f"`{_name(function)}`" for function, _ in asked)
        return f"the rule {names} for `{equation.primitive}` cannot serve these operands"
    return f"`{equation.primitive}` has no rule for `{type(tracked.leaf).__name__}`"


def _name(function: Callable[..., Any]) -> str:
    return function.__qualname__
