"""A folder appears whole or not at all, however its writing ends."""

import errno
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from jopt.artifact import _folder

NAMES = ("a", "b")


def put(path: Path, text: str, *, overwrite: bool = True) -> None:
    with _folder.replacing(path, overwrite=overwrite, names=NAMES) as folder:
        for name in NAMES:
            _folder.write(folder / name, text.encode())


def held(path: Path) -> dict[str, str]:
    return {entry.name: entry.read_text() for entry in path.iterdir()}


def alone(path: Path) -> bool:
    """Nothing but `path` is left beside it."""
    return os.listdir(path.parent) == [path.name]


def test_a_folder_is_made_with_its_parents(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "model"
    put(path, "new", overwrite=False)
    assert held(path) == {"a": "new", "b": "new"} and alone(path)


def test_an_empty_folder_is_filled_and_a_full_one_is_not(tmp_path: Path) -> None:
    path = tmp_path / "model"
    path.mkdir()
    put(path, "old", overwrite=False)
    with pytest.raises(FileExistsError, match=r"not empty.*`overwrite=True`.*model"):
        put(path, "new", overwrite=False)
    assert held(path) == {"a": "old", "b": "old"} and alone(path)
    put(path, "new")
    assert held(path) == {"a": "new", "b": "new"} and alone(path)


def test_what_is_no_artifact_is_never_replaced(tmp_path: Path) -> None:
    file, home = tmp_path / "file", tmp_path / "home"
    file.write_text("mine")
    home.mkdir()
    (home / "thesis.tex").write_text("mine")
    with pytest.raises(FileExistsError, match="is a file"):
        put(file, "new")
    with pytest.raises(FileExistsError, match=r"holds `thesis.tex`"):
        put(home, "new")
    assert file.read_text() == "mine" and held(home) == {"thesis.tex": "mine"}


@pytest.mark.parametrize("old", [True, False])
def test_a_failed_write_leaves_what_was_there(tmp_path: Path, old: bool) -> None:
    path = tmp_path / "model"
    if old:
        put(path, "old")
    reason = r"No space left on device.*" + ("untouched" if old else "Nothing was left")
    with (
        pytest.raises(OSError, match=reason) as caught,
        _folder.replacing(path, overwrite=True, names=NAMES) as folder,
    ):
        _folder.write(folder / "a", b"new")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert caught.value.errno == errno.ENOSPC
    assert (held(path) == {"a": "old", "b": "old"} and alone(path)) if old else not path.exists()
    assert not (tmp_path / ".model.partial").exists()


def test_an_interrupt_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "model"
    put(path, "old")
    with (
        pytest.raises(KeyboardInterrupt),
        _folder.replacing(path, overwrite=True, names=NAMES),
    ):
        raise KeyboardInterrupt
    assert held(path) == {"a": "old", "b": "old"} and alone(path)


def test_a_failed_rename_puts_the_old_one_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model"
    put(path, "old")
    replace = os.replace

    def fail_once(source: Path, target: Path) -> None:
        if Path(source).name.endswith(".partial"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail_once)
    with pytest.raises(PermissionError, match="untouched"):
        put(path, "new")
    assert held(path) == {"a": "old", "b": "old"} and alone(path)


def test_a_full_disk_is_told_and_nothing_is_lost(tmp_path: Path) -> None:
    """The system itself refuses to write on: a file size limit stands in for a full disk."""
    path = tmp_path / "model"
    put(path, "old")
    run = child(
        f"""
        import resource, signal
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
        put({str(path)!r}, "x" * (1 << 17))
        """
    )
    assert run.returncode == 1
    assert "could not write the artifact" in run.stderr and "is untouched" in run.stderr
    assert held(path) == {"a": "old", "b": "old"} and alone(path)


@pytest.mark.parametrize("moment", ["first file", "second file", "aside", "in place", "done"])
def test_a_killed_write_leaves_a_whole_folder(tmp_path: Path, moment: str) -> None:
    path = tmp_path / "model"
    put(path, "old")
    run = child(
        f"""
        moment = {moment!r}
        def die():
            os.kill(os.getpid(), signal.SIGKILL)
        write, replace, remove = _folder.write, os.replace, _folder._remove
        def killed_write(file, data):
            if moment == "first file" or (moment == "second file" and file.name == "b"):
                file.write_bytes(data[:1])
                die()
            write(file, data)
        def killed_replace(source, target):
            replace(source, target)
            if moment == "aside" and str(target).endswith(".replaced"):
                die()
            if moment == "in place" and str(source).endswith(".partial"):
                die()
        _folder.write, os.replace = killed_write, killed_replace
        put({str(path)!r}, "new")
        """
    )
    assert run.returncode == (0 if moment == "done" else -signal.SIGKILL)
    expected = "new" if moment in ("in place", "done") else "old"
    assert held(_folder.current(path)) == dict.fromkeys(NAMES, expected)
    # The next write clears whatever the dead one left.
    put(path, "newer")
    assert held(path) == dict.fromkeys(NAMES, "newer") and alone(path)


def child(code: str) -> subprocess.CompletedProcess[str]:
    """Runs code in another process, with `put` and `_folder` at hand."""
    head = """
        import os, signal
        from pathlib import Path
        from jopt.artifact import _folder
        def put(path, text):
            names = ("a", "b")
            with _folder.replacing(Path(path), overwrite=True, names=names) as folder:
                for name in names:
                    _folder.write(folder / name, text.encode())
    """
    source = textwrap.dedent(head) + textwrap.dedent(code)
    return subprocess.run([sys.executable, "-c", source], capture_output=True, text=True)
