"""Counts of up to 64 bits as two uint32 words.

JAX has no int64 unless asked for, and a model may have more weights than 32 bits can count.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Wide(NamedTuple):
    """The counts `high * 2**32 + low`."""

    high: jax.Array  # uint32
    low: jax.Array  # uint32, the same shape


def wide(counts: Sequence[int]) -> Wide:
    """Counts known in Python."""
    return Wide(
        jnp.asarray([count >> 32 for count in counts], jnp.uint32),
        jnp.asarray([count & 0xFFFFFFFF for count in counts], jnp.uint32),
    )


def widen(low: jax.Array) -> Wide:
    """Counts that fit 32 bits."""
    return Wide(jnp.zeros_like(low), low)


def total(counts: jax.Array) -> Wide:
    """The sum of up to 65,536 counts of 32 bits."""
    return _by_halves(counts, lambda half: jnp.sum(half, dtype=jnp.uint32))


def exclusive_sum(counts: jax.Array) -> Wide:
    """The sums of the counts before each one."""
    return _by_halves(counts, lambda half: jnp.cumsum(half, dtype=jnp.uint32) - half)


def add(a: Wide, b: Wide) -> Wide:
    """a + b."""
    low = a.low + b.low
    return Wide(a.high + b.high + (low < a.low).astype(jnp.uint32), low)


def subtract(a: Wide, b: Wide) -> Wide:
    """a - b, for b <= a."""
    return Wide(a.high - b.high - (a.low < b.low).astype(jnp.uint32), a.low - b.low)


def less(a: Wide, b: Wide) -> jax.Array:
    """Whether a < b."""
    return (a.high < b.high) | ((a.high == b.high) & (a.low < b.low))


def minimum(a: Wide, b: Wide) -> Wide:
    """The smaller count."""
    smaller = less(a, b)
    return Wide(jnp.where(smaller, a.high, b.high), jnp.where(smaller, a.low, b.low))


def remainder(a: Wide, b: Wide) -> Wide:
    """a - b, or 0 if that is negative."""
    return subtract(a, minimum(a, b))


def quotient(a: Wide, by: int) -> Wide:
    """a // by, for 0 < by < 2**16."""
    rest, found = jnp.zeros_like(a.low), []
    for limb in (a.high >> 16, a.high & 0xFFFF, a.low >> 16, a.low & 0xFFFF):
        part = (rest << 16) | limb
        found.append(part // by)
        rest = part % by
    return Wide((found[0] << 16) | found[1], (found[2] << 16) | found[3])


def shares(fraction: jax.Array, wholes: Sequence[int]) -> Wide:
    """round(fraction · whole) for each, exactly: half to even, as if in unlimited precision.

    Args:
      fraction: float32 scalar in [0, 1].
      wholes: counts below 2**40.
    """
    bits = jax.lax.bitcast_convert_type(fraction, jnp.uint32)
    exponent = bits >> 23
    mantissa = (bits & 0x7FFFFF) | jnp.where(exponent > 0, jnp.uint32(1 << 23), jnp.uint32(0))
    # fraction = mantissa / 2**places, and mantissa * whole has fewer than 64 bits.
    places = 150 - jnp.maximum(exponent, 1)
    product = _product(mantissa, wholes)
    one = _power(places)
    quotient = _shifted(product, places)
    rest = _and(product, subtract(one, wide_like(one, 1)))
    half = _power(places - 1)
    odd = (quotient.low & 1) == 1
    up = less(half, rest) | (~less(rest, half) & odd)
    rounded = add(quotient, widen(up.astype(jnp.uint32)))
    nothing = wide_like(rounded, 0)
    return Wide(*(jnp.where(places <= 64, r, n) for r, n in zip(rounded, nothing, strict=True)))


def wide_like(like: Wide, count: int) -> Wide:
    """The same count everywhere."""
    return Wide(jnp.full_like(like.high, count >> 32), jnp.full_like(like.low, count & 0xFFFFFFFF))


def _by_halves(counts: jax.Array, add_up: Callable[[jax.Array], jax.Array]) -> Wide:
    # Sums of 16 bits do not overflow 32.
    low, high = add_up(counts & 0xFFFF), add_up(counts >> 16)
    return add(widen(low), Wide(high >> 16, high << 16))


def _product(a: jax.Array, b: Sequence[int]) -> Wide:
    """a · b by limbs of 16 bits."""
    product = wide([0] * len(b))
    for i, limb in enumerate((a & 0xFFFF, a >> 16)):
        for j in range(3):
            part = limb * np.asarray([(count >> 16 * j) & 0xFFFF for count in b], np.uint32)
            nothing = jnp.zeros_like(part)
            match i + j:
                case 0:
                    shifted = widen(part)
                case 1:
                    shifted = Wide(part >> 16, part << 16)
                case 2:
                    shifted = Wide(part, nothing)
                case _:
                    shifted = Wide(part << 16, nothing)
            product = add(product, shifted)
    return product


def _power(places: jax.Array) -> Wide:
    """2**places; 0 from 64 on."""
    one = jnp.ones_like(places)
    # A shift by the whole width is 0 in XLA, on every backend.
    return Wide(
        jnp.where(places < 32, 0, jax.lax.shift_left(one, places - 32)),
        jnp.where(places < 32, jax.lax.shift_left(one, places), 0),
    )


def _shifted(a: Wide, places: jax.Array) -> Wide:
    """a // 2**places, for places >= 1."""
    right, left = jax.lax.shift_right_logical, jax.lax.shift_left
    near = Wide(right(a.high, places), right(a.low, places) | left(a.high, 32 - places))
    far = right(a.high, places - 32)
    return Wide(jnp.where(places < 32, near.high, 0), jnp.where(places < 32, near.low, far))


def _and(a: Wide, b: Wide) -> Wide:
    return Wide(a.high & b.high, a.low & b.low)
