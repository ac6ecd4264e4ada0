"""Statistics recorded by rules, against NumPy by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from toy_functions import close, normal
from toy_leaves import Scaled, Watched

from jopt.trace import Stat, collect, lift, merge, rule

X = normal(0, 4, 6)
W = normal(1, 6, 6)
STACK = normal(2, 3, 6, 6)
NAMED = Watched(W, "w")


def found(function, params, x):
    """The statistics by jit and eagerly, as `{name: (low, high, count)}`."""
    out, stats = jax.jit(collect(function))(params, x)
    close(out, jax.jit(lift(function))(params, x))
    _, eager = collect(function)(params, x)
    close(stats, eager)
    keys = ("low", "high", "count")
    return {n: tuple(np.asarray(s[k].value) for k in keys) for n, s in stats.items()}


def ranges(*inputs):
    """What a weight multiplied with each of `inputs` in turn should record."""
    inputs = [np.asarray(x) for x in inputs]
    return min(x.min() for x in inputs), max(x.max() for x in inputs), sum(x.size for x in inputs)


def layers(x, *weights):
    """The input of each of some tanh layers, in NumPy."""
    inputs = []
    for w in weights:
        inputs.append(x)
        x = np.tanh(x @ np.asarray(w))
    return inputs


def check(stats, **expected):
    assert sorted(stats) == sorted(expected)
    for name, values in expected.items():
        np.testing.assert_allclose(stats[name], values, rtol=1e-5)


def test_one_product():
    check(found(lambda p, x: x @ p, NAMED, X), w=ranges(X))


def test_two_uses_merge():
    check(found(lambda p, x: jnp.tanh(x @ p) @ p, NAMED, X), w=ranges(*layers(X, W, W)))


def test_jit_and_remat_pass_through():
    def function(p, x):
        return jax.checkpoint(lambda x: jax.jit(lambda x: jnp.tanh(x @ p))(x))(x) @ p

    check(found(function, NAMED, X), w=ranges(*layers(X, W, W)))


def test_custom_jvp_passes_through():
    @jax.custom_jvp
    def product(x, w):
        return x @ w

    product.defjvp(lambda primals, tangents: jax.jvp(jnp.matmul, primals, tangents))
    check(found(lambda p, x: product(x, p), NAMED, X), w=ranges(X))

    def loss(x):
        out, stats = collect(lambda p, x: product(x, p))(NAMED, x)
        return out.sum(), stats

    gradient, stats = jax.jit(jax.grad(loss, has_aux=True))(X)
    close(gradient, jnp.ones((4, 6)) @ W.T)
    np.testing.assert_allclose(stats["w"]["low"].value, X.min())


def test_scanned_layers_are_stacked():
    def function(p, x):
        return lax.scan(jax.checkpoint(lambda h, w: (jnp.tanh(h @ w), None)), x, p)[0]

    inputs = layers(X, *STACK)
    expected = np.transpose([ranges(x) for x in inputs])
    check(found(function, Watched(STACK, "w"), X), w=expected)


def test_scanned_layers_in_reverse_are_stacked_by_layer():
    def function(p, x):
        return lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p, reverse=True)[0]

    inputs = layers(X, *STACK[::-1])[::-1]
    expected = np.transpose([ranges(x) for x in inputs])
    check(found(function, Watched(STACK, "w"), X), w=expected)


def test_a_constant_of_a_scan_merges_over_iterations():
    def function(p, x):
        def body(h, w):
            h = jnp.tanh(h @ w)
            return jnp.tanh(h @ p["shared"]), None

        return lax.scan(body, x, p["layers"])[0]

    params = {"shared": NAMED, "layers": Watched(STACK, "layers")}
    inputs = layers(X, STACK[0], W, STACK[1], W, STACK[2], W)
    check(
        found(function, params, X),
        w=ranges(*inputs[1::2]),
        layers=np.transpose([ranges(x) for x in inputs[::2]]),
    )


def test_nested_scans():
    def function(p, x):
        def layer(h, w):
            return lax.fori_loop(0, 2, lambda _, h: jnp.tanh(h @ w), h), None

        return lax.scan(layer, x, p)[0]

    inputs = layers(X, *[w for w in STACK for _ in range(2)])
    expected = np.transpose([ranges(*inputs[i : i + 2]) for i in (0, 2, 4)])
    check(found(function, Watched(STACK, "w"), X), w=expected)


def test_twice_stacked():
    twice = jnp.stack([STACK, STACK[::-1]])

    def function(p, x):
        def inner(h, w):
            return (jnp.tanh(h @ w), None)

        return lax.scan(lambda h, ws: (lax.scan(inner, h, ws)[0], None), x, p)[0]

    inputs = layers(X, *STACK, *STACK[::-1])
    expected = np.transpose([ranges(x) for x in inputs]).reshape(3, 2, 3)
    check(found(function, Watched(twice, "w"), X), w=expected)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_branch_that_does_not_run_records_nothing(sign):
    def function(p, x):
        def yes(x):
            return x @ p["yes"]

        def no(x):
            return (2.0 * x) @ p["no"] @ p["both"]

        return lax.cond(sign * jnp.abs(x).sum() > 0, yes, no, x @ p["both"])

    params = {n: Watched(W, n) for n in ("yes", "no", "both")}
    nothing = (np.inf, -np.inf, 0)
    y = np.asarray(X) @ np.asarray(W)
    if sign > 0:
        expected = {"yes": ranges(y), "no": nothing, "both": ranges(X)}
    else:
        z = 2 * y @ np.asarray(W)
        expected = {"yes": nothing, "no": ranges(2 * y), "both": ranges(X, z)}
    check(found(function, params, X), **expected)


def test_platform_dependent_records():
    def function(p, x):
        return lax.platform_dependent(x, cpu=lambda x: (3.0 * x) @ p, default=lambda x: x @ p)

    _, stats = jax.jit(collect(function))(NAMED, X)
    np.testing.assert_allclose(stats["w"]["high"].value, 3 * X.max())


def test_while_folds_in_the_carry():
    def function(p, x):
        def body(c):
            return (c[0] + 1, jnp.tanh(c[1] @ p))

        return lax.while_loop(lambda c: c[0] < 3, body, (0, x))[1]

    check(found(function, NAMED, X), w=ranges(*layers(X, W, W, W)))


def test_scan_of_no_iterations_records_nothing():
    def function(p, x):
        return lax.scan(lambda h, _: (h @ p, None), x, None, length=0)[0]

    check(found(function, NAMED, X))


def test_convolutions_record():
    image, kernel = normal(3, 1, 5, 5, 2), normal(4, 3, 3, 2, 4)

    def function(p, x):
        return lax.conv_general_dilated(
            x, p, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    check(found(function, Watched(kernel, "k"), image), k=ranges(image))


def test_vmap_gives_statistics_of_each_example():
    _, stats = jax.vmap(collect(lambda p, x: x @ p), (None, 0))(NAMED, X)
    np.testing.assert_allclose(stats["w"]["low"].value, X.min(1))


def test_merge_is_the_statistics_of_both_batches():
    function = collect(lambda p, x: x @ p)
    one, two = function(NAMED, X)[1], function(NAMED, 2 * X)[1]
    both = merge(one, two)
    np.testing.assert_allclose(both["w"]["high"].value, 2 * X.max())
    assert both["w"]["count"].value == 48
    close(merge(one, {}), one)
    close(merge({}, one), one)
    stacked = jax.tree.map(lambda *a: jnp.stack(a), one, two)
    folded = lax.scan(lambda s, t: (merge(s, t), None), one, stacked)[0]
    close(folded, merge(one, both))


def test_lift_records_nothing_and_costs_nothing():
    text = jax.jit(lift(lambda p, x: x @ p)).lower(NAMED, X).compile().as_text()
    assert "reduce" not in text


def test_without_typed_leaves():
    out, stats = collect(lambda p, x: x @ p)(W, X)
    assert stats == {}
    close(out, X @ W)


def test_shard_map_around():
    mesh = jax.make_mesh((4,), ("data",), (jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec

    def function(p, x):
        out, stats = collect(lambda p, x: lax.fori_loop(0, 2, lambda _, h: h @ p, x))(p, x)
        return out, lax.pmax(stats["w"]["high"].value, "data")

    sharded = jax.shard_map(
        function, mesh=mesh, in_specs=(spec(), spec("data")), out_specs=(spec("data"), spec())
    )
    _, high = jax.jit(sharded)(NAMED, X)
    np.testing.assert_allclose(high, ranges(X, X @ W)[1], rtol=1e-5)


def test_differing_statistics_under_one_name():
    class Odd(Scaled):
        pass

    jax.tree_util.register_dataclass(Odd, data_fields=["codes", "scale"], meta_fields=[])

    @rule(lax.dot_general_p, Odd)
    def _(call, x, w):
        call.record("same", Stat(x, "max"))
        return x @ w.materialise()

    leaf = Odd(jnp.ones((6, 6), jnp.int8), jnp.ones((1, 6)))
    with pytest.raises(ValueError, match=r"shapes \(4, 6\) and \(2, 6\)"):
        collect(lambda p, x: (x @ p, x[:2] @ p))(leaf, X)

    def function(p, x):
        return lax.scan(lambda h, w: (h @ w @ p["one"], None), x, p["all"])[0]

    with pytest.raises(ValueError, match="one leaf that a scan slices"):
        collect(function)({"all": Watched(STACK, "w"), "one": Watched(W, "w")}, X)
