"""Every array comes back with its bits, in no more bytes than raw, and damage is told."""

import math
import zlib

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jopt.artifact import _encode, _pack

SHAPES = st.sampled_from([(), (0,), (1,), (7,), (3, 5), (2, 0, 3), (4, 3, 3, 2), (257,), (1000,)])
DENSITIES = st.sampled_from([0.0, 0.01, 0.1, 0.5, 0.9, 1.0])


def integer_of(values: np.ndarray, width: int) -> int:
    """The bits of `values`, most significant first, as one integer: an independent packer."""
    return int("".join(format(int(value), f"0{width}b") for value in values) or "0", 2)


@settings(deadline=None, max_examples=150)
@given(width=st.integers(1, 32), count=st.integers(0, 70), seed=st.integers(0, 2**31))
def test_pack_writes_the_bits_in_order(width: int, count: int, seed: int) -> None:
    values = np.random.default_rng(seed).integers(0, 2**width, count, dtype=np.uint64)
    data = _pack.pack(values.astype(np.uint32), width)
    spare = len(data) * 8 - count * width
    assert len(data) == math.ceil(count * width / 8)
    assert int.from_bytes(data, "big") == integer_of(values, width) << spare
    np.testing.assert_array_equal(_pack.unpack(data, width, count), values)


@pytest.mark.parametrize("width", [1, 3, 8, 13])
def test_pack_joins_its_pieces(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).integers(0, 2**width, 101)
    whole = _pack.pack(values, width)
    monkeypatch.setattr(_pack, "_PIECE", 16)
    assert _pack.pack(values, width) == whole
    np.testing.assert_array_equal(_pack.unpack(whole, width, 101), values)


@settings(deadline=None, max_examples=150)
@given(size=st.integers(0, 3000), density=DENSITIES, seed=st.integers(0, 2**31))
def test_gaps_come_back(size: int, density: float, seed: int) -> None:
    positions = np.flatnonzero(np.random.default_rng(seed).random(size) < density)
    data, rice, unary = _pack.pack_gaps(positions)
    found = _pack.unpack_gaps(data, rice, unary, positions.size, size)
    np.testing.assert_array_equal(found, positions)


@pytest.mark.parametrize("density", [0.01, 0.05, 0.1, 0.2])
def test_gaps_cost_little_more_than_the_entropy(density: float) -> None:
    size = 200_000
    positions = np.flatnonzero(np.random.default_rng(1).random(size) < density)
    p = positions.size / size
    entropy = -size * (p * math.log2(p) + (1 - p) * math.log2(1 - p)) / 8
    data, _, _ = _pack.pack_gaps(positions)
    assert entropy < len(data) < 1.04 * entropy


def test_pruned_codes_are_within_a_tenth_of_their_entropy() -> None:
    values = np.random.default_rng(2).standard_normal(1 << 16)
    values[np.abs(values) < np.quantile(np.abs(values), 0.9)] = 0
    codes = np.round(values / np.abs(values).max() * 127).astype(np.int8)
    _, counts = np.unique(codes, return_counts=True)
    p = counts / codes.size
    entropy = -codes.size * float(np.sum(p * np.log2(p))) / 8
    data, _ = _encode.encode(codes)
    assert len(data) < 1.1 * entropy
    assert len(data) < len(zlib.compress(codes.tobytes(), 9))


@st.composite
def arrays(draw: st.DrawFn) -> np.ndarray:
    """Any dtype and shape; random bits, a narrow range of them, or mostly one value."""
    dtype = _encode.DTYPES[draw(st.sampled_from(sorted(_encode.DTYPES)))]
    shape, density = draw(SHAPES), draw(DENSITIES)
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))
    kind = draw(st.sampled_from(["bits", "narrow"]))
    size = math.prod(shape)
    if jnp.issubdtype(dtype, jnp.integer):
        limits = jnp.iinfo(dtype)
        low, high = int(limits.min), int(limits.max)
        if kind == "narrow":
            low, high = max(low, high - 5), high
        unsigned = low >= 0
        wide = rng.integers(
            low, high, size, dtype=np.uint64 if unsigned else np.int64, endpoint=True
        )
        values = wide.astype(dtype)
        base = np.asarray(high).astype(dtype)
    elif dtype == np.bool_:
        values, base = rng.random(size) < 0.5, np.bool_(True)
    else:
        values = rng.standard_normal(size).astype(dtype)
        if kind == "bits" and dtype.itemsize > 1:  # every NaN, infinity, subnormal and sign of zero
            values = rng.bytes(size * dtype.itemsize)
            values = np.frombuffer(values, np.uint8).view(dtype)
        base = np.zeros((), dtype)
    values = np.where(rng.random(size) < density, values, base).astype(dtype)
    return values.reshape(shape)


@settings(deadline=None, max_examples=400)
@given(array=arrays())
def test_every_array_comes_back_bit_for_bit(array: np.ndarray) -> None:
    data, code = _encode.encode(array)
    again = _encode.decode(data, _encode.parse(code.as_json()), array.shape, array.dtype)
    assert again.dtype == array.dtype and again.shape == array.shape
    assert again.tobytes() == array.tobytes()
    assert len(data) <= array.nbytes


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bias", [0, 17])
def test_codes_of_every_width_take_their_bits(bits: int, signed: bool, bias: int) -> None:
    rng = np.random.default_rng(bits)
    low = (-(2 ** (bits - 1)) if signed else 0) + bias
    codes = rng.integers(low, low + 2**bits, 4096).astype(np.int16)
    codes[:2] = low, low + 2**bits - 1
    data, code = _encode.encode(codes)
    assert len(data) <= 4096 * bits // 8
    again = _encode.decode(data, code, codes.shape, codes.dtype)
    np.testing.assert_array_equal(again, codes)


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (np.zeros((100, 100), np.float32), 0),
        (np.full((100, 100), 7, np.int8), 0),
        (np.zeros(0, np.float32), 0),
        (np.full(1000, 3, np.int32), 0),
        (np.ones(64, np.bool_), 0),
        (np.arange(64) % 2 == 0, 8),
    ],
)
def test_constant_arrays_cost_nothing(array: np.ndarray, expected: int) -> None:
    data, code = _encode.encode(array)
    assert len(data) == expected
    np.testing.assert_array_equal(_encode.decode(data, code, array.shape, array.dtype), array)


def test_negative_zero_is_kept() -> None:
    array = np.array([0.0, -0.0, 0.0, 0.0] * 100, np.float32)
    data, code = _encode.encode(array)
    again = _encode.decode(data, code, array.shape, array.dtype)
    np.testing.assert_array_equal(np.signbit(again), np.signbit(array))


def test_the_most_frequent_code_is_the_zero_point() -> None:
    codes = np.full(1000, 37, np.uint8)
    codes[::20] = np.arange(50)
    data, code = _encode.encode(codes)
    assert code.fill == 37 and code.positions == "gaps"
    assert len(data) < 90
    np.testing.assert_array_equal(_encode.decode(data, code, codes.shape, codes.dtype), codes)


@settings(deadline=None, max_examples=300)
@given(array=arrays(), data=st.data())
def test_damaged_bytes_are_told_or_decode_to_the_shape(
    array: np.ndarray, data: st.DataObject
) -> None:
    encoded, code = _encode.encode(array)
    damage = data.draw(st.sampled_from(["cut", "longer", "flip"]))
    at = data.draw(st.integers(0, max(len(encoded) - 1, 0)))
    if damage == "flip" and encoded:
        # A flipped value is another value; hashes are what tells it. It must only stay in bounds.
        changed = bytearray(encoded)
        changed[at] ^= 1 << data.draw(st.integers(0, 7))
        try:
            found = _encode.decode(bytes(changed), code, array.shape, array.dtype)
        except ValueError:
            return
        assert found.shape == array.shape and found.dtype == array.dtype
        return
    changed = encoded[:at] if damage == "cut" and encoded else encoded + b"\0"
    with pytest.raises(ValueError):
        _encode.decode(changed, code, array.shape, array.dtype)


@pytest.mark.parametrize(
    "fields",
    [
        None,
        [],
        {"positions": "somewhere"},
        {"values": "pickle"},
        {"width": 9},
        {"width": -1},
        {"width": 2.0},
        {"width": True},
        {"rice": 64},
        {"count": -1},
        {"unary": -1},
        {"low": 2**64},
        {"fill": "0"},
        {"other": 1},
    ],
)
def test_a_strange_encoding_is_refused(fields: object) -> None:
    with pytest.raises(ValueError, match=r"encoding|unknown"):
        _encode.parse(fields)


@pytest.mark.parametrize(
    ("data", "fields", "message"),
    [
        (b"", {"positions": "bitmap", "count": 9}, "9 values are kept of 8"),
        (b"\xff", {"positions": "bitmap", "count": 1}, "bytes|marks"),
        (b"\xff\0", {"positions": "bitmap", "count": 1}, "marks 8 values, expected 1"),
        (b"\x80\0", {"positions": "gaps", "count": 1, "rice": 31, "unary": 1}, "bytes"),
        (
            b"\x01" + b"\0" * 4 + b"\1",
            {"positions": "gaps", "count": 1, "rice": 31, "unary": 1},
            "pass the end",
        ),
        (
            b"\x80\xff\xff\xff\xfe\1",
            {"positions": "gaps", "count": 1, "rice": 31, "unary": 1},
            "pass the end",
        ),
        (b"\0\1", {"positions": "gaps", "count": 1, "rice": 0, "unary": 1}, "found 0 gaps"),
        (b"garbage", {"values": "deflate"}, "corrupt|long"),
        (zlib.compress(b"x" * 9, wbits=-15), {"values": "deflate"}, "not 8 bytes long"),
        (zlib.compress(b"x" * 8, wbits=-15) + b"!", {"values": "deflate"}, "not 8 bytes long"),
    ],
)
def test_bytes_that_contradict_the_shape_are_refused(
    data: bytes, fields: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        _encode.decode(data, _encode.parse(fields), (8,), np.uint8)


def test_a_deflate_bomb_is_not_inflated() -> None:
    bomb = zlib.compress(bytes(1 << 28), 9, wbits=-15)
    with pytest.raises(ValueError, match="not 8 bytes long"):
        _encode.decode(bomb, _encode.Code(values="deflate"), (8,), np.uint8)


def test_a_bool_is_zero_or_one_and_int4_stays_in_range() -> None:
    with pytest.raises(ValueError, match="bool"):
        _encode.decode(b"\2", _encode.Code(), (1,), np.bool_)
    with pytest.raises(ValueError, match="outside of int4"):
        _encode.decode(b"\x09", _encode.Code(), (1,), jnp.int4)


def test_an_unknown_dtype_is_refused() -> None:
    with pytest.raises(TypeError, match="complex128"):
        _encode.encode(np.zeros(2, np.complex128))
