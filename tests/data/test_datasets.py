"""Data sets: what is read, and what is said when it is not there or not whole."""

import io
import os
import tarfile

import numpy as np
import pytest

from jopt import data
from jopt.data import _cifar10 as cifar


@pytest.fixture
def small_files(monkeypatch):
    """CIFAR-10 with files of three images."""
    monkeypatch.setattr(cifar, "RECORDS", 3)
    monkeypatch.setattr(cifar.records, "__defaults__", (3,))
    generator = np.random.default_rng(0)
    files = {}
    for name in (*cifar.TRAIN_FILES, cifar.TEST_FILE):
        rows = generator.integers(0, 256, (3, cifar.RECORD_BYTES), dtype=np.uint8)
        rows[:, 0] = generator.integers(0, 10, 3)
        files[name] = rows.tobytes()
    return files


def _lay_out(tmp_path, files):
    folder = tmp_path / cifar.FOLDER
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def _pack(tmp_path, files):
    with tarfile.open(tmp_path / cifar.ARCHIVE, "w:gz") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(f"{cifar.FOLDER}/{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def test_digits_are_split_alike_with_every_class_in_both():
    pytest.importorskip("sklearn")
    dataset = data.digits()
    again = data.digits()
    (train_x, train_y), (test_x, test_y) = dataset.train, dataset.test
    assert train_x.shape == (1437, 8, 8, 1) and test_x.shape == (360, 8, 8, 1)
    assert train_x.dtype == np.float32 and train_x.min() == 0 and train_x.max() == 1
    assert set(np.bincount(test_y)) <= {35, 36, 37} and len(np.bincount(train_y)) == 10
    np.testing.assert_array_equal(test_x, again.test[0])


@pytest.mark.parametrize("count", [1, 7, 30, 59])
def test_hold_out_takes_its_share_of_every_class_from_training(count):
    labels = np.repeat(np.arange(3, dtype=np.int32), [10, 20, 30])
    images = np.arange(60, dtype=np.float32)[:, None]
    dataset = data.Dataset((images, labels), (images[:2], labels[:2]), 3, ("a", "b", "c"), "made")
    held = dataset.hold_out(count)
    assert len(held.test[0]) == count and held.info.startswith("made; ")
    both = np.concatenate([held.train[0], held.test[0]])
    np.testing.assert_array_equal(np.sort(both, axis=0), images)  # nothing twice, nothing lost
    np.testing.assert_array_equal(held.test[1], labels[held.test[0][:, 0].astype(int)])
    shares = np.bincount(held.test[1], minlength=3)
    assert np.all(np.abs(shares - count * np.array([1, 2, 3]) / 6) <= 1)
    np.testing.assert_array_equal(held.test[0], dataset.hold_out(count).test[0])


def test_hold_out_of_text_is_its_end_and_mistakes_are_told():
    dataset = data.Dataset(np.arange(10), np.arange(3), 10, tuple("abcdefghij"), "made")
    held = dataset.hold_out(4)
    np.testing.assert_array_equal(held.train, np.arange(6))
    np.testing.assert_array_equal(held.test, np.arange(6, 10))
    for count in (0, 10):
        with pytest.raises(ValueError, match=rf"`hold_out\({count}\)` expects from 1 to 9 of"):
            dataset.hold_out(count)


def test_cifar10_reads_folder_and_archive_alike(tmp_path, small_files):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    _lay_out(tmp_path / "a", small_files)
    _pack(tmp_path / "b", small_files)
    one, other = data.cifar10(tmp_path / "a"), data.cifar10(tmp_path / "b")
    for x, y in zip((*one.train, *one.test), (*other.train, *other.test), strict=True):
        np.testing.assert_array_equal(x, y)
    images, labels = one.train
    assert images.shape == (15, 32, 32, 3) and labels.shape == (15,)
    # The layout, by hand: label, then the red, green and blue planes, row by row.
    raw = np.frombuffer(small_files["data_batch_2.bin"], np.uint8).reshape(3, -1)
    assert labels[3] == raw[0, 0]
    assert images[3, 5, 7, 2] == raw[0, 1 + 2 * 1024 + 5 * 32 + 7]
    assert one.take(4).train[0].shape[0] == 4


def test_cifar10_missing_says_where_to_get_it(tmp_path, monkeypatch):
    monkeypatch.delenv("JOPT_DATA", raising=False)
    with pytest.raises(
        FileNotFoundError, match=r"No data folder.*kriz/cifar.*--data-dir.*JOPT_DATA"
    ):
        data.cifar10()
    with pytest.raises(FileNotFoundError, match=r"cifar-10-batches-bin` does not exist"):
        data.cifar10(tmp_path)


def test_cifar10_found_through_the_environment(tmp_path, monkeypatch, small_files):
    _lay_out(tmp_path, small_files)
    monkeypatch.setenv("JOPT_DATA", str(tmp_path))
    assert data.cifar10().test[1].shape == (3,)


def test_cifar10_broken_files(tmp_path, small_files):
    folder = _lay_out(tmp_path, small_files)
    (folder / "data_batch_4.bin").write_bytes(small_files["data_batch_4.bin"][:-5])
    with pytest.raises(
        ValueError, match=r"data_batch_4\.bin.*9,214 bytes, expected 9,219.*truncated"
    ):
        data.cifar10(tmp_path)
    (folder / "data_batch_4.bin").write_bytes(b"\xff" * (3 * cifar.RECORD_BYTES))
    with pytest.raises(ValueError, match="label 255, expected 0 to 9"):
        data.cifar10(tmp_path)
    (folder / "data_batch_4.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"data_batch_4\.bin"):
        data.cifar10(tmp_path)


def test_cifar10_broken_archive(tmp_path, small_files):
    _pack(tmp_path, {name: small_files[name] for name in list(small_files)[:-1]})
    with pytest.raises(ValueError, match=r"lacks test_batch\.bin"):
        data.cifar10(tmp_path)
    whole = (tmp_path / cifar.ARCHIVE).read_bytes()
    (tmp_path / cifar.ARCHIVE).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="truncated or damaged"):
        data.cifar10(tmp_path)


@pytest.mark.skipif(not os.environ.get("JOPT_DATA"), reason="JOPT_DATA names no data folder")
def test_cifar10_real():
    dataset = data.cifar10()
    images, labels = dataset.train
    assert images.shape == (50_000, 32, 32, 3) and dataset.test[0].shape == (10_000, 32, 32, 3)
    np.testing.assert_array_equal(np.bincount(labels), 5_000)
    mean = images.reshape(-1, 3).astype(np.float64).mean(0) / 255
    np.testing.assert_allclose(mean, data.CIFAR10_MEAN, atol=2e-3)


def test_text_numbers_characters_in_order(tmp_path):
    (tmp_path / "a.txt").write_text("banana ä\nbanana x\nbanana\n", encoding="utf-8")
    dataset = data.text("a.txt", tmp_path)
    whole = np.concatenate([dataset.train, dataset.test])
    assert "".join(dataset.names[i] for i in whole) == "banana ä\nbanana x\nbanana\n"
    assert list(dataset.names) == sorted(dataset.names) and dataset.classes == len(dataset.names)
    assert len(dataset.test) == 2  # a tenth of 25, rounded


def test_text_mistakes(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.txt.*--data-dir"):
        data.text("nothing.txt", tmp_path)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 au lait, caf\xe9")
    with pytest.raises(ValueError, match=r"latin\.txt` is not text in UTF-8"):
        data.text("latin.txt", tmp_path)
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(ValueError, match="0 characters"):
        data.text("empty.txt", tmp_path)
