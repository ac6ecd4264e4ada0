"""Calibration of products without a weight: the ranges of their operands, measured on batches."""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jopt.trace import Stat, merge
from jopt.trace.swaps import Product as Found
from jopt.trace.swaps import Swapped, swapped

from .._formats.base import Format
from .._leaves.pairs import Pair, Ranges
from .._leaves.values import ProductPolicy, Products, chosen_of, entries_of
from .._leaves.weights import Range
from .histogram import count
from .observers import (
    OBSERVERS,
    Binned,
    Extremes,
    ExtremesObserver,
    HistogramObserver,
    MinMax,
    Observer,
    extremes,
)

PyTree = Any
Operand = tuple[str, int]  # the name of a product, and 0 for its left operand


def calibrate_products(
    apply: Callable[..., Any],
    params: PyTree,
    batches: Iterable[Any],
    policy: ProductPolicy,
    *,
    observer: str | Observer = "minmax",
    allow_dense: bool = False,
) -> Products:
    """Measures the static ranges that `products(apply, policy)` needs.

    Products under `scan` have a range for each iteration. While ranges are measured, products are
    computed as ever. An observer with a histogram goes over the batches twice, as in `calibrate`.
    One compilation for each shape of batch, and each time over them.

    Args:
      apply: any function `apply(params, *inputs)`.
      params: its parameters, typed leaves among them or not.
      batches: each a tuple of the inputs, or the one input if it is no tuple.
      policy: as in `products`.
      observer: how a range is found, as in `calibrate`: `"minmax"`, `"percentile"`, `MSE()`, ...
      allow_dense: as in `lift`.

    Returns:
      `Products(params, ranges)`, to be given to `products(apply, policy)` in place of `params`.

    Raises:
      ValueError: if nothing in the policy is static, there is no batch, a product did not run, an
        operand is not finite, or the observer is unknown; and as `products` does.
    """
    watching = _observer(observer)
    params = params.params if isinstance(params, Products) else params
    formats: dict[Operand, Format] = {}
    observe = functools.partial(_pass, apply, params, policy, formats, allow_dense)
    histograms = isinstance(watching, HistogramObserver)
    batches = list(batches) if histograms else batches
    whole = MinMax()
    averaging = watching if isinstance(watching, ExtremesObserver) else whole
    seen: dict[Operand, Extremes] = {}
    states: dict[Operand, Any] = {}
    for stats in _over(observe(0), {}, batches):
        for key, pair in stats.items():
            new = Extremes(*(stat.value for stat in pair))
            start = whole.init(new.low.shape)
            seen[key] = whole.fold(seen.get(key, start), new)
            states[key] = averaging.fold(states.get(key, start), new)
    _check(formats, seen)
    if isinstance(watching, HistogramObserver):
        ends = {key: Range(*watching.ends(*pair)) for key, pair in seen.items()}
        counted = _over(observe(watching.bins), _by_name(ends), batches)
        counts = functools.reduce(jax.jit(merge), counted)
        states = {key: Binned(*ends[key], counts[key].value) for key in ends}
    found = {key: watching.range(states[key], format) for key, format in formats.items()}
    return Products(params, _by_name(found))


# Helpers, in order of use.


def _observer(observer: str | Observer) -> Observer:
    if isinstance(observer, str) and observer in OBSERVERS:
        return OBSERVERS[observer]()
    if not isinstance(observer, ExtremesObserver | HistogramObserver):
        names = ", ".join(f'"{name}"' for name in OBSERVERS)
        raise ValueError(
            f"`calibrate_products(..., observer={observer!r})`: expected an `Observer` or one of "
            f"{names}."
        )
    return observer


def _pass(
    apply: Callable[..., Any],
    params: PyTree,
    policy: ProductPolicy,
    formats: dict[Operand, Format],
    allow_dense: bool,
    bins: int,
) -> Callable[..., Any]:
    """What one batch adds to the statistics: extremes or, with `bins`, histograms.

    Fills in `formats`, those of the operands that are static.
    """
    entries = entries_of(policy)

    def choose(found: Sequence[Found]) -> Mapping[str, Any]:
        static = {n: pair for n, pair in chosen_of(found, entries).items() if pair.static}
        for name, pair in static.items():
            sides = enumerate((pair.left, pair.right))
            formats.update({(name, i): format for i, format in sides if format is not None})
        return {name: functools.partial(_observe, pair, bins) for name, pair in static.items()}

    @jax.jit
    def measure(params: PyTree, ends: dict[str, Ranges], inputs: tuple[Any, ...]) -> Any:
        stats = swapped(apply, (params, *inputs), {}, choose, given=ends, allow_dense=allow_dense)[
            1
        ]
        return {
            name: stat
            for name, stat in stats.items()
            if (name, 0) in formats or (name, 1) in formats
        }

    def measured(ends: dict[str, Ranges], inputs: tuple[Any, ...]) -> dict[Operand, Any]:
        stats = measure(params, ends, inputs)
        return {(name, i): stats[name][i] for name, i in formats if name in stats}

    return measured


def _observe(pair: Pair, bins: int, call: Swapped, left: jax.Array, right: jax.Array) -> jax.Array:
    """The product itself; what its operands are like is recorded."""

    def seen(x: jax.Array, format: Format | None, ends: Range | None) -> Any:
        if format is None:
            return None
        if ends is not None:
            return Stat(count(x.reshape(-1), *ends, bins), "sum")
        low, high = extremes(x.reshape(-1))
        return Stat(low, "min"), Stat(high, "max")

    ends = call.given or (None, None)
    call.record(tuple(map(seen, (left, right), (pair.left, pair.right), ends)))
    return call.bind(left, right)


def _over(
    observe: Callable[..., Any], ends: dict[str, Ranges], batches: Iterable[Any]
) -> Iterator[dict[Operand, Any]]:
    """The statistics of each batch in turn."""
    none = True
    for batch in batches:
        none = False
        yield observe(ends, batch if isinstance(batch, tuple) else (batch,))
    if none:
        raise ValueError("`calibrate_products(apply, params, batches, policy)` got no batch.")


def _check(formats: Mapping[Operand, Format], seen: Mapping[Operand, Extremes]) -> None:
    if not formats:
        raise ValueError(
            "`calibrate_products(...)`: the policy has no static product; dynamic ranges need no "
            "calibration.\nSay `Pair(Int(8), Int(8), static=True)` for those that shall have them."
        )
    for name, side in formats:
        pair = seen.get((name, side))
        if pair is None:
            raise ValueError(
                f"`calibrate_products(...)`: `{name}` recorded nothing: a typed leaf feeds it, or "
                f'it is the condition of a loop.\nPut `("{name}", None)` first in the policy.'
            )
        low, high = (np.asarray(end) for end in pair)
        if not (np.isfinite(low).all() and np.isfinite(high).all()):
            never = bool((low > high).any())
            raise ValueError(
                f"`calibrate_products(...)`: `{name}` "
                + ("is in a branch that did not run" if never else "has a NaN or an infinity")
                + f" on these batches: {low} to {high}.\nCheck the batches and the parameters."
            )


def _by_name(ranges: Mapping[Operand, Range]) -> dict[str, Ranges]:
    """Ranges of operands as those of products."""
    names = dict.fromkeys(name for name, _ in ranges)
    return {name: (ranges.get((name, 0)), ranges.get((name, 1))) for name in names}
