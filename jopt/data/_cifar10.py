"""CIFAR-10 from its official binary layout: a label byte, 3,072 bytes of pixels, 10,000 times."""

import pathlib
import tarfile
import zlib

import numpy as np

from jopt.data._dataset import Dataset, Folder, find

FOLDER = "cifar-10-batches-bin"
ARCHIVE = "cifar-10-binary.tar.gz"
TRAIN_FILES = tuple(f"data_batch_{number}.bin" for number in range(1, 6))
TEST_FILE = "test_batch.bin"
RECORDS = 10_000
RECORD_BYTES = 1 + 3 * 32 * 32
CLASSES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip
ORIGIN = f"https://www.cs.toronto.edu/~kriz/{ARCHIVE} (which may stay packed)"

# Per channel, over the training images, of pixels scaled to [0, 1].
CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR10_STD = (0.2470, 0.2435, 0.2616)


def cifar10(data_dir: Folder | None = None) -> Dataset:
    """CIFAR-10: 50,000 training and 10,000 test images, uint8 `[examples, 32, 32, 3]`.

    Reads `cifar-10-batches-bin/` or, if that is missing, `cifar-10-binary.tar.gz`, from `data_dir`
    or from the folder that `JOPT_DATA` names. The archive is read without unpacking it.

    Args:
      data_dir: the folder that holds either.

    Raises:
      FileNotFoundError: if the data, or one of their files, are not there; says where to get them.
      ValueError: if a file is damaged: not of the right size, or with labels that no class has.

    References:
      Alex Krizhevsky: Learning Multiple Layers of Features from Tiny Images, 2009.
    """
    path = find((FOLDER, ARCHIVE), data_dir, origin=ORIGIN)
    files = _from_folder(path) if path.is_dir() else _from_archive(path)
    parts = [records(files[name], path / name) for name in TRAIN_FILES]
    images, labels = zip(*parts, strict=True)
    return Dataset(
        train=(np.concatenate(images), np.concatenate(labels)),
        test=records(files[TEST_FILE], path / TEST_FILE),
        classes=len(CLASSES),
        names=CLASSES,
        info="CIFAR-10, 50,000 images for training, 10,000 for testing",
    )


def records(
    data: bytes, name: str | pathlib.Path, count: int = RECORDS
) -> tuple[np.ndarray, np.ndarray]:
    """Reads one binary file: images uint8 `[count, 32, 32, 3]`, labels int32 `[count]`.

    Args:
      data: its bytes: a label, then the red, the green and the blue plane, `count` times.
      name: what an error calls it.
      count: images in it.

    Raises:
      ValueError: if `data` is not `count` records long, or a label is not below ten.
    """
    expected = count * RECORD_BYTES
    if len(data) != expected:
        raise ValueError(
            f"`{name}` has {len(data):,} bytes, expected {expected:,} ({count:,} images): it is "
            f"truncated or another file. Get it again from {ORIGIN}."
        )
    rows = np.frombuffer(data, np.uint8).reshape(count, RECORD_BYTES)
    labels = rows[:, 0].astype(np.int32)
    if labels.max(initial=0) >= len(CLASSES):
        raise ValueError(
            f"`{name}` holds the label {labels.max()}, expected 0 to {len(CLASSES) - 1}: it is "
            f"damaged, or not CIFAR-10. Get it again from {ORIGIN}."
        )
    images = rows[:, 1:].reshape(count, 3, 32, 32).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(images), labels


def _from_folder(path: pathlib.Path) -> dict[str, bytes]:
    names = (*TRAIN_FILES, TEST_FILE)
    if missing := [name for name in names if not (path / name).is_file()]:
        raise FileNotFoundError(
            f"`{path}` lacks {', '.join(missing)}. Get the whole again from {ORIGIN}."
        )
    return {name: (path / name).read_bytes() for name in names}


def _from_archive(path: pathlib.Path) -> dict[str, bytes]:
    """The six files, by name from anywhere in the archive; nothing is written to disk."""
    wanted = {*TRAIN_FILES, TEST_FILE}
    files: dict[str, bytes] = {}
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                name = pathlib.PurePosixPath(member.name).name
                if name not in wanted or not member.isfile():
                    continue
                reader = archive.extractfile(member)
                assert reader is not None  # it is a regular file
                # Of one that is too long, no more than shows that it is.
                files[name] = reader.read(RECORDS * RECORD_BYTES + 1)
    except (tarfile.TarError, zlib.error, EOFError, OSError) as error:
        raise ValueError(
            f"`{path}` cannot be read ({error}): it is truncated or damaged. Get it again from "
            f"{ORIGIN}."
        ) from error
    if missing := sorted(wanted - files.keys()):
        raise ValueError(f"`{path}` lacks {', '.join(missing)}. Get it again from {ORIGIN}.")
    return files
