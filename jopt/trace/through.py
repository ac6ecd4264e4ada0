"""Operations that change no value and so act on a leaf's arrays: names, copies, placement.

They are the same for every type of leaf. A rule registered for a type goes first.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from . import compat
from .frame import Frame, Tracked
from .leaf import aval_of
from .rules import structure
from .walk import dense


@structure(*compat.MARKS)
def _mark(frame: Frame, equation: Any, operands: Sequence[Any]) -> list[Any]:
    """A checkpoint name, a copy, `pvary`: one operand, whose every array gets the same."""
    return [jax.tree.map(lambda array: compat.bind(equation, [array])[0], operands[0])]


@structure(compat.STOP_GRADIENT)
def _stop_gradient(frame: Frame, equation: Any, operands: Sequence[Any]) -> list[Any]:
    return [jax.lax.stop_gradient(operands[0])]


@structure(compat.BARRIER)
def _barrier(frame: Frame, equation: Any, operands: Sequence[Any]) -> list[Any]:
    return list(jax.lax.optimization_barrier(tuple(operands)))


@structure(compat.SHARDING_CONSTRAINT)
def _constraint(frame: Frame, equation: Any, operands: Sequence[Any]) -> list[Any]:
    sharding = equation.params["sharding"]
    if not isinstance(sharding, NamedSharding):
        return dense(frame, equation, operands)
    place = placement(operands[0], sharding)

    def constrained(array: Any) -> Any:
        own = place(array)
        return array if own is None else jax.lax.with_sharding_constraint(array, own)

    return [jax.tree.map(constrained, operands[0])]


def placement(tracked: Tracked, sharding: NamedSharding) -> Callable[[Any], NamedSharding | None]:
    """How each of a leaf's arrays is placed, given how the array is that it stands for.

    An array follows the value along the axes that both have and is whole where its own is of
    length 1, as a scale common to all entries is. Of an array laid out differently nothing is said:
    None.
    """
    shape = aval_of(tracked.leaf).shape
    spec = (*sharding.spec, *[None] * (len(shape) - len(sharding.spec)))

    def place(array: Any) -> NamedSharding | None:
        sizes = array.shape
        if len(sizes) != len(shape) or any(
            n not in (1, m) for n, m in zip(sizes, shape, strict=True)
        ):
            return None
        pairs = zip(spec, sizes, shape, strict=True)
        own = (axis if size == full else None for axis, size, full in pairs)
        return NamedSharding(sharding.mesh, PartitionSpec(*own))

    return place
