"""FP8 and MX against ml_dtypes and the specification in float64, value by value."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from formats_reference import ELEMENTS, faked, mx, small_float, stored
from hypothesis import given, settings
from hypothesis import strategies as st

from jopt.quant import FP8, MX, fake_quant, quantize
from jopt.quant._formats.floats import E2M1, E4M3, E5M2, rounded

SMALL = [
    (E4M3, ml_dtypes.float8_e4m3fn),
    (E5M2, ml_dtypes.float8_e5m2),
    (E2M1, ml_dtypes.float4_e2m1fn),
]


def values_near_boundaries(dtype):
    """Every value, what lies half-way between two, and their neighbors; and random ones."""
    top = float(ml_dtypes.finfo(dtype).max)
    codes = np.arange(2 ** ml_dtypes.finfo(dtype).bits, dtype=np.uint8).view(dtype)
    values = codes.astype(np.float64)
    values = np.unique(values[np.isfinite(values)])
    middle = (values[1:] + values[:-1]) / 2
    rng = np.random.default_rng(0)
    spread = rng.normal(size=4000) * 2.0 ** rng.uniform(-20, np.log2(top) + 1, 4000)
    x = np.concatenate([values, middle, spread]).astype(np.float32)
    ends = [np.float32(np.inf), np.float32(-np.inf)]
    return np.concatenate([x, np.nextafter(x, ends[0]), np.nextafter(x, ends[1])])


@pytest.mark.parametrize(("element", "dtype"), SMALL, ids=["e4m3", "e5m2", "e2m1"])
def test_rounding_is_that_of_ml_dtypes(element, dtype):
    x = values_near_boundaries(dtype)
    ours = np.asarray(jax.jit(lambda x: rounded(x, element))(jnp.asarray(x)))
    top = float(ml_dtypes.finfo(dtype).max)
    theirs = np.clip(x, -top, top).astype(dtype).astype(np.float32)
    np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(ours, small_float(x, dtype))  # and of the reference below
    assert not np.signbit(ours[ours == 0]).any()
    # The container holds them as they are, and gives them back.
    held = jnp.asarray(ours).astype(element.dtype)
    np.testing.assert_array_equal(np.asarray(held.astype(jnp.float32)), ours)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize(("kind", "small"), [("e4m3", SMALL[0][1]), ("e5m2", SMALL[1][1])])
def test_fp8_scales_the_largest_to_the_top(kind, small, dtype):
    x = jax.random.normal(jax.random.key(0), (3, 32, 5)).astype(dtype)
    top = float(ml_dtypes.finfo(small).max)
    for granularity, axes in (("channel", -2), ("tensor", (-2, -1))):
        leaf = stored(x, FP8(kind, granularity=granularity))
        wide = np.asarray(x, np.float64)
        scale = np.abs(wide).max(axes, keepdims=True) / top
        np.testing.assert_allclose(leaf.scale, scale, rtol=3e-7)
        assert leaf.codes.dtype == small
        codes = np.asarray(leaf.codes).astype(np.float64)
        place = wide / scale
        # Away from the boundaries of rounding, of which float32 may see the other side.
        clear = small_float(place * (1 - 1e-6), small) == small_float(place * (1 + 1e-6), small)
        assert clear.mean() > 0.95
        np.testing.assert_array_equal(codes[clear], small_float(place, small)[clear])
        assert np.all(np.abs(codes).max(axes) == top)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31 - 1), st.floats(-60, 60), st.sampled_from(["e4m3", "e5m2"]))
def test_fp8_error_is_bounded(seed, exponent, kind):
    x = np.random.default_rng(seed).normal(size=(16, 3)).astype(np.float32)
    x = x * np.float32(2.0**exponent)
    y = np.asarray(faked(jnp.asarray(x), FP8(kind)), np.float64)
    relative, smallest, top = (
        (1 / 16, 2.0**-10, 448) if kind == "e4m3" else (1 / 8, 2.0**-17, 57344)
    )
    scale = np.abs(x.astype(np.float64)).max(0) / top
    assert np.all(np.abs(y - x) <= np.maximum(np.abs(x) * relative, smallest * scale) * (1 + 1e-5))


@pytest.mark.parametrize("kind", ["mxfp8", "mxfp8_e5m2", "mxfp4", "mxint8"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_mx_is_the_specification(kind, dtype):
    rng = np.random.default_rng(1)
    x = rng.normal(size=(2, 96, 7)) * 2.0 ** rng.integers(-110, 110, size=(2, 1, 7))
    x = jnp.asarray(x.astype(np.float32)).astype(dtype)
    x = x.at[0, :32, 0].set(jnp.zeros((), dtype)).at[0, 32, 1].set(jnp.asarray(3e38, dtype))
    leaf = stored(x, MX(kind))
    values, scale = mx(np.asarray(x, np.float64), kind, 1)
    assert leaf.scale.dtype == jnp.float8_e8m0fnu
    np.testing.assert_array_equal(np.asarray(leaf.scale).astype(np.float64), scale)
    expected = values.astype(np.float32)
    if dtype == jnp.bfloat16:
        expected = expected.astype(ml_dtypes.bfloat16)
    # Exact: scales are powers of two, and every value has few bits.
    normal = (np.abs(values) >= 2.0**-126) | (values == 0)
    got = np.asarray(leaf.materialise())
    np.testing.assert_array_equal(got[normal], expected[normal])
    assert normal.mean() > 0.95


@pytest.mark.parametrize("top", [3e-38, 1e-37, 1e-36])
@pytest.mark.parametrize("kind", ["mxfp8", "mxfp8_e5m2", "mxfp4", "mxint8"])
def test_mx_of_the_smallest_weights_is_the_same_however_it_is_compiled(kind, top):
    rng = np.random.default_rng(0)
    w = jnp.asarray(rng.uniform(-top, top, size=(64, 16)), jnp.float32)
    plain = stored(w, MX(kind)).materialise()
    assert np.any(np.asarray(plain))
    compiled = jax.jit(lambda w: stored(w, MX(kind)).materialise())(w)
    np.testing.assert_array_equal(compiled, plain)
    np.testing.assert_array_equal(jax.jit(lambda w: faked(w, MX(kind)))(w), plain)


def test_mx_blocks_lie_along_the_summed_axis():
    x = jax.random.normal(jax.random.key(0), (64, 3))
    assert stored(x, MX("mxfp4")).scale.shape == (2, 3)
    kernel = jax.random.normal(jax.random.key(0), (3, 3, 64, 4))
    assert stored(kernel, MX("mxfp4")).scale.shape == (3, 3, 2, 4)
    with pytest.raises(ValueError, match="group_size=32 does not divide the 40 inputs of `w`"):
        quantize({"w": jnp.ones((40, 3))}, MX("mxfp8"))


def test_mx_saturates():
    # The scale is 1 for a largest value in [4, 8): 7.9 has no e2m1 and becomes 6.
    x = jnp.zeros((32, 1)).at[0, 0].set(7.9).at[1, 0].set(-7.0).at[2, 0].set(2.5)
    y = np.asarray(faked(x, MX("mxfp4")))[:3, 0]
    np.testing.assert_array_equal(y, [6, -6, 2])


@pytest.mark.parametrize("format", [FP8("e4m3"), FP8("e5m2"), MX("mxfp4"), MX("mxint8")], ids=str)
def test_stochastic_rounding_is_unbiased(format):
    x = jax.random.normal(jax.random.key(0), (32, 3))
    x = x.at[0].set(1.5 * jnp.max(jnp.abs(x), axis=0))  # clipped by MX, so left out below
    keys = jax.random.split(jax.random.key(1), 1500)
    drawn = jax.jit(jax.vmap(lambda key: fake_quant(x, format, key=key)))(keys)
    drawn, x = np.asarray(drawn, np.float64)[:, 1:], np.asarray(x, np.float64)[1:]
    low, high = drawn.min(0), drawn.max(0)
    assert np.all(low <= x * (1 + 1e-6 * np.sign(x))) and np.all(
        high >= x * (1 - 1e-6 * np.sign(x))
    )
    assert (high > low).mean() > 0.9
    # 6 sigma for each of 93 means, a step being high - low: one chance in 10^6.
    error = np.abs(drawn.mean(0) - x)
    assert np.all(error <= 6 * 0.5 * (high - low) / np.sqrt(1500) + 1e-6)


def test_arguments_are_checked():
    with pytest.raises(
        ValueError, match=r"`FP8\(kind='e3m4'\)`: kind is one of \"e4m3\", \"e5m2\""
    ):
        FP8("e3m4")
    with pytest.raises(ValueError, match=r"`MX\(kind='mxfp6'\)`: kind is one of \"mxfp8\""):
        MX("mxfp6")
    with pytest.raises(ValueError, match='rounding is one of "nearest", "stochastic"'):
        FP8(rounding="floor")
    with pytest.raises(ValueError, match='groups need `granularity="group"`'):
        FP8(group_size=16)
    with pytest.raises(ValueError, match=r"rounds at random: pass `key=`"):
        fake_quant(jnp.ones((2, 2)), FP8(rounding="stochastic"))
    assert ELEMENTS.keys() == {"mxfp8", "mxfp8_e5m2", "mxfp4"}
