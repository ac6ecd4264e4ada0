"""Checkpoints: written whole or not at all, checked when read, the last good one found.

A checkpoint is a folder named by its step: `state/`, as orbax writes it, and `checkpoint.json`,
which says what is in it and holds the length and CRC of every file. It is written under another
name and renamed when complete, so a kill at any moment leaves the earlier checkpoints as they
were.
"""

import dataclasses
import errno
import json
import os
import pathlib
import re
import shutil
import warnings
import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from jopt.train import _arrays as arrays
from jopt.train._feed import Feed
from jopt.train._state import State

PyTree = Any

_SAVING, _DELETING, _CORRUPT = ".saving-", ".deleting-", ".corrupt-"
_ABOUT, _STATE = "checkpoint.json", "state"


class CheckpointError(OSError):
    """A checkpoint could not be written, or none could be read."""


class Restored(NamedTuple):
    """What a checkpoint held."""

    step: int
    state: State
    feed: dict[str, Any]  # where the feed stood
    metadata: dict[str, Any]  # as given to `Checkpoints`


@dataclasses.dataclass(frozen=True)
class Checkpoints:
    """Where checkpoints are kept, and how often they are written.

    Args:
      directory: made when the first is written.
      keep: how many of the newest stay.
      every_s: seconds from one to the next; None writes none by the clock.
      every_steps: steps from one to the next; None writes none by the step.
      metadata: anything JSON can hold, kept with each.

    Example:
      >>> import tempfile, jax.numpy as jnp, optax
      >>> from jopt import train
      >>> state = train.init(jnp.array(1.0), optax.sgd(0.1))
      >>> with tempfile.TemporaryDirectory() as folder:
      ...   checkpoints = train.Checkpoints(folder)
      ...   checkpoints.save(state)
      ...   float(checkpoints.restore(state).state.params)
      1.0
    """

    directory: str | os.PathLike[str]
    keep: int = dataclasses.field(default=2, kw_only=True)
    every_s: float | None = dataclasses.field(default=30.0, kw_only=True)
    every_steps: int | None = dataclasses.field(default=None, kw_only=True)
    metadata: Mapping[str, Any] | None = dataclasses.field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        for name, least in (("keep", 1), ("every_steps", 1), ("every_s", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"`Checkpoints(..., {name}={value})` expects at least {least}.")

    @property
    def folder(self) -> pathlib.Path:
        """The directory, absolute."""
        return pathlib.Path(self.directory).absolute()

    def steps(self) -> list[int]:
        """The steps of the checkpoints there are, oldest first."""
        names = os.listdir(self.folder) if self.folder.is_dir() else []
        return sorted(int(name) for name in names if re.fullmatch(r"\d+", name))

    def latest(self) -> int | None:
        """The step of the newest checkpoint."""
        return (self.steps() or [None])[-1]

    def due(self, step: int, elapsed: float) -> bool:
        """Whether to write one after `step`, so many seconds after the last."""
        by_step = self.every_steps is not None and step % self.every_steps == 0
        return by_step or (self.every_s is not None and elapsed >= self.every_s)

    def save(self, state: State, feed: Mapping[str, Any] | None = None) -> None:
        """Writes a checkpoint of `state` and of where the feed stands, and drops the oldest.

        Raises:
          CheckpointError: if it cannot be written (a full disk); the earlier ones are still there.
        """
        step = int(state.step)
        target, partial = self._named(step), self._named(step, _SAVING)
        about = {
            "step": step,
            "leaves": arrays.described(state),
            "feed": dict(feed or {}),
            "metadata": dict(self.metadata or {}),
        }
        try:
            self._sweep()
            self.folder.mkdir(parents=True, exist_ok=True)
            partial.mkdir()
            arrays.write(partial / _STATE, state)
            _write_about(partial, about)
            if target.exists():  # of an earlier run to the same step
                os.replace(target, self._named(step, _DELETING))
            os.replace(partial, target)
            _sync(self.folder)
            for old in self.steps()[: -self.keep]:
                os.replace(self._named(old), self._named(old, _DELETING))
            self._sweep()
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            kept = self.latest()
            still = "There is none yet." if kept is None else f"That of step {kept} is still there."
            raise CheckpointError(
                error.errno or errno.EIO,
                f"the checkpoint of step {step} was not written to `{self.directory}`: "
                f"{error.strerror or error}. {still}",
            ) from error

    def restore(self, target: State, *, feed: Any = None) -> Restored | None:
        """Reads the newest good checkpoint, in the likeness of `target`.

        A damaged one is set aside under another name, with a warning, and the one before is taken.

        Args:
          target: a state with the structure, shapes, dtypes and devices wanted, such as that of
            `init`.
          feed: the `Feed` to go on with; it has to be the one that the checkpoint knows.

        Returns:
          What was kept, or None if there is no checkpoint.

        Raises:
          CheckpointError: if there are checkpoints and all are damaged.
          ValueError: if the checkpoint is of another structure, or of another feed.
        """
        damaged = []
        for step in reversed(self.steps()):
            folder = self._named(step)
            if fault := _fault(folder):
                damaged.append(f"step {step}: {fault}")
                continue
            if damaged:
                self._set_aside(step, damaged)
            about = _read_about(folder)
            _check_leaves(about["leaves"], target, folder)
            if isinstance(feed, Feed):
                _check_feed(about["feed"], feed.state(step), folder)
            state = arrays.read(folder / _STATE, target)
            return Restored(step, state, about["feed"], about["metadata"])
        if damaged:
            raise CheckpointError(
                f"`{self.directory}` holds no good checkpoint ({'; '.join(damaged)}). "
                "Empty it to begin anew."
            )
        return None

    def _named(self, step: int, prefix: str = "") -> pathlib.Path:
        return self.folder / f"{prefix}{step:08d}"

    def _sweep(self) -> None:
        """Removes what a kill left half written or half deleted."""
        for prefix in (_SAVING, _DELETING):
            for path in self.folder.glob(f"{prefix}*"):
                shutil.rmtree(path)

    def _set_aside(self, good: int, damaged: list[str]) -> None:
        for step in self.steps():
            if step > good:
                aside = self._named(step, _CORRUPT)
                shutil.rmtree(aside, ignore_errors=True)
                os.replace(self._named(step), aside)
        warnings.warn(
            f"`{self.directory}`: {'; '.join(damaged)}. Set aside as `{_CORRUPT}*`; "
            f"went back to the checkpoint of step {good}.",
            stacklevel=3,
        )


def _write_about(folder: pathlib.Path, about: dict[str, Any]) -> None:
    about = about | {"files": _files(folder)}
    text = json.dumps(about, indent=1)
    with (folder / _ABOUT).open("w") as file:
        file.write(json.dumps({"crc32": zlib.crc32(text.encode())}) + "\n" + text)
        file.flush()
        os.fsync(file.fileno())


def _read_about(folder: pathlib.Path) -> dict[str, Any]:
    """The manifest; a `ValueError` where it is not what was written."""
    first, _, text = (folder / _ABOUT).read_bytes().partition(b"\n")
    if json.loads(first) != {"crc32": zlib.crc32(text)}:
        raise ValueError("wrong checksum")
    return json.loads(text)


def _files(folder: pathlib.Path) -> dict[str, list[int]]:
    """Length and CRC of every file below `folder`, but for the manifest."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name != _ABOUT:
            crc = 0
            with path.open("rb") as file:
                while block := file.read(1 << 20):
                    crc = zlib.crc32(block, crc)
            found[name] = [path.stat().st_size, crc]
    return found


def _fault(folder: pathlib.Path) -> str | None:
    """What is wrong with a checkpoint's files, if anything."""
    try:
        kept = _read_about(folder)["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"`{_ABOUT}` cannot be read ({error})"
    found = _files(folder)
    for name in sorted(kept.keys() | found.keys()):
        if name not in found:
            return f"`{name}` is missing"
        if kept.get(name) != found[name]:
            return f"`{name}` is not what was written"
    return None


def _check_leaves(kept: dict[str, str], target: State, folder: pathlib.Path) -> None:
    wanted = arrays.described(target)
    if kept == wanted:
        return
    names = [name for name in kept | wanted if kept.get(name) != wanted.get(name)]
    lines = [
        f"  `{name}`: {kept.get(name, 'nothing')} there, {wanted.get(name, 'nothing')} here"
        for name in names[:4]
    ]
    raise ValueError(
        f"`restore`: the checkpoint `{folder}` is of another state; {len(names)} leaves differ:\n"
        + "\n".join(lines)
        + "\nRestore with the model and the optimizer it was written with, or begin in an empty "
        "directory."
    )


def _check_feed(kept: dict[str, Any], wanted: dict[str, Any], folder: pathlib.Path) -> None:
    if kept and kept != wanted:
        differ = [name for name in wanted if kept.get(name) != wanted[name]]
        raise ValueError(
            f"`restore`: the checkpoint `{folder}` was written with another feed: "
            + ", ".join(f"{name} {kept.get(name)} there, {wanted[name]} here" for name in differ)
            + ". Go on with the same data, seed and batch size, or begin in an empty directory."
        )


def _sync(folder: pathlib.Path) -> None:
    """Makes a rename last through a power cut, where the system can."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
