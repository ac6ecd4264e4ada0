"""Powers of two and piecewise steps against float64 NumPy; the break against every other one."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from formats_reference import faked, nearest, powers, stored, two_regions

from jopt.quant import Piecewise, PowerOfTwo, fake_quant

SHAPES = {
    "normal": lambda rng: rng.normal(size=(400, 3)),
    "laplace": lambda rng: rng.laplace(size=(400, 3)),
    "uniform": lambda rng: rng.uniform(-1, 1, (400, 3)),
    "heavy": lambda rng: rng.standard_t(2, size=(400, 3)),
}


@pytest.mark.parametrize("bits", [2, 3, 5])
def test_powers_are_the_nearest_in_value(bits):
    rng = np.random.default_rng(bits)
    x = (rng.normal(size=(300, 5)) * 2.0 ** rng.integers(-40, 40, 5)).astype(np.float32)
    for dtype in (jnp.float32, jnp.bfloat16):
        given = jnp.asarray(x).astype(dtype)
        y = np.asarray(faked(given, PowerOfTwo(bits)), np.float64)
        wide = np.asarray(given, np.float64)
        for column in range(5):
            levels = powers(wide[:, column], bits)
            assert len(levels) == 2**bits - 1
            # Mirrored, so that of two as near the larger magnitude is taken.
            expected = np.sign(wide[:, column]) * -nearest(-np.abs(wide[:, column]), levels)
            np.testing.assert_array_equal(y[:, column], expected)


def test_powers_round_in_value_and_halves_up():
    # s = 1: 1.4 is cut to it, 0.75 lies half-way between 0.5 and 1, 0.125 half-way to zero.
    x = jnp.array([[1.4, 0.75, 0.7499, 0.375, 0.125, 0.1249, -0.75, 0.0]]).T
    y = faked(x, PowerOfTwo(3))
    np.testing.assert_array_equal(y.ravel(), [1, 1, 0.5, 0.5, 0.25, 0, -1, 0])
    leaf = stored(x, PowerOfTwo(3))
    assert leaf.scale.dtype == jnp.float8_e8m0fnu and leaf.scale.item() == 1
    np.testing.assert_array_equal(
        np.asarray(leaf.codes, np.int8).ravel(), [3, 3, 2, 2, 1, 0, -3, 0]
    )
    # From 1.5 times a power on the largest rounds up.
    assert stored(jnp.array([[1.5]]), PowerOfTwo(3)).scale.item() == 2


def test_powers_of_extreme_weights():
    for value in (2.0**-120, 3e38):
        x = jnp.full((2, 2), value, jnp.float32)
        y = np.asarray(faked(x, PowerOfTwo(4)), np.float64)
        # 3e38 is nearest to 2^128, which float32 does not have: 2^127 is taken.
        assert np.all(y == (2.0**-120 if value < 1 else 2.0**127))


def test_powers_round_at_random_without_bias():
    x = jax.random.uniform(jax.random.key(0), (12, 4), minval=-1.0).at[0].set(1.0)
    format = PowerOfTwo(4, rounding="stochastic")
    keys = jax.random.split(jax.random.key(1), 1500)
    drawn = np.asarray(jax.jit(jax.vmap(lambda key: fake_quant(x, format, key=key)))(keys))
    low, high = drawn.min(0).astype(np.float64), drawn.max(0).astype(np.float64)
    assert np.all((low <= x) & (x <= high))
    assert np.all(np.abs(drawn.mean(0) - x) <= 6 * 0.5 * (high - low) / np.sqrt(1500) + 1e-6)
    with pytest.raises(ValueError, match="rounds at random: pass `key=`"):
        fake_quant(x, format)


@pytest.mark.parametrize("bits", [3, 4, 7])
@pytest.mark.parametrize("shape", SHAPES)
def test_two_regions_have_the_steps_and_the_break_of_the_paper(bits, shape):
    x = SHAPES[shape](np.random.default_rng(bits)).astype(np.float32)
    leaf = stored(jnp.asarray(x), Piecewise(bits))
    assert leaf.table.entries.dtype == jnp.uint8 and leaf.table.entries.shape == (1, 3, 1)
    for column in range(3):
        wide = x[:, column].astype(np.float64)
        parts = int(leaf.table.entries[0, column, 0])
        levels, error = two_regions(wide, bits, parts)
        assert len(levels) == 2**bits - 1
        y = np.asarray(leaf.materialise()[:, column], np.float64)
        top = np.abs(wide).max()
        assert np.all(np.abs(y[:, None] - levels).min(1) <= 1e-6 * top)
        off = np.abs(y - wide) - np.abs(wide[:, None] - levels).min(1)
        assert np.all(off <= 1e-6 * top)
        errors = [two_regions(wide, bits, every)[1] for every in range(1, 64)]
        assert error <= 1.0001 * min(errors)
        # Better than even steps, which are those of a break at n / (2n - 1) of the largest.
        even = np.linspace(-top, top, 2**bits - 1)
        assert error <= 1.001 * float((np.abs(wide[:, None] - even).min(1) ** 2).sum()) or (
            shape == "uniform"
        )


def test_a_dense_center_pays_where_tails_are_heavy():
    x = np.random.default_rng(0).laplace(size=(4000, 1)).astype(np.float32)
    leaf = stored(jnp.asarray(x), Piecewise(5))
    assert leaf.table.entries.item() < 32  # the paper: below half of the largest
    top = float(np.abs(x).max())
    even = np.linspace(-top, top, 31)
    ours = float(np.square(np.asarray(leaf.materialise(), np.float64) - x).sum())
    assert ours < 0.6 * float(np.square(np.abs(x - even).min(1)).sum())


GIVEN = Piecewise(boundaries=(-2.0, -1.0, 0.0, 0.5, 4.0), values=(-1.5, -0.25, 0.25, 2.0))


def test_given_pieces_hold_their_lower_ends():
    x = jnp.array([-9.0, -2.0, -1.01, -1.0, -1e-30, 0.0, 0.5, 3.9, 4.0, 100.0])
    y = faked(x, GIVEN)
    expected = [-1.5, -1.5, -1.5, -0.25, -0.25, 0.25, 2, 2, 2, 2]
    np.testing.assert_array_equal(y, expected)
    inside = GIVEN.inside(x, GIVEN.fit(x, (-1,)))
    np.testing.assert_array_equal(inside, [False, *[True] * 7, False, False])
    assert GIVEN.bits == 2 and GIVEN.container == jnp.uint4 and not GIVEN.needs_values
    assert stored(x[:, None], GIVEN).scale.size == 1


def test_given_pieces_are_any_step_function():
    rng = np.random.default_rng(5)
    for count in (2, 9, 30, 256):
        values = np.sort(rng.normal(size=count).astype(np.float32))
        ends = np.sort(rng.normal(size=count + 1).astype(np.float32))
        x = np.concatenate([rng.normal(size=500).astype(np.float32), ends])
        format = Piecewise(boundaries=tuple(ends.tolist()), values=tuple(values.tolist()))
        piece = np.clip(np.searchsorted(ends, x, side="right") - 1, 0, count - 1)
        np.testing.assert_array_equal(faked(jnp.asarray(x), format), values[piece])


def test_arguments_are_checked():
    for bits in (2, 9, 4.5, True):
        with pytest.raises(ValueError, match="bits must be an integer from 3 to 8"):
            Piecewise(bits)
    for bits in (1, 9, 4.5, True):
        with pytest.raises(ValueError, match="bits must be an integer from 2 to 8"):
            PowerOfTwo(bits)
    with pytest.raises(ValueError, match="pass both"):
        Piecewise(values=(1, 2))
    with pytest.raises(ValueError, match="2 values need 3 ascending boundaries"):
        Piecewise(boundaries=(0, 1), values=(1, 2))
    with pytest.raises(ValueError, match="2 values need 3 ascending boundaries"):
        Piecewise(boundaries=(0, 2, 1), values=(1, 2))
    with pytest.raises(ValueError, match="values must ascend"):
        Piecewise(boundaries=(0, 1, 2), values=(2, 1))
    with pytest.raises(ValueError, match="the values take 1 bits"):
        Piecewise(4, boundaries=(0, 1, 2), values=(1, 2))
    with pytest.raises(ValueError, match="given values have no scale"):
        Piecewise(boundaries=(0, 1, 2), values=(1, 2), granularity="group", group_size=4)
    with pytest.raises(ValueError, match="does not round at random"):
        fake_quant(jnp.ones((2, 2)), Piecewise(4), key=jax.random.key(0))
    with pytest.raises(ValueError, match="has no grid for a range alone"):
        Piecewise(4).grid(jnp.zeros((1, 1)), jnp.ones((1, 1)))


def test_codes_of_both_formats_ascend_with_the_values():
    x = jnp.linspace(-1, 1, 201)[:, None]
    for format in (PowerOfTwo(4), Piecewise(5), Piecewise(3)):
        codes = np.asarray(stored(x, format).codes).astype(int).ravel()
        assert all(a <= b for a, b in itertools.pairwise(codes))
        assert codes[0] == -codes[-1] and len(set(codes)) > 2 ** (format.bits - 1)
