"""CIFAR-10's archive: read where it lies, and named when it is damaged."""

import io
import os
import tarfile

import numpy as np
import pytest

from jopt import data
from jopt.data import _cifar10


def fake_records(count, seed):
    """Images whose pixels say which image, plane, row and column they are."""
    rng = np.random.default_rng(seed)
    rows = rng.integers(0, 256, (count, 3073), dtype=np.uint8)
    rows[:, 0] = rng.integers(0, 10, count)
    return rows


@pytest.fixture
def small(monkeypatch):
    """CIFAR-10 with ten images a file instead of ten thousand."""
    monkeypatch.setattr(_cifar10, "RECORDS", 10)
    monkeypatch.setattr(_cifar10.records, "__defaults__", (10,))
    monkeypatch.delenv("JOPT_DATA", raising=False)
    return {
        name: fake_records(10, seed)
        for seed, name in enumerate((*_cifar10.TRAIN_FILES, _cifar10.TEST_FILE))
    }


def pack(path, files, prefix="cifar-10-batches-bin/"):
    with tarfile.open(path, "w:gz") as archive:
        for name, rows in files.items():
            info = tarfile.TarInfo(prefix + name)
            info.size = rows.nbytes
            archive.addfile(info, io.BytesIO(rows.tobytes()))
    return path.parent


def test_cifar10_archive_members_are_only_read(small, tmp_path):
    """A member named to escape the folder, and a link, do nothing but count or be missing."""
    root = pack(tmp_path / "cifar-10-binary.tar.gz", small, prefix="../../outside/")
    images, labels = data.cifar10(root).train
    assert images.shape == (50, 32, 32, 3)
    rows = np.concatenate([small[name] for name in _cifar10.TRAIN_FILES])
    np.testing.assert_array_equal(labels, rows[:, 0])
    assert os.listdir(root) == ["cifar-10-binary.tar.gz"]
    assert not (tmp_path.parent.parent / "outside").exists()
    with tarfile.open(root / "cifar-10-binary.tar.gz", "w:gz") as archive:
        link = tarfile.TarInfo("data_batch_1.bin")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        archive.addfile(link)
    with pytest.raises(ValueError, match=r"lacks data_batch_1.bin, data_batch_2.bin"):
        data.cifar10(root)


def test_damaged_cifar10_archive_is_named(small, tmp_path):
    path = pack(tmp_path / "cifar-10-binary.tar.gz", small) / "cifar-10-binary.tar.gz"
    whole = path.read_bytes()
    middle = len(whole) // 2
    for damaged in (whole[:middle], whole[:middle] + bytes(64) + whole[middle + 64 :], b"", b"no"):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"cifar-10-binary.tar.gz` (cannot be read|lacks)"):
            data.cifar10(tmp_path)
    small["data_batch_2.bin"] = small["data_batch_2.bin"][:9]
    pack(path, small)
    with pytest.raises(ValueError, match=r"data_batch_2.bin` has 27,657 bytes, expected 30,730"):
        data.cifar10(tmp_path)


def test_missing_cifar10_says_where_to_get_it_and_where_to_put_it(monkeypatch, tmp_path):
    monkeypatch.delenv("JOPT_DATA", raising=False)
    for data_dir, looked in ((None, "No data folder was named"), (tmp_path, str(tmp_path))):
        with pytest.raises(FileNotFoundError) as error:
            data.cifar10(data_dir)
        for part in (looked, "cs.toronto.edu", "cifar-10-batches-bin", "--data-dir", "`JOPT_DATA`"):
            assert part in str(error.value)


def test_the_official_size_is_what_is_expected():
    assert _cifar10.RECORDS * _cifar10.RECORD_BYTES == 30_730_000
    with pytest.raises(ValueError, match=r"`x` has 3,073 bytes, expected 30,730,000 \(10,000"):
        _cifar10.records(bytes(3073), "x")
