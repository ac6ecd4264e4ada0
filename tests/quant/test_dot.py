"""Matrix products on integers against a NumPy simulation on every layout, and their derivatives."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quant_reference import SPECS, W8, int8_products, integers, shifted, weight

from jopt.quant import Int, Spec, qat, quantize
from jopt.trace import lift


@pytest.mark.parametrize(
    "name, static",
    [*((name, None) for name in SPECS), ("w4a8", (-1.5, 2.0)), ("both affine", (-1.5, 2.0))],
)
def test_dot_equals_the_integer_simulation(name, static):
    spec, rng = SPECS[name], np.random.default_rng(0)
    x = rng.normal(size=(6, 24)).astype(np.float32)
    leaf = weight(rng.normal(size=(24, 10)).astype(np.float32) + 0.2, spec, (-2,), static)
    f = lift(lambda w, x: x @ w)
    assert int8_products(f, leaf, x) == 1
    codes, scale = integers(x, spec.activation, *(static or ()))
    w_codes, w_scale = shifted(leaf)
    expected = (codes @ w_codes) * (np.float64(scale) * w_scale)
    np.testing.assert_allclose(jax.jit(f)(leaf, x), expected, rtol=1e-5, atol=1e-6)
    if name == "both affine":
        np.testing.assert_allclose(f(leaf, x), expected, rtol=1e-5, atol=1e-6)
    # The dense form, which QAT trains, is the same numbers in another order.
    dense = codes * np.float64(scale) @ np.asarray(leaf.materialise(), np.float64)
    np.testing.assert_allclose(expected, dense, rtol=1e-4, atol=1e-4)


LAYOUTS = [  # equation, shape of x, shape of w, contracted axes of w from its end
    ("bi,io->bo", (5, 8), (8, 6), (-2,)),
    ("bi,oi->bo", (5, 8), (6, 8), (-1,)),
    ("io,bi->ob", (8, 6), (5, 8), (-1,)),
    ("bti,io->bto", (2, 3, 8), (8, 6), (-2,)),
    ("btd,dhk->bhtk", (2, 3, 8), (8, 2, 4), (-3,)),
    ("bthk,hkd->btd", (2, 3, 2, 4), (2, 4, 8), (-3, -2)),
    ("ebi,eio->ebo", (3, 5, 8), (3, 8, 6), (-2,)),
    ("bei,oie->beo", (5, 3, 8), (6, 8, 3), (-2,)),
    ("bi,i->b", (5, 8), (8,), (-1,)),
    ("i,io->o", (8,), (8, 6), (-2,)),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=[layout[0] for layout in LAYOUTS])
def test_dot_on_any_axes_and_either_side(layout):
    left = LAYOUTS.index(layout) % 2 == 1
    equation, x_shape, w_shape, contract = layout
    inputs, out = equation.split("->")
    xs, ws = inputs.split(",")
    rng = np.random.default_rng(1)
    x = rng.normal(size=x_shape).astype(np.float32)
    w = rng.normal(size=w_shape).astype(np.float32) + 0.1
    spec = SPECS["both affine"]
    leaf = weight(w, spec, contract)

    def f(w, x):
        if left:
            return jnp.einsum(f"{ws},{xs}->{out}", w, x)
        return jnp.einsum(f"{xs},{ws}->{out}", x, w)

    lifted = lift(f)
    assert int8_products(lifted, leaf, x) == 1
    codes, scale = integers(x, spec.activation)
    dense = np.asarray(leaf.materialise(), np.float64)
    expected = np.einsum(equation, codes * np.float64(scale), dense)
    np.testing.assert_allclose(jax.jit(lifted)(leaf, x), expected, rtol=1e-4, atol=1e-5)


def test_scales_along_the_contracted_axis_run_dense():
    x = jax.random.normal(jax.random.key(0), (5, 8))
    w = jax.random.normal(jax.random.key(1), (8, 6))
    groups = Spec(Int(4, granularity="group", group_size=4), W8)
    for spec, contract in [(groups, (-2,)), (SPECS["w8a8"], (-1,))]:
        leaf = weight(w, spec, contract)
        f = lift(lambda w, x: x @ w)
        assert int8_products(f, leaf, x) == 0
        codes, scale = integers(x, W8)
        expected = codes * np.float64(scale) @ np.asarray(leaf.materialise(), np.float64)
        np.testing.assert_allclose(jax.jit(f)(leaf, x), expected, rtol=1e-4, atol=1e-5)


def test_sums_that_could_overflow_run_dense():
    spec = Spec(Int(8, symmetric=False), Int(8, symmetric=False))
    f = lift(lambda w, x: x @ w)
    for inputs, expected in ((33_000, 1), (33_100, 0)):
        leaf = quantize({"w": jnp.zeros((inputs, 1))}, spec)["w"]
        assert int8_products(f, leaf, jnp.zeros((1, inputs))) == expected
    # At the largest sum that is let through nothing wraps around.
    leaf = quantize({"w": jnp.ones((33_000, 1))}, spec)["w"]
    np.testing.assert_allclose(f(leaf, jnp.ones((1, 33_000))), 33_000, rtol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_result_dtypes_are_those_of_the_dense_product(dtype):
    x = jax.random.normal(jax.random.key(0), (5, 8)).astype(dtype)
    w = jax.random.normal(jax.random.key(1), (8, 6)).astype(dtype)
    leaf = weight(w, SPECS["w8a8"], (-2,))
    assert leaf.dtype == dtype
    y = lift(lambda w, x: x @ w)(leaf, x)
    assert y.dtype == dtype
    wide = lift(lambda w, x: jnp.dot(x, w, preferred_element_type=jnp.float32))(leaf, x)
    assert wide.dtype == jnp.float32
    np.testing.assert_allclose(wide, np.asarray(y, np.float32), rtol=1e-2, atol=1e-2)


def test_weights_alone_are_the_dequantized_product():
    x = jax.random.normal(jax.random.key(0), (5, 8))
    leaf = quantize({"w": jax.random.normal(jax.random.key(1), (8, 6))}, Int(4))["w"]
    y = lift(lambda w, x: x @ w)(leaf, x)
    np.testing.assert_array_equal(y, x @ leaf.materialise())


def test_integer_activations_are_left_alone():
    leaf = weight(jnp.ones((8, 6)), SPECS["w8a8"], (-2,))

    def f(w, x):
        return jax.lax.dot_general(
            x, w, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32
        )

    y = lift(f)(leaf, jnp.ones((2, 8), jnp.bool_).astype(jnp.int8))
    np.testing.assert_allclose(y, 8, rtol=1e-6)


# Derivatives and transformations.


@pytest.mark.parametrize("static", [None, (-1.0, 1.2)], ids=["dynamic", "static"])
def test_the_gradient_is_that_of_the_dense_product_straight_through(static):
    spec, rng = SPECS["w8a8"], np.random.default_rng(4)
    x = rng.normal(size=(6, 8)).astype(np.float32)
    leaf = weight(rng.normal(size=(8, 5)).astype(np.float32), spec, (-2,), static)
    cotangent = rng.normal(size=(6, 5)).astype(np.float32)
    f = lift(lambda w, x: x @ w)

    def loss(x, scale):
        return jnp.sum(f(dataclasses.replace(leaf, scale=scale), x) * cotangent)

    for_x, for_scale = jax.jit(jax.grad(loss, argnums=(0, 1)))(x, leaf.scale)
    expected = cotangent @ np.asarray(leaf.materialise()).T
    if static is not None:  # beyond the range by half a step or more, nothing moves
        codes, scale = integers(x, W8, *static)
        expected = expected * (np.abs(x / scale) <= 127.5)
        assert 0.3 < np.mean(np.abs(x / scale) <= 127.5) < 1
    np.testing.assert_allclose(for_x, expected, rtol=1e-4, atol=1e-5)
    # y = (x_q @ codes) scale: the scale's own derivative.
    codes, scale = integers(x, W8, *(static or ()))
    rounded = codes * np.float64(scale)
    expected = np.sum(cotangent * (rounded @ np.asarray(leaf.codes, np.float64)), 0, keepdims=True)
    np.testing.assert_allclose(for_scale, expected, rtol=1e-4, atol=1e-4)
    tangent = rng.normal(size=x.shape).astype(np.float32)
    _, moved = jax.jvp(lambda x: f(leaf, x), (x,), (tangent,))
    np.testing.assert_allclose(np.sum(moved * cotangent), np.sum(for_x * tangent), rtol=1e-3)


def test_vmap_over_data_and_over_an_ensemble():
    x = jax.random.normal(jax.random.key(0), (4, 5, 8))
    w = jax.random.normal(jax.random.key(1), (4, 8, 6))
    stack = quantize({"w": w}, SPECS["both affine"])["w"]
    f = lift(lambda w, x: x @ w)

    # Inside vmap each member has its own dynamic range; a function that is mapped first has one.
    outside = jax.jit(jax.vmap(f))(stack, x)
    one = jax.jit(f)
    for i in range(4):
        single = one(jax.tree.map(lambda a, i=i: a[i], stack), x[i])
        np.testing.assert_allclose(outside[i], single, rtol=1e-5, atol=1e-5)
    inside = lift(jax.vmap(lambda w, x: x @ w))
    assert int8_products(inside, stack, x) == 1
    codes, scale = integers(x, stack.activation)
    expected = (codes * np.float64(scale)) @ np.asarray(stack.materialise(), np.float64)
    np.testing.assert_allclose(jax.jit(inside)(stack, x), expected, rtol=1e-4, atol=1e-5)
    shared = jax.tree.map(lambda a: a[0], stack)
    mapped = jax.jit(jax.vmap(f, in_axes=(None, 0)))(shared, x)
    np.testing.assert_allclose(mapped[0], one(shared, x[0]), rtol=1e-5, atol=1e-5)


def test_a_range_that_was_never_measured_is_an_error():
    params = {"dense": {"kernel": jnp.ones((8, 4))}}
    f = lift(lambda p, x: x @ p["dense"]["kernel"])
    for make in (qat, quantize):
        with pytest.raises(ValueError, match=r"(?s)`dense/kernel` has a static .*calibrate"):
            f(make(params, Spec(W8, W8, static=True)), jnp.ones((2, 8)))


def test_a_nan_activation_shows():
    params, x = {"w": jnp.ones((4, 2))}, jnp.ones((3, 4)).at[1, 2].set(jnp.nan)
    leaf = weight(params["w"], SPECS["w8a8"], (-2,), (-1.0, 1.0))
    trained = dataclasses.replace(qat(params, SPECS["w8a8"])["w"], range=leaf.range, static=True)
    f = lift(lambda w, x: x @ w)
    np.testing.assert_array_equal(jnp.isnan(f(trained, x)).any(1), [False, True, False])
    dynamic = weight(params["w"], SPECS["w8a8"], (-2,))
    assert jnp.isnan(f(dynamic, x)).all()


@pytest.mark.parametrize("granularity", ["tensor", "token"])
def test_a_nan_shows_among_thousands(granularity):
    """Where XLA:CPU's `max` loses it and what it saw before: a code of 1.2 would be beyond 127."""
    leaf = quantize(jnp.eye(512), Spec(W8, Int(8, granularity=granularity)))
    x = jnp.ones((8, 512)).at[0, 0].set(1.2).at[0, 128].set(jnp.nan)
    y = jax.jit(lift(lambda w, x: x @ w))(leaf, x)
    assert jnp.isnan(y[0]).all() and jnp.isnan(y).all() == (granularity == "tensor")
    assert granularity == "tensor" or jnp.all(y[1:] == 1)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    "function",
    [
        lambda w, x: jnp.einsum("b,io->bio", x[:, 0], w),
        lambda w, x: jnp.einsum("bi,io->bio", x, w),
        lambda w, x: x[:, :1] @ w[:, :1].T,
        lambda w, x: jnp.tensordot(x, jnp.broadcast_to(w[None], (8, 8, 6)), 1),
    ],
)
def test_groups_along_an_axis_that_is_kept(symmetric, function):
    rng = np.random.default_rng(0)
    weight = Int(4, symmetric=symmetric, granularity="group", group_size=4)
    w, x = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((8, 6), (3, 8)))
    leaf = quantize(w, Spec(weight, Int(8)))
    ours = jax.jit(lift(function))(leaf, x)
    expected = function(leaf.materialise(), x)
    np.testing.assert_allclose(ours, expected, atol=0.03 * float(jnp.abs(expected).max()))
