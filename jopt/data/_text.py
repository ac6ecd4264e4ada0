"""Plain text as numbers, one a character."""

import pathlib

import numpy as np

from jopt.data._dataset import Dataset, Folder, find

TEST_FRACTION = 0.1

SHAKESPEARE = "tinyshakespeare.txt"
_ORIGINS = {
    SHAKESPEARE: "https://github.com/karpathy/char-rnn (data/tinyshakespeare/input.txt, renamed)"
}


def text(file: str, data_dir: Folder | None = None) -> Dataset:
    """The characters of a UTF-8 text file as numbers; the last tenth is for testing.

    A character's number is its place among the different characters of the file, in code point
    order. Line ends stay as they are.

    Args:
      file: a path, or a name below `data_dir` or below the folder that `JOPT_DATA` names.
      data_dir: that folder.

    Raises:
      FileNotFoundError: if there is no such file; says where to put one.
      ValueError: if the file has fewer than ten characters or is not UTF-8.
    """
    path = pathlib.Path(file)
    if not path.is_file():
        origin = _ORIGINS.get(file, "wherever you like: it is any plain text in UTF-8")
        path = find((file,), data_dir, origin=origin)
    try:
        characters = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"`{path}` is not text in UTF-8: {error}.") from error
    if len(characters) < 10:
        raise ValueError(f"`{path}` has {len(characters)} characters: too few to learn from.")
    points = np.frombuffer(characters.encode("utf-32-le"), np.uint32)
    known, numbers = np.unique(points, return_inverse=True)
    numbers = numbers.astype(np.int32)
    split = len(numbers) - round(len(numbers) * TEST_FRACTION)
    return Dataset(
        train=numbers[:split],
        test=numbers[split:],
        classes=len(known),
        names=tuple(map(chr, known)),
        info=f"{path.name}, {len(numbers):,} characters, {len(known)} of them different",
    )


def shakespeare(data_dir: Folder | None = None) -> Dataset:
    """Tiny Shakespeare, 1,115,394 characters of plays: `text("tinyshakespeare.txt", data_dir)`.

    References:
      Andrej Karpathy: The Unreasonable Effectiveness of Recurrent Neural Networks, 2015 (where the
      selection comes from).
    """
    return text(SHAKESPEARE, data_dir)


def windows(numbers: np.ndarray, width: int, *, stride: int | None = None) -> np.ndarray:
    """Cuts numbered text into windows `[windows, width]`, one every `stride` characters.

    For a model with `context` places, windows of `context + 1` hold its inputs and, one further,
    its labels.

    Args:
      numbers: `[characters]`.
      width: characters a window.
      stride: from the start of one to that of the next; `width - 1` unless given, so that each
        character but the first is a label once.

    Raises:
      ValueError: if there is no such window.

    Example:
      >>> import numpy as np
      >>> from jopt import data
      >>> data.windows(np.arange(7), 4).tolist()
      [[0, 1, 2, 3], [3, 4, 5, 6]]
    """
    stride = max(width - 1, 1) if stride is None else stride
    if not 1 <= width <= len(numbers) or stride < 1:
        raise ValueError(
            f"`windows(numbers, {width}, stride={stride})` cannot cut {len(numbers)} characters: "
            "`width` is 1 to as many as there are, `stride` at least 1."
        )
    cut = np.lib.stride_tricks.sliding_window_view(numbers, width)[::stride]
    return np.ascontiguousarray(cut)
