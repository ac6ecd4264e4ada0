"""What depends on parameters alone, computed once: `hoist`.

The function is cut where its rest needs a known value (`known`), after the last equation that
computes something: the result becomes an entry of `hoisted`. `_compute` computes the entries,
`_evaluate` the rest.
"""

import collections
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jopt import trees

from . import compat
from .known import Body, Graph, Known, Made, Plan, Scope, cut, follow, operands_of
from .program import Program, is_array, program


def hoist(
    apply: Callable[..., Any], params: Any, *inputs: Any
) -> tuple[Callable[..., Any], dict[str, jax.Array]]:
    """Splits a function into what its parameters alone determine, computed here, and the rest.

    A mask over a weight, weight norm, a merged low-rank adapter, fused projections or a cast become
    one array, which can then be quantized as any weight. `rest(hoisted, *inputs)` equals
    `apply(params, *inputs)`.

    A parameter that the rest reads as it is, or through layout operations alone (reshape,
    transpose, slice, gather at constant indices, broadcast, ...), stays under its path. A computed
    value is named by the paths that it is made of, `g+v`; a further one made of the same, or with
    the name of a parameter that stays, is `g+v#1`. The cut is before trailing layout operations, so
    that nothing is stored broadcast. What depends on constants alone stays in the rest.

    Values are hoisted out of `jit`, `checkpoint`, the branches of `cond` and the body of `scan`;
    there, what is made of the slices of stacked parameters is computed for all layers and stacked.
    A value of a branch is then computed whether the branch is taken or not: where its derivative is
    not finite (a square root at 0), a gradient through `hoisted` is NaN though that of `apply` is
    not. Values made of every pair of entries take the memory of every pair.

    A `while` loop, a function with a derivative of its own, a `shard_map` and a kernel are hoisted
    whole or not at all, and so is an equation with effects: not at all.

    `rest` traces `apply` at each call and keeps no trace, so it serves other inputs as well. Where
    something made of parameters has a shape that follows the inputs' (positions cut to the length
    of a text, then cast), say which sizes vary: give `inputs` as `jax.ShapeDtypeStruct`s with
    dimensions from `jax.export.symbolic_shape`, and it stays in the rest.

    Args:
      apply: any JAX function.
      params: its parameters; arrays, which may be traced, and Python values.
      *inputs: its other arguments, or `jax.ShapeDtypeStruct`s for them.

    Returns:
      `(rest, hoisted)`: a function of `hoisted` and the inputs, and a flat dictionary of arrays.

    Raises:
      ValueError: if `params` has typed leaves. `rest` raises it if `hoisted` has typed leaves and
        `rest` is not lifted, if an entry is missing or has another shape or dtype, or if other
        inputs make the function compute from the parameters what it did not when hoisted.

    Example:
      >>> import jax.numpy as jnp
      >>> from jopt import trace
      >>> params = {"kernel": jnp.ones((4, 2)), "mask": jnp.eye(4, 2), "bias": jnp.zeros(2)}
      >>> def apply(p, x):
      ...     return x @ jnp.where(p["mask"] > 0, p["kernel"], 0) + p["bias"]
      >>> rest, hoisted = trace.hoist(apply, params, jnp.ones((1, 4)))
      >>> {name: array.shape for name, array in hoisted.items()}
      {'bias': (2,), 'kernel+mask': (4, 2)}
      >>> rest(hoisted, jnp.ones((3, 4))).shape
      (3, 2)
    """
    for path, leaf in trees.items(params):
        if trees.is_typed(leaf):
            raise ValueError(
                f"`hoist(apply, params, ...)`: `{path}` is a `{type(leaf).__name__}` already.\n"
                "Hoist first, then quantize what comes out: `rest, hoisted = hoist(apply, params, "
                "x)`, `quantize(hoisted, policy)`, and call `lift(rest)`."
            )
    leaves, structure = jax.tree.flatten(params)
    arrays = [leaf for leaf in leaves if is_array(leaf)]
    shapes = iter(jax.eval_shape(lambda arrays: arrays, arrays))
    shaped = structure.unflatten([next(shapes) if is_array(x) else x for x in leaves])
    traced, body = _followed(apply, shaped, inputs)
    plan = cut(body, [True] * len(body.jaxpr.outvars), lambda known: known.made.computed)

    parameters = [known for known in body.operands if known]
    given = {p.made: [array] for p, array in zip(parameters, arrays, strict=True)}
    kept = [p for p, needed in zip(body.operands, plan.needed, strict=True) if p and needed]
    kept += sorted(plan.demanded, key=lambda known: (known.made.serial, known.result))
    names = _names([operand.path for operand in traced.operands], kept)
    hoisted = dict(zip(names, _compute(kept, given), strict=True))
    avals = [jax.typeof(hoisted[name]) for name in names]
    entries = {
        known.identity: Entry(name, aval.shape, aval.dtype)
        for known, name, aval in zip(kept, names, avals, strict=True)
    }

    @functools.wraps(apply)
    def rest(hoisted: Mapping[str, Any], *inputs: Any) -> Any:
        return _rest(apply, shaped, entries, hoisted, inputs)

    return rest, hoisted


class Entry(NamedTuple):
    """What `rest` expects under a name."""

    name: str
    shape: tuple[int, ...]
    dtype: Any

    def of(self, hoisted: Mapping[str, Any]) -> Any:
        """The array of that name."""
        if self.name not in hoisted:
            raise ValueError(
                f"`rest(hoisted, ...)`: `{self.name}` is missing. It has {sorted(hoisted)}."
            )
        found = hoisted[self.name]
        if trees.is_typed(found):
            raise ValueError(
                f"`rest(hoisted, ...)`: `{self.name}` is a `{type(found).__name__}`.\n"
                "Call `lift(rest)(hoisted, ...)`, which accepts typed leaves."
            )
        aval = jax.typeof(found)
        if (aval.shape, aval.dtype) != (self.shape, self.dtype):
            raise ValueError(
                f"`rest(hoisted, ...)`: `{self.name}` is {aval.dtype}{list(aval.shape)}; expected "
                f"{self.dtype}{list(self.shape)}, as `hoist` made it."
            )
        return found


def _rest(
    apply: Callable[..., Any],
    shaped: Any,
    entries: Mapping[str, Entry],
    hoisted: Mapping[str, Any],
    inputs: Sequence[Any],
) -> Any:
    """What `apply` computes, from entries; `shaped` are its parameters as shapes."""
    traced, body = _followed(apply, shaped, inputs)
    plan = cut(body, [True] * len(body.jaxpr.outvars), lambda known: known.identity in entries)
    operands = []
    for operand, known, needed in zip(traced.operands, body.operands, plan.needed, strict=True):
        if operand.typed:
            raise ValueError(
                f"`rest(hoisted, ...)`: an input has a `{type(operand.value).__name__}`.\n"
                "Call `lift(rest)(hoisted, ...)`, which accepts typed leaves."
            )
        if known and needed and known.identity not in entries:
            raise ValueError(
                f"`rest(hoisted, ...)`: with these inputs the function computes from "
                f"`{operand.path}` what it did not when hoisted.\nCall `hoist` with inputs of "
                "these shapes and dtypes, or with the sizes that vary as symbols "
                "(`jax.export.symbolic_shape`)."
            )
        value = entries[known.identity].of(hoisted) if known and needed else operand.value
        operands.append(value if needed else None)
    slots = {known: entries[known.identity].of(hoisted) for known in plan.demanded}
    results = _evaluate(plan, operands, slots)
    return traced.results([x if isinstance(x, jax.Array) else jnp.asarray(x) for x in results])


def _names(paths: Sequence[str], kept: Sequence[Known]) -> list[str]:
    """A name for each entry, parameters first."""
    names: dict[str, None] = {}
    for known in kept:
        stem = "+".join(paths[number] for number in known.made.parameters)
        numbered = (f"{stem}#{n}" for n in itertools.count(1))
        names[next(n for n in itertools.chain([stem], numbered) if n not in names)] = None
    return list(names)


def _followed(apply: Callable[..., Any], params: Any, inputs: Any) -> tuple[Program, Body]:
    traced, graph = program(apply, (params, *inputs)), Graph()
    known = [
        graph.parameter(i, operand.path) if operand.parameter else None
        for i, operand in enumerate(traced.operands)
    ]
    return traced, follow(graph, traced.jaxpr, known, None)


# The entries.


def _compute(
    wanted: Sequence[Known], values: Mapping[Made, Sequence[Any]], within: tuple[Scope, ...] = ()
) -> list[Any]:
    """Computes known values; what a scan slices is computed for all slices, outermost scan first.

    `values` has the parameters and, inside the scans `within`, the slices and all around them.
    """
    values, after = dict(values), collections.defaultdict(list)
    for known in wanted:
        missing = [scope for scope in known.made.scopes if scope not in within]
        if missing:
            after[missing[0]].append(known)
    todo = _ancestors(wanted, values)
    here = [made for made in todo if set(made.scopes) <= set(within)]
    last = {operand.made: made for made in here for operand in made.operands}
    keep = {operand.made for made in set(todo).difference(here) for operand in made.operands}
    keep.update(known.made for known in wanted)
    for made in here:
        if made.stack:
            values[made] = _mapped(made.operands, made.stack, values, within)
        elif made.equation is None:
            values[made] = [made.value]
        else:
            operands = [values[operand.made][operand.result] for operand in made.operands]
            with compat.context(made.equation):
                values[made] = compat.bind(made.equation, operands)
        for operand in set(made.operands):  # free what is read no more: weights are large
            if last[operand.made] is made and operand.made not in keep:
                values.pop(operand.made, None)
    stacked = {}
    for scope, group in after.items():
        stacked.update(zip(group, _mapped(group, scope, values, within), strict=True))
    return [stacked[x] if x in stacked else values[x.made][x.result] for x in wanted]


def _mapped(
    wanted: Sequence[Known], scope: Scope, values: Mapping[Made, Sequence[Any]], within: Any
) -> list[Any]:
    """Computes known values for all slices of a scan, and stacks them."""
    given = [made for made in _ancestors(wanted, values) if made.equation is None]
    slices = [made for made in given if made.scopes[-1:] == (scope,) and not made.stack]
    arrays = [values[made.operands[0].made][made.operands[0].result] for made in slices]

    def one(arrays: Any) -> Any:
        inside = {made: [array] for made, array in zip(slices, arrays, strict=True)}
        return _compute(wanted, {**values, **inside}, (*within, scope))

    return jax.lax.map(one, arrays)


def _ancestors(wanted: Sequence[Known], values: Mapping[Made, Any]) -> list[Made]:
    """All that the wanted values are made of and that has no value yet, in order."""
    found, stack = set(), [known.made for known in wanted]
    while stack:
        made = stack.pop()
        if made not in found and made not in values:
            found.add(made)
            stack.extend(operand.made for operand in made.operands)
    return sorted(found, key=lambda made: made.serial)


# The rest. Constructs are called again as `control` does, entries coming in besides the operands.


def _evaluate(plan: Plan, operands: Sequence[Any], slots: Mapping[Known, Any]) -> list[Any]:
    """Runs what is left of a body; results that are not wanted are None."""
    jaxpr, inputs = plan.body.jaxpr, [*plan.body.constants, *operands]
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], inputs, strict=True))
    fixed = {variable: slots[known] for variable, known in plan.slots.items()}
    values.update(fixed)
    last = {v: i for i in plan.equations for v in _variables(jaxpr.eqns[i].invars)}
    last.update(
        (v, len(jaxpr.eqns)) for v in _variables(itertools.compress(jaxpr.outvars, plan.wanted))
    )
    for enter, positions in itertools.groupby(plan.equations, plan.inside.__contains__):
        positions = list(positions)
        equations = [jaxpr.eqns[i] for i in positions]
        if not enter:
            made = (v for equation in equations for v in equation.outvars)
            keep = [v for v in made if last.get(v, -1) > positions[-1]]
            values.update(zip(keep, compat.run(jaxpr, equations, values, keep), strict=True))
        for position, equation in zip(positions, equations, strict=True) if enter else ():
            plans = plan.inside[position]
            pairs = zip(equation.invars, operands_of(equation, plans), strict=True)
            found = [_value(values, v) if needed else None for v, needed in pairs]
            with compat.context(equation):
                results = _CONSTRUCTS[equation.primitive](equation, plans, found, slots)
            values.update(zip(equation.outvars, results, strict=True))
        values.update(fixed)
    pairs = zip(jaxpr.outvars, plan.wanted, strict=True)
    return [_value(values, v) if wanted else None for v, wanted in pairs]


def _variables(atoms: Iterable[Any]) -> Iterator[Any]:
    return (atom for atom in atoms if not isinstance(atom, compat.Literal))


def _value(values: Mapping[Any, Any], atom: Any) -> Any:
    return atom.val if isinstance(atom, compat.Literal) else values[atom]


Plans = Sequence[Plan]
Slots = Mapping[Known, Any]


def _inline(equation: Any, plans: Plans, operands: Sequence[Any], slots: Slots) -> list[Any]:
    return _evaluate(plans[0], operands, slots)


def _jit(equation: Any, plans: Plans, operands: Sequence[Any], slots: Slots) -> list[Any]:
    """Inlined under its name, unless it says something about placement or donation."""
    (plan,), params, options = plans, equation.params, compat.jit_options(equation)
    if not options:
        with compat.scope(f"jit({params['name']})"):
            return _evaluate(plan, operands, slots)

    def body(entries: Sequence[Any], *operands: Any) -> Any:
        return _evaluate(plan, operands, dict(zip(plan.demanded, entries, strict=True)))

    if "in_shardings" in options:
        options["in_shardings"] = (compat.UNSPECIFIED, *options["in_shardings"])
    if "out_shardings" in options:
        pairs = zip(options["out_shardings"], plan.wanted, strict=True)
        options["out_shardings"] = [s if wanted else None for s, wanted in pairs]
    if "donate_argnums" in options:
        options["donate_argnums"] = tuple(i + 1 for i in options["donate_argnums"])
    body.__name__ = params["name"]
    return jax.jit(body, **options)([slots[known] for known in plan.demanded], *operands)


def _remat(equation: Any, plans: Plans, operands: Sequence[Any], slots: Slots) -> list[Any]:
    (plan,), params, cse = plans, equation.params, equation.params["prevent_cse"]
    each = [cse] * len(operands) if isinstance(cse, bool) else cse
    barred = [params["differentiated"] and c for c in each]

    def body(entries: Sequence[Any], *operands: Any) -> Any:
        # As in `control`: what is differentiated already stands behind a barrier.
        behind = iter(jax.lax.optimization_barrier(list(itertools.compress(operands, barred))))
        inside = [next(behind) if b else x for b, x in zip(barred, operands, strict=True)]
        return _evaluate(plan, inside, dict(zip(plan.demanded, entries, strict=True)))

    cse = cse if isinstance(cse, bool) else (False, *cse)
    again = jax.checkpoint(body, prevent_cse=cse, policy=params["policy"])
    return again([slots[known] for known in plan.demanded], *operands)


def _scan(equation: Any, plans: Plans, operands: Sequence[Any], slots: Slots) -> list[Any]:
    (plan,), params = plans, equation.params
    split, carried = compat.scan_counts(equation)
    constants, init, xs = operands[:split], operands[split:][:carried], operands[split + carried :]
    sliced = [known for known in plan.demanded if plan.body.scope in known.made.scopes]

    def body(carry: Any, slices: Any) -> Any:
        entries, xs = slices
        inside = {**slots, **dict(zip(sliced, entries, strict=True))}
        results = _evaluate(plan, [*constants, *carry, *xs], inside)
        return results[:carried], results[carried:]

    carry, ys = jax.lax.scan(
        body,
        init,
        ([slots[known] for known in sliced], xs),
        length=params["length"],
        reverse=params["reverse"],
        unroll=params["unroll"],
    )
    return [*carry, *ys]


def _cond(equation: Any, plans: Plans, operands: Sequence[Any], slots: Slots) -> list[Any]:
    """A switch again, on an index or on the platform."""
    index, *operands = operands

    def branch(plan: Plan) -> Any:
        return lambda *operands: _evaluate(plan, operands, slots)

    branches, platforms = [branch(plan) for plan in plans], compat.branch_platforms(equation)
    if platforms is None:
        return jax.lax.switch(index, branches, *operands)
    named = zip(platforms, branches, strict=True)
    chosen = {name: branch for names, branch in named for name in names or ("default",)}
    default = chosen.pop("default", None)
    return jax.lax.platform_dependent(*operands, default=default, **chosen)


_CONSTRUCTS: dict[Any, Callable[..., list[Any]]] = {
    **dict.fromkeys(compat.INLINE, _inline),
    compat.JIT: _jit,
    compat.REMAT: _remat,
    compat.SCAN: _scan,
    compat.COND: _cond,
}
