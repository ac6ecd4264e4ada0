"""Rounding layer by layer, on data: each weight as the layers before it, rounded already, meet it.

A method looks at one matrix `[in, out]` and what was measured of its inputs (`_gptq`, `_adaround`,
`_hqq`); here it is run on every chosen weight of a function, whatever the weight's layout, and the
codes are put together as `QArray` leaves.
"""

import abc
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType

from jopt import trees
from jopt.trace import Activation, Measure, Site, Stop, Target, gram, moments, staged, target_of
from jopt.trace import sites as sites_of
from jopt.trace.layered import coarse_map
from jopt.trace.stops import stacked

from .._formats.base import Format
from .._leaves.weights import QArray
from .._policy import Spec, axes_of
from .._quantize import coded
from .._smoothing.smoothquant import folded, folds, smooth
from .adaround import adaround
from .awq import awq, awq_scales
from .gptq import gptq
from .hqq import hqq
from .layerwise import Rounded

PyTree = Any

_EMPTY = "what meets it was empty in every batch"
_VANISHED = "what meets it was zero in every batch, or its squares are no normal floats"


class Method(abc.ABC):
    """How `calibrate` rounds the weights of a function: subclasses are frozen dataclasses.

    `prepare` may change parameters beforehand; then the function stops before each chosen weight,
    `measure` says what is to be known of its inputs, and `matrix` rounds it.
    """

    rounds: ClassVar[bool] = True  # False: weights are rounded to nearest, as by `quantize`

    def prepare(
        self,
        apply: Callable[..., Any],
        params: PyTree,
        batches: Sequence[Any],
        specs: Mapping[str, Spec],
    ) -> tuple[PyTree, dict[str, str]]:
        """Parameters of the same function that are easier to round, and what was not done."""
        return params, {}

    def measure(self) -> Measure | None:
        """What `matrix` needs to know of a layer's inputs; None if it looks at no data."""
        return gram

    @abc.abstractmethod
    def matrix(self, weight: jax.Array, stats: Any, format: Format) -> Rounded:
        """Rounds `[blocks, in, out]`, with what was measured of its inputs."""


@dataclasses.dataclass(frozen=True)
class Nearest(Method):
    """Rounding to nearest, or as the format rounds: what `quantize` does."""

    rounds: ClassVar[bool] = False

    def matrix(self, weight: jax.Array, stats: Any, format: Format) -> Rounded:
        """Never asked."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class SmoothQuant(Nearest):
    """`jopt.quant.smooth` where parameters can take the scales, then rounding to nearest."""

    alpha: float = 0.5

    def prepare(
        self,
        apply: Callable[..., Any],
        params: PyTree,
        batches: Sequence[Any],
        specs: Mapping[str, Spec],
    ) -> tuple[PyTree, dict[str, str]]:
        """Makes large channels of activations smaller."""
        params, rows = smooth(apply, params, batches, list(specs), alpha=self.alpha)
        return params, {path: row.reason for row in rows if row.reason for path in row.paths}


@dataclasses.dataclass(frozen=True)
class AWQ(Method):
    """`jopt.quant.awq` of each layer: scales where parameters can take them, then narrower grids.

    Weights that meet one activation share their scales. What does not go into parameters is left
    away: that weight's grids are narrowed only.
    """

    points: int = 20
    clip: float = 0.5
    clips: int = 10

    def prepare(
        self,
        apply: Callable[..., Any],
        params: PyTree,
        batches: Sequence[Any],
        specs: Mapping[str, Spec],
    ) -> tuple[PyTree, dict[str, str]]:
        """Multiplies weights by the scales and divides what makes their inputs."""
        return folded_awq(apply, params, batches, specs, self.points)

    def matrix(self, weight: jax.Array, stats: Any, format: Format) -> Rounded:
        """To nearest, on the grids that cost least."""
        alike = jnp.ones(weight.shape[:-1], jnp.float32)
        options = {"points": 1, "clip": self.clip, "clips": self.clips}
        return awq(weight, stats["gram"], alike, format, **options)[0]


@dataclasses.dataclass(frozen=True)
class GPTQ(Method):
    """`jopt.quant.gptq` of each layer; the options are its."""

    damping: float = 0.01
    order: bool = False
    block: int = 128

    def matrix(self, weight: jax.Array, stats: Any, format: Format) -> Rounded:
        """By the Hessian of the layer's outputs."""
        return gptq(weight, stats["gram"], format, **dataclasses.asdict(self))


@dataclasses.dataclass(frozen=True)
class AdaRound(Method):
    """`jopt.quant.adaround` of each layer; the options are its."""

    steps: int = 1000
    rate: float = 0.01
    strength: float = 10.0

    def matrix(self, weight: jax.Array, stats: Any, format: Format) -> Rounded:
        """Up or down, as learned."""
        return adaround(weight, stats["gram"], format, **dataclasses.asdict(self))


@dataclasses.dataclass(frozen=True)
class HQQ(Method):
    """`jopt.quant.hqq` of each weight; the options are its. Looks at no data."""

    p: float = 0.7
    beta: float = 10.0
    growth: float = 1.01
    steps: int = 20
    starts: int = 4

    def measure(self) -> Measure | None:
        """Nothing."""
        return None

    def matrix(self, weight: jax.Array, stats: Any, format: Format) -> Rounded:
        """On the grid that leaves few weights with an error."""
        return hqq(weight, format, **dataclasses.asdict(self))


METHODS: dict[str, type[Method]] = {
    "rtn": Nearest,
    "gptq": GPTQ,
    "awq": AWQ,
    "smoothquant": SmoothQuant,
    "adaround": AdaRound,
    "hqq": HQQ,
}


def rounded(
    apply: Callable[..., Any],
    params: PyTree,
    batches: Iterable[Any],
    specs: Mapping[str, Spec],
    method: Method,
    *,
    sites: Sequence[Site],
    caller: str = "calibrate",
    shown: Callable[[str], None] | None = None,
) -> tuple[PyTree, dict[str, str]]:
    """Replaces weights by codes that `method` chose.

    Args:
      apply: any function `apply(params, *inputs)`.
      params: its parameters.
      batches: each a tuple of the inputs, or the one input; all of the same shapes.
      specs: how each path is quantized.
      method: such as `GPTQ()`.
      sites: `jopt.sites(apply, params, *inputs)`.
      caller: of errors.
      shown: is told each layer when it is done.

    Returns:
      `(params, missed)`: with `QArray` leaves at all paths of `specs`, and why the method was not
      used where it was not; those weights are rounded to nearest.
    """
    leaves = dict(trees.items(params))
    axes = {p: axes_of(p, leaves[p], spec, sites, caller) for p, spec in specs.items()}
    parts: dict[str, dict[tuple[int, ...], QArray]] = {path: {} for path in specs}
    unseen: dict[str, str] = {}

    def visit(stop: Stop) -> jax.Array:
        spec = specs[stop.path]
        if why := _unseen(stop):
            unseen[stop.path] = why
        given, stop = stop.weight, _undivided(stop)
        found = method.matrix(stop.matrices(), stop.stats, spec.weight)
        codes = stop.restored(found.codes)
        leaf = QArray(
            codes=jax.device_put(codes, given.sharding) if _explicit(given) else codes,
            **coarse_map(stop.coarse, found.grid)._asdict(),
            range=None,
            format=spec.weight,
            activation=spec.activation,
            static=spec.static,
            value_dtype=jnp.dtype(stop.weight.dtype),
        )
        parts[stop.path][stop.index] = leaf
        if shown is not None:
            shown("/".join([stop.path, *map(str, stop.index)]))
        return leaf.materialise()

    if (measure := method.measure()) is None:
        missed = _each(specs, leaves, sites, visit)
    else:
        _, missed = staged(apply, params, batches, specs, measure, visit, caller=caller)
    if unseen and set(unseen.values()) == {_EMPTY} and len(unseen) + len(missed) == len(specs):
        raise ValueError(
            f"`{caller}(...)`: the activation that meets `{next(iter(unseen))}` is empty in every "
            "batch."
        )

    def replace(path: str, leaf: Any) -> Any:
        if path not in specs:
            return leaf
        if not parts[path]:
            return coded(leaf, specs[path], axes[path])
        return stacked(parts[path])

    return trees.map_with_path(replace, params), unseen | missed


def folded_awq(
    apply: Callable[..., Any],
    params: PyTree,
    batches: Sequence[Any],
    specs: Mapping[str, Spec],
    points: int,
) -> tuple[PyTree, dict[str, str]]:
    """Puts the scales of AWQ into the parameters that can take them; the function stays the same.

    Scales of all activations are found with the function as it was. Those of one change nothing
    for the others: they multiply other axes of a weight than those that its grid runs along.
    """
    first = batches[0] if isinstance(batches[0], tuple) else (batches[0],)
    sites, leaves, missed = sites_of(apply, params, *first), dict(trees.items(params)), {}
    groups: dict[str, tuple[Any, list[Any]]] = {}
    for fold in folds(apply, params, *first, paths=list(specs)):
        chosen = [edit for edit in fold.weights if edit.path in specs]
        targets = {edit.path: target_of(edit.path, sites) for edit in chosen}
        why = fold.reason
        for edit in chosen:
            target = targets[edit.path]
            whole = isinstance(target, Target) and target.contracted == edit.axes
            why = why or ("" if whole else "its products sum over more than the channels")
        if why:
            missed |= {edit.path: why for edit in chosen}
        elif chosen:
            groups[chosen[0].path] = fold, [(edit.path, targets[edit.path]) for edit in chosen]
    scales: dict[str, dict[tuple[int, ...], jax.Array]] = {path: {} for path in groups}

    def visit(stop: Stop) -> None:
        if stop.stats["gram"].shape[0] != 1:
            return
        parts = [
            _undivided(
                dataclasses.replace(stop, target=target, weight=leaves[path][stop.index])
            ).matrices()
            for path, target in groups[stop.path][1]
        ]
        stop = _undivided(stop)
        magnitude = stop.stats["absolute"] / jnp.maximum(stop.stats["count"], 1.0)
        scales[stop.path][stop.index] = awq_scales(
            jnp.concatenate(parts, axis=-1)[0],
            stop.stats["gram"][0],
            magnitude[0],
            specs[stop.path].weight,
            points=points,
        )

    _, unmet = staged(apply, params, batches, groups, _gram_and_moments, visit, caller="calibrate")
    for path, (fold, _) in groups.items():
        if scales[path]:
            params = folded(params, fold, stacked(scales[path]))
        else:
            missed[path] = unmet.get(path, "its products share axes with the activation")
    return params, missed


def _gram_and_moments(activation: Activation) -> dict[str, Any]:
    return {**moments(activation), **gram(activation)}


def _undivided(stop: Stop) -> Stop:
    """The weight and what was measured, as arrays without the mesh where its axes are explicit."""

    def gathered(x: jax.Array) -> jax.Array:
        return jnp.asarray(np.asarray(x)) if _explicit(x) else x

    weight, stats = jax.tree.map(gathered, (stop.weight, stop.stats))
    return dataclasses.replace(stop, weight=weight, stats=stats)


def _explicit(x: jax.Array) -> bool:
    return AxisType.Explicit in jax.typeof(x).sharding.mesh.axis_types


def _unseen(stop: Stop) -> str:
    """Why nothing can be learned from what meets a weight; empty if something can."""
    stats = stop.stats if isinstance(stop.stats, dict) else {}
    if "count" in stats and not bool(jnp.any(stats["count"])):
        return _EMPTY
    return _VANISHED if "gram" in stats and not bool(jnp.any(stats["gram"])) else ""


def _each(
    specs: Mapping[str, Spec],
    leaves: Mapping[str, Any],
    sites: Sequence[Site],
    visit: Callable[[Stop], Any],
) -> dict[str, str]:
    """Visits each weight, layer by layer, without data; returns why some were not."""
    missed = {}
    for path in specs:
        target = target_of(path, sites)
        if isinstance(target, str):
            missed[path] = target
            continue
        weight = jnp.asarray(leaves[path])
        ranks = [
            len(site.shapes[use.operand]) for site in sites for use in site.uses if use.path == path
        ]
        lead = max(0, min(weight.ndim - min(ranks), weight.ndim + min(target.contracted)))
        for at in np.ndindex(*weight.shape[:lead]):
            visit(Stop(target, at, weight[at], None))
    return missed
