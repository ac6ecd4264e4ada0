"""Views of a weight: codes go through, scales and ranges follow, and no value changes."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jopt.quant import FakeQuant, Int, QArray, Spec, calibrate, qat, quantize
from jopt.trace import explain, lift
from jopt.trace.layered import _blocks, _regroup

GROUP = Int(4, granularity="group", group_size=4)


def dense(coarse, shape):
    """A coarse array with one entry for each value."""
    for axis, size in enumerate(shape):
        coarse = np.repeat(coarse, size // coarse.shape[axis], axis)
    return coarse


def test_coarse_arrays_follow_any_reshape():
    rng = np.random.default_rng(0)
    kept = count = 0
    while count < 500:
        shape = tuple(int(n) for n in rng.choice([1, 2, 3, 4, 6, 8], rng.integers(1, 5)))
        result, left = [], math.prod(shape)
        while left > 1 and len(result) < 4:
            result.append(int(rng.choice([d for d in range(1, left + 1) if left % d == 0])))
            left //= result[-1]
        result = (*result, left)
        sizes = [int(rng.choice([1, n, *[d for d in (2, 3) if n % d == 0]])) for n in shape]
        blocks = list(_blocks(shape, result))
        for part, whole in ((0, shape), (1, result)):  # all axes once, in order, products alike
            assert [a for block in blocks for a in block[part]] == list(range(len(whole)))
        for old, new in blocks:
            before, after = [shape[a] for a in old], [result[a] for a in new]
            assert math.prod(before) == math.prod(after)
            coarse = [sizes[a] for a in old]
            regrouped = _regroup(coarse, before, after)
            if regrouped is not None:
                entries = np.arange(math.prod(coarse))
                one = dense(entries.reshape(coarse), before)
                other = dense(entries.reshape(regrouped), after)
                np.testing.assert_array_equal(one.reshape(-1), other.reshape(-1))
                kept += len(old) > 1 or len(new) > 1
            count += 1
    assert kept > 50  # not by giving up


def test_a_convolution_kernel_as_a_matrix_keeps_its_channels():
    # [3, 3, 4, 6] with one scale a channel, or groups of 4 inputs, becomes [36, 6].
    blocks = list(_blocks((3, 3, 4, 6), (36, 6)))
    assert [(len(old), len(new)) for old, new in blocks] == [(3, 1), (1, 1)]
    assert _regroup([1, 1, 1], [3, 3, 4], [36]) == [1]
    assert _regroup([3, 3, 1], [3, 3, 4], [36]) == [9]
    assert _regroup([3, 3, 4], [3, 3, 4], [36]) == [36]
    assert _regroup([1, 3, 1], [3, 3, 4], [36]) is None


PROGRAMS = {
    "transpose": lambda w: w.T,
    "reshape": lambda w: w.reshape(2, 4, 3, 4),
    "merge": lambda w: w.reshape(96),
    "split and merge": lambda w: w.reshape(8, 3, 4).reshape(8, 12),
    "squeeze": lambda w: w[None].squeeze(0),
    "broadcast": lambda w: jnp.broadcast_to(w[:, None, :], (8, 3, 12)),
    "stretch": lambda w: jnp.broadcast_to(w[:1], (5, 12)),
    "slice inputs": lambda w: w[4:],
    "slice inside a group": lambda w: w[3:7],
    "slice outputs": lambda w: w[:, 1:5],
    "stride": lambda w: jax.lax.slice(w, (0, 0), (8, 12), (2, 3)),
    "dynamic slice": lambda w: jax.lax.dynamic_slice(w, (jnp.int32(3), jnp.int32(5)), (4, 6)),
    "dynamic slice of all": lambda w: jax.lax.dynamic_slice(w, (0, jnp.int32(20)), (8, 3)),
    "split": lambda w: jnp.concatenate(jnp.split(w, 3, axis=1)[::-1], axis=1),
    "split inputs": lambda w: jnp.concatenate(jnp.split(w, [3], axis=0)[::-1], axis=0),
    "concatenate inputs": lambda w: jnp.concatenate([w, w[:4]], axis=0),
    "stack": lambda w: jnp.stack([w, w[::1]]),
    "unstack": lambda w: jnp.stack(jnp.unstack(w, axis=1)[2:5], axis=1),
    "unstack inputs": lambda w: jnp.unstack(w)[3],
    "reverse": lambda w: w[::-1, ::-1],
    "tile": lambda w: jnp.tile(w, (2, 3)),
    "repeat": lambda w: jnp.repeat(w, 2, axis=0),
    "convert": lambda w: w.astype(jnp.bfloat16),
    "rows": lambda w: w[jnp.array([1, 1, 7, 0])],
    "rows from the end": lambda w: w[jnp.array([[-1], [2]])],
    "columns": lambda w: w[:, jnp.array([1, 11, 0])],
    "elements": lambda w: w[jnp.array([1, 2]), jnp.array([3, 4])],
    "rows out of bounds": lambda w: w.at[jnp.array([7, 8, -9])].get(mode="fill"),
    "rows filled with": lambda w: jnp.take(
        w, jnp.array([3, 9]), axis=0, mode="fill", fill_value=2.5
    ),
    "rows clipped": lambda w: jnp.take(w, jnp.array([3, 9]), axis=0, mode="clip"),
    "columns out of bounds": lambda w: jnp.take(w, jnp.array([3, 12]), axis=1),
    "windows": lambda w: jax.vmap(lambda i: jax.lax.dynamic_slice(w, (i, i), (3, 2)))(
        jnp.arange(4)
    ),
    "copy": lambda w: jax.lax.optimization_barrier(jax.lax.stop_gradient(jnp.copy(w))),
}
FORMATS = {
    "channel": Int(8),
    "tensor": Int(4, granularity="tensor"),
    "group": GROUP,
    "affine": Int(3, symmetric=False),
    "affine group": Int(4, symmetric=False, granularity="group", group_size=2),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_values_are_those_of_the_dense_program(name):
    program = PROGRAMS[name]
    w = jax.random.normal(jax.random.key(0), (8, 12)) + 0.3
    names = ("channel", "group", "affine group")
    leaves = [quantize({"w": w}, FORMATS[name])["w"] for name in names]
    leaves.append(qat({"w": w}, Spec(Int(4), Int(8)))["w"])
    viewed = jax.jit(lambda leaves: [lift(program)(leaf) for leaf in leaves])(leaves)
    expected = jax.jit(lambda leaves: [program(leaf.materialise()) for leaf in leaves])(leaves)
    for one, other in zip(viewed, expected, strict=True):
        np.testing.assert_array_equal(one, other)


def test_converting_rounds_once():
    w = jax.random.normal(jax.random.key(0), (8, 12), jnp.bfloat16)
    leaf = quantize({"w": w}, Int(8))["w"]
    y = lift(lambda w: w.astype(jnp.float32))(leaf)
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y, leaf.materialise().astype(jnp.float32), rtol=2**-8)
    exact = np.asarray(leaf.codes, np.float64) * np.asarray(leaf.scale, np.float64)
    np.testing.assert_allclose(y, exact, rtol=1e-6)


SEEN = {  # views after which a product is still one of integers
    "transposed": lambda w, x: jnp.einsum("oi,bi->bo", w.T, x),
    "heads": lambda w, x: jnp.einsum("bi,ihk->bhk", x, w.reshape(8, 3, 4)),
    "fused": lambda w, x: [x @ part for part in jnp.split(w, 3, axis=1)][1],
    "sliced": lambda w, x: x @ w[:, 2:9],
    "stacked": lambda w, x: jnp.einsum("bi,nio->nbo", x, jnp.stack([w, w])),
    "joined": lambda w, x: x @ jnp.concatenate([w, w], axis=1),
    "cast": lambda w, x: x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16),
    "jit": lambda w, x: jax.jit(jnp.matmul)(x, w),
    "picked layer": lambda w, x: x @ jnp.stack([w, w])[jnp.int32(1)],
}


@pytest.mark.parametrize("name", SEEN)
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_products_after_a_view(name, static):
    f = SEEN[name]
    x = jax.random.normal(jax.random.key(1), (5, 8))
    w = jax.random.normal(jax.random.key(0), (8, 12))
    spec = Spec(Int(8), Int(8), static=static)
    stored = quantize(w, [("**", spec)])
    trained = qat(w, [("**", spec)])
    assert isinstance(stored, QArray) and isinstance(trained, FakeQuant)
    if static:
        stored, _ = calibrate(f, stored, [(x,)])
        trained, _ = calibrate(f, trained, [(x,)])
    text = str(jax.make_jaxpr(lift(f))(stored, x))
    assert text.count("preferred_element_type=int32") == text.count("dot_general[") > 0
    wanted = f(w, x)
    y, z = jax.jit(lambda *ws: [lift(f)(w, x) for w in ws])(stored, trained)
    assert y.dtype == wanted.dtype
    rough = 0.3 if name == "cast" else 0.15
    np.testing.assert_allclose(
        np.asarray(y, np.float32), np.asarray(wanted, np.float32), atol=rough
    )
    fine = 0.1 if name == "cast" else 1e-4
    np.testing.assert_allclose(np.asarray(y, np.float32), np.asarray(z, np.float32), atol=fine)


def test_joined_weights_cover_both_ranges():
    x = jax.random.normal(jax.random.key(1), (5, 8))
    params = {"a": jnp.ones((8, 2)), "b": jnp.full((8, 2), 2.0)}

    def measured(p, x):
        return x @ p["a"], 3 * x @ p["b"]

    def joined(p, x):
        return x @ jnp.concatenate([p["a"], p["b"]], axis=1)

    stored, _ = calibrate(measured, params, [(x,)], Spec(Int(8), Int(8), static=True))
    # With the range of `a` alone, 3 x would be clipped.
    np.testing.assert_allclose(lift(joined)(stored, 3 * x), joined(params, 3 * x), atol=1.0)


def test_an_operation_without_a_rule_says_so():
    leaf = quantize({"w": jnp.ones((4, 3))}, Int(8))
    mask = jnp.ones((4, 3))
    with pytest.raises(ValueError, match="`mul` has no rule for `QArray`"):
        lift(lambda p, x: x @ (p["w"] * mask))(leaf, jnp.ones((2, 4)))
    trained = qat({"w": jnp.ones((4, 3))}, Spec(Int(8), Int(8)))
    with pytest.raises(ValueError, match="`mul` has no rule for `FakeQuant`"):
        lift(lambda p, x: x @ (p["w"] * mask))(trained, jnp.ones((2, 4)))
    alone = qat({"w": jnp.ones((4, 3))}, Int(8))  # loses nothing by being dense
    np.testing.assert_allclose(lift(lambda p, x: x @ (p["w"] * mask))(alone, jnp.ones((2, 4))), 4)


STEPS = {
    "swap": lambda w: jnp.swapaxes(w, 0, 1),
    "fold": lambda w: w.reshape(w.shape[0] * 2, w.shape[1] // 2),
    "unfold": lambda w: w.reshape(w.shape[0] // 2, w.shape[1] * 2),
    "half": lambda w: w[w.shape[0] // 2 :],
    "double": lambda w: jnp.concatenate([w, w], axis=1),
    "reverse": lambda w: w[::-1],
    "tile": lambda w: jnp.tile(w, (1, 2)),
    "layers": lambda w: jnp.concatenate(jnp.unstack(jnp.stack([w, w], axis=1), axis=1), axis=0),
}


@pytest.mark.parametrize("case", range(10))
def test_views_compose(case):
    """Random chains of views, then a product."""
    rng = np.random.default_rng(case)
    names = rng.choice(list(STEPS), 4)

    def program(w, x):
        for name in names:
            w = STEPS[name](w)
        return x @ w.reshape(-1, 8).T

    x = jnp.asarray(rng.normal(size=(3, 8)), jnp.float32)
    w = jnp.asarray(rng.normal(size=(16, 16)), jnp.float32)
    leaf = quantize({"w": w}, list(FORMATS.values())[case % len(FORMATS)])["w"]
    expected = jax.jit(program)(leaf.materialise(), x)
    found = jax.jit(lift(program))(leaf, x)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("format", [Int(8), Int(8, symmetric=False), Int(4, granularity="tensor")])
def test_rows_of_one_table_go_into_another_as_codes(format):
    rng = np.random.default_rng(0)
    table, rows = (
        quantize(jnp.asarray(rng.normal(size=shape), jnp.float32), format)
        for shape in ((8, 6), (2, 6))
    )
    x = jnp.asarray(rng.normal(size=(3, 8)), jnp.float32)

    def function(p, at, x):
        w = jax.lax.dynamic_update_slice(p["table"], p["rows"], (at, 0))
        return x @ w, w

    params = {"table": table, "rows": rows}
    met = explain(function, params, 3, x)
    assert [m.dense for m in met if m.operation == "dynamic_update_slice"] == [False, False]
    plain = {name: leaf.materialise() for name, leaf in params.items()}
    ours, theirs = jax.jit(lift(function))(params, 3, x), jax.jit(function)(plain, 3, x)
    np.testing.assert_allclose(ours[0], theirs[0], 1e-5, 1e-5)
    np.testing.assert_array_equal(ours[1], theirs[1])


def test_an_array_does_not_go_into_codes():
    table = quantize(jnp.ones((8, 6)), Int(8))
    with pytest.raises(ValueError, match="cannot serve these operands"):
        lift(lambda p, x: jax.lax.dynamic_update_slice(p, x, (0, 0)))(table, jnp.ones((2, 6)))


@pytest.mark.parametrize(
    "format", [Int(8), Int(8, symmetric=False), Int(4, granularity="group", group_size=2)]
)
@pytest.mark.parametrize(
    "function",
    [
        lambda w, x: x @ w.reshape((6, 4), order="F").T,
        lambda w, x: x @ jax.lax.reshape(w, (4, 6), (1, 0)),
        lambda w, x: x * w.ravel(order="F")[None, :4],
    ],
)
def test_reshapes_in_another_order_take_the_scales_along(format, function):
    rng = np.random.default_rng(0)
    leaf = quantize(jnp.asarray(rng.normal(size=(4, 6)), jnp.float32), format)
    x = jnp.asarray(rng.normal(size=(3, 4)), jnp.float32)
    ours = jax.jit(lift(function, allow_dense=True))(leaf, x)
    np.testing.assert_allclose(ours, function(leaf.materialise(), x), 1e-5, 1e-5)


@pytest.mark.parametrize("symmetric", [True, False])
def test_an_ensemble_of_convolutions_keeps_its_groups(symmetric):
    rng = np.random.default_rng(0)
    format = Int(4, symmetric=symmetric, granularity="group", group_size=2)
    kernels = quantize(jnp.asarray(rng.normal(size=(2, 3, 3, 4, 8)), jnp.float32), format)
    image = jnp.asarray(rng.normal(size=(1, 5, 5, 4)), jnp.float32)

    def convolve(kernel, image):
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            image, kernel, (1, 1), "SAME", dimension_numbers=numbers
        )

    mapped = jax.vmap(convolve, (0, None))
    ours = jax.jit(lift(mapped, allow_dense=True))(kernels, image)
    np.testing.assert_allclose(ours, mapped(kernels.materialise(), image), 1e-4, 1e-4)


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
@pytest.mark.parametrize(
    "function",
    [
        lambda w, i: jnp.take_along_axis(w, i, axis=1),
        lambda w, i: jnp.take_along_axis(w, i, axis=0),
        lambda w, i: jax.vmap(lambda row, j: row[j])(w, i),
    ],
)
def test_gathers_along_batched_axes(granularity, function):
    weight = jnp.asarray(np.random.default_rng(0).normal(size=(4, 6)), jnp.float32)
    leaf = quantize(weight, Int(8, granularity=granularity))
    index = jnp.arange(24).reshape(4, 6) % 4
    ours = jax.jit(lift(function))(leaf, index)
    np.testing.assert_array_equal(ours, function(leaf.materialise(), index))


def test_casts_round_as_those_of_an_array_do():
    leaf = quantize(jnp.linspace(-3e5, 3e5, 24).reshape(4, 6), Int(8))
    for through in (jnp.bfloat16, jnp.float16):

        def function(w, x, through=through):
            return x @ w.astype(through).astype(jnp.float32)

        x = jnp.ones((2, 4))
        ours, theirs = lift(function)(leaf, x), function(leaf.materialise(), x)
        np.testing.assert_allclose(ours, theirs, 1e-6)
    assert np.isnan(theirs).any() or np.isinf(theirs).any()
