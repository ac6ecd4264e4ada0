"""Cross-layer equalization: the function stays, the ranges meet, and only where that is safe."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen

from jopt import nn
from jopt.quant import Int, equalize, quantize
from jopt.trace import lift


def uneven(tree, seed=0):
    """Weights whose channels differ by factors up to a hundred."""
    rng = np.random.default_rng(seed)

    def draw(leaf):
        spread = 10 ** rng.uniform(-1, 1, leaf.shape[-1])
        return jnp.asarray(rng.normal(size=leaf.shape) * spread, leaf.dtype)

    return jax.tree.map(draw, tree)


def same(apply, old, new, x, rtol=1e-4):
    wanted, got = (np.asarray(jax.jit(apply)(p, x)) for p in (old, new))
    np.testing.assert_allclose(got, wanted, rtol=rtol, atol=rtol * np.abs(wanted).max())


def by_formula(first, bias, second):
    """Nagel et al., equations 9 and 11, in float64: kernels [in, out]."""
    first, bias, second = (np.asarray(a, np.float64) for a in (first, bias, second))
    own, theirs = np.abs(first).max(0), np.abs(second).max(1)
    s = np.sqrt(own * theirs) / theirs
    return first / s, bias / s, second * s[:, None]


def mlp(params, x):
    x = jax.nn.relu(x @ params["w"] + params["b"][None])
    return x @ params["v"] + params["c"][None]


def mlp_case():
    shapes = {"w": (5, 7), "b": (7,), "v": (7, 3), "c": (3,)}
    params = uneven({k: jnp.zeros(s) for k, s in shapes.items()})
    return params, jax.random.normal(jax.random.key(0), (6, 5))


def test_one_pair_is_the_published_formula():
    params, x = mlp_case()
    new, report = equalize(mlp, params, x)
    same(mlp, params, new, x)
    w, b, v = by_formula(params["w"], params["b"], params["v"])
    np.testing.assert_allclose(new["w"], w, rtol=1e-5)
    np.testing.assert_allclose(new["b"], b, rtol=1e-5)
    np.testing.assert_allclose(new["v"], v, rtol=1e-5)
    np.testing.assert_array_equal(new["c"], params["c"])
    first, second = report
    assert (first.first, first.second, first.biases, first.reason) == ("w", ("v",), ("b",), "")
    np.testing.assert_allclose(np.asarray(params["w"]) / first.scale, new["w"], rtol=1e-5)
    assert second.reason == "its channels leave the function, or the body of a loop"
    # Ranges meet, and one scale for the whole tensor serves better.
    np.testing.assert_allclose(np.abs(new["w"]).max(0), np.abs(new["v"]).max(1), rtol=1e-5)
    policy = [("w", Int(6, granularity="tensor")), ("v", Int(6, granularity="tensor"))]

    def error(p):
        return np.abs(np.asarray(lift(mlp)(quantize(p, policy), x) - mlp(params, x))).mean()

    assert error(new) < 0.7 * error(params)


ACTIVATIONS = {
    "identity": lambda x: x,
    "relu": jax.nn.relu,
    "leaky": jax.nn.leaky_relu,
    "abs": jnp.abs,
    "where": lambda x: jnp.where(x > 0, x, 0.1 * x),
    "maximum": lambda x: jnp.maximum(x, 0.25 * x),
    "residual": lambda x: x + jax.nn.relu(x),
    "scaled": lambda x: -3.0 * x / 2.0,
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_what_passes_a_factor_on(name):
    params, x = mlp_case()

    def apply(params, x):
        return ACTIVATIONS[name](x @ params["w"] + params["b"][None]) @ params["v"]

    new, (row, _) = equalize(apply, params, x)
    assert row.reason == ""
    assert np.abs(np.log(row.scale)).max() > 0.5
    same(apply, params, new, x)


@pytest.mark.parametrize(
    "name", ["tanh", "relu6", "square", "shifted", "softmax", "gelu", "norm", "sum", "reversed"]
)
def test_what_does_not(name):
    function = {
        "tanh": jnp.tanh,
        "relu6": jax.nn.relu6,
        "square": jnp.square,
        "shifted": lambda x: x + 1.0,
        "softmax": jax.nn.softmax,
        "gelu": jax.nn.gelu,
        "norm": lambda x: x - x.mean(-1, keepdims=True),
        "sum": lambda x: jnp.cumsum(x, axis=-1),
        "reversed": lambda x: x[:, ::-1],
    }[name]
    params, x = mlp_case()

    def apply(params, x):
        return function(x @ params["w"]) @ params["v"]

    new, (row, *_) = equalize(apply, params, x)
    assert "its channels meet" in row.reason
    jax.tree.map(np.testing.assert_array_equal, new, params)


def test_weights_that_are_shared_stay():
    params, x = mlp_case()

    def tied(params, x):
        y = jax.nn.relu(x @ params["w"]) @ params["v"]
        return y, x @ params["w"]

    def bias_elsewhere(params, x):
        return mlp(params, x) + params["b"].sum()

    def both(params, x):
        x = jax.nn.relu(x @ params["w"])
        return x @ params["v"], x.sum()

    def half(params, x):
        return jax.nn.relu((x @ params["w"])[:, :4]) @ params["v"][:4]

    def penalty(params, x):
        return jnp.square(params["v"]).sum() + mlp(params, x)

    for apply, reason in (
        (tied, "it is used elsewhere as well"),
        (bias_elsewhere, "`b` is used elsewhere as well"),
        (both, "its channels meet `reduce_sum`"),
        (half, "its channels meet `slice`"),
        (penalty, "`v` is used elsewhere as well"),
    ):
        new, (row, *_) = equalize(apply, params, x)
        assert reason in row.reason, row.reason
        jax.tree.map(np.testing.assert_array_equal, new, params)


def test_several_readers_and_gates():
    params = uneven({"gate": jnp.zeros((5, 8)), "up": jnp.zeros((5, 8)), "down": jnp.zeros((8, 5))})
    x = jax.random.normal(jax.random.key(0), (6, 5))

    def gated(params, x):
        return (jax.nn.silu(x @ params["gate"]) * (x @ params["up"])) @ params["down"]

    new, report = equalize(gated, params, x)
    rows = {row.first: row for row in report}
    assert rows["up"].second == ("down",) and "logistic" in rows["gate"].reason
    same(gated, params, new, x)

    def two(params, x):
        x = jax.nn.relu(x @ params["up"])
        return x @ params["down"] + jnp.tanh(x @ params["gate"].T)

    new, report = equalize(two, params, x)
    row = report[0]
    assert row.first == "up" and set(row.second) == {"down", "gate"}
    same(two, params, new, x)
    theirs = np.maximum(np.abs(new["down"]).max(1), np.abs(new["gate"]).max(0))
    np.testing.assert_allclose(np.abs(new["up"]).max(0), theirs, rtol=1e-3)


class Net(linen.Module):
    depthwise: bool = False

    @linen.compact
    def __call__(self, x):
        x = jax.nn.relu(linen.Conv(8, (3, 3))(x))
        if self.depthwise:
            x = jax.nn.relu(linen.Conv(8, (3, 3), feature_group_count=8)(x))
        x = linen.max_pool(x, (2, 2), (2, 2))
        x = jax.nn.relu(linen.Conv(6, (3, 3), strides=2, padding="VALID")(x))
        return linen.Dense(3)(x.mean((1, 2)))


@pytest.mark.parametrize("depthwise", [False, True])
def test_a_convolutional_network(depthwise):
    net, x = Net(depthwise), jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
    variables = uneven(net.init(jax.random.key(1), x))
    new, report = equalize(net.apply, variables, x)
    same(net.apply, variables, new, x)
    assert [row.reason == "" for row in report] == [True] * (2 + depthwise) + [False]
    kernels = [np.asarray(new["params"][row.first.split("/")[1]]["kernel"]) for row in report]
    own = np.abs(kernels[0]).max((0, 1, 2))
    theirs = np.abs(kernels[1]).max((0, 1, 2) if depthwise else (0, 1, 3))
    np.testing.assert_allclose(own, theirs, rtol=0.01)  # until nothing moves


def test_folded_batch_norms_and_the_models_of_jopt():
    net = nn.ConvNet(widths=(4, 6), hidden=8)
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
    variables = net.init(jax.random.key(1), x)
    variables = {
        "params": uneven(variables["params"]),
        "batch_stats": jax.tree.map(lambda a: jnp.abs(a) + 0.5, uneven(variables["batch_stats"])),
    }
    folded, _ = nn.fold_batch_norm(net.apply, variables, x)
    new, report = equalize(net.apply, folded, x)
    same(net.apply, folded, new, x)
    rows = {row.first: row for row in report}
    assert rows["params/Conv_0/kernel"].reason == ""
    assert "params/BatchNorm_0/bias" in rows["params/Conv_0/kernel"].biases
    simple = nn.SimpleCNN(widths=(4, 6), hidden=8)
    variables = uneven(simple.init(jax.random.key(1), x))
    new, report = equalize(simple.apply, variables, x)
    same(simple.apply, variables, new, x)
    assert report[0].reason == "" and report[2].reason == ""


def test_stacked_layers_and_heads():
    params = uneven(
        {"up": jnp.zeros((3, 5, 8)), "b": jnp.zeros((3, 8)), "down": jnp.zeros((3, 8, 5))}
    )
    x = jax.random.normal(jax.random.key(0), (6, 5))

    def block(x, p):
        y = jax.nn.relu(x @ p["up"] + p["b"][None]) @ p["down"]
        return jnp.tanh(x + y), None

    def scanned(params, x):
        return jax.lax.scan(jax.checkpoint(block), x, params)[0]

    new, report = equalize(scanned, params, x)
    same(scanned, params, new, x, rtol=1e-3)
    assert report[0].second == ("down",) and report[0].scale.shape == (3, 1, 8)
    for layer in range(3):
        w, b, v = by_formula(*(params[k][layer] for k in ("up", "b", "down")))
        np.testing.assert_allclose(new["up"][layer], w, rtol=1e-5)
        np.testing.assert_allclose(new["b"][layer], b, rtol=1e-5)
        np.testing.assert_allclose(new["down"][layer], v, rtol=1e-5)

    class Heads(linen.Module):
        @linen.compact
        def __call__(self, x):
            x = jax.nn.relu(linen.DenseGeneral((2, 4))(x))
            return linen.DenseGeneral(3, axis=(-2, -1))(x)

    heads = Heads()
    variables = uneven(heads.init(jax.random.key(0), x))
    new, report = equalize(heads.apply, variables, x)
    same(heads.apply, variables, new, x)
    assert report[0].reason == "" and report[0].scale.shape == (1, 2, 4)


def test_equinox():
    eqx = pytest.importorskip("equinox")
    net = eqx.nn.MLP(5, 3, 8, 2, key=jax.random.key(0))
    arrays, rest = eqx.partition(net, eqx.is_array)
    arrays = uneven(arrays)

    def apply(arrays, x):
        return jax.vmap(eqx.combine(arrays, rest))(x)

    x = jax.random.normal(jax.random.key(1), (4, 5))
    new, report = equalize(apply, arrays, x)
    same(apply, arrays, new, x)
    assert [row.reason == "" for row in report] == [True, True, False]


def test_pairs_that_are_asked_for():
    params, x = mlp_case()
    new, _ = equalize(mlp, params, x, pairs=[("w", "v")])
    assert not np.allclose(new["w"], params["w"])
    new, (row, _) = equalize(mlp, params, x, pairs=[])
    assert row.reason == "not among `pairs`"
    jax.tree.map(np.testing.assert_array_equal, new, params)
    with pytest.raises(ValueError, match=r"(?s)`b` is the weight of no product.*`w`, `v`"):
        equalize(mlp, params, x, pairs=[("b", "v")])
    with pytest.raises(ValueError, match=r"`v`: its channels leave the function"):
        equalize(mlp, params, x, pairs=[("v", "w")])
    with pytest.raises(ValueError, match=r"`c` does not read the channels of `w`; `v` does"):
        equalize(mlp, params, x, pairs=[("w", "c")])


def test_dead_channels_and_types():
    params, x = mlp_case()
    params["w"] = params["w"].at[:, 2].set(0)
    params["v"] = params["v"].at[3].set(0)
    new, (row, _) = equalize(mlp, params, x)
    assert row.scale[0, 2] == row.scale[0, 3] == 1
    same(mlp, params, new, x)
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), params)
    new, _ = equalize(mlp, half, x.astype(jnp.bfloat16))
    assert new["w"].dtype == jnp.bfloat16
    coded = {**params, "v": quantize(params["v"], Int(8))}
    _, (row, *_) = equalize(mlp, coded, x)
    assert row.reason == "`v` is a typed leaf already"
