"""Text as numbers: every character, line ends too; windows; and Tiny Shakespeare."""

import os
import pathlib

import numpy as np
import pytest

from jopt import data


def test_text_numbers_characters_in_order_and_keeps_the_last_tenth(tmp_path):
    (tmp_path / "poem.txt").write_bytes("Ängstlich\r\n".encode() + "bca😀".encode() * 10)
    dataset = data.text("poem.txt", tmp_path)
    whole = "Ängstlich\r\n" + "bca😀" * 10
    assert dataset.names == tuple(sorted(set(whole))) and dataset.classes == len(set(whole))
    numbers = np.concatenate([dataset.train, dataset.test])
    assert numbers.dtype == np.int32
    assert "".join(dataset.names[number] for number in numbers) == whole
    assert len(dataset.test) == round(len(whole) / 10)
    by_path = data.text(str(tmp_path / "poem.txt"))
    np.testing.assert_array_equal(by_path.train, dataset.train)


def test_text_says_what_is_wrong(tmp_path, monkeypatch):
    monkeypatch.delenv("JOPT_DATA", raising=False)
    with pytest.raises(FileNotFoundError, match="JOPT_DATA"):
        data.text("poem.txt")
    with pytest.raises(FileNotFoundError, match="karpathy/char-rnn"):
        data.shakespeare(tmp_path)
    (tmp_path / "short.txt").write_text("abc")
    with pytest.raises(ValueError, match=r"short.txt` has 3 characters: too few"):
        data.text("short.txt", tmp_path)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 au lait")
    with pytest.raises(ValueError, match=r"latin.txt` is not text in UTF-8: .*position 3"):
        data.text("latin.txt", tmp_path)


def test_real_shakespeare():
    root = os.environ.get("JOPT_DATA")
    if root is None or not (pathlib.Path(root) / "tinyshakespeare.txt").is_file():
        pytest.skip("`JOPT_DATA` names no folder with tinyshakespeare.txt")
    dataset = data.shakespeare()
    assert len(dataset.train) + len(dataset.test) == 1_115_394
    assert dataset.classes == 65 and dataset.names[0] == "\n"


def test_windows_hold_inputs_and_labels():
    windows = data.windows(np.arange(20), 5)
    assert windows.tolist() == [
        [0, 1, 2, 3, 4],
        [4, 5, 6, 7, 8],
        [8, 9, 10, 11, 12],
        [12, 13, 14, 15, 16],
    ]
    np.testing.assert_array_equal(windows[:, 1:].ravel(), np.arange(1, 17))
    assert data.windows(np.arange(4), 4, stride=9).tolist() == [[0, 1, 2, 3]]
    with pytest.raises(ValueError, match=r"cannot cut 4 characters"):
        data.windows(np.arange(4), 5)
