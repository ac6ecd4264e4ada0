"""What every data set is once it is loaded, and where its files are looked for."""

import os
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import jax
import numpy as np

Folder = str | os.PathLike[str]


class Dataset(NamedTuple):
    """A data set as NumPy arrays.

    Images: `train` and `test` are pairs of images `[examples, height, width, channels]` and labels
    `[examples]`, int32. Text: they are arrays of character numbers `[characters]`, int32.
    """

    train: Any
    test: Any
    classes: int  # labels, or different characters
    names: tuple[str, ...]  # of the classes; of text, the characters
    info: str  # where it comes from and how much there is

    def take(self, count: int) -> Self:
        """The same with only the first `count` training examples."""
        return self._replace(train=jax.tree.map(lambda array: array[:count], self.train))

    def hold_out(self, count: int) -> Self:
        """The same with `count` training examples in the place of the test examples.

        For choosing (a model, a rate) without looking at the test examples. Which ones is always
        the same: of images, each class gives its share; of text, it is the last characters.

        Raises:
          ValueError: if `count` is not between 1 and one less than the training examples.
        """
        labels = self.train[1] if isinstance(self.train, tuple) else None
        examples = len(self.train if labels is None else labels)
        if not 1 <= count < examples:
            raise ValueError(
                f"`hold_out({count})` expects from 1 to {examples - 1} of the {examples} training "
                "examples."
            )
        if labels is None:
            train, held = self.train[:-count], self.train[-count:]
        else:
            chosen = np.zeros(examples, bool)
            chosen[_evenly(labels)[:count]] = True
            train = tuple(array[~chosen] for array in self.train)
            held = tuple(array[chosen] for array in self.train)
        return self._replace(
            train=train,
            test=held,
            info=f"{self.info}; {count:,} held out of training and tested on instead",
        )


def _evenly(labels: np.ndarray) -> np.ndarray:
    """An order of all examples in which every beginning has about its share of each class."""
    shuffled = np.random.default_rng(0).permutation(len(labels))
    order = shuffled[np.argsort(labels[shuffled], kind="stable")]  # class after class
    sizes = np.unique(labels, return_counts=True)[1]
    # The j-th of n examples of a class stands at (j + ½) / n of the way through the order.
    place = np.concatenate([(np.arange(size) + 0.5) / size for size in sizes])
    return order[np.argsort(place, kind="stable")]


def find(names: Sequence[str], data_dir: Folder | None, *, origin: str) -> pathlib.Path:
    """The first of `names` that exists below `data_dir` or, if that is None, below `JOPT_DATA`.

    Args:
      names: files or folders, the usual one first.
      data_dir: the folder of data sets.
      origin: where a user gets the first of `names`.

    Raises:
      FileNotFoundError: if none is there; says where it was looked for, and where to get it.
    """
    root = data_dir if data_dir is not None else os.environ.get("JOPT_DATA")
    looked = "No data folder was named"
    if root is not None:
        places = [pathlib.Path(root) / name for name in names]
        for place in places:
            if place.exists():
                return place
        looked = ", nor does ".join(
            [f"`{places[0]}` does not exist", *map("`{}`".format, places[1:])]
        )
    raise FileNotFoundError(
        f"{looked}. Get `{names[0]}` from {origin}, put it into a folder of your choice, and name "
        "that folder by `--data-dir FOLDER`, by the environment variable `JOPT_DATA`, or as "
        "`data_dir=`."
    )
