"""The `dot_general` of an activation and a quantized weight: dense, in bfloat16, on integers."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jopt.trace.layered import full_along, shared_along

from .._formats.base import Grid, Int
from .._leaves.weights import QArray, WeightLeaf
from .operands import Operands, flattened, is_spread


class Axes(NamedTuple):
    """The axes of one operand of a `dot_general`."""

    contract: tuple[int, ...]
    batch: tuple[int, ...]
    free: tuple[int, ...]


def axes(contract: Sequence[int], batch: Sequence[int], ndim: int) -> Axes:
    """The axes of an operand of rank `ndim`."""
    free = tuple(a for a in range(ndim) if a not in contract and a not in batch)
    return Axes(tuple(contract), tuple(batch), free)


@dataclasses.dataclass(frozen=True)
class Dot:
    """A `dot_general` of an activation and a weight, as a value: equal ones share their traces."""

    params: tuple[tuple[str, Any], ...]
    side: int  # 0: the weight is on the left
    weight: Axes
    other: Axes
    dtype: Any

    @property
    def contract(self) -> Sequence[int] | None:
        """The axes of the weight that are summed over."""
        return self.weight.contract

    def summed(self, ndim: int) -> tuple[int, ...]:
        """The axes of the activation that share a scale where tokens have one."""
        del ndim
        return self.other.contract

    def place(self, coarse: jax.Array) -> jax.Array | None:
        """Lays an array of the weight's rank onto the activation; only batch axes may differ."""
        if not shared_along(coarse, self.weight.contract + self.weight.free):
            return None
        order = self.other.batch + self.other.contract + self.other.free
        moved = jnp.transpose(coarse, self.weight.batch + self.weight.contract + self.weight.free)
        batch = len(self.weight.batch)
        moved = moved.reshape(moved.shape[:batch] + (1,) * (len(order) - batch))
        return jnp.transpose(moved, [order.index(axis) for axis in range(len(order))])

    def dense(self, x: jax.Array, w: jax.Array) -> jax.Array:
        """The product of arrays."""
        return jax.lax.dot_general_p.bind(*self._sides(x, w), **dict(self.params))

    def bfloat16(self, x: jax.Array, leaf: QArray) -> jax.Array:
        """Both operands in bfloat16, sums in float32; integers exactly, their scales afterwards."""
        x = x.astype(jnp.bfloat16)
        if not isinstance(leaf.format, Int) or not shared_along(leaf.scale, self.weight.contract):
            return self._summed(x, leaf.materialise().astype(jnp.bfloat16), jnp.float32)
        codes = leaf.codes.astype(jnp.bfloat16)
        if leaf.zero_point is not None:
            codes = codes - _whole(leaf.zero_point, codes.shape).astype(jnp.bfloat16)
        return self._summed(x, codes, jnp.float32) * self._on_result(leaf.scale, leaf)

    def integers(self, codes: jax.Array, grid: Grid, leaf: QArray) -> jax.Array:
        """Codes times codes into int32, scales afterwards, on any axes."""
        w = leaf.codes.astype(jnp.int8)  # an int4 operand has no kernel on any backend

        def on_x(coarse: jax.Array) -> jax.Array:
            return _onto_result(coarse, self.other, self.weight, 1 - self.side)

        total = self._summed(codes, w, jnp.int32)
        # (q_x - z_x)(q_w - z_w), multiplied out; int32 wraps, so only the result must fit.
        if grid.zero_point is not None:
            sums = jnp.sum(w, self.weight.contract, jnp.int32, keepdims=True)
            zero = on_x(grid.zero_point.astype(jnp.int32))
            total = total - zero * self._on_result(sums, leaf)
        if leaf.zero_point is not None:
            shifted = codes.astype(jnp.int32)
            if grid.zero_point is not None:
                shifted = shifted - grid.zero_point.astype(jnp.int32)
            sums = jnp.sum(shifted, self.other.contract, jnp.int32, keepdims=True)
            zero = self._on_result(leaf.zero_point.astype(jnp.int32), leaf)
            total = total - on_x(sums) * zero
        return total.astype(jnp.float32) * (on_x(grid.scale) * self._on_result(leaf.scale, leaf))

    def float8(self, codes: jax.Array, grid: Grid, leaf: QArray) -> jax.Array:
        """Both operands as float8, sums in float32, scales afterwards."""
        scale = _onto_result(grid.scale, self.other, self.weight, 1 - self.side)
        total = self._summed(codes, leaf.codes, jnp.float32)
        return total * (scale * self._on_result(leaf.scale, leaf))

    # The same as a product of matrices.

    def shape(self, x: Any, leaf: WeightLeaf) -> tuple[int | None, int, int] | None:
        """Rows, inputs and outputs; None where there are batches of matrices."""
        if self.weight.batch:
            return None
        shape = leaf.split()[0].shape
        rows = [x.shape[axis] for axis in self.other.free]
        return (
            math.prod(rows) if all(isinstance(size, int) for size in rows) else None,
            math.prod(shape[axis] for axis in self.weight.contract),
            math.prod(shape[axis] for axis in self.weight.free),
        )

    def matrices(self, x: jax.Array, grid: Grid | None, leaf: QArray) -> Operands | None:
        """The operands as matrices; None where the weight's codes would have to move for it."""
        flat = None if self.weight.batch else flattened(leaf, self.weight.contract)
        if flat is None or is_spread(x) or is_spread(leaf.codes):
            return None
        pairs = sorted(zip(self.weight.contract, self.other.contract, strict=True))
        order = (*self.other.free, *(axis for _, axis in pairs))

        def flat_x(array: jax.Array) -> jax.Array:
            moved = jnp.transpose(array, order)
            rows = math.prod(moved.shape[: len(self.other.free)])
            return moved.reshape(rows, math.prod(moved.shape[len(self.other.free) :]))

        grid = None if grid is None else jax.tree.map(flat_x, grid)
        return Operands(flat_x(x), grid, *flat, dict(self.params)["precision"], self.dtype)

    def unflattened(self, y: jax.Array, x: Any, leaf: WeightLeaf) -> jax.Array:
        """The product's result from `[rows, outputs]`."""
        shape = leaf.split()[0].shape
        rows = tuple(x.shape[axis] for axis in self.other.free)
        outputs = tuple(shape[axis] for axis in self.weight.free)
        return y.T.reshape(outputs + rows) if self.side == 0 else y.reshape(rows + outputs)

    # Helpers.

    def _sides(self, x: jax.Array, w: jax.Array) -> tuple[jax.Array, jax.Array]:
        return (w, x) if self.side == 0 else (x, w)

    def _summed(self, x: jax.Array, w: jax.Array, dtype: Any) -> jax.Array:
        params = dict(self.params)
        return jax.lax.dot_general(
            *self._sides(x, w),
            params["dimension_numbers"],
            preferred_element_type=dtype,
            out_sharding=params.get("out_sharding"),
        )

    def _on_result(self, coarse: jax.Array, leaf: QArray) -> jax.Array:
        """Lays an array like the weight's grid, shared along the inputs, onto the result."""
        return _onto_result(_whole(coarse, leaf.codes.shape), self.weight, self.other, self.side)


# Helpers, in order of use.


def _whole(coarse: jax.Array, shape: Sequence[int]) -> jax.Array:
    """A coarse array whose every axis has length 1 or the value's."""
    return full_along(coarse, shape, [a for a, n in enumerate(coarse.shape) if n != 1])


def _onto_result(coarse: jax.Array, axes: Axes, other: Axes, side: int) -> jax.Array:
    """Lays an array of an operand's rank, 1 along contracted axes, onto the product's result."""
    moved = jnp.transpose(coarse, axes.batch + axes.free + axes.contract)
    sizes, batch = moved.shape[: len(axes.batch) + len(axes.free)], len(axes.batch)
    ones = (1,) * len(other.free)
    if side == 0:
        return moved.reshape(sizes + ones)
    return moved.reshape(sizes[:batch] + ones + sizes[batch:])
