"""The lowest scores, against sorting in NumPy; wide counts, against Python's integers."""

from fractions import Fraction

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jopt.prune import _threshold, _wide

# Shapes are few, so that programs are compiled once.
SHAPES = [(3, 5), (2, 2, 4), (7,)]
SIZE = sum(int(np.prod(shape)) for shape in SHAPES)
DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
# Ties, both zeros, denormal numbers of each dtype, the largest numbers, infinities.
SPECIAL = [0, -0.0, 1e-45, -1e-45, 3e-45, 1e-40, 1e-7, 1, 2, -1, 3e38, np.inf, -np.inf, np.nan]
SEEDS = st.integers(0, 2**32 - 1)


def draw(seed):
    """Scores with many ties, some of them ordinary numbers."""
    rng = np.random.default_rng(seed)
    pool = np.concatenate([rng.choice(SPECIAL, 5), rng.normal(size=rng.integers(1, 30))])
    return rng.choice(pool, SIZE)


def expected(flat, k):
    """Which to keep if the k lowest go: NaN last, equal ones in order."""
    with np.errstate(invalid="ignore"):
        flat = flat.astype(np.float64)
    order = sorted(range(len(flat)), key=lambda i: (np.isnan(flat[i]), flat[i], i))
    kept = np.ones(len(flat), bool)
    kept[order[:k]] = False
    return kept


def leaves(values, dtype):
    with np.errstate(over="ignore", invalid="ignore"):
        flat = np.asarray(values, np.float32).astype(dtype)
    ends = np.cumsum([int(np.prod(shape)) for shape in SHAPES])[:-1]
    return flat, [x.reshape(s) for x, s in zip(np.split(flat, ends), SHAPES, strict=True)]


@pytest.mark.parametrize("dtype", DTYPES)
@settings(deadline=None, max_examples=60)
@given(seed=SEEDS, k=st.integers(0, SIZE))
def test_together(dtype, seed, k):
    flat, arrays = leaves(draw(seed), DTYPES[dtype])
    kept = _threshold.keep([jnp.asarray(x) for x in arrays], _wide.wide([k]), together=True)
    assert all(mask.dtype == bool for mask in kept)
    np.testing.assert_array_equal(np.concatenate([m.ravel() for m in kept]), expected(flat, k))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@settings(deadline=None, max_examples=40)
@given(seed=SEEDS, part=st.tuples(*(st.integers(0, int(np.prod(s))) for s in SHAPES)))
def test_apart(dtype, seed, part):
    _, arrays = leaves(draw(seed), DTYPES[dtype])
    kept = _threshold.keep([jnp.asarray(x) for x in arrays], _wide.wide(part), together=False)
    for mask, array, k in zip(kept, arrays, part, strict=True):
        np.testing.assert_array_equal(np.ravel(mask), expected(array.ravel(), k))


MIXED = [(3, 5), (7,), (3, 5), (2, 2, 4), (7,), (3, 5)]  # leaves of one shape, not side by side
MIXED_SIZES = [int(np.prod(shape)) for shape in MIXED]


def mixed(seed):
    rng = np.random.default_rng(seed)
    pool = np.concatenate([rng.choice(SPECIAL, 5), rng.normal(size=rng.integers(1, 30))])
    with np.errstate(over="ignore", invalid="ignore"):
        return [rng.choice(pool, shape).astype(np.float32) for shape in MIXED]


@settings(deadline=None, max_examples=40)
@given(seed=SEEDS, k=st.integers(0, sum(MIXED_SIZES)))
def test_stacked_together(seed, k):
    arrays = mixed(seed)
    few = _wide.wide([k])
    kept = _threshold.keep([jnp.asarray(x) for x in arrays], few, together=True, stacked=True)
    assert [mask.shape for mask in kept] == MIXED
    flat = np.concatenate([x.ravel() for x in arrays])
    np.testing.assert_array_equal(np.concatenate([np.ravel(m) for m in kept]), expected(flat, k))


@settings(deadline=None, max_examples=40)
@given(seed=SEEDS, part=st.tuples(*(st.integers(0, size) for size in MIXED_SIZES)))
def test_stacked_apart(seed, part):
    arrays = mixed(seed)
    few = _wide.wide(part)
    kept = _threshold.keep([jnp.asarray(x) for x in arrays], few, together=False, stacked=True)
    for mask, array, k in zip(kept, arrays, part, strict=True):
        assert mask.shape == array.shape
        np.testing.assert_array_equal(np.ravel(mask), expected(array.ravel(), k))


@pytest.mark.parametrize("stacked", [False, True])
def test_counts(stacked):
    marks = [jnp.asarray(x > 0) for x in mixed(0)] + [jnp.ones((16, 8), bool)]
    found = jax.jit(lambda marks: _threshold.counts(marks, stacked=stacked))(marks)
    np.testing.assert_array_equal(found, [int(np.sum(mark)) for mark in marks])


def test_keys_order_all_halves():
    bits = np.arange(2**16, dtype=np.uint16)
    for dtype in (ml_dtypes.bfloat16, np.float16):
        floats = bits.view(dtype)
        keys = np.asarray(_threshold.sortable(jnp.asarray(floats))).astype(np.int64)
        with np.errstate(invalid="ignore"):
            values = floats.astype(np.float64)
        numbers = ~np.isnan(values)
        order = np.argsort(values[numbers], kind="stable")
        steps = np.diff(keys[numbers][order]) > 0
        np.testing.assert_array_equal(steps, np.diff(values[numbers][order]) > 0)
        assert np.all(keys[~numbers] == 2**16 - 1) and np.all(keys[numbers] < 2**16 - 1)


def test_common_dtype():
    halves = [jnp.ones(2, jnp.bfloat16)] * 2
    assert [x.dtype for x in _threshold.common(halves)] == [jnp.bfloat16] * 2
    mixed = _threshold.common([jnp.ones(2, jnp.bfloat16), jnp.ones(2, jnp.float16)])
    assert [x.dtype for x in mixed] == [jnp.float32] * 2
    assert _threshold.common([jnp.ones(2, jnp.float8_e4m3fn)])[0].dtype == jnp.float32


def as_int(count):
    return (int(count.high) << 32) | int(count.low)


WIDE = st.integers(0, 2**63 - 1)
shares = jax.jit(_wide.shares, static_argnums=1)


@settings(deadline=None, max_examples=60)
@given(a=WIDE, b=WIDE)
def test_wide_arithmetic(a, b):
    x, y = (_wide.Wide(w.high[0], w.low[0]) for w in (_wide.wide([a]), _wide.wide([b])))
    assert as_int(_wide.add(x, y)) == a + b
    assert bool(_wide.less(x, y)) == (a < b)
    assert as_int(_wide.minimum(x, y)) == min(a, b)
    assert as_int(_wide.remainder(x, y)) == max(a - b, 0)
    for by in (1, 3, 8, 2**16 - 1):
        assert as_int(_wide.quotient(x, by)) == a // by


@settings(deadline=None, max_examples=20)
@given(st.lists(st.integers(0, 2**32 - 1), min_size=9, max_size=9))
def test_wide_sums(counts):
    array = jnp.asarray(np.array(counts, np.uint32))
    assert as_int(_wide.total(array)) == sum(counts)
    before = _wide.exclusive_sum(array)
    found = [as_int(_wide.Wide(h, low)) for h, low in zip(before.high, before.low, strict=True)]
    assert found == [sum(counts[:i]) for i in range(9)]


WHOLES = (1, 7, 1000, 2**24 + 1, 20_000_001, 2**32, 70_000_000_001, 2**40 - 1)


@settings(deadline=None, max_examples=80)
@given(
    st.one_of(
        st.floats(0, 1, width=32),
        st.sampled_from([0.0, 1.0, 0.5, 0.25, 2.0**-40, 2.0**-41, 1e-45, 0.9, 1 - 2.0**-24]),
    )
)
def test_shares_round_half_to_even_exactly(fraction):
    fraction = np.float32(fraction)
    found = shares(jnp.asarray(fraction), WHOLES)
    for whole, high, low in zip(WHOLES, found.high, found.low, strict=True):
        exact = round(Fraction(float(fraction)) * whole)
        assert as_int(_wide.Wide(high, low)) == exact


def test_shares_of_what_is_no_number():
    assert as_int(jax.tree.map(lambda x: x[0], shares(jnp.float32(np.nan), (1000,)))) == 0
