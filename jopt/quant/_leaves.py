"""The typed leaves: a weight as integer codes, and a weight that trains under fake quantization.

Both stand for an array, and both may say how the other operand of their products is quantized, the
activation: on a range measured beforehand (static) or found in each call (dynamic).
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jopt import trees
from jopt.trace import Layered
from jopt.trace.layered import spread

from ._fake import on_grid, straight_through
from ._formats import Format, Grid


class Range(NamedTuple):
    """What values an activation takes, measured by `calibrate`.

    Both arrays have the rank of the weight that the activation meets: 1 along every axis, except
    leading axes over which layers are stacked.
    """

    low: jax.Array  # float32, at most 0
    high: jax.Array  # float32, at least 0


class WeightLeaf(Layered):
    """A leaf that the rules for products know: an array, and coarser ones beside it.

    Attributes:
      range: the activation's measured range, or None.
      activation: format of the activation, or None.
      static: whether the activation's range is a measured one.
    """

    range: Range | None
    activation: Format | None
    static: bool


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["codes", "scale", "zero_point", "range"],
    meta_fields=["format", "activation", "static", "value_dtype", "via"],
)
@dataclasses.dataclass(frozen=True)
class QArray(WeightLeaf):
    """A quantized weight: `(codes - zero_point) * scale`, made by `jopt.quant.quantize`.

    Use it inside `jopt.lift(apply)`. A product with an activation format runs on integers where the
    scale is shared along the contracted axes; without one the weight is dequantized first.
    """

    codes: jax.Array  # int4 (up to 4 bits) or int8, the shape of the value
    scale: jax.Array  # float32, rank of the value; n, 1 or the number of groups along each axis
    zero_point: jax.Array | None  # int8, the shape of scale; None is zero
    range: Range | None  # of the activation; None: dynamic, or not yet calibrated
    format: Format  # of the weight
    activation: Format | None  # of the activation; None: weight only
    static: bool  # the activation's range is a measured one
    value_dtype: Any  # of the array that this stands for
    via: tuple[Any, ...] = ()  # dtypes that a function has rounded its values to, in order

    def materialise(self) -> jax.Array:
        """The dequantized weight, bit for bit what `fake_quant` gave in training."""
        value = self.format.decode(self.codes, self.grid)
        for dtype in (*self.via, self.value_dtype):
            value = value.astype(dtype)
        return value

    @property
    def grid(self) -> Grid:
        """Scale and zero point."""
        return Grid(self.scale, self.zero_point)

    def split(self) -> tuple[jax.Array, Any]:
        """Codes; and grid and range."""
        return self.codes, (self.grid, self.range)

    def joined(self, array: jax.Array, coarse: Any) -> "QArray":
        """This leaf with other arrays."""
        grid, range = coarse
        return dataclasses.replace(
            self, codes=array, scale=grid.scale, zero_point=grid.zero_point, range=range
        )

    def storage(self) -> dict[str, tuple[Any, int]]:
        """The arrays to keep on disk, and the bits of one element, of which codes have few."""
        kept = super().storage()
        for name in ("codes", "zero_point"):
            if name in kept:
                kept[name] = (kept[name][0], self.format.bits)
        return kept

    def size(self) -> trees.Size:
        """Values, codes that differ from the zero point, and bits in all."""
        codes = np.asarray(self.codes).astype(np.int8)
        zero = np.int8(0)
        if self.zero_point is not None:
            zero = np.asarray(spread(self.zero_point, codes.shape))
        bits = sum(array.size * width for array, width in self.storage().values())
        return trees.Size(codes.size, int(np.count_nonzero(codes != zero)), bits)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["weight", "range"],
    meta_fields=["format", "axes", "activation", "static"],
)
@dataclasses.dataclass(frozen=True)
class FakeQuant(WeightLeaf):
    """A weight that trains while its values are rounded to a format, made by `jopt.quant.qat`.

    The gradient passes straight through to `weight`. Use it inside `jopt.lift(apply)`, which also
    rounds the activations that meet it.
    """

    weight: jax.Array  # what trains, in full precision
    range: Range | None  # of the activation; None: dynamic, or not yet calibrated
    format: Format  # of the weight
    axes: tuple[int, ...]  # that share a scale, counted from the end
    activation: Format | None  # of the activation; None: weight only
    static: bool  # the activation's range is a measured one

    def materialise(self) -> jax.Array:
        """`fake_quant` of the weight."""
        rounded = on_grid(jax.lax.stop_gradient(self.weight), self.format, self.axes)
        return straight_through(self.weight, rounded)

    def with_weight(self, weight: jax.Array) -> "FakeQuant":
        """This leaf with another weight."""
        return dataclasses.replace(self, weight=weight)

    @property
    def always_dense(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """True for weights alone: the materialised array is all there is."""
        return self.activation is None

    def split(self) -> tuple[jax.Array, Any]:
        """The rounded weight, and the range."""
        return self.materialise(), self.range

    def joined(self, array: jax.Array, coarse: Any) -> "DenseWeight":
        """The rounded weight seen otherwise, which no longer knows what its scales were."""
        return DenseWeight(array, coarse, self.activation, self.static, ())


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["value", "range"],
    meta_fields=["activation", "static", "observed"],
)
@dataclasses.dataclass(frozen=True)
class DenseWeight(WeightLeaf):
    """A dense weight that says what becomes of the activation it meets. Made by rules only."""

    value: jax.Array
    range: Range | None
    activation: Format | None
    static: bool
    observed: tuple[str, ...]  # record the activation's range under these names, leave it as it is

    def materialise(self) -> jax.Array:
        """The weight."""
        return jnp.asarray(self.value)

    def split(self) -> tuple[jax.Array, Any]:
        """The weight, and the range."""
        return self.value, self.range

    def joined(self, array: jax.Array, coarse: Any) -> "DenseWeight":
        """This leaf with other arrays."""
        return dataclasses.replace(self, value=array, range=coarse)
