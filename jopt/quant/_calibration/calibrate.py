"""Calibration: activation ranges measured on batches, and a report of each leaf."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from jopt import trees
from jopt.trace import Site, collect, merge
from jopt.trace import sites as sites_of

from .._formats.base import Format
from .._leaves.weights import FakeQuant, QArray, Range
from .._policy import Policy, axes_of, resolve
from .._quantize import coded, quantize
from .._rounding.methods import METHODS, Method, Nearest
from .._rounding.methods import rounded as rounded_by
from .._training.learned import TrainedQuant
from .clip import least_error_grid
from .observers import (
    OBSERVERS,
    Binned,
    Extremes,
    ExtremesObserver,
    HistogramObserver,
    MinMax,
    Observer,
)
from .watch import Watched

PyTree = Any

WEIGHTS = ("minmax", "mse")
# Told what is done: f("ranges", batches so far). There may be no end known.
Progress = Callable[[str, int], None]


class Row(NamedTuple):
    """What `calibrate` did to one leaf."""

    path: str
    weight: Format | None  # None: left as it was
    activation: Format | None
    low: np.ndarray | None  # of the measured range; one entry a layer where layers are stacked
    high: np.ndarray | None
    bits: int  # of the leaf, scales and ranges included
    reason: str  # why no range was measured, or nothing done; empty where all was done
    undone: str = ""  # of the reason, what says that something asked for was not done


def calibrate(
    apply: Callable[..., Any],
    params: PyTree,
    batches: Iterable[Any],
    policy: Policy = None,
    *,
    sites: Sequence[Site] | None = None,
    method: str | Method = "rtn",
    observer: str | Observer = "minmax",
    weight_observer: Literal["minmax", "mse"] = "minmax",
    progress: Progress | None = None,
) -> tuple[PyTree, tuple[Row, ...]]:
    """Quantizes weights and measures the ranges that static activations take on `batches`.

    `apply` runs on each batch as it is (float weights, or fake-quantized ones where `params` has
    `FakeQuant` leaves), and each product with a static activation records its activation. An
    observer with a histogram (percentile, MSE, entropy, histogram) goes over the batches twice:
    first for the range of them all, then to count on it, so an iterator's batches are kept in a
    list. Ranges of stacked layers under `scan` are kept layer by layer. One compilation for each
    shape of batch, and each time over them.

    Args:
      apply: any function `apply(params, *inputs)`; not lifted, this does it.
      params: its parameters; arrays, or leaves that `quantize` or `qat` made.
      batches: each a tuple of the inputs, or the one input if it is no tuple. Arrays only: bind
        what is Python (`train=False`) with a lambda.
      policy: as in `quantize`, applied first. None keeps the leaves that are there: `FakeQuant`
        leaves stay trainable, with their ranges filled in.
      sites: as in `quantize`; methods other than `"rtn"` find them if there are none.
      method: how weights are rounded: `"rtn"`, to nearest; `"gptq"`, `"awq"`, `"smoothquant"`,
        `"adaround"`, `"hqq"`, or a `Method` such as `GPTQ(order=True)`. The function is run in
        stages, so that each layer is rounded on what the rounded ones before it give; batches are
        then kept in a list and have one shape.
      observer: how a range is found: `"minmax"`, `"moving_average"`, `"percentile"`, `"mse"`,
        `"entropy"`, `"histogram"`, or an `Observer` such as `Percentile(99.9)`.
      weight_observer: `"minmax"`, a weight's grid covers all its values; `"mse"`, of clipped ranges
        the one whose rounding has the least squared error, scale by scale.
      progress: called with what is done, `"ranges"`, `"histograms"` or the path of a weight, and
        how many batches (or weights) so far.

    Returns:
      `(params, report)`: `params` with quantized leaves and their ranges, and one `Row` for each
      leaf, with the reason where something was not done.

    Raises:
      ValueError: if the method or an observer is unknown, if there is nothing to calibrate, no
        batch, or an activation that is measured is empty or not finite; and as `quantize` does.
      TypeError: if `observer` is neither a string nor an `Observer`.

    References:
      Benoit Jacob et al., Quantization and training of neural networks for efficient
      integer-arithmetic-only inference, 2017, arXiv:1712.05877. Hao Wu et al., Integer quantization
      for deep learning inference: principles and empirical evaluation, 2020, arXiv:2004.09602.
    """
    rounding = _method(method)
    _one_of("weight_observer", weight_observer, WEIGHTS)
    watching = _observer(observer)
    if rounding != Nearest():
        batches = _list(batches)
    target, missed = params, {}
    if policy is not None:
        params, target, missed = _rounded(
            apply, params, batches, policy, sites, rounding, weight_observer, progress
        )
    elif rounding != Nearest():
        raise ValueError(
            f"`calibrate(..., method={method!r})` rounds weights: pass a policy that says to what."
        )
    leaves = dict(trees.items(target))
    if not any(isinstance(leaf, QArray | FakeQuant) for leaf in leaves.values()):
        raise ValueError(_nothing(policy))
    static = {path: leaf for path, leaf in leaves.items() if getattr(leaf, "static", False)}
    ranges = _measured(apply, params, batches, static, watching, progress) if static else {}

    def fill(path: str, leaf: Any) -> Any:
        if path not in ranges:
            return leaf
        ends = (_of_rank(end, leaf.ndim) for end in ranges[path])
        return dataclasses.replace(leaf, range=Range(*ends))

    filled = trees.map_with_path(fill, target)
    report = tuple(
        _row(path, leaf, ranges.get(path), missed.get(path, ""))
        for path, leaf in trees.items(filled)
    )
    return filled, report


def _rounded(
    apply: Callable[..., Any],
    params: PyTree,
    batches: Iterable[Any],
    policy: Policy,
    sites: Sequence[Site] | None,
    method: Method,
    weight_observer: str,
    progress: Progress | None,
) -> tuple[PyTree, PyTree, dict[str, str]]:
    """The parameters as the method prepared them, and rounded; and what it could not do."""
    if method == Nearest():
        rounded = quantize if weight_observer == "minmax" else _clipped
        return params, rounded(params, policy, sites=sites), {}
    batches = _list(batches)
    if not batches:
        raise ValueError("`calibrate(apply, params, batches)` got no batch to round weights on.")
    if sites is None:
        sites = sites_of(apply, params, *batches[0])
    specs = resolve(params, policy, sites=sites, caller="calibrate")
    for path, leaf in trees.items(params):  # refused before anything is computed
        if path in specs:
            axes_of(path, leaf, specs[path], sites, "calibrate")
    params, missed = method.prepare(apply, params, batches, specs)
    if not method.rounds:
        rounded = quantize if weight_observer == "minmax" else _clipped
        return params, rounded(params, policy, sites=sites), missed
    if weight_observer != "minmax":
        raise ValueError(
            f'`calibrate(..., method={method}, weight_observer="{weight_observer}")`: this method '
            "finds the grids of weights itself. Leave `weight_observer` away."
        )
    done = itertools.count(1)
    shown = None if progress is None else lambda path: progress(path, next(done))
    target, unmet = rounded_by(apply, params, batches, specs, method, sites=sites, shown=shown)
    return params, target, missed | {p: f"rounded to nearest: {why}" for p, why in unmet.items()}


def _list(batches: Iterable[Any]) -> list[tuple[Any, ...]]:
    return [batch if isinstance(batch, tuple) else (batch,) for batch in batches]


def _method(method: str | Method) -> Method:
    if isinstance(method, Method):
        return method
    if not isinstance(method, str):
        raise TypeError(
            f"`calibrate(..., method={method!r})`: expected a name such as "
            '`"gptq"`, or a `Method` such as `jopt.quant.GPTQ(order=True)`.'
        )
    _one_of("method", method, tuple(METHODS))
    return METHODS[method]()


def _observer(observer: str | Observer) -> Observer:
    if isinstance(observer, str):
        _one_of("observer", observer, tuple(OBSERVERS))
        return OBSERVERS[observer]()
    if not isinstance(observer, ExtremesObserver | HistogramObserver):
        raise TypeError(
            f"`calibrate(..., observer={observer!r})`: expected a name such as "
            '`"percentile"`, or an `Observer` such as `jopt.quant.Percentile(99.9)`.'
        )
    return observer


def _clipped(params: PyTree, policy: Policy, *, sites: Sequence[Site] | None) -> PyTree:
    """`quantize` on the grids of least squared error."""
    chosen = resolve(params, policy, sites=sites, caller="calibrate")

    def replace(path: str, leaf: Any) -> Any:
        if path not in chosen:
            return leaf
        spec = chosen[path]
        if spec.weight.needs_values:
            raise ValueError(
                f'`calibrate(..., weight_observer="mse")`: `{path}` has {spec.weight}, whose grid '
                "is fitted to all values and has no range to clip. Leave the option away."
            )
        axes = axes_of(path, leaf, spec, sites, "calibrate")
        return coded(leaf, spec, axes, grid=least_error_grid(leaf, spec.weight, axes))

    return trees.map_with_path(replace, params)


# Measuring.


def _measured(
    apply: Callable[..., Any],
    params: PyTree,
    batches: Iterable[Any],
    static: dict[str, Any],
    observer: Observer,
    progress: Progress | None,
) -> dict[str, Range]:
    """The ranges of the activations that meet the weights `static`, over all batches."""
    histograms = isinstance(observer, HistogramObserver)
    batches = list(batches) if histograms else batches
    averaging = observer if isinstance(observer, ExtremesObserver) else MinMax()
    whole, averaged, pass_over = MinMax(), {}, _pass(apply, static, 0)
    seen: dict[str, Extremes] = {}
    fold = jax.jit(lambda state, new: averaging.fold(state, new))
    for stats in _over(pass_over, params, None, batches, "ranges", progress):
        new = {path: Extremes(*(stat.value for stat in pair)) for path, pair in stats.items()}
        for path, pair in new.items():
            start = whole.init(pair.low.shape)
            seen[path] = whole.fold(seen.get(path, start), pair)
            averaged[path] = fold(averaged.get(path, start), pair)
    _check(seen)
    states: dict[str, Any] = averaged
    if isinstance(observer, HistogramObserver):
        ends = {path: Range(*observer.ends(*pair)) for path, pair in seen.items()}
        of_rank = {
            path: Range(*(_of_rank(end, static[path].ndim) for end in pair))
            for path, pair in ends.items()
        }
        passed = _pass(apply, {path: static[path] for path in ends}, observer.bins)
        counts = functools.reduce(
            jax.jit(merge), _over(passed, params, of_rank, batches, "histograms", progress)
        )
        states = {path: Binned(*ends[path], counts[path].value) for path in ends}
    return {path: observer.range(state, static[path].activation) for path, state in states.items()}


def _pass(apply: Callable[..., Any], static: Iterable[str], bins: int) -> Callable[..., Any]:
    """What one batch adds to the statistics: extremes, or histograms between given ends."""
    watched = frozenset(static)

    @trees.jitted
    def observe(params: PyTree, ends: dict[str, Range] | None, inputs: tuple[Any, ...]) -> Any:
        def watch(path: str, leaf: Any) -> Any:
            if path not in watched:
                return leaf
            value = leaf.materialise() if trees.is_typed(leaf) else leaf
            between = None if ends is None else (ends[path],)
            return Watched(value, None, None, False, (path,), between, bins)

        seen = trees.map_with_path(watch, params)
        return collect(apply, allow_dense=True)(seen, *inputs)[1]

    return observe


def _over(
    observe: Callable[..., Any],
    params: PyTree,
    ends: dict[str, Range] | None,
    batches: Iterable[Any],
    what: str,
    progress: Progress | None,
) -> Iterable[dict[str, Any]]:
    """The statistics of each batch in turn."""
    done = 0
    for done, batch in enumerate(batches, 1):
        yield observe(params, ends, batch if isinstance(batch, tuple) else (batch,))
        if progress is not None:
            progress(what, done)
    if done == 0:
        raise ValueError(
            "`calibrate(apply, params, batches)` got no batch to measure activation ranges on."
        )


def _check(seen: dict[str, Extremes]) -> None:
    for path, (low, high) in seen.items():
        if np.any(np.asarray(low) > np.asarray(high)):
            raise ValueError(
                f"`calibrate(...)`: the activation that meets `{path}` is empty in every batch."
            )
        if not (np.all(np.isfinite(low)) and np.all(np.isfinite(high))):
            raise ValueError(
                f"`calibrate(...)`: the activation that meets `{path}` has a NaN or an infinity: "
                f"{np.asarray(low)} to {np.asarray(high)}.\nCheck the batches and the parameters."
            )


def _of_rank(array: jax.Array, ndim: int) -> jax.Array:
    """One entry a stacked layer, or one for all, with the rank of the weight."""
    return array.reshape(array.shape + (1,) * (ndim - array.ndim))


# The report, and what is refused.


def _row(path: str, leaf: Any, range: Range | None, missed: str) -> Row:
    low, high = (None, None) if range is None else (np.asarray(end) for end in range)
    format, activation, reason, undone = None, None, "", missed
    if isinstance(leaf, QArray | FakeQuant):
        format, activation = leaf.format, leaf.activation
        if activation is None:
            reason = "weight only"
        elif isinstance(leaf, TrainedQuant) and leaf.activation_method is not None:
            reason = "learned: `init_steps` begins its range, training moves it"
        elif not leaf.static:
            reason = "dynamic: the range is found in each call"
        elif range is None:
            reason = "static, but no product met this weight as `lift` would run it: no range"
            undone = _joined(missed, reason)
        elif np.any((low == 0) & (high == 0)):
            reason = "static, but all that met this weight was zero: what meets it now becomes zero"
            undone = _joined(missed, reason)
    else:
        reason = "not in the policy"
    bits = trees.size(leaf).bits
    return Row(path, format, activation, low, high, bits, _joined(missed, reason), undone)


def _joined(*parts: str) -> str:
    return "; ".join(part for part in parts if part)


def _nothing(policy: Policy) -> str:
    if policy is not None:
        return (
            "`calibrate(apply, params, batches, policy)`: the policy quantizes no weight.\n"
            "Give some pattern a format or a `Spec`, such as `Spec(Int(8), Int(8), static=True)`."
        )
    return (
        "`calibrate(apply, params, batches)` without a policy fills in the leaves that "
        "`quantize` or `qat` made, and there are none.\n"
        "Pass a policy, such as `Spec(Int(8), Int(8), static=True)`."
    )


def _one_of(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        names = ", ".join(f'"{option}"' for option in known)
        raise ValueError(f'`calibrate(..., {name}="{value}")`: {name} is one of {names}.')
