"""The format of activations that are rounded to bfloat16, with which a product is taken in it."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jopt.trace import reductions

from .base import Format, Granularity, Grid, Rounding


@dataclasses.dataclass(frozen=True)
class BFloat16(Format):
    """bfloat16: eight bits of significand and the range of float32, without a scale.

    As the activation's format, `Spec(Int(8), BFloat16())`, it asks for products in bfloat16 with
    sums in float32. Integer codes are exact in bfloat16, and the weight's scales are applied to the
    sums, so that of the operands only the activation is rounded (by 2^-9 of its size at most);
    weights of other formats are rounded as well, after they are dequantized. jopt never does that
    by itself: it is faster than float32 where the machine has such units, and it is another result.

    Example:
      >>> import jax.numpy as jnp
      >>> from jopt.quant import BFloat16, fake_quant
      >>> fake_quant(jnp.array([1.0, 1.001]), BFloat16()).tolist()
      [1.0, 1.0]

    References:
      Dhiraj Kalamkar et al., A study of BFLOAT16 for deep learning training, 2019,
      arXiv:1905.12322.
    """

    bits = 16
    granularity: Granularity = dataclasses.field(default="tensor", init=False)
    group_size: int | None = dataclasses.field(default=None, init=False)
    rounding: Rounding = dataclasses.field(default="nearest", init=False)

    @property
    def container(self) -> Any:
        """bfloat16."""
        return jnp.bfloat16

    def extent(self, x: jax.Array, axes: Sequence[int]) -> tuple[jax.Array, jax.Array]:
        """Lowest and highest value over `axes`, zero included."""
        return reductions.ends(x, axes, keepdims=True)

    def grid(self, low: jax.Array, high: jax.Array) -> Grid:
        """A scale of one, whatever the range."""
        del high
        return Grid(jnp.ones_like(low, jnp.float32), None)

    def encode(self, x: jax.Array, grid: Grid, *, key: jax.Array | None = None) -> jax.Array:
        """The values of `x` that bfloat16 has, as float32."""
        del grid, key
        # Not a cast there and back, which XLA may leave out.
        return jax.lax.reduce_precision(x.astype(jnp.float32), exponent_bits=8, mantissa_bits=7)

    def inside(self, x: jax.Array, grid: Grid) -> jax.Array:
        """Everywhere: nothing is clipped."""
        del grid
        return jnp.ones_like(x, jnp.bool_)

    def decode(self, codes: jax.Array, grid: Grid) -> jax.Array:
        """The values as float32."""
        del grid
        return codes.astype(jnp.float32)
