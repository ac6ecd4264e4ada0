"""A product of quantized operands as one of matrices, and what its scales are along either axis."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from jopt.trace.layered import coarse_map, full_along

from .._formats.base import Grid
from .._leaves.weights import QArray


class Operands(NamedTuple):
    """A product as one of matrices."""

    x: jax.Array  # [rows, inputs]: values, or codes if there is a grid
    grid: Grid | None  # of x: [rows or 1, 1]
    leaf: QArray  # the weight
    turned: bool  # the weight is [outputs, inputs], else [inputs, outputs]
    precision: Any  # of a float product
    dtype: Any  # of its result


def flattened(leaf: QArray, contract: Sequence[int]) -> tuple[QArray, bool] | None:
    """The weight as a matrix and whether that is turned; None where that would move its codes."""
    shape = leaf.codes.shape
    first, axes = len(shape) - len(contract), sorted(contract)
    if axes == list(range(len(contract))):
        cut, turned = len(contract), False
    elif axes == list(range(first, len(shape))):
        cut, turned = first, True
    else:
        return None

    def flat(coarse: jax.Array) -> jax.Array:
        blocks = (range(cut), range(cut, len(shape)))
        for block in blocks:
            if not _merges([coarse.shape[a] for a in block], [shape[a] for a in block]):
                coarse = full_along(coarse, shape, block)
        return coarse.reshape([math.prod(coarse.shape[a] for a in block) for block in blocks])

    codes, coarse = leaf.split()
    codes = codes.reshape(math.prod(shape[:cut]), math.prod(shape[cut:]))
    return leaf.joined(codes, coarse_map(flat, coarse)), turned  # pyright: ignore[reportReturnType]


def _merges(coarse: list[int], sizes: list[int]) -> bool:
    """Whether axes of a coarse array become one axis, of equal groups, by a reshape."""
    whole = 0
    while whole < len(sizes) and coarse[whole] == sizes[whole]:
        whole += 1
    return all(size == 1 for size in coarse[whole + 1 :])


def group_count(o: Operands) -> int:
    """Into how many groups of one scale the inputs fall; 0 where they fall into none."""
    axis = 1 if o.turned else 0
    counts = {c.shape[axis] for c in jax.tree.leaves(tuple(o.leaf.grid))} - {1}
    return 1 if not counts else counts.pop() if len(counts) == 1 else 0


def as_row(coarse: jax.Array, o: Operands) -> jax.Array:
    """A coarse array that is shared along the inputs, as [1, outputs or 1]."""
    coarse = per_output(coarse, o)
    return coarse.T if o.turned else coarse


def per_output(coarse: jax.Array, o: Operands) -> jax.Array:
    """A coarse array with one entry for each output, or one for all."""
    shape = o.leaf.codes.shape
    return full_along(coarse, shape, in_groups(coarse, shape, [0 if o.turned else 1]))


def in_groups(coarse: jax.Array, shape: Sequence[int], axes: Sequence[int]) -> list[int]:
    """Those of `axes` along which `coarse` has groups."""
    return [axis for axis in axes if coarse.shape[axis] not in (1, shape[axis])]
