"""Constructs with bodies: each public function of JAX is called again on the evaluated body.

A typed leaf goes into a body as a constant or as a scan's `xs`, its arrays sliced with it. What
leaves a body through a carry or out of a branch has one type in every iteration and branch, so it
is materialised there, unless it is of a kind that travels and all of them agree on it. A leaf rule
registered for a construct goes first.
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from . import compat, stats
from .frame import Frame, Tracked
from .layered import Layered, repeated
from .rules import structure
from .through import placement
from .walk import dense, evaluate, leaving, materialised, settled

_CARRY = "it is carried from iteration to iteration"
_OUT = "it leaves the body, which gives back arrays"


@structure(*compat.INLINE)
def _inline(frame: Frame, equation: Any, operands: Sequence[Any]) -> list[Any]:
    return evaluate(frame.inline(equation), compat.body_of(equation), operands)


@structure(compat.JIT)
def _jit(frame: Frame, equation: Any, operands: Sequence[Any]) -> list[Any]:
    """Inlined under its name, unless it says something about placement or donation."""
    name, options = equation.params["name"], compat.jit_options(equation)
    if not options:
        with compat.scope(f"jit({name})"):
            return evaluate(frame.inline(equation), compat.body_of(equation), operands)

    def body(*operands: Any) -> Any:
        travel = "out_shardings" not in options  # which are those of arrays
        return dense_outputs(equation, frame, compat.body_of(equation), operands, travel=travel)

    if "in_shardings" in options:
        pairs = zip(operands, options["in_shardings"], strict=True)
        options["in_shardings"] = tuple(_placed(x, sharding) for x, sharding in pairs)
    if "out_shardings" in options:
        options["out_shardings"] = (list(options["out_shardings"]), compat.UNSPECIFIED)
    body.__name__ = name
    results, records = jax.jit(body, **options)(*operands)
    hand_over(frame, records)
    return results


@structure(compat.REMAT)
def _remat(frame: Frame, equation: Any, operands: Sequence[Any]) -> list[Any]:
    params = equation.params
    cse = params["prevent_cse"]  # a bool, or one for each operand
    barred = [params["differentiated"] and c for c in _each(cse, len(operands))]

    def body(*operands: Any) -> Any:
        # The forward half of a differentiated body stands behind a barrier, so that XLA does not
        # undo the recomputation; calling `jax.checkpoint` again would not set that one.
        behind = iter(jax.lax.optimization_barrier(list(itertools.compress(operands, barred))))
        inside = [next(behind) if b else x for b, x in zip(barred, operands, strict=True)]
        return dense_outputs(equation, frame, compat.body_of(equation), inside, travel=True)

    results, records = jax.checkpoint(body, prevent_cse=cse, policy=params["policy"])(*operands)
    hand_over(frame, records)
    return results


@structure(compat.SCAN)
def _scan(frame: Frame, equation: Any, operands: Sequence[Any]) -> list[Any]:
    """A scan again: leaves stay typed as constants and as `xs`."""
    params = equation.params
    split, carried = compat.scan_counts(equation)
    constants = [_entering(x, sliced=False) for x in operands[:split]]
    init = [_entering(x, sliced=False) for x in operands[split : split + carried]]
    xs = [
        _entering(_stacked(x, params["length"], equation), sliced=True)
        for x in operands[split + carried :]
    ]
    slices = (xs, frame.given_inside(equation))

    def once(carry: Any, x: Any) -> Any:
        x, given = x
        inside, operands = dataclasses.replace(frame, given=given), [*constants, *carry, *x]
        return dense_outputs(equation, inside, params["jaxpr"], operands, loop=(True,), travel=True)

    def body(carry: Any, x: Any) -> Any:
        carry, kept = carry
        results, records = once(carry, x)
        merged, stacked = _leaving(records)
        kept = {name: stats.merged(name, kept[name], merged[name]) for name in kept}
        back = _like(carry, frame, equation, results[:carried])
        return (back, kept), (results[carried:], stacked)

    def first(init: Any, slices: Any) -> Any:
        results, records = once(init, jax.tree.map(lambda array: array[0], slices))
        return results[:carried], _leaving(records)[0]

    def shapes(init: Any) -> Any:
        return jax.eval_shape(first, init, slices)

    init, kept = _lasting(init, frame, equation, shapes, params["length"] > 0), {}
    if frame.recorder is not None and params["length"] > 0:
        kept = stats.identity(shapes(init)[1])
    (carry, kept), (ys, stacked) = jax.lax.scan(
        body,
        (init, kept),
        slices,
        length=params["length"],
        reverse=params["reverse"],
        unroll=params["unroll"],
    )
    hand_over(frame, {**kept, **stacked})
    return [_outside(x) for x in (*carry, *ys)]


@structure(compat.WHILE)
def _while(frame: Frame, equation: Any, operands: Sequence[Any]) -> list[Any]:
    params = equation.params
    first, second = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
    conditions, constants = operands[:first], operands[first:second]
    constants = [_entering(x, sliced=False) for x in constants]
    init = [_entering(x, sliced=False) for x in operands[second:]]

    def condition(carry: Any) -> Any:
        values = evaluate(frame.silent(equation), params["cond_jaxpr"], [*conditions, *carry[0]])
        return materialised(values[0])

    def step(carry: Any) -> Any:
        results, records = dense_outputs(
            equation,
            frame,
            params["body_jaxpr"],
            [*constants, *carry],
            body=1,
            loop=(False,),
            travel=True,
        )
        return results, _leaving(records)[0]

    def body(carry: Any) -> Any:
        results, records = step(carry[0])
        kept = {n: stats.merged(n, carry[1][n], records[n]) for n in carry[1]}
        return _like(carry[0], frame, equation, results), kept

    init = _lasting(init, frame, equation, lambda init: jax.eval_shape(step, init))
    kept = {}
    if frame.recorder is not None:
        kept = stats.identity(jax.eval_shape(step, init)[1])
    results, kept = jax.lax.while_loop(condition, body, (init, kept))
    hand_over(frame, kept)
    return [_outside(x) for x in results]


@structure(compat.COND)
def _cond(frame: Frame, equation: Any, operands: Sequence[Any]) -> list[Any]:
    """A switch again, on an index or on the platform; statistics of all branches merge."""
    index, *operands = operands
    jaxprs = equation.params["branches"]

    def plain(k: int) -> Any:
        def branch(*operands: Any) -> Any:
            return dense_outputs(equation, frame, jaxprs[k], operands, body=k, travel=True)

        return branch

    branches, every = [plain(k) for k in range(len(jaxprs))], {}
    branches = _agreeing(branches, frame, equation, operands)
    if frame.recorder is not None:
        for branch in branches:
            recorder = stats.Recorder()
            recorder.extend(every)
            recorder.extend(stats.identity(jax.eval_shape(branch, *operands)[1]))
            every = recorder.records

    def padded(branch: Any) -> Any:
        def run(*operands: Any) -> Any:
            results, records = branch(*operands)
            return results, {**stats.identity(every), **records}

        return run

    branches = [padded(branch) for branch in branches]
    platforms = compat.branch_platforms(equation)
    if platforms is None:
        results, records = jax.lax.switch(materialised(index), branches, *operands)
    else:
        named = zip(platforms, branches, strict=True)
        chosen = {name: branch for names, branch in named for name in names or ("default",)}
        default = chosen.pop("default", None)
        results, records = jax.lax.platform_dependent(*operands, default=default, **chosen)
    hand_over(frame, records)
    return results


@structure(compat.CUSTOM_JVP)
def _custom_jvp(frame: Frame, equation: Any, operands: Sequence[Any]) -> list[Any]:
    """The value is the evaluated body's, the derivative the author's, at the dense weights."""

    @jax.custom_jvp
    def call(*operands: Any) -> Any:
        return dense_outputs(equation, frame, equation.params["call_jaxpr"], operands)

    @call.defjvp
    def _(primals: Any, tangents: Any) -> Any:
        def authored(*operands: Any) -> Any:
            return compat.bind(equation, [materialised(x) for x in operands])

        results, records = call(*primals)
        _, derivative = jax.jvp(authored, primals, tangents)
        return (results, records), (derivative, jax.tree.map(_zero_tangent, records))

    results, records = call(*operands)
    hand_over(frame, records)
    return results


@structure(compat.CUSTOM_VJP)
def _custom_vjp(frame: Frame, equation: Any, operands: Sequence[Any]) -> list[Any]:
    why = "a `jax.custom_vjp` function is called on dense weights, so that its derivative is kept"
    return dense(frame, equation, operands, why)


def _each(flags: Any, count: int) -> Sequence[bool]:
    return [flags] * count if isinstance(flags, bool) else flags


def _placed(value: Any, sharding: Any) -> Any:
    """The shardings of an operand's arrays."""
    if not isinstance(value, Tracked) or not isinstance(sharding, NamedSharding):
        return compat.UNSPECIFIED if isinstance(value, Tracked) else sharding
    place = placement(value, sharding)
    return jax.tree.map(lambda array: place(array) or compat.UNSPECIFIED, value)


def dense_outputs(
    equation: Any,
    frame: Frame,
    jaxpr: Any,
    operands: Sequence[Any],
    *,
    body: int = 0,
    loop: tuple[bool, ...] = (),
    travel: bool = False,
) -> tuple[list[Any], Any]:
    """The results of a body of an equation as arrays, and what it recorded.

    With `travel` leaves that may do so stay leaves.
    """
    frame = frame.inner(equation, body, loop=loop)
    leave = leaving if travel else settled
    results = [leave(frame, equation, x, _OUT) for x in evaluate(frame, jaxpr, operands)]
    return results, frame.records()


def hand_over(frame: Frame, records: dict[str, stats.Record]) -> None:
    """Adds what a nested body recorded to the records of the body around it."""
    if frame.recorder is not None:
        frame.recorder.extend(records)


def _entering(value: Any, *, sliced: bool) -> Any:
    if not isinstance(value, Tracked):
        return value
    return Tracked(value.leaf, value.path, (*value.stacked, sliced))


def _outside(value: Any) -> Any:
    if not isinstance(value, Tracked):
        return value
    return Tracked(value.leaf, value.path, value.stacked[:-1])


def _lasting(
    init: Sequence[Any],
    frame: Frame,
    equation: Any,
    shapes: Callable[[Any], Any],
    runs: bool = True,
) -> list[Any]:
    """A carry in which leaves stay leaves where every iteration gives back one of the same kind."""
    init = [leaving(frame, equation, x, _CARRY) for x in init]
    while any(isinstance(x, Tracked) for x in init):
        back = shapes(init)[0] if runs else [None] * len(init)
        alike = [_kind(x) == _kind(y) for x, y in zip(init, back, strict=True)]
        if all(same or not isinstance(x, Tracked) for same, x in zip(alike, init, strict=True)):
            break
        init = [
            x if same else settled(frame, equation, x, _CARRY)
            for same, x in zip(alike, init, strict=True)
        ]
    return init


def _like(carry: Sequence[Any], frame: Frame, equation: Any, results: Sequence[Any]) -> list[Any]:
    """The results of an iteration, arrays where the carry has arrays."""
    return [
        x if isinstance(before, Tracked) else settled(frame, equation, x, _CARRY)
        for before, x in zip(carry, results, strict=True)
    ]


def _agreeing(
    branches: Sequence[Any], frame: Frame, equation: Any, operands: Sequence[Any]
) -> Sequence[Any]:
    """Branches that give back leaves where all of them give back one of the same kind."""
    if not any(isinstance(x, Tracked) and getattr(x.leaf, "travels", False) for x in operands):
        return branches
    every = [jax.eval_shape(branch, *operands)[0] for branch in branches]
    kept = [len({_kind(x) for x in column}) == 1 for column in zip(*every, strict=True)]

    def agreed(branch: Any) -> Any:
        def run(*operands: Any) -> Any:
            results, records = branch(*operands)
            pairs = zip(results, kept, strict=True)
            return [x if k else settled(frame, equation, x, _OUT) for x, k in pairs], records

        return run

    return [agreed(branch) for branch in branches]


def _kind(value: Any) -> Any:
    """What two values have in common that can take each other's place in a carry."""
    arrays, structure = jax.tree.flatten(value)
    return structure, tuple((jnp.shape(array), jnp.result_type(array)) for array in arrays)


def _leaving(records: dict[str, stats.Record]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Splits a loop body's records into those to merge over iterations and those to stack."""
    merged, stacked = {}, {}
    for name, record in records.items():
        kind = stacked if record.stacked[-1] else merged
        kind[name] = stats.Record(record.stat, record.stacked[:-1])
    return merged, stacked


def _stacked(value: Any, length: int, equation: Any) -> Any:
    """A leaf whose every array has the leading axis that a scan slices."""
    if not isinstance(value, Tracked):
        return value

    def stretched(array: Any) -> Any:
        if array.shape[:1] == (length,):
            return array
        if array.shape[:1] in ((), (1,)):  # shared by all layers, such as a whole tensor's scale
            return jnp.broadcast_to(array, (length, *array.shape[1:]))
        if isinstance(value.leaf, Layered) and length % array.shape[0] == 0:  # groups along it
            return repeated(array, length // array.shape[0], 0)
        raise ValueError(
            f"`lift(apply)`: a scan over {length} slices (`{value.path}`, "
            f"{compat.source_of(equation)}) met a `{type(value.leaf).__name__}` that holds an "
            f"array of shape {array.shape}. Every array in a typed leaf has the rank of the value, "
            "each axis as long as the value's or 1."
        )

    return jax.tree.map(stretched, value)


def _zero_tangent(x: Any) -> Any:
    if jnp.issubdtype(x.dtype, jnp.inexact):
        return compat.constant(0, x)
    return np.zeros(x.shape, jax.dtypes.float0)
