"""Observers against PyTorch's, and against definitions in NumPy's float64."""

import functools

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
)

A8, S8 = Int(8, symmetric=False), Int(8)
EVERY = [
    *(MinMax(), MovingAverage(), Percentile(bins=128), MSE(bins=128, steps=32)),
    *(Entropy(512), Histogram(128)),
]


def stream(kind, seed=0, batches=4, size=3000):
    rng = np.random.default_rng(seed)
    scale = rng.uniform(0.3, 3, batches)
    draw = {
        "normal": lambda s: s * rng.normal(size=size),
        "relu": lambda s: np.maximum(s * rng.normal(size=size), 0),
        "heavy": lambda s: s * rng.standard_t(2, size),
        "shifted": lambda s: 5 + s * rng.normal(size=size),
        "growing": lambda s: np.cumsum(np.ones(size)) / size * s,
        "uneven": lambda s: rng.exponential(s, size) - 0.2,
    }[kind]
    return [draw(s).astype(np.float32).reshape(30, -1) for s in scale]


KINDS = ["normal", "relu", "heavy", "shifted", "growing", "uneven"]


@functools.partial(jax.jit, static_argnames=("observer", "keep"))
def update(observer, state, x, keep):
    return observer.update(state, x, keep=keep)


def watched(observer, batches, keep=(), shape=()):
    state = observer.init(shape)
    for x in batches:
        state = update(observer, state, jnp.asarray(x), keep)
    return state


def grid(range, format):
    return [np.asarray(part) for part in format.grid(*range)[:2]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ours", [MinMax(), MovingAverage(0.99), MovingAverage(0.5)])
def test_extremes_equal_torch(ours, kind):
    torch = pytest.importorskip("torch")
    from torch.ao.quantization import observer as peer

    if isinstance(ours, MinMax):
        theirs, channel = peer.MinMaxObserver(), peer.PerChannelMinMaxObserver(ch_axis=1)
    else:
        rate = 1 - ours.momentum
        theirs = peer.MovingAverageMinMaxObserver(averaging_constant=rate)
        channel = peer.MovingAveragePerChannelMinMaxObserver(averaging_constant=rate, ch_axis=1)
    batches = stream(kind)
    for x in batches:
        theirs(torch.from_numpy(x))
        channel(torch.from_numpy(x))
    state = watched(ours, batches)
    np.testing.assert_allclose(state.low, theirs.min_val, rtol=1e-6)
    np.testing.assert_allclose(state.high, theirs.max_val, rtol=1e-6)
    scale, zero = theirs.calculate_qparams()
    ours_scale, ours_zero = grid(ours.range(state, A8), A8)
    np.testing.assert_allclose(ours_scale, scale[0], rtol=1e-6)
    assert ours_zero.astype(int) + 128 == zero[0]  # torch's codes are unsigned
    state = watched(ours, batches, (-1,), (100,))
    np.testing.assert_allclose(state.low, channel.min_val, rtol=1e-6)
    np.testing.assert_allclose(state.high, channel.max_val, rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", [0, 1])
def test_the_histogram_equals_torch(kind, seed):
    torch = pytest.importorskip("torch")
    from torch.ao.quantization.observer import HistogramObserver

    theirs, batches = HistogramObserver(), stream(kind, seed)
    for x in batches:
        theirs(torch.from_numpy(x))
    state = watched(Histogram(), batches)
    np.testing.assert_allclose(state.low, theirs.min_val, rtol=1e-6)
    np.testing.assert_allclose(state.high, theirs.max_val, rtol=1e-6)
    np.testing.assert_allclose(state.counts, theirs.histogram, atol=1e-6)
    low, high = theirs._non_linear_param_search()
    range = Histogram().range(state, A8)
    np.testing.assert_allclose(range.low, min(low, 0), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(range.high, max(high, 0), rtol=1e-6, atol=1e-6)
    scale, zero = theirs.calculate_qparams()
    ours_scale, ours_zero = grid(range, A8)
    np.testing.assert_allclose(ours_scale, scale[0], rtol=1e-6)
    assert ours_zero.astype(int) + 128 == zero[0]


def test_the_histogram_of_one_value_and_what_follows_equals_torch():
    torch = pytest.importorskip("torch")
    from torch.ao.quantization.observer import HistogramObserver

    batches = [np.full(50, 2.0, np.float32), np.linspace(-1, 3, 99, dtype=np.float32)]
    theirs = HistogramObserver()
    for i, x in enumerate(batches):
        theirs(torch.from_numpy(x))
        state = watched(Histogram(), batches[: i + 1])
        np.testing.assert_allclose(state.counts, theirs.histogram, atol=1e-6)
    constant = Histogram().range(watched(Histogram(), batches[:1]), A8)
    assert [float(end) for end in constant] == [0, 2]


def entropy_by_definition(magnitudes, most, bins, levels):
    """Migacz's pseudocode, bin by bin; the first bin, of zeros, as in NVIDIA's own calibrator."""
    counts, edges = np.histogram(magnitudes, bins, (0, most))
    counts[0] = counts[1]
    best, threshold = np.inf, None
    for i in range(levels, bins + 1):
        p = counts[:i].astype(np.float64)
        p[-1] += counts[i:].sum()
        q = np.zeros(i)
        level = np.arange(i) * levels // i
        for j in range(levels):
            inside = level == j
            some = inside & (counts[:i] > 0)
            q[some] = counts[:i][inside].sum() / max(some.sum(), 1)
        if q.sum() == 0 or np.any((p > 0) & (q == 0)):
            continue
        p, q = p / p.sum(), q / q.sum()
        divergence = np.sum(p[p > 0] * np.log(p[p > 0] / q[p > 0]))
        if divergence < best - 1e-12:
            best, threshold = divergence, (i + 0.5) * (edges[1] - edges[0])
    return min(threshold, most)


@pytest.mark.parametrize("kind", ["normal", "relu", "heavy", "uneven"])
@pytest.mark.parametrize(("bits", "bins"), [(8, 512), (4, 256)])
def test_entropy_is_the_published_one(kind, bits, bins):
    x = np.concatenate([b.ravel() for b in stream(kind)])
    state = watched(Entropy(2 * bins), [x])
    found = Entropy(2 * bins).range(state, Int(bits))
    magnitudes = np.abs(x.astype(np.float64))
    wanted = entropy_by_definition(magnitudes, magnitudes.max(), bins, 2 ** (bits - 1))
    np.testing.assert_allclose(found.high, wanted, rtol=1e-5)
    np.testing.assert_allclose(found.low, -found.high)


@pytest.mark.parametrize("format", [Int(8), A8])
def test_entropy_is_not_led_astray_by_the_zeros_of_a_relu(format):
    """Nine tenths zeros, as after a ReLU and pooling: nearly all of the rest must be kept."""
    x = np.random.default_rng(0).exponential(size=50_000).astype(np.float32)
    x *= np.random.default_rng(1).random(50_000) < 0.1
    range = Entropy().range(watched(Entropy(), [x]), format)
    assert float(np.mean(x[x > 0] > range.high)) < 0.02


def test_entropy_clips_outliers_and_keeps_what_has_one_sign():
    x = np.random.default_rng(0).normal(size=20000).astype(np.float32)
    x[0] = 20.0
    state = watched(Entropy(), [x])
    assert Entropy().range(state, S8).high < 10
    positive = watched(Entropy(), [np.abs(x)])
    found = Entropy().range(positive, A8)
    assert found.low == 0 and found.high < 10


@pytest.mark.parametrize("percent", [90.0, 99.0, 99.9])
@pytest.mark.parametrize("kind", KINDS)
def test_percentiles_are_numpys_within_a_bin(kind, percent):
    x = np.concatenate([b.ravel() for b in stream(kind)])
    observer = Percentile(percent)
    state = watched(observer, [x])
    width = 2 * (x.max() - x.min()) / observer.bins
    beyond, one = 1 - percent / 100, 1 / x.size

    def leaves_out(values, end, fraction):
        """Whether `fraction` of the values is above `end`, within a bin or two."""
        above, at = np.mean(values > end + width), np.mean(values >= end - width)
        return above - one <= fraction <= at + one

    found = observer.range(state, A8)
    assert leaves_out(x, found.high, beyond / 2) or found.high == 0
    assert leaves_out(-x, -found.low, beyond / 2) or found.low == 0
    found = observer.range(state, S8)
    assert leaves_out(np.abs(x), found.high, beyond)
    np.testing.assert_allclose(found.low, -found.high)


def squared_error(x, low, high, format):
    """Of rounding by the definition, in float64."""
    n = 2 ** (format.bits - 1)
    if format.symmetric:
        scale, zero, ends = max(-low, high) / (n - 1), 0, (-(n - 1), n - 1)
    else:
        scale, ends = (high - low) / (2 * n - 1), (-n, n - 1)
        zero = -n - np.rint(low / scale)
    code = np.clip(np.rint(x / scale) + zero, *ends)
    return np.mean(((code - zero) * scale - x) ** 2)


@pytest.mark.parametrize("format", [Int(4), Int(4, symmetric=False), Int(2), A8], ids=str)
@pytest.mark.parametrize("kind", ["normal", "heavy", "relu", "shifted"])
def test_mse_finds_the_least_error(kind, format):
    x = np.concatenate([b.ravel() for b in stream(kind)]).astype(np.float64)
    observer = MSE(steps=32)
    range = observer.range(watched(observer, [x.astype(np.float32)]), format)
    found = squared_error(x, float(range.low), float(range.high), format)
    low, high = min(x.min(), 0), max(x.max(), 0)
    parts = np.arange(1, 33) / 32
    tried = [squared_error(x, p * low, p * high, format) for p in parts]
    assert found <= 1.02 * min(tried)
    assert found <= squared_error(x, low, high, format)
    if not format.symmetric and low < 0:  # both ends apart, all of them
        every = [squared_error(x, p * low, q * high, format) for p in parts for q in parts]
        assert found <= 1.1 * min(every)


@pytest.mark.parametrize("observer", EVERY, ids=lambda o: type(o).__name__)
def test_parts_are_observed_apart(observer):
    batches = [x.reshape(5, 4, 30) for x in stream("heavy", batches=3, size=600)]
    state = watched(observer, batches, (-1,), (30,))
    found = observer.range(state, A8)
    assert found.low.shape == found.high.shape == (30,)
    for channel in (0, 17):
        alone = observer.range(watched(observer, [x[..., channel] for x in batches]), A8)
        np.testing.assert_allclose(found.low[channel], alone.low, rtol=1e-6)
        np.testing.assert_allclose(found.high[channel], alone.high, rtol=1e-6)
    tokens = watched(observer, batches, (0, 1), (5, 4))
    assert observer.range(tokens, S8).high.shape == (5, 4)


@pytest.mark.parametrize("observer", EVERY, ids=lambda o: type(o).__name__)
def test_the_state_keeps_its_shape_and_maps(observer):
    x = jnp.asarray(np.stack(stream("normal", size=300)))
    state = observer.init()
    after = update(observer, state, x[0], ())
    for old, new in zip(state, after, strict=True):
        assert (old.shape, old.dtype) == (new.shape, new.dtype) and new.dtype == jnp.float32
    mapped = jax.jit(jax.vmap(lambda x: observer.update(observer.init(), x)))(x)
    for part in range(len(x)):
        alone = update(observer, observer.init(), x[part], ())
        for a, b in zip(mapped, alone, strict=True):
            np.testing.assert_allclose(a[part], b, rtol=1e-6)
    half = update(observer, observer.init(), x[0].astype(jnp.bfloat16), ())
    np.testing.assert_allclose(half.high, after.high, rtol=1e-2)
    folded, _ = jax.lax.scan(lambda s, x: (observer.update(s, x), None), state, x)
    for a, b in zip(folded, watched(observer, x), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


@pytest.mark.parametrize("observer", EVERY, ids=lambda o: type(o).__name__)
def test_nothing_constants_and_trouble(observer):
    nothing = observer.range(observer.init(), A8)
    assert [float(end) for end in nothing] == [0, 0]
    empty = update(observer, observer.init(), jnp.ones((0, 3)), ())
    assert [float(end) for end in observer.range(empty, A8)] == [0, 0]
    zeros = observer.range(watched(observer, [np.zeros(9, np.float32)]), A8)
    assert [float(end) for end in zeros] == [0, 0]
    three = observer.range(watched(observer, [np.full(9, -3.0, np.float32)]), A8)
    assert three.high == 0 and three.low == pytest.approx(-3, rel=0.01)
    if hasattr(observer, "bins"):  # infinities are not counted
        x = np.array([1, 2, np.inf, -np.inf], np.float32)
        assert np.isfinite(observer.range(watched(observer, [x]), A8).high)
        assert watched(observer, [x]).counts.sum() == 2
    else:
        nan = observer.update(observer.init(), jnp.array([1.0, jnp.nan]))
        assert np.isnan(nan.low)


def test_everything_lowers_everywhere():
    x = jax.ShapeDtypeStruct((4, 8), jnp.float32)
    for observer in EVERY:
        update = jax.jit(lambda x, o=observer: o.update(o.init((8,)), x, keep=(-1,)))
        jax.export.export(update, platforms=["cpu", "cuda", "tpu"])(x)


def test_what_is_refused():
    with pytest.raises(ValueError, match=r"`MovingAverage\(momentum=1\)`"):
        MovingAverage(1)
    with pytest.raises(ValueError, match=r"`Percentile\(percent=40\)`: percent must be above 50"):
        Percentile(40)
    with pytest.raises(ValueError, match=r"`Entropy\(bins=33\)`: bins must be even"):
        Entropy(33)
    with pytest.raises(ValueError, match=r"`Histogram\(bins=0\)`"):
        Histogram(0)
    with pytest.raises(ValueError, match=r"`MSE\(steps=0\)`"):
        MSE(steps=0)
    with pytest.raises(TypeError, match="needs a floating x"):
        MinMax().update(MinMax().init(), jnp.arange(3))
    with pytest.raises(ValueError, match=r"keep=\(3,\)"):
        MinMax().update(MinMax().init(), jnp.ones(3), keep=(3,))
    with pytest.raises(TypeError):
        Observer()
