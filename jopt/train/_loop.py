"""The loop: chunks of compiled steps; between them checks, metrics, evaluations, checkpoints."""

import contextlib
import dataclasses
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from jopt import schedules
from jopt.train._checkpoint import Checkpoints
from jopt.train._chunk import Rows, Stream, chunks, next_length
from jopt.train._diverged import bad_loss, check_state, first_bad, nonfinite
from jopt.train._feed import Feed
from jopt.train._metrics import MetricLog
from jopt.train._programs import CAPACITY
from jopt.train._progress import Progress
from jopt.train._record import History, Record
from jopt.train._state import State
from jopt.train._step import Step

PyTree = Any


def fit(
    step: Step,
    state: State,
    feed: Feed | Stream,
    *,
    steps: int,
    checkpoints: Checkpoints | None = None,
    log: MetricLog | None = None,
    progress: Progress | None = None,
    evaluate: Callable[[State], Mapping[str, Any]] | None = None,
    every: int | None = None,
) -> tuple[State, History]:
    """Trains until `steps` steps are done, from the newest checkpoint or else from `state`.

    Steps over a `Feed` run in one compiled loop, of whatever length suits the clock, or one by
    one where the platform loops them slowly (convolutions on XLA:CPU); steps over a stream run
    one by one, the next batch being fetched meanwhile. One compilation serves all. Where the work
    is cut (by the clock, by checkpoints, by a kill) has no effect on the result: a run that was
    killed and is started again ends with the bits of a run that was not.

    Args:
      step: from `make_step`.
      state: from `init`. It is copied, not consumed; a checkpoint is restored in its likeness.
      feed: a `Feed`, or anything that gives batch `i` as `feed[i]`.
      steps: where to stop, counted from the first step of all.
      checkpoints: where to look for a later state than the one given, and to write new ones: from
        time to time, at the end, and upon an interrupt (Ctrl-C or SIGTERM, which wait for the
        running chunk).
      log: receives the metrics of each step: the same lines whether the run was cut or not.
      progress: shows them.
      evaluate: `evaluate(state) -> numbers`, called after every `every` steps, for the log and the
        history. The next step consumes that state: copy what is to be kept.
      every: steps from one evaluation to the next.

    Returns:
      The final state, and the `History` of the steps that this call took.

    Raises:
      TrainingDiverged: if a loss, or a parameter at a checkpoint or at the end, is not finite. No
        checkpoint holds a bad state.
      CheckpointError: if a checkpoint cannot be written, or none can be read.
      ValueError: if only one of `evaluate` and `every` is given, or the checkpoint is of another
        state or feed.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from jopt import train
      >>> feed = train.Feed({"x": jnp.arange(8.0)}, 4, seed=0)
      >>> tx = optax.sgd(0.1)
      >>> step = train.make_step(lambda params, batch: jnp.mean((params - batch["x"]) ** 2), tx)
      >>> state, history = train.fit(step, train.init(jnp.array(0.0), tx), feed, steps=20)
      >>> int(state.step), history.metrics["loss"].shape
      (20, (20,))
    """
    if (evaluate is None) != (every is None):
        raise ValueError(
            f"`fit(..., every={every})` says how often to `evaluate`: give both or neither."
        )
    if every is not None and not schedules.whole_steps(every):
        raise ValueError(f"`fit(..., every={every})` expects a number of steps, at least 1.")
    if checkpoints is not None and (checkpoints.latest() or 0) > int(state.step):
        restored = checkpoints.restore(state, feed=feed)
        state = state if restored is None else restored.state
    with _deferred_signals() as interrupted:
        try:
            run = _Run(step, feed, steps, checkpoints, evaluate, every, interrupted)
            return run(state, Record(int(state.step), steps, log, progress))
        finally:
            if progress is not None:
                progress.stop()


@dataclasses.dataclass(frozen=True)
class _Run:
    """One call of `fit`, whose state is in place."""

    step: Step
    feed: Feed | Stream
    steps: int
    checkpoints: Checkpoints | None
    evaluate: Callable[[State], Mapping[str, Any]] | None
    every: int | None
    interrupted: Callable[[], bool]

    def __call__(self, state: State, record: Record) -> tuple[State, History]:
        done, length, saved = int(state.step), 0, time.monotonic()
        state = self.step.layout.settle(state)
        unset = int(nonfinite(state))  # a range that has seen nothing yet may be infinite
        chunk = chunks(self.step, self.feed, state, self.steps) if done < self.steps else None
        while chunk is not None and done < self.steps and not self.interrupted():
            count = min(max(length, 1), self._room(done))
            began = time.perf_counter()
            state, rows, examples = chunk(state, done, count)
            seconds = time.perf_counter() - began
            self._take(rows, done, record)
            record.show(examples, seconds)
            # The first chunk compiles, so it says nothing of speed.
            length = next_length(count, seconds) if length else 1
            done += count
            if self.evaluate is not None and self.every and done % self.every == 0:
                record.evaluation(self.evaluate(self.step.layout.leave(state)))
            if self._due(done, time.monotonic() - saved):
                check_state(state, done, unset, self.checkpoints)
                self._save(state, done)
                saved = time.monotonic()
        return self.step.layout.leave(state), record.history()

    def _room(self, done: int) -> int:
        """Steps until something has to be done at a step of its own."""
        every = self.checkpoints.every_steps if self.checkpoints is not None else None
        beats = [beat - done % beat for beat in (self.every, every) if beat is not None]
        return min(CAPACITY, self.steps - done, *beats)

    def _due(self, done: int, elapsed: float) -> bool:
        """Whether to check the state, and to save it."""
        if done == self.steps or self.interrupted():
            return True
        return self.checkpoints is not None and self.checkpoints.due(done, elapsed)

    def _take(self, rows: Rows, done: int, record: Record) -> None:
        """Records the metrics up to the first bad loss."""
        bad = first_bad(rows)
        record.add(rows if bad is None else {name: column[:bad] for name, column in rows.items()})
        if bad is not None:
            raise bad_loss(rows, bad, done, self.checkpoints)

    def _save(self, state: State, done: int) -> None:
        if self.checkpoints is not None:
            place = self.feed.state(done) if isinstance(self.feed, Feed) else {"step": done}
            self.checkpoints.save(self.step.layout.leave(state), place)


@contextlib.contextmanager
def _deferred_signals() -> Iterator[Callable[[], bool]]:
    """Yields a function that tells whether Ctrl-C or SIGTERM came; lets it act at the end.

    A step consumes its state, so an interrupt in its midst would leave nothing to save. A second
    one acts at once. Handlers that the caller has set are left alone.
    """
    before = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    if threading.current_thread() is not threading.main_thread():
        before = {}
    before = {number: old for number, old in before.items() if signal.getsignal(number) == old}
    seen: list[int] = []

    def note(number: int, frame: Any) -> None:
        if seen:
            signal.signal(number, before[signal.Signals(number)])
            signal.raise_signal(number)
        seen.append(number)

    for number in before:
        signal.signal(number, note)
    try:
        yield lambda: bool(seen)
    finally:
        for number, old in before.items():
            signal.signal(number, old)
        if signal.SIGTERM in seen:
            signal.raise_signal(signal.SIGTERM)
    if seen:
        raise KeyboardInterrupt
