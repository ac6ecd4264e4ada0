"""SparseGPT: inputs are pruned one after another, and what is left makes good the error so far."""

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jopt import trees
from jopt.trace import Stop, gram, sites
from jopt.trace.layered import coarse_map, coarse_row
from jopt.trace.sweep import damped, feedback_of, sweep

from . import _threshold, _wide
from ._choice import UNSTRUCTURED
from ._layerwise import aims, in_groups, layer_by_layer, lifted, listed, name_of
from ._patterns import NM, Pattern
from ._scopes import Policy

PyTree = Any

_PANEL = 16  # inputs settled between two products within a block
_cut = jax.lax.dynamic_slice_in_dim


class Format(Protocol):
    """What joint quantization needs of a number format: any of `jopt.quant`'s has it."""

    granularity: Any

    def fit(self, x: jax.Array, axes: Any) -> Any:
        """The grid for the values of `x`, shared along `axes`; arrays of the rank of `x`."""
        ...

    def encode(self, x: jax.Array, grid: Any) -> jax.Array:
        """The codes of `x`."""
        ...

    def decode(self, codes: jax.Array, grid: Any) -> jax.Array:
        """The float32 values of `codes`."""
        ...

    def leaf(self, codes: jax.Array, grid: Any, dtype: Any) -> Any:
        """The typed leaf of a weight of that dtype."""
        ...


class Result(NamedTuple):
    """What becomes of matrices `[blocks, in, out]`."""

    values: jax.Array  # float32
    codes: Any  # with a format, these stand for the values
    grid: Any
    fine: jax.Array  # bool: the damped Hessian was positive definite
    landed: jax.Array  # bool: what is pruned is zero, so the format has a zero


def sparsegpt(
    apply: Callable[..., Any],
    params: PyTree,
    batches: Iterable[Any],
    sparsity: float | Policy,
    *,
    pattern: Pattern = UNSTRUCTURED,
    scope: str = "layer",
    where: trees.Where | None = None,
    unfit: str = "error",
    block_size: int | None = None,
    damping: float = 0.01,
    format: Format | None = None,
) -> PyTree:
    """Prunes after training by second-order information, and changes what stays to make up for it.

    With H = Σ x xᵀ over a layer's inputs, damped, inputs are settled in turn: weights that go
    become zero, and the inputs to come change so that the outputs change least. Of a block of
    inputs, all outputs together, those weights go that cost least, as they are when it is reached:

        cost_ij = w_ij² / [(H_≥i)⁻¹]_ii

    H_≥i being H without the inputs before i. Under `NM` each output's groups choose likewise, each
    when it is reached. Of n weights exactly `round(sparsity · n)` go; of equal costs the first.

    The function is run in stages, so that each layer is pruned on what the pruned ones before it
    give; stacked layers under `scan`, experts and groups of features are layers of their own.

    Weights that are zero beforehand count as gone and stay zero. Weights of inputs that were always
    zero go first. A NaN or infinity in a weight stays and changes nothing else of that weight; a
    product that meets what comes of it is an error.

    Args:
      apply: any function `apply(params, *inputs)`.
      params: its parameters; chosen leaves are plain arrays.
      batches: each a tuple of the inputs, or the one input; all of the same shapes.
      sparsity: the fraction to prune, or a policy of fractions, as of `prune.masks`; for `NM(n, m)`
        it is `1 - n / m`.
      pattern: `Unstructured()` or `NM(n, m)`.
      scope: `"layer"`, `"uniform"` or `"erk"`, as of `prune.masks`.
      where: the leaves to prune; by default those that a product reads as its weight.
      unfit: `"error"` or `"skip"`, as of `prune.masks`.
      block_size: inputs among which costs are compared, and whose errors go on together. Without
        a pattern all of a block are chosen before the first is settled, so that many are a loss
        where they are a good part of the layer's inputs. By default 128, as in the paper, or a
        sixteenth of the inputs where that is less, but no fewer than 16.
      damping: added to the diagonal of H, as a part of its mean.
      format: a number format of `jopt.quant`, such as `Int(4)`: what stays is rounded to nearest in
        the same sweep, so that later inputs make good that error too. Scales are fitted to each
        layer's weight beforehand.

    Returns:
      `params` with zeros, and with quantized leaves if there is a `format`.

    Raises:
      ValueError: as `prune.masks` does, if a batch has no rows, a chosen weight is met by no
        product as it is, an activation is not finite, the damped H is not positive definite, or the
        format has no zero.
      TypeError: if a chosen leaf is no array of floats, and under `jit`.

    Example:
      >>> import jax.numpy as jnp
      >>> from jopt import prune
      >>> params = {"kernel": jnp.array([[1.0], [2.0]])}
      >>> x = jnp.array([[1.0, 1.0], [2.0, 2.0], [3.0, 3.1]])  # two inputs that are nearly the same
      >>> found = prune.sparsegpt(lambda p, x: x @ p["kernel"], params, [x], 0.5)["kernel"]
      >>> [round(float(w), 1) for w in found[:, 0]]
      [0.0, 3.0]

    References:
      Elias Frantar, Dan Alistarh, "SparseGPT: Massive Language Models Can Be Accurately Pruned in
      One-Shot", 2023, arXiv 2301.00774. Computed without an inverse: `jopt.trace.sweep`.
    """
    caller = "prune.sparsegpt"
    if (block_size is not None and block_size < 1) or damping < 0:
        raise ValueError(
            f"`{caller}(..., block_size={block_size}, damping={damping})`: at least 1, and at "
            "least 0."
        )
    inputs = listed(params, batches, caller)
    found = sites(apply, params, *inputs[0])
    wanted = aims(params, found, sparsity, pattern, scope, where, unfit, caller=caller)

    def settle(stop: Stop) -> Any:
        aim = wanted[stop.path]
        order, hessian, weight = in_groups(stop, aim.axis), stop.stats["gram"], stop.matrices()
        block = fitting(block_size, pattern, len(order))
        counts = np.zeros((len(weight), 1), np.uint32)  # of no use under `NM`
        if not isinstance(pattern, NM):
            zeros = np.asarray(jnp.sum(weight == 0, axis=-1, dtype=jnp.uint32))[:, order]
            counts = shares(zeros, weight.shape[-1], aim.sparsity, block)
        options: dict[str, Any] = {"pattern": pattern, "format": format, "block": block}
        result = pruned(weight, hessian, order, damping, counts, **options)
        _check(result, stop, damping, format, caller)
        dtype = stop.weight.dtype
        if format is None:
            return stop.restored(result.values).astype(dtype)
        return format.leaf(stop.restored(result.codes), coarse_map(stop.coarse, result.grid), dtype)

    return layer_by_layer(apply, params, inputs, wanted, gram, settle, found=found, caller=caller)


def fitting(block: int | None, pattern: Pattern, rows: int) -> int:
    """The number of inputs settled together: whole groups, and not more than there are."""
    unit = pattern.m if isinstance(pattern, NM) else 1
    if block is None:  # groups choose for themselves whatever the block
        block = 128 if isinstance(pattern, NM) else min(128, max(16, rows // 16))
    return min(-(-block // unit) * unit, rows)


def shares(zeros: np.ndarray, outputs: int, sparsity: float, block: int) -> np.ndarray:
    """How many weights of each block of inputs go: `round(sparsity · n)` in all.

    A block with more zeros than its share keeps them, and the other blocks lose less.

    Args:
      zeros: of each input, in the order in which they are settled, `[blocks, in]`.
      outputs: weights an input.
      sparsity: the fraction.
      block: inputs a block.
    """
    rows = zeros.shape[1]
    ends = np.array([min(end, rows) for end in range(0, rows + block, block)])
    sizes, goal = np.diff(ends) * outputs, round(sparsity * rows * outputs)
    found = []
    for own in zeros:
        gone = np.add.reduceat(own.astype(np.int64), ends[:-1])
        full, level = np.zeros(len(sizes), bool), sparsity
        while (more := ~full & (gone > level * sizes)).any():
            full |= more
            level = max(0, goal - int(gone[full].sum())) / max(1, int(sizes[~full].sum()))
        passed = np.cumsum(np.where(full, 0, sizes))
        counts = np.diff([0, *(round(level * int(end)) for end in passed)])
        counts = np.maximum(counts, gone)
        for _ in range(int(counts.sum()) - max(goal, int(gone.sum()))):  # what rounding put above
            counts[np.argmax(counts - gone)] -= 1
        found.append(counts)
    return np.stack(found).astype(np.uint32)


@functools.partial(jax.jit, static_argnames=("pattern", "format", "block"))
def pruned(
    weight: jax.Array,
    hessian: jax.Array,
    order: jax.Array,
    damping: Any,
    counts: jax.typing.ArrayLike,
    *,
    pattern: Pattern,
    format: Format | None,
    block: int,
) -> Result:
    """Prunes `[blocks, in, out]`, given `[blocks, in, in]`; inputs are settled in the order given.

    Pure. `counts` are of the weights to take from each `block` inputs, as `shares` has them; `NM`
    needs none, and its groups are consecutive in that order.
    """

    def matrix(weight: jax.Array, hessian: jax.Array, counts: jax.Array) -> Result:
        weight = weight.astype(jnp.float32)
        return _matrix(weight, hessian, order, damping, counts, pattern, format, block)

    return jax.vmap(matrix)(weight, hessian, jnp.asarray(counts))


# Helpers, in order of use.


def _check(result: Result, stop: Stop, damping: float, format: Any, caller: str) -> None:
    if not bool(jnp.all(result.fine)):
        raise ValueError(
            f"`{caller}(...)`: what `{name_of(stop)}` meets, with damping={damping}, is not "
            "positive definite in float32. Raise `damping`, or calibrate on more data."
        )
    if not bool(jnp.all(result.landed)):
        raise ValueError(
            f"`{caller}(..., format={format})`: the format cannot hold the zeros of "
            f"`{name_of(stop)}`. Choose one that has a zero, such as `Int(4)`."
        )


def _matrix(
    weight: jax.Array,
    hessian: jax.Array,
    order: jax.Array,
    damping: Any,
    counts: jax.Array,
    pattern: Pattern,
    format: Format | None,
    block: int,
) -> Result:
    rows, known = weight.shape[0], jnp.isfinite(weight)
    clean = jnp.where(known, weight, 0.0)  # what is no number takes no part
    hessian = hessian[order][:, order]
    feedback, diagonal = feedback_of(damped(hessian, damping))
    costs = lifted(jnp.where(jnp.diagonal(hessian) > 0, diagonal**2, 0.0))
    unit = pattern.m if isinstance(pattern, NM) else 1
    panel = unit if unit > 1 else math.gcd(block, _PANEL)
    more = -rows % block
    turned = jnp.pad(clean[order], ((0, more), (0, 0)))
    # Minus infinity is gone, infinity is no weight of this layer's to take.
    mark = jnp.where(known[order], jnp.where(clean[order] == 0, -jnp.inf, 0.0), jnp.inf)
    mark = jnp.pad(mark, ((0, more), (0, 0)), constant_values=jnp.inf)
    costs = jnp.pad(costs, (0, more))
    grid, place = _on_grid(weight, order, format)

    def keep(at: Any, current: jax.Array, choose: Any) -> jax.Array:
        """Which of some rows stay, given those as they are."""
        size = current.shape[0]
        marks = _cut(mark, at, size)
        scores = jnp.where(marks == 0, current**2 * _cut(costs, at, size)[:, None], marks)
        return choose(scores) & (marks == 0)

    def lowest(number: Any) -> Any:
        count = _wide.widen(counts[number][None])
        return lambda scores: _threshold.keep([scores], count, together=False)[0]

    def grouped(scores: jax.Array) -> jax.Array:
        return pattern.spread(jnp.zeros((1, scores.shape[1]), bool), scores, -2)

    def begin(number: Any, current: Any, state: Any) -> Any:
        first = number * block
        whole = None if unit > 1 else keep(first, current(), lowest(number))

        def enter(start: Any, current: Any) -> Any:
            if whole is None:
                mine = keep(first + start, current(), grouped)
            else:
                mine = _cut(whole, start, panel)

            def settle(i: Any, target: jax.Array) -> jax.Array:
                return jnp.where(_cut(mine, i, 1), place(first + start + i, target), 0.0)

            return settle

        return enter, state

    feedback = jnp.pad(feedback, ((0, more), (0, more)))
    errors, _ = sweep(turned, feedback, begin, (), block=block, panel=panel)
    settled = jnp.zeros_like(clean).at[order].set((turned - errors)[:rows])
    fine = jnp.all(jnp.isfinite(feedback))
    if format is None:
        return Result(jnp.where(known, settled, weight), None, None, fine, jnp.ones((), bool))
    codes = format.encode(settled, grid)
    values = format.decode(codes, grid)
    landed = jnp.all((settled != 0) | (values == 0) | ~jnp.isfinite(values))
    return Result(values, codes, grid, fine, landed)


def _on_grid(weight: jax.Array, order: jax.Array, format: Format | None) -> tuple[Any, Any]:
    """The grid of a matrix, and `place(i, row)`: the values on it of the i-th row settled."""
    if format is None:
        return None, lambda i, row: row
    axes, inputs = (-2, -1) if format.granularity == "tensor" else (-2,), weight.shape[0]
    grid = format.fit(weight, axes)

    def place(i: Any, row: jax.Array) -> jax.Array:
        at = order[jnp.minimum(i, inputs - 1)]
        own = coarse_map(lambda coarse: coarse_row(coarse, at, inputs), grid)
        return format.decode(format.encode(row, own), own)

    return grid, place
