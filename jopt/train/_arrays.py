"""A state's arrays on disk, through orbax: bit for bit, in the likeness of a target."""

import contextlib
import logging
import os
import pathlib
import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

PyTree = Any

_PACKED = "packed"
_SMALL = 1 << 20  # bytes; smaller arrays that lie on one device are written as one


def described(tree: PyTree) -> dict[str, str]:
    """Type and shape of each leaf by its path, such as `float32[3, 4]`."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): f"{x.dtype}{list(x.shape)}"
        for path, x in flat
    }


def write(folder: pathlib.Path, tree: PyTree) -> None:
    """Writes the leaves of `tree` to `folder`, which must not exist.

    Orbax takes about a millisecond an array, which a state of many small ones would feel: those go
    together, as bytes. Large and sharded arrays are orbax's to write, each in its parts.

    Raises:
      OSError: if the disk does not take them.
    """
    ocp = _orbax()
    leaves = [_plain(leaf) for leaf in jax.tree.leaves(tree)]
    small = [np.asarray(leaf) for leaf in leaves if _packs(leaf)]
    stored: dict[str, Any] = {f"{i:06d}": x for i, x in enumerate(leaves) if not _packs(x)}
    stored[_PACKED] = np.frombuffer(b"".join(x.tobytes() for x in small) or b"\0", np.uint8)
    with _quiet(), ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_compression=False)) as orbax:
        try:
            orbax.save(folder, args=ocp.args.PyTreeSave(stored))
        except ValueError as error:  # what tensorstore makes of a failed write
            if code := re.search(r"os_error_code='(\d+)'", str(error)):
                raise OSError(int(code[1]), os.strerror(int(code[1]))) from error
            raise


def read(folder: pathlib.Path, target: PyTree) -> PyTree:
    """Reads what `write` wrote; `target` gives structure, shapes, dtypes and devices."""
    ocp = _orbax()
    leaves, structure = jax.tree.flatten(target)
    plain = [_plain(leaf) for leaf in leaves]
    wanted: dict[str, Any] = {
        f"{i:06d}": ocp.ArrayRestoreArgs(sharding=x.sharding, dtype=x.dtype)
        if isinstance(x, jax.Array) and x.committed
        else ocp.RestoreArgs(restore_type=np.ndarray)
        for i, x in enumerate(plain)
        if not _packs(x)
    }
    wanted[_PACKED] = ocp.RestoreArgs(restore_type=np.ndarray)
    with _quiet(), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as orbax:
        stored = orbax.restore(folder, args=ocp.args.PyTreeRestore(restore_args=wanted))
    packed, start, restored = stored[_PACKED].tobytes(), 0, []
    for i, (leaf, x) in enumerate(zip(leaves, plain, strict=True)):
        if not _packs(x):
            restored.append(_like(stored[f"{i:06d}"], leaf))
            continue
        dtype = np.dtype(x.dtype)
        array = np.frombuffer(packed, dtype, x.size, start).reshape(x.shape)
        start += array.nbytes
        restored.append(_like(array, leaf))
    return jax.tree.unflatten(structure, restored)


def _plain(leaf: Any) -> Any:
    """The array in a leaf: of a typed key, its data."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.key_data(leaf)
    return leaf


def _packs(x: Any) -> bool:
    """Whether an array is written with the other small ones: its shape decides, not its place."""
    return x.size * np.dtype(x.dtype).itemsize < _SMALL


def _like(array: Any, leaf: Any) -> Any:
    """`array` as the kind of leaf that `leaf` is, and where it is."""
    if isinstance(leaf, np.ndarray | np.generic):
        return np.array(array)
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        array = jax.random.wrap_key_data(jnp.asarray(array), impl=jax.random.key_impl(leaf))
    if leaf.committed:
        return jax.device_put(array, leaf.sharding)
    return jnp.array(array, copy=True)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps orbax from logging: what matters of it is raised."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(level)


def _orbax() -> Any:
    try:
        import orbax.checkpoint
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            '`Checkpoints` needs orbax-checkpoint: `pip install "jopt[run]"`.'
        ) from error
    return orbax.checkpoint
