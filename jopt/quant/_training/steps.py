"""How the steps of a uniform grid are learned: LSQ, LSQ+, PACT; and a range that stays fixed.

A method turns its trained arrays, a `Step`, into the ends of a range; the format's own grid covers
that range, in training as in what is stored afterwards, so both have the same values. Derivatives
are those of the papers, written as a linear function of value and step that is never evaluated.
"""

import abc
import dataclasses
import math
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jopt.trace.layered import spread

from .._formats.base import Format, Grid, Int
from .._formats.bits import Bits
from .._formats.layout import grouped
from .fake import clipped, on_this, straight_through

_TINY = float(np.finfo(np.float32).tiny)


class Step(NamedTuple):
    """What a learned grid trains."""

    size: jax.Array  # float32: the step of LSQ, the clip of PACT, the upper end of a fixed range
    offset: jax.Array | None  # float32 of the same shape: the lower end; None is zero or mirrored


class Moments(NamedTuple):
    """What the first values of an activation were, each float32 of the weight's rank."""

    magnitude: jax.Array  # mean |x|
    low: jax.Array  # at most 0
    high: jax.Array  # at least 0


class StepMethod(abc.ABC):
    """How the step of an `Int` format is found in training. Subclasses are frozen dataclasses."""

    trains: ClassVar[bool] = True

    @abc.abstractmethod
    def check(self, format: Int, name: str) -> str:
        """Why the method does not suit a format; empty if it does."""

    @abc.abstractmethod
    def first(self, moments: Moments, format: Int) -> Step:
        """The step to start from, given the values to come."""

    @abc.abstractmethod
    def ends(self, step: Step, format: Int) -> tuple[jax.Array, jax.Array]:
        """The lowest and the highest value of the grid."""

    @abc.abstractmethod
    def linear(self, x: jax.Array, y: jax.Array, step: Step, format: Int, count: int) -> jax.Array:
        """A function of `x` and `step` that has the method's derivatives; all of one rank."""

    def grid(self, step: Step, format: Int) -> Grid:
        """Where the format's codes lie."""
        return format.grid(*self.ends(step, format))


@dataclasses.dataclass(frozen=True)
class LSQ(StepMethod):
    """Learned step size: the step s trains with the weights, the codes n … p are the format's.

        q = round(clip(x / s, n, p)),    result q s
        d/dx = 1 inside, 0 beyond
        d/ds = q - x/s inside, n or p beyond;   times 1/√(N p)

    N is the number of weights that share the step; for an activation, the number of values that one
    product sums over, so that it does not depend on the batch. Steps start at 2 mean|x| / √p.
    Symmetric formats have the codes ±(2^(bits-1) - 1). The sign of s is ignored, and channels that
    are all zero start at 1. The grid takes s to 16 significant bits, so that storing it gives the
    same grid to the last bit.

    Args:
      signed: for formats that are not symmetric: the paper's codes for signed values,
        -2^(bits-1) … 2^(bits-1) - 1; False for those of values that are never negative, as after a
        ReLU, 0 … 2^bits - 1.
      gradient_scale: in place of 1/√(N p).

    Example:
      >>> import jax.numpy as jnp
      >>> from jopt.quant import LSQ, Int, Spec, qat
      >>> params = qat({"kernel": jnp.ones((4, 2))}, Spec(Int(4), weight_step=LSQ()))
      >>> params["kernel"].step.size.shape
      (1, 2)

    References:
      Steven K. Esser, Jeffrey L. McKinstry, Deepika Bablani, Rathinakumar Appuswamy, Dharmendra S.
      Modha, Learned step size quantization, 2019, arXiv:1902.08153.
    """

    signed: bool = True
    _: dataclasses.KW_ONLY
    gradient_scale: float | None = None

    def check(self, format: Int, name: str) -> str:
        """A symmetric format has negative codes."""
        if format.symmetric and not self.signed:
            return "a symmetric format has negative codes: take `Int(..., symmetric=False)`"
        return ""

    def first(self, moments: Moments, format: Int) -> Step:
        """2 mean|x| / √p."""
        size = moments.magnitude * np.float32(2 / math.sqrt(self._codes(format)[1]))
        return Step(_usable(size), None)

    def ends(self, step: Step, format: Int) -> tuple[jax.Array, jax.Array]:
        """n s and p s."""
        low, high = self._codes(format)
        size = _short(step.size)
        return low * size, high * size

    def grid(self, step: Step, format: Int) -> Grid:
        """Of signed codes zero is the zero point."""
        grid = super().grid(step, format)
        return grid._replace(zero_point=None) if self.signed else grid

    def linear(self, x: jax.Array, y: jax.Array, step: Step, format: Int, count: int) -> jax.Array:
        """The derivatives above."""
        low, high = self._codes(format)
        size = _positive(step.size)
        place = x / size
        slope = jnp.where(place <= low, low, jnp.where(place >= high, high, (y - x) / size))
        scale = _scale_of(self.gradient_scale, count, high)
        return clipped(x, (place > low) & (place < high)) + _constant(slope * scale) * size

    def _codes(self, format: Int) -> tuple[float, float]:
        if self.signed:
            return float(format.low), float(format.high)
        return 0.0, float(format.high - format.low)


@dataclasses.dataclass(frozen=True)
class LSQPlus(StepMethod):
    """LSQ with a learned offset b, for formats that are not symmetric; with codes 0 … p:

        q = round(clip((x - b) / s, 0, p)),    result q s + b
        d/dx = 1 inside, 0 beyond;   d/db = 0 inside, 1 beyond;   times 1/√(N p)
        d/ds = q - (x - b)/s inside, 0 below, p above;             times 1/√(N p)

    It suits activations that are a little negative, as swish leaves them. It starts from the
    smallest and largest value: b = min, s = (max - min) / p. For N see `LSQ`.

    Unlike the paper's, the offset takes effect in whole steps, and the range covers zero: so zero
    keeps a code of its own, and products run on integers.

    Args:
      gradient_scale: in place of 1/√(N p).

    References:
      Yash Bhalgat, Jinwon Lee, Markus Nagel, Tijmen Blankevoort, Nojun Kwak, LSQ+: Improving
      low-bit quantization through learnable offsets and better initialization, 2020,
      arXiv:2004.09576.
    """

    _: dataclasses.KW_ONLY
    gradient_scale: float | None = None

    def check(self, format: Int, name: str) -> str:
        """A symmetric format has no offset."""
        if format.symmetric:
            return "a symmetric format has no offset: take `Int(..., symmetric=False)`, or `LSQ()`"
        return ""

    def first(self, moments: Moments, format: Int) -> Step:
        """From the smallest and the largest value."""
        size = (moments.high - moments.low) * np.float32(1 / (format.high - format.low))
        return Step(_usable(size), moments.low)

    def ends(self, step: Step, format: Int) -> tuple[jax.Array, jax.Array]:
        """b and b + p s, and zero."""
        assert step.offset is not None
        high = step.offset + (format.high - format.low) * _short(step.size)
        return jnp.minimum(step.offset, 0.0), jnp.maximum(high, 0.0)

    def linear(self, x: jax.Array, y: jax.Array, step: Step, format: Int, count: int) -> jax.Array:
        """The derivatives above."""
        assert step.offset is not None
        size, top = _positive(step.size), float(format.high - format.low)
        place = (x - step.offset) / size
        slope = jnp.where(place <= 0, 0.0, jnp.where(place >= top, top, (y - x) / size))
        inside, scale = (place > 0) & (place < top), _scale_of(self.gradient_scale, count, top)
        offset = jnp.where(inside, 0.0, scale) * step.offset
        return clipped(x, inside) + _constant(slope * scale) * size + offset


@dataclasses.dataclass(frozen=True)
class PACT(StepMethod):
    """A learned clip a: values are cut at a, and the grid covers 0 … a (symmetric: -a … a).

        y = clip(x, 0, a) = (|x| - |x - a| + a) / 2,    rounded to the grid
        d/dx = 1 for 0 <= x < a, else 0;    d/da = 1 for x >= a, else 0

    (Symmetric: d/dx = 1 for |x| < a; d/da = sign(x) beyond.) The paper decays the clip; with optax
    that is `optax.masked(optax.add_decayed_weights(rate), quant.steps(params))`, ahead in the
    chain. A clip that is common to a tensor gets a gradient from each value beyond it.

    Args:
      clip: where to start; None starts from the largest value.

    References:
      Jungwook Choi, Zhuo Wang, Swagath Venkataramani, Pierce I-Jen Chuang, Vijayalakshmi
      Srinivasan, Kailash Gopalakrishnan, PACT: Parameterized clipping activation for quantized
      neural networks, 2018, arXiv:1805.06085.
    """

    clip: float | None = None

    def __post_init__(self) -> None:
        """Checks the arguments."""
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"`PACT(clip={self.clip})`: the clip must be positive, or None.")

    def check(self, format: Int, name: str) -> str:
        """Weights have both signs."""
        if name == "weight" and not format.symmetric:
            return "of a format that is not symmetric PACT keeps no negative weights"
        return ""

    def first(self, moments: Moments, format: Int) -> Step:
        """The largest value, or the clip given."""
        largest = jnp.maximum(moments.high, -moments.low) if format.symmetric else moments.high
        size = largest if self.clip is None else jnp.full_like(largest, self.clip)
        return Step(_usable(size), None)

    def ends(self, step: Step, format: Int) -> tuple[jax.Array, jax.Array]:
        """0, or -a, and a."""
        size = _positive(step.size)
        return (-size if format.symmetric else jnp.zeros_like(size)), size

    def linear(self, x: jax.Array, y: jax.Array, step: Step, format: Int, count: int) -> jax.Array:
        """The derivatives above."""
        size = _positive(step.size)
        above = (x >= size).astype(jnp.float32)
        if format.symmetric:
            above = above - (x <= -size).astype(jnp.float32)
            inside = jnp.abs(x) < size
        else:
            inside = (x >= 0) & (x < size)
        return clipped(x, inside) + _constant(above) * size


@dataclasses.dataclass(frozen=True)
class Fixed(StepMethod):
    """The range that the weights have when `qat` is called, for good; nothing is learned.

    Weights that leave it are clipped, and their gradient is 0: the straight-through estimator with
    the clip's derivative.

        d/dx = 1 where the code needs no clipping, else 0

    Args:
      ratio: of the extreme values, below 1 to clip some from the start.

    References:
      Yoshua Bengio, Nicholas Léonard, Aaron Courville, Estimating or propagating gradients through
      stochastic neurons for conditional computation, 2013, arXiv:1308.3432.
    """

    trains: ClassVar[bool] = False
    ratio: float = 1.0

    def __post_init__(self) -> None:
        """Checks the arguments."""
        if not 0 < self.ratio <= 1:
            raise ValueError(f"`Fixed(ratio={self.ratio})`: the ratio is above 0 and at most 1.")

    def check(self, format: Int, name: str) -> str:
        """For activations there are static ranges."""
        if name == "activation":
            return "for an activation that is `Spec(..., static=True)` and `calibrate`"
        return ""

    def first(self, moments: Moments, format: Int) -> Step:
        """The extreme values."""
        return Step(moments.high * np.float32(self.ratio), moments.low * np.float32(self.ratio))

    def ends(self, step: Step, format: Int) -> tuple[jax.Array, jax.Array]:
        """As they were."""
        assert step.offset is not None
        return jax.lax.stop_gradient((step.offset, step.size))

    def linear(self, x: jax.Array, y: jax.Array, step: Step, format: Int, count: int) -> jax.Array:
        """The derivative above."""
        return clipped(x, format.inside(x, self.grid(step, format)))


def moments_of(x: jax.Array, format: Format, axes: tuple[int, ...]) -> Moments:
    """What a weight's values are, over the axes that share a scale (of each group)."""
    x = x.astype(jnp.float32)
    low, high = format.extent(x, axes)
    within: tuple[int, ...] = axes
    if format.granularity == "group":
        assert format.group_size is not None
        x, within = grouped(x, axes, format.group_size)
    magnitude = jnp.mean(jnp.abs(x), axis=within, keepdims=format.granularity != "group")
    return Moments(jnp.where(jnp.isfinite(high - low), magnitude, jnp.nan), low, high)


def stepped(
    x: jax.Array,
    format: Int,
    method: StepMethod,
    step: Step,
    count: int,
    *,
    key: jax.Array | None = None,
    bits: Bits | None = None,
) -> jax.Array:
    """`x` on the grid of a learned step, with the method's derivatives; NaN stays NaN.

    Args:
      x: floating.
      format: of `x`.
      method: how the step is learned.
      step: arrays of the rank of `x`; n, 1 or the number of groups along each axis.
      count: how many values share a step, for the gradient's scale.
      key: keys of shape 1 along the last two axes, for formats that round stochastically.
      bits: in place of the format's own.
    """
    fixed, coarse = jax.lax.stop_gradient((x, step))
    if bits is None:
        values = on_this(fixed, format, method.grid(coarse, format), key)
    else:
        values = bits.rounded(fixed, format, *method.ends(coarse, format), key)
    values = jnp.where(jnp.isnan(fixed), jnp.nan, values).astype(x.dtype)
    wide = x.astype(jnp.float32)
    own = jax.tree.map(lambda array: spread(array, x.shape), step)
    linear = method.linear(wide, values.astype(jnp.float32), own, format, count)
    return straight_through(linear.astype(x.dtype), values)


# Helpers, in order of use.


def _usable(size: jax.Array) -> jax.Array:
    """1 where there was nothing but zeros; NaN where values are not finite, so that it shows."""
    return jnp.where(jnp.isfinite(size), jnp.where(size > 0, size, 1.0), jnp.nan)


def _positive(size: jax.Array) -> jax.Array:
    return jnp.maximum(jnp.abs(size), _TINY)


def _short(size: jax.Array) -> jax.Array:
    """A positive step of 16 significant bits.

    Its multiples up to 255 are exact then, so that ends computed from them are the same whether or
    not a compiler rounds a product before the sum that follows.
    """
    bits = jax.lax.bitcast_convert_type(_positive(size), jnp.uint32)
    nearest = (bits + np.uint32(0x80)) & np.uint32(0xFFFFFF00)
    return jax.lax.bitcast_convert_type(nearest, jnp.float32)


def _scale_of(given: float | None, count: int, highest: float) -> float:
    return 1 / math.sqrt(max(count, 1) * highest) if given is None else given


def _constant(x: jax.Array) -> jax.Array:
    return jax.lax.stop_gradient(x)
