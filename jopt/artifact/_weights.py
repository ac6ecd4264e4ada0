"""The weights file: every array of a model in one safetensors file.

An array that is best written raw is a tensor of its own, under its own name, which any safetensors
reader reads. The others, and small ones, whose name and shape in the header would weigh more than
they gain, are joined in one tensor of bytes; the manifest says how to read it. A file that joining
and encoding would not make clearly smaller is left a plain safetensors file.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from . import _encode

_JOINED = "jopt.joined"  # the tensor of bytes
_SMALL = 4096  # bytes; a header entry takes about 80
_PLAIN = 0.95  # encoding that saves less than a twentieth is not worth the loss of a plain file
# The dtypes that are tensors of their own, as safetensors spells them.
_SPELLED = {
    "bool": "BOOL",
    "int8": "I8",
    "uint8": "U8",
    "int16": "I16",
    "uint16": "U16",
    "int32": "I32",
    "uint32": "U32",
    "int64": "I64",
    "uint64": "U64",
    "float16": "F16",
    "bfloat16": "BF16",
    "float32": "F32",
    "float64": "F64",
}
# A sparse or constant array may be far smaller than what it stands for, and so may a malicious one.
# What is decoded may be this many times the file, or this many bytes, whichever is more.
_EXPANSION, _ALWAYS = 2000, 1 << 30


def write(
    arrays: Mapping[str, np.ndarray], centers: Mapping[str, str] | None = None
) -> tuple[bytes, dict[str, dict[str, Any]]]:
    """The bytes of the weights file, and for each array its entry in the manifest.

    Args:
      arrays: what to write, by name.
      centers: for names of integer arrays the name of an array of their zero points, of the same
        rank and along each axis of a size that divides theirs. Pruned values then count as zeros
        even where every channel has a zero point of its own.

    Raises:
      ImportError: if safetensors is missing.
      TypeError: if an array has a dtype that an artifact does not hold; the message names it.
    """
    save = _safetensors().numpy.save
    coded = {name: _smallest(name, arrays, (centers or {}).get(name)) for name in arrays}
    encoded = sum(len(data) for data, _, _ in coded.values())
    spelled = all(array.dtype.name in _SPELLED for array in arrays.values())
    plain = spelled and encoded > _PLAIN * sum(array.nbytes for array in arrays.values())
    tensors, joined, entries = {}, [], {}
    for name, array in arrays.items():
        data, code, center = coded[name]
        entry: dict[str, Any] = {"dtype": array.dtype.name, "shape": list(array.shape)}
        raw = code == _encode.Code() and center is None and array.dtype.name in _SPELLED
        if name != _JOINED and (plain or (raw and array.nbytes >= _SMALL)):
            tensors[name] = np.ascontiguousarray(array)
            entry["bytes"] = array.nbytes
        else:
            joined.append(data)
            entry |= {"bytes": len(data), "code": code.as_json()}
            if center is not None:
                entry["center"] = center
        entries[name] = entry
    if joined:
        tensors[_JOINED] = np.frombuffer(b"".join(joined), np.uint8)
    return save(tensors), entries


def read(data: bytes, entries: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Undoes `write`: the arrays by name, in the order of `entries`, which may come from anyone.

    Raises:
      ImportError: if safetensors is missing.
      ValueError: if file and entries do not agree, or either is not what `write` writes.
    """
    safetensors = _safetensors()
    try:
        tensors = dict(safetensors.deserialize(data))
    except safetensors.SafetensorError as error:
        raise ValueError(f"it is no safetensors file: {error}") from error
    _bound(len(data), entries)
    joined = memoryview(tensors.pop(_JOINED, {"data": b""})["data"])
    arrays, start = {}, 0
    for name, entry in entries.items():
        with _naming(name):
            if "code" in entry:
                piece = joined[start : start + entry["bytes"]]
                start += entry["bytes"]
                code = _encode.parse(entry["code"])
                dtype = np.dtype("i1") if "center" in entry else _encode.DTYPES[entry["dtype"]]
                arrays[name] = _encode.decode(piece, code, entry["shape"], dtype)
            else:
                arrays[name] = _own(tensors.pop(name, None), entry)
    if tensors or start != len(joined):
        extra = ", ".join(tensors) or f"{len(joined) - start} joined bytes"
        raise ValueError(f"it holds more than the manifest lists: {extra}")
    for name, entry in entries.items():
        if "center" in entry:
            with _naming(name):
                arrays[name] = _uncentered(arrays[name], entry, entries, arrays)
    return arrays


def _smallest(
    name: str, arrays: Mapping[str, np.ndarray], center: str | None
) -> tuple[bytes, _encode.Code, str | None]:
    """The array encoded, and the name of its zero points if it is smaller without them."""
    array = arrays[name]
    try:
        data, code = _encode.encode(array)
    except TypeError as error:
        raise TypeError(f"parameter `{name}`: {error}") from error
    if center is not None and array.dtype.itemsize == 1:
        offset = array.astype(np.int8) - _spread(arrays[center].astype(np.int8), array.shape)
        less, without = _encode.encode(offset)
        if len(less) < len(data):
            return less, without, center
    return data, code, None


def _uncentered(
    offset: np.ndarray, entry: Any, entries: Mapping[str, Any], arrays: Mapping[str, np.ndarray]
) -> np.ndarray:
    """An array from what is left of it without its zero points."""
    center = entry["center"]
    if not isinstance(center, str) or "center" in entries.get(center, {"center": None}):
        raise ValueError(f"{center!r} has no zero points")
    words = offset + _spread(arrays[center].astype(np.int8), offset.shape)
    dtype = _encode.DTYPES[entry["dtype"]]
    return _encode.decode(words.tobytes(), _encode.Code(), words.shape, dtype)


def _spread(coarse: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Repeats each entry of `coarse` along each axis as often as it takes to be of `shape`."""
    fits = zip(coarse.shape, shape, strict=False)
    if coarse.ndim != len(shape) or any(not part or size % part for part, size in fits):
        raise ValueError(f"zero points of shape {coarse.shape} do not fit {tuple(shape)}")
    for axis, size in enumerate(shape):
        coarse = np.repeat(coarse, size // coarse.shape[axis], axis=axis)
    return coarse


@contextlib.contextmanager
def _naming(name: str) -> Iterator[None]:
    """Says of which array a complaint is."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"array `{name}`: {error}") from error


def _own(tensor: Any, entry: Mapping[str, Any]) -> np.ndarray:
    """A tensor of its own, if it is what the entry says."""
    if tensor is None:
        raise ValueError("it is missing from the weights file")
    expected = (_SPELLED.get(entry["dtype"]), list(entry["shape"]))
    found = (tensor["dtype"], list(tensor["shape"]))
    if found != expected:
        raise ValueError(f"expected {expected[0]}{expected[1]}, found {found[0]}{found[1]}")
    dtype = _encode.DTYPES[entry["dtype"]]
    return np.frombuffer(tensor["data"], np.uint8).view(dtype).reshape(entry["shape"])


def _bound(size: int, entries: Mapping[str, Any]) -> None:
    """Refuses entries whose arrays would take absurdly more memory than the file."""
    for name, entry in entries.items():
        if entry["dtype"] not in _encode.DTYPES:
            raise ValueError(f"array `{name}` has the unknown dtype {entry['dtype']!r}")
    total = sum(
        math.prod(entry["shape"]) * _encode.DTYPES[entry["dtype"]].itemsize
        for entry in entries.values()
    )
    if total > max(_ALWAYS, _EXPANSION * size):
        raise ValueError(f"its {size} bytes claim to be {total} bytes of arrays")


def _safetensors() -> Any:
    try:
        import safetensors
        import safetensors.numpy
    except ImportError as error:
        raise ImportError(
            "An artifact keeps its weights with safetensors: `pip install 'jopt[run]'`."
        ) from error
    return safetensors
