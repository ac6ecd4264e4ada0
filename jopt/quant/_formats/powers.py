"""Powers of two: a sign and an exponent, so that a product is a shift."""

import dataclasses
from collections.abc import Sequence
from typing import Any

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
)
from .floats import exponent, over_power, power, power_scale


@dataclasses.dataclass(frozen=True)
class PowerOfTwo(Format):
    """Zero and signed powers of two: 2^bits - 1 values.

        ŵ ∈ {0, ±s, ±s/2, … ±s/2^(n-1)},   n = 2^(bits-1) - 1,   s = 2^⌊log₂(4/3 max|w|)⌋

    The code's magnitude counts from the smallest power, 1, to the largest, n; zero has the code 0.
    Rounded to the nearest in value, not in exponent: from 1.5 · 2^e on the nearest is 2^(e+1), and
    of two as near the larger in magnitude is taken. So the error is at most a third of |w|, or half
    the smallest power near zero, and the largest weight is at most cut by a third: s is the power
    that it rounds to. Scales are powers of two themselves, held in 8 bits (float8_e8m0fnu) and at
    least 2^-126; what is smaller than a normal float32 becomes zero. What is all zero stays so;
    what shares a scale with an infinity or a NaN becomes NaN.

    Args:
      bits: 2 to 8; 2 bits are the ternary -s, 0, s, and more than 5 reach beyond what matters.
      granularity: what shares a scale, as in `Int`.
      group_size: for `"group"`.
      rounding: `"nearest"` or `"stochastic"` (needs a key; the mean is exact up to s).

    Raises:
      ValueError: if an argument is out of its range.

    Example:
      >>> import jax.numpy as jnp
      >>> from jopt.quant import PowerOfTwo, fake_quant
      >>> fake_quant(jnp.array([[1.0], [0.7], [0.3], [0.1]]), PowerOfTwo(3)).ravel().tolist()
      [1.0, 0.5, 0.25, 0.0]

    References:
      Aojun Zhou, Anbang Yao, Yiwen Guo, Lin Xu, Yurong Chen, Incremental network quantization:
      towards lossless CNNs with low-precision weights, 2017, arXiv:1702.03044.
    """

    bits: int = 4
    _: dataclasses.KW_ONLY
    granularity: Granularity = "channel"
    group_size: int | None = None
    rounding: Rounding = "nearest"

    def __post_init__(self) -> None:
        """Checks the arguments."""
        if isinstance(self.bits, bool) or not isinstance(self.bits, int) or not 2 <= self.bits <= 8:
            raise ValueError(f"`PowerOfTwo({self.bits!r})`: bits must be an integer from 2 to 8.")
        call = f"PowerOfTwo({self.bits}"
        check_sharing(call, self)
        one_of(call, "rounding", self.rounding, ("nearest", "stochastic"))

    @property
    def count(self) -> int:
        """How many powers there are, n."""
        return 2 ** (self.bits - 1) - 1

    @property
    def container(self) -> Any:
        """int4 for up to 4 bits, else int8."""
        return jnp.int4 if self.bits <= 4 else jnp.int8

    def extent(self, x: jax.Array, axes: Sequence[int]) -> tuple[jax.Array, jax.Array]:
        """Plus and minus the largest magnitude over `axes` (of each group)."""
        return mirrored(self, x, axes)

    def grid(self, low: jax.Array, high: jax.Array) -> Grid:
        """The grid whose largest power is the nearest to the larger of `-low` and `high`."""
        top = jnp.maximum(-low, high)
        return Grid(power_scale(_nearest(top), jnp.isfinite(top)), None)

    def encode(self, x: jax.Array, grid: Grid, *, key: jax.Array | None = None) -> jax.Array:
        """Signed counts of the nearest powers, as int32; `key` rounds stochastically."""
        check_key(self, key)
        place = jnp.abs(over_power(x, grid.scale))
        if key is None:
            power_of = _nearest(place)
            tiny = 2.0**-self.count  # half the smallest power
            count = jnp.where(place < tiny, 0, jnp.maximum(power_of + self.count, 1))
        else:
            under = jnp.maximum(exponent(place), -self.count)
            first = under < 1 - self.count  # between zero and the smallest power
            low = jnp.where(first, 0.0, power(jnp.clip(under, 1 - self.count, 1)))
            gap = jnp.where(first, 2.0 ** (1 - self.count), low)
            up = jax.random.uniform(key, place.shape) * gap < place - low
            count = under + self.count + up.astype(jnp.int32)
        count = jnp.clip(count, 0, self.count)
        return jnp.where(x < 0, -count, count)

    def inside(self, x: jax.Array, grid: Grid) -> jax.Array:
        """Where `|x|` is below 1.5 times the largest power."""
        return jnp.abs(over_power(x, grid.scale)) < np.float32(1.5)

    def decode(self, codes: jax.Array, grid: Grid) -> jax.Array:
        """The powers in float32."""
        codes = codes.astype(jnp.int32)
        magnitude = jnp.where(codes == 0, 0.0, power(jnp.abs(codes) - self.count))
        values = magnitude * spread(grid.scale.astype(jnp.float32), codes.shape)
        return jnp.where(codes < 0, -values, values)


def _nearest(x: jax.Array) -> jax.Array:
    """The exponent of the power nearest to |x|: half a binade more carries into it from 1.5 on."""
    bits = jax.lax.bitcast_convert_type(jnp.abs(x), jnp.int32)
    return ((bits + (1 << 22)) >> 23) - 127
