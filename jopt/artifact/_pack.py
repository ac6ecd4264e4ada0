"""Bits into bytes and back: fixed-width integers, bitmaps, and Rice-coded gaps.

Everything is most significant bit first. Unused bits at the end of the last byte are zero, and the
decoders insist on it, so that one array has one spelling.
"""

import numpy as np

# Bits are spread to one byte each on the way, so long arrays go through in pieces. A multiple of
# eight values fills whole bytes at any width.
_PIECE = 1 << 18


def packed_bytes(count: int, width: int) -> int:
    """The bytes that `count` values of `width` bits take."""
    return -(-count * width // 8)


def pack(values: np.ndarray, width: int) -> bytes:
    """Packs unsigned integers below `2**width`, `width` at most 32, without gaps.

    Example:
      >>> pack(np.array([1, 2, 3, 0], np.uint8), 2).hex()
      '6c'
    """
    if width == 0:
        return b""
    word = _word(width)
    pieces = []
    for start in range(0, values.size, _PIECE):
        column = values[start : start + _PIECE].astype(word)[:, None]
        bits = np.unpackbits(column.view(np.uint8), axis=1)
        pieces.append(np.packbits(bits[:, bits.shape[1] - width :]).tobytes())
    return b"".join(pieces)


def unpack(data: bytes | memoryview, width: int, count: int) -> np.ndarray:
    """Undoes `pack`: `count` values, as the smallest unsigned dtype that holds `width` bits.

    Raises:
      ValueError: if `data` is not exactly what `pack` writes for so many values.
    """
    word = _word(width)
    values = np.zeros(count, word.newbyteorder("="))
    _expect(len(data), packed_bytes(count, width), f"{count} values of {width} bits")
    if width == 0:
        return values
    stream = np.frombuffer(data, np.uint8)
    for start in range(0, count, _PIECE):
        stop = min(start + _PIECE, count)
        piece = stream[start * width // 8 : packed_bytes(stop, width)]
        bits = np.unpackbits(piece)
        if bits[(stop - start) * width :].any():
            raise ValueError("bits are set after the last value")
        padded = np.zeros((stop - start, word.itemsize * 8), np.uint8)
        padded[:, word.itemsize * 8 - width :] = bits[: (stop - start) * width].reshape(-1, width)
        values[start:stop] = np.packbits(padded, axis=1).view(word)[:, 0]
    return values


def pack_gaps(positions: np.ndarray) -> tuple[bytes, int, int]:
    """Rice-codes ascending positions by the gaps between them.

    A gap (the number of positions left out) is written as its quotient by `2**k` in unary, zeros
    ended by a one, and its remainder in `k` bits. All quotients come first, then all remainders, so
    that both are decoded without a loop. At a density p the cost is within 2 % of the entropy of p.

    Returns:
      The bytes, `k`, and how many of the bytes are quotients.

    References:
      R. F. Rice and J. R. Plaunt, "Adaptive Variable-Length Coding for Efficient Compression of
      Spacecraft Television Data", 1971.
    """
    gaps = np.diff(positions, prepend=-1) - 1
    # The best k is next to the logarithm of the mean gap.
    near = int(gaps.mean() + 1).bit_length() if gaps.size else 0
    choices = range(max(near - 2, 0), min(near + 2, 32))
    best = min(choices, key=lambda k: positions.size * k + int((gaps >> k).sum()))
    ends = np.cumsum((gaps >> best) + 1) - 1
    unary = np.zeros(int(ends[-1]) + 1 if ends.size else 0, np.uint8)
    unary[ends] = 1
    quotients = np.packbits(unary).tobytes()
    remainders = pack((gaps & ((1 << best) - 1)).astype(np.uint32), best)
    return quotients + remainders, best, len(quotients)


def unpack_gaps(
    data: bytes | memoryview, rice: int, unary: int, count: int, size: int
) -> np.ndarray:
    """Undoes `pack_gaps`: `count` ascending positions, all below `size`.

    Raises:
      ValueError: if `data` is not what `pack_gaps` writes for so many positions.
    """
    _expect(len(data), unary + packed_bytes(count, rice), f"{count} gaps")
    ends = np.flatnonzero(np.unpackbits(np.frombuffer(data[:unary], np.uint8)))
    last = int(ends[-1]) if ends.size else -1
    if ends.size != count or unary != packed_bytes(last + 1, 1):
        raise ValueError(f"found {ends.size} gaps, expected {count}")
    # In Python integers, before NumPy could overflow: the quotients alone must not pass the end.
    if (last + 1 - count) << rice > size:
        raise ValueError(f"the gaps pass the end of {size} values")
    quotients = np.diff(ends, prepend=-1) - 1
    remainders = unpack(data[unary:], rice, count).astype(np.int64)
    positions = np.cumsum((quotients << rice) + remainders + 1) - 1
    if count and int(positions[-1]) >= size:
        raise ValueError(f"the gaps pass the end of {size} values")
    return positions


def pack_bitmap(kept: np.ndarray) -> bytes:
    """One bit for each element: whether it is kept."""
    return np.packbits(kept).tobytes()


def unpack_bitmap(data: bytes | memoryview, size: int, count: int) -> np.ndarray:
    """Undoes `pack_bitmap`: `size` bools of which `count` are true.

    Raises:
      ValueError: if `data` is not what `pack_bitmap` writes for so many.
    """
    _expect(len(data), packed_bytes(size, 1), f"a bitmap of {size}")
    kept = np.unpackbits(np.frombuffer(data, np.uint8))
    if kept[size:].any() or int(np.count_nonzero(kept)) != count:
        raise ValueError(f"the bitmap marks {np.count_nonzero(kept)} values, expected {count}")
    return kept[:size].view(np.bool_)


def _word(width: int) -> np.dtype:
    """The smallest big-endian word of at least `width` bits."""
    return np.dtype(">u1" if width <= 8 else ">u2" if width <= 16 else ">u4")


def _expect(found: int, expected: int, what: str) -> None:
    if found != expected:
        raise ValueError(f"{what} take {expected} bytes, found {found}")
