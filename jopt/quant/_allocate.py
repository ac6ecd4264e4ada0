"""Which weight gets how many bits: sensitivities of all weights in all formats, then a knapsack."""

import dataclasses
import math
import numbers
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from jopt import trees
from jopt.trace import Site
from jopt.trace import sites as sites_of

from ._formats.base import Format
from ._policy import Spec, axes_of
from ._quantize import coded
from ._sensitivities import Loss, Worse, fisher
from ._training.fake import on_grid

PyTree = Any
Choice = Format | None
Estimate = Literal["measured", "fisher"]


@dataclasses.dataclass(frozen=True)
class Budget:
    """What an allocation may spend; one of the fields.

    Args:
      bytes: of all parameters together, those that stay as they are included: what
        `jopt.size(params).bytes` will be.
      bits: mean bits of a weight among those that `allocate` chooses for, scales included.
      operations: bit operations of one call: multiply-adds times bits of the weight times bits of
        what it meets (`activation_bits` of `allocate`), summed over the products of these weights.
      seconds: of all products of these weights in one call, each measured by itself, on this
        machine.
    """

    bytes: float | None = None
    bits: float | None = None
    operations: float | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        """Checks that there is one limit."""
        given = {k: v for k, v in dataclasses.asdict(self).items() if v is not None}
        for name, limit in given.items():
            if isinstance(limit, bool) or not isinstance(limit, numbers.Real):
                raise TypeError(
                    f"`Budget({name}={limit!r})`: a limit is a number, such as `Budget(bits=4.5)`, "
                    f"not a `{type(limit).__name__}`."
                )
        if len(given) != 1 or not all(0 < v < math.inf for v in given.values()):
            raise ValueError(
                f"`Budget({', '.join(f'{k}={v}' for k, v in given.items())})`: give one positive "
                "limit, such as `Budget(bits=4.5)`."
            )


class Choices(NamedTuple):
    """What `allocate` found of one weight; arrays have one entry for each of its formats."""

    path: str
    chosen: Choice
    formats: tuple[Choice, ...]
    sensitivity: np.ndarray  # how much worse the function gets, estimated
    cost: np.ndarray  # in the unit of the budget


class Allocation(NamedTuple):
    """A policy for `quantize`, and how it came about."""

    policy: list[tuple[str, Choice]]
    rows: tuple[Choices, ...]
    cost: float  # of the whole, in the unit of the budget
    predicted: float  # the sum of the chosen sensitivities
    measured: float  # how much worse the function is with all of them at once


def allocate(
    apply: Callable[..., Any],
    params: PyTree,
    batches: Iterable[Any],
    *,
    budget: Budget,
    formats: Sequence[Choice],
    loss: Loss | None = None,
    estimate: Estimate = "measured",
    sites: Sequence[Site] | None = None,
    where: trees.Where | None = None,
    activation_bits: int = 16,
    key: jax.Array | None = None,
) -> Allocation:
    """Chooses a format for each weight, so that the function suffers least within a budget.

    The sensitivity s of a weight in a format is how much worse the function gets when it alone is
    rounded. The choice minimises their sum, exactly (a mixed-integer program):

        min Σ_j s[j, f(j)]   so that   Σ_j cost[j, f(j)] <= budget

        "measured"   s = L(params with weight j rounded) - L(params), L over the batches
        "fisher"     s = ½ mean_e (g_e · Δ_j)², g_e the gradient of an example's loss, Δ_j the error
                     of rounding: the second-order term, as the Hessian of a likelihood is the
                     covariance of its gradients

    "measured" runs the function once for each weight and format, "fisher" one gradient for each
    example, for all weights and formats together. Either is one compilation. Sensitivities of
    different weights are taken to add up; `measured` in the result is what they do together.

    Args:
      apply: any function `apply(params, *inputs)`.
      params: its parameters, arrays.
      batches: each a tuple of the inputs, or the one input; of the same shapes.
      budget: such as `Budget(bits=4.5)`.
      formats: to choose from; None leaves a weight as it is.
      loss: `loss(params, batch)`, a scalar; batches are then whatever it takes. Default: the
        Kullback-Leibler divergence of `softmax(apply(...))` from that of `params`, averaged; for
        "fisher", the log-likelihood of labels that the function itself draws.
      estimate: `"measured"` or `"fisher"`.
      sites: `jopt.sites(apply, params, *inputs)`. Default: found from the first batch; needed with
        `loss`, whose batches `apply` may not take.
      where: which weights. Default: those that feed a product.
      activation_bits: for a budget of operations.
      key: for "fisher" without a loss, draws the labels. Default: `jax.random.key(0)`.

    Returns:
      An `Allocation`; call `quantize(params, allocation.policy, sites=sites)`.

    Raises:
      ValueError: if the budget is below what the smallest formats cost, or there is no batch; and
        as `quantize` does.

    References:
      Zhen Dong et al., HAWQ-V2: Hessian aware trace-weighted quantization of neural networks, 2019,
      arXiv:1911.03852. Itay Hubara et al., Improving post training neural quantization: layer-wise
      calibration and integer programming, 2020, arXiv:2006.10518.
    """
    batches = list(batches)
    if not batches:
        raise ValueError("`allocate(apply, params, batches)` got no batch.")
    if estimate not in get_args(Estimate):
        raise ValueError(f'`allocate(..., estimate={estimate!r})`: "measured" or "fisher".')
    _check_formats(formats)
    if sites is None:
        first = batches[0] if isinstance(batches[0], tuple) else (batches[0],)
        sites = sites_of(apply, params, *first)
    paths = _paths(params, sites, where)
    rounded, bits = _rounded(params, paths, formats, sites)
    costs, fixed = _costs(budget, params, paths, formats, bits, sites, activation_bits)
    worse = Worse(apply, params, paths, loss)
    if estimate == "measured":
        sensitivity = worse.each(rounded, batches)
    else:
        sensitivity = fisher(apply, params, paths, rounded, batches, loss, key)
    limit = dataclasses.asdict(budget)
    (limit,) = (v for v in limit.values() if v is not None)
    if budget.bits is not None:
        limit *= sum(np.size(dict(trees.items(params))[path]) for path in paths)
    chosen = _knapsack(sensitivity, costs, limit - fixed, budget)
    together = {path: rounded[c][path] for path, c in zip(paths, chosen, strict=True)}
    spent = fixed + sum(costs[j, c] for j, c in enumerate(chosen))
    if budget.bits is not None:
        spent = spent / limit * budget.bits
    return Allocation(
        [(path, formats[c]) for path, c in zip(paths, chosen, strict=True)],
        tuple(
            Choices(path, formats[c], tuple(formats), sensitivity[j], costs[j])
            for j, (path, c) in enumerate(zip(paths, chosen, strict=True))
        ),
        float(spent),
        float(sum(sensitivity[j, c] for j, c in enumerate(chosen))),
        worse.together(together, batches),
    )


# What there is to choose from.


def _check_formats(formats: Sequence[Choice]) -> None:
    if not formats or any(f is not None and not isinstance(f, Format) for f in formats):
        raise TypeError(
            f"`allocate(..., formats={formats!r})`: a sequence of formats, such as "
            "`[Int(2), Int(4), Int(8)]`, None among them for a weight that stays as it is."
        )
    if any(f is not None and f.rounding == "stochastic" for f in formats):
        raise ValueError("`allocate(..., formats=...)`: formats that round to nearest or down.")


def _paths(params: PyTree, sites: Sequence[Site], where: trees.Where | None) -> list[str]:
    fed = {path for site in sites for path in site.weights}
    order = [path for path in trees.paths(params) if path in fed]
    if where is not None:
        marked = trees.select(params, where, caller="allocate")
        chosen = {path for path, hit in trees.items(marked) if hit}
        order = [path for path in trees.paths(params) if path in chosen]
    if not order:
        raise ValueError("`allocate(apply, params, ...)` found no weight that feeds a product.")
    return order


def _rounded(
    params: PyTree, paths: Sequence[str], formats: Sequence[Choice], sites: Sequence[Site]
) -> tuple[list[dict[str, jax.Array]], np.ndarray]:
    """Each weight in each format, and the bits it takes there: `[weights, formats]`."""
    weights = dict(trees.items(params))
    values, bits = [{} for _ in formats], np.zeros((len(paths), len(formats)))
    for j, path in enumerate(paths):
        for c, format in enumerate(formats):
            weight = weights[path]
            if format is None:
                values[c][path] = jnp.asarray(weight)
                bits[j, c] = np.size(weight) * trees.bits_of(weight)
                continue
            spec = Spec(format)
            axes = axes_of(path, weight, spec, sites, "allocate")
            values[c][path] = jax.jit(on_grid, static_argnums=(1, 2))(weight, format, axes)
            leaf = coded(weight, spec, axes)
            bits[j, c] = sum(array.size * width for array, width in leaf.storage().values())
    return values, bits


def _costs(
    budget: Budget,
    params: PyTree,
    paths: Sequence[str],
    formats: Sequence[Choice],
    bits: np.ndarray,
    sites: Sequence[Site],
    activation_bits: int,
) -> tuple[np.ndarray, float]:
    """The cost of each weight in each format, and that of all else."""
    if budget.bits is not None:
        return bits, 0.0
    if budget.bytes is not None:
        rest = [leaf for path, leaf in trees.items(params) if path not in paths]
        return bits / 8, trees.size(rest).bits / 8
    if budget.operations is not None:
        width = [32 if f is None else f.bits for f in formats]
        work = [
            sum(s.total / len(s.weights) for s in sites if path in s.weights) / 2 for path in paths
        ]
        return np.outer(work, width) * activation_bits, 0.0
    return _seconds(params, paths, formats, sites), 0.0


def _seconds(
    params: PyTree, paths: Sequence[str], formats: Sequence[Choice], sites: Sequence[Site]
) -> np.ndarray:
    """Times the products of each weight in each format, by themselves, on this machine."""
    from jopt.trace import lift

    weights = dict(trees.items(params))
    found = np.zeros((len(paths), len(formats)))
    for j, path in enumerate(paths):
        runs = [(s, lift(_alone(s))) for s in sites if path in s.weights]
        for c, format in enumerate(formats):
            for site, product in runs:
                operand = site.uses[0].operand
                shapes: list[Any] = [jnp.ones(site.shapes[k], site.dtypes[k]) for k in range(2)]
                if format is not None:
                    spec = Spec(format)
                    axes = axes_of(path, weights[path], spec, sites, "allocate")
                    kept = tuple(a for a in axes if -a <= shapes[operand].ndim)
                    shapes[operand] = coded(shapes[operand], spec, kept)
                found[j, c] += site.trips * _least_time(product, shapes) / len(site.weights)
    return found


def _alone(site: Site) -> Callable[[Any, Any], Any]:
    """A product of the shapes of a site, as a function of its own."""
    if site.operation != "dot_general":
        raise ValueError(
            f"`allocate(..., budget=Budget(seconds=...))` times matrix products; `{site.path}` "
            f"feeds a `{site.operation}`. Leave it out by `where`, or choose another budget."
        )
    left, right, out = site.shapes
    side = site.uses[0].operand
    rank = len(site.shapes[side])
    mine = [a % rank for a in site.contracted or () if -a <= rank]
    batch = len(left) + len(right) - len(out) - 2 * len(mine)
    theirs = list(range(len(site.shapes[1 - side])))[-len(mine) :]
    numbers = [(mine, theirs), (theirs, mine)][side == 1]
    if batch or [left[a] for a in numbers[0]] != [right[a] for a in numbers[1]]:
        raise ValueError(
            f"`allocate(..., budget=Budget(seconds=...))`: the product of `{site.path}` "
            f"({left} by {right}) is not a plain one. Choose another budget."
        )
    return lambda x, y: jax.lax.dot_general(x, y, (numbers, ((), ())))


def _least_time(function: Callable[..., Any], operands: Sequence[Any]) -> float:
    compiled = jax.jit(function)
    jax.block_until_ready(compiled(*operands))
    times = []
    for _ in range(10):
        began = time.perf_counter()
        jax.block_until_ready(compiled(*operands))
        times.append(time.perf_counter() - began)
    return min(times)


# The choice.


def _knapsack(
    sensitivity: np.ndarray, costs: np.ndarray, limit: float, budget: Budget
) -> list[int]:
    """One format for each weight: least sensitivity within the limit."""
    from scipy.optimize import Bounds, LinearConstraint, milp

    if not np.all(np.isfinite(sensitivity)):
        raise ValueError(
            "`allocate(...)`: a sensitivity is not finite; check the parameters and the batches."
        )
    weights, formats = costs.shape
    least = float(np.sum(np.min(costs, axis=1)))
    if least > limit * (1 + 1e-9):
        raise ValueError(
            f"`allocate(..., budget={budget})`: the smallest formats cost {least:.6g} where "
            f"{limit:.6g} is left for these weights. Raise the budget or give smaller formats."
        )
    scale = max(float(np.max(np.abs(sensitivity))), 1e-30)
    one_each = np.kron(np.eye(weights), np.ones((1, formats)))
    solved = milp(
        (sensitivity / scale).ravel(),
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint(costs.reshape(1, -1) / limit, -np.inf, 1 + 1e-9),
        ],
        integrality=np.ones(weights * formats),
        bounds=Bounds(0, 1),
    )
    if solved.x is None:
        raise ValueError(f"`allocate(...)`: the choice could not be found: {solved.message}")
    return [int(c) for c in np.argmax(solved.x.reshape(weights, formats), axis=1)]
