"""The kernel for one row, against float64 and to the bits of the product of integers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from quant_reference import integers

from jopt import quant
from jopt.quant import BFloat16, Int, Spec, use_implementation
from jopt.trace import explain, lift, sites

TAKEN = "`vector` on cpu/cuda/rocm/tpu (as asked for)"
INT4, AFFINE4 = Int(4), Int(4, symmetric=False)
GROUPS = Int(4, granularity="group", group_size=32)
AFFINE4_GROUPS = Int(4, symmetric=False, granularity="group", group_size=32)
AFFINE_GROUPS = Int(8, symmetric=False, granularity="group", group_size=16)
AFFINE = Int(8, symmetric=False)
TOKEN = Int(8, symmetric=False, granularity="token")
STATIC = Spec(INT4, Int(8), static=True)

WEIGHTS_ALONE = [
    Spec(Int(8)),
    Spec(Int(6)),
    Spec(INT4),
    Spec(Int(2)),
    Spec(AFFINE4),
    Spec(AFFINE),
    Spec(GROUPS),
    Spec(AFFINE_GROUPS),
    Spec(Int(8, granularity="tensor")),
    Spec(Int(4, symmetric=False, granularity="tensor")),
    Spec(Int(8), BFloat16()),
    Spec(AFFINE4, BFloat16()),
    Spec(GROUPS, BFloat16()),
]


@pytest.fixture
def one_device(monkeypatch):
    """What one device allows: an activation is settled before it is multiplied."""
    monkeypatch.setattr(jax, "device_count", lambda: 1)


def product(w, x):
    return x @ w


def operands(spec, inputs=64, outputs=96):
    rng = np.random.default_rng(0)
    w = jnp.asarray(rng.normal(size=(inputs, outputs)) + 0.2, jnp.float32)
    x = jnp.asarray(rng.normal(size=(1, inputs)), jnp.float32)
    params = quant.quantize(w, spec, sites=sites(product, w, x))
    if spec.static:
        params, _ = quant.calibrate(product, params, [(x,)])
    return params, x


def computed(leaf, x, name, f=product):
    with use_implementation(name):
        return explain(f, leaf, x)[-1].how, np.asarray(jax.jit(lift(f))(leaf, x))


def expected(leaf, x):
    """Rounded activation times dequantized weight in float64."""
    x, activation = np.asarray(x), leaf.activation
    if isinstance(activation, BFloat16):
        x = np.asarray(jnp.asarray(x).astype(jnp.bfloat16))
    elif activation is not None:
        codes, scale = integers(x, activation)
        x = codes * np.float64(scale)
    return np.asarray(x, np.float64) @ np.asarray(leaf.materialise(), np.float64)


@pytest.mark.usefixtures("one_device")
@pytest.mark.parametrize("spec", WEIGHTS_ALONE, ids=str)
def test_weights_alone_are_those_of_float64(spec):
    leaf, x = operands(spec)
    how, y = computed(leaf, x, "vector")
    assert TAKEN in how
    wanted = expected(leaf, x)
    np.testing.assert_allclose(y, wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.usefixtures("one_device")
@pytest.mark.parametrize(
    "spec",
    [Spec(INT4, Int(8)), Spec(AFFINE4, TOKEN), Spec(INT4, AFFINE), Spec(AFFINE4, Int(8))],
    ids=["symmetric", "both shifted", "row shifted", "weight shifted"],
)
@pytest.mark.parametrize("inputs", [16, 16 * 13, 16 * 67])
def test_codes_times_codes_are_to_the_bits_those_of_integers(spec, inputs):
    leaf, x = operands(spec, inputs)
    how, y = computed(leaf, x, "vector")
    assert TAKEN in how
    np.testing.assert_array_equal(y, computed(leaf, x, "integers")[1])
    wanted = expected(leaf, x)
    np.testing.assert_allclose(y, wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.usefixtures("one_device")
@pytest.mark.parametrize(
    "spec",
    [Spec(w, x) for w in (GROUPS, AFFINE4_GROUPS) for x in (Int(8), AFFINE)],
    ids=["symmetric", "row shifted", "weight shifted", "both shifted"],
)
def test_groups_of_codes_times_codes_are_those_of_float64(spec):
    leaf, x = operands(spec, 256)
    how, y = computed(leaf, x, "vector")
    assert TAKEN in how
    wanted = expected(leaf, x)
    np.testing.assert_allclose(y, wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())


EXTREMES = [
    Spec(INT4, AFFINE),
    Spec(AFFINE4, AFFINE),
    Spec(GROUPS, AFFINE),
    Spec(AFFINE4_GROUPS, AFFINE),
]


@pytest.mark.parametrize("spec", EXTREMES, ids=range(len(EXTREMES)))
def test_sums_of_sixteen_codes_fit(spec):
    """The largest codes of all, which 16 bits only just hold."""
    for value in (1.0, -1.0):
        leaf = quant.quantize(jnp.full((64, 64), value), spec)
        for x in (jnp.ones((1, 64)), -jnp.ones((1, 64)), jnp.ones((1, 64)).at[0, 0].set(-1.0)):
            one, other = (computed(leaf, x, name)[1] for name in ("vector", "dense"))
            np.testing.assert_allclose(one, other, rtol=1e-5)


def test_static_ranges():
    leaf, x = operands(STATIC)
    how, y = computed(leaf, x, "vector")
    assert TAKEN in how
    np.testing.assert_array_equal(y, computed(leaf, x, "integers")[1])


@pytest.mark.parametrize(
    ("spec", "inputs", "outputs", "rows"),
    [
        (Spec(INT4, Int(8)), 40, 96, 1),  # no whole sixteens
        (Spec(Int(8, granularity="group", group_size=24)), 48, 96, 1),  # nor in a group
        (Spec(Int(8)), 64, 95, 1),  # no two halves
        (Spec(INT4, Int(8)), 64, 62, 1),  # too few outputs
        (Spec(Int(8)), 64, 96, 2),
        (Spec(Int(8), Int(8)), 64, 96, 1),  # of integers, four bits only
        (Spec(quant.NF4(32)), 64, 96, 1),
    ],
    ids=str,
)
def test_what_it_cannot_serve_is_left_to_others(spec, inputs, outputs, rows):
    leaf, x = operands(spec, inputs, outputs)
    assert "vector" not in computed(leaf, jnp.repeat(x, rows, 0), "vector")[0]


def test_turned_weights_and_other_dtypes_are_left_to_others():
    leaf, x = operands(Spec(Int(8)), 64, 64)
    assert "vector" not in computed(leaf, x, "vector", lambda w, x: x @ w.T)[0]
    half = quant.quantize(jnp.ones((64, 64), jnp.float16), Spec(Int(8)))
    assert "vector" not in computed(half, x.astype(jnp.float16), "vector")[0]


@pytest.mark.usefixtures("one_device")
@pytest.mark.parametrize("spec", [Spec(INT4, Int(8)), Spec(GROUPS), Spec(AFFINE)], ids=str)
def test_transforms(spec):
    """vmap makes one row of each of many; derivatives are those of the dense form."""
    leaf, x = operands(spec, 64, 1024)  # large enough not to be small
    many = jnp.concatenate([x, -2 * x, 0 * x])[:, None]
    with use_implementation("vector"):
        f = jax.jit(jax.vmap(lift(product), in_axes=(None, 0)))
        found = np.asarray(f(leaf, many))
        slope = np.asarray(jax.grad(lambda x: lift(product)(leaf, x).sum())(x))
    with use_implementation("dense"):
        wanted = np.concatenate([lift(product)(leaf, row) for row in many])[:, None]
        dense = np.asarray(jax.grad(lambda x: lift(product)(leaf, x).sum())(x))
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(slope, dense, rtol=1e-5, atol=1e-5)


ROWS = [
    Spec(INT4, Int(8)),
    Spec(AFFINE4_GROUPS, TOKEN),
    Spec(GROUPS),
    Spec(AFFINE),
    Spec(GROUPS, BFloat16()),
]


@pytest.mark.parametrize("spec", ROWS, ids=range(len(ROWS)))
def test_rows_of_many_examples_are_one_product_of_matrices(spec):
    """`vmap` of a lifted function shows it one row; sums of sixteen of each would be gigabytes."""
    leaf, x = operands(spec, 128, 512)
    many = jnp.concatenate([x, -2 * x, 3 * x])
    f = jax.vmap(lift(product), in_axes=(None, 0))
    with use_implementation("vector"):
        program = str(jax.make_jaxpr(f)(leaf, many))
        found = np.asarray(jax.jit(f)(leaf, many))
    assert "[3,8," not in program and "dot_general" in program
    wanted = np.concatenate([computed(leaf, row[None], "vector")[1] for row in many])
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("spec", [Spec(AFFINE4, AFFINE), Spec(Int(8))], ids=["codes", "alone"])
def test_examples_that_devices_share_on_explicit_axes(spec):
    leaf, x = operands(spec, 512, 512)
    many = jnp.stack([(i + 1) * x for i in range(8)])
    wanted = np.stack([computed(leaf, row, "vector")[1] for row in many])
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Explicit,))
    shared = jax.device_put(many, NamedSharding(mesh, PartitionSpec("d")))
    with jax.set_mesh(mesh), use_implementation("vector"):
        y = np.asarray(jax.jit(jax.vmap(lift(product), in_axes=(None, 0)))(leaf, shared))
    np.testing.assert_allclose(y, wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())


def test_very_many_inputs_are_summed_by_levels():
    leaf, x = operands(Spec(INT4, Int(8)), 16 * 1100, 64)
    how, y = computed(leaf, x, "vector")
    assert TAKEN in how
    np.testing.assert_array_equal(y, computed(leaf, x, "integers")[1])


@pytest.mark.parametrize(("inputs", "outputs"), [(0, 4), (16, 0)])
@pytest.mark.parametrize("name", ["vector", "paired_dense", "paired_integers"])
def test_empty_weights(inputs, outputs, name):
    leaf = quant.quantize(jnp.zeros((inputs, outputs)), Spec(INT4, Int(8)))
    alone = quant.quantize(jnp.zeros((inputs, outputs)), Spec(INT4))
    for weight in (leaf, alone):
        y = computed(weight, jnp.ones((1, inputs)), name)[1]
        np.testing.assert_array_equal(y, np.zeros((1, outputs)))


@pytest.mark.usefixtures("one_device")
@pytest.mark.parametrize("spec", [Spec(INT4, Int(8)), Spec(GROUPS)], ids=str)
def test_programs_for_every_platform(spec):
    leaf, x = operands(spec)
    with use_implementation("vector"):
        export = jax.export.export(jax.jit(lift(product)), platforms=["cpu", "cuda", "tpu"])
        exported = export(leaf, x)
    wanted = computed(leaf, x, "dense")[1]
    np.testing.assert_allclose(exported.call(leaf, x), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("spec", [Spec(INT4, Int(8)), Spec(Int(8)), Spec(GROUPS)], ids=str)
@pytest.mark.parametrize("place", [PartitionSpec("d", None), PartitionSpec(None, "d")], ids=str)
def test_weights_that_devices_share(spec, place):
    leaf, x = operands(spec, 256, 512)
    wanted = computed(leaf, x, "vector")[1]
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    codes = jax.device_put(leaf.codes, NamedSharding(mesh, place))
    how, y = computed(leaf.joined(codes, leaf.split()[1]), x, "vector")
    assert TAKEN in how
    np.testing.assert_allclose(y, wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())


def test_nan_stays_nan():
    leaf, x = operands(Spec(GROUPS))
    assert np.isnan(computed(leaf, x.at[0, 5].set(jnp.nan), "vector")[1]).all()
