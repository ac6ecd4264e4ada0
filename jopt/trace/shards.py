"""`shard_map` inside a lifted function: leaves are split as the values that they stand for."""

import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import PartitionSpec

from . import compat, stats
from .control import dense_outputs, hand_over
from .frame import Frame, Tracked
from .layered import Layered
from .leaf import aval_of
from .rules import structure
from .walk import dense


@structure(compat.SHARD_MAP)
def _shard_map(frame: Frame, equation: Any, operands: Sequence[Any]) -> list[Any]:
    """A `shard_map` again, every array of a leaf split along the axes that the value is."""
    params = equation.params
    pairs = zip(operands, params["in_specs"], strict=True)
    specs = [_split(value, spec, params["mesh"]) for value, spec in pairs]
    if any(spec is None for spec in specs):
        why = (
            "a `shard_map` splits an axis along which the arrays that it holds are not split alike"
        )
        return dense(frame, equation, operands, why)

    def body(*operands: Any) -> Any:
        results, records = dense_outputs(equation, frame, params["jaxpr"], operands)
        return results, {name: _whole(name, record, params) for name, record in records.items()}

    results, records = jax.shard_map(
        body,
        mesh=params["mesh"],
        in_specs=tuple(specs),
        out_specs=(list(params["out_specs"]), PartitionSpec()),
        axis_names=params["newly_manual_axes"],
        check_vma=params["check_vma"],
    )(*operands)
    hand_over(frame, records)
    return results


def _split(value: Any, spec: PartitionSpec, mesh: Any) -> Any:
    """How the arrays of an operand are split; None if one of them cannot be."""
    if not isinstance(value, Tracked):
        return spec
    shape = aval_of(value.leaf).shape
    axes = (*spec, *[None] * (len(shape) - len(spec)))

    def own(array: Any) -> PartitionSpec | None:
        if array.ndim != len(shape):
            return None
        pairs = zip(axes, array.shape, shape, strict=True)
        coarser = any(axis is not None and n not in (1, m) for axis, n, m in pairs)
        if coarser and not isinstance(
            value.leaf, Layered
        ):  # groups are split; others may be no part
            return None
        names = [None if size == 1 else axis for axis, size in zip(axes, array.shape, strict=True)]
        fits = all(
            size % _shards(axis, mesh) == 0 for axis, size in zip(names, array.shape, strict=True)
        )
        return PartitionSpec(*names) if fits else None

    arrays, structure = jax.tree.flatten(value)
    specs = [own(array) for array in arrays]
    return None if None in specs else jax.tree.unflatten(structure, specs)


def _shards(axis: Any, mesh: Any) -> int:
    names = () if axis is None else axis if isinstance(axis, tuple) else (axis,)
    return math.prod(mesh.shape[name] for name in names)


def _whole(name: str, record: stats.Record, params: dict[str, Any]) -> stats.Record:
    """A record merged over the shards in which it may differ."""
    merge = {"min": jax.lax.pmin, "max": jax.lax.pmax, "sum": jax.lax.psum}

    def over(stat: stats.Stat) -> stats.Stat:
        if not params["check_vma"] and stat.merge == "sum":
            raise ValueError(
                f"`call.record({name!r}, ...)` sums over the shards of a `shard_map` with "
                "`check_vma=False`, which does not know in which of them values differ. Use "
                "`check_vma=True`."
            )
        every = params["newly_manual_axes"]
        axes = tuple(sorted(compat.varying(stat.value) & every if params["check_vma"] else every))
        value = merge[stat.merge](stat.value, axes) if axes else stat.value
        return stats.Stat(value, stat.merge)

    stat = jax.tree.map(over, record.stat, is_leaf=lambda x: isinstance(x, stats.Stat))
    return stats.Record(stat, record.stacked)
