"""GPTQ against the paper's algorithm in float64, and its properties."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rounding_reference as reference

from jopt import quant
from jopt.quant import Int, gptq, output_error

FORMATS = {
    "channel": (Int(4), {}),
    "affine": (Int(3, symmetric=False), {"zero": True}),
    "group": (Int(4, granularity="group", group_size=8), {"group": 8}),
    "affine group": (
        Int(3, symmetric=False, granularity="group", group_size=24),
        {"zero": True, "group": 24},
    ),
    "eight": (Int(8), {}),
}


def value(result, format):
    return np.asarray(format.decode(result.codes, result.grid))


def nearest(weight, format):
    grid = format.fit(jnp.asarray(weight), (-2,))
    return np.asarray(format.decode(format.encode(jnp.asarray(weight), grid), grid))


@pytest.mark.parametrize("order", [False, True])
@pytest.mark.parametrize("name", FORMATS)
def test_codes_are_those_of_the_paper(name, order):
    format, options = FORMATS[name]
    weight, hessian = reference.layer(72, 40)
    ours = value(gptq(weight, hessian, format, order=order, block=32), format)
    theirs = reference.gptq(weight, hessian, format.bits, order=order, **options)
    # A tie that float32 decides otherwise is passed on to the rows after it, in its column alone.
    same = np.isclose(ours, theirs, atol=1e-5).all(0)
    assert same.mean() > 0.8
    errors = [reference.error(weight, rounded, hessian) for rounded in (ours, theirs)]
    assert errors[0] == pytest.approx(errors[1], rel=0.01)


@pytest.mark.parametrize("order", [False, True])
@pytest.mark.parametrize("name", FORMATS)
def test_the_error_is_below_that_of_rounding_to_nearest(name, order):
    format, _ = FORMATS[name]
    weight, hessian = reference.layer(48, 30, seed=3)
    ours = value(gptq(weight, hessian, format, order=order), format)
    assert reference.error(weight, ours, hessian) < 0.8 * reference.error(
        weight, nearest(weight, format), hessian
    )
    measured = output_error(jnp.asarray(weight), jnp.asarray(ours), jnp.asarray(hessian))
    assert float(measured) == pytest.approx(reference.error(weight, ours, hessian), rel=1e-3)


@pytest.mark.parametrize("order", [False, True])
@pytest.mark.parametrize("name", FORMATS)
def test_without_correlations_it_rounds_to_nearest(name, order):
    format, _ = FORMATS[name]
    weight, _ = reference.layer(24, 10)
    diagonal = np.random.default_rng(1).uniform(0.1, 9, 24).astype(np.float32)
    for hessian in (np.eye(24, dtype=np.float32) * 7, np.diag(diagonal), np.zeros((24, 24), "f4")):
        result = gptq(weight, hessian, format, order=order)
        np.testing.assert_array_equal(value(result, format), nearest(weight, format))


@pytest.mark.parametrize("block", [1, 16, 48, 1000])
def test_blocks_change_nothing_but_rounding_errors(block):
    weight, hessian = reference.layer(100, 8)
    one = gptq(weight, hessian, Int(4), block=32).codes
    other = gptq(weight, hessian, Int(4), block=block).codes
    assert np.mean(np.asarray(one) == np.asarray(other)) > 0.97


def test_outputs_do_not_meet_and_the_scale_of_the_hessian_does_not_matter():
    weight, hessian = reference.layer(40, 12)
    whole = gptq(weight, hessian, Int(4))
    part = gptq(weight[:, [7, 2]], hessian * 1024.0, Int(4))
    np.testing.assert_array_equal(np.asarray(whole.codes)[:, [7, 2]], part.codes)


def test_with_activation_order_the_order_of_inputs_does_not_matter():
    weight, hessian = reference.layer(40, 12)
    turn = np.random.default_rng(5).permutation(40)
    one = gptq(weight, hessian, Int(4), order=True)
    other = gptq(weight[turn], hessian[np.ix_(turn, turn)], Int(4), order=True)
    assert np.mean(np.asarray(one.codes)[turn] == np.asarray(other.codes)) > 0.97


def test_inputs_that_were_always_zero_round_to_nearest():
    weight, hessian = reference.layer(32, 6)
    hessian[[3, 9]] = 0
    hessian[:, [3, 9]] = 0
    for damping in (0.0, 0.01):
        result = value(gptq(weight, hessian, Int(4), damping=damping), Int(4))
        np.testing.assert_array_equal(result[[3, 9]], nearest(weight, Int(4))[[3, 9]])


def test_a_singular_hessian_needs_damping():
    weight, _ = reference.layer(24, 6)
    x = np.random.default_rng(2).normal(size=(1, 24)).astype(np.float32)
    result = value(gptq(weight, x.T @ x, Int(4)), Int(4))
    ours, theirs = (np.linalg.norm(x @ (weight - w)) for w in (result, nearest(weight, Int(4))))
    assert ours < 0.2 * theirs
    with pytest.raises(ValueError, match=r"damping=0.0 is not positive definite"):
        gptq(weight, -x.T @ x, Int(4), damping=0.0)
    traced = jax.jit(lambda w, h: gptq(w, h, Int(4), damping=0.0))(weight, -x.T @ x)
    assert np.isnan(traced.grid.scale).all()


def test_layers_map_and_jit_and_bfloat16():
    layers = [reference.layer(32, 6, seed) for seed in range(4)]
    weights, hessians = (
        np.stack(part).reshape(2, 2, *part[0].shape) for part in zip(*layers, strict=True)
    )
    format = Int(4, granularity="group", group_size=16)
    batched = gptq(weights, hessians, format)
    assert batched.codes.shape == (2, 2, 32, 6) and batched.grid.scale.shape == (2, 2, 2, 6)
    assert batched.codes.dtype == jnp.int4
    mapped = jax.jit(jax.vmap(jax.vmap(lambda w, h: gptq(w, h, format))))(weights, hessians)
    one = gptq(layers[1][0], layers[1][1], format)
    for result in (batched, mapped):
        assert np.mean(np.asarray(result.codes)[0, 1] == np.asarray(one.codes)) > 0.95
    small = jnp.asarray(layers[0][0]).astype(jnp.bfloat16)
    np.testing.assert_array_equal(
        gptq(small, layers[0][1], Int(4)).codes,
        gptq(small.astype(jnp.float32), layers[0][1], Int(4)).codes,
    )
    shared = gptq(weights, hessians[0, 0], format)
    np.testing.assert_array_equal(
        shared.codes[0, 0], gptq(weights[0, 0], hessians[0, 0], format).codes
    )


def test_rounding_down_and_one_scale_for_all():
    weight, hessian = reference.layer(32, 6)
    down = gptq(weight, hessian, Int(4, rounding="floor"))
    np.testing.assert_array_equal(down.codes, gptq(weight, hessian, Int(4)).codes)
    whole = Int(4, granularity="tensor")
    result = gptq(weight, hessian, whole)
    assert result.grid.scale.shape == (1, 1)
    grid = whole.fit(jnp.asarray(weight), (-2, -1))
    near = whole.decode(whole.encode(jnp.asarray(weight), grid), grid)
    ours, theirs = (reference.error(weight, w, hessian) for w in (value(result, whole), near))
    assert ours < theirs


OTHERS = [
    quant.FP8("e4m3"),
    quant.MX("mxfp4"),
    quant.NF4(16),
    quant.PowerOfTwo(4),
    quant.Codebook(8),
    quant.Piecewise(4),
]


@pytest.mark.parametrize("order", [False, True])
@pytest.mark.parametrize("format", OTHERS, ids=str)
def test_every_format_can_be_rounded_to(format, order):
    weight, hessian = reference.layer(64, 12)
    result = gptq(weight, hessian, format, order=order)
    grid = format.fit(jnp.asarray(weight), (-2, -1) if format.granularity == "tensor" else (-2,))
    near = format.decode(format.encode(jnp.asarray(weight), grid), grid)
    errors = [reference.error(weight, w, hessian) for w in (value(result, format), near)]
    assert errors[0] < 0.7 * errors[1]
    assert result.codes.dtype == format.container
    again = format.encode(format.decode(result.codes, result.grid), result.grid)
    np.testing.assert_array_equal(again.astype(format.container), result.codes)


def test_a_constant_or_bad_channel_stays_alone():
    weight, hessian = reference.layer(16, 4)
    good = gptq(weight, hessian, Int(4))
    weight[:, 1], weight[3, 2] = 0, np.nan
    result = gptq(weight, hessian, Int(4))
    np.testing.assert_array_equal(result.codes[:, [0, 3]], good.codes[:, [0, 3]])
    new = value(result, Int(4))
    assert (new[:, 1] == 0).all() and np.isnan(new[:, 2]).all()


def test_lowers_everywhere():
    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((48, 16), (48, 48))]
    for format in (Int(4), Int(4, granularity="group", group_size=8)):
        f = jax.jit(lambda w, h, format=format: gptq(w, h, format, order=format == Int(4)))
        for platform in ("cpu", "cuda", "tpu"):
            assert jax.export.export(f, platforms=[platform])(*shapes).platforms == (platform,)


def test_arguments_are_checked():
    weight, hessian = reference.layer(12, 4)
    with pytest.raises(ValueError, match=r"so its Hessian is \[12, 12\].*got \[12, 11\]"):
        gptq(weight, hessian[:, :11], Int(4))
    with pytest.raises(ValueError, match="group_size=8 does not divide the 12 inputs"):
        gptq(weight, hessian, Int(4, granularity="group", group_size=8))
    with pytest.raises(ValueError, match="Hessian has a NaN or an infinity"):
        gptq(weight, hessian * np.nan, Int(4))
    with pytest.raises(TypeError, match="weight is int32; it must be floating"):
        gptq(weight.astype(np.int32), hessian, Int(4))
    with pytest.raises(TypeError, match=r"expected a format, such as `Int\(4\)`"):
        gptq(weight, hessian, 4)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"the weight is `\[..., in, out\]`, got shape \[12\]"):
        gptq(weight[:, 0], hessian, Int(4))
    with pytest.raises(ValueError, match=r"`gptq\(damping=-1, block=128\)`"):
        gptq(weight, hessian, Int(4), damping=-1)
