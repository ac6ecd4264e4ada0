"""HQQ against a float64 version, and its properties."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rounding_reference as reference

from jopt.quant import Codebook, Int, hqq

FORMATS = [
    Int(4),
    Int(2),
    Int(3, symmetric=False),
    Int(4, symmetric=False, granularity="group", group_size=16),
    Int(4, granularity="tensor"),
]


def heavy(inputs=64, outputs=12, seed=0):
    """Weights with a few outliers."""
    rng = np.random.default_rng(seed)
    return (rng.standard_t(3, (inputs, outputs)) / np.sqrt(inputs)).astype(np.float32)


def value(rounded, format):
    return np.asarray(format.decode(rounded.codes, rounded.grid))


def nearest(weight, format):
    axes = (-2, -1) if format.granularity == "tensor" else (-2,)
    grid = format.fit(jnp.asarray(weight), axes)
    return np.asarray(format.decode(format.encode(jnp.asarray(weight), grid), grid))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_iteration_is_that_of_float64(bits):
    weight = heavy(seed=bits)
    ours, theirs = value(hqq(weight, Int(bits)), Int(bits)), reference.half_quadratic(weight, bits)
    assert np.isclose(ours, theirs, rtol=1e-3, atol=1e-5).mean() > 0.95
    errors = [np.sum((weight - w) ** 2) for w in (ours, theirs)]
    assert errors[0] == pytest.approx(errors[1], rel=0.01)


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_the_error_falls_for_all_that_share_a_scale(format):
    weight = heavy()
    ours, near = value(hqq(weight, format), format), nearest(weight, format)
    size = format.group_size or 64

    def errors(rounded):
        each = (weight - rounded) ** 2
        if format.granularity == "tensor":
            return each.sum()
        return each.reshape(-1, size, 12).sum(1)

    assert np.all(errors(ours) <= errors(near) * 1.0001)
    assert errors(ours).sum() < 0.98 * errors(near).sum()


def test_more_starts_are_no_worse_and_help():
    weight, format = heavy(), Int(4)
    one, four, ten = (
        np.sum((weight - value(hqq(weight, format, starts=n), format)) ** 2, 0) for n in (1, 4, 10)
    )
    assert np.all(four <= one * 1.0001) and np.all(ten <= four * 1.0001)
    assert four.sum() < 0.97 * one.sum()


def test_no_steps_are_rounding_to_nearest():
    for format in FORMATS:
        ours = value(hqq(heavy(), format, steps=0, starts=1), format)
        np.testing.assert_array_equal(ours, nearest(heavy(), format))


def test_weights_on_the_grid_and_bad_ones_stay():
    weight = heavy()
    grid = nearest(weight, Int(4))
    np.testing.assert_allclose(value(hqq(grid, Int(4)), Int(4)), grid, rtol=1e-6)
    weight[:, 3], weight[1, 4] = 0, np.nan
    result = value(hqq(weight, Int(4, symmetric=False)), Int(4, symmetric=False))
    assert (result[:, 3] == 0).all() and np.isnan(result[:, 4]).all()
    assert np.isfinite(np.delete(result, 4, 1)).all()


def test_the_size_of_weights_does_not_matter():
    for format in FORMATS:
        one, other = hqq(heavy(), format), hqq(heavy() * 2.0**-7, format)
        np.testing.assert_array_equal(one.codes, other.codes)


@pytest.mark.parametrize("format", FORMATS[:4], ids=str)
@pytest.mark.parametrize("other", [np.nan, 2.0**30], ids=["NaN", "huge"])
def test_what_shares_no_scale_does_not_matter(format, other):
    weight = heavy()
    alone, beside = hqq(weight, format), weight.copy()
    beside[:, 0] *= other
    beside = hqq(beside, format)
    for one, two in zip(jax.tree.leaves(alone), jax.tree.leaves(beside), strict=True):
        np.testing.assert_array_equal(np.asarray(one)[..., 1:], np.asarray(two)[..., 1:])


@pytest.mark.parametrize("format", [Int(3), FORMATS[3]], ids=str)
@pytest.mark.parametrize("unit", [1e-33, 1e-37])
def test_tiny_weights_are_no_worse_than_to_nearest(format, unit):
    rng, size = np.random.default_rng(0), format.group_size or 64
    weight = ((np.abs(rng.normal(size=(64, 12))) + 3) * unit).astype(np.float32)

    def errors(rounded):
        gap = (weight.astype(np.float64) - rounded) / unit
        return np.sum(gap.reshape(-1, size, 12) ** 2, 1)

    ours, near = errors(value(hqq(weight, format), format)), errors(nearest(weight, format))
    assert np.all(ours <= near * 1.0001)


@pytest.mark.parametrize("format", [Int(4), FORMATS[3], FORMATS[4]], ids=str)
@pytest.mark.parametrize("shape", [(32, 0), (0, 8), (0, 32, 8)], ids=str)
def test_empty_weights(format, shape):
    rounded = hqq(jnp.zeros(shape), format)
    assert rounded.codes.shape == shape == value(rounded, format).shape


def test_layers_map_and_jit_and_bfloat16():
    weights = np.stack([heavy(seed=seed) for seed in range(3)])
    format = FORMATS[3]
    batched = jax.jit(lambda w: hqq(w, format))(weights)
    assert batched.codes.shape == weights.shape and batched.grid.scale.shape == (3, 4, 12)
    one = hqq(weights[2], format)
    assert np.mean(np.asarray(batched.codes[2]) == np.asarray(one.codes)) > 0.98
    assert hqq(jnp.asarray(weights).astype(jnp.bfloat16), format).codes.dtype == jnp.int4


def test_lowers_everywhere():
    shape = jax.ShapeDtypeStruct((64, 8), jnp.float32)
    for platform in ("cpu", "cuda", "tpu"):
        f = jax.jit(lambda w: hqq(w, FORMATS[3]))
        assert jax.export.export(f, platforms=[platform])(shape).platforms == (platform,)


def test_arguments_are_checked():
    with pytest.raises(ValueError, match=r"`hqq\(p=2, beta=10.0.*0 < p <= 1"):
        hqq(heavy(), Int(4), p=2)
    with pytest.raises(ValueError, match=r"starts=0.*starts, from 1 to 10"):
        hqq(heavy(), Int(4), starts=0)
    for wrong in ({"starts": 2.5}, {"steps": True}, {"steps": None}, {"beta": float("nan")}):
        with pytest.raises(ValueError, match="an integer of steps"):
            hqq(heavy(), Int(4), **wrong)
    with pytest.raises(TypeError, match="Codebook fits its values to the weight by itself"):
        hqq(heavy(), Codebook(8))
    with pytest.raises(TypeError, match="the weight is int32"):
        hqq(jnp.ones((4, 4), jnp.int32), Int(4))
    with pytest.raises(ValueError, match="group_size=48 does not divide the 64 inputs"):
        hqq(heavy(), Int(4, granularity="group", group_size=48))
