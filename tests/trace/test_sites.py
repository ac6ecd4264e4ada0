"""Sites: which weight, which axes, how often, at what cost."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from toy_leaves import scaled

from jopt.trace import flops, sites


def f32(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


X = f32(4, 6)
W = {"w": f32(6, 8)}

# function, params, input, [(path, contracted axes of the weight, trips)]
CASES = {
    "dense": (lambda p, x: x @ p["w"], W, X, [("w", (-2,), 1)]),
    "transposed": (lambda p, x: x @ p["w"].T, {"w": f32(8, 6)}, X, [("w", (-1,), 1)]),
    "on the left": (lambda p, x: p["w"].T @ x.T, W, X, [("w", (-2,), 1)]),
    "cast and scaled": (
        lambda p, x: x.astype("bfloat16") @ (p["w"] * 2.0).astype("bfloat16"),
        W,
        X,
        [("w", (-2,), 1)],
    ),
    "masked": (
        lambda p, x: x @ jnp.where(p["m"], p["w"], 0.0),
        {**W, "m": jax.ShapeDtypeStruct((6, 8), jnp.bool_)},
        X,
        [("w", (-2,), 1)],
    ),
    "heads": (
        lambda p, x: jnp.einsum("bi,ihd->bhd", x, p["w"]),
        {"w": f32(6, 2, 4)},
        X,
        [("w", (-3,), 1)],
    ),
    "merged heads": (
        lambda p, x: x @ p["w"].reshape(6, 8),
        {"w": f32(2, 3, 8)},
        X,
        [("w", (-3, -2), 1)],
    ),
    "split output": (
        lambda p, x: jnp.einsum("bi,ihd->bhd", x, p["w"].reshape(6, 2, 4)),
        W,
        X,
        [("w", (-2,), 1)],
    ),
    "summed beforehand": (
        lambda p, x: jnp.einsum("bi,oij->bo", x, p["w"].reshape(8, 6, 2)),
        {"w": f32(8, 12)},
        X,
        [(None, None, 1)],
    ),
    "half an axis summed": (
        lambda p, x: jnp.einsum("bi,oij->boj", x, p["w"].reshape(8, 6, 2)),
        {"w": f32(8, 12)},
        X,
        [("w", None, 1)],
    ),
    "padded": (
        lambda p, x: x @ jnp.pad(p["w"], ((0, 0), (0, 8))),
        W,
        X,
        [("w", (-2,), 1)],
    ),
    "rows in a given order": (
        lambda p, x: x @ p["w"][jnp.array([5, 4, 3, 0, 1, 2])],
        W,
        X,
        [("w", (-2,), 1)],
    ),
    "columns that are kept": (
        lambda p, x: x @ p["w"][:, jnp.array([0, 3, 5])],
        W,
        X,
        [("w", (-2,), 1)],
    ),
    "rows given in a table, one of its axes summed": (
        lambda p, x: jnp.einsum("bi,ijo->bjo", x[:, :2], p["w"][jnp.array([[0, 1], [2, 3]])]),
        W,
        X,
        [("w", None, 1)],
    ),
    "entries that are given": (
        lambda p, x: x @ p["w"][jnp.arange(6), jnp.array([0, 2, 4, 1, 3, 5])],
        W,
        X,
        [("w", None, 1)],
    ),
    "rows that the data choose": (
        lambda p, x: x[:, :2] @ p["w"][(x[0, :2] > 0).astype(jnp.int32)],
        W,
        X,
        [("w", (), 1)],
    ),
    "one slice for each example": (
        lambda p, x: jax.vmap(lambda w, i, x: x @ lax.dynamic_index_in_dim(w, i, 0, False))(
            p["w"], jnp.array([0, 1, 0, 1]), x
        ),
        {"w": f32(4, 2, 6, 8)},
        X,
        [("w", (-2,), 1)],
    ),
    "slices": (
        lambda p, x: x[:, :2] @ p["w"][:2] + x[:, 2:] @ p["w"][2:],
        W,
        X,
        [("w", (-2,), 1), ("w", (-2,), 1)],
    ),
    "fused": (
        lambda p, x: x @ jnp.concatenate([p["q"], p["k"]], 1),
        {"q": f32(6, 3), "k": f32(6, 5)},
        X,
        [("k", (-2,), 1)],
    ),
    "activations": (lambda p, x: x @ x.T, W, X, [(None, None, 1)]),
    "embedding": (
        lambda p, x: p["e"][x] @ p["e"].T,
        {"e": f32(9, 6)},
        jax.ShapeDtypeStruct((4,), jnp.int32),
        [("e", (-1,), 1)],
    ),
    "experts": (
        lambda p, x: jnp.einsum("bi,bio->bo", x, p["w"][jnp.argmax(x, 1)]),
        {"w": f32(5, 6, 8)},
        X,
        [("w", (-2,), 1)],
    ),
    "scan over layers": (
        lambda p, x: lax.scan(jax.checkpoint(lambda h, w: (h @ w, None)), x, p["w"])[0],
        {"w": f32(3, 6, 6)},
        X,
        [("w", (-2,), 3)],
    ),
    "nested scans": (
        lambda p, x: lax.scan(
            lambda h, w: (lax.fori_loop(0, 5, lambda _, h: h @ w, h), None), x, p["w"]
        )[0],
        {"w": f32(3, 6, 6)},
        X,
        [("w", (-2,), 15)],
    ),
    "branches": (
        lambda p, x: lax.cond(x[0, 0] > 0, lambda: x @ p["w"], lambda: x @ p["v"].T),
        {"w": f32(6, 6), "v": f32(6, 6)},
        X,
        [("v", (-1,), 1), ("w", (-2,), 1)],
    ),
    "chosen weight": (
        lambda p, x: x @ lax.cond(x[0, 0] > 0, lambda: p["w"], lambda: p["v"]),
        {"w": f32(6, 6), "v": f32(6, 6)},
        X,
        [("v", (-2,), 1)],
    ),
    "while": (
        lambda p, x: lax.while_loop(lambda h: h.sum() > 0, lambda h: h @ p["w"], x),
        {"w": f32(6, 6)},
        X,
        [("w", (-2,), 1)],
    ),
    "custom derivatives": (
        lambda p, x: jax.nn.relu(_authored(x, p["w"])),
        W,
        X,
        [("w", (-2,), 1)],
    ),
    "jit": (lambda p, x: jax.jit(lambda x, w: x @ w)(x, p["w"]), W, X, [("w", (-2,), 1)]),
    "inner vmap": (lambda p, x: jax.vmap(lambda r: r @ p["w"])(x), W, X, [("w", (-2,), 1)]),
    "ensemble": (
        lambda p, x: jax.vmap(lambda w: x @ w)(p["w"]),
        {"w": f32(3, 6, 8)},
        X,
        [("w", (-2,), 1)],
    ),
    "dead": (lambda p, x: [x, x @ p["w"]][0], W, X, []),
    "a typed leaf": (
        lambda p, x: x @ p["w"],
        {"w": scaled(jnp.eye(6) + 1.0)},
        X,
        [("w", (-2,), 1)],
    ),
}


@jax.custom_vjp
def _authored(x, w):
    return x @ w


_authored.defvjp(lambda x, w: (x @ w, None), lambda _, g: (g, g))


@pytest.mark.parametrize("name", CASES)
def test_weights_axes_and_trips(name):
    function, params, x, expected = CASES[name]
    assert [(s.path, s.contracted, s.trips) for s in sites(function, params, x)] == expected


def test_all_parameters_of_a_product_are_named():
    def of(name):
        return sites(*CASES[name][:3])[0]

    assert of("fused").paths == ("k", "q")
    assert set(of("chosen weight").paths) == {"v", "w"}
    assert of("masked").paths == ("w", "m")  # the heavier first
    (use, looked_up) = of("embedding").uses
    assert (use.operand, use.indexed, looked_up.operand, looked_up.indexed) == (1, False, 0, True)


def test_only_loops_of_unknown_length_and_branches_are_inexact():
    inexact = [n for n in CASES if not all(s.exact for s in sites(*CASES[n][:3]))]
    assert inexact == ["branches", "while"]


def test_branches_for_other_platforms_only_are_all_listed():
    def function(p, x):
        return lax.platform_dependent(x, tpu=lambda x: x @ p["w"], cuda=lambda x: 2.0 * x @ p["w"])

    found = sites(function, W, X)
    assert [(s.path, s.exact) for s in found] == [("w", False)] * 2


def test_sizes_and_cost():
    (site,) = sites(*CASES["scan over layers"][:3])
    assert site.shapes == ((4, 6), (6, 6), (4, 6))
    assert site.flops == 2 * 4 * 6 * 6 and site.total == 3 * site.flops
    assert site.bytes == 4 * (24 + 36 + 24)
    assert "test_sites.py" in site.source
    (int4,) = sites(
        lambda p, x: lax.dot(x, p, preferred_element_type=jnp.int32),
        jax.ShapeDtypeStruct((6, 3), jnp.int4),
        jax.ShapeDtypeStruct((4, 6), jnp.int4),
    )
    assert int4.bytes == 24 // 2 + 18 // 2 + 4 * 12
    assert int4.path == ""


def test_convolution_axes():
    def function(p, x):
        numbers = ("NHWC", "HWIO", "NHWC")
        x = lax.conv_general_dilated(x, p["a"], (1, 1), "SAME", dimension_numbers=numbers)
        return lax.conv_general_dilated(
            x, p["b"], (1, 1), "SAME", dimension_numbers=numbers, feature_group_count=4
        )

    params = {"a": f32(3, 3, 2, 4), "b": f32(3, 3, 1, 4)}
    found = sites(function, params, f32(1, 5, 5, 2))
    assert [(s.path, s.contracted) for s in found] == [("a", (-4, -3, -2)), ("b", (-4, -3, -2))]
    assert [s.operation for s in found] == ["conv_general_dilated"] * 2
    assert [s.uses[0].features for s in found] == [(-2,), (-2,)]


HWIO = ("NHWC", "HWIO", "NHWC")
KERNELS = {  # what becomes a kernel of 8 x 8 x 4 x 6 before the product, its features
    "as it is": ((8, 8, 4, 6), lambda w: w, HWIO, (-2,)),
    "of torch": ((6, 4, 8, 8), lambda w: w, ("NHWC", "OIHW", "NHWC"), (-3,)),
    "of torch, transposed": ((6, 4, 8, 8), lambda w: w.transpose(2, 3, 1, 0), HWIO, (-3,)),
    "a window of one axis": ((64, 4, 6), lambda w: w.reshape(8, 8, 4, 6), HWIO, (-2,)),
    "features of two axes": ((8, 8, 2, 2, 6), lambda w: w.reshape(8, 8, 4, 6), HWIO, (-3, -2)),
    "window and features": ((256, 6), lambda w: w.reshape(8, 8, 4, 6), HWIO, None),
    "features, and half the outputs": (
        (8, 8, 2, 12),
        lambda w: w.reshape(8, 8, 4, 6),
        HWIO,
        None,
    ),
}


@pytest.mark.parametrize("name", KERNELS)
def test_input_features_of_a_convolution(name):
    shape, seen, numbers, features = KERNELS[name]

    def function(p, x):
        return lax.conv_general_dilated(x, seen(p), (4, 4), "SAME", dimension_numbers=numbers)

    (site,) = sites(function, f32(*shape), f32(1, 16, 16, 4))
    assert site.uses[0].features == features
    assert all(use.features is None for s in sites(jnp.dot, f32(4, 6), f32(6)) for use in s.uses)


class Block(nn.Module):
    """A block of a flax model, for names."""

    @nn.compact
    def __call__(self, x):
        x = x + nn.MultiHeadDotProductAttention(2, name="attention")(nn.LayerNorm()(x))
        return x + nn.Dense(x.shape[-1])(nn.gelu(nn.Dense(32)(x)))


def test_names_and_paths_of_a_flax_model():
    model, x = Block(), jnp.ones((2, 5, 8))
    params = jax.eval_shape(model.init, jax.random.key(0), x)
    found = sites(model.apply, params, x)
    assert [(s.name.split("/")[-2:], s.path) for s in found if s.path][:2] == [
        (["attention", "query"], "params/attention/query/kernel"),
        (["attention", "key"], "params/attention/key/kernel"),
    ]
    assert [s.contracted for s in found if s.path] == [(-3,)] * 3 + [(-3, -2), (-2,), (-2,)]
    assert [s.path for s in found].count(None) == 2  # queries with keys, weights with values


# Cost, against what XLA counts in the compiled program.


def _mlp(p, x):
    for w in p:
        x = jax.nn.relu(x @ w)
    return x


def _convolutions(p, x):
    numbers = ("NHWC", "HWIO", "NHWC")
    x = jax.nn.relu(lax.conv_general_dilated(x, p[0], (2, 2), "SAME", dimension_numbers=numbers))
    x = lax.conv_general_dilated(
        x, p[1], (1, 1), "SAME", rhs_dilation=(2, 2), dimension_numbers=numbers
    )
    return lax.conv_general_dilated(
        x, p[2], (1, 1), "VALID", dimension_numbers=numbers, feature_group_count=4
    )


def _transposed_convolution(p, x):
    return lax.conv_transpose(x, p, (2, 2), "SAME")


def _attention(p, x):
    q, k, v = (jnp.einsum("btd,dhe->bthe", x, w) for w in p[:3])
    a = jax.nn.relu(jnp.einsum("bthe,bshe->bhts", q, k))
    return jnp.einsum("bhts,bshe,hed->btd", a, v, p[3])


COSTED = {
    "mlp": (_mlp, [f32(64, 128), f32(128, 128), f32(128, 32)], f32(32, 64)),
    "gradient": (
        jax.grad(lambda p, x: jnp.sum(_mlp(p, x))),
        [f32(64, 128), f32(128, 128), f32(128, 32)],
        f32(32, 64),
    ),
    "attention": (_attention, [f32(64, 4, 16)] * 3 + [f32(4, 16, 64)], f32(2, 32, 64)),
    "convolutions": (
        _convolutions,
        [f32(3, 3, 16, 32), f32(3, 3, 32, 32), f32(3, 3, 8, 32)],
        f32(2, 14, 14, 16),
    ),
    "convolutions, gradient": (
        jax.grad(lambda p, x: jnp.sum(_convolutions(p, x))),
        [f32(3, 3, 16, 32), f32(3, 3, 32, 32), f32(3, 3, 8, 32)],
        f32(2, 14, 14, 16),
    ),
    "transposed convolution": (_transposed_convolution, f32(4, 4, 16, 32), f32(2, 7, 7, 16)),
}


@pytest.mark.parametrize("name", COSTED)
def test_flops_agree_with_xla(name):
    function, params, x = COSTED[name]
    counted = jax.jit(function).lower(params, x).compile().cost_analysis()["flops"]
    np.testing.assert_allclose(flops(function, params, x), counted, rtol=0.05)


def test_source_is_the_users_line_and_the_frameworks():
    model, x = Block(), jnp.ones((2, 5, 8))
    params = jax.eval_shape(model.init, jax.random.key(0), x)
    sources = [site.source for site in sites(model.apply, params, x)]
    pattern = (
        r".*test_sites\.py:\d+:\d+ \(Block\.__call__\), in .*flax/linen/\w+\.py:\d+:\d+ \(.*\)"
    )
    assert all(re.fullmatch(pattern, source) for source in sources), sources


def test_flops_of_all_shards():
    mesh = jax.make_mesh((4,), ("data",), (jax.sharding.AxisType.Auto,))
    rows, whole = jax.sharding.PartitionSpec("data"), jax.sharding.PartitionSpec()
    body = jax.shard_map(lambda p, x: x @ p["w"], mesh=mesh, in_specs=(whole, rows), out_specs=rows)
    (site,) = sites(body, W, f32(8, 6))
    assert (site.path, site.contracted, site.trips) == ("w", (-2,), 4)
    assert site.total == 2 * 8 * 6 * 8


@pytest.mark.parametrize("tiled", [True, False])
def test_weights_gathered_from_shards(tiled):
    mesh = jax.make_mesh((4,), ("data",), (jax.sharding.AxisType.Auto,))
    rows = jax.sharding.PartitionSpec("data")

    def layer(w, x):
        w = lax.all_gather(w, "data", tiled=tiled)
        return x @ w.reshape(8, 6)

    body = jax.shard_map(layer, mesh=mesh, in_specs=(rows, rows), out_specs=rows)
    (site,) = sites(body, f32(8, 6), f32(8, 8))
    assert (site.path, site.contracted, site.trips) == ("", (-2,), 4)


def test_flops_count_every_trip_of_a_scan():
    def function(p, x):
        return lax.scan(lambda h, w: (h @ w, None), x, p)[0]

    assert flops(function, f32(7, 64, 64), f32(8, 64)) == 7 * 2 * 8 * 64 * 64


def test_of_branches_by_platform_the_one_that_runs_here_counts():
    def by_platform(params, x):
        def here(kernel, x):
            return x @ kernel

        def there(kernel, x):
            return x @ (kernel @ kernel)

        return jax.lax.platform_dependent(params["kernel"], x, cpu=here, default=there)

    params = {"kernel": jnp.zeros((4, 4))}
    (site,) = sites(by_platform, params, jnp.zeros((2, 4)))
    assert site.path == "kernel" and site.flops == 2 * 2 * 4 * 4 and site.exact


def test_weights_put_side_by_side_are_all_weights():
    w, v, bias = jnp.ones((8, 6)), jnp.ones((8, 6)), jnp.ones(6)
    params, x = {"w": w, "v": v, "b": bias}, jnp.ones((3, 8))

    def weights(apply, x=x):
        (site,) = sites(apply, params, x)
        return site.weights

    assert weights(lambda p, x: x @ jnp.concatenate([p["w"], p["v"]], 1)) == ("w", "v")
    either = lambda p, x: x @ lax.cond(x.sum() > 0, lambda: p["w"], lambda: p["v"])  # noqa: E731
    assert sorted(weights(either)) == ["v", "w"]
    each = lambda p, x: jax.vmap(either, (None, 0))(p, x)  # noqa: E731
    assert sorted(weights(each)) == ["v", "w"]
    picked = lambda p, x: x @ jnp.where(x[0, 0] > 0, p["w"], 0.0)  # noqa: E731
    assert weights(picked) == ("w",)
    assert len(weights(lambda p, x: x @ (p["w"] * p["v"]))) == 1  # a mask, say
    row = lambda p, x: x @ jnp.concatenate([p["w"], p["b"][None]])  # noqa: E731
    assert weights(row, jnp.ones((3, 9))) == ("w",)
    assert sites(lambda p, x: x @ x.T, params, x)[0].weights == ()


def test_ragged_products_are_products():
    params, counts = {"experts": jnp.ones((3, 8, 6))}, jnp.array([1, 2, 1])
    apply = lambda p, x: lax.ragged_dot(x, p["experts"], counts)  # noqa: E731
    (site,) = sites(apply, params, jnp.ones((4, 8)))
    assert (site.path, site.contracted, site.uses[0].batched) == ("experts", (-2,), (-3,))
    assert site.flops == 2 * 4 * 8 * 6
