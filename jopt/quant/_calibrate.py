"""Calibration: activation ranges measured on batches, and a report of each leaf."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jopt import trees
from jopt.trace import Site, collect, merge

from ._formats import Format
from ._leaves import DenseWeight, FakeQuant, QArray, Range
from ._policy import Policy
from ._quantize import quantize

PyTree = Any

METHODS = ("rtn",)
OBSERVERS = ("minmax",)


class Row(NamedTuple):
    """What `calibrate` did to one leaf."""

    path: str
    weight: Format | None  # None: left as it was
    activation: Format | None
    low: np.ndarray | None  # of the measured range; one entry a layer where layers are stacked
    high: np.ndarray | None
    bits: int  # of the leaf, scales and ranges included
    reason: str  # why no range was measured, or nothing done; empty where all was done


def calibrate(
    apply: Callable[..., Any],
    params: PyTree,
    batches: Iterable[Any],
    policy: Policy = None,
    *,
    sites: Sequence[Site] | None = None,
    method: str = "rtn",
    observer: str = "minmax",
) -> tuple[PyTree, tuple[Row, ...]]:
    """Quantizes weights and measures the ranges that static activations take on `batches`.

    `apply` runs on each batch as it is (float weights, or fake-quantized ones where `params` has
    `FakeQuant` leaves) and each product with a static activation records the smallest and largest
    value of its activation, zero included. Ranges of stacked layers under `scan` are kept layer by
    layer. One compilation for each shape of batch.

    Args:
      apply: any function `apply(params, *inputs)`; not lifted, this does it.
      params: its parameters; arrays, or leaves that `quantize` or `qat` made.
      batches: each a tuple of the inputs, or the one input if it is no tuple. Arrays only: bind
        what is Python (`train=False`) with a lambda.
      policy: as in `quantize`, applied first. None keeps the leaves that are there: `FakeQuant`
        leaves stay trainable, with their ranges filled in.
      sites: as in `quantize`.
      method: how weights are rounded: `"rtn"`, to nearest.
      observer: how a range is found: `"minmax"`.

    Returns:
      `(params, report)`: `params` with quantized leaves and their ranges, and one `Row` for each
      leaf, with the reason where something was not done.

    Raises:
      ValueError: if the method or the observer is unknown, if there is nothing to calibrate, no
        batch, or an activation is not finite; and as `quantize` does.

    References:
      Benoit Jacob et al., Quantization and training of neural networks for efficient
      integer-arithmetic-only inference, 2017, arXiv:1712.05877.
    """
    _one_of("method", method, METHODS)
    _one_of("observer", observer, OBSERVERS)
    target = params if policy is None else quantize(params, policy, sites=sites)
    leaves = dict(trees.items(target))
    if not any(isinstance(leaf, QArray | FakeQuant) for leaf in leaves.values()):
        raise ValueError(
            "`calibrate(apply, params, batches)` without a policy fills in the leaves that "
            "`quantize` or `qat` made, and there are none.\n"
            "Pass a policy, such as `Spec(Int(8), Int(8), static=True)`."
        )
    static = {path for path, leaf in leaves.items() if getattr(leaf, "static", False)}
    ranges = _measured(apply, params, batches, static) if static else {}

    def fill(path: str, leaf: Any) -> Any:
        if path not in ranges:
            return leaf
        shape = ranges[path].low.shape
        shape += (1,) * (leaf.ndim - len(shape))
        return dataclasses.replace(leaf, range=Range(*(end.reshape(shape) for end in ranges[path])))

    filled = trees.map_with_path(fill, target)
    report = tuple(_row(path, leaf, ranges.get(path)) for path, leaf in trees.items(filled))
    return filled, report


def _measured(
    apply: Callable[..., Any], params: PyTree, batches: Iterable[Any], static: set[str]
) -> dict[str, Range]:
    """The ranges of the activations that meet the weights `static`, over all batches."""

    def watch(path: str, leaf: Any) -> Any:
        if path not in static:
            return leaf
        value = leaf.materialise() if trees.is_typed(leaf) else leaf
        return DenseWeight(value, None, None, False, (path,))

    @jax.jit
    def observe(params: PyTree, inputs: tuple[Any, ...]) -> dict[str, Any]:
        watched = trees.map_with_path(watch, params)
        return collect(apply, allow_dense=True)(watched, *inputs)[1]

    fold, stats = jax.jit(merge), None
    for batch in batches:
        new = observe(params, batch if isinstance(batch, tuple) else (batch,))
        stats = new if stats is None else fold(stats, new)
    if stats is None:
        raise ValueError(
            "`calibrate(apply, params, batches)` got no batch to measure activation ranges on."
        )
    ranges = {path: Range(*(stat.value for stat in pair)) for path, pair in stats.items()}
    for path, (low, high) in ranges.items():
        if not (jnp.all(jnp.isfinite(low)) and jnp.all(jnp.isfinite(high))):
            raise ValueError(
                f"`calibrate(...)`: the activation that meets `{path}` has a NaN or an infinity: "
                f"{np.asarray(low)} to {np.asarray(high)}.\nCheck the batches and the parameters."
            )
    return ranges


def _row(path: str, leaf: Any, range: Range | None) -> Row:
    low, high = (None, None) if range is None else (np.asarray(end) for end in range)
    format, activation, reason = None, None, ""
    if isinstance(leaf, QArray | FakeQuant):
        format, activation = leaf.format, leaf.activation
        if activation is None:
            reason = "weight only"
        elif not leaf.static:
            reason = "dynamic: the range is found in each call"
        elif range is None:
            reason = "static, but no product met this weight as `lift` would run it: no range"
    else:
        reason = "not in the policy"
    return Row(path, format, activation, low, high, trees.size(leaf).bits, reason)


def _one_of(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        names = ", ".join(f'"{option}"' for option in known)
        raise ValueError(f'`calibrate(..., {name}="{value}")`: {name} is one of {names}.')
