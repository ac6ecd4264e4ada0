"""SmoothQuant: its formula, and folding its scales into the neighbours without a trace."""

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jopt
from jopt.quant import Int, Spec, quantize
from jopt.quant._leaves.scaled import Scaled, along, scaled
from jopt.quant._smoothing.smoothquant import folded, folds, smooth, smoothquant_scales

D, HEADS, WIDE = 12, 3, 20


@pytest.fixture(autouse=True)
def _models_broadcast():
    """The models here are written as users write them."""
    with jax.numpy_rank_promotion("allow"):
        yield


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape) * 0.4


def layer_norm(x, scale, bias):
    x = x - x.mean(-1, keepdims=True)
    return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-5) * scale + bias


def block(x, p):
    h = layer_norm(x, p["scale"], p["bias"])
    q, k, v = ((h @ p[name]).reshape(*x.shape[:-1], HEADS, -1) for name in "qkv")
    scores = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k))
    mixed = jnp.einsum("bhqk,bkhd->bqhd", scores, v).reshape(x.shape)
    x = x + mixed @ p["o"]
    h = x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-5) * p["rms"]
    return x + (jax.nn.silu(h @ p["gate"]) * (h @ p["up"])) @ p["down"]


def parameters(layers=()):
    shapes = {
        **dict.fromkeys("qkvo", (D, D)),
        **{"gate": (D, WIDE), "up": (D, WIDE), "down": (WIDE, D)},
        **{"scale": (D,), "bias": (D,), "rms": (D,)},
    }
    made = {name: normal(i, *layers, *shape) for i, (name, shape) in enumerate(shapes.items())}
    # Activations with channels of very different size.
    made["scale"] = made["scale"] * jnp.exp(jnp.arange(D, dtype=jnp.float32) / 3)
    return made


def stacked(params, x):
    return jax.lax.scan(lambda x, p: (jax.checkpoint(block)(x, p), None), x, params)[0]


def test_scales_are_the_formula():
    rng = np.random.default_rng(0)
    x, w = rng.uniform(0.1, 9, (2, 7)), rng.uniform(0.1, 9, (2, 7))
    for alpha in (0, 0.5, 0.8, 1):
        ours = smoothquant_scales(jnp.float32(x), jnp.float32(w), alpha=alpha)
        np.testing.assert_allclose(ours, x**alpha / w ** (1 - alpha), rtol=1e-5)
    x[0, 1] = w[1, 2] = 0
    ours = smoothquant_scales(jnp.float32(x), jnp.float32(w))
    assert ours[0, 1] == 1 and ours[1, 2] == 1
    with pytest.raises(ValueError, match="alpha is from 0 to 1"):
        smoothquant_scales(jnp.float32(x), jnp.float32(w), alpha=2)
    with pytest.raises(ValueError, match="one value for each input of both"):
        smoothquant_scales(jnp.ones(3), jnp.ones(2))


@pytest.mark.parametrize("layers", [(), (3,)])
def test_a_transformer_block_folds_all_and_stays_the_same_function(layers):
    params, x = parameters(layers), normal(99, 2, 5, D)
    apply = stacked if layers else lambda p, x: block(x, p)
    smoothed, rows = smooth(apply, params, [x, 2 * x])
    assert {row.paths: row.into for row in rows} == {
        ("k", "q", "v"): ("bias", "scale"),
        ("o",): ("v",),
        ("gate", "up"): ("rms",),
        ("down",): ("up",),
    }
    assert all(row.scales.shape[:-1] == layers and row.reason == "" for row in rows)
    before, after = apply(params, x), apply(smoothed, x)
    np.testing.assert_allclose(after, before, rtol=2e-4, atol=2e-4)
    assert not np.allclose(smoothed["scale"], params["scale"])

    largest = {}
    for name, p in (("before", params), ("after", smoothed)):
        first = {k: v[0] for k, v in p.items()} if layers else p
        h = layer_norm(x, first["scale"], first["bias"])
        largest[name] = np.abs(h).max((0, 1))
    s = np.asarray(rows[0].scales).reshape(-1, D)[0]
    np.testing.assert_allclose(largest["after"], largest["before"] / s, rtol=1e-4)


def test_scales_come_from_all_batches_and_all_weights():
    params, x = parameters(), normal(99, 2, 5, D)
    _, rows = smooth(lambda p, x: block(x, p), params, [x, 3 * x + 1], "q")
    h = [layer_norm(x, params["scale"], params["bias"]) for x in (x, 3 * x + 1)]
    largest = np.max([np.abs(each).max((0, 1)) for each in h], 0)
    weight = np.max([np.abs(params[name]).max(1) for name in "qkv"], 0)
    (row,) = rows
    np.testing.assert_allclose(row.scales, np.sqrt(largest / weight), rtol=1e-4)


def test_powers_of_two_fold_without_any_rounding():
    params, x = parameters(), normal(99, 2, 5, D)
    apply = jax.jit(lambda p, x: block(x, p))
    for fold in folds(apply, params, x, paths=["q", "down"]):
        count = params[fold.weights[0].path].shape[0]
        scales = 2.0 ** jax.random.randint(jax.random.key(1), (count,), -3, 4).astype(jnp.float32)
        new = folded(params, fold, scales)
        np.testing.assert_array_equal(apply(new, x), apply(params, x))


class Linen(linen.Module):
    """Attention and a perceptron in flax."""

    @linen.compact
    def __call__(self, x):
        x = x + linen.MultiHeadDotProductAttention(HEADS)(linen.LayerNorm()(x))
        h = linen.relu(linen.Dense(WIDE)(linen.LayerNorm()(x)))
        return x + linen.Dense(D)(h)


def test_a_linen_model_folds():
    model, x = Linen(), normal(5, 2, 6, D)
    params = model.init(jax.random.key(0), x)
    smoothed, rows = smooth(model.apply, params, [x])
    into = {row.paths[0].split("/", 1)[1]: row.into for row in rows}
    attention = "MultiHeadDotProductAttention_0"
    assert into[f"{attention}/key/kernel"] == (
        "params/LayerNorm_0/bias",
        "params/LayerNorm_0/scale",
    )
    assert into[f"{attention}/out/kernel"] == (
        f"params/{attention}/value/bias",
        f"params/{attention}/value/kernel",
    )
    assert into["Dense_0/kernel"] == ("params/LayerNorm_1/bias", "params/LayerNorm_1/scale")
    assert into["Dense_1/kernel"] == ("params/Dense_0/bias", "params/Dense_0/kernel")
    expected = model.apply(params, x)
    np.testing.assert_allclose(model.apply(smoothed, x), expected, rtol=1e-4, atol=1e-4)


def test_an_equinox_layout_folds():
    def apply(p, x):
        h = jax.nn.leaky_relu(p["w"] @ x + p["b"])
        return p["v"] @ h

    params = {"w": normal(0, 8, 4), "b": normal(1, 8), "v": normal(2, 3, 8)}
    x = normal(3, 4)
    smoothed, rows = smooth(apply, params, [x], "v")
    assert rows[0].into == ("b", "w")
    np.testing.assert_allclose(apply(smoothed, x), apply(params, x), rtol=1e-4, atol=1e-5)


def convolutions(p, x):
    numbers = ("NHWC", "HWIO", "NHWC")
    x = jax.lax.conv_general_dilated(x, p["first"], (1, 1), "SAME", dimension_numbers=numbers)
    x = jax.nn.relu(x * p["scale"] + p["shift"])
    x = jax.lax.conv_general_dilated(x, p["second"], (1, 1), "SAME", dimension_numbers=numbers)
    return x.sum((1, 2)) @ p["head"]


def test_convolutions_fold_by_feature():
    params = {
        "first": normal(0, 3, 3, 2, 5),
        "scale": normal(1, 5),
        "shift": normal(2, 5),
        "second": normal(3, 3, 3, 5, 4),
        "head": normal(4, 4, 3),
    }
    x = normal(5, 2, 6, 6, 2)
    smoothed, rows = smooth(convolutions, params, [x])
    into = {row.paths: row.into for row in rows}
    assert into[("second",)] in (("scale", "shift"), ("first", "shift"))
    assert into[("head",)] == ("second",) and into[("first",)] == ()
    np.testing.assert_allclose(
        convolutions(smoothed, x), convolutions(params, x), rtol=1e-3, atol=1e-4
    )
    hidden = np.asarray(
        jax.nn.relu(
            jax.lax.conv_general_dilated(
                x, params["first"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            * params["scale"]
            + params["shift"]
        )
    ).max((0, 1, 2))
    weight = np.abs(np.asarray(params["second"])).max((0, 1, 3))
    live = hidden > 0
    scales = np.asarray(rows[[row.paths for row in rows].index(("second",))].scales)
    np.testing.assert_allclose(scales[live], np.sqrt(hidden / weight)[live], rtol=1e-4)


@pytest.mark.parametrize(
    "apply, reason",
    [
        (lambda p, x: jax.nn.gelu(x @ p["a"]) @ p["b"], "`"),
        (lambda p, x: x @ p["b"].T @ p["a"], "returns"),
        (lambda p, x: ((h := x @ p["a"]) @ p["b"], h), "returns the activation"),
        (lambda p, x: (h := x @ p["a"]) @ p["b"] + jnp.tanh(h).sum(), "`tanh`"),
        (lambda p, x: jnp.maximum(x @ p["a"], 1.0) @ p["b"], "`max` with a number"),
        (lambda p, x: (x @ p["a"])[..., ::-1] @ p["b"], "`rev`"),
        (lambda p, x: jax.nn.relu((x @ p["a"]) @ p["b"]) @ p["b"].T @ p["b"], "`"),
    ],
)
def test_what_cannot_be_folded_is_left_with_a_reason(apply, reason):
    params, x = {"a": normal(0, 4, 6), "b": normal(1, 6, 4)}, normal(2, 3, 4)
    if reason == "returns":  # nothing stands before the first product
        params["b"], reason = normal(1, 4, 4), "input of the function"
        smoothed, rows = smooth(apply, params, [x], "b")
    else:
        smoothed, rows = smooth(apply, params, [x], "b")
    assert rows[0].into == () and reason in rows[0].reason and rows[0].scales is None
    assert all(smoothed[name] is params[name] for name in params)


def test_layers_that_share_a_norm_cannot_fold_it():
    def apply(p, x):
        def layer(x, kernel):
            return jnp.tanh(layer_norm(x, p["scale"], p["bias"]) @ kernel), None

        return jax.lax.scan(layer, x, p["kernels"])[0]

    params = {"scale": jnp.ones(4), "bias": jnp.zeros(4), "kernels": normal(0, 3, 4, 4)}
    _, rows = smooth(apply, params, [normal(1, 2, 4)])
    assert "layers share a parameter" in rows[0].reason
    leaves, rows = smooth(apply, params, [normal(1, 2, 4)], leaves=True)
    assert isinstance(leaves["kernels"], Scaled) and rows[0].scales.shape == (3, 4)
    x = normal(2, 2, 4)
    np.testing.assert_allclose(jopt.lift(apply)(leaves, x), apply(params, x), atol=1e-5)


def image_layers(layout, groups=1, **options):
    """A convolution that nothing can be folded into before, and the product that reads it."""
    channels = layout[0].index("C")

    def apply(p, x):
        options_of = {"dimension_numbers": layout, "feature_group_count": groups, **options}
        y = jax.lax.conv_general_dilated(x, p["first"], (1, 1), "SAME", **options_of)
        y = jnp.moveaxis(y, channels, -1) + p["bias"]
        return jax.nn.relu(y).mean((1, 2)) @ p["second"]

    return apply


CHAINS = {
    "perceptron": (
        lambda p, x: jax.nn.relu(x @ p["first"] + p["bias"]) @ p["second"],
        (6, 8),
        (5, 6),
    ),
    "experts": (
        lambda p, x: jnp.einsum(
            "nef,fo->no", jax.nn.relu(jnp.einsum("nd,edf->nef", x, p["first"])), p["second"]
        ),
        (3, 6, 8),
        (5, 6),
    ),
    "channels last": (
        image_layers(("NHWC", "HWIO", "NHWC"), rhs_dilation=(2, 2)),
        (3, 3, 2, 8),
        (2, 6, 6, 2),
    ),
    "channels first": (image_layers(("NCHW", "OIHW", "NCHW")), (8, 3, 3, 3), (2, 3, 6, 6)),
}


@pytest.mark.parametrize("name", CHAINS)
def test_a_leaf_takes_what_the_product_after_it_folds(name):
    apply, first, inputs = CHAINS[name]
    params = {"first": normal(0, *first), "bias": normal(1, 8), "second": normal(2, 8, 4)}
    x = normal(3, *inputs)
    smoothed, rows = smooth(apply, params, [x], leaves=True)
    assert isinstance(smoothed["first"], Scaled)
    assert rows[0].paths == ("first",) and rows[0].into == () and rows[0].scales is not None
    assert rows[1].paths == ("second",) and "first" in rows[1].into
    outputs = -4 if name == "channels first" else -1
    expected = params["first"] / along(rows[1].scales, first, (outputs,))
    np.testing.assert_allclose(smoothed["first"].materialise(), expected, rtol=1e-4)
    after = jopt.lift(apply)(smoothed, x)
    np.testing.assert_allclose(after, apply(params, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("groups", [2, 8])
def test_a_kernel_of_grouped_features_is_left_with_a_reason(groups):
    apply = image_layers(("NHWC", "HWIO", "NHWC"), groups)
    params = {"first": normal(0, 3, 3, 8 // groups, 8), "bias": normal(1, 8)}
    params["second"] = normal(2, 8, 4)
    x = normal(3, 2, 6, 6, 8)
    smoothed, rows = smooth(apply, params, [x], leaves=True)
    assert smoothed["first"] is params["first"] and isinstance(smoothed["second"], Scaled)
    assert rows[0].scales is None and rows[1].scales is not None
    assert "in groups" in rows[0].reason and "no leaf would do" in rows[0].reason
    after = jopt.lift(apply)(smoothed, x)
    np.testing.assert_allclose(after, apply(params, x), rtol=1e-4, atol=1e-5)


def test_leaves_divide_the_activation_in_every_layout():
    cases = [
        (lambda w, x: x @ w, (6, 4), (-2,), (3, 6)),
        (lambda w, x: w @ x, (4, 6), (-1,), (6, 3)),
        (lambda w, x: jnp.einsum("bhd,hdo->bo", x, w), (2, 3, 4), (-3, -2), (5, 2, 3)),
        (lambda w, x: x @ w.reshape(6, 4), (2, 3, 4), (-3, -2), (5, 6)),
        (lambda w, x: jnp.einsum("bi,oi->ob", x, w.T.T), (4, 6), (-1,), (3, 6)),
    ]
    for apply, shape, axes, inputs in cases:
        weight, x = normal(0, *shape), normal(1, *inputs)
        count = int(np.prod([shape[axis] for axis in axes]))
        scales = jnp.exp(normal(2, count))
        leaf = scaled(weight * along(scales, shape, axes), scales, axes)
        np.testing.assert_allclose(leaf.materialise(), weight, rtol=1e-5)
        lifted = jax.jit(jopt.lift(apply))
        np.testing.assert_allclose(lifted(leaf, x), apply(weight, x), rtol=1e-4, atol=1e-5)


def test_a_quantized_base_runs_by_its_own_rules():
    weight, x = normal(0, 8, 4), normal(1, 5, 8) * jnp.exp(jnp.arange(8, dtype=jnp.float32))
    scales = jnp.max(jnp.abs(x), 0)
    base = quantize(weight * scales[:, None], Spec(Int(8), Int(8)))
    leaf = scaled(base, scales)

    def apply(w, x):
        return x @ w

    out = jax.jit(jopt.lift(apply))(leaf, x)
    expected = jopt.lift(apply)(base, x / scales)
    np.testing.assert_allclose(out, expected, rtol=1e-5)
    assert "preferred_element_type=int32" in str(jax.make_jaxpr(jopt.lift(apply))(leaf, x))
    gradient = jax.grad(lambda x: jopt.lift(apply)(leaf, x).sum())(x)
    expected = jnp.broadcast_to(leaf.materialise().sum(1), x.shape)
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-5)
    mapped = jax.vmap(jopt.lift(apply), (None, 0))(leaf, x[:, None])
    assert mapped.shape == (5, 1, 4)


def test_a_quantized_leaf_is_seen_otherwise_and_counted():
    weight, x = normal(0, 2, 3, 8), normal(1, 4, 6)
    scales = jnp.exp(normal(2, 6))
    format = Int(4, granularity="group", group_size=3)
    base = quantize((weight.reshape(6, 8) * scales[:, None]), format)
    leaf = scaled(base, scales)

    def apply(w, x):
        return x[:, 2:] @ w[2:].T.reshape(2, 4, 4).reshape(8, 4).T

    expected = apply(leaf.materialise(), x)
    np.testing.assert_allclose(jopt.lift(apply)(leaf, x), expected, rtol=1e-4, atol=1e-5)
    rows = jopt.lift(lambda w, i: w[i])(leaf, jnp.array([1, 4]))
    np.testing.assert_allclose(rows, leaf.materialise()[jnp.array([1, 4])], rtol=1e-6)
    assert set(leaf.storage()) == {"inverse", "base/codes", "base/scale"}
    assert leaf.size().bits == base.size().bits + 6 * 32
    assert jopt.size({"w": leaf}).parameters == 48


def test_a_kernel_of_a_convolution_may_be_a_leaf():
    kernel, x = normal(0, 3, 3, 2, 5), normal(1, 2, 6, 6, 2)
    scales = jnp.array([0.5, 3.0])
    leaf = scaled(kernel * scales[:, None], scales)

    def apply(w, x):
        return jax.lax.conv_general_dilated(
            x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    np.testing.assert_allclose(jopt.lift(apply)(leaf, x), apply(kernel, x), rtol=1e-4, atol=1e-5)


def test_arguments_are_checked():
    params, x = {"a": normal(0, 4, 6)}, normal(2, 3, 4)

    def apply(p, x):
        return x @ p["a"]

    with pytest.raises(ValueError, match="no batch"):
        smooth(apply, params, [])
    with pytest.raises(ValueError, match="activation that meets `a` has a NaN"):
        smooth(apply, params, [x * np.nan])
    with pytest.raises(ValueError, match="matched none"):
        smooth(apply, params, [x], "b")
    with pytest.raises(ValueError, match="none of the chosen parameters"):
        smooth(lambda p, x: x * p["a"].sum(), params, [x])
