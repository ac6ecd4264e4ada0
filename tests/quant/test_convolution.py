"""Convolutions on integers against a NumPy simulation, and what all products lower to."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quant_reference import SPECS, W8, int8_products, integers, shifted, weight

from jopt.quant import Int, Spec, qat, quantize
from jopt.trace import lift


def convolved(x, w, strides, padding, lhs_dilation, rhs_dilation, groups):
    """A convolution of `[n, h, w, c]` with `[h, w, in, out]`, written out, in any dtype."""
    n, *size, channels = x.shape
    wide = [(s - 1) * d + 1 for s, d in zip(size, lhs_dilation, strict=True)]
    holes = np.zeros((n, *wide, channels), x.dtype)
    holes[:, :: lhs_dilation[0], :: lhs_dilation[1]] = x
    x = np.pad(holes, ((0, 0), *padding, (0, 0)))
    kh, kw, per_group, outputs = w.shape
    rows = (x.shape[1] - (kh - 1) * rhs_dilation[0] - 1) // strides[0] + 1
    columns = (x.shape[2] - (kw - 1) * rhs_dilation[1] - 1) // strides[1] + 1
    y = np.zeros((n, rows, columns, outputs), x.dtype)
    for o, i, j in itertools.product(range(outputs), range(kh), range(kw)):
        first = o // (outputs // groups) * per_group
        window = x[
            :,
            i * rhs_dilation[0] :: strides[0],
            j * rhs_dilation[1] :: strides[1],
            first : first + per_group,
        ][:, :rows, :columns]
        y[..., o] += window @ w[i, j, :, o]
    return y


CONVOLUTIONS = {  # strides, padding, lhs dilation, rhs dilation, groups, kernel
    "same": ((1, 1), ((1, 1), (1, 1)), (1, 1), (1, 1), 1, (3, 3, 4, 6)),
    "valid": ((1, 1), ((0, 0), (0, 0)), (1, 1), (1, 1), 1, (3, 3, 4, 6)),
    "strided": ((2, 1), ((1, 0), (2, 1)), (1, 1), (1, 1), 1, (3, 2, 4, 6)),
    "dilated": ((1, 1), ((2, 2), (0, 0)), (1, 1), (2, 1), 1, (3, 3, 4, 6)),
    "transposed": ((1, 1), ((2, 2), (2, 2)), (2, 2), (1, 1), 1, (3, 3, 4, 6)),
    "grouped": ((1, 1), ((1, 1), (1, 1)), (1, 1), (1, 1), 2, (3, 3, 2, 6)),
    "depthwise": ((1, 1), ((1, 1), (1, 1)), (1, 1), (1, 1), 4, (3, 3, 1, 8)),
}


@pytest.mark.parametrize("affine", [False, True], ids=["symmetric", "affine"])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolution_equals_the_integer_simulation(name, affine):
    strides, padding, lhs_dilation, rhs_dilation, groups, kernel = CONVOLUTIONS[name]
    spec, rng = SPECS["both affine" if affine else "w8a8"], np.random.default_rng(2)
    x = rng.normal(size=(2, 5, 6, 4)).astype(np.float32) + 0.7
    leaf = quantize({"w": rng.normal(size=kernel).astype(np.float32)}, spec)["w"]
    assert leaf.scale.shape == (1, 1, 1, kernel[-1])

    def f(w, x):
        return jax.lax.conv_general_dilated(
            x, w, strides, padding, lhs_dilation, rhs_dilation, ("NHWC", "HWIO", "NHWC"), groups
        )

    lifted = lift(f)
    assert int8_products(lifted, leaf, x) == 1 + affine
    codes, scale = integers(x, spec.activation)
    w_codes, w_scale = shifted(leaf)
    options = (strides, padding, lhs_dilation, rhs_dilation, groups)
    expected = convolved(codes, w_codes, *options) * (np.float64(scale) * w_scale)
    np.testing.assert_allclose(jax.jit(lifted)(leaf, x), expected, rtol=1e-5, atol=1e-6)
    plain = convolved(x.astype(np.float64), np.asarray(leaf.materialise(), np.float64), *options)
    np.testing.assert_allclose(expected, plain, atol=0.3)


def test_convolution_in_another_layout_with_a_static_range():
    rng = np.random.default_rng(3)
    spec = Spec(W8, Int(8, symmetric=False), static=True)
    x = rng.normal(size=(2, 4, 6)).astype(np.float32)  # batch, feature, width
    leaf = weight(rng.normal(size=(5, 4, 3)).astype(np.float32), spec, (-2, -1), (-1.0, 2.5))

    def f(w, x):
        return jax.lax.conv_general_dilated(
            x, w, (1,), "SAME", dimension_numbers=("NCH", "OIH", "NCH")
        )

    codes, scale = integers(x, spec.activation, -1.0, 2.5)
    w_codes, w_scale = shifted(leaf)
    expected = convolved(
        codes.transpose(0, 2, 1)[:, None],
        w_codes.transpose(2, 1, 0)[None],
        *((1, 1), ((0, 0), (1, 1)), (1, 1), (1, 1), 1),
    )[:, 0].transpose(0, 2, 1) * (np.float64(scale) * w_scale.reshape(1, 5, 1))
    np.testing.assert_allclose(jax.jit(lift(f))(leaf, x), expected, rtol=1e-5, atol=1e-6)


def test_training_and_integers_have_one_derivative():
    rng = np.random.default_rng(5)
    x = jnp.asarray(rng.normal(size=(2, 5, 5, 3)), jnp.float32)
    params = {"w": jnp.asarray(rng.normal(size=(3, 3, 3, 4)), jnp.float32)}

    def f(params, x):
        return jax.lax.conv_general_dilated(
            x, params["w"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    spec = Spec(Int(4), Int(8, symmetric=False))
    trained, stored = qat(params, spec), quantize(params, spec)
    one, other = (jax.jit(lift(f))(p, x) for p in (trained, stored))
    np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)
    one, other = (
        jax.grad(lambda x, p=p: jnp.sum(lift(f)(p, x) ** 2))(x) for p in (trained, stored)
    )
    np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["w8a8", "both affine"])
def test_lowers_everywhere(name):
    dense = quantize({"w": jnp.ones((8, 4))}, SPECS[name])
    kernel = quantize({"w": jnp.ones((3, 3, 2, 4))}, SPECS[name])

    def matmul(params, x):
        return x @ params["w"]

    def conv(params, x):
        return jax.lax.conv_general_dilated(
            x, params["w"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    def lowered(f, platforms, *args):
        return jax.export.export(jax.jit(f), platforms=platforms)(*args).mlir_module()

    def gradient(f):
        return lambda params, x: jax.grad(lambda x: jnp.sum(lift(f)(params, x)))(x)

    for f, params, shape in ((matmul, dense, (2, 8)), (conv, kernel, (1, 4, 4, 2))):
        args = (params, jax.ShapeDtypeStruct(shape, jnp.float32))
        lowered(lift(f), ["cpu", "cuda", "tpu"], *args)
        lowered(gradient(f), ["cpu", "cuda", "tpu"], *args)
        batch = jax.export.symbolic_shape("b")  # any batch size
        some = jax.ShapeDtypeStruct((*batch, *shape[1:]), jnp.float32)
        exported = jax.export.export(jax.jit(lift(f)))(params, some)
        x = jax.random.normal(jax.random.key(0), (3, *shape[1:]))
        np.testing.assert_allclose(
            exported.call(params, x), jax.jit(lift(f))(params, x), rtol=1e-5, atol=1e-6
        )
    for platform, whole in (("cpu", True), ("tpu", True), ("cuda", False)):
        text = lowered(lift(conv), [platform], *args)
        products = [line for line in text.splitlines() if "stablehlo.convolution" in line]
        assert products and all(("xi8>" in line) == whole for line in products)
