"""Batches of arrays that do not fit on the device, put together on the host by grain."""

from typing import Any

import numpy as np


class Stream:
    """Shuffled batches by number: `stream[step]` is the batch of that step, whatever came before.

    Its state is therefore the step, and a run that resumes at a step sees what an uncut run saw.
    Each epoch has an order of its own, in which every example appears once; what does not fill a
    batch is left out.

    Args:
      arrays: a mapping of arrays that share their leading axis, one row an example; `numpy.memmap`
        is fine, and only the rows of the batch are read.
      batch_size: examples a batch.
      seed: of the order.

    Raises:
      ModuleNotFoundError: if grain is missing.
      ValueError: if the arrays differ in length, or a batch is larger than they are.

    Example:
      >>> import numpy as np
      >>> from jopt import data
      >>> stream = data.Stream({"x": np.arange(6)}, 2, seed=0)
      >>> sorted(int(i) for step in range(3) for i in stream[step]["x"])
      [0, 1, 2, 3, 4, 5]
    """

    def __init__(self, arrays: dict[str, Any], batch_size: int, *, seed: int):
        try:
            import grain
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                '`data.Stream(...)` needs grain: `pip install "jopt[run]"`.'
            ) from error
        lengths = {name: len(array) for name, array in arrays.items()}
        if len(set(lengths.values())) != 1:
            raise ValueError(f"`Stream(arrays, ...)` expects arrays of one length; got {lengths}.")
        examples = next(iter(lengths.values()))
        if not 1 <= batch_size <= examples:
            raise ValueError(
                f"`Stream(..., batch_size={batch_size})` expects 1 to {examples} examples, as "
                "many as the arrays hold."
            )
        self.batch_size = batch_size
        self.steps_per_epoch = examples // batch_size
        self._examples = examples
        self._arrays = arrays
        self._order = grain.MapDataset.range(examples).shuffle(seed=seed).repeat()

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        epoch, place = divmod(int(step), self.steps_per_epoch)
        first = epoch * self._examples + place * self.batch_size
        rows = np.array([self._order[first + i] for i in range(self.batch_size)])
        return {name: np.asarray(array[rows]) for name, array in self._arrays.items()}
