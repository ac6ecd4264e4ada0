"""Products without a weight: quantized by name, against attention quantized by hand in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export, lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jopt.quant import (
    MSE,
    Int,
    MovingAverage,
    Pair,
    Percentile,
    Products,
    Spec,
    calibrate_products,
    fake_quant,
    products,
    quantize,
    trainable,
    weightless,
)
from jopt.trace import lift

SCORES, MIXED = "qd,kd->qk", "qk,kd->qd"
ASYMMETRIC = Int(8, symmetric=False)
STATIC = Pair(ASYMMETRIC, Int(8), static=True)
W = jax.random.normal(jax.random.key(0), (3, 8, 24)) * 0.2
X = jax.random.normal(jax.random.key(1), (5, 8))


def layer(x, w):
    q, k, v = jnp.split(x @ w, 3, axis=-1)
    probs = jax.nn.softmax(jnp.einsum(SCORES, q, k))
    return x + jnp.einsum(MIXED, probs, v)


def stacked(p, x):
    return lax.scan(lambda x, w: (layer(x, w), None), x, p)[0]


def checkpointed(p, x):
    return lax.scan(lambda x, w: (jax.checkpoint(layer)(x, w), None), x, p)[0]


def chosen(p, x):
    def body(x, w):
        return lax.cond(x[0, 0] < 1e6, layer, lambda x, w: x - 1.0, x, w), None

    return lax.scan(body, x, p)[0]


def looped(p, x):
    def body(state):
        return state[0] + 1, layer(state[1], p[state[0]])

    return lax.while_loop(lambda state: state[0] < 3, body, (0, x))[1]


def grid(low, high, symmetric):
    """Scale and zero point from the formulas, in float64."""
    low, high = min(low, 0.0), max(high, 0.0)
    if symmetric:
        return max(-low, high) / 127, 0
    scale = (high - low) / 255
    return scale, np.clip(-128 - np.round(low / scale), -128, 127)


def rounded(x, symmetric=True, low=None, high=None):
    """Values on the grid of a range, which by default is that of the values."""
    scale, zero = grid(
        x.min() if low is None else low, x.max() if high is None else high, symmetric
    )
    codes = np.clip(np.round(x / scale) + zero, -127 if symmetric else -128, 127)
    return (codes - zero) * scale


def by_hand(p, x, scores=rounded, probs=rounded, values=rounded):
    """The attention layers, with each operand through a function."""
    x = np.asarray(x, np.float64)
    for i, w in enumerate(np.asarray(p, np.float64)):
        q, k, v = np.split(x @ w, 3, axis=-1)
        logits = scores(q) @ scores(k).T
        e = np.exp(logits - logits.max(-1, keepdims=True))
        e /= e.sum(-1, keepdims=True)
        e, v = (
            f(a, layer=i) if f not in (rounded, exact) else f(a)
            for f, a in ((probs, e), (values, v))
        )
        x = x + e @ v
    return x


def exact(x):
    return x


def close(got, expected, tolerance=2e-5):
    np.testing.assert_allclose(np.asarray(got), np.asarray(expected), atol=tolerance, rtol=2e-5)


@pytest.mark.parametrize("function", [stacked, checkpointed, chosen, looped])
def test_dynamic_ranges_equal_the_formula(function):
    close(jax.jit(products(function, Int(8)))(W, X), by_hand(W, X))


def test_one_operand_alone_and_without_jit():
    only = products(stacked, [(MIXED, Pair(ASYMMETRIC, None))])(W, X)
    close(only, by_hand(W, X, exact, lambda e, layer: rounded(e, False), exact))


def test_the_plain_function_is_something_else_so_that_the_tests_can_fail():
    assert np.max(np.abs(np.asarray(stacked(W, X)) - by_hand(W, X))) > 1e-3
    close(stacked(W, X), by_hand(W, X, exact, exact, exact))


@pytest.mark.parametrize("function", [checkpointed, chosen])
def test_static_ranges_of_each_layer_are_those_of_the_batches(function):
    policy = [(MIXED, STATIC), ("**", Int(8))]
    batches = [X, 0.5 * X, (jnp.flip(X),)]
    calibrated = calibrate_products(function, W, batches, policy)
    assert set(calibrated.ranges) == {MIXED}
    seen = [{"low": [], "high": []} for _ in range(3)]

    def watch(v, layer):
        seen[layer]["low"].append(v.min())
        seen[layer]["high"].append(v.max())
        return v

    for batch in (X, 0.5 * X, jnp.flip(X)):
        by_hand(W, batch, rounded, lambda e, layer: e, watch)
    left, right = calibrated.ranges[MIXED]
    low, high = ([f(s[k]) for s in seen] for f, k in ((min, "low"), (max, "high")))
    # While the ranges are measured nothing is quantized, so that the tolerance is a rounding's.
    np.testing.assert_allclose(right.low, low, atol=0.05)
    np.testing.assert_allclose(right.high, high, atol=0.05)
    assert left.low.shape == (3,)

    def clipped(v, layer):
        return rounded(v, True, right.low[layer].item(), right.high[layer].item())

    def probs(e, layer):
        return rounded(e, False, left.low[layer].item(), left.high[layer].item())

    got = jax.jit(products(function, policy))(calibrated, 3 * X)
    close(got, by_hand(W, 3 * X, rounded, probs, clipped), 1e-4)


def of_values(function):
    """What a function makes of the second operand of the mixing products, layer by layer."""
    seen = []

    def watch(v, layer):
        seen.append(function(jnp.asarray(v, jnp.float32)))
        return v

    by_hand(W, X, exact, lambda e, layer: e, watch)
    return seen


@pytest.mark.parametrize("observer", [Percentile(95.0), MSE()])
def test_observers_with_a_histogram_see_each_layer(observer):
    right = Pair(None, Int(8), static=True)
    calibrated = calibrate_products(stacked, W, [X], [(MIXED, right)], observer=observer)
    assert calibrated.ranges[MIXED][0] is None
    expected = of_values(lambda v: observer.range(observer.update(observer.init(), v), Int(8)))
    for i, range in enumerate(expected):
        found = [end[i] for end in calibrated.ranges[MIXED][1]]
        np.testing.assert_allclose(found, range, atol=1e-3)


def test_a_moving_average_of_batches():
    right = Pair(None, Int(8), static=True)
    batches, observer = [X, 2 * X], MovingAverage(0.75)
    found = calibrate_products(stacked, W, batches, [(MIXED, right)], observer=observer)
    once = [
        calibrate_products(stacked, W, [batch], [(MIXED, right)]).ranges[MIXED][1].high
        for batch in batches
    ]
    np.testing.assert_allclose(
        found.ranges[MIXED][1].high, 0.75 * once[0] + 0.25 * once[1], rtol=1e-6
    )
    with pytest.raises(ValueError, match=r'observer=.median.(.|\n)*"minmax"'):
        calibrate_products(stacked, W, [X], [(MIXED, right)], observer="median")


def test_computes_on_integers():
    text = str(jax.make_jaxpr(products(stacked, Int(8)))(W, X))
    assert text.count("preferred_element_type=int32") == 2


def by_fake_quant(p, x):
    def layer(x, w):
        q, k, v = jnp.split(x @ w, 3, axis=-1)
        probs = jax.nn.softmax(jnp.einsum(SCORES, whole(q), whole(k)))
        return x + jnp.einsum(MIXED, whole(probs), whole(v)), None

    return lax.scan(layer, x, p)[0]


def whole(x):
    return fake_quant(x, Int(8, granularity="tensor"), axes=(-2, -1))


@pytest.mark.parametrize("function", [checkpointed])
def test_the_gradient_is_that_of_the_fake_quantized_function(function):
    quantized = products(function, Int(8))
    got = jax.jit(jax.grad(lambda p: jnp.sum(quantized(p, X) ** 2)))(W)
    close(got, jax.grad(lambda p: jnp.sum(by_fake_quant(p, X) ** 2))(W), 1e-4)


def test_beyond_a_static_range_the_gradient_is_zero():
    def scores(p, x):
        return jnp.einsum(SCORES, x, x * p)

    policy, p = Pair(None, Int(8), static=True), jnp.ones((1, 1))
    calibrated = calibrate_products(scores, p, [jnp.ones((1, 1))], policy)

    def slope(x):
        return jax.grad(lambda x: jnp.sum(products(scores, policy)(calibrated, x)))(x).item()

    assert slope(jnp.full((1, 1), 0.5)) == pytest.approx(1.0, abs=0.01)
    assert slope(jnp.full((1, 1), 2.0)) == pytest.approx(1.0)  # of the left operand alone
    gradient = jax.grad(lambda c: jnp.sum(products(scores, policy)(c, X)))(calibrated)
    assert jax.tree.all(jax.tree.map(lambda g: jnp.all(g == 0), gradient.ranges))


def test_each_mapped_example_has_its_range():
    batch = jnp.stack([X, 4 * X])
    got = jax.vmap(products(stacked, Int(8)), (None, 0))(W, batch)
    close(got, np.stack([by_hand(W, x) for x in batch]))


def test_vmap_inside_the_function_is_one_range():
    def function(p, x):
        return jax.vmap(lambda x: jnp.einsum(SCORES, x, x))(x)

    batch = jnp.stack([X, 4 * X])
    (site,) = weightless(function, None, batch)
    assert site.name == SCORES
    codes = rounded(np.asarray(batch, np.float64))
    close(products(function, Int(8))(None, batch), np.einsum("bqd,bkd->bqk", codes, codes), 1e-4)


def test_with_quantized_weights():
    params = quantize(W, Spec(Int(8), Int(8)))
    policy = [("**", Int(8))]
    got = jax.jit(products(stacked, policy))(params, X)
    dense = by_hand(W, X)
    assert 1e-5 < np.max(np.abs(np.asarray(got) - dense)) < 0.1
    close(got, lift(products(stacked, policy))(params, X))
    close(got, products(lift(stacked), policy)(params, X))


def test_formats_without_integers_and_sums_too_long_for_them():
    def scores(p, x):
        return jnp.einsum(SCORES, x, x)

    x = jnp.ones((1, 40000))
    text = str(jax.make_jaxpr(products(scores, ASYMMETRIC))(None, x))
    assert "preferred_element_type=int32" not in text
    close(products(scores, ASYMMETRIC)(None, x), [[40000.0]], 1.0)


def test_asymmetric_operands_on_any_side_and_any_axes():
    x, y = jax.random.uniform(jax.random.key(2), (2, 3, 4)), X.reshape(2, 4, 5) + 0.3
    for formula, other in (
        ("bij,bjk->bik", y),
        ("bij,bjk->kbi", y),
        ("bij,kbj->kbi", y.T.swapaxes(1, 2)),
    ):
        expected = np.einsum(
            formula,
            rounded(np.asarray(x, np.float64), False),
            rounded(np.asarray(other, np.float64), False),
        )
        got = products(lambda p, x, y, f=formula: jnp.einsum(f, x, y), ASYMMETRIC)(None, x, other)
        close(got, expected)


def test_eight_devices_and_export():
    mesh = jax.make_mesh((8,), ("d",), (AxisType.Auto,))
    batch = jnp.stack([X * (i + 1) for i in range(8)])

    def mapped(p, x):
        return jax.vmap(stacked, (None, 0))(p, x)

    spread = jax.device_put(batch, NamedSharding(mesh, PartitionSpec("d")))
    quantized = jax.jit(products(mapped, Int(8)))
    close(quantized(W, spread), quantized(W, batch))
    policy = [("**", STATIC)]
    calibrated = calibrate_products(stacked, W, [X], policy)
    program = jax.jit(lambda ranges, p, x: products(stacked, policy)(Products(p, ranges), x))
    exported = export.export(program, platforms=("cpu", "cuda", "tpu"))(calibrated.ranges, W, X)
    close(exported.call(calibrated.ranges, W, X), products(stacked, policy)(calibrated, X))


def test_shards_have_their_own_ranges():
    mesh = jax.make_mesh((8,), ("d",), (AxisType.Auto,))

    def function(p, x):
        own = jax.shard_map(
            lambda x: jnp.einsum(SCORES, x, x),
            mesh=mesh,
            in_specs=PartitionSpec("d"),
            out_specs=PartitionSpec("d"),
        )
        return own(x)

    x = jax.random.normal(jax.random.key(3), (16, 4))
    expected = [rounded(np.asarray(part, np.float64)) for part in np.split(np.asarray(x), 8)]
    got = jax.jit(products(function, Int(8)))(None, x)
    close(got, np.concatenate([part @ part.T for part in expected]))


def test_ranges_do_not_train():
    calibrated = calibrate_products(stacked, W, [X], [("**", STATIC)])
    marks = calibrated.trainable(trainable)
    assert marks.params is True
    assert not any(jax.tree.leaves(marks.ranges))


def test_other_names_are_numbered_and_listed():
    def function(p, x):
        return (x @ x.T) @ (x @ p) + (x @ x.T) @ x

    sites = weightless(function, jnp.eye(8), X)
    assert [site.name for site in sites] == [
        "dot_general",
        "dot_general#1",
        "dot_general#2",
        "dot_general#3",
    ]
    assert [site.shapes[2] for site in sites] == [(5, 5), (5, 8), (5, 5), (5, 8)]


@jax.custom_jvp
def derived(x):
    return jnp.einsum(SCORES, x, x)


derived.defjvp(lambda primals, tangents: (derived(*primals), derived(*tangents)))


def test_what_cannot_be_done_says_why():
    with pytest.raises(ValueError, match=r'"score\*".*matched no product(.|\n)*`qd,kd->qk`, `qk'):
        products(stacked, [("score*", Int(8))])(W, X)
    with pytest.raises(ValueError, match="never measured"):
        products(stacked, [(MIXED, STATIC)])(W, X)
    calibrated = calibrate_products(stacked, W, [X], [(MIXED, STATIC)])
    with pytest.raises(ValueError, match="does not take as static"):
        products(stacked, Int(8))(calibrated, X)
    with pytest.raises(ValueError, match="no static product"):
        calibrate_products(stacked, W, [X], Int(8))
    with pytest.raises(ValueError, match="no batch"):
        calibrate_products(stacked, W, [], [(MIXED, STATIC)])
    with pytest.raises(ValueError, match="NaN or an infinity"):
        calibrate_products(stacked, W, [X * jnp.nan], [(MIXED, STATIC)])
    with pytest.raises(ValueError, match="a derivative of its own"):
        products(lambda p, x: derived(x), Int(8))(None, X)
    with pytest.raises(TypeError, match="a policy is"):
        products(stacked, "scores")
    with pytest.raises(TypeError, match="an entry is"):
        products(stacked, [(MIXED, 8)])
    with pytest.raises(ValueError, match="quantizes nothing"):
        Pair(None, None)
    with pytest.raises(ValueError, match="neither groups nor stochastic"):
        Pair(Int(4, granularity="group", group_size=2), None)
    with pytest.raises(TypeError, match="expected a format"):
        Pair(8, None)


def test_a_branch_that_never_ran_has_no_range():
    def function(p, x):
        return lax.cond(
            x[0, 0] > 1e6, lambda: jnp.einsum(SCORES, x, x), lambda: x @ jnp.ones((8, 5))
        )

    with pytest.raises(ValueError, match="a branch that did not run"):
        calibrate_products(function, None, [X], [(SCORES, STATIC)])


def test_a_product_with_a_weight_is_pointed_elsewhere():
    with pytest.raises(ValueError, match="has the weight `kernel`: give `quantize`"):
        products(lambda p, x: jnp.einsum("ij,jk->ik", x, p["kernel"]), [("ij*", Int(8))])(
            {"kernel": W[0]}, X
        )


def linen_attention():
    linen = pytest.importorskip("flax.linen")
    model = linen.MultiHeadDotProductAttention(num_heads=2)
    x = X[None]
    return model.apply, model.init(jax.random.key(0), x), x, "MultiHeadDotProductAttention/*"


def haiku_attention():
    haiku = pytest.importorskip("haiku")
    model = haiku.without_apply_rng(
        haiku.transform(
            lambda x: haiku.MultiHeadAttention(2, 4, w_init=haiku.initializers.Constant(0.1))(
                x, x, x
            )
        )
    )
    return model.apply, model.init(jax.random.key(0), X), X, "multi_head_attention/*"


def nnx_attention():
    nnx = pytest.importorskip("flax.nnx")
    model = nnx.MultiHeadAttention(2, 8, decode=False, rngs=nnx.Rngs(0))
    graph, state = nnx.split(model)
    return lambda p, x: nnx.merge(graph, p)(x), state, X[None], "B*"


def equinox_attention():
    eqx = pytest.importorskip("equinox")
    model = eqx.nn.MultiheadAttention(2, 8, key=jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_array)
    return lambda p, x: eqx.combine(p, static)(x, x, x), params, X, "**"


@pytest.mark.parametrize(
    "make", [linen_attention, haiku_attention, nnx_attention, equinox_attention]
)
def test_attention_of_the_frameworks(make):
    apply, params, x, glob = make()
    assert len(weightless(apply, params, x)) == 2
    policy = [(glob, Pair(ASYMMETRIC, ASYMMETRIC, static=True))]
    calibrated = calibrate_products(apply, params, [x], policy)
    expected, got = apply(params, x), jax.jit(products(apply, policy))(calibrated, x)
    assert len(calibrated.ranges) == 2
    assert 1e-6 < np.max(np.abs(np.asarray(expected - got))) < 0.05 * np.max(np.abs(expected))


def test_static_ranges_inside_a_loop_cover_all_its_iterations():
    found = calibrate_products(looped, W, [X], [(MIXED, STATIC)])
    in_layers = calibrate_products(stacked, W, [X], [(MIXED, STATIC)])
    for one, each in zip(
        jax.tree.leaves(found.ranges), jax.tree.leaves(in_layers.ranges), strict=True
    ):
        assert one.shape == each.shape[1:]
        assert jnp.any(one == each.min(0)) or jnp.any(one == each.max(0))
    assert jnp.all(jnp.isfinite(jax.jit(products(looped, [(MIXED, STATIC)]))(found, X)))
