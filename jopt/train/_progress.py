"""The display of a running `fit`: a bar on a terminal, a line now and then elsewhere."""

import datetime
import sys
import time
from collections.abc import Mapping
from typing import IO, Any, Literal

_SHOWN = 4  # metrics, of those a loss returns


class Progress:
    """Shows loss, metrics, examples per second and the time left. It has no effect on the result.

    Args:
      title: what is being trained.
      mode: `"bar"` (needs rich), `"lines"`, or `"auto"`: a bar on a terminal with rich, lines
        elsewhere.
      every_s: seconds from one line to the next.
      stream: where to; standard error unless given.

    Raises:
      ModuleNotFoundError: if a bar is asked for and rich is missing.
    """

    def __init__(
        self,
        title: str = "train",
        *,
        mode: Literal["auto", "bar", "lines"] = "auto",
        every_s: float = 5.0,
        stream: IO[str] | None = None,
    ):
        if mode not in ("auto", "bar", "lines"):
            raise ValueError(f'`Progress(mode={mode!r})` expects "auto", "bar" or "lines".')
        self._title = title
        self._every = every_s
        self._stream = sys.stderr if stream is None else stream
        self._rich = _rich(required=mode == "bar") if self._wants_bar(mode) else None
        self._bar: Any = None
        self._done = self._steps = 0
        self._clock = self._spoken = 0.0
        self._pace = _Pace()

    def start(self, done: int, steps: int) -> None:
        """Begins at `done` of `steps` steps."""
        self._done, self._steps, self._pace = done, steps, _Pace()
        self._clock = self._spoken = time.monotonic()
        if self._rich is not None:
            self._bar = _bar(self._rich, self._stream)
            self._bar.start()
            self._bar.add_task(self._title, total=steps, completed=done, numbers="", left="")

    def update(self, done: int, metrics: Mapping[str, float], examples_per_second: float) -> None:
        """Moves on to `done` steps, with the means of the metrics since the last call."""
        now = time.monotonic()
        took = now - self._clock
        left = self._pace.left(done - self._done, took, self._steps - done)
        self._done, self._clock = done, now
        rate = f"{examples_per_second:,.0f} examples/s" if left else f"{took:.1f} s with compiling"
        numbers = f"{_numbers(metrics)}  {rate}"
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=done, numbers=numbers, left=left)
        elif now - self._spoken >= self._every or done == self._steps:
            self._spoken = now
            line = f"{self._title}  {done}/{self._steps}  {numbers}  {left}".rstrip()
            print(line, file=self._stream, flush=True)

    def stop(self) -> None:
        """Leaves the display as it is."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _wants_bar(self, mode: str) -> bool:
        return mode == "bar" or (mode == "auto" and self._stream.isatty())


class _Pace:
    """Seconds a step, the last chunks counting most and the first, which compiles, not at all."""

    def __init__(self) -> None:
        self._begun = False
        self._seconds: float | None = None

    def left(self, steps: int, seconds: float, ahead: int) -> str:
        """What to say of `ahead` more steps, after `steps` took so many seconds; "" at first."""
        if not self._begun:
            self._begun = True
            return ""
        pace = seconds / max(steps, 1)
        self._seconds = pace if self._seconds is None else 0.5 * self._seconds + 0.5 * pace
        return f"{datetime.timedelta(seconds=round(self._seconds * ahead))} left"


def _numbers(metrics: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in list(metrics.items())[:_SHOWN])


def _rich(*, required: bool) -> Any:
    try:
        import rich.console
        import rich.progress
    except ModuleNotFoundError as error:
        if not required:
            return None
        raise ModuleNotFoundError(
            '`Progress(mode="bar")` needs rich: `pip install "jopt[run]"`, or take `mode="lines"`.'
        ) from error
    return rich


def _bar(rich: Any, stream: IO[str]) -> Any:
    columns = rich.progress
    return columns.Progress(
        columns.TextColumn("{task.description}"),
        columns.BarColumn(),
        columns.MofNCompleteColumn(),
        columns.TextColumn("{task.fields[numbers]}"),
        columns.TextColumn("{task.fields[left]}"),
        console=rich.console.Console(file=stream),
    )
