"""AdaRound against a float64 version and against all choices, and its properties."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rounding_reference as reference

from jopt.quant import Codebook, Int, adaround

FORMATS = [
    Int(4),
    Int(2),
    Int(3, symmetric=False),
    Int(4, granularity="group", group_size=12),
    Int(4, granularity="tensor"),
]


def value(rounded, format):
    return np.asarray(format.decode(rounded.codes, rounded.grid))


def nearest(weight, format):
    axes = (-2, -1) if format.granularity == "tensor" else (-2,)
    grid = format.fit(jnp.asarray(weight), axes)
    codes = format.encode(jnp.asarray(weight), grid)
    return np.asarray(codes), np.asarray(format.decode(codes, grid))


@pytest.mark.parametrize("seed", range(3))
def test_the_training_is_that_of_float64(seed):
    weight, hessian = reference.layer(24, 10, seed, samples=100)
    ours = value(adaround(weight, hessian, Int(4), steps=200, rate=0.05), Int(4))
    theirs = reference.up_or_down(weight, hessian, 4, 200, rate=0.05)
    assert np.isclose(ours, theirs, atol=1e-5).mean() > 0.95
    errors = [reference.error(weight, w, hessian) for w in (ours, theirs)]
    assert errors[0] == pytest.approx(errors[1], rel=0.05)


def test_it_comes_near_the_best_of_all_choices():
    weight, _ = reference.layer(8, 6)
    x = np.random.default_rng(0).normal(size=(50, 8)) + 0.7
    hessian = (x.T @ x).astype(np.float32)
    ours = value(adaround(weight, hessian, Int(3)), Int(3))
    scale = np.abs(weight).max(0) / 3
    low = np.floor(weight / scale)
    best = 0.0
    for k in range(6):
        choices = np.array(list(itertools.product([0, 1], repeat=8)))
        rounded = np.clip(low[:, k] + choices, -3, 3) * scale[k]
        d = weight[:, k] - rounded
        best += np.min(np.einsum("ni,ij,nj->n", d, hessian, d))
    assert reference.error(weight, ours, hessian) < 1.15 * best
    near = reference.error(weight, nearest(weight, Int(3))[1], hessian)
    assert near > 1.2 * best


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_outputs_get_no_worse_and_codes_stay_within_a_step(format):
    weight, hessian = reference.layer(24, 10)
    result = adaround(weight, hessian, format, steps=300)
    codes, near = nearest(weight, format)
    moved = np.asarray(result.codes, np.int32) - codes
    assert set(np.unique(moved)) <= {-1, 0, 1} and np.any(moved)
    axes = (-2, -1) if format.granularity == "tensor" else (-2,)
    step = np.asarray(format.fit(jnp.asarray(weight), axes).scale)
    step = np.repeat(step, 24 // step.shape[0], 0)
    assert np.all(np.abs(weight - value(result, format)) <= step * 1.0001)
    for k in range(10):
        errors = [
            reference.error(weight[:, k], w[:, k], hessian) for w in (value(result, format), near)
        ]
        assert errors[0] <= errors[1] * 1.0001
    whole = [reference.error(weight, w, hessian) for w in (value(result, format), near)]
    assert whole[0] < 0.9 * whole[1]


def test_without_correlations_it_rounds_to_nearest():
    weight, _ = reference.layer(24, 10)
    for hessian in (np.eye(24, dtype=np.float32) * 3, np.zeros((24, 24), np.float32)):
        result = adaround(weight, hessian, Int(4), steps=100)
        np.testing.assert_array_equal(
            np.asarray(result.codes, np.int32), nearest(weight, Int(4))[0]
        )


def test_layers_map_and_jit_and_bfloat16():
    layers = [reference.layer(12, 4, seed) for seed in range(2)]
    weights, hessians = (np.stack(part) for part in zip(*layers, strict=True))
    batched = jax.jit(lambda w, h: adaround(w, h, Int(4), steps=50))(weights, hessians)
    one = adaround(*layers[1], Int(4), steps=50)
    assert np.mean(np.asarray(batched.codes[1]) == np.asarray(one.codes)) > 0.9
    small = jnp.asarray(weights).astype(jnp.bfloat16)
    assert adaround(small, hessians, Int(4), steps=2).codes.dtype == jnp.int4


def test_lowers_everywhere():
    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((24, 8), (24, 24))]
    for platform in ("cpu", "cuda", "tpu"):
        f = jax.jit(lambda w, h: adaround(w, h, Int(4)))
        assert jax.export.export(f, platforms=[platform])(*shapes).platforms == (platform,)


def test_a_bad_channel_stays_alone_and_arguments_are_checked():
    weight, hessian = reference.layer(12, 4)
    weight[:, 1], weight[3, 2] = 0, np.nan
    result = value(adaround(weight, hessian, Int(4), steps=20), Int(4))
    assert (result[:, 1] == 0).all() and np.isnan(result[:, 2]).all()
    assert np.isfinite(result[:, [0, 3]]).all()
    with pytest.raises(TypeError, match="rounds up or down by one code: give it an `Int`"):
        adaround(weight, hessian, Codebook(8))
    with pytest.raises(ValueError, match="Hessian has a NaN"):
        adaround(weight, hessian * np.nan, Int(4))
    with pytest.raises(ValueError, match=r"steps=-1.*steps and strength at least 0"):
        adaround(weight, hessian, Int(4), steps=-1)
