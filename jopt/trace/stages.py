"""A function run in stages: it stops before each weight, which may change before it goes on.

Methods that round or prune a layer at a time want to know what the layer really gets: the outputs
of the layers before it as they are now, compressed. `staged` runs all batches up to the next
weights, measures what meets them, lets the caller change them, and goes on with what they became.
One layer's statistics are in memory at a time; a scan over stacked layers is run layer by layer.
Each stretch is compiled once, those inside a scan once for all layers.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jopt import trees

from .program import is_array, program
from .sites import sites
from .stops import Stop, target_of
from .stretches import Run, folded, planned
from .walk import collect
from .watch import Measure

PyTree = Any

NOT_MET = (
    "no product met this weight as it is: the function computes something from it first; "
    "`jopt.trace.hoist` makes a weight of what it computes"
)


SLICED_VIEW = (
    "a scan slices a view of it, so that its layers cannot be told apart: scan the weight as it is"
)


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
    run = Run(targets, measure, visit)
    plan = planned(traced, run)

    # Shared weights first.
    if run.shared:
        params = _visit_shared(apply, params, inputs, run)
    columns = [_arrays((params, *batch)) for batch in inputs]
    fixed, varying = {}, {}
    for variable, operand, *values in zip(
        plan.jaxpr.invars, traced.operands, *columns, strict=True
    ):
        if operand.parameter:
            fixed[variable] = values[0]
        else:
            varying[variable] = values
    plan.execute(fixed, varying, ())
    new = {
        operand.path: fixed[variable]
        for variable, operand in zip(plan.jaxpr.invars, traced.operands, strict=True)
        if operand.parameter
    }
    params = trees.map_with_path(lambda path, leaf: new.get(path, leaf), params)
    missed |= {
        path: SLICED_VIEW if path in run.sliced else NOT_MET
        for path in targets
        if path not in run.visited
    }
    return params, missed


# Helpers, in order of use.


def _arrays(args: Any) -> list[Any]:
    """The arrays among arguments, as `program` orders them."""
    return [leaf for leaf in jax.tree.leaves(args) if is_array(leaf)]


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


def _visit_shared(
    apply: Callable[..., Any], params: PyTree, inputs: Sequence[tuple[Any, ...]], run: Run
) -> PyTree:
    """Visits each weight that several products read, with what all of them meet."""
    for path in sorted(run.shared):
        observe = _observer(apply, params, run, path)
        stats = folded(map(observe, inputs))
        run.note(stats)
        if path not in stats or path in run.sliced:
            continue
        weight = dict(trees.items(params))[path]
        new = run.stop(path, (), weight, stats[path])
        params = trees.map_with_path(
            lambda at, leaf, path=path, new=new: new if at == path else leaf, params
        )
    return params


def _observer(
    apply: Callable[..., Any], params: PyTree, run: Run, path: str
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
