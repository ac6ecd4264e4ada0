"""Observers inside `calibrate`: two passes, stacked layers, frameworks, clipped weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jopt.quant import (
    MSE,
    Entropy,
    Histogram,
    Int,
    MinMax,
    MovingAverage,
    Observer,
    Percentile,
    QArray,
    Spec,
    calibrate,
    qat,
)
from jopt.trace import lift

A8 = Int(8, symmetric=False)
STATIC = Spec(Int(8), A8, static=True)
NAMES = {
    "minmax": MinMax(),
    "moving_average": MovingAverage(),
    "percentile": Percentile(),
    "mse": MSE(),
    "entropy": Entropy(),
    "histogram": Histogram(),
}


def scanned(params, x):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["w"])[0]


def stacked_case(layers=3, batches=3):
    weights = jax.random.normal(jax.random.key(0), (layers, 8, 8))
    keys = jax.random.split(jax.random.key(1), batches)
    # The first batch is the widest, so that a stream never has to move its histogram.
    return {"w": weights}, [(jax.random.normal(k, (40, 8)) / (i + 1),) for i, k in enumerate(keys)]


def inputs_of_layers(params, batches):
    """What meets each layer, batch by batch: [layer][batch]."""
    layers = [[np.asarray(x) for (x,) in batches]]
    for w in np.asarray(params["w"])[:-1]:
        layers.append([np.tanh(x @ w).astype(np.float32) for x in layers[-1]])
    return layers


@pytest.mark.parametrize("exponent", [-66, 66, -120, 120])
@pytest.mark.parametrize("format", [Int(4), Int(4, symmetric=False)], ids=str)
def test_least_errors_do_not_hang_on_the_unit(format, exponent):
    unit = np.float32(2.0**exponent)
    x = jax.random.normal(jax.random.key(0), (64, 16))
    weight = jax.random.normal(jax.random.key(1), (16, 4))
    spec = Spec(Int(8), format, static=True)
    found = []
    for one in (np.float32(1), unit):
        with_range, _ = calibrate(lambda p, x: x @ p, weight, [x * one], spec, observer="mse")
        clipped, _ = calibrate(lambda p, x: x @ p, weight * one, [x], format, weight_observer="mse")
        found.append((*with_range.range, clipped.scale))
    for plain, scaled in zip(*found, strict=True):
        np.testing.assert_allclose(scaled, plain * unit, rtol=1e-6)
    assert np.any(found[0][2] < format.fit(weight, (-2,)).scale)  # it does clip


@pytest.mark.parametrize("name", NAMES)
def test_layers_of_a_scan_are_observed_as_if_apart(name):
    params, batches = stacked_case()
    found, report = calibrate(scanned, params, batches, STATIC, observer=name)
    observer, range = NAMES[name], found["w"].range
    assert range.low.shape == range.high.shape == (3, 1, 1)
    for layer, seen in enumerate(inputs_of_layers(params, batches)):
        state = observer.init()
        if name not in ("minmax", "moving_average"):  # on the range of all batches
            seen = [np.concatenate(seen)]
        for x in seen:
            state = observer.update(state, jnp.asarray(x))
        wanted = observer.range(state, A8)
        np.testing.assert_allclose(range.low[layer, 0, 0], wanted.low, rtol=1e-3)
        np.testing.assert_allclose(range.high[layer, 0, 0], wanted.high, rtol=1e-3)
    (row,) = report
    assert row.low.shape == (3,) and row.reason == ""
    wanted = scanned(params, batches[0][0])
    error = np.abs(np.asarray(jax.jit(lift(scanned))(found, batches[0][0])) - wanted).mean()
    assert error < 0.05
    # The object does what its name does.
    again, _ = calibrate(scanned, params, iter(batches), STATIC, observer=observer)
    np.testing.assert_array_equal(again["w"].range.high, range.high)


def test_the_first_layer_equals_torch():
    torch = pytest.importorskip("torch")
    from torch.ao.quantization.observer import HistogramObserver, MovingAverageMinMaxObserver

    params, batches = stacked_case()
    for name, theirs in (
        ("histogram", HistogramObserver()),
        ("moving_average", MovingAverageMinMaxObserver()),
    ):
        for (x,) in batches:
            theirs(torch.from_numpy(np.array(x)))
        found, _ = calibrate(scanned, params, batches, STATIC, observer=name)
        scale, zero = theirs.calculate_qparams()
        ours = A8.grid(*found["w"].range)
        np.testing.assert_allclose(ours.scale[0, 0, 0], scale[0], rtol=1e-6)
        assert int(ours.zero_point[0, 0, 0]) + 128 == zero[0]


def test_one_compilation_for_each_shape_and_pass():
    params, _ = stacked_case()
    traces, told = [], []

    def counted(params, x):
        traces.append(x.shape)
        return scanned(params, x)

    batches = [jnp.ones((n, 8)) for n in (5, 5, 7, 5)]
    calibrate(
        counted,
        params,
        iter(batches),
        STATIC,
        observer="mse",
        progress=lambda what, done: told.append((what, done)),
    )
    assert traces == [(5, 8), (7, 8)] * 2
    assert told == [("ranges", i) for i in (1, 2, 3, 4)] + [("histograms", i) for i in (1, 2, 3, 4)]


def test_weights_put_together_share_what_they_meet():
    def fused(params, x):
        y = x @ jnp.concatenate([params["q"], params["k"]], axis=1)
        return jnp.tanh(y) @ params["o"]

    keys = jax.random.split(jax.random.key(0), 4)
    shapes = {"q": (8, 4), "k": (8, 6), "o": (10, 3)}
    params = {
        name: jax.random.normal(k, shape)
        for k, (name, shape) in zip(keys, shapes.items(), strict=False)
    }
    x = jax.random.normal(keys[3], (50, 8))
    found, _ = calibrate(fused, params, [x], STATIC, observer=Percentile(99.0))
    q, k = found["q"].range, found["k"].range
    np.testing.assert_array_equal(q.high, k.high)
    assert 0 < q.high < x.max() and 0 < found["o"].range.high < 1
    assert jnp.isfinite(jax.jit(lift(fused))(found, x)).all()


def test_branches_loops_and_recomputation():
    def apply(params, x):
        x = jax.checkpoint(lambda w, x: x @ w)(params["a"], x)
        x = jax.lax.cond(x.sum() > 0, lambda x: x @ params["b"], lambda x: 2 * x, x)
        return jax.lax.fori_loop(0, 3, lambda i, x: x @ params["c"], x)

    params = {name: jnp.eye(4) for name in "abc"}
    x = jnp.linspace(0.0, 1.0, 12).reshape(3, 4)
    found, _ = calibrate(apply, params, [x], STATIC, observer=Percentile(100.0))
    for name in "abc":
        np.testing.assert_allclose(found[name].range.high, [[1.0]], rtol=1e-3)


def test_linen_and_equinox():
    linen = pytest.importorskip("flax.linen")
    eqx = pytest.importorskip("equinox")
    x = jax.random.normal(jax.random.key(0), (64, 6))

    class Net(linen.Module):
        @linen.compact
        def __call__(self, x):
            x = jax.nn.relu(linen.Dense(16)(x))
            return linen.Dense(3)(x)

    net = Net()
    variables = net.init(jax.random.key(1), x)
    found, _ = calibrate(
        net.apply, variables, [x], [("**/kernel", STATIC)], observer=Percentile(95.0)
    )
    hidden = net.apply(variables, x, capture_intermediates=True)[1]["intermediates"]
    wanted = np.percentile(np.maximum(hidden["Dense_0"]["__call__"][0], 0), 97.5)
    got = found["params"]["Dense_1"]["kernel"].range
    np.testing.assert_allclose(got.high, [[wanted]], rtol=0.02)
    np.testing.assert_array_equal(got.low, [[0]])

    mlp = eqx.nn.MLP(6, 3, 16, 1, key=jax.random.key(2))
    arrays, rest = eqx.partition(mlp, eqx.is_array)

    def apply(arrays, x):
        return jax.vmap(eqx.combine(arrays, rest))(x)

    found, _ = calibrate(apply, arrays, [x], [("**/weight", STATIC)], observer="entropy")
    leaf = found.layers[0].weight
    assert isinstance(leaf, QArray) and leaf.range.high.shape == (1, 1)
    assert 0 < leaf.range.high <= 1.01 * x.max()


def test_leaves_that_train_get_clipped_ranges():
    params, batches = stacked_case()
    trained = qat(params, STATIC)
    wide, _ = calibrate(scanned, trained, batches)
    found, _ = calibrate(scanned, trained, batches, observer=Percentile(90.0))
    assert (found["w"].range.high < wide["w"].range.high).all()


@pytest.mark.parametrize(
    "format",
    [Int(4), Int(3, symmetric=False), Int(2, granularity="group", group_size=8)],
    ids=str,
)
def test_weights_on_clipped_grids_err_least(format):
    w = np.random.default_rng(0).standard_t(3, (32, 6)).astype(np.float32)

    def apply(params, x):
        return x @ params["w"]

    x = jnp.ones((2, 32))
    plain, _ = calibrate(apply, {"w": w}, [x], format)
    clipped, _ = calibrate(apply, {"w": w}, [x], format, weight_observer="mse")

    def error(value):
        groups = (np.asarray(value, np.float64) - w).reshape(-1, format.group_size or 32, 6)
        return np.square(groups).sum(1)

    assert (error(clipped["w"].materialise()) <= error(plain["w"].materialise()) + 1e-6).all()
    n = 2 ** (format.bits - 1)
    best = np.inf
    parts = w.astype(np.float64).reshape(-1, format.group_size or 32, 6)
    for ratio in np.linspace(1, 0.2, 81):
        if format.symmetric:
            scale, zero, ends = ratio * np.abs(parts).max(1) / (n - 1), 0, (1 - n, n - 1)
        else:
            low, high = np.minimum(parts.min(1), 0), np.maximum(parts.max(1), 0)
            scale, ends = ratio * (high - low) / (2 * n - 1), (-n, n - 1)
            zero = (-n - np.rint(ratio * low / scale))[:, None]
        steps = np.clip(np.rint(parts / scale[:, None]) + zero, *ends) - zero
        best = np.minimum(best, np.square(steps * scale[:, None] - parts).sum(1))
    np.testing.assert_allclose(error(clipped["w"].materialise()), best, rtol=1e-4)


def test_a_range_of_nothing_but_zeros_is_reported():
    params = {"w": jnp.ones((4, 4)), "v": jnp.ones((4, 2))}

    def apply(p, x):
        return jax.nn.relu(x @ p["w"] - 9.0) @ p["v"]  # whose input is dead

    _, report = calibrate(apply, params, [jnp.ones((2, 4))], STATIC)
    reasons = {row.path: row.undone for row in report}
    assert reasons["w"] == "" and "all that met this weight was zero" in reasons["v"]
    _, report = calibrate(apply, params, [jnp.zeros((2, 4))], STATIC)
    assert all("was zero" in row.undone and row.undone == row.reason for row in report)


def test_what_observers_refuse():
    params, batches = stacked_case()
    with pytest.raises(ValueError, match=r'(?s)observer="median".*"minmax", "moving_average"'):
        calibrate(scanned, params, batches, STATIC, observer="median")
    with pytest.raises(TypeError, match=r"expected a name such as"):
        calibrate(scanned, params, batches, STATIC, observer=Percentile)
    with pytest.raises(ValueError, match=r'weight_observer is one of "minmax", "mse"'):
        calibrate(scanned, params, batches, STATIC, weight_observer="kl")
    with pytest.raises(ValueError, match="got no batch"):
        calibrate(scanned, params, [], STATIC, observer="entropy")
    with pytest.raises(ValueError, match=r"meets `w` has a NaN"):
        calibrate(scanned, params, [jnp.full((2, 8), jnp.nan)], STATIC, observer="percentile")
    with pytest.raises(ValueError, match=r"meets `w` has a NaN or an infinity"):
        calibrate(scanned, params, [jnp.full((2, 8), jnp.inf)], STATIC, observer="moving_average")
    with pytest.raises(ValueError, match=r"meets `w` is empty in every batch"):
        calibrate(scanned, params, [jnp.ones((0, 8))], STATIC)
    with pytest.raises(ValueError, match="the policy quantizes no weight"):
        calibrate(scanned, params, batches, [("w", None)])
    assert issubclass(MSE, Observer)
