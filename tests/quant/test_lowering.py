"""Implementations of one product against float64, which of them is chosen, and its derivative."""

import functools
import os
import re
import stat
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from quant_reference import integers

from jopt import quant
from jopt.quant import BFloat16, Int, Spec, use_implementation, use_table
from jopt.quant._products import lowering as lowering
from jopt.quant._products import timings as timings
from jopt.quant._products.implementations import NAMES
from jopt.trace import explain, lift, sites

GROUPS = Int(4, granularity="group", group_size=32)
AFFINE = Int(8, symmetric=False)
TOKEN = Int(8, symmetric=False, granularity="token")


def product(turned):
    return (lambda w, x: jnp.einsum("bi,oi->bo", x, w)) if turned else (lambda w, x: x @ w)


def operands(spec, rows, turned=False, inputs=64, outputs=384):
    """The function, a weight that it sums over the right axis, and an activation."""
    rng = np.random.default_rng(0)
    shape = (outputs, inputs) if turned else (inputs, outputs)
    w = jnp.asarray(rng.normal(size=shape) + 0.2, jnp.float32)
    x = jnp.asarray(rng.normal(size=(rows, inputs)), jnp.float32)
    f = product(turned)
    return f, quant.quantize(w, spec, sites=sites(f, w, x)), x


def expected(leaf, x, turned):
    """Rounded activation times dequantized weight in float64."""
    x, w = np.asarray(x), np.asarray(leaf.materialise(), np.float64)
    if isinstance(leaf.activation, BFloat16):
        x = np.asarray(jnp.asarray(x).astype(jnp.bfloat16), np.float64)
    elif leaf.activation is not None:
        rows = [x] if leaf.activation.granularity != "token" else np.split(x, len(x))
        pairs = [integers(row, leaf.activation) for row in rows]
        x = np.concatenate([codes * np.float64(scale) for codes, scale in pairs])
    return np.asarray(x, np.float64) @ (w.T if turned else w)


def computed(f, leaf, x, name):
    with use_implementation(name):
        how = explain(f, leaf, x)[-1].how
        return how, np.asarray(jax.jit(lift(f))(leaf, x))


CASES = [  # weight, activation, rows, turned, implementations
    (Int(8), Int(8), 1, False, "padded bfloat16 integers dense"),
    (AFFINE, AFFINE, 1, False, "padded bfloat16"),
    (AFFINE, TOKEN, 3, False, "integers bfloat16 dense"),
    (Int(4, symmetric=False), TOKEN, 3, False, "paired_integers paired_bfloat16 bfloat16"),
    (Int(4, symmetric=False), AFFINE, 1, True, "padded paired_padded paired_bfloat16"),
    (Int(4, granularity="tensor"), Int(8), 3, True, "paired_integers"),
    (GROUPS, AFFINE, 3, False, "grouped paired_grouped grouped_bfloat16 dense"),
    (GROUPS, TOKEN, 1, True, "grouped paired_grouped paired_grouped_bfloat16"),
    (Int(8), None, 1, False, "tiled tiled_wide padded_dense dense"),
    (GROUPS, None, 3, True, "tiled paired_tiled paired_dense"),
    (Int(4, symmetric=False), None, 3, False, "paired_tiled tiled_wide"),
    (quant.NF4(32), None, 1, False, "tiled paired_tiled"),
    (Int(8), BFloat16(), 1, False, "bfloat16"),
    (Int(4, symmetric=False), BFloat16(), 3, True, "paired_bfloat16 bfloat16"),
    (GROUPS, BFloat16(), 3, False, "grouped_bfloat16 paired_grouped_bfloat16"),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: str(CASES.index(case)))
def test_implementations_compute_the_product(case):
    weight, activation, rows, turned, names = case
    f, leaf, x = operands(Spec(weight, activation), rows, turned)
    wanted = expected(leaf, x, turned)
    for name in names.split():
        how, y = computed(f, leaf, x, name)
        if name not in ("integers", "dense") and (name, activation) != ("bfloat16", BFloat16()):
            assert f"`{name}` on cpu/cuda/rocm/tpu (as asked for)" in how
        np.testing.assert_allclose(y, wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())


UINT4 = Int(4, symmetric=False)
WIDE = [  # weight, activation, rows, turned, outputs, implementations
    (Int(8), None, 3, False, 641, "tiled_half"),
    (Int(8), None, 1, True, 640, "tiled_half"),
    (UINT4, None, 1, False, 640, "tiled_half paired_tiled_half"),
    (GROUPS, None, 3, True, 640, "tiled_half paired_tiled_half"),
    (quant.NF4(32), None, 3, False, 640, "paired_tiled_half"),
    (AFFINE, BFloat16(), 1, False, 641, "tiled_half"),
    (UINT4, BFloat16(), 3, False, 1040, "tiled_half paired_tiled_half"),
    (UINT4, BFloat16(), 3, True, 640, "tiled_half paired_tiled_half"),
]


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("case", WIDE, ids=lambda case: str(WIDE.index(case)))
def test_implementations_of_wide_weights(case, devices, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: devices)
    weight, activation, rows, turned, outputs, names = case
    f, leaf, x = operands(Spec(weight, activation), rows, turned, outputs=outputs)
    wanted = expected(leaf, x, turned)
    for name in names.split():
        how, y = computed(f, leaf, x, name)
        assert f"`{name}` on cpu/cuda/rocm/tpu (as asked for)" in how
        np.testing.assert_allclose(y, wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())


SHIFTED = [  # weight, activation, rows, turned, implementations
    (Int(8), TOKEN, 3, False, "integers"),
    (AFFINE, AFFINE, 1, False, "padded integers"),
    (AFFINE, TOKEN, 3, True, "integers"),
    (Int(4), AFFINE, 3, True, "paired_integers"),
    (GROUPS, TOKEN, 3, False, "grouped paired_grouped"),
]


@pytest.mark.parametrize("case", SHIFTED, ids=lambda case: str(SHIFTED.index(case)))
def test_zero_points_of_activations_on_one_device(case, monkeypatch):
    """A row of ones sums the weight's codes there, to the same bits as a sum."""
    weight, activation, rows, turned, names = case
    f, leaf, x = operands(Spec(weight, activation), rows, turned)
    for name in names.split():
        monkeypatch.setattr(jax, "device_count", lambda: 8)
        wanted = computed(f, leaf, x, name)[1]
        monkeypatch.setattr(jax, "device_count", lambda: 1)
        program = str(jax.make_jaxpr(lambda w, x: lift(f)(w, x))(leaf, x))
        assert "concatenate" in program or name != "integers"
        np.testing.assert_array_equal(computed(f, leaf, x, name)[1], wanted)
    reference = expected(leaf, x, turned)
    np.testing.assert_allclose(wanted, reference, rtol=1e-5, atol=1e-5 * np.abs(reference).max())


@pytest.mark.parametrize("format", [Int(8), AFFINE, UINT4, Int(4)], ids=str)
@pytest.mark.parametrize("rows", [1, 3])
def test_blocks_of_inputs_give_the_same_bits(format, rows):
    """Sums in int32 do not depend on their order; 2,500 inputs are two blocks and a rest."""
    for activation in (Int(8), TOKEN):
        f, leaf, x = operands(Spec(format, activation), rows, inputs=2500, outputs=32)
        wanted = computed(f, leaf, x, "integers")[1]
        for name in ["blocked"] + ["paired_blocked"] * (format.bits == 4):
            how, one = computed(f, leaf, x, name)
            assert f"`{name}` on cpu/cuda/rocm/tpu (as asked for)" in how
            np.testing.assert_array_equal(one, wanted)


STRIPES = [  # weight, turned, inputs, rows, dtype, implementations
    (Int(8), False, 1100, 3, jnp.float32, "striped"),
    (UINT4, True, 1100, 1, jnp.float32, "striped"),
    (UINT4, False, 1100, 1, jnp.float32, "striped paired_striped"),
    (Int(4), False, 1024, 3, jnp.float16, "paired_striped"),
    (Int(8, symmetric=False), False, 1024, 3, jnp.float16, "striped"),
    (Int(4, granularity="group", group_size=64), False, 1152, 3, jnp.float32, "paired_striped"),
    (Int(4, granularity="group", group_size=64), True, 1152, 3, jnp.float16, "striped"),
    (quant.NF4(32), False, 1056, 3, jnp.float32, "striped paired_striped"),
    (quant.MX("mxfp8"), True, 1056, 3, jnp.float32, "striped"),
    (Int(8), False, 1024, 1, jnp.float32, "striped"),
    (Int(8, symmetric=False), True, 1536, 3, jnp.float32, "striped"),
    (Int(4, granularity="group", group_size=128), False, 2048, 3, jnp.float32, "striped"),
    (Int(8), False, 1280, 3, jnp.bfloat16, "striped"),
    (Int(8), False, 1100, 3, jnp.bfloat16, "striped bfloat16"),
    (Int(8, symmetric=False), True, 1100, 1, jnp.bfloat16, "striped bfloat16"),
    (UINT4, False, 1100, 3, jnp.bfloat16, "striped paired_striped paired_bfloat16"),
    (quant.NF4(32), False, 1056, 3, jnp.bfloat16, "striped paired_striped tiled_narrow"),
]
LAST_PLACES = {jnp.float32: 1e-5, jnp.float16: 2e-3, jnp.bfloat16: 1e-2}


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("case", STRIPES, ids=lambda case: str(STRIPES.index(case)))
def test_stripes_of_inputs(case, devices, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: devices)
    weight, turned, inputs, rows, dtype, names = case
    f, rng = product(turned), np.random.default_rng(0)
    w = jnp.asarray(rng.normal(size=(72, inputs) if turned else (inputs, 72)), dtype)
    x = jnp.asarray(rng.normal(size=(rows, inputs)), dtype)
    leaf = quant.quantize(w, Spec(weight), sites=sites(f, w, x))
    wanted = expected(leaf, x.astype(jnp.float32), turned)
    for name in names.split():
        how, y = computed(f, leaf, x, name)
        assert f"`{name}` on cpu/cuda/rocm/tpu (as asked for)" in how
        assert y.dtype == dtype
        limit = LAST_PLACES[dtype]
        close = {"rtol": limit, "atol": limit * np.abs(wanted).max()}
        np.testing.assert_allclose(np.asarray(y, np.float64), wanted, **close)


@pytest.mark.parametrize("inputs", [1024, 2048])
def test_three_parts_of_a_weight_are_dense_at_a_time(inputs, monkeypatch):
    """On one device short stripes are no loop, and still wait: within a layer and between them."""
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    w = jax.random.normal(jax.random.key(0), (inputs, inputs))
    leaves = [quant.quantize(w, Spec(Int(8))) for _ in range(4)]
    x = jnp.ones((4, inputs))

    def f(leaves, x):
        for w in leaves:
            x = jnp.tanh(x @ w)
        return x

    def stripes(f, x):
        with quant.use_implementation("striped"):
            compiled = jax.jit(f).lower(leaves, x).compile()
        return compiled.as_text(), compiled.memory_analysis().temp_size_in_bytes

    part = 4 * 256 * inputs
    text, temporary = stripes(lift(f), x)
    assert "while(" not in text
    assert temporary < 3.2 * part
    # A batch of indices would be a slice of codes for each of its members.
    batch = jax.vmap(lift(f), in_axes=(None, 0))
    text, temporary = stripes(batch, jnp.stack([x, x]))
    assert "gather(" not in text
    assert temporary < 3.4 * part


@pytest.mark.parametrize("name, format", [("tiled_half", Int(8)), ("paired_tiled_half", Int(4))])
def test_half_of_a_weight_is_dense_at_a_time(name, format, monkeypatch):
    """On one device halves are no loop either, and wait: within a layer and between them."""
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    size = 1024
    w = jax.random.normal(jax.random.key(0), (size, size))
    leaves = [quant.quantize(w, Spec(format)) for _ in range(4)]

    def f(leaves, x):
        for w in leaves:
            x = jnp.tanh(x @ w)
        return x

    for apply, x in (
        (lift(f), jnp.ones((4, size))),
        (jax.vmap(lift(f), in_axes=(None, 0)), jnp.ones((2, 4, size))),
    ):
        with quant.use_implementation(name):
            compiled = jax.jit(apply).lower(leaves, x).compile()
        assert "while(" not in compiled.as_text()
        # Codes of four bits lie beside it, two to a byte, those of all layers from the start.
        codes = len(leaves) * size**2 // 2 if format.bits == 4 else 0
        assert compiled.memory_analysis().temp_size_in_bytes < 1.05 * (2 * size**2 + codes)


def test_stripes_of_nothing(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    for outputs, batch in ((16, (0, 3)), (0, (2, 3))):
        leaf = quant.quantize(jnp.ones((1024, outputs)), Spec(Int(8)))
        with quant.use_implementation("striped"):
            product = jax.jit(jax.vmap(lift(lambda w, x: x @ w), (None, 0)))
            assert product(leaf, jnp.zeros((*batch, 1024))).shape == (*batch, outputs)


@pytest.mark.parametrize("activation", [None, BFloat16()], ids=str)
@pytest.mark.parametrize("weight", [Int(8), Int(4)], ids=str)
def test_stripes_of_inputs_in_bfloat16_sum_in_float32(weight, activation):
    """Exact products of codes, summed in float32: far below the last place of bfloat16."""
    rng = np.random.default_rng(0)
    dtype = jnp.float32 if activation else jnp.bfloat16
    w = jnp.asarray(rng.normal(size=(1100, 72)), dtype)
    x = jnp.asarray(rng.normal(size=(3, 1100)), jnp.bfloat16).astype(dtype)
    leaf = quant.quantize(w, Spec(weight, activation))

    def f(w, x):
        return jnp.dot(x, w, preferred_element_type=jnp.float32)

    scaled = np.asarray(leaf.codes, np.float64) * np.asarray(leaf.scale, np.float64)
    wanted = np.asarray(x, np.float64) @ scaled
    for name in ["striped"] + ["paired_striped"] * (weight.bits == 4):
        how, y = computed(f, leaf, x, name)
        assert f"`{name}` on cpu" in how
        np.testing.assert_allclose(y, wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("activation", [None, BFloat16(), Int(8)], ids=str)
def test_codes_do_not_stand_for_what_was_rounded_since(activation):
    """A weight that the function casts to float8 is met as that, not by its codes."""
    rng = np.random.default_rng(0)
    w = jnp.asarray(rng.normal(size=(1024, 16)), jnp.float32)
    leaf = quant.quantize(w, Spec(Int(8), activation))
    x = jnp.asarray(rng.integers(-127, 128, size=(3, 1024)), jnp.bfloat16).at[:, 0].set(127)

    def f(w, x):
        return x @ w.astype(jnp.float8_e4m3fn).astype(jnp.bfloat16)

    wanted = np.asarray(f(leaf.materialise(), x), np.float64)
    assert activation is None or "float8_e4m3fn" in explain(f, leaf, x)[-1].how
    for name in ("striped", "bfloat16", "integers", "dense"):
        y = np.asarray(computed(f, leaf, x, name)[1], np.float64)
        np.testing.assert_allclose(y, wanted, rtol=1e-2, atol=1e-2 * np.abs(wanted).max())


def test_a_bfloat16_model_is_measured_as_one(monkeypatch):
    """Weights alone met by bfloat16 take the times of `a16`, and are not made dense."""
    on_a_cpu_with(NEW, monkeypatch)
    leaf = quant.quantize(jnp.ones((2048, 2048), jnp.bfloat16), Spec(Int(8)))
    how = explain(lambda w, x: x @ w, leaf, jnp.ones((8, 2048), jnp.bfloat16))[-1].how
    assert "`striped` on cpu (measured at 8×2048×2048" in how


PAIRED = ["dense", "tiled_narrow", "tiled", "tiled_wide", "tiled_half"]


@pytest.mark.parametrize("name", [f"paired_{name}" for name in PAIRED])
def test_pairs_of_inputs_are_summed_in_float32(name):
    """Even inputs add up to more than float16 has, odd ones to as much below zero."""
    f = product(True)
    w = jnp.tile(jnp.asarray([1.0, -1.0], jnp.float16), (640, 512))
    x = jnp.full((3, 1024), 200.0, jnp.float16).at[:, 0].set(300.0)
    leaf = quant.quantize(w, Spec(Int(4)), sites=sites(f, w, x))
    how, y = computed(f, leaf, x, name)
    assert f"`{name}` on cpu" in how
    assert y.dtype == np.float16
    np.testing.assert_array_equal(y, 100.0)


@pytest.mark.parametrize("name", ["paired_dense", "paired_integers", "paired_bfloat16"])
def test_pairs_of_no_rows(name):
    activation = {"paired_integers": Int(8), "paired_bfloat16": BFloat16()}.get(name)
    f, leaf, _ = operands(Spec(Int(4), activation), 1)
    assert computed(f, leaf, jnp.zeros((0, 64)), name)[1].shape == (0, 384)


def test_bfloat16_rounds_weights_that_have_no_integer_codes():
    """On every platform, and where no time was measured."""
    f, leaf, x = operands(Spec(quant.NF4(64), BFloat16()), 8, inputs=1024, outputs=128)
    assert "`" not in explain(f, leaf, x)[-1].how  # the plain form everywhere
    rounded = np.asarray(leaf.materialise().astype(jnp.bfloat16), np.float64)
    wanted = np.asarray(x.astype(jnp.bfloat16), np.float64) @ rounded
    np.testing.assert_allclose(lift(f)(leaf, x), wanted, rtol=1e-4, atol=1e-4)
    wide = quant.quantize(jnp.ones((2048, 2048)), Spec(Int(8), BFloat16()))
    assert "dense" not in explain(f, wide, jnp.ones((8, 2048)))[-1].how


def test_stripes_end_with_groups():
    """512 inputs are no whole number of groups of 96, and the stripes are left to others."""
    f, leaf, x = operands(Spec(Int(8, granularity="group", group_size=96)), 3, inputs=1152)
    assert "striped" not in computed(f, leaf, x, "striped")[0]


def test_bfloat16_rounds_the_activation_and_nothing_else():
    # A row of ones times codes: the sum of integers is exact, which rounded weights' is not.
    leaf = quant.quantize(jnp.linspace(-1, 1, 96)[:, None], Spec(Int(8), BFloat16()))
    y = lift(lambda w, x: x @ w)(leaf, jnp.ones((2, 96)))
    exact = np.asarray(leaf.codes, np.int64).sum() * np.float64(leaf.scale[0, 0])
    np.testing.assert_allclose(y, np.full((2, 1), exact), rtol=1e-7)
    group = quant.quantize(jnp.ones((8, 4)) / 3, Spec(quant.NF4(4), BFloat16()))
    assert "bfloat16" in explain(lambda w, x: x @ w, group, jnp.ones((2, 8)))[-1].how
    kernel = quant.quantize(jnp.ones((3, 3, 2, 4)), Spec(Int(8), BFloat16()))

    def conv(w, x):
        return jax.lax.conv(x.transpose(0, 3, 1, 2), w.transpose(3, 2, 0, 1), (1, 1), "SAME")

    y = jax.jit(lift(conv))(kernel, jnp.full((1, 5, 5, 2), 1.001))
    np.testing.assert_allclose(y[0, 0, 2, 2], 18.0, rtol=1e-6)


@pytest.mark.parametrize("spec", [Spec(GROUPS, Int(8)), Spec(Int(4)), Spec(Int(8), BFloat16())])
def test_derivatives_are_those_of_the_dense_form(spec):
    f, leaf, x = operands(spec, 3)
    name = {GROUPS: "paired_grouped", Int(4): "paired_tiled"}.get(spec.weight, "bfloat16")

    def loss(x, leaf):
        return jnp.sum(jnp.sin(lift(f)(leaf, x)))

    def gradients():
        found = jax.jit(jax.grad(loss, argnums=(0, 1), allow_int=True))(x, leaf)
        return found[0], found[1].scale

    with use_implementation(name):
        ours = gradients()
    w = np.asarray(leaf.materialise(), np.float64)
    cotangent = np.cos(expected(leaf, x, False))
    np.testing.assert_allclose(ours[0], cotangent @ w.T, rtol=1e-3, atol=1e-3)
    with use_implementation("dense"):
        theirs = gradients()
    np.testing.assert_allclose(ours[1], theirs[1], rtol=1e-3, atol=1e-3)


def test_tokens_have_scales_of_their_own():
    f, leaf, x = operands(Spec(Int(8), Int(8, granularity="token")), 4)
    x = x.at[2].multiply(1e-4)  # beside the others it would round to zero
    y = np.asarray(lift(f)(leaf, x))
    wanted = np.asarray(x, np.float64) @ np.asarray(leaf.materialise(), np.float64)
    error = np.abs(y - wanted).max(1) / np.abs(wanted).max(1)
    assert error.max() < 0.02
    trained = quant.qat(leaf.materialise(), Spec(Int(8), Int(8, granularity="token")))
    np.testing.assert_allclose(lift(f)(trained, x), y, rtol=1e-3, atol=1e-5)
    with pytest.raises(ValueError, match="tokens are rows of an activation"):
        Spec(Int(8, granularity="token"))
    with pytest.raises(ValueError, match="found in each call"):
        Spec(Int(8), Int(8, granularity="token"), static=True)


@pytest.mark.parametrize("symmetric", [True, False])
def test_tokens_of_a_convolution_are_examples(symmetric):
    spec = Spec(Int(8), Int(8, symmetric=symmetric, granularity="token"))
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.normal(size=(3, 6, 6, 4)) + 0.5, jnp.float32) * jnp.array(
        [1.0, 1e-4, 10.0]
    ).reshape(3, 1, 1, 1)
    leaf = quant.quantize(jnp.asarray(rng.normal(size=(3, 3, 4, 5)), jnp.float32), spec)

    def f(w, x):
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=numbers)

    together = jax.jit(lift(f))(leaf, x)
    one = jax.jit(lift(f))
    apart = jnp.concatenate([one(leaf, x[i : i + 1]) for i in range(3)])
    np.testing.assert_allclose(together, apart, rtol=1e-5, atol=1e-7)
    plain = np.asarray(f(leaf.materialise(), x))
    error = np.abs(together - plain).max((1, 2, 3)) / np.abs(plain).max((1, 2, 3))
    assert error.max() < 0.02


# What is chosen.


def table(**times):
    entry = quant.Timing("w8a8", 64, 1024, 1024, tuple(times.items()))
    return quant.Timings("cpu", "here", jax.__version__, (entry,))


def test_the_nearest_measurement_chooses():
    case = lowering.Case("w8a8", 100, 900, 1100)
    names = ("integers", "bfloat16", "dense")
    with use_table(table(integers=3.0, bfloat16=2.0, pallas=1.0)):
        plan = lowering.plan(case, names, "integers")
    assert plan.names == ("bfloat16", "integers", "integers", "integers")  # this table is of a CPU
    assert plan.reasons[0] == "measured at 64×1024×1024, 1.5 times as fast as `integers`"
    assert plan.only is None
    small = lowering.plan(case._replace(inputs=8, outputs=8), names, "integers")
    assert small.only == "integers"
    unknown = lowering.plan(case._replace(rows=None), names, "integers")
    assert len(unknown.names) == 4
    # What makes the weight dense has to be worth it.
    for dense, name in ((0.6, "tiled"), (0.4, "dense")):
        with use_table(table(dense=dense, tiled=1.0)):
            assert lowering.plan(case, ("dense", "tiled"), "dense").names[0] == name
    other = [
        quant.Timing("w8a8", 1, 1024, 1024, (("integers", 1.0), ("bfloat16", 9.0))),
        *table(integers=9.0, bfloat16=1.0).entries,
    ]
    with use_table(timings.here(other)):
        few, many = (lowering.plan(case._replace(rows=r), names, "integers") for r in (4, 32))
    assert (few.names[0], many.names[0]) == ("integers", "bfloat16")


NEW = {"avx2", "avx512_vnni", "avx512_bf16"}  # units of a CPU with fast products of bfloat16
OLD = {"avx2"}


def on_a_cpu_with(units, monkeypatch):
    monkeypatch.setattr(timings, "cpu_units", lambda: frozenset(units))


def test_products_of_bfloat16_count_where_there_are_units_for_them(monkeypatch):
    case, names = lowering.Case("w8a8", 512, 1024, 1024), ("integers", "bfloat16", "dense")
    chosen = []
    for units in (NEW, {"amx_bf16"}, OLD, {"avx2", "avx512_vnni"}, set()):
        on_a_cpu_with(units, monkeypatch)
        chosen.append(lowering.plan(case, names, "integers").names[0])
    assert chosen == ["bfloat16"] * 2 + ["integers"] * 3
    for entry in timings.built_in()["cpu"].entries:
        assert entry.microseconds  # no kind of product is left without a time
        some = any("bfloat16" in name for name, _ in entry.microseconds)
        assert some == ("a16" in entry.kind)


def test_a_cpu_with_amx_has_a_table_of_its_own(monkeypatch):
    """Same kinds and shapes, other times: products of bytes are fastest there.

    Halves met by bfloat16 came after the other table was measured, and so did `vector`, except for
    weights of four bits and codes, where what went by another name before is measured there.
    """
    found = []
    for units in (NEW, NEW | {"amx_bf16", "amx_int8"}):
        on_a_cpu_with(units, monkeypatch)
        table = timings.built_in()["cpu"]
        shapes = {
            (t.kind, t.rows, t.inputs, t.outputs): dict(t.microseconds) for t in table.entries
        }
        plan = lowering.plan(lowering.Case("w8a8", 512, 2048, 2048), ("integers", "bfloat16"), "x")
        found.append((shapes, plan.names[0]))
    (one, first), (other, second) = found
    assert one.keys() == other.keys() and one != other
    for shape in one:
        new = other[shape].keys() - one[shape].keys()
        assert one[shape].keys() <= other[shape].keys()
        assert not {n for n in new if n.endswith("half")} or "a16" in shape[0]
        assert {n.split("_")[-1] for n in new} <= {"half", "vector"}
        assert ("vector" in other[shape]) == (shape[1] == 1 and shape[0] != "w8a8")
    assert (first, second) == ("bfloat16", "integers")


def test_one_name_of_a_cpu_is_not_one_device(monkeypatch):
    """A table of another machine of that name, with other units, is not taken."""
    devices = []
    for units in (NEW, OLD):
        on_a_cpu_with(units, monkeypatch)
        devices.append(timings.device.__wrapped__())
    assert devices[0] == f"{devices[1]} and avx512_bf16 and avx512_vnni"


@pytest.mark.parametrize("units", [NEW, OLD])
def test_every_choice_of_our_table_can_serve(units, monkeypatch):
    on_a_cpu_with(units, monkeypatch)
    for entry in timings.built_in()["cpu"].entries:
        assert {name for name, _ in entry.microseconds} <= set(NAMES)
    for spec in (Spec(Int(8), Int(8)), Spec(Int(4), Int(8)), Spec(GROUPS, Int(8)), Spec(Int(4))):
        for rows in (1, 64):
            f, leaf, x = operands(spec, rows, inputs=512, outputs=512)
            y = jax.jit(lift(f))(leaf, x)
            with use_implementation("dense"):
                wanted = jax.jit(lift(f))(leaf, x)
            np.testing.assert_allclose(y, wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max())
    how = explain(f, leaf, x)[-1].how
    assert "on cpu (measured at 64×512×512" in how


def test_a_change_is_seen_by_functions_compiled_before():
    f, leaf, x = operands(Spec(Int(8)), 2, inputs=256, outputs=512)
    compiled, traced = jax.jit(lambda w, x: lift(f)(w, x)), []

    def loops():
        traced.append(str(jax.make_jaxpr(lambda w, x: compiled(w, x))(leaf, x)))
        return "scan" in traced[-1]

    with use_implementation("dense"):
        assert not loops()
    with use_implementation("tiled"):
        assert loops()
    with use_implementation("dense"):
        assert not loops()
    with pytest.raises(ValueError, match=r"implementations are `integers`, .*`pallas`"):
        use_implementation("fast").__enter__()


def test_lowers_everywhere_and_differs_by_platform():
    for spec in (Spec(GROUPS, Int(8)), Spec(Int(4)), Spec(Int(4), BFloat16())):
        f, leaf, _ = operands(spec, 1, inputs=256, outputs=512)
        x = jax.ShapeDtypeStruct((1, 256), jnp.float32)
        export = jax.export.export(jax.jit(lift(f)), platforms=["cpu", "cuda", "tpu"])
        assert "stablehlo.case" in export(leaf, x).mlir_module()
        rows = jax.ShapeDtypeStruct((*jax.export.symbolic_shape("b"), 256), jnp.float32)
        exported = jax.export.export(jax.jit(lift(f)), platforms=["cpu", "cuda"])(leaf, rows)
        x = jax.random.normal(jax.random.key(0), (5, 256))
        wanted = jax.jit(lift(f))(leaf, x)
        np.testing.assert_allclose(exported.call(leaf, x), wanted, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("spec", [Spec(Int(8), Int(8)), Spec(Int(4), TOKEN), Spec(Int(8))], ids=str)
def test_any_number_of_rows_on_one_device(spec, monkeypatch):
    """What one device allows (slices, halves that wait) does not ask how many rows there are."""
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    f, leaf, _ = operands(spec, 1, inputs=256, outputs=640)
    rows = jax.ShapeDtypeStruct((*jax.export.symbolic_shape("b"), 256), jnp.float32)
    with use_implementation("tiled_half"):
        exported = jax.export.export(jax.jit(lift(f)))(leaf, rows)
    for count in (1, 200):
        x = jax.random.normal(jax.random.key(0), (count, 256))
        wanted = np.asarray(jax.jit(lift(f))(leaf, x))
        close = {"rtol": 1e-4, "atol": 1e-4 * np.abs(wanted).max()}
        np.testing.assert_allclose(exported.call(leaf, x), wanted, **close)


def test_float8_products_where_there_are_units_for_them():
    spec = Spec(quant.FP8(), quant.FP8())
    f, leaf, x = operands(spec, 16)
    text = jax.export.export(jax.jit(lift(f)), platforms=["cuda"])(leaf, x).mlir_module()
    products = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    assert len(products) == 1 and products[0].count("f8E4M3FN>") == 2
    plain = np.asarray(lift(f)(leaf, x))
    with use_implementation("float8"):
        ours = np.asarray(jax.jit(lift(f))(leaf, x))
    np.testing.assert_allclose(ours, plain, rtol=1e-5, atol=1e-5 * np.abs(plain).max())
    wanted = np.asarray(x, np.float64) @ np.asarray(leaf.materialise(), np.float64)
    assert np.linalg.norm(ours - wanted) < 0.05 * np.linalg.norm(wanted)


@pytest.mark.parametrize("spec", [Spec(GROUPS, Int(8)), Spec(Int(4)), Spec(Int(8), Int(8))])
def test_devices(spec):
    f, leaf, x = operands(spec, 8, inputs=256, outputs=512)
    wanted = jax.jit(lift(f))(leaf, x)
    auto = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.device_put(x, NamedSharding(auto, PartitionSpec("data")))
    np.testing.assert_allclose(jax.jit(lift(f))(leaf, rows), wanted, rtol=1e-4, atol=1e-3)
    data = PartitionSpec("data")
    if spec.activation is None:  # else each shard has a range of its own
        mapped = jax.shard_map(lift(f), mesh=auto, in_specs=(PartitionSpec(), data), out_specs=data)
        np.testing.assert_allclose(jax.jit(mapped)(leaf, rows), wanted, rtol=1e-4, atol=1e-3)
    explicit = jax.make_mesh((8,), ("data",))
    with jax.set_mesh(explicit):
        put = (
            jax.device_put(leaf, PartitionSpec(None, "data")),
            jax.device_put(x, PartitionSpec()),
        )
        np.testing.assert_allclose(jax.jit(lift(f))(*put), wanted, rtol=1e-4, atol=1e-3)
    stacked = jax.tree.map(lambda a: jnp.stack([a, a]), leaf)
    mapped = jax.jit(jax.vmap(lift(f)))(stacked, jnp.stack([x, x]))
    np.testing.assert_allclose(mapped[1], wanted, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("format", [Int(8), Int(4), Int(4, granularity="group", group_size=64)])
def test_weights_alone_take_less_memory_than_floats(format):
    keys = jax.random.split(jax.random.key(0), 4)
    params = [jax.random.normal(key, (512, 512)) for key in keys]
    x = jnp.ones((8, 512))

    def apply(params, x):
        for w in params:
            x = jax.nn.relu(x @ w)
        return x

    def peak(params):
        analysis = jax.jit(lift(apply)).lower(params, x).compile().memory_analysis()
        return analysis.argument_size_in_bytes + analysis.temp_size_in_bytes

    stored = quant.quantize(params, format)
    assert peak(stored) < peak(params)
    with use_implementation("dense"):
        assert peak(stored) > peak(params)  # which is what tiles are for


def test_long_sums_of_a_convolution_are_exact_where_they_are_of_floats():
    from jopt.quant._products import convolution as convolution

    rng = np.random.default_rng(0)
    for terms, size in ((900, 128), (9_000, 128), (33_000, 128)):
        x = rng.integers(size - 4, size, (1, 1, terms)).astype(np.int8)
        kernel = rng.integers(-size, -size + 4, (1, terms, 2)).astype(np.int8)

        def run(x, kernel):
            numbers = ("NHC", "HIO", "NHC")
            return jax.lax.conv_general_dilated(x, kernel, (1,), "VALID", dimension_numbers=numbers)

        split = functools.partial(convolution._split_sum, run, terms=terms, size=(size, size))
        y = jax.jit(lambda x, k, split=split: split(x, k))(x, kernel)
        wanted = np.einsum("bhi,hio->bho", x.astype(np.int64), kernel.astype(np.int64))
        np.testing.assert_array_equal(y, wanted)


# The table's file.


def test_a_table_on_disk(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "products.json"
    with pytest.warns(UserWarning, match="kinds in groups need 64 .* unlike 2x32x256"):
        found = quant.tune([(2, 64, 256), (2, 32, 256)], kinds=["w4-group"], rounds=1, seconds=1e-6)
    assert [t.inputs for t in found.entries] == [64]  # groups of 64 do not divide 32
    quant.write_table(found, path)
    read = timings.read(path)
    assert read is not None and [t.kind for t in read.entries] == ["w4-group"]
    assert os.listdir(path.parent) == [path.name]
    assert stat.S_IMODE(path.stat().st_mode) & 0o400
    for text, why in (
        (path.read_text()[:-20], "it is no JSON"),
        ("[]", '"format" is not'),
        (path.read_text().replace("products 1", "products 0"), '"format" is not'),
        (path.read_text().replace(jax.__version__, "0.1"), "measured with JAX 0.1, not"),
        (path.read_text().replace(timings.device(), "abacus"), "measured on 'abacus'"),
        (path.read_text().replace("64, 256]", "64]"), "one of its products is"),
        (path.read_text().replace('"w4-group"', "7"), "one of its products is"),
        (path.read_text().replace("64, 256]", f"64, {10**400}]"), "one of its products is"),
        (re.sub(r'"dense": [^,}]+', f'"dense": {10**400}', path.read_text()), "one of its prod"),
        ("[" * 200_000, "it is no JSON"),
    ):
        path.write_text(text)
        with pytest.warns(UserWarning, match=why):
            assert timings.read(path) is None
        quant.write_table(found, path)
    with pytest.warns(UserWarning, match="No such file"), use_table(tmp_path / "none.json"):
        assert lowering.plan(lowering.Case("w8", 1, 8, 8), ("dense",), "dense").only == "dense"
    quant.write_table(table(integers=2.0, bfloat16=1.0), path)
    text = path.read_text().replace('"here"', f'"{timings.device()}"')
    path.write_text(text)
    monkeypatch.setenv("JOPT_PRODUCTS", str(path))
    case = lowering.Case("w8a8", 64, 1024, 1024)
    assert lowering.plan(case, ("integers", "bfloat16"), "integers").names[0] == "bfloat16"


def test_tables_are_made_of_lists_and_written_by_name(tmp_path):
    entry = quant.Timing("w8a8", 64, 1024, 1024, [["integers", 2.0], ["bfloat16", 1.0]])
    made = quant.Timings("cpu", "here", jax.__version__, [entry])
    assert made == table(integers=2.0, bfloat16=1.0) and hash(made)
    with use_table(made):
        case = lowering.Case("w8a8", 64, 1024, 1024)
        assert lowering.plan(case, ("integers", "bfloat16"), "integers").names[0] == "bfloat16"
    quant.write_table(made, str(tmp_path / "products.json"))
    assert timings.parse((tmp_path / "products.json").read_text()) == made


def test_tune_refuses_what_it_cannot_measure():
    for options in ({"rounds": 0}, {"seconds": 0.0}, {"seconds": float("nan")}):
        with pytest.raises(ValueError, match="expected a positive"):
            quant.tune([(1, 64, 64)], kinds=["w8"], **options)
    with pytest.raises(ValueError, match=r"nothing to measure: kinds in groups .* 8x60x64"):
        quant.tune([(8, 60, 64)], kinds=["w4-group"])
    with pytest.raises(ValueError, match="nothing to measure: no shape is given"):
        quant.tune([])
    with pytest.raises(ValueError, match=r"a shape is \(rows, inputs, outputs\), got \(1, 2\)"):
        quant.tune([(1, 2)])
    with pytest.raises(ValueError, match="'w9' is none of w8a8"):
        quant.tune([(1, 2, 3)], kinds=["w9"])


def test_the_command_writes_a_table(tmp_path):
    runner = pytest.importorskip("typer.testing").CliRunner()
    from jopt import cli

    path = tmp_path / "products.json"
    options = ["--shape", "2x32x64", "--kind", "w8a8", "--rounds", "1", "--output", str(path)]
    result = runner.invoke(cli.app, ["profile", "--tune", *options])
    assert result.exit_code == 0, result.output
    assert "w8a8         2x32x64: " in result.output and f"Wrote {path}" in result.output
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert timings.read(path) is not None
    for options, why in (
        (["--tune", "--shape", "2x32"], "expected ROWSxINPUTSxOUTPUTS"),
        (["--tune", "--shape", "8x60x64", "--kind", "w4-group"], "nothing to measure"),
        ([], "needs a recipe"),
        (["digits", "--shape", "2x2x2"], "options of `--tune`"),
    ):
        result = runner.invoke(cli.app, ["profile", *options])
        assert result.exit_code != 0 and why in str(result.exception)
