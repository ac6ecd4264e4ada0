"""A function run in stages: it stops before each weight, which may change before it goes on.

Methods that round or prune a layer at a time want to know what the layer really gets: the outputs
of the layers before it as they are now, compressed. `staged` runs all batches up to the next
weights, measures what meets them, lets the caller change them, and goes on with what they became.
One layer's statistics are in memory at a time; a scan over stacked layers is run layer by layer.
Each stretch is compiled once, those inside a scan once for all layers.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jopt import trees

from . import compat
from .frame import Frame, Tracked
from .program import is_array, program
from .sites import Site, sites
from .stats import Recorder, merge
from .walk import collect, evaluate
from .watch import SLICED, Measure, watched

PyTree = Any


class Target(NamedTuple):
    """A weight to stop at, and how its products read it. Axes count from its end."""

    path: str
    contracted: tuple[int, ...]
    batched: tuple[int, ...]
    groups: int  # of a convolution's features


@dataclasses.dataclass(frozen=True)
class Stop:
    """A weight before which the function has stopped."""

    target: Target
    index: tuple[int, ...]  # the layer's number in each scan around it, outermost first
    weight: jax.Array  # this layer's
    stats: Any  # what `measure` found, over all batches: a pytree of arrays

    @property
    def path(self) -> str:
        """The parameter's path."""
        return self.target.path

    def matrices(self, weight: jax.Array | None = None) -> jax.Array:
        """The weight as `[blocks, inputs, outputs]`, in the order of the statistics."""
        weight = self.weight if weight is None else weight
        batched, contracted, free = self._axes(weight.ndim)
        moved = jnp.transpose(weight, (*batched, *contracted, *free))
        sizes = [int(np.prod([weight.shape[a] for a in axes])) for axes in (batched, contracted)]
        if self.target.groups == 1:
            return moved.reshape(*sizes, -1)
        return jnp.moveaxis(moved.reshape(sizes[1], self.target.groups, -1), 1, 0)

    def restored(self, matrices: jax.Array) -> jax.Array:
        """What `matrices` took apart."""
        batched, contracted, free = self._axes(self.weight.ndim)
        if self.target.groups > 1:
            matrices = jnp.moveaxis(matrices, 0, 1)
        order = (*batched, *contracted, *free)
        moved = matrices.reshape([self.weight.shape[axis] for axis in order])
        return jnp.transpose(moved, [order.index(axis) for axis in range(len(order))])

    def coarse(self, matrices: jax.Array) -> jax.Array:
        """`[blocks, groups of inputs, outputs or 1]` laid out along the weight, at its rank."""
        shape, (batched, contracted, free) = self.weight.shape, self._axes(self.weight.ndim)
        blocks, groups, outputs = matrices.shape
        inputs = [shape[axis] for axis in contracted]
        total = int(np.prod(inputs))
        if groups == 1:
            inputs = [1] * len(inputs)
        elif groups != total:  # consecutive inputs, which lie along the last of the axes
            inputs[-1] = inputs[-1] * groups // total
        kept = [shape[axis] for axis in free]
        if self.target.groups > 1:
            matrices, blocks = jnp.moveaxis(matrices, 0, 1), 1
            kept = [self.target.groups * outputs]
        elif outputs == 1:
            kept = [1] * len(kept)
        sizes = [shape[axis] for axis in batched] if blocks > 1 else [1] * len(batched)
        order = (*batched, *contracted, *free)
        moved = matrices.reshape(*sizes, *inputs, *kept)
        return jnp.transpose(moved, [order.index(axis) for axis in range(len(order))])

    def _axes(self, ndim: int) -> tuple[list[int], list[int], list[int]]:
        batched, contracted = (
            sorted(axis % ndim for axis in axes)
            for axes in (self.target.batched, self.target.contracted)
        )
        return batched, contracted, [a for a in range(ndim) if a not in batched + contracted]


def staged(
    apply: Callable[..., Any],
    params: PyTree,
    batches: Iterable[Any],
    paths: Iterable[str],
    measure: Measure,
    visit: Callable[[Stop], jax.Array | None],
    *,
    caller: str = "staged",
) -> tuple[PyTree, dict[str, str]]:
    """Runs `apply` on all batches, stopping before the weights at `paths`.

    Weights are visited in the order of the function. Weights that read the same values (query, key
    and value) are measured together. Everything after a visited weight sees what it became. A
    weight that several products read, or one that a loop uses in every iteration, is visited
    before all others, with what all of its uses meet added up. Those inside a `cond` or `while`
    are measured together. A stacked weight is visited layer by layer if the scan slices it as it
    is, and not at all if it slices a view of it.

    Args:
      apply: any function `apply(params, *inputs)`.
      params: its parameters. Typed leaves are made dense.
      batches: each a tuple of the inputs, or the one input; all of the same shapes.
      paths: of the weights.
      measure: what to measure, such as `jopt.trace.gram`.
      visit: is given a `Stop` and returns the new weight of its shape and dtype, or None.
      caller: the function that errors name.

    Returns:
      `(params, missed)`: dense parameters, and why each weight that was not visited was not.

    Raises:
      ValueError: if there is no batch, or they differ in shape.
    """
    inputs = [batch if isinstance(batch, tuple) else (batch,) for batch in batches]
    _check(caller, inputs)
    params = jax.tree.map(
        lambda x: x.materialise() if trees.is_typed(x) else x, params, is_leaf=trees.is_typed
    )
    found = sites(apply, params, *inputs[0])
    targets, missed = {}, {}
    for path in paths:
        target = target_of(path, found)
        targets, missed = (
            (targets, missed | {path: target})
            if isinstance(target, str)
            else (targets | {path: target}, missed)
        )
    traced = program(apply, (params, *inputs[0]))
    run = _Run(targets, measure, visit)
    planned = _planned(traced, run)

    # Shared weights first.
    if run.shared:
        params = _visit_shared(apply, params, inputs, run)
    columns = [_arrays((params, *batch)) for batch in inputs]
    fixed, varying = {}, {}
    for variable, operand, *values in zip(
        planned.jaxpr.invars, traced.operands, *columns, strict=True
    ):
        if operand.parameter:
            fixed[variable] = values[0]
        else:
            varying[variable] = values
    planned.execute(fixed, varying, ())
    new = {
        operand.path: fixed[variable]
        for variable, operand in zip(planned.jaxpr.invars, traced.operands, strict=True)
        if operand.parameter
    }
    params = trees.map_with_path(lambda path, leaf: new.get(path, leaf), params)
    missed |= {
        path: SLICED_VIEW if path in run.sliced else NOT_MET
        for path in targets
        if path not in run.visited
    }
    return params, missed


NOT_MET = (
    "no product met this weight as it is: the function computes something from it first; "
    "`jopt.trace.hoist` makes a weight of what it computes"
)


SLICED_VIEW = (
    "a scan slices a view of it, so that its layers cannot be told apart: scan the weight as it is"
)


def target_of(path: str, found: Sequence[Site]) -> Target | str:
    """How the products at `path` read their weight, or why that cannot be told."""
    uses = [(site, use) for site in found for use in site.uses if use.path == path]
    layouts = {
        Target(path, use.contracted, use.batched, site.groups)
        for site, use in uses
        if use.contracted and use.batched is not None
    }
    if not uses:
        return "no product reads it"
    if not layouts:
        return "its products sum over parts of its axes"
    if len(layouts) > 1:
        return "its products read it in different ways"
    return layouts.pop()


# Planning: which equations run between which stops.


class _Run:
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


def _planned(traced: Any, run: _Run) -> "_Body":
    flat = _flattened(traced.jaxpr)
    inner = compat.opened(flat)[0]
    aims = {
        variable: operand.path
        for variable, operand in zip(inner.invars, traced.operands, strict=True)
        if operand.parameter and operand.path in run.targets
    }
    fixed = [operand.parameter for operand in traced.operands]
    _Body(flat, fixed, aims, run, wanted=False)  # counts the uses
    run.shared = frozenset(path for path, count in run.uses.items() if count > 1)
    aims = {variable: path for variable, path in aims.items() if path not in run.shared}
    return _Body(flat, fixed, aims, run, wanted=False)


def _flattened(jaxpr: Any) -> Any:
    """The same equations with calls inlined, so that stops may lie within them."""
    invars = compat.opened(jaxpr)[0].invars
    avals = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in invars]
    return jax.make_jaxpr(lambda *values: _inlined(jaxpr, values))(*avals)


def _inlined(jaxpr: Any, operands: Sequence[Any]) -> list[Any]:
    jaxpr, constants = compat.opened(jaxpr)
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*constants, *operands], strict=True))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, compat.Literal) else values[atom]

    for equation in jaxpr.eqns:
        operands = [read(v) for v in equation.invars]
        with compat.context(equation):
            if equation.primitive in compat.CALLS and _has_products(equation):
                results = _inlined(compat.body_of(equation), operands)
            else:
                results = compat.bind(equation, operands)
        values.update(zip(equation.outvars, results, strict=True))
    return [read(v) for v in jaxpr.outvars]


def _has_products(equation: Any) -> bool:
    bodies = (compat.opened(body)[0] for body in compat.bodies(equation))
    return any(
        inner.primitive.name in ("dot_general", "conv_general_dilated") or _has_products(inner)
        for body in bodies
        for inner in body.eqns
    )


class _Stretch(NamedTuple):
    """Equations that run between two stops."""

    equations: tuple[Any, ...]
    watches: bool  # measure what meets their weights, and stop


class _Body:
    """A body, planned; `execute` runs it on all batches.

    A value is fixed if it depends on parameters alone; then it is computed where it is needed, from
    the parameters as they are at that time. Others have one value for each batch.
    """

    def __init__(
        self,
        jaxpr: Any,
        fixed: Sequence[bool],
        aims: dict[Any, str],
        run: _Run,
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
        stats = _folded(new for _, new in function.each(fixed, varying))
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

    def __init__(self, body: _Body, equations: Sequence[Any], keep: Sequence[Any], watches: bool):
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

    def __init__(self, outer: _Body, equation: Any) -> None:
        self.outer, self.equation = outer, equation
        self.split, self.carried = compat.scan_counts(equation)
        bodies = outer.run.bodies
        if id(equation) not in bodies:
            bodies[id(equation)] = _flattened(equation.params["jaxpr"])
        flat = bodies[id(equation)]
        inside = compat.opened(flat)[0].invars
        first = self.split + self.carried
        fixed, aims = [], {}
        for i, (atom, variable) in enumerate(zip(equation.invars, inside, strict=True)):
            literal = isinstance(atom, compat.Literal)
            fixed.append((literal or atom in outer.fixed) and not self.split <= i < first)
            if i >= first and not literal and atom in outer.targets:
                aims[variable] = outer.targets[atom]
        self.body = _Body(flat, fixed, aims, outer.run)
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


# Shared weights, and helpers.


def _visit_shared(
    apply: Callable[..., Any], params: PyTree, inputs: Sequence[tuple[Any, ...]], run: _Run
) -> PyTree:
    """Visits each weight that several products read, with what all of them meet."""
    for path in sorted(run.shared):
        observe = _observer(apply, params, run, path)
        stats = _folded(map(observe, inputs))
        run.note(stats)
        if path not in stats or path in run.sliced:
            continue
        weight = dict(trees.items(params))[path]
        new = run.stop(path, (), weight, stats[path])
        params = trees.map_with_path(
            lambda at, leaf, path=path, new=new: new if at == path else leaf, params
        )
    return params


_merge = jax.jit(merge)


def _folded(found: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The statistics of all batches."""
    return functools.reduce(lambda stats, new: _merge(stats, new) if stats else new, found, {})


def _observer(
    apply: Callable[..., Any], params: PyTree, run: _Run, path: str
) -> Callable[[tuple[Any, ...]], dict[str, Any]]:
    """What one batch adds to the statistics of one weight. Python values stay Python."""
    structure: Any = None
    rest: list[Any] = []

    def statistics(arrays: list[Any]) -> dict[str, Any]:
        given = iter(arrays)
        leaves = [next(given) if is_array(leaf) else leaf for leaf in rest]
        params, inputs = jax.tree.unflatten(structure, leaves)
        marked = trees.map_with_path(
            lambda at, leaf: run.watch(path, leaf) if at == path else leaf, params
        )
        return collect(apply, allow_dense=True)(marked, *inputs)[1]

    compiled = jax.jit(statistics)

    def observe(inputs: tuple[Any, ...]) -> dict[str, Any]:
        nonlocal structure, rest
        rest, structure = jax.tree.flatten((params, inputs))
        return compiled([leaf for leaf in rest if is_array(leaf)])

    return observe


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


def _arrays(args: Any) -> list[Any]:
    """The arrays among arguments, as `program` orders them."""
    return [leaf for leaf in jax.tree.leaves(args) if is_array(leaf)]


def _same(path: str, new: jax.Array, old: jax.Array) -> jax.Array:
    if new.shape != old.shape or new.dtype != old.dtype:
        raise ValueError(
            f"`staged(..., visit)`: `{path}` is {old.dtype}{list(old.shape)}; `visit` returned "
            f"{new.dtype}{list(new.shape)}."
        )
    return new


def _check(caller: str, inputs: Sequence[tuple[Any, ...]]) -> None:
    if not inputs:
        raise ValueError(f"`{caller}(apply, params, batches, ...)` got no batch.")

    def shapes(batch: Any) -> Any:
        return jax.tree.map(lambda x: (jnp.shape(x), x.dtype) if is_array(x) else x, batch)

    first = shapes(inputs[0])
    for number, batch in enumerate(inputs):
        if shapes(batch) != first:
            raise ValueError(
                f"`{caller}(apply, params, batches, ...)`: batch {number} has {shapes(batch)}, the "
                f"first has {first}.\nBatches must have one shape: drop or pad the last one."
            )
