"""Pallas kernels against float64 in interpret mode, and what they lower to."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jopt import quant
from jopt.quant import Int, use_implementation
from jopt.quant._products import kernels as kernels
from jopt.quant._products.operands import Operands
from jopt.trace import explain, lift

FORMATS = {
    "int8": Int(8),
    "int8 affine": Int(8, symmetric=False),
    "int8 tensor": Int(8, granularity="tensor"),
    "int8 group 32": Int(8, granularity="group", group_size=32),
    "int4": Int(4),
    "int4 affine group 64": Int(4, symmetric=False, granularity="group", group_size=64),
    "int4 group 128": Int(4, granularity="group", group_size=128),
    "nf4": quant.NF4(64),
    "fp8": quant.FP8(),
}
CUSTOM_CALLS = {"cuda": "__gpu$xla.gpu.triton", "tpu": "tpu_custom_call"}


def operands(name, rows=3, dtype=jnp.float32, inputs=256, outputs=256):
    rng = np.random.default_rng(0)
    w = jnp.asarray(rng.normal(size=(inputs, outputs)) + 0.2, jnp.float32)
    x = jnp.asarray(rng.normal(size=(rows, inputs)), dtype)
    return x, quant.quantize(w, FORMATS[name])


def run(platform, x, leaf, interpret=False):
    flat = Operands(x, None, leaf, False, None, jnp.dtype(jnp.float32))
    return kernels.product(flat, platform, interpret=interpret)


@pytest.mark.parametrize("name", FORMATS)
def test_kernels_compute_the_product(name):
    for platform, dtype, rows in (("cuda", jnp.float32, 1), ("tpu", jnp.bfloat16, 17)):
        x, leaf = operands(name, rows, dtype)
        y = jax.jit(lambda x, leaf, p=platform: run(p, x, leaf, True))(x, leaf)
        wanted = np.asarray(x, np.float64) @ np.asarray(leaf.materialise(), np.float64)
        # Integers and float8 are exact in bfloat16; the values of NF4 are rounded to it.
        tolerance = 3e-3 if (name, dtype) == ("nf4", jnp.bfloat16) else 2e-6
        np.testing.assert_allclose(y, wanted, rtol=0, atol=tolerance * np.abs(wanted).max())


@pytest.mark.parametrize("platform", CUSTOM_CALLS)
@pytest.mark.parametrize("name", FORMATS)
def test_kernels_lower(name, platform):
    if platform == "cuda" and jax.__version_info__ >= (0, 11):
        pytest.skip("this JAX lowers Triton kernels only where there is a GPU")
    x, leaf = operands(name, dtype=jnp.bfloat16)
    leaf = dataclasses.replace(leaf, value_dtype=jnp.dtype(jnp.bfloat16))
    with use_implementation("pallas"):
        assert "`pallas` on cuda/tpu (as asked for)" in explain(lambda w, x: x @ w, leaf, x)[-1].how
        allowed = [jax.export.DisabledSafetyCheck.custom_call(CUSTOM_CALLS["cuda"])]
        export = jax.export.export(
            jax.jit(lift(lambda w, x: x @ w)), platforms=[platform], disabled_checks=allowed
        )
        assert export(leaf, x).mlir_module().count(f"@{CUSTOM_CALLS[platform]}(") == 1


def test_without_a_compiler_for_kernels_the_product_is_dense():
    x, leaf = operands("int4")
    with use_implementation("pallas"):
        y = jax.jit(lift(lambda w, x: x @ w))(leaf, x)
        gradient = jax.jit(jax.grad(lambda x: jnp.sum(lift(lambda w, x: x @ w)(leaf, x))))(x)
    np.testing.assert_allclose(y, x @ leaf.materialise(), rtol=1e-6)
    np.testing.assert_allclose(gradient[0], leaf.materialise().sum(1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(0, 4), (0, 0), (4, 0)])
@pytest.mark.parametrize("format", [quant.NF4(4), Int(4, granularity="group", group_size=4)])
def test_products_of_empty_weights(format, shape):
    leaf = quant.quantize({"w": jnp.ones(shape)}, [("w", format)])["w"]
    y = lift(lambda w, x: x @ w)(leaf, jnp.ones((3, shape[0])))
    np.testing.assert_array_equal(y, np.zeros((3, shape[1])))


def test_what_kernels_do_not_serve():
    x, leaf = operands("int8")
    flat = Operands(x, None, leaf, False, None, x.dtype)
    assert kernels.serves(flat)
    assert not kernels.serves(flat._replace(turned=True))
    assert not kernels.serves(flat._replace(x=jnp.ones((512, 256))))
    assert not kernels.serves(flat._replace(x=jnp.ones((2, 256), jnp.int8)))
    odd, other = operands("int8", outputs=100)
    assert not kernels.serves(flat._replace(x=odd, leaf=other))
