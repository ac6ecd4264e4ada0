"""What `fit` measures: kept for the history, written to the log, shown as progress."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from jopt.train._chunk import Rows
from jopt.train._metrics import MetricLog
from jopt.train._progress import Progress


class History(NamedTuple):
    """What one call of `fit` measured; of the steps before its checkpoint only the log knows."""

    steps: np.ndarray  # counted from 1
    metrics: Rows  # `loss` and the loss's own, one number a step
    evaluations: tuple[tuple[int, dict[str, float]], ...]  # (step, what `evaluate` returned)


class Record:
    """Collects rows and evaluations from `begin` on, and passes them to the log and the display."""

    def __init__(self, begin: int, steps: int, log: MetricLog | None, progress: Progress | None):
        self._begin = self._end = begin
        self._rows: list[Rows] = []
        self._evaluations: list[tuple[int, dict[str, float]]] = []
        self._log = log
        self._progress = progress
        if log is not None:
            log.truncate(begin)
        if progress is not None:
            progress.start(begin, steps)

    def add(self, rows: Rows) -> None:
        """The metrics of the steps that follow those already recorded."""
        count = len(rows["loss"])
        self._rows.append(rows)
        if self._log is not None:
            self._log.extend(self._end + 1, rows)
        self._end += count

    def show(self, examples: int, seconds: float) -> None:
        """Moves the display on, after so many examples in so many seconds."""
        if self._progress is not None and self._rows:
            means = {name: float(np.mean(column)) for name, column in self._rows[-1].items()}
            self._progress.update(self._end, means, examples / max(seconds, 1e-9))

    def evaluation(self, numbers: Mapping[str, Any]) -> None:
        """What `evaluate` said of the state after the last step recorded."""
        plain = {name: float(number) for name, number in numbers.items()}
        self._evaluations.append((self._end, plain))
        if self._log is not None:
            self._log.write(self._end, plain)

    def history(self) -> History:
        """All of it."""
        names = self._rows[0] if self._rows else {}
        metrics = {name: np.concatenate([rows[name] for rows in self._rows]) for name in names}
        return History(np.arange(self._begin, self._end) + 1, metrics, tuple(self._evaluations))
