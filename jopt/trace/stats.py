"""Statistics that rules hand over while a function is evaluated, as extra outputs of it.

A rule says `call.record(name, stat)`, `stat` a pytree of `Stat`: an array and how two of them
merge. Each nested body (a scan's, a branch) is traced with a recorder of its own, whose statistics
leave the body as ordinary outputs, so that nothing is ever written from inside a trace.
"""

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp

from . import compat

Merge = Literal["min", "max", "sum", "once"]  # once: the value of a tap, which nothing joins


@functools.partial(jax.tree_util.register_dataclass, data_fields=["value"], meta_fields=["merge"])
@dataclasses.dataclass(frozen=True)
class Stat:
    """An array, and how it merges with the same statistic of another use, iteration or batch.

      Example:
    >>> import jax.numpy as jnp
    >>> from jopt.trace import Stat, merge
    >>> one, other = ({"x": Stat(jnp.float32(v), "max")} for v in (1, 3))
    >>> merge(one, other)["x"].value
    Array(3., dtype=float32)
    """

    value: jax.Array
    merge: Merge


@functools.partial(jax.tree_util.register_dataclass, data_fields=["stat"], meta_fields=["stacked"])
@dataclasses.dataclass(frozen=True)
class Record:
    """A statistic on its way out of nested bodies."""

    stat: Any  # a pytree of `Stat`
    stacked: tuple[bool, ...]  # for each enclosing scan, outermost first: one entry per iteration?


class Recorder:
    """What the rules have recorded while one body is traced; lives no longer than that."""

    def __init__(self) -> None:
        self.records: dict[str, Record] = {}

    def add(self, name: str, record: Record) -> None:
        """Adds a record, merging it with an earlier one of the same name."""
        if (old := self.records.get(name)) is not None:
            if old.stacked != record.stacked:
                raise ValueError(
                    f"`call.record({name!r}, ...)` was called for one leaf that a scan slices and "
                    "for one that it does not: their shapes differ. Give the two different names."
                )
            record = merged(name, old, record)
        self.records[name] = record

    def extend(self, records: dict[str, Record]) -> None:
        """Adds what a nested body recorded."""
        for name, record in records.items():
            self.add(name, record)

    def stats(self) -> dict[str, Any]:
        """The statistics by name."""
        return {name: record.stat for name, record in self.records.items()}


def merge(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Merges the statistics of two calls, such as of two batches; a name may be missing in either.

    Args:
      one: statistics by name, as `collect` returns them.
      other: likewise, of the same shapes.

    Returns:
      The statistics of both together.
    """
    both = dict(one)
    for name, stat in other.items():
        both[name] = _merge(name, both[name], stat) if name in both else stat
    return both


def merged(name: str, one: Record, other: Record) -> Record:
    """Two records of one name as one."""
    return Record(_merge(name, one.stat, other.stat), other.stacked)


def identity(records: dict[str, Record]) -> dict[str, Record]:
    """The records that change nothing when merged, of the shapes of `records`."""
    return jax.tree.map(
        lambda stat: Stat(_neutral(stat.value, stat.merge), stat.merge), records, is_leaf=_is_stat
    )


def _neutral(like: Any, how: Merge) -> jax.Array:
    if how in ("sum", "once"):
        value: Any = 0
    elif jnp.issubdtype(like.dtype, jnp.inexact):
        value = jnp.inf if how == "min" else -jnp.inf
    else:
        value = jnp.iinfo(like.dtype).max if how == "min" else jnp.iinfo(like.dtype).min
    return compat.constant(value, like)


def _merge(name: str, one: Any, other: Any) -> Any:
    if jax.tree.structure(one) != jax.tree.structure(other):
        raise ValueError(
            f"`call.record({name!r}, ...)` got two different kinds of statistic: "
            f"{jax.tree.structure(one)} and {jax.tree.structure(other)}."
        )
    return jax.tree.map(_merge_stat, one, other, is_leaf=_is_stat)


def _merge_stat(one: Stat, other: Stat) -> Stat:
    if one.value.shape != other.value.shape:
        raise ValueError(
            f"Two statistics to be merged by {one.merge} have shapes {one.value.shape} and "
            f"{other.value.shape}. A statistic keeps its shape from use to use and batch to batch."
        )
    if one.merge == "once":
        return one
    operation = {"min": jnp.minimum, "max": jnp.maximum, "sum": jnp.add}[one.merge]
    return Stat(operation(one.value, other.value), one.merge)


def _is_stat(value: Any) -> bool:
    return isinstance(value, Stat)
