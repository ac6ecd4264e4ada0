"""SmoothQuant: large channels of activations are made smaller, and the weights they meet larger."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jopt import trees
from jopt.trace import Site, collect, explain, merge, moments, reductions, watched
from jopt.trace import sites as sites_of
from jopt.trace.program import program

from .._formats.placed import whole
from .._leaves.scaled import along, scaled
from .absorb import Edit, absorbed, stacked
from .dataflow import dataflow
from .wishes import Stuck

PyTree = Any

_UNMET = "no product met it as it is"


class Fold(NamedTuple):
    """Weights that meet one activation, and the parameters that can take a factor out of it."""

    weights: tuple[Edit, ...]  # to be multiplied by the scales; all that meet the activation
    into: tuple[Edit, ...]  # to be divided; empty if there is none
    reason: str  # why there is none


class Smoothed(NamedTuple):
    """What `smooth` did for one activation."""

    paths: tuple[str, ...]  # of the weights that meet it
    into: tuple[str, ...]  # parameters that now make it smaller; empty: the leaves do
    scales: jax.Array | None  # [*layers, in]; None: nothing was done
    reason: str  # why nothing could take the scales; empty if something did


def smoothquant_scales(
    activation: jax.Array, weight: jax.Array, *, alpha: float = 0.5
) -> jax.Array:
    """The factors that share the difficulty between activations and weights.

        s_j = max|x_j|^α / max|w_j|^(1-α)

    for each input j; `x / s` and `w · s` have the same product. Inputs that were always zero, or
    whose weights are, keep s = 1.

    Args:
      activation: `[..., in]`, the largest |x| of each input.
      weight: `[..., in]`, the largest |w| of each input, over all weights that meet the activation.
      alpha: 0 leaves the weights' largest values alike, 1 the activation's.

    Returns:
      float32 `[..., in]`.

    Raises:
      ValueError: if alpha is not from 0 to 1, or shapes differ.

    Example:
      >>> import jax.numpy as jnp
      >>> from jopt.quant import smoothquant_scales
      >>> smoothquant_scales(jnp.array([16.0, 1.0, 0.0]), jnp.array([1.0, 4.0, 1.0]))
      Array([4. , 0.5, 1. ], dtype=float32)

    References:
      Guangxuan Xiao et al., SmoothQuant: accurate and efficient post-training quantization for
      large language models, 2022, arXiv:2211.10438.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"`smoothquant_scales(alpha={alpha})`: alpha is from 0 to 1.")
    if activation.shape != weight.shape:
        raise ValueError(
            "`smoothquant_scales(activation, weight)` takes one value for each input of both, got "
            f"{list(activation.shape)} and {list(weight.shape)}."
        )
    x, w = activation.astype(jnp.float32), weight.astype(jnp.float32)
    live = (x > 0) & (w > 0)
    x, w = jnp.where(live, x, 1.0), jnp.where(live, w, 1.0)
    return jnp.where(live, x**alpha / w ** (1.0 - alpha), 1.0)


def smooth(
    apply: Callable[..., Any],
    params: PyTree,
    batches: Iterable[Any],
    where: trees.Where | None = None,
    *,
    alpha: float = 0.5,
    leaves: bool = False,
) -> tuple[PyTree, tuple[Smoothed, ...]]:
    """Divides activations by SmoothQuant's scales without changing the function.

    Each activation that meets chosen weights is divided where it is made: the search for
    parameters that can do it follows the function itself, through norms (their scale and bias),
    the product before (its outputs and bias, past ReLUs, masks and reshapes), and values that
    gates multiply. All weights that meet the activation, such as query, key and value, share one
    scale for each input, and are multiplied by it whether they were chosen or not. Layers stacked
    for a scan have scales of their own.

    Args:
      apply: any function `apply(params, *inputs)`.
      params: its parameters, arrays.
      batches: each a tuple of the inputs, or the one input if it is no tuple.
      where: which weights; all that meet a product, by default.
      alpha: as in `smoothquant_scales`.
      leaves: where no parameter can take the scales, put the weight into a `Scaled` leaf, which
        divides the activation itself, for use in `jopt.lift(apply)`. Else such a weight is left,
        as are those whose products a leaf cannot serve, such as a kernel of grouped features.

    Returns:
      `(params, rows)`, and what was done to each activation, or why not.

    Raises:
      ValueError: if there is no batch, an activation is not finite, or `where` matches nothing or
        no weight.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jopt.quant import smooth
      >>> apply = lambda p, x: jax.nn.relu(x @ p["first"] + p["bias"]) @ p["second"]
      >>> params = {"first": jnp.ones((2, 3)), "bias": jnp.ones(3), "second": jnp.ones((3, 2))}
      >>> _, rows = smooth(apply, params, [jnp.ones((4, 2))])
      >>> [(row.paths, row.into) for row in rows]
      [(('first',), ()), (('second',), ('bias', 'first'))]

    References:
      As of `smoothquant_scales`.
    """
    batches = [batch if isinstance(batch, tuple) else (batch,) for batch in batches]
    if not batches:
        raise ValueError("`smooth(apply, params, batches)` got no batch to measure activations on.")
    chosen = _chosen(apply, params, batches[0], where)
    largest = _largest(apply, params, batches, chosen)
    found = folds(apply, params, *batches[0], paths=list(chosen))
    rows = [
        Smoothed(tuple(edit.path for edit in fold.weights), (), None, fold.reason or _UNMET)
        for fold in found
    ]
    # Leaves are made last: what neighbours fold into a weight, they fold into an array.
    for neighbours in (True, False) if leaves else (True,):
        before = params
        for number, fold in enumerate(found):
            scales = _scales(params, fold, largest, chosen, alpha)
            if scales is not None and bool(fold.into) == neighbours:
                params = folded(params, fold, scales)
                into = tuple(edit.path for edit in fold.into)
                rows[number] = Smoothed(rows[number].paths, into, scales, fold.reason)
        if not neighbours:
            params, rows = _served(apply, params, before, batches[0], rows)
    return params, tuple(rows)


def folds(
    apply: Callable[..., Any], params: PyTree, *inputs: Any, paths: Sequence[str]
) -> tuple[Fold, ...]:
    """Finds, for the weights at `paths`, which parameters can take factors out of what they meet.

    Reads shapes only. One `Fold` for each activation, in the order of the paths.

    Args:
      apply: any function.
      params: its parameters.
      *inputs: its other arguments.
      paths: of weights that meet a product.
    """
    sites = {site.path: site for site in sites_of(apply, params, *inputs) if site.path in paths}
    values, _ = dataflow(program(apply, (params, *inputs)))
    named = {value.path: value for value in values}
    found, done = [], set()
    for path in paths:
        if path in done:
            continue
        fold = _fold(named[path], sites[path])
        done.update(edit.path for edit in fold.weights)
        found.append(fold)
    return tuple(found)


def folded(params: PyTree, fold: Fold, scales: jax.Array) -> PyTree:
    """Multiplies the weights of a fold by scales, `[*layers, in]`, and divides the others.

    Where nothing can be divided, the weights become `Scaled` leaves.
    """
    edits = {edit.path: edit for edit in (*fold.weights, *fold.into)}
    scales = whole(scales)  # they lie along other axes of other weights

    def change(path: str, leaf: Any) -> Any:
        if path not in edits:
            return leaf
        _, axes, power, _ = edits[path]
        laid = along(scales.astype(jnp.float32), jnp.shape(leaf), axes)
        new = leaf.astype(jnp.float32)
        new = (new * laid if power > 0 else new / laid).astype(leaf.dtype)
        return new if fold.into else scaled(new, scales, axes)

    return trees.map_with_path(change, params)


# Helpers, in order of use.


def _chosen(apply: Any, params: PyTree, inputs: Any, where: trees.Where | None) -> dict[str, Site]:
    """The chosen weights, with a site of each."""
    found: dict[str, Site] = {}
    for site in sites_of(apply, params, *inputs):
        if site.path is not None and site.contracted and not site.uses[0].indexed:
            found.setdefault(site.path, site)
    if where is not None:
        marked = trees.select(params, where, caller="smooth")
        hit = {
            path
            for path, mark in zip(trees.paths(params), jax.tree.leaves(marked), strict=True)
            if mark
        }
        found = {path: site for path, site in found.items() if path in hit}
    leaves = dict(trees.items(params))
    found = {path: site for path, site in found.items() if not trees.is_typed(leaves[path])}
    if not found:
        raise ValueError(
            "`smooth(...)`: none of the chosen parameters is an array that meets a product; "
            "`jopt.sites(apply, params, *inputs)` lists those that do."
        )
    return found


def _largest(
    apply: Any, params: PyTree, batches: Sequence[Any], chosen: dict[str, Site]
) -> dict[str, jax.Array]:
    """The largest |x| of each input of each weight, over all batches."""

    @trees.jitted
    def observe(params: PyTree, inputs: Any) -> Any:
        def watch(path: str, leaf: Any) -> Any:
            if path not in chosen:
                return leaf
            axes = chosen[path].contracted or ()
            return watched(leaf, path, moments, contracted=axes, layers=True)

        found = collect(apply, allow_dense=True)(trees.map_with_path(watch, params), *inputs)[1]
        return {path: {"largest": stats["largest"]} for path, stats in found.items()}

    stats: dict[str, Any] = {}
    for batch in batches:
        stats = merge(stats, observe(params, batch))
    values = {path: stat["largest"].value for path, stat in stats.items()}
    for path, value in values.items():
        if not bool(jnp.all(jnp.isfinite(value))):
            raise ValueError(
                f"`smooth(...)`: the activation that meets `{path}` has a NaN or an infinity. "
                "Check the batches and the parameters."
            )
    return values


def _scales(
    params: PyTree, fold: Fold, largest: dict[str, jax.Array], chosen: dict[str, Site], alpha: float
) -> jax.Array | None:
    """The scales of a fold; None where nothing was measured."""
    measured = [
        _by_input(largest[e.path], chosen[e.path], e, params)
        for e in fold.weights
        if e.path in largest
    ]
    if not measured:
        return None
    weights = [_largest_weight(trees.weight_of(_leaf(params, e)), e) for e in fold.weights]
    return smoothquant_scales(
        reductions.largest(jnp.stack(measured), 0),
        reductions.largest(jnp.stack(weights), 0),
        alpha=alpha,
    )


def _by_input(largest: jax.Array, site: Site, edit: Edit, params: PyTree) -> jax.Array:
    """The measured values by the inputs of an edit: the other summed axes are a window."""
    shape = jnp.shape(_leaf(params, edit))
    axes = sorted(axis % len(shape) - len(shape) for axis in site.contracted or ())
    split = largest.reshape(*shape[: edit.stack], -1, *(shape[axis] for axis in axes))
    rest = [edit.stack + 1 + k for k, axis in enumerate(axes) if axis not in edit.axes]
    return _flat(reductions.largest(split, (edit.stack, *rest)), edit, sorted(edit.axes))


def _largest_weight(weight: jax.Array, edit: Edit) -> jax.Array:
    """The largest |w| of each input."""
    kept = [axis % weight.ndim for axis in edit.axes]
    rest = [a for a in range(weight.ndim) if a >= edit.stack and a not in kept]
    return _flat(reductions.largest(weight, rest), edit, sorted(edit.axes))


def _flat(values: jax.Array, edit: Edit, order: Sequence[int]) -> jax.Array:
    """`[*layers, in]` of what has the axes of an edit in the weight's order."""
    stack = edit.stack
    turned = (*range(stack), *(stack + order.index(axis) for axis in edit.axes))
    return jnp.transpose(values, turned).reshape(*values.shape[:stack], -1)


def _leaf(params: PyTree, edit: Edit) -> Any:
    return dict(trees.items(params))[edit.path]


def _served(
    apply: Any, params: PyTree, before: PyTree, inputs: Any, rows: list[Smoothed]
) -> tuple[PyTree, list[Smoothed]]:
    """Takes back the leaves that `lift` would refuse, such as kernels of grouped features."""
    refused = {met.path: met.how for met in explain(apply, params, *inputs) if met.refused}
    arrays = dict(trees.items(before))
    params = trees.map_with_path(
        lambda path, leaf: arrays.get(path, leaf) if path in refused else leaf, params
    )

    def told(row: Smoothed) -> Smoothed:
        why = next((refused[path] for path in row.paths if path in refused), None)
        if row.into or row.scales is None or why is None:
            return row
        return row._replace(scales=None, reason=f"{row.reason}; and no leaf would do: {why}")

    return params, [told(row) for row in rows]


def _fold(weight: Any, site: Site) -> Fold:
    rank = len(weight.shape)
    axes = tuple(sorted(axis % rank - rank for axis in site.contracted or ()))
    tries = [axes]
    if site.operation != "dot_general":  # the features; of them and the window, what can be told
        features = site.uses[0].features
        rest = [(axis,) for axis in reversed(axes) if (axis,) != features]
        tries = [features, *rest] if features else rest
    why = ""
    for wished in tries:
        try:
            edits = absorbed(weight, wished)
        except Stuck as stuck:
            why = why or str(stuck)
            continue
        into = tuple(sorted(edit for edit in edits if edit.power < 0))
        return Fold(tuple(sorted(edit for edit in edits if edit.power > 0)), into, "")
    return Fold((Edit(weight.path, tries[0], 1, stacked(weight)),), (), why)
