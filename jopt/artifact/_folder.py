"""A folder that is replaced whole or not at all."""

import contextlib
import errno
import os
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: Path, *, overwrite: bool, names: Collection[str]) -> Iterator[Path]:
    """Gives an empty folder to write into, which becomes `path` when the block ends well.

    The folder is a hidden sibling of `path`, on the same file system, so that a rename moves it
    into place. Where `path` is replaced, the old folder is set aside first and put back if the
    rename fails; if the process dies between the two renames, `current` finds the old folder where
    it was set aside, and the next call puts it back. One process at a time may write a path.

    Args:
      path: the folder to make.
      overwrite: whether a folder that holds something may be replaced.
      names: the files such a folder may hold; one that holds anything else is never replaced.

    Raises:
      FileExistsError: if `path` is not to be replaced.
      OSError: if writing fails, for instance because the disk is full; `path` is as it was.
    """
    partial, aside = _sibling(path, "partial"), _sibling(path, "replaced")
    path.parent.mkdir(parents=True, exist_ok=True)
    _recover(path, aside)
    _check(path, overwrite=overwrite, names=names)
    _remove(partial)
    partial.mkdir()
    try:
        yield partial
        _sync(partial)
        _swap(partial, path, aside)
    except OSError as error:
        _remove(partial)
        state = "What it held is untouched." if path.exists() else "Nothing was left there."
        code = error.errno or errno.EIO
        reason = os.strerror(code) if error.errno else str(error)
        raise OSError(code, f"could not write the artifact `{path}`: {reason}. {state}") from error
    except BaseException:
        _remove(partial)
        raise
    _remove(aside)


def current(path: Path) -> Path:
    """Where the folder `path` is to be read: `path`, or where a killed replacement set it aside."""
    aside = _sibling(path, "replaced")
    return aside if not path.exists() and aside.is_dir() else path


def write(path: Path, data: bytes) -> None:
    """Writes a file through to the disk."""
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _swap(partial: Path, path: Path, aside: Path) -> None:
    if path.exists():
        os.replace(path, aside)
        try:
            os.replace(partial, path)
        except BaseException:
            os.replace(aside, path)
            raise
    else:
        os.replace(partial, path)
    _sync(path.parent)


def _recover(path: Path, aside: Path) -> None:
    """Ends what a killed replacement began."""
    if path.exists():
        _remove(aside)
    elif aside.is_dir():
        os.replace(aside, path)


def _check(path: Path, *, overwrite: bool, names: Collection[str]) -> None:
    if not path.exists():
        return
    if not path.is_dir():
        raise FileExistsError(errno.EEXIST, "is a file, where a folder is to be made", str(path))
    held = sorted(entry.name for entry in path.iterdir())
    if held and not overwrite:
        raise FileExistsError(
            errno.EEXIST, "is not empty; choose another folder or pass `overwrite=True`", str(path)
        )
    if strange := [name for name in held if name not in names]:
        raise FileExistsError(
            errno.EEXIST,
            f"holds `{strange[0]}`, so it is no artifact and is not replaced",
            str(path),
        )


def _sibling(path: Path, suffix: str) -> Path:
    return path.with_name(f".{path.name}.{suffix}")


def _remove(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)


def _sync(folder: Path) -> None:
    """Makes the names in a folder durable, where the system lets folders be opened."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
