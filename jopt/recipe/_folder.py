"""The folder of a run: who may write there, what is finished, how a file is replaced whole."""

import contextlib
import fcntl
import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any

from jopt.recipe._load import RecipeError
from jopt.recipe._schema import Recipe

FORMAT = 1
RECORDED = {"accuracy", "loss", "bytes", "notes"}  # of every stage


class Folder:
    """`run.json` beside the files of the stages; it lists the stages that are finished."""

    def __init__(self, root: pathlib.Path, journal: dict[str, Any]):
        self.root = root
        self._journal = journal

    @classmethod
    def open(cls, root: pathlib.Path, recipe: Recipe, *, resume: bool) -> "Folder":
        """Takes a new or empty folder, or with `resume` one that holds the same recipe's run.

        Raises:
          RecipeError: if the folder is not empty and `resume` was not asked for, or holds another
            recipe's run, or none.
        """
        recorded = recipe.model_dump(mode="json")
        entries = [p.name for p in root.iterdir() if p.name != ".lock"] if root.is_dir() else []
        path = root / "run.json"
        if resume and path.is_file():
            folder = cls(root, _read(path))
            folder._check(recorded)
            return folder
        if root.exists() and not root.is_dir():
            raise RecipeError(f"`--out {root}` is a file, not a folder.")
        if [name for name in entries if not name.startswith(".run.json")]:
            raise RecipeError(
                f"`--out {root}` is not empty and holds no run to go on with: choose another."
                if resume or not path.is_file()
                else f"`--out {root}` already holds a run: add `--resume` to go on with it, "
                "or choose another folder."
            )
        root.mkdir(parents=True, exist_ok=True)
        folder = cls(root, {"format": FORMAT, "recipe": recorded, "stages": {}})
        folder._write()
        return folder

    def finished(self, stage: str) -> dict[str, Any] | None:
        """What was recorded when `stage` ended, or `None` if it has not."""
        return self._journal["stages"].get(stage)

    def finish(self, stage: str, record: dict[str, Any]) -> None:
        """Records that `stage` ended, atomically."""
        self._journal["stages"][stage] = record
        self._write()

    def stage(self, index: int, name: str) -> pathlib.Path:
        """The folder of one stage."""
        folder = self.root / "stages" / f"{index + 1}-{name}"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other processes out for as long as this one lives.

        Raises:
          RecipeError: if another process is running in this folder.
        """
        with open(self.root / ".lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RecipeError(f"another process is running in `{self.root}`.") from None
            yield

    def _check(self, recorded: dict[str, Any]) -> None:
        different = sorted(_differences(self._journal["recipe"], recorded))
        if different:
            raise RecipeError(
                f"`{self.root}` holds a run of another recipe, so this one cannot go on with it; "
                f"different: {', '.join(f'`{key}`' for key in different[:5])}."
            )

    def _write(self) -> None:
        write_text(self.root / "run.json", json.dumps(self._journal, indent=1))


def write_text(path: pathlib.Path, text: str) -> None:
    """Writes a file whole or not at all."""
    part = path.with_name(f".{path.name}.part")
    try:
        with open(part, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        reason = error.strerror or str(error)
        raise OSError(error.errno, f"could not write `{path}`: {reason}") from error
    finally:
        part.unlink(missing_ok=True)


def _read(path: pathlib.Path) -> dict[str, Any]:
    try:
        journal = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: not readable ({error}); choose another folder.") from error
    if not isinstance(journal, dict) or journal.get("format") != FORMAT:
        raise RecipeError(f"{path}: written by another version of jopt; choose another folder.")
    stages = journal.get("stages")
    if (
        not isinstance(journal.get("recipe"), dict)
        or not isinstance(stages, dict)
        or not all(isinstance(r, dict) and r.keys() >= RECORDED for r in stages.values())
    ):
        raise RecipeError(f"{path}: damaged, parts of it are missing; choose another folder.")
    return journal


def _differences(old: Any, new: Any, path: str = "") -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in old.keys() | new.keys():
            inside = f"{path}.{key}" if path else str(key)
            yield from _differences(old.get(key), new.get(key), inside)
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for index, (a, b) in enumerate(zip(old, new, strict=True)):
            yield from _differences(a, b, f"{path}.{index}")
    elif old != new:
        yield path
