"""One array into the fewest bytes, and back to the same bits.

An array is flattened to words: integers, or the bit patterns of floats. Elements equal to one
*fill* word (zero, or where integers are few the most frequent one, which is the zero point of a
pruned weight) may be left out; which are kept is a bitmap or Rice-coded gaps. The kept words are
written raw, packed to the bits that their range needs, or one byte each through deflate's Huffman
coder. Of all these the smallest is taken.
"""

import dataclasses
import math
import zlib
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from . import _pack

# The names that a manifest may use; looking them up here keeps `object` and the like out.
DTYPES = {
    name: np.dtype(getattr(jnp, "bool_" if name == "bool" else name))
    for name in (
        *("bool", "int2", "int4", "int8", "int16", "int32", "int64"),
        *("uint2", "uint4", "uint8", "uint16", "uint32", "uint64"),
        *("float16", "bfloat16", "float32", "float64", "complex64"),
        *("float4_e2m1fn", "float8_e3m4", "float8_e4m3", "float8_e4m3b11fnuz", "float8_e4m3fn"),
        *("float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"),
    )
}


@dataclasses.dataclass(frozen=True)
class Code:
    """How the bytes of one array are to be read."""

    positions: str = "all"  # which elements are kept: "all", "bitmap" or "gaps"
    values: str = "raw"  # how their words are written: "raw", "packed" or "deflate"
    count: int = 0  # words kept; written for "bitmap" and "gaps" only
    fill: int = 0  # the word of the elements that are not kept
    low: int = 0  # "packed", "deflate": what is added to the written value
    width: int = 0  # "packed": bits of a written value
    rice: int = 0  # "gaps": bits of a remainder
    unary: int = 0  # "gaps": bytes of quotients

    def as_json(self) -> dict[str, Any]:
        """The fields that differ from their defaults."""
        return {
            field.name: value
            for field in dataclasses.fields(self)
            if (value := getattr(self, field.name)) != field.default
        }


def parse(fields: Any) -> Code:
    """A `Code` from the JSON of a manifest, which may come from anyone.

    Raises:
      ValueError: if a field is unknown, has the wrong type, or is out of range.
    """
    known = {field.name: type(field.default) for field in dataclasses.fields(Code)}
    if not isinstance(fields, dict):
        raise ValueError("the encoding is not a JSON object")
    for name, value in fields.items():
        if name not in known or type(value) is not known[name]:
            raise ValueError(f"the encoding has {name!r}: {value!r}")
    code = Code(**fields)
    if code.positions not in ("all", "bitmap", "gaps"):
        raise ValueError(f"positions {code.positions!r} are unknown")
    if code.values not in ("raw", "packed", "deflate"):
        raise ValueError(f"values {code.values!r} are unknown")
    if not (0 <= code.width <= 8 and 0 <= code.rice < 32 and code.count >= 0 and code.unary >= 0):
        raise ValueError(f"the encoding is out of range: {fields}")
    if not all(-(2**63) <= word < 2**64 for word in (code.fill, code.low)):
        raise ValueError(f"the encoding is out of range: {fields}")
    return code


def encode(array: np.ndarray) -> tuple[bytes, Code]:
    """The smallest of the encodings of `array`.

    Example:
      >>> import numpy as np
      >>> data, code = encode(np.array([0] * 90 + [5, -7], np.int8))
      >>> len(data), code.positions, code.values, code.count
      (4, 'gaps', 'packed', 2)
      >>> decode(data, code, (92,), np.int8)[88:]
      array([ 0,  0,  5, -7], dtype=int8)

    Raises:
      TypeError: if the dtype is not one that an artifact holds.
    """
    words = _words(array)
    whole, dense = _values(words)
    fill = _fill(words)
    kept = words != _wrap(fill, words.dtype)
    count = int(np.count_nonzero(kept))
    # Left out are too few to pay for a bitmap, whatever their size.
    if (words.size - count) * words.dtype.itemsize * 8 <= words.size:
        return whole, dense
    values, sparse = _values(words[kept])
    where, found = _pack.pack_bitmap(kept), {"positions": "bitmap"}
    if 2 * count < words.size:  # a bitmap is as small as gaps from half density on
        gaps, rice, unary = _pack.pack_gaps(np.flatnonzero(kept))
        if len(gaps) < len(where):
            where, found = gaps, {"positions": "gaps", "rice": rice, "unary": unary}
    if len(where) + len(values) >= len(whole):
        return whole, dense
    return where + values, dataclasses.replace(sparse, count=count, fill=fill, **found)


def decode(data: bytes | memoryview, code: Code, shape: Sequence[int], dtype: Any) -> np.ndarray:
    """Undoes `encode`, bit for bit.

    Every length is checked against `shape` before anything of that length is made, and inflating
    stops at the expected length; `shape` itself is for the caller to bound.

    Raises:
      ValueError: if `data` is not what `encode` writes for this shape, dtype and code.
    """
    size, target = math.prod(shape), np.dtype(dtype)
    word = _word(target)
    count = size if code.positions == "all" else code.count
    if count > size:
        raise ValueError(f"{count} values are kept of {size}")
    head = {
        "all": 0,
        "bitmap": _pack.packed_bytes(size, 1),
        "gaps": code.unary + _pack.packed_bytes(count, code.rice),
    }[code.positions]
    if head > len(data):
        raise ValueError(f"positions take {head} bytes, found {len(data)}")
    values = _read(data[head:], code, count, word)
    if code.positions == "all":
        words = values
    else:
        words = np.full(size, _wrap(code.fill, word), word)
        if code.positions == "bitmap":
            words[_pack.unpack_bitmap(data[:head], size, count)] = values
        else:
            at = _pack.unpack_gaps(data[:head], code.rice, code.unary, count, size)
            words[at] = values
    return _unwords(words, target).reshape(shape)


def _words(array: np.ndarray) -> np.ndarray:
    """The elements in order, as integers of their own value or as bit patterns."""
    if array.dtype.name not in DTYPES:
        raise TypeError(f"an artifact holds no arrays of dtype {array.dtype.name}")
    flat = np.ascontiguousarray(array).reshape(-1)
    word = _word(array.dtype)
    # int4 and int2 have one byte an element, whose upper bits are not to be relied upon.
    return flat.astype(word) if jnp.issubdtype(array.dtype, jnp.integer) else flat.view(word)


def _unwords(words: np.ndarray, dtype: np.dtype) -> np.ndarray:
    if dtype == np.bool_ and words.size and int(words.max()) > 1:
        raise ValueError("a bool is neither 0 nor 1")
    if not jnp.issubdtype(dtype, jnp.integer):
        return words.view(dtype)
    limits = jnp.iinfo(dtype)
    if words.size and not (limits.min <= int(words.min()) and int(words.max()) <= limits.max):
        raise ValueError(f"a value is outside of {dtype.name}")
    return words.astype(dtype)


def _word(dtype: np.dtype) -> np.dtype:
    signed = jnp.issubdtype(dtype, jnp.signedinteger)
    return np.dtype(f"{'i' if signed else 'u'}{dtype.itemsize}")


def _fill(words: np.ndarray) -> int:
    """The word worth leaving out: the most frequent one where that is cheap to tell, else zero."""
    if words.dtype.itemsize > 1 or not words.size:
        return 0
    bits = words.view(np.uint8)
    return int(np.bincount(bits, minlength=256).argmax().astype(np.uint8).view(words.dtype))


def _values(words: np.ndarray) -> tuple[bytes, Code]:
    """The smallest way to write `words`, raw before packed before deflated if they are equal."""
    raw = words.astype(words.dtype.newbyteorder("<"), copy=False).tobytes()
    low, high = (int(words.min()), int(words.max())) if words.size else (0, 0)
    if high - low > 255:
        return raw, Code()
    width = (high - low).bit_length()
    unsigned = np.dtype(f"u{words.dtype.itemsize}")
    offset = (words.view(unsigned) - _wrap(low, unsigned)).astype(np.uint8)
    packed = _pack.pack(offset, width)
    coder = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_HUFFMAN_ONLY)
    deflated = coder.compress(offset.tobytes()) + coder.flush()
    candidates = [
        (raw, Code()),
        (packed, Code(values="packed", low=low, width=width)),
        (deflated, Code(values="deflate", low=low)),
    ]
    return min(candidates, key=lambda candidate: len(candidate[0]))


def _read(data: bytes | memoryview, code: Code, count: int, word: np.dtype) -> np.ndarray:
    """Undoes `_values`."""
    if code.values == "raw":
        if len(data) != count * word.itemsize:
            raise ValueError(
                f"{count} values take {count * word.itemsize} bytes, found {len(data)}"
            )
        return np.frombuffer(data, word.newbyteorder("<")).astype(word)
    if code.values == "packed":
        offset = _pack.unpack(data, code.width, count)
    else:
        offset = np.frombuffer(_inflate(data, count), np.uint8)
    unsigned = np.dtype(f"u{word.itemsize}")
    return (offset.astype(unsigned) + _wrap(code.low, unsigned)).view(word)


def _inflate(data: bytes | memoryview, count: int) -> bytes:
    coder = zlib.decompressobj(-15)
    try:
        # One byte more than expected, so that a longer stream shows without being inflated.
        out = coder.decompress(data, count + 1)
    except zlib.error as error:
        raise ValueError(f"the deflated values are corrupt: {error}") from error
    if len(out) != count or not coder.eof or coder.unused_data or coder.unconsumed_tail:
        raise ValueError(f"the deflated values are not {count} bytes long")
    return out


def _wrap(value: int, word: np.dtype) -> Any:
    """`value` modulo the size of `word`, as a scalar of that dtype."""
    unsigned = np.dtype(f"u{word.itemsize}")
    return unsigned.type(value % 2 ** (8 * word.itemsize)).view(word)
