"""Teachers' outputs on disk, found by what the example *is*, not by its number.

A key is a hash of an example's bytes, so that an augmented, shuffled or edited example can never be
given the output of another one: it is not found instead. Files are safetensors, complete or absent.
"""

import hashlib
import os
import pathlib
import zlib
from collections.abc import Callable
from typing import Any, Self

import jax
import numpy as np

from ._cached import TopK

Folder = str | os.PathLike[str]
_BYTES = 16  # of a key: one chance in 10^20 that two of 10^9 examples share one
_FORMAT = "jopt.distill.topk/1"
_CHECK = "crc32"  # of a file's arrays; files of before it was written are read without


def content_keys(examples: Any) -> np.ndarray:
    """A key for each example: a hash of its dtypes, shapes and bytes.

    Args:
      examples: arrays that share their leading axis, one row an example, in any pytree: exactly
        what the teacher is given, after augmentation.

    Returns:
      uint8 `[examples, 16]`.

    Raises:
      ValueError: if there is no array, or their leading axes differ.

    Example:
      >>> import numpy as np
      >>> from jopt import distill
      >>> keys = distill.content_keys(np.array([[1, 2], [1, 2], [2, 1]]))
      >>> bool((keys[0] == keys[1]).all()), bool((keys[0] == keys[2]).all())
      (True, False)
    """
    flat = jax.tree_util.tree_flatten_with_path(examples)[0]
    arrays = [(jax.tree_util.keystr(path), np.asarray(leaf)) for path, leaf in flat]
    lengths = {len(array) if array.ndim else None for _, array in arrays}
    if len(lengths) != 1 or None in lengths:
        raise ValueError(
            "`content_keys(examples)` expects arrays that share their leading axis; their shapes "
            f"are {[array.shape for _, array in arrays]}."
        )
    heads = [f"{path} {a.dtype.name} {a.shape[1:]} ".encode() for path, a in arrays]
    rows = np.empty((len(arrays[0][1]), _BYTES), np.uint8)
    for i in range(len(rows)):
        digest = hashlib.blake2b(digest_size=_BYTES)
        for head, (_, array) in zip(heads, arrays, strict=True):
            digest.update(head + _little(array[i]).tobytes())
        rows[i] = np.frombuffer(digest.digest(), np.uint8)
    return rows


class CacheWriter:
    """Writes what a teacher says of examples into a folder, to be read by `Cache`.

    Files are written whole and renamed into place, so a run that is killed leaves what was
    complete. A second run over the same folder goes on; examples that are there are not written
    again. Several processes may write to one folder.

    Args:
      folder: is made if it is not there.
      teacher: a name for who is speaking, compared when a folder is written to again.
      shard: examples a file.
      dtype: of the stored logarithms, `"float32"` or `"float16"`.

    Raises:
      ImportError: if safetensors is missing.
      ValueError: if an option is not one of those above, or the folder holds another teacher's
        outputs.

    Example:
      >>> import tempfile, numpy as np, jax.numpy as jnp
      >>> from jopt import distill
      >>> folder, x = tempfile.mkdtemp(), np.arange(6.0).reshape(3, 2)
      >>> with distill.CacheWriter(folder, teacher="doubling") as writer:
      ...   writer.add(x, distill.top_k(2 * jnp.asarray(x), 1))
      >>> len(distill.Cache(folder))
      3
    """

    def __init__(
        self, folder: Folder, *, teacher: str = "", shard: int = 4096, dtype: str = "float32"
    ):
        _safetensors()
        if shard < 1 or dtype not in ("float32", "float16"):
            raise ValueError(
                f"`CacheWriter(..., shard={shard}, dtype={dtype!r})` expects one example or more a "
                'file, and "float32" or "float16".'
            )
        self.folder, self.teacher = pathlib.Path(folder), teacher
        self._shard, self._dtype = shard, np.dtype(dtype)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._kind: dict[str, str] | None = None  # what every file of the folder says of itself
        self._known: set[bytes] = set()
        self._rows: list[dict[str, np.ndarray]] = []
        if any(self.folder.glob("*.safetensors")):
            before = Cache(self.folder)
            if before.teacher != teacher:
                raise ValueError(
                    f"`CacheWriter({str(folder)!r}, teacher={teacher!r})`: the folder holds the "
                    f"outputs of {before.teacher!r}."
                )
            self._kind, self._known = before.kind, set(before.keys())

    def missing(self, examples: Any) -> np.ndarray:
        """Which examples are not there yet, booleans: the teacher need not see the others."""
        return np.array([key.tobytes() not in self._known for key in content_keys(examples)], bool)

    def add(self, examples: Any, cached: TopK) -> None:
        """Takes in a batch: the examples as the teacher was given them, and what it said."""
        keys = content_keys(examples)
        columns = _columns(cached, self._dtype)
        if len(keys) != len(columns["tail"]):
            raise ValueError(
                f"`CacheWriter.add(examples, cached)` got {len(keys)} examples and outputs for "
                f"{len(columns['tail'])}."
            )
        kind = _kind(cached, self.teacher, columns["log_p"].shape[1:])
        if self._kind is not None and kind != self._kind:
            raise ValueError(
                "`CacheWriter.add(examples, cached)` expects outputs like those before: "
                f"{self._kind}; these are {kind}."
            )
        self._kind = kind
        for i, key in enumerate(keys):
            if key.tobytes() not in self._known:
                self._known.add(key.tobytes())
                self._rows.append({"keys": key, **{k: c[i] for k, c in columns.items()}})
            if len(self._rows) == self._shard:
                self.flush()

    def flush(self) -> None:
        """Writes what has been taken in, if only a part of a file."""
        if not self._rows:
            return
        tensors = {k: np.stack([row[k] for row in self._rows]) for k in self._rows[0]}
        known = {**(self._kind or {}), _CHECK: _checksum(tensors)}
        data = _safetensors().numpy.save(tensors, metadata=known)
        name = hashlib.blake2b(tensors["keys"].tobytes(), digest_size=8).hexdigest()
        _write(self.folder / f"{name}.safetensors", data)
        self._rows = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        if kind is None:
            self.flush()


class Cache:
    """A teacher's outputs from a folder, by the content of examples; the teacher may be gone.

    Keys are held in memory, outputs stay on disk and are read row by row, so it can stand in the
    pipeline that makes batches (a function of a batch, for `grain.MapDataset.map` say) and travels
    to its processes. Every file is read whole once, here, and compared with the checksum in its
    header (files of jopt 0.1 that have none are taken as they are).

    Args:
      folder: what `CacheWriter` wrote.

    Raises:
      ImportError: if safetensors is missing.
      ValueError: if there is nothing, a file is damaged, or files disagree.

    Attributes:
      teacher: the name that was written.
    """

    def __init__(self, folder: Folder):
        self.folder = pathlib.Path(folder)
        self.kind: dict[str, str] = {}
        self._places: dict[bytes, tuple[str, int]] = {}
        for path in sorted(self.folder.glob("*.safetensors")):
            kind, keys = _read(path, _header)
            if self.kind and kind != self.kind:
                raise ValueError(f"`{path}` is of {kind}, the files before of {self.kind}.")
            self.kind = kind
            for row, key in enumerate(keys):
                self._places.setdefault(key.tobytes(), (path.name, row))
        if not self._places:
            raise ValueError(f"`Cache({str(folder)!r})` found no outputs there.")
        self.teacher = self.kind["teacher"]

    def __len__(self) -> int:
        return len(self._places)

    def keys(self) -> list[bytes]:
        """The keys of all examples."""
        return list(self._places)

    def __call__(self, examples: Any) -> TopK:
        """The outputs for a batch, as NumPy arrays.

        Raises:
          ValueError: if an example is not there; `find` says which.
        """
        cached, found = self.find(examples)
        if not found.all():
            raise ValueError(
                f"`Cache({str(self.folder)!r})` has no output for {np.sum(~found)} of {len(found)} "
                "examples: the teacher never saw these bytes. Cache what the pipeline really gives "
                "(after augmentation), or use `cache.find(examples)` and its mask."
            )
        return cached

    def find(self, examples: Any) -> tuple[TopK, np.ndarray]:
        """The outputs for a batch, and booleans for those that are there; others are class 0."""
        places = [self._places.get(key.tobytes()) for key in content_keys(examples)]
        found = np.array([place is not None for place in places], bool)
        columns = self._blank(len(places))
        for name in sorted({place[0] for place in places if place is not None}):
            rows = [(i, p[1]) for i, p in enumerate(places) if p is not None and p[0] == name]
            parts = _read(self.folder / name, lambda file, rows=rows: _rows(file, rows))
            for column, values in parts.items():
                columns[column][[i for i, _ in rows]] = values
        return TopK(
            **columns,
            temperature=float(self.kind["temperature"]),
            classes=int(self.kind["classes"]),
        ), found

    def _blank(self, count: int) -> dict[str, np.ndarray]:
        shape = tuple(int(size) for size in self.kind["shape"].split(","))
        log_p = np.full((count, *shape), -np.inf, np.float32)
        log_p[..., 0] = 0.0
        indices = np.broadcast_to(np.arange(shape[-1], dtype=np.int32), log_p.shape).copy()
        return {
            "log_p": log_p,
            "indices": indices,
            "tail": np.full(log_p.shape[:-1], -np.inf, "f4"),
        }


# Helpers, in order of use.


def _little(array: np.ndarray) -> np.ndarray:
    """The array with its lowest bytes first, as on most machines."""
    return array.astype(array.dtype.newbyteorder("<")) if array.dtype.byteorder == ">" else array


def _safetensors() -> Any:
    try:
        import safetensors
        import safetensors.numpy
    except ImportError as error:
        raise ImportError(
            "A teacher's outputs are kept with safetensors: `pip install 'jopt[run]'`."
        ) from error
    return safetensors


def _columns(cached: TopK, dtype: np.dtype) -> dict[str, np.ndarray]:
    indices = np.asarray(cached.indices)
    small = np.uint16 if cached.classes <= 1 << 16 else np.int32
    return {
        "log_p": np.asarray(cached.log_p).astype(dtype),
        "indices": indices.astype(small),
        "tail": np.asarray(cached.tail).astype(np.float32),
    }


def _checksum(tensors: dict[str, np.ndarray]) -> str:
    total = 0
    for name in sorted(tensors):
        total = zlib.crc32(_little(tensors[name]).tobytes(), total)
    return f"{total:08x}"


def _kind(cached: TopK, teacher: str, shape: tuple[int, ...]) -> dict[str, str]:
    return {
        "format": _FORMAT,
        "teacher": teacher,
        "classes": str(cached.classes),
        "temperature": repr(float(cached.temperature)),
        "shape": ",".join(map(str, shape)),
    }


def _write(path: pathlib.Path, data: bytes) -> None:
    """The whole file or none, through to the disk."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    if hasattr(os, "O_DIRECTORY"):  # the name as well
        handle = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _read(path: pathlib.Path, take: Callable[[Any], Any]) -> Any:
    safetensors = _safetensors()
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            return take(file)
    except (safetensors.SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"`{path}` is damaged, or holds no teacher's outputs: {error}") from error


def _header(file: Any) -> tuple[dict[str, str], np.ndarray]:
    """What a file says of itself, and its keys, if it is what it says."""
    kind, keys = dict(file.metadata() or {}), file.get_tensor("keys")
    if kind.get("format") != _FORMAT:
        raise KeyError(f"its format is {kind.get('format')!r}, not {_FORMAT!r}")
    check, _ = kind.pop(_CHECK, None), kind["teacher"]
    if not (int(kind["classes"]) > 0 and float(kind["temperature"]) > 0):
        raise KeyError(f"{kind['classes']} classes at temperature {kind['temperature']}")
    shape = [len(keys), *(int(size) for size in kind["shape"].split(","))]
    expected = {"keys": [len(keys), _BYTES], "log_p": shape, "indices": shape, "tail": shape[:-1]}
    for name, wanted in expected.items():
        if list(file.get_slice(name).get_shape()) != wanted:
            raise KeyError(f"`{name}` is not {wanted}")
    if check is not None and check != _checksum({k: file.get_tensor(k) for k in expected}):
        raise KeyError("its checksum is another")
    return kind, keys


def _rows(file: Any, rows: list[tuple[int, int]]) -> dict[str, np.ndarray]:
    columns = {name: file.get_slice(name) for name in ("log_p", "indices", "tail")}
    return {
        name: np.concatenate([part[row : row + 1] for _, row in rows])
        for name, part in columns.items()
    }
