"""Functions run in stages: order, layers, what is measured, and that later layers see the change.

The reference walks a plain NumPy model by hand and measures in float64.
"""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from jopt import trace, trees

RNG = np.random.default_rng(0)


def f32(*shape):
    return jnp.asarray(RNG.normal(size=shape) / shape[-1] ** 0.5, jnp.float32)


def rounded(weight):
    return jnp.round(weight * 4) / 4


class Log:
    """Visits: rounds every weight and keeps what it was shown."""

    def __init__(self):
        self.stops = []

    def __call__(self, stop):
        self.stops.append(stop)
        return rounded(stop.weight)

    def of(self, path, index=()):
        (stop,) = [s for s in self.stops if (s.path, s.index) == (path, index)]
        return stop


def run(apply, params, batches, paths, measure=trace.gram):
    log = Log()
    new, missed = trace.staged(apply, params, batches, paths, measure, log)
    return new, missed, log


def gram(x):
    x = np.asarray(x, np.float64)
    return x.T @ x


LAYERS = {"q": f32(3, 8, 8), "k": f32(3, 8, 8), "o": f32(3, 8, 8)}
PARAMS = {"in": {"w": f32(6, 8), "b": f32(8)}, "layers": LAYERS, "out": f32(8, 2)}
BATCHES = [f32(5, 6) for _ in range(3)]
PATHS = ["in/w", "layers/q", "layers/k", "layers/o", "out"]


def block(h, p):
    h = h + jnp.tanh((h @ p["q"]) * (h @ p["k"].T)) @ p["o"]
    return h, jnp.sum(h)


def scanned(p, x, reverse=False):
    h = jnp.tanh(x @ p["in"]["w"] + p["in"]["b"][None])
    h, sums = lax.scan(jax.checkpoint(block), h, p["layers"], reverse=reverse)
    return h @ p["out"] + jnp.sum(sums)


def unrolled(p, x):
    h = jnp.tanh(x @ p["in"]["w"] + p["in"]["b"][None])
    for i in range(3):
        h, _ = jax.jit(block)(h, jax.tree.map(lambda a, i=i: a[i], p["layers"]))
    return h @ p["out"]


def reference(reverse=False):
    """What each weight meets when all before it are rounded, by hand, in float64."""
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), PARAMS)

    def r(w):
        return np.round(w * 4) / 4

    xs = [np.asarray(x, np.float64) for x in BATCHES]
    met = {("in/w", ()): sum(map(gram, xs))}
    hs = [np.tanh(x @ r(p["in"]["w"]) + p["in"]["b"]) for x in xs]
    for i in range(3)[:: -1 if reverse else 1]:
        q, k, o = (r(p["layers"][name][i]) for name in "qko")
        met[("layers/q", (i,))] = met[("layers/k", (i,))] = sum(map(gram, hs))
        inner = [np.tanh((h @ q) * (h @ k.T)) for h in hs]
        met[("layers/o", (i,))] = sum(map(gram, inner))
        hs = [h + a @ o for h, a in zip(hs, inner, strict=True)]
    met[("out", ())] = sum(map(gram, hs))
    return met


@pytest.mark.parametrize("reverse", [False, True])
def test_a_scan_is_run_layer_by_layer_and_later_layers_see_the_change(reverse):
    new, missed, log = run(
        lambda p, x: scanned(p, x, reverse), PARAMS, [(x,) for x in BATCHES], PATHS
    )
    expected = reference(reverse)
    assert not missed
    assert [(stop.path, stop.index) for stop in log.stops] == list(expected)
    for stop in log.stops:
        np.testing.assert_allclose(stop.stats["gram"][0], expected[stop.path, stop.index], 1e-4)
        assert stop.stats["count"] == 15
    old = dict(trees.items(PARAMS))
    for path, leaf in trees.items(new):
        np.testing.assert_array_equal(leaf, rounded(old[path]) if path in PATHS else old[path])


def test_weights_that_several_products_read_come_first_with_all_that_they_meet():
    new, missed, log = run(unrolled, PARAMS, BATCHES, PATHS)
    # The slices of the stacked weights are uses of one parameter, which is visited whole.
    assert not missed
    assert [stop.path for stop in log.stops] == ["layers/k", "layers/o", "layers/q", "in/w", "out"]
    np.testing.assert_array_equal(new["layers"]["o"], rounded(LAYERS["o"]))


def test_what_convolutions_meet_is_measured_by_patches():
    kernel, x = f32(3, 2, 4, 6), f32(2, 7, 6, 4)

    def apply(p, x):
        return lax.conv_general_dilated(
            x, p, (2, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    _, _, log = run(lambda p, x: apply(p["k"], x), {"k": kernel}, [x], ["k"])
    stop = log.of("k")
    matrices, found = stop.matrices(kernel), stop.stats["gram"]
    assert matrices.shape == (1, 24, 6) and found.shape == (1, 24, 24)
    np.testing.assert_array_equal(stop.restored(matrices), kernel)
    # Two ways to the energy of the outputs: tr(Wᵀ G W), and from the outputs themselves.
    energy = jnp.trace(matrices[0].T @ found[0] @ matrices[0])
    np.testing.assert_allclose(energy, jnp.sum(apply(kernel, x) ** 2), 1e-4)


ROUTES = {
    "einsum of heads": (lambda w, x: jnp.einsum("bi,ihd->bhd", x, w), (6, 2, 4), (5, 6)),
    "heads summed": (lambda w, x: jnp.einsum("bhd,hdo->bo", x, w), (2, 4, 6), (5, 2, 4)),
    "heads summed across": (lambda w, x: jnp.einsum("bdh,hdo->bo", x, w), (2, 4, 6), (5, 4, 2)),
    "reshaped": (lambda w, x: x @ w.reshape(8, 6), (2, 4, 6), (5, 8)),
    "transposed": (lambda w, x: x @ w.T, (6, 8), (5, 8)),
    "on the left": (lambda w, x: (w @ x.T).T, (6, 8), (5, 8)),
    "experts": (lambda w, x: jnp.einsum("ebi,eio->ebo", x, w), (3, 8, 4), (3, 5, 8)),
    "experts last": (lambda w, x: jnp.einsum("bei,ioe->beo", x, w), (8, 4, 3), (5, 3, 8)),
    "cast": (lambda w, x: x @ w.astype(jnp.float32), (8, 6), (5, 8)),
    "fused": (lambda w, x: x @ jnp.concatenate([w, jnp.ones((8, 2))], 1), (8, 6), (5, 8)),
    "vmapped": (lambda w, x: jax.vmap(lambda row: row @ w)(x), (8, 6), (5, 8)),
}


@pytest.mark.parametrize("name", ROUTES)
def test_rows_are_measured_in_the_weights_own_order(name):
    apply, shape, data = ROUTES[name]
    w, x = f32(*shape), f32(*data)
    _, missed, log = run(lambda p, x: apply(p["w"], x), {"w": w}, [x], ["w"])
    assert not missed
    stop = log.of("w")
    matrices, found = stop.matrices(w), stop.stats["gram"]
    np.testing.assert_array_equal(stop.restored(matrices), w)
    energy = sum(jnp.trace(m.T @ g @ m) for m, g in zip(matrices, found, strict=True))
    out = apply(w, x)
    out = out[..., :6] if name == "fused" else out
    np.testing.assert_allclose(energy, jnp.sum(out * out), 1e-4)


def test_grouped_and_depthwise_convolutions_have_a_block_a_group():
    for groups, inputs in ((2, 3), (6, 1)):
        kernel, x = f32(3, 3, inputs, 12), f32(2, 5, 5, 6)

        def apply(p, x, groups=groups):
            return lax.conv_general_dilated(
                x,
                p["k"],
                (1, 1),
                "VALID",
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
                feature_group_count=groups,
            )

        _, _, log = run(apply, {"k": kernel}, [x], ["k"])
        stop = log.of("k")
        matrices, found = stop.matrices(kernel), stop.stats["gram"]
        assert found.shape == (groups, 9 * inputs, 9 * inputs)
        np.testing.assert_array_equal(stop.restored(matrices), kernel)
        energy = sum(jnp.trace(m.T @ g @ m) for m, g in zip(matrices, found, strict=True))
        np.testing.assert_allclose(energy, jnp.sum(apply({"k": kernel}, x) ** 2), 1e-4)


def test_moments_are_those_of_each_input():
    w, xs = f32(4, 3), [f32(5, 4), f32(5, 4)]
    _, _, log = run(lambda p, x: x @ p["w"], {"w": w}, xs, ["w"], trace.moments)
    x, stats = np.concatenate(xs), log.of("w").stats
    np.testing.assert_allclose(stats["sum"][0], x.sum(0), 1e-5, 1e-6)
    np.testing.assert_allclose(stats["absolute"][0], np.abs(x).sum(0), 1e-5)
    np.testing.assert_allclose(stats["square"][0], (x * x).sum(0), 1e-5)
    np.testing.assert_array_equal(stats["largest"][0], np.abs(x).max(0))
    assert stats["count"] == 10


def test_branches_and_loops_are_stops_of_their_own():
    def apply(p, x):
        h = lax.cond(x[0, 0] > 0, lambda h: h @ p["yes"], lambda h: h @ p["no"], x)
        return lax.fori_loop(0, 3, lambda _, h: jnp.tanh(h @ p["again"]), h)

    params = {"yes": f32(4, 4), "no": f32(4, 4), "again": f32(4, 4)}
    xs = [jnp.full((2, 4), sign, jnp.float32) for sign in (1.0, -1.0, 1.0)]
    new, missed, log = run(apply, params, xs, list(params))
    assert not missed
    assert log.of("yes").stats["count"] == 4 and log.of("no").stats["count"] == 2
    assert log.of("again").stats["count"] == 18
    np.testing.assert_array_equal(new["again"], rounded(params["again"]))


def test_weights_that_are_computed_on_are_reported():
    params = {"w": f32(4, 4), "mask": jnp.ones((4, 4)), "idle": f32(4, 4)}
    _, missed, log = run(lambda p, x: x @ (p["w"] * p["mask"]), params, [f32(2, 4)], ["w", "idle"])
    assert not log.stops
    assert "hoist" in missed["w"] and "no product" in missed["idle"]


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        h = nn.relu(nn.Dense(8, name="first")(x))
        return nn.Dense(3, name="second")(h)


def test_frameworks():
    x = f32(4, 5)
    linen = Linen()
    mlp = eqx.nn.MLP(5, 3, 8, 1, key=jax.random.key(0))

    class Nnx(nnx.Module):
        def __init__(self):
            rngs = nnx.Rngs(0)
            self.first, self.second = nnx.Linear(5, 8, rngs=rngs), nnx.Linear(8, 3, rngs=rngs)

        def __call__(self, x):
            return self.second(nnx.relu(self.first(x)))

    graph, state = nnx.split(Nnx())
    arrays, static = eqx.partition(mlp, eqx.is_array)
    cases = [
        (linen.apply, linen.init(jax.random.key(0), x)),
        (lambda p, x: nnx.merge(graph, p)(x), state),
        (lambda p, x: jax.vmap(eqx.combine(p, static))(x), arrays),
    ]
    for apply, params in cases:
        paths = [site.path for site in trace.sites(apply, params, x)]
        assert len(paths) == 2
        _, missed, log = run(apply, params, [x], paths)
        assert not missed and [stop.path for stop in log.stops] == paths
        np.testing.assert_allclose(log.stops[0].stats["gram"][0], gram(x), 1e-4, 1e-5)


def test_each_stretch_is_compiled_once_for_all_layers_and_batches():
    traces = []

    def body(h, w):
        traces.append(1)
        return jnp.tanh(h @ w), None

    def apply(p, x):
        return lax.scan(body, x, p["w"])[0]

    run(apply, {"w": f32(20, 4, 4)}, [f32(2, 4) for _ in range(5)], ["w"])
    assert len(traces) <= 3  # by `sites` and `program`; never for a layer


def test_clear_errors():
    with pytest.raises(ValueError, match="no batch"):
        run(lambda p, x: x @ p["w"], {"w": f32(4, 4)}, [], ["w"])
    with pytest.raises(ValueError, match="one shape"):
        run(lambda p, x: x @ p["w"], {"w": f32(4, 4)}, [f32(2, 4), f32(3, 4)], ["w"])
    with pytest.raises(ValueError, match="`visit` returned"):
        trace.staged(
            lambda p, x: x @ p["w"],
            {"w": f32(4, 4)},
            [f32(2, 4)],
            ["w"],
            trace.gram,
            lambda stop: stop.weight.astype(jnp.bfloat16),
        )


REARRANGED = {
    "repeated blocks": (lambda w, x: jnp.einsum("bhi,hio->bho", x, jnp.repeat(w, 2, 0)), (2, 4, 3)),
    "a broadcast weight": (
        lambda w, x: jnp.einsum("bhi,bio->bho", x, jnp.broadcast_to(w, (5, 4, 3))),
        (4, 3),
    ),
    "repeated inputs": (lambda w, x: x @ jnp.repeat(w, 2, axis=0), (2, 3)),
    "part of the inputs": (lambda w, x: x @ w[:4], (6, 3)),
    "layers reversed": (lambda w, x: lax.scan(step, x[:, 0], w[::-1])[0], (3, 4, 4)),
    "layers split": (lambda w, x: lax.scan(step, x[:, 0] @ w[0], w[1:])[0], (3, 4, 4)),
    "layers elsewhere": (
        lambda w, x: lax.scan(step, x[:, 0], jnp.moveaxis(w, 1, 0))[0],
        (4, 3, 4),
    ),
    "layers of layers": (
        lambda w, x: lax.scan(
            lambda h, w: (lax.scan(step, h, w)[0], None), x[:, 0], w.reshape(2, 2, 4, 4)
        )[0],
        (4, 4, 4),
    ),
}


def step(h, w):
    return jnp.tanh(h @ w), None


@pytest.mark.parametrize("name", REARRANGED)
def test_what_cannot_be_told_apart_is_missed_and_not_guessed(name):
    apply, shape = REARRANGED[name]
    _, missed, log = run(lambda p, x: apply(p["w"], x), {"w": f32(*shape)}, [f32(5, 4, 4)], ["w"])
    assert list(missed) == ["w"] and not log.stops


def test_weights_side_by_side_keep_rows_of_their_own():
    params, x = {"a": f32(6, 3), "b": f32(6, 3)}, f32(9, 6)
    _, missed, log = run(
        lambda p, x: x @ jnp.concatenate([p["a"], p["b"][::-1]], 1), params, [x], ["a", "b"]
    )
    assert not missed
    np.testing.assert_allclose(log.of("a").stats["gram"][0], gram(x), 1e-4, 1e-5)
    np.testing.assert_allclose(log.of("b").stats["gram"][0], gram(x[:, ::-1]), 1e-4, 1e-5)


def test_groups_of_a_rearranged_kernel_are_missed():
    kernel, x = f32(3, 3, 2, 4), f32(1, 5, 5, 4)

    def apply(p, x):
        return lax.conv_general_dilated(
            x,
            jnp.swapaxes(p["k"], 2, 3).reshape(3, 3, 1, 8),
            (1, 1),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=4,
        )

    _, missed, log = run(apply, {"k": kernel}, [x], ["k"])
    assert list(missed) == ["k"] and not log.stops


def test_python_values_among_the_inputs_of_a_shared_weight_and_empty_batches():
    def apply(p, x, train):
        return jnp.tanh(x @ p["w"]) @ p["w"] if train else x

    _, missed, log = run(apply, {"w": f32(4, 4)}, [(f32(3, 4), True)], ["w"])
    assert not missed and log.of("w").stats["count"] == 6
    _, missed, log = run(lambda p, x: x @ p["w"], {"w": f32(4, 4)}, [jnp.zeros((0, 4))], ["w"])
    assert not missed and log.of("w").stats["count"] == 0
