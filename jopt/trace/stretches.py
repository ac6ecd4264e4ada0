"""What runs between the stops of `staged`: a body planned as stretches of equations, and run.

A stretch is compiled once for all batches; a scan that slices its weights runs layer by layer, and
its body is planned the same way.
"""

import collections
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from . import compat
from .frame import Frame, Tracked
from .inline import inlined
from .stats import Recorder, merge
from .stops import Stop, Target
from .walk import evaluate
from .watch import SLICED, Measure, watched

# Planning: which equations run between which stops.


class Run:
    """What one call of `staged` keeps."""

    def __init__(
        self, targets: dict[str, Target], measure: Measure, visit: Callable[[Stop], Any]
    ) -> None:
        self.targets, self.measure, self.visit = targets, measure, visit
        self.uses: collections.Counter[str] = collections.Counter()
        self.shared: frozenset[str] = frozenset()
        self.visited: set[str] = set()
        self.sliced: set[str] = set()  # views of them, by scans
        self.bodies: dict[int, Any] = {}  # of scans, inlined

    def watch(self, path: str, value: jax.Array) -> Any:
        target = self.targets[path]
        return watched(
            value,
            path,
            self.measure,
            contracted=target.contracted,
            batched=target.batched,
        )

    def note(self, stats: dict[str, Any]) -> None:
        """Notes the weights whose layers cannot be told apart."""
        self.sliced |= {path for path in self.targets if path + SLICED in stats}

    def stop(self, path: str, index: tuple[int, ...], weight: jax.Array, stats: Any) -> jax.Array:
        """Visits a weight."""
        stats = jax.tree.map(lambda stat: stat.value, stats, is_leaf=lambda x: hasattr(x, "merge"))
        self.visited.add(path)
        new = self.visit(Stop(self.targets[path], index, weight, stats))
        return weight if new is None else _same(path, new, weight)


def planned(traced: Any, run: Run) -> "Body":
    flat = inlined(traced.jaxpr)
    inner = compat.opened(flat)[0]
    aims = {
        variable: operand.path
        for variable, operand in zip(inner.invars, traced.operands, strict=True)
        if operand.parameter and operand.path in run.targets
    }
    fixed = [operand.parameter for operand in traced.operands]
    Body(flat, fixed, aims, run, wanted=False)  # counts the uses
    run.shared = frozenset(path for path, count in run.uses.items() if count > 1)
    aims = {variable: path for variable, path in aims.items() if path not in run.shared}
    return Body(flat, fixed, aims, run, wanted=False)


class _Stretch(NamedTuple):
    """Equations that run between two stops."""

    equations: tuple[Any, ...]
    watches: bool  # measure what meets their weights, and stop


class Body:
    """A body, planned; `execute` runs it on all batches.

    A value is fixed if it depends on parameters alone; then it is computed where it is needed, from
    the parameters as they are at that time. Others have one value for each batch.
    """

    def __init__(
        self,
        jaxpr: Any,
        fixed: Sequence[bool],
        aims: dict[Any, str],
        run: Run,
        *,
        wanted: bool = True,
    ) -> None:
        self.run = run
        self.alone: dict[Any, _Function] = {}  # fixed values that are wanted outside
        self.jaxpr, constants = compat.opened(jaxpr)
        self.constants = dict(zip(self.jaxpr.constvars, constants, strict=True))
        self.targets = aims
        self.given = {*self.constants}
        self.given |= {v for v, known in zip(self.jaxpr.invars, fixed, strict=True) if known}
        self.fixed, self.makers = set(self.given), {}
        self.aims = {variable: frozenset([path]) for variable, path in aims.items()}
        varied = []
        for equation in self.jaxpr.eqns:
            operands = [v for v in equation.invars if not isinstance(v, compat.Literal)]
            if all(v in self.fixed for v in operands) and not equation.effects:
                reached = frozenset().union(*(self.aims.get(v, ()) for v in operands))
                for variable in equation.outvars:
                    self.fixed.add(variable)
                    self.makers[variable] = equation
                    self.aims[variable] = reached
            else:
                varied.append(equation)
        self.stages = self._stages(varied)
        self.outputs = self.jaxpr.outvars if wanted else []
        self.functions = self._functions()

    def _reached(self, equation: Any) -> frozenset[str]:
        """The targets that an equation reads."""
        read = (self.aims.get(v, frozenset()) for v in _variables(equation.invars))
        return frozenset().union(*read)

    def _stages(self, equations: Sequence[Any]) -> list[Any]:
        """Splits equations into stretches and layered scans.

        Stops whose operands are known wait for one another, so that they are measured together.
        """
        stages: list[Any] = []
        ready, waiting, group, unknown = [], [], [], set()

        def close() -> None:
            nonlocal ready, waiting, group, unknown
            if ready:
                stages.append(_Stretch(tuple(ready), False))
            if group:
                stages.append(_Stretch(tuple(group), True))
            ready, waiting, group, unknown = waiting, [], [], set()

        for equation in equations:
            reached = self._reached(equation)
            layers = self._layers(equation) if reached else None
            blocked = any(v in unknown for v in _variables(equation.invars))
            if reached and (blocked or (layers is not None and group)):
                close()
                blocked = False
            if layers is not None:
                close()
                stages.append(layers)
            elif reached:
                self.run.uses.update(reached)
                group.append(equation)
                waiting.append(equation)
                unknown.update(equation.outvars)
            elif blocked:
                waiting.append(equation)
                unknown.update(equation.outvars)
            else:
                ready.append(equation)
        close()
        close()
        return stages

    def _layers(self, equation: Any) -> "_Layers | None":
        """A scan that slices its targets as they are, to be run layer by layer."""
        if equation.primitive is not compat.SCAN or equation.params["length"] == 0:
            return None
        split, carried = compat.scan_counts(equation)
        first = split + carried
        for variable in _variables(equation.invars[first:]):
            if self.aims.get(variable) and variable not in self.targets:
                return None
        for variable in _variables(equation.invars[:first]):  # one weight in every iteration
            for path in self.aims.get(variable, ()):
                self.run.uses[path] += 2
        if not any(v in self.targets for v in _variables(equation.invars[first:])):
            return None
        return _Layers(self, equation)

    def _functions(self) -> list[Any]:
        """Each stretch compiled, with what later ones need of it."""
        needed = {v for v in _variables(self.outputs) if v not in self.fixed}
        made: list[Any] = []
        for stage in reversed(self.stages):
            if isinstance(stage, _Layers):
                made.append(frozenset(needed))
                needed |= {v for v in _variables(stage.equation.invars) if v not in self.fixed}
                continue
            results = {v for equation in stage.equations for v in equation.outvars}
            keep = [] if stage.watches else sorted(needed & results, key=_order(stage))
            function = self.function(stage.equations, keep, stage.watches)
            made.append((function, frozenset(needed)))
            needed |= set(function.varying)
        return made[::-1]

    def function(self, equations: Sequence[Any], keep: Sequence[Any], watches: bool) -> "_Function":
        """Equations as one compiled function, with the fixed ones that they need."""
        wanted = {v for equation in equations for v in _variables(equation.invars)} | set(keep)
        before = []
        for equation in reversed(self.jaxpr.eqns):
            if any(v in wanted and self.makers.get(v) is equation for v in equation.outvars):
                before.append(equation)
                wanted |= set(_variables(equation.invars))
        return _Function(self, [*before[::-1], *equations], keep, watches)

    def execute(
        self,
        fixed: dict[Any, Any],
        varying: dict[Any, list[Any]],
        index: tuple[int, ...],
    ) -> list[Any]:
        """Runs the body; `fixed` ends with the weights as they became.

        Returns a list for each result that is wanted: its value for each batch.
        """
        fixed.update(self.constants)
        for stage, function in zip(self.stages, self.functions, strict=True):
            if isinstance(stage, _Layers):
                varying.update(stage.execute(fixed, varying, index))
                needed = function
            else:
                function, needed = function
                if stage.watches:
                    self._stop(function, stage, fixed, varying, index)
                elif function.keep:
                    results = [out for out, _ in function.each(fixed, varying)]
                    columns = map(list, zip(*results, strict=True))
                    varying.update(zip(function.keep, columns, strict=True))
            for variable in [v for v in varying if v not in needed]:
                del varying[variable]
        return [self.value(atom, fixed, varying) for atom in self.outputs]

    def _stop(
        self, function: "_Function", stage: _Stretch, fixed: Any, varying: Any, index: Any
    ) -> None:
        stats = folded(new for _, new in function.each(fixed, varying))
        self.run.note(stats)
        places = {path: variable for variable, path in self.targets.items()}
        reached = dict.fromkeys(p for e in stage.equations for p in sorted(self._reached(e)))
        for path in reached:
            if path in places and path in stats and path not in self.run.sliced:
                weight = fixed[places[path]]
                fixed[places[path]] = self.run.stop(path, index, weight, stats[path])

    def value(self, atom: Any, fixed: dict[Any, Any], varying: dict[Any, list[Any]]) -> Any:
        """A value for each batch; a list of length 1 serves all of them."""
        if isinstance(atom, compat.Literal):
            return [atom.val]
        if atom in varying:
            return varying[atom]
        if atom in fixed:
            return [fixed[atom]]
        if atom not in self.alone:
            self.alone[atom] = self.function((), [atom], False)
        out, _ = self.alone[atom](fixed, {}, 0)
        return out


class _Function:
    """A stretch of a body as a compiled function of fixed and varying values."""

    def __init__(self, body: Body, equations: Sequence[Any], keep: Sequence[Any], watches: bool):
        self.keep = list(keep)
        part = compat.part_of(body.jaxpr, equations, [] if watches else self.keep)
        self.fixed = [v for v in part.invars if v in body.given]
        self.varying = [v for v in part.invars if v not in body.given]
        run, targets = body.run, body.targets

        def function(fixed: list[Any], varying: list[Any]) -> Any:
            values = dict(zip(self.fixed, fixed, strict=True))
            if watches:
                for variable in self.fixed:
                    if variable in targets:
                        path = targets[variable]
                        values[variable] = Tracked(run.watch(path, values[variable]), path)
            values.update(zip(self.varying, varying, strict=True))
            recorder = Recorder()
            frame = Frame(True, recorder if watches else None)
            out = evaluate(frame, part, [values[v] for v in part.invars])
            return out, recorder.stats()

        self.compiled = jax.jit(function)

    def __call__(self, fixed: dict[Any, Any], varying: dict[Any, list[Any]], batch: int) -> Any:
        values = [varying[v][batch if len(varying[v]) > 1 else 0] for v in self.varying]
        return self.compiled([fixed[v] for v in self.fixed], values)

    def each(self, fixed: dict[Any, Any], varying: dict[Any, list[Any]]) -> Iterable[Any]:
        """The results and statistics of each batch."""
        count = max([len(varying[v]) for v in self.varying], default=1)
        return (self(fixed, varying, batch) for batch in range(count))


class _Layers:
    """A scan over stacked layers, run layer by layer."""

    def __init__(self, outer: Body, equation: Any) -> None:
        self.outer, self.equation = outer, equation
        self.split, self.carried = compat.scan_counts(equation)
        bodies = outer.run.bodies
        if id(equation) not in bodies:
            bodies[id(equation)] = inlined(equation.params["jaxpr"])
        flat = bodies[id(equation)]
        inside = compat.opened(flat)[0].invars
        first = self.split + self.carried
        fixed, aims = [], {}
        for i, (atom, variable) in enumerate(zip(equation.invars, inside, strict=True)):
            literal = isinstance(atom, compat.Literal)
            fixed.append((literal or atom in outer.fixed) and not self.split <= i < first)
            if i >= first and not literal and atom in outer.targets:
                aims[variable] = outer.targets[atom]
        self.body = Body(flat, fixed, aims, outer.run)
        self.known = fixed

    def execute(
        self, fixed: dict[Any, Any], varying: dict[Any, list[Any]], index: tuple[int, ...]
    ) -> dict[Any, list[Any]]:
        """Runs all layers; returns the scan's results for each batch."""
        params, first = self.equation.params, self.split + self.carried
        values = [self.outer.value(atom, fixed, varying) for atom in self.equation.invars]
        inside = self.body.jaxpr.invars
        carry = values[self.split : first]
        weights: dict[Any, list[Any]] = {variable: [] for variable in self.body.targets}
        layers = range(params["length"])
        rows: list[Any] = []
        for layer in reversed(layers) if params["reverse"] else layers:
            sliced = [[_slice(x, layer) for x in xs] for xs in values[first:]]
            given = [*values[: self.split], *carry, *sliced]
            known = {v: x[0] for v, x, k in zip(inside, given, self.known, strict=True) if k}
            rest = {v: x for v, x, k in zip(inside, given, self.known, strict=True) if not k}
            results = self.body.execute(known, rest, (*index, layer))
            carry = results[: self.carried]
            rows.append(results[self.carried :])
            for variable, made in weights.items():
                made.append(known[variable])
        if params["reverse"]:
            rows.reverse()
            weights = {variable: made[::-1] for variable, made in weights.items()}
        for atom, variable in zip(self.equation.invars[first:], inside[first:], strict=True):
            if variable in weights:
                fixed[atom] = jnp.stack(weights[variable])
        return dict(zip(self.equation.outvars, [*carry, *_stacks(rows)], strict=True))


# Helpers, in order of use.


_merge = jax.jit(merge)


def folded(found: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The statistics of all batches."""
    return functools.reduce(lambda stats, new: _merge(stats, new) if stats else new, found, {})


_slice = jax.jit(lambda array, i: array[i])


def _stacks(rows: Sequence[Sequence[list[Any]]]) -> list[list[Any]]:
    """For each result, for each batch, its values of all layers stacked."""
    stacked = []
    for column in zip(*rows, strict=True):  # the layers of one result
        count = max(len(values) for values in column)
        batches = [[v[b if len(v) > 1 else 0] for v in column] for b in range(count)]
        stacked.append([jnp.stack(values) for values in batches])
    return stacked


def _variables(atoms: Iterable[Any]) -> list[Any]:
    return [atom for atom in atoms if not isinstance(atom, compat.Literal)]


def _order(stage: _Stretch) -> Callable[[Any], int]:
    places = [v for equation in stage.equations for v in equation.outvars]
    return {variable: i for i, variable in enumerate(places)}.__getitem__


def _same(path: str, new: jax.Array, old: jax.Array) -> jax.Array:
    if new.shape != old.shape or new.dtype != old.dtype:
        raise ValueError(
            f"`staged(..., visit)`: `{path}` is {old.dtype}{list(old.shape)}; `visit` returned "
            f"{new.dtype}{list(new.shape)}."
        )
    return new
