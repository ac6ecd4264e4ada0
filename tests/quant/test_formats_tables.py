"""NF4 and codebooks: published values, Lloyd's iterations in NumPy, Max's table."""

from statistics import NormalDist

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from formats_reference import faked, lloyd, nearest, stored

from jopt.quant import NF4, Codebook, Spec, fake_quant, quantize
from jopt.quant._formats.fits import _start, normal_levels
from jopt.quant._formats.tables import _NF4, below, lookup

# Dettmers et al. 2023, appendix E.
PUBLISHED = [
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941),
    *(0.7229568362236023, 1.0),
]
# Max 1960, table I: the positive output levels for a unit normal variable.
MAX = {
    2: [0.7980],
    3: [0.0, 1.224],
    4: [0.4528, 1.510],
    5: [0.0, 0.7646, 1.724],
    8: [0.2451, 0.7560, 1.344, 2.152],
    16: [0.1284, 0.3881, 0.6568, 0.9424, 1.256, 1.618, 2.069, 2.733],
}


def test_nf4_has_the_published_values():
    assert list(_NF4) == PUBLISHED
    # As the paper derives them: quantiles of the normal distribution, each side by itself.
    end = ((1 - 1 / 32) + (1 - 1 / 30)) / 2
    quantile = np.vectorize(NormalDist().inv_cdf)
    positive = quantile(np.linspace(end, 0.5, 9)[:-1])
    negative = -quantile(np.linspace(end, 0.5, 8)[:-1])
    levels = np.sort(np.concatenate([negative, [0.0], positive])) / positive.max()
    np.testing.assert_allclose(levels, PUBLISHED, atol=2e-7)
    codes = jnp.arange(16, dtype=jnp.uint4)
    np.testing.assert_array_equal(lookup(codes, _NF4), np.float32(PUBLISHED))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_nf4_takes_the_nearest_of_each_group(dtype):
    x = jax.random.normal(jax.random.key(0), (2, 96, 5)).astype(dtype)
    leaf = stored(x, NF4(32))
    assert leaf.codes.dtype == jnp.uint4 and leaf.scale.shape == (2, 3, 5) and leaf.table is None
    wide = np.asarray(x, np.float64).reshape(2, 3, 32, 5)
    scale = np.abs(wide).max(2, keepdims=True)
    np.testing.assert_array_equal(leaf.scale, scale[:, :, 0])
    expected = (nearest(wide / scale, np.array(PUBLISHED)) * scale).reshape(x.shape)
    np.testing.assert_allclose(
        np.asarray(leaf.materialise(), np.float64),
        expected,
        rtol=1e-6 if dtype == jnp.float32 else 4e-3,
    )


@pytest.mark.parametrize("k", sorted(MAX))
def test_lloyd_max_levels_are_those_of_max(k):
    levels = normal_levels(k)
    np.testing.assert_allclose(levels[k // 2 :], MAX[k], atol=6e-4)
    np.testing.assert_array_equal(levels, [-level for level in levels[::-1]])


def test_lloyd_max_levels_are_means_of_their_cells():
    normal = NormalDist()
    for k in (6, 37):
        levels = np.array(normal_levels(k), np.float64)
        ends = [-40.0, *((levels[1:] + levels[:-1]) / 2), 40.0]
        for level, a, b in zip(levels, ends[:-1], ends[1:], strict=True):
            mean = (normal.pdf(a) - normal.pdf(b)) / (normal.cdf(b) - normal.cdf(a))
            assert abs(level - mean) < 1e-6


def test_lloyd_max_scales_by_the_root_mean_square():
    x = np.random.default_rng(0).laplace(size=(300, 4)).astype(np.float32) * np.float32(1e-3)
    leaf = stored(jnp.asarray(x), Codebook(6, method="lloyd_max", granularity="channel"))
    rms = np.sqrt((x.astype(np.float64) ** 2).mean(0, keepdims=True))
    np.testing.assert_allclose(leaf.scale, rms, rtol=1e-6)
    expected = nearest(x / rms, np.array(normal_levels(6))) * rms
    np.testing.assert_allclose(leaf.materialise(), expected, rtol=1e-5)


ROWS = {
    "normal": lambda rng: rng.normal(size=700),
    "heavy": lambda rng: rng.standard_t(2, size=700),
    "two heaps": lambda rng: np.concatenate([rng.normal(-3, 0.1, 100), rng.normal(2, 1, 600)]),
    "few values": lambda rng: rng.integers(-3, 4, 700),
    "pruned": lambda rng: rng.normal(size=700) * (rng.random(700) < 0.2),
}


@pytest.mark.parametrize("k", [2, 7, 32])
@pytest.mark.parametrize("name", ROWS)
def test_k_means_is_lloyds_algorithm(name, k):
    x = ROWS[name](np.random.default_rng(3)).astype(np.float32)[:, None]
    leaf = stored(jnp.asarray(x), Codebook(k, iterations=1000))
    top = np.abs(x).max()
    assert leaf.scale.item() == top and leaf.table.entries.shape == (1, 1, k)
    row = np.sort(x[:, 0] * (np.float32(1) / top))
    start = np.asarray(jax.jit(_start, static_argnums=1)(jnp.asarray(row), k))
    centers = lloyd(row, start)
    ours = np.asarray(leaf.table.entries[0, 0], np.float64)
    # A value next to a boundary may go either way in float32, and all may follow: so the error is
    # what is compared, and the centers where none does.
    error = np.square(row - nearest(row, ours)).sum()
    expected = np.square(row - nearest(row, centers)).sum()
    np.testing.assert_allclose(error, expected, rtol=0.02, atol=1e-9)
    if k == 2:
        np.testing.assert_allclose(ours, centers, atol=1e-6)
    # A fixed point: each center that has values is their mean.
    label = np.searchsorted((ours[1:] + ours[:-1]) / 2, row)
    for j in np.unique(label):
        assert abs(ours[j] - row[label == j].mean(dtype=np.float64)) < 1e-6
    # And better than even steps of as many values.
    assert error <= np.square(row - nearest(row, np.linspace(row[0], row[-1], k))).sum() + 1e-6


def test_k_means_of_as_many_values_as_codes_is_exact():
    x = jnp.array([[0.5, -2.0, 3.0, 0.25, 0.5]])
    np.testing.assert_allclose(faked(x, Codebook(5)), x, rtol=1e-6)
    y = jnp.repeat(jnp.array([-1.0, 0.5, 4.0]), 50)[:, None]
    np.testing.assert_allclose(faked(y, Codebook(17)), y, rtol=1e-6)


def test_k_means_stops_when_told():
    x = jnp.asarray(np.random.default_rng(0).laplace(size=(900, 1)), jnp.float32)

    def error(iterations):
        return float(jnp.sum((faked(x, Codebook(16, iterations=iterations)) - x) ** 2))

    assert error(100) < error(2)


def test_what_was_pruned_stays_so():
    x = np.random.default_rng(0).normal(size=(128, 6)) + 1.0
    x[::2] = 0
    x = jnp.asarray(x, jnp.float32)
    y = np.asarray(faked(x, Codebook(6, zero=True)))
    assert np.all(y[::2] == 0) and np.count_nonzero(y[1::2]) > 250
    assert np.any(np.asarray(faked(x, Codebook(6)))[::2] != 0)
    leaf = stored(x, Codebook(6, zero=True))
    assert np.count_nonzero(leaf.table.entries == 0) == 1
    # All on one side of zero, all the same: zero is added where it belongs in the order.
    for value in (-2.0, 3.0):
        z = jnp.full((128, 6), value).at[0].set(0.0)
        np.testing.assert_array_equal(faked(z, Codebook(6, zero=True)), z)


def test_granularity_of_codebooks():
    x = jax.random.normal(jax.random.key(0), (3, 64, 8))
    shapes = {
        "tensor": (3, 1, 1, 4),
        "channel": (3, 1, 8, 4),
        "group": (3, 4, 8, 4),
    }
    for granularity, shape in shapes.items():
        size = 16 if granularity == "group" else None
        leaf = stored(x, Codebook(4, granularity=granularity, group_size=size))
        assert leaf.table.entries.shape == shape and leaf.scale.shape == shape[:-1]
        parts = leaf.codes.reshape(3, 4, 16, 8) if size else leaf.codes[:, None]
        # Each channel of a group is what it would be alone.
        alone = stored(x[1, 16:32, 5:6], Codebook(4)) if size else stored(x[1, :, 5:6], Codebook(4))
        if granularity != "tensor":
            np.testing.assert_array_equal(parts[1, 1 if size else 0, :, 5:6], alone.codes)


def test_given_values():
    x = jnp.array([[-8.0, -3.0, -1.9, 0.4, 2.0, 3.2]]).T
    format = Codebook(values=(1.0, 0.25, -2.0))
    assert format == Codebook(values=[-2.0, 0.25, 1.0]) and format.bits == 2 and format.k == 3
    np.testing.assert_array_equal(faked(x, format).ravel(), [-8, 1, 1, 1, 1, 4])  # scale 4
    # In between lies the middle; exactly there the lower value is taken.
    y = jnp.array([[-2.0, -0.875, -0.874]]).T
    np.testing.assert_array_equal(faked(y, format).ravel(), [-2, -2, 0.25])


@pytest.mark.parametrize("count", [15, 40])
def test_tables_short_and_long_given_and_fitted_agree(count):
    rng = np.random.default_rng(count)
    levels = np.sort(rng.normal(size=count).astype(np.float32))
    x = np.concatenate([rng.normal(size=(90, 4)).astype(np.float32), levels[:8].reshape(2, 4)])
    rows = jnp.broadcast_to(jnp.asarray(levels), (1, 4, count))
    for closed, side in ((False, "left"), (True, "right")):
        expected = np.searchsorted(levels, x, side=side)
        for table in (tuple(levels.tolist()), rows):
            np.testing.assert_array_equal(below(jnp.asarray(x), table, closed=closed), expected)
    codes = rng.integers(0, count, (92, 4))
    for table in (tuple(levels.tolist()), rows):
        np.testing.assert_array_equal(lookup(jnp.asarray(codes), table), levels[codes])


@pytest.mark.parametrize(
    "format", [NF4(16), Codebook(5), Codebook(values=(-1, 0, 3)), Codebook(20)], ids=str
)
def test_stochastic_rounding_is_unbiased_between_the_ends(format):
    x = jax.random.normal(jax.random.key(0), (16, 4))
    keys = jax.random.split(jax.random.key(1), 1500)
    drawn = jax.jit(jax.vmap(lambda key: fake_quant(x, format, key=key)))(keys)
    drawn, x = np.asarray(drawn, np.float64), np.asarray(x, np.float64)
    low, high = drawn.min(0), drawn.max(0)
    between = (low <= x) & (x <= high) & (high > low)
    assert between.mean() > 0.4  # below -1/3 of the largest all is cut to it, for (-1, 0, 3)
    error = np.abs(drawn.mean(0) - x)[between]
    assert np.all(error <= 6 * 0.5 * (high - low)[between] / np.sqrt(1500))


def test_a_fitted_codebook_is_not_for_activations():
    with pytest.raises(ValueError, match="has no grid for a range alone, as that of an activation"):
        Codebook(4).grid(jnp.zeros((1, 1)), jnp.ones((1, 1)))
    assert Codebook(4).needs_values and not Codebook(values=(-1, 1)).needs_values
    assert Spec(Codebook(4), Codebook(values=(-1, 0, 1))).activation.k == 3


def test_arguments_are_checked():
    for k in (0, 1, 257, 4.0, True):
        with pytest.raises(ValueError, match="k must be an integer from 2 to 256"):
            Codebook(k)
    with pytest.raises(ValueError, match="3 given values leave nothing to fit"):
        Codebook(4, values=(-1, 0, 1))
    with pytest.raises(ValueError, match="2 to 256 different numbers"):
        Codebook(values=(1, 1))
    with pytest.raises(ValueError, match="numbers must be finite"):
        Codebook(values=(1, np.inf))
    with pytest.raises(ValueError, match='method is one of "kmeans", "lloyd_max"'):
        Codebook(4, method="median")
    with pytest.raises(ValueError, match="only k-means centers can be held at zero"):
        Codebook(4, method="lloyd_max", zero=True)
    with pytest.raises(ValueError, match="at least 1"):
        Codebook(4, iterations=0)
    with pytest.raises(ValueError, match="group_size must be a positive integer"):
        NF4(0)
    with pytest.raises(ValueError, match="group_size=64 does not divide the 96 inputs of `w`"):
        quantize({"w": jnp.ones((96, 2))}, NF4())
