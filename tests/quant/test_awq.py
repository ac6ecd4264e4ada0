"""AWQ against a float64 search, and its properties."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rounding_reference as reference

from jopt.quant import Int, awq, awq_scales

FORMATS = [
    Int(4),
    Int(3, symmetric=False),
    Int(4, granularity="group", group_size=12),
    Int(4, granularity="tensor"),
]


def case(inputs=48, outputs=20, seed=0):
    weight, hessian = reference.layer(inputs, outputs, seed)
    magnitude = 0.8 * np.sqrt(np.diag(hessian) / (4 * inputs))
    return weight, hessian, magnitude.astype(np.float32)


def value(rounded, scales, format):
    return np.asarray(format.decode(rounded.codes, rounded.grid)) / np.asarray(scales)[..., None]


def nearest(weight, format):
    axes = (-2, -1) if format.granularity == "tensor" else (-2,)
    grid = format.fit(jnp.asarray(weight), axes)
    return np.asarray(format.decode(format.encode(jnp.asarray(weight), grid), grid))


@pytest.mark.parametrize("seed", range(3))
def test_the_search_is_that_of_float64(seed):
    weight, hessian, magnitude = case(seed=seed)
    rounded, scales = awq(weight, hessian, magnitude, Int(4), points=11, clip=None)
    values, expected = reference.scaled(weight, hessian, magnitude, 4, 11)
    np.testing.assert_allclose(scales, expected, rtol=1e-4)
    assert np.isclose(value(rounded, scales, Int(4)), values, atol=1e-5).mean() > 0.99
    alone = awq_scales(weight, hessian, magnitude, Int(4), points=11)
    np.testing.assert_array_equal(alone, scales)


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_the_error_falls_with_scales_and_again_with_clipping(format):
    weight, hessian, magnitude = case()
    errors = [reference.error(weight, nearest(weight, format), hessian)]
    for clip in (None, 0.5):
        result = awq(weight, hessian, magnitude, format, clip=clip)
        errors.append(reference.error(weight, value(*result, format), hessian))
    part = 1.0 if format.granularity == "tensor" else 0.9
    assert errors[1] < part * errors[0] and errors[2] <= errors[1] * 1.0001


def test_one_exponent_is_rounding_to_nearest():
    weight, hessian, magnitude = case()
    result = awq(weight, hessian, magnitude, Int(4), points=1, clip=None)
    np.testing.assert_array_equal(result[1], np.ones(48))
    np.testing.assert_array_equal(value(*result, Int(4)), nearest(weight, Int(4)))


def test_inputs_that_were_always_zero_keep_their_scale():
    weight, hessian, magnitude = case()
    hessian[5], hessian[:, 5], magnitude[5] = 0, 0, 0
    scales = awq_scales(weight, hessian, magnitude, Int(4))
    assert scales[5] == 1 and not np.all(np.asarray(scales) == 1)
    assert np.isfinite(scales).all()


def test_layers_map_and_jit_and_bfloat16():
    cases = [case(seed=seed) for seed in range(2)]
    weights, hessians, magnitudes = (np.stack(part) for part in zip(*cases, strict=True))
    format = FORMATS[2]
    rounded, scales = jax.jit(lambda *a: awq(*a, format))(weights, hessians, magnitudes)
    assert rounded.codes.shape == weights.shape and scales.shape == (2, 48)
    one, alone = awq(*cases[1], format)
    np.testing.assert_allclose(scales[1], alone, rtol=1e-5)
    assert np.mean(np.asarray(rounded.codes[1]) == np.asarray(one.codes)) > 0.98
    small, scales = awq(jnp.asarray(weights[0]).astype(jnp.bfloat16), *cases[0][1:], format)
    assert small.codes.dtype == jnp.int4 and scales.dtype == jnp.float32


@pytest.mark.parametrize("format", [Int(4), Int(4, granularity="group", group_size=8), FORMATS[3]])
@pytest.mark.parametrize("shape", [(32, 0), (0, 8)], ids=str)
def test_empty_weights(format, shape):
    inputs = shape[0]
    rounded, scales = awq(jnp.zeros(shape), jnp.eye(inputs), jnp.ones(inputs), format)
    assert rounded.codes.shape == shape == value(rounded, scales, format).shape


def test_lowers_everywhere():
    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((24, 8), (24, 24), (24,))]
    f = jax.jit(lambda *a: awq(*a, FORMATS[2]))
    for platform in ("cpu", "cuda", "tpu"):
        assert jax.export.export(f, platforms=[platform])(*shapes).platforms == (platform,)


def test_arguments_are_checked():
    weight, hessian, magnitude = case()
    with pytest.raises(ValueError, match=r"the mean of \|x\| is \[48\].*got \[47\]"):
        awq(weight, hessian, magnitude[1:], Int(4))
    with pytest.raises(ValueError, match="Hessian has a NaN"):
        awq(weight, hessian * np.nan, magnitude, Int(4))
    with pytest.raises(ValueError, match=r"`awq\(clip=0, clips=10\)`"):
        awq(weight, hessian, magnitude, Int(4), clip=0)
    with pytest.raises(ValueError, match=r"at least one exponent"):
        awq_scales(weight, hessian, magnitude, Int(4), points=0)
