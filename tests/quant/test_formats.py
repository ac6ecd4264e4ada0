"""Grids and codes of number formats against float64 NumPy, and what each format promises."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jopt.quant import Int, fake_quant

DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)


def reference(x, bits, symmetric, axes):
    """Scale, zero point and unrounded codes in float64, from the definition."""
    x = np.asarray(x, np.float64)
    n = 2 ** (bits - 1)
    if symmetric:
        scale = np.abs(x).max(axes, keepdims=True) / (n - 1)
        zero = np.zeros_like(scale)
    else:
        low = np.minimum(x.min(axes, keepdims=True), 0)
        high = np.maximum(x.max(axes, keepdims=True), 0)
        scale = (high - low) / (2 * n - 1)
        zero = -n - np.rint(low / scale)
    return scale, zero, x / scale


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", range(2, 9))
def test_codes_are_those_of_the_definition(bits, symmetric):
    for dtype, axes in itertools.product(DTYPES, [(-2,), (-2, -1), (-3, -2)]):
        x = (jax.random.normal(jax.random.key(bits), (3, 17, 9)) + 0.3).astype(dtype)
        format = Int(bits, symmetric=symmetric)
        grid = format.fit(x, axes)
        scale, zero, place = reference(x, bits, symmetric, axes)
        np.testing.assert_allclose(grid.scale, scale, rtol=3e-7)
        if symmetric:
            assert grid.zero_point is None
        else:
            np.testing.assert_array_equal(grid.zero_point, zero)
        codes = np.asarray(format.encode(x, grid))
        clear = np.abs(place - np.floor(place) - 0.5) > 1e-4  # not on a boundary of rounding
        expected = np.clip(np.rint(place) + zero, format.low, format.high)
        np.testing.assert_array_equal(codes[clear], expected[clear])
        assert clear.mean() > 0.97  # bfloat16 has ties
        assert codes.min() >= format.low and codes.max() <= format.high
        assert jnp.iinfo(format.container).min <= format.low
        assert format.high <= jnp.iinfo(format.container).max


def test_ends_of_the_codes():
    assert [(Int(b).low, Int(b).high) for b in (2, 3, 8)] == [(-1, 1), (-3, 3), (-127, 127)]
    affine = Int(8, symmetric=False)
    assert (affine.low, affine.high) == (-128, 127)


def test_groups_have_their_own_scale():
    x = np.random.default_rng(0).normal(size=(2, 12, 5)).astype(np.float32)
    grid = Int(4, granularity="group", group_size=4).fit(jnp.asarray(x), (-2,))
    expected = np.abs(x.reshape(2, 3, 4, 5)).max(2) / 7
    assert grid.scale.shape == (2, 3, 5)
    np.testing.assert_allclose(grid.scale, expected, rtol=1e-6)


def test_floor_is_floor():
    x = jnp.array([[-0.9, -0.5, 0.0, 0.24, 0.76, 1.0]])
    format = Int(3, symmetric=False, rounding="floor")
    grid = format.fit(x, (-1, -2))
    codes = np.asarray(format.encode(x, grid)) - np.asarray(grid.zero_point)
    expected = np.floor(np.asarray(x, np.float64) / np.asarray(grid.scale, np.float64))
    np.testing.assert_array_equal(codes, np.clip(expected, -4 - grid.zero_point, None))


values = st.integers(0, 2**31 - 1).map(
    lambda seed: np.random.default_rng(seed).normal(size=(6, 5)).astype(np.float32)
)
formats = st.builds(
    lambda bits, symmetric, granularity: Int(
        bits,
        symmetric=symmetric,
        granularity=granularity,
        group_size=3 if granularity == "group" else None,
    ),
    st.integers(2, 8),
    st.booleans(),
    st.sampled_from(["channel", "tensor", "group"]),
)


@settings(max_examples=40, deadline=None)
@given(values, formats, st.floats(-30, 30), st.floats(-3, 3))
def test_rounding_is_to_the_grid_and_by_half_a_step(x, format, exponent, shift):
    x = ((x + np.float32(shift)) * np.float32(2.0**exponent)).astype(np.float32)
    axes = (-2, -1) if format.granularity == "tensor" else (-2,)
    grid = format.fit(jnp.asarray(x), axes)
    y = np.asarray(fake_quant(jnp.asarray(x), format), np.float64)
    step = np.asarray(grid.scale, np.float64)
    step = np.repeat(step, 6 // step.shape[0], 0) if format.group_size else step
    assert np.all(np.abs(y - x) <= step / 2 * (1 + 1e-5))
    # On the grid: a whole number of steps, no more of them than the format has codes.
    steps = y / step
    np.testing.assert_allclose(steps, np.rint(steps), atol=1e-4)
    for part in (
        np.rint(steps)
        .reshape(-1, format.group_size or 6, 5)
        .transpose(0, 2, 1)
        .reshape(-1, format.group_size or 6)
    ):
        assert len(np.unique(part)) <= 2**format.bits - format.symmetric
    # Once more changes no code; values may move by the rounding of the new scale.
    again = np.asarray(fake_quant(jnp.asarray(y, jnp.float32), format), np.float64)
    if format.symmetric:
        np.testing.assert_allclose(again, y, rtol=1e-6)
    refit = format.decode(format.encode(jnp.asarray(y, jnp.float32), grid), grid)
    np.testing.assert_array_equal(np.asarray(refit, np.float64), y)


@settings(max_examples=60, deadline=None)
@given(values, formats, st.integers(-149, 127), st.booleans())
def test_values_of_the_grid_need_no_clipping(x, format, exponent, floor):
    """Down to the smallest float and up to the largest; what floors may go one code too low."""
    if floor:
        format = dataclasses.replace(format, rounding="floor")
    size = max(np.abs(x).max(), np.finfo(np.float32).tiny)
    x = jnp.asarray(np.ldexp(x.astype(np.float64) / size, exponent), jnp.float32)
    axes = (-2, -1) if format.granularity == "tensor" else (-2,)
    grid = format.fit(x, axes)
    codes = format.encode_own(x, grid)
    np.testing.assert_array_equal(codes, format.encode(x, grid))
    assert codes.min() >= format.low and codes.max() <= format.high


@settings(max_examples=20, deadline=None)
@given(values, formats)
def test_zero_stays_exactly_zero(x, format):
    x[::2, 1:4] = 0
    y = np.asarray(fake_quant(jnp.asarray(x), format))
    assert np.all(y[x == 0] == 0)
    assert not np.any(np.signbit(y[y == 0]))


@pytest.mark.parametrize("symmetric", [True, False])
def test_stochastic_rounding_is_unbiased(symmetric):
    x = jax.random.normal(jax.random.key(0), (4, 8)) + 0.2
    format = Int(3, symmetric=symmetric)
    count = 2000
    keys = jax.random.split(jax.random.key(1), count)
    drawn = jax.jit(jax.vmap(lambda key: fake_quant(x, format, key=key)))(keys)
    step = np.asarray(format.fit(x, (-2,)).scale)
    # A draw's standard deviation is at most half a step. 32 means, 6 sigma: one chance in 10^7.
    # Within half a step of the ends the asymmetric grid clips, so those are left out.
    grid = format.fit(x, (-2,))
    inside = format.inside(x + 0.5 * step, grid) & format.inside(x - 0.5 * step, grid)
    inside = np.asarray(inside)
    assert inside.mean() > 0.5
    away = np.abs(np.asarray(drawn, np.float64) - np.asarray(x))
    error = np.abs(np.asarray(drawn, np.float64).mean(0) - np.asarray(x))
    assert np.all((error <= 6 * 0.5 * step / np.sqrt(count))[inside])
    assert np.all(away <= step * (1 + 1e-5))
    both = np.ptp(drawn, axis=0) > 0.9 * step
    assert both.mean() > 0.7  # it does go both ways


def test_stochastic_rounding_keeps_what_is_on_the_grid():
    x = jnp.array([[-3.0, -1.0, 0.0, 2.0, 3.0]])
    for seed in range(20):
        y = fake_quant(x, Int(3), key=jax.random.key(seed), axes=(-1,))
        np.testing.assert_allclose(y, x, rtol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("value", [0.0, 1.5, -2.0, 6e-5])
def test_constants_survive(value, symmetric, dtype):
    x = jnp.full((3, 4), value, dtype)
    y = fake_quant(x, Int(4, symmetric=symmetric))
    assert y.dtype == dtype
    np.testing.assert_allclose(np.asarray(y, np.float32), np.asarray(x, np.float32), rtol=1e-6)


def test_values_below_the_normal_range_become_zero_not_nan():
    y = fake_quant(jnp.full((2, 2), 1e-41), Int(8))
    np.testing.assert_array_equal(y, 0)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_channel_that_is_not_finite_becomes_nan(bad, symmetric):
    x = np.ones((3, 2), np.float32)
    x[1, 0] = bad
    y = np.asarray(fake_quant(jnp.asarray(x), Int(8, symmetric=symmetric)))
    assert np.isnan(y[:, 0]).all()
    np.testing.assert_allclose(y[:, 1], 1, rtol=1e-6)


def test_empty_arrays_stay_empty():
    assert fake_quant(jnp.zeros((0, 3)), Int(8)).shape == (0, 3)
    assert fake_quant(jnp.zeros((3, 0)), Int(8, symmetric=False)).shape == (3, 0)


@pytest.mark.parametrize("bits", [1, 9, 4.0, True, "8"])
def test_bits_out_of_range(bits):
    with pytest.raises(ValueError, match=r"bits must be an integer from 2 to 8"):
        Int(bits)


def test_other_arguments_out_of_range():
    with pytest.raises(ValueError, match=r'groups need `granularity="group"`'):
        Int(4, group_size=64)
    with pytest.raises(ValueError, match="group_size must be a positive integer"):
        Int(4, granularity="group")
    with pytest.raises(ValueError, match="group_size must be a positive integer"):
        Int(4, granularity="group", group_size=True)
    with pytest.raises(ValueError, match="group_size must be a positive integer"):
        Int(4, granularity="group", group_size=0)
    with pytest.raises(ValueError, match='granularity is one of "channel", "tensor", "group"'):
        Int(4, granularity="row")
    with pytest.raises(ValueError, match='rounding is one of "nearest", "floor", "stochastic"'):
        Int(4, rounding="up")


def test_formats_hash_and_compare():
    assert {Int(8): 1}[Int(8)] == 1
    assert Int(8) != Int(8, symmetric=False)
