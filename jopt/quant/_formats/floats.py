"""Formats whose codes are small floats: FP8 with a float scale, and the OCP's MX blocks."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from jopt.trace.layered import spread

from .base import (
    Format,
    Granularity,
    Grid,
    Rounding,
    check_key,
    check_sharing,
    mirrored,
    one_of,
    scale_of,
)


class Float(NamedTuple):
    """A float of few bits, held in `dtype`; an integer of so many halvings if `dtype` is one."""

    dtype: Any
    bits: int
    mantissa: int  # bits after the point
    smallest: int  # exponent of the smallest normal value
    largest: int  # exponent of the largest value
    top: float  # the largest value


# XLA:CPU of jaxlib 0.10.2 and 0.12 converts, slices, concatenates and scans all four as it should,
# and packs float4 to half a byte.
E4M3 = Float(jnp.float8_e4m3fn, 8, 3, -6, 8, 448.0)
E5M2 = Float(jnp.float8_e5m2, 8, 2, -14, 15, 57344.0)
E2M1 = Float(jnp.float4_e2m1fn, 4, 1, 0, 2, 6.0)
INT8 = Float(jnp.int8, 8, 6, 0, 0, 127 / 64)  # two's complement, six bits after the point

Kind = Literal["e4m3", "e5m2"]
_KINDS: dict[str, Float] = {"e4m3": E4M3, "e5m2": E5M2}
MXKind = Literal["mxfp8", "mxfp8_e5m2", "mxfp4", "mxint8"]
_ELEMENTS: dict[str, Float] = {"mxfp8": E4M3, "mxfp8_e5m2": E5M2, "mxfp4": E2M1, "mxint8": INT8}


@dataclasses.dataclass(frozen=True)
class FP8(Format):
    """Floats of 8 bits, with a scale that maps the largest magnitude to the largest float.

        scale = max|x| / top,   code = float8(x / scale),   top = 448 (e4m3) or 57344 (e5m2)

    e4m3 has 3 bits of mantissa, so that |x - x̂| <= |x| / 16 down to 2^-6 scale; e5m2 has 2 bits and
    |x| / 8 down to 2^-14 scale. Below, steps are even: 2^-9 and 2^-16 scale. Rounds to nearest,
    ties to even, and saturates: neither infinity nor NaN arises from finite values. What is all
    zero stays so; what shares a scale with an infinity or a NaN becomes NaN.

    Args:
      kind: `"e4m3"` for weights and activations, `"e5m2"` for gradients.
      granularity: what shares a scale, as in `Int`.
      group_size: for `"group"`.
      rounding: `"nearest"` or `"stochastic"` (needs a key, and then the mean is exact).

    Raises:
      ValueError: if an argument is out of its range.

    Example:
      >>> import jax.numpy as jnp
      >>> from jopt.quant import FP8, fake_quant
      >>> fake_quant(jnp.array([[448.0], [17.2]]), FP8("e4m3")).tolist()
      [[448.0], [18.0]]

    References:
      Paulius Micikevicius et al., FP8 formats for deep learning, 2022, arXiv:2209.05433.
    """

    kind: Kind = "e4m3"
    _: dataclasses.KW_ONLY
    granularity: Granularity = "channel"
    group_size: int | None = None
    rounding: Rounding = "nearest"
    bits: int = dataclasses.field(default=8, init=False, repr=False)

    def __post_init__(self) -> None:
        """Checks the arguments."""
        one_of("FP8(", "kind", self.kind, get_args(Kind))
        call = f'FP8("{self.kind}"'
        check_sharing(call, self)
        one_of(call, "rounding", self.rounding, ("nearest", "stochastic"))

    @property
    def element(self) -> Float:
        """The float."""
        return _KINDS[self.kind]

    @property
    def container(self) -> Any:
        """float8_e4m3fn or float8_e5m2."""
        return self.element.dtype

    def extent(self, x: jax.Array, axes: Sequence[int]) -> tuple[jax.Array, jax.Array]:
        """Plus and minus the largest magnitude over `axes` (of each group)."""
        return mirrored(self, x, axes)

    def grid(self, low: jax.Array, high: jax.Array) -> Grid:
        """The grid whose largest float is the larger of `-low` and `high`."""
        return Grid(scale_of(jnp.maximum(-low, high), 1.0 / self.element.top), None)

    def encode(self, x: jax.Array, grid: Grid, *, key: jax.Array | None = None) -> jax.Array:
        """The floats nearest to `x / scale`, as float32; `key` rounds stochastically."""
        check_key(self, key)
        return rounded(_over(x, grid), self.element, key)

    def inside(self, x: jax.Array, grid: Grid) -> jax.Array:
        """Where `x` is beyond the largest float by half a step at most."""
        return jnp.abs(_over(x, grid)) <= _reach(self.element)

    def decode(self, codes: jax.Array, grid: Grid) -> jax.Array:
        """`codes * scale` in float32."""
        return codes.astype(jnp.float32) * spread(grid.scale, codes.shape)


@dataclasses.dataclass(frozen=True)
class MX(Format):
    """Microscaling blocks: 32 small numbers that share a power of two.

        scale = 2^(⌊log₂ max|x|⌋ - e),   code = element(x / scale)

    e is the exponent of the element's largest value: 8 for `"mxfp8"` (e4m3 elements), 15 for
    `"mxfp8_e5m2"`, 2 for `"mxfp4"` (e2m1: 0, ½, 1, 1½, 2, 3, 4, 6), 0 for `"mxint8"` (steps of
    1/64). Blocks lie along the inputs of one output channel. Elements are rounded to nearest, ties
    to even, and saturate: since the scale is rounded down, the largest of a block may be cut, in
    mxfp4 from just under 8 to 6. Scales are held as float8_e8m0fnu, 8 bits in memory and on disk. A
    block that is all zero stays so; one that holds an infinity or a NaN has the scale NaN.

    Departures from the specification: scales are at least 2^-126, a normal float32; the code -128
    of mxint8 is not used, as it allows.

    Args:
      kind: `"mxfp8"`, `"mxfp8_e5m2"`, `"mxfp4"` or `"mxint8"`.

    Raises:
      ValueError: if the kind is unknown.

    Example:
      >>> import jax.numpy as jnp
      >>> from jopt.quant import MX, quantize
      >>> quantize({"w": jnp.ones((64, 2))}, MX("mxfp4"))["w"].scale.shape
      (2, 2)

    References:
      Open Compute Project, OCP microscaling formats (MX) specification, version 1.0, 2023. Bita
      Darvish Rouhani et al., Microscaling data formats for deep learning, 2023, arXiv:2310.10537.
    """

    kind: MXKind = "mxfp8"
    group_size: int | None = dataclasses.field(default=32, init=False, repr=False)
    granularity: Granularity = dataclasses.field(default="group", init=False, repr=False)
    rounding: Rounding = dataclasses.field(default="nearest", init=False, repr=False)
    bits: int = dataclasses.field(default=8, init=False, repr=False)

    def __post_init__(self) -> None:
        """Checks the kind."""
        one_of("MX(", "kind", self.kind, get_args(MXKind))
        object.__setattr__(self, "bits", self.element.bits)

    @property
    def element(self) -> Float:
        """The number that a block has 32 of."""
        return _ELEMENTS[self.kind]

    @property
    def container(self) -> Any:
        """float8_e4m3fn, float8_e5m2, float4_e2m1fn or int8."""
        return self.element.dtype

    def extent(self, x: jax.Array, axes: Sequence[int]) -> tuple[jax.Array, jax.Array]:
        """Plus and minus the largest magnitude of each block."""
        return mirrored(self, x, axes)

    def grid(self, low: jax.Array, high: jax.Array) -> Grid:
        """The grid of the larger of `-low` and `high`."""
        top = jnp.maximum(-low, high)
        return Grid(power_scale(exponent(top) - self.element.largest, jnp.isfinite(top)), None)

    def encode(self, x: jax.Array, grid: Grid, *, key: jax.Array | None = None) -> jax.Array:
        """The elements nearest to `x / scale`: floats as float32, integers as int32."""
        values = rounded(over_power(x, grid.scale), self.element, key)
        if self.element is not INT8:
            return values
        return (values * np.float32(2**INT8.mantissa)).astype(jnp.int32)

    def inside(self, x: jax.Array, grid: Grid) -> jax.Array:
        """Where `x` is beyond the largest element by half a step at most."""
        return jnp.abs(over_power(x, grid.scale)) <= _reach(self.element)

    def decode(self, codes: jax.Array, grid: Grid) -> jax.Array:
        """`element * scale` in float32."""
        values = codes.astype(jnp.float32)
        if self.element is INT8:
            # By the exponent's bits: XLA may take a factor to the scale, which has no such number
            # where weights are near the smallest.
            bits = jax.lax.bitcast_convert_type(values, jnp.int32) - (INT8.mantissa << 23)
            values = jnp.where(codes == 0, 0.0, jax.lax.bitcast_convert_type(bits, jnp.float32))
        return values * spread(grid.scale.astype(jnp.float32), codes.shape)


def rounded(x: jax.Array, element: Float, key: jax.Array | None = None) -> jax.Array:
    """Float32 values rounded to those of a small float, ends included; `key` rounds at random.

    Everything but the rounding itself is exact, being products with powers of two, so all backends
    agree; a conversion by XLA would round twice from wider types and overflow instead of saturate.
    """
    place = jnp.maximum(exponent(x), element.smallest) - element.mantissa
    place = jnp.clip(place, -126, element.largest)
    steps = x * power(-place)
    if key is None:
        steps = jnp.round(steps)
    else:
        under = jnp.floor(steps)
        up = jax.random.uniform(key, steps.shape) < steps - under
        steps = under + up.astype(jnp.float32)
    value = jnp.clip(steps * power(place), -element.top, element.top)
    return jnp.where(value == 0, 0.0, value)  # zero has one sign


def exponent(x: jax.Array) -> jax.Array:
    """⌊log₂|x|⌋ as int32, from the bits: -127 below the normal floats, 128 of infinity and NaN."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    return ((bits >> 23) & 255) - 127


def power(exponents: jax.Array) -> jax.Array:
    """2^e as float32, for e from -126 to 127."""
    return jax.lax.bitcast_convert_type((exponents + 127) << 23, jnp.float32)


def to_one(x: jax.Array) -> jax.Array:
    """Powers of two that bring magnitudes near 1, so that squares neither vanish nor overflow."""
    return power(-jnp.clip(exponent(x.astype(jnp.float32)), -126, 126))


def power_scale(exponents: jax.Array, finite: jax.Array) -> jax.Array:
    """2^e in float8_e8m0fnu, at least 2^-126; NaN, whose code is 255, where not `finite`."""
    codes = jnp.where(finite, jnp.clip(exponents, -126, 127) + 127, 255)
    return jax.lax.bitcast_convert_type(codes.astype(jnp.uint8), jnp.float8_e8m0fnu)


def over_power(x: jax.Array, scale: jax.Array) -> jax.Array:
    """`x / scale` for scales in float8_e8m0fnu, exactly; where the scale is NaN, any number.

    In two halves, since the reciprocal of 2^127 is no normal float32; and XLA makes a product with
    the reciprocal of a division.
    """
    places = jax.lax.bitcast_convert_type(scale, jnp.uint8).astype(jnp.int32) - 127
    half = places >> 1
    first, second = spread(power(-half), x.shape), spread(power(half - places), x.shape)
    return x.astype(jnp.float32) * first * second


# Helpers, in order of use.


def _over(x: jax.Array, grid: Grid) -> jax.Array:
    return x.astype(jnp.float32) * spread(1.0 / grid.scale, x.shape)


def _reach(element: Float) -> float:
    return element.top + math.ldexp(0.5, element.largest - element.mantissa)
