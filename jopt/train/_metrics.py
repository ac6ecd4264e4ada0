"""Metrics as they come: JSON lines, and TensorBoard events beside them."""

import json
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from jopt import schedules

_FILE = "metrics.jsonl"


class MetricLog:
    """Writes metrics to `metrics.jsonl`, one line a step: `{"step": 10, "loss": 0.25}`.

    Steps are counted from 1. Lines hold no time of day: a run that was killed and resumed writes
    the lines of a run that was not. Values that are not finite become `null`.

    Args:
      directory: made if missing.
      every: log every so many steps. Evaluations are always logged.
      tensorboard: write TensorBoard event files too (needs tensorboardX). Events take some 0.1 ms
        a number: raise `every` where steps are fast.

    Raises:
      ModuleNotFoundError: if `tensorboard` is asked for and tensorboardX is missing.

    Example:
      >>> import tempfile
      >>> from jopt import train
      >>> with tempfile.TemporaryDirectory() as folder:
      ...   log = train.MetricLog(folder)
      ...   log.write(10, {"loss": 0.25})
      ...   log.read()
      [{'step': 10, 'loss': 0.25}]
    """

    def __init__(
        self, directory: str | os.PathLike[str], *, every: int = 1, tensorboard: bool = False
    ):
        if not schedules.whole_steps(every):
            raise ValueError(
                f"`MetricLog(..., every={every})` expects a number of steps, at least 1."
            )
        self.directory = pathlib.Path(directory)
        self.every = every
        self.directory.mkdir(parents=True, exist_ok=True)
        self._events = _writer_class() if tensorboard else None
        self._writer: Any = None
        self._purge: int | None = None

    @property
    def path(self) -> pathlib.Path:
        """The file of JSON lines."""
        return self.directory / _FILE

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Logs the metrics of one step, whatever `every` is."""
        plain = {name: _numbers(np.atleast_1d(x))[0] for name, x in metrics.items()}
        self._append([(step, plain)])

    def extend(self, first: int, columns: Mapping[str, np.ndarray]) -> None:
        """Logs consecutive steps from `first` on; each metric is an array, one number a step."""
        count = len(next(iter(columns.values()), ()))
        steps = np.arange(first, first + count)
        logged = steps % self.every == 0
        plain = {name: _numbers(column[logged]) for name, column in columns.items()}
        rows = zip(*plain.values(), strict=True)
        names = list(plain)
        self._append(
            [
                (step, dict(zip(names, row, strict=True)))
                for step, row in zip(steps[logged].tolist(), rows, strict=True)
            ]
        )

    def truncate(self, step: int) -> None:
        """Drops what was logged after `step`: a resumed run logs it again."""
        self.close()
        self._purge = step + 1
        if not self.path.exists():
            return
        kept = [line for line in self._lines() if json.loads(line)["step"] <= step]
        partial = self.path.with_suffix(".partial")
        partial.write_text("".join(line + "\n" for line in kept))
        os.replace(partial, self.path)

    def read(self) -> list[dict[str, Any]]:
        """Every line, oldest first."""
        return [json.loads(line) for line in self._lines()] if self.path.exists() else []

    def close(self) -> None:
        """Closes the event file; the next metric opens another."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _lines(self) -> list[str]:
        text = self.path.read_text()
        # A kill may have cut the last line: what follows the last line break never counts.
        return text[: text.rfind("\n") + 1].splitlines()

    def _append(self, rows: list[tuple[int, Mapping[str, float]]]) -> None:
        if not rows:
            return
        lines = [
            json.dumps({"step": step} | {name: _plain(x) for name, x in metrics.items()})
            for step, metrics in rows
        ]
        with self.path.open("a") as file:
            file.write("".join(line + "\n" for line in lines))
        if self._events is None:
            return
        if self._writer is None:
            # TensorBoard forgets steps from `purge_step` on. Files begun within one second would
            # have one name but for the suffix.
            suffix = f".{self._purge or 0}"
            self._writer = self._events(
                str(self.directory), purge_step=self._purge, filename_suffix=suffix
            )
        for step, metrics in rows:
            for name, x in metrics.items():
                self._writer.add_scalar(name, x, step)
        self._writer.flush()


def _numbers(column: np.ndarray) -> list[float]:
    """As Python numbers: of a float32 no more digits than it takes to read it back."""
    column = np.asarray(column)
    return list(map(float, column.astype(str))) if column.dtype == np.float32 else column.tolist()


def _plain(x: float) -> float | None:
    return x if math.isfinite(x) else None


def _writer_class() -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            '`MetricLog(..., tensorboard=True)` needs tensorboardX: `pip install "jopt[run]"`.'
        ) from error
    return SummaryWriter
