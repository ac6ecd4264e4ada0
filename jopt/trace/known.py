"""Values made of parameters and constants alone, and where a function is cut so that they enter it.

`follow` finds these *known* values in a body and in the bodies inside it; they form a graph whose
nodes (`Made`) are told from trace to trace by an `identity`. `cut` walks back from a function's
results: it stops at known values that are entries, and what it has not met by then need not run.
Nothing is bound here.
"""

import collections
import dataclasses
import hashlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from . import compat

# Change how a value lies in memory, not what it holds: alone they are no reason to hoist.
_LAYOUTS = {
    *("broadcast_in_dim", "copy", "copy_p", "device_put", "dynamic_slice", "gather", "name"),
    *("layout_constraint", "mesh_cast", "optimization_barrier", "pcast", "pvary", "reshape"),
    *("reshard", "rev", "sharding_constraint", "slice", "split", "squeeze", "stop_gradient"),
    "transpose",
}


class Scope(NamedTuple):
    """The iterations of a scan, as long as scans of one length in one place are alike."""

    around: "Scope | None"
    length: int


@dataclasses.dataclass(frozen=True, eq=False)
class Made:
    """How known values are made: by an equation, or a parameter, a constant, a slice, a stack."""

    identity: str  # the same in every trace of the function
    serial: int
    parameters: tuple[int, ...] = ()  # what it is made of
    scopes: tuple[Scope, ...] = ()  # the scans whose slices it is made of, outermost first
    computed: bool = False  # by an equation that is no mere layout, from parameters
    equation: Any = None
    operands: tuple["Known", ...] = ()
    value: Any = None  # of a constant
    stack: Scope | None = None  # the scan that stacks the operand


class Known(NamedTuple):
    """One result of what is made."""

    made: Made
    result: int = 0

    @property
    def identity(self) -> str:
        return f"{self.made.identity}.{self.result}"


class Graph:
    """Makes the known values of one trace, equal ones once."""

    def __init__(self) -> None:
        self._made: dict[Any, Made] = {}
        self._met: collections.Counter[str] = collections.Counter()

    def parameter(self, number: int, path: str) -> Known:
        return self._add(("parameter", number), f"parameter {number} {path}", parameters=(number,))

    def constant(self, value: Any) -> Known:
        """A closed-over array or a literal; the latter is told by its value from trace to trace."""
        if isinstance(value, jax.Array) or np.ndim(value):
            return self._add(("constant", id(value)), _told_array(value), value=value)
        text = f"literal {jax.typeof(value)} {value!r}"
        return self._add(text, text, value=value)

    def sliced(self, known: Known, scope: Scope) -> Known:
        """What a scan makes of one of its `xs`."""
        made = known.made
        if made.stack == scope:
            return made.operands[0]
        return self._add(
            ("slice", known, scope),
            f"slice {known.identity}",
            parameters=made.parameters,
            scopes=(*made.scopes, scope),
            operands=(known,),
        )

    def stacked(self, known: Known, scope: Scope) -> Known:
        """What a scan makes of a result that it stacks."""
        made = known.made
        return self._add(
            ("stack", known, scope),
            f"stack {known.identity}",
            parameters=made.parameters,
            scopes=tuple(other for other in made.scopes if other != scope),
            operands=(known,),
            stack=scope,
        )

    def results(self, equation: Any, operands: Sequence[Known]) -> list[Known]:
        """The results of an equation all of whose operands are known."""
        name, params = equation.primitive.name, equation.params
        union = {scope for operand in operands for scope in operand.made.scopes}
        parameters = {number for operand in operands for number in operand.made.parameters}
        try:
            key = (equation.primitive, tuple(sorted(params.items())), *operands)
            hash(key)
        except TypeError:  # a parameter that does not compare: no two such equations are equal
            key = (id(equation), *operands)
        told = [name, _told(params), [known.identity for known in operands]]
        made = self._add(
            key,
            repr([*told, [str(v.aval) for v in equation.outvars]]),
            parameters=tuple(sorted(parameters)),
            scopes=tuple(sorted(union, key=_depth)),
            computed=bool(parameters) and not _is_layout(equation, operands),
            equation=equation,
            operands=tuple(operands),
        ).made
        return [Known(made, i) for i in range(len(equation.outvars))]

    def _add(self, key: Any, text: str, **fields: Any) -> Known:
        if key not in self._made:
            digest = hashlib.sha256(text.encode()).hexdigest()
            identity = f"{digest} {self._met[digest]}"
            self._met[digest] += 1
            self._made[key] = Made(identity, len(self._made), **fields)
        return Known(self._made[key])


class Body(NamedTuple):
    """The equations that run together, and what is known of their variables."""

    jaxpr: Any
    constants: Sequence[Any]
    operands: Sequence[Known | None]
    known: dict[Any, Known]
    inside: dict[int, tuple["Body", ...]]  # of constructs, by position
    scope: Scope | None  # of the innermost scan around them


def follow(graph: Graph, jaxpr: Any, operands: Sequence[Known | None], scope: Scope | None) -> Body:
    """Finds the known values of a body and of those inside it."""
    jaxpr, constants = compat.opened(jaxpr)
    known = {v: graph.constant(c) for v, c in zip(jaxpr.constvars, constants, strict=True)}
    known.update((v, x) for v, x in zip(jaxpr.invars, operands, strict=True) if x)
    body = Body(jaxpr, constants, operands, known, {}, scope)
    for position, equation in enumerate(jaxpr.eqns):
        found = [
            graph.constant(v.val) if isinstance(v, compat.Literal) else known.get(v)
            for v in equation.invars
        ]
        results = _results(graph, body, position, found)
        known.update((v, x) for v, x in zip(equation.outvars, results, strict=True) if x)
    return body


def _results(
    graph: Graph, body: Body, position: int, operands: Sequence[Known | None]
) -> Sequence[Known | None]:
    """The known results of an equation, which is entered if it has a body to hoist from."""
    equation = body.jaxpr.eqns[position]
    primitive, whole = equation.primitive, all(operands)
    parameters = any(x and x.made.parameters for x in operands)
    if parameters and primitive in (compat.JIT, compat.REMAT, *compat.INLINE):
        placed = primitive is compat.JIT and compat.jit_options(equation)
        if not (placed and whole):
            inner = follow(graph, compat.body_of(equation), operands, body.scope)
            body.inside[position] = (inner,)
            return [_read(graph, inner, atom) for atom in inner.jaxpr.outvars]
    if whole and not equation.effects and not _is_symbolic(equation):
        return graph.results(equation, [x for x in operands if x])
    if parameters and primitive is compat.SCAN:
        split, carried = compat.scan_counts(equation)
        scope = Scope(body.scope, equation.params["length"])
        slices = [graph.sliced(x, scope) if x else None for x in operands[split + carried :]]
        inside = [*operands[:split], *[None] * carried, *slices]
        inner = follow(graph, equation.params["jaxpr"], inside, scope)
        body.inside[position] = (inner,)
        known = [_read(graph, inner, atom) for atom in inner.jaxpr.outvars[carried:]]
        stacked = [graph.stacked(k, scope) if k and scope in k.made.scopes else None for k in known]
        return [*[None] * carried, *stacked]
    if parameters and primitive is compat.COND:
        body.inside[position] = tuple(
            follow(graph, branch, operands[1:], body.scope)
            for branch in equation.params["branches"]
        )
    return [None] * len(equation.outvars)


def _read(graph: Graph, body: Body, atom: Any) -> Known | None:
    return graph.constant(atom.val) if isinstance(atom, compat.Literal) else body.known.get(atom)


def _is_layout(equation: Any, operands: Sequence[Known]) -> bool:
    """Whether an equation lays out its first operand, in a way that no parameter determines."""
    name, params = equation.primitive.name, equation.params
    if name == "convert_element_type":  # of a weak type to the same
        return equation.invars[0].aval.dtype == params["new_dtype"]
    alone = not any(operand.made.parameters for operand in operands[1:])
    return name in _LAYOUTS and (alone or name == "optimization_barrier")


def _is_symbolic(equation: Any) -> bool:
    """Whether a result depends on a size that was given as a symbol."""
    sizes = (n for v in equation.outvars for n in getattr(v.aval, "shape", ()))
    return equation.primitive.name == "dim_as_value" or any(map(jax.export.is_symbolic_dim, sizes))


def _told(value: Any) -> Any:
    """What an equation's parameters say, as text that is the same in every trace."""
    if hasattr(compat.opened(value)[0], "eqns"):
        return _told_body(value)
    if isinstance(value, dict):
        return [(key, _told(value[key])) for key in sorted(value)]
    if isinstance(value, tuple | list):
        return [_told(x) for x in value]
    text = repr(value)
    return type(value).__name__ if " at 0x" in text else text  # of functions: addresses differ


def _told_body(jaxpr: Any) -> list[Any]:
    """What a nested body computes, its variables numbered in order."""
    jaxpr, constants = compat.opened(jaxpr)
    variables = [*jaxpr.constvars, *jaxpr.invars, *(v for e in jaxpr.eqns for v in e.outvars)]
    numbers = {variable: i for i, variable in enumerate(variables)}

    def name(atom: Any) -> str:
        if not isinstance(atom, compat.Literal):
            return f"{numbers[atom]} {atom.aval}"
        value = atom.val
        return _told_array(value) if np.ndim(value) else f"{jax.typeof(value)} {value!r}"

    equations = [
        [e.primitive.name, _told(e.params), [*map(name, e.invars)], [*map(name, e.outvars)]]
        for e in jaxpr.eqns
    ]
    return [[_told_array(c) for c in constants], equations, [*map(name, jaxpr.outvars)]]


def _told_array(value: Any) -> str:
    """A constant array: its type and, unless it is being traced, what it holds."""
    if isinstance(value, Tracer):
        return f"array {jax.typeof(value)}"
    if isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        return f"key {_told_array(jax.random.key_data(value))}"
    digest = hashlib.sha256(np.asarray(value).tobytes()).hexdigest()
    return f"array {jax.typeof(value)} {digest}"


def _depth(scope: Scope | None) -> int:
    return 0 if scope is None else 1 + _depth(scope.around)


# Where the function is cut.


class Plan(NamedTuple):
    """What of a body the rest of the function runs."""

    body: Body
    wanted: Sequence[bool]  # of its results
    needed: Sequence[bool]  # of its operands
    equations: Sequence[int]  # positions of those that run
    inside: Mapping[int, Sequence["Plan"]]  # of constructs that change, by position
    slots: Mapping[Any, Known]  # variables whose values are entries
    demanded: Mapping[Known, None]  # all entries, here and inside
    changed: bool


def cut(body: Body, wanted: Sequence[bool], is_slot: Callable[[Known], bool]) -> Plan:
    """Walks a body backwards from the results that are wanted; stops at entries."""
    jaxpr, given = body.jaxpr, set(body.jaxpr.invars)
    needed, slots, demanded, equations, inside = set(), {}, {}, [], {}

    def want(atoms: Any) -> None:
        for atom in atoms:
            known = None if isinstance(atom, compat.Literal) else body.known.get(atom)
            if known and atom not in given and is_slot(known):
                slots[atom] = demanded[known] = known
            elif not isinstance(atom, compat.Literal):
                needed.add(atom)

    want(itertools.compress(jaxpr.outvars, wanted))
    dropped = False
    for position, equation in reversed(list(enumerate(jaxpr.eqns))):
        used = [v in needed for v in equation.outvars]
        if not any(used) and not equation.effects:
            found = [body.known[v] for v in equation.outvars if v in body.known]
            dropped = dropped or any(known.made.parameters for known in found)
            continue
        equations.append(position)
        plans = _inside(equation, body.inside.get(position, ()), used, is_slot)
        if any(plan.changed for plan in plans):
            inside[position] = plans
            for plan in plans:
                demanded.update(plan.demanded)
            want(itertools.compress(equation.invars, operands_of(equation, plans)))
        else:
            want(equation.invars)
    return Plan(
        body,
        wanted,
        [v in needed for v in jaxpr.invars],
        equations[::-1],
        inside,
        slots,
        demanded,
        bool(dropped or slots or inside),
    )


def _inside(
    equation: Any, bodies: Sequence[Body], used: Sequence[bool], is_slot: Callable[[Known], bool]
) -> list[Plan]:
    if equation.primitive is compat.SCAN:
        carried = compat.scan_counts(equation)[1]
        used = [i < carried or u for i, u in enumerate(used)]
    return [cut(body, used, is_slot) for body in bodies]


def operands_of(equation: Any, plans: Sequence[Plan]) -> list[bool]:
    """Which operands a construct that changes still needs."""
    needed = [any(flags) for flags in zip(*(plan.needed for plan in plans), strict=True)]
    if equation.primitive is compat.COND:
        return [True, *needed]
    if equation.primitive is compat.SCAN:
        split, carried = compat.scan_counts(equation)
        needed[split : split + carried] = [True] * carried
    return needed
