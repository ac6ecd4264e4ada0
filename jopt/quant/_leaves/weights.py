"""The typed leaves: a weight as integer codes, and a weight that trains under fake quantization.

Both stand for an array, and both may say how the other operand of their products is quantized, the
activation: on a range measured beforehand (static) or found in each call (dynamic).
"""

import dataclasses
import functools
from typing import Any, ClassVar, NamedTuple, cast

import jax
import jax.numpy as jnp

from jopt import trees
from jopt.trace import Layered, Table
from jopt.trace.layered import spread

from .._formats.base import Format, Grid
from .._formats.bits import Bits
from .._training.fake import on_grid, straight_through


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
    data_fields=["codes", "scale", "zero_point", "table", "range"],
    meta_fields=["format", "activation", "static", "value_dtype", "via"],
)
@dataclasses.dataclass(frozen=True)
class QArray(WeightLeaf):
    """A quantized weight, made by `jopt.quant.quantize`: for `Int`, `(codes - zero_point) * scale`.

    Use it inside `jopt.lift(apply)`. A product with an activation format runs on integers where the
    scale is shared along the contracted axes; without one the weight is dequantized first.
    """

    codes: jax.Array  # of the format's container, such as int4 or float8, the shape of the value
    scale: jax.Array  # rank of the value; n, 1 or the number of groups along each axis
    zero_point: jax.Array | None  # int8, the shape of scale; None is zero
    table: Table | None  # what else the format fitted, such as code values; None for most
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
        """Scale, zero point and table."""
        return Grid(self.scale, self.zero_point, self.table)

    def split(self) -> tuple[jax.Array, Any]:
        """Codes; and grid and range."""
        return self.codes, (self.grid, self.range)

    def joined(self, array: jax.Array, coarse: Any) -> "QArray":
        """This leaf with other arrays."""
        grid, range = coarse
        return dataclasses.replace(self, codes=array, **grid._asdict(), range=range)

    def storage(self) -> dict[str, tuple[Any, int]]:
        """The arrays to keep on disk, and the bits of one element, of which codes have few."""
        kept = super().storage()
        for name in ("codes", "zero_point"):
            if name in kept:
                kept[name] = (kept[name][0], self.format.bits)
        return kept

    def size(self) -> trees.Size:
        """Values, codes that do not stand for zero, and bits in all."""
        bits = sum(array.size * width for array, width in self.storage().values())
        nonzeros = self.format.nonzeros(self.codes, self.grid)
        return trees.Size(self.codes.size, nonzeros, bits)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["weight", "range", "key", "keep", "bits"],
    meta_fields=["format", "axes", "activation", "static"],
)
@dataclasses.dataclass(frozen=True)
class FakeQuant(WeightLeaf):
    """A weight that trains while its values are rounded to a format, made by `jopt.quant.qat`.

    The gradient passes straight through to `weight`. Use it inside `jopt.lift(apply)`, which also
    rounds the activations that meet it. The last three fields are None in what an optimizer sees:
    `with_key`, `noise` and `with_bits` fill them in for one step.
    """

    weight: jax.Array  # what trains, in full precision
    range: Range | None  # of the activation; None: dynamic, or not yet calibrated
    format: Format  # of the weight
    axes: tuple[int, ...]  # that share a scale, counted from the end
    activation: Format | None  # of the activation; None: weight only
    static: bool  # the activation's range is a measured one
    key: jax.Array | None = None  # one for each matrix: 1 along the last two axes
    keep: jax.Array | None = None  # bool, like weight or coarser: True is not rounded
    bits: Bits | None = None  # in place of the format's

    trained: ClassVar[tuple[str, ...]] = ("weight",)  # fields that an optimizer may change

    def materialise(self) -> jax.Array:
        """`fake_quant` of the weight, but for what is to be kept."""
        if self.format.rounding == "stochastic" and self.key is None:
            raise ValueError(
                f"A weight in training has {self.format} and no key to round at random.\n"
                "Call `lift(apply)(quant.with_key(params, key), ...)` in the loss, with a new key "
                "in each step; `quant.deterministic(params)` rounds to nearest."
            )
        rounded = self.rounded()
        if self.keep is None:
            return rounded
        return jnp.where(spread(self.keep, rounded.shape), self.weight, rounded)

    def rounded(self) -> jax.Array:
        """The whole weight on its grid, with the derivative of this kind of training."""
        fixed = jax.lax.stop_gradient(self.weight)
        values = on_grid(fixed, self.format, self.axes, self.weight_key, self.bits)
        return straight_through(self.weight, values)

    @property
    def weight_key(self) -> jax.Array | None:
        """The key that rounds the weight, if its format rounds at random."""
        return self.key if self.format.rounding == "stochastic" else None

    def weight_grid(self) -> Grid:
        """Where the codes of the weight lie, as `quantize` stores it."""
        return self.format.fit(self.weight, self.axes)

    def activation_range(self) -> Range | None:
        """The activation's range, as `quantize` stores it."""
        return self.range

    def size(self) -> trees.Size:
        """Of the weight as it trains, rounded to nearest."""
        return super(FakeQuant, self.nearest()).size()

    def nearest(self) -> "FakeQuant":
        """This leaf, its weight rounded to nearest."""
        if self.format.rounding != "stochastic":
            return self
        format = dataclasses.replace(cast(Any, self.format), rounding="nearest")
        return dataclasses.replace(self, format=format)

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
        return DenseWeight(array, coarse, self.activation, self.static)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["value", "range"],
    meta_fields=["activation", "static"],
)
@dataclasses.dataclass(frozen=True)
class DenseWeight(WeightLeaf):
    """A dense weight that says what becomes of the activation it meets. Made by rules only."""

    value: jax.Array
    range: Range | None
    activation: Format | None
    static: bool

    def materialise(self) -> jax.Array:
        """The weight."""
        return jnp.asarray(self.value)

    def split(self) -> tuple[jax.Array, Any]:
        """The weight, and the range."""
        return self.value, self.range

    def joined(self, array: jax.Array, coarse: Any) -> "DenseWeight":
        """This leaf with other arrays."""
        return dataclasses.replace(self, value=array, range=coarse)
