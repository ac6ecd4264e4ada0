"""Fake quantization against PyTorch, and its gradient under every transformation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jopt.quant import Int, fake_quant, fake_quant_affine

TORCH_TYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}


def torch_case(seed):
    """Random values, scale, zero point and ends; some values are clipped."""
    rng = np.random.default_rng(seed)
    bits = int(rng.integers(2, 9))
    qmin = 0 if rng.random() < 0.5 else -(2 ** (bits - 1))
    qmax = qmin + 2**bits - 1
    x = (rng.normal(size=(7, 11)) * 10.0 ** rng.uniform(-3, 3)).astype(np.float32)
    scale = (np.abs(x).max(0) / 2**bits * rng.uniform(0.3, 3, 11)).astype(np.float32)
    zero = rng.integers(qmin, qmax + 1, 11)
    return x, scale, zero.astype(np.int32), qmin, qmax


def boundary(x, scale, zero):
    """Where the code is within one ulp of a boundary of rounding."""
    place = np.asarray(x, np.float64) / np.asarray(scale, np.float64) + zero
    off = np.abs(place - np.floor(place) - 0.5)
    return off <= np.spacing(np.float32(np.abs(place) + 1))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("seed", range(8))
def test_per_tensor_values_and_gradient_are_those_of_torch(seed, dtype):
    torch = pytest.importorskip("torch")
    x, scales, zeros, qmin, qmax = torch_case(seed)
    scale, zero = float(scales[0]), int(zeros[0])
    theirs_x = torch.tensor(x).to(getattr(torch, dtype)).requires_grad_()
    if not torch.isfinite(theirs_x).all():
        pytest.skip("overflows this dtype")
    theirs = torch.fake_quantize_per_tensor_affine(theirs_x, scale, zero, qmin, qmax)
    theirs.float().sum().backward()

    ours_x = jnp.asarray(theirs_x.detach().float().numpy()).astype(TORCH_TYPES[dtype])

    def f(x):
        return fake_quant_affine(x, jnp.float32(scale), jnp.int32(zero), qmin, qmax)

    ours, back = jax.vjp(f, ours_x)
    (gradient,) = back(jnp.ones_like(ours))
    expected = theirs.detach().float().numpy()
    same = np.asarray(ours, np.float32) == expected
    assert np.all(same | boundary(ours_x, scale, zero))
    assert same.mean() > 0.95
    hit = np.asarray(gradient, np.float32) == theirs_x.grad.float().numpy()
    assert np.all(hit | boundary(ours_x, scale, zero))


@pytest.mark.parametrize("seed", range(12))
def test_per_channel_values_are_those_of_torch(seed):
    torch = pytest.importorskip("torch")
    x, scale, zero, qmin, qmax = torch_case(seed)
    theirs = torch.fake_quantize_per_channel_affine(
        torch.tensor(x), torch.tensor(scale), torch.tensor(zero), 1, qmin, qmax
    ).numpy()
    ours = fake_quant_affine(jnp.asarray(x), scale[None], zero[None], qmin, qmax)
    same = np.asarray(ours) == theirs
    assert np.all(same | boundary(x, scale, zero))
    assert same.mean() > 0.95


def test_affine_keeps_nan_and_clips_infinity():
    x = jnp.array([np.nan, np.inf, -np.inf])
    y = fake_quant_affine(x, jnp.float32(0.5), jnp.int32(0), -4, 3)
    np.testing.assert_array_equal(y, [np.nan, 1.5, -2.0])


def test_affine_steps_may_be_as_large_as_floats():
    x = jnp.array([-3e38, 1e38, 1.4e38, 3e38])
    y = fake_quant_affine(x, jnp.float32(2.0**127), jnp.int32(0), -1, 1)
    np.testing.assert_array_equal(y, np.array([-1, 1, 1, 1], np.float32) * np.float32(2.0**127))


def test_affine_arguments_are_checked():
    x = jnp.ones((2, 3))
    with pytest.raises(ValueError, match="qmin must be below qmax"):
        fake_quant_affine(x, jnp.float32(1), jnp.int32(0), 3, 3)
    with pytest.raises(ValueError, match="must be alike, and scalars or of the rank of x"):
        fake_quant_affine(x, jnp.ones(3), jnp.zeros(3, jnp.int32), 0, 3)


FORMATS = [
    Int(8),
    Int(2),
    Int(4, symmetric=False),
    Int(4, granularity="tensor"),
    Int(4, granularity="group", group_size=4),
    Int(5, rounding="floor"),
]


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_transformations_agree(format):
    dtype = [jnp.float32, jnp.bfloat16, jnp.float16][FORMATS.index(format) % 3]
    x = jax.random.normal(jax.random.key(3), (5, 8, 6)).astype(dtype)
    y = fake_quant(x, format)
    assert y.dtype == dtype and y.shape == x.shape
    compiled = jax.jit(lambda x: fake_quant(x, format))(x)
    constant = jax.jit(lambda: fake_quant(x, format))()
    mapped = jax.vmap(lambda x: fake_quant(x, format))(x)
    _, scanned = jax.lax.scan(lambda c, x: (c, fake_quant(x, format)), 0, x)
    for other in (compiled, constant, mapped, scanned):
        assert np.asarray(other).tobytes() == np.asarray(y).tobytes()


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_the_gradient_passes_straight_through(format):
    x = jax.random.normal(jax.random.key(4), (8, 6))
    tangent = jax.random.normal(jax.random.key(5), (8, 6))

    def f(x):
        return fake_quant(x, format)

    value, moved = jax.jvp(f, (x,), (tangent,))
    np.testing.assert_array_equal(value, f(x))
    np.testing.assert_array_equal(moved, tangent)
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(jax.checkpoint(f)(x) * tangent)))(x)
    np.testing.assert_array_equal(gradient, tangent)


def test_the_gradient_maps_and_differentiates_again():
    x = jax.random.normal(jax.random.key(4), (3, 4, 1))

    def loss(x):
        return jnp.sum(fake_quant(x, Int(4)) ** 2)

    rows = jax.vmap(jax.grad(loss))(x)
    np.testing.assert_array_equal(rows[1], 2 * fake_quant(x[1], Int(4)))
    np.testing.assert_array_equal(jax.hessian(loss)(x[0]).reshape(4, 4), 2 * np.eye(4))


def test_lowers_everywhere():
    x = jax.ShapeDtypeStruct((8, 16), jnp.bfloat16)
    for format in FORMATS:
        for platform in ("cpu", "cuda", "tpu"):
            f = jax.jit(lambda x, format=format: fake_quant(x, format))
            assert jax.export.export(f, platforms=[platform])(x).platforms == (platform,)


def test_arguments_are_checked():
    with pytest.raises(TypeError, match="needs a floating x, got int32"):
        fake_quant(jnp.arange(3), Int(8))
    with pytest.raises(ValueError, match="got a scalar"):
        fake_quant(jnp.float32(1), Int(8))
    with pytest.raises(TypeError, match=r"needs an array, got list; pass `jnp.asarray\(x\)`"):
        fake_quant([1.0, 2.0], Int(8))
    ends = jnp.array([[1.0, 1.0]]), jnp.array([[2.0, 0.5]])
    for reversed_range in [(1.0, -1.0), (jnp.float32(1), jnp.float32(-1)), ends]:
        with pytest.raises(ValueError, match="the lowest value is above the highest"):
            fake_quant(jnp.ones((2, 2)), Int(8), range=reversed_range)
        with pytest.raises(ValueError, match="the lowest value is above the highest"):
            jax.jit(lambda x, r=reversed_range: fake_quant(x, Int(8), range=r))(jnp.ones((2, 2)))
    with pytest.raises(ValueError, match="rounds at random: pass `key=`"):
        fake_quant(jnp.ones((2, 2)), Int(8, rounding="stochastic"))
    with pytest.raises(ValueError, match=r"group_size=3 does not divide the 4 inputs"):
        fake_quant(jnp.ones((4, 2)), Int(8, granularity="group", group_size=3))
