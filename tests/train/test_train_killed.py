"""A run that is killed with SIGKILL, several times, ends with the bits of one that is not."""

import os
import pathlib
import random
import subprocess
import sys

import pytest

pytest.importorskip("orbax.checkpoint")

SCRIPT = pathlib.Path(__file__).with_name("killed_run.py")
STEPS = 400


def start(directory):
    root = SCRIPT.parents[2]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(root), str(SCRIPT.parent)]),
        "XLA_FLAGS": "",
    }
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), str(directory), str(STEPS)],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )


def end(process):
    """The digest that a finished run prints."""
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    return output.splitlines()[-1]


def test_a_killed_run_ends_with_the_same_bits(tmp_path):
    rng = random.Random(int.from_bytes(os.urandom(4)))
    whole = start(tmp_path / "whole")
    kills = 0
    for _ in range(4):
        process = start(tmp_path / "killed")
        assert process.stdout is not None
        begun = process.stdout.readline()  # of a run that has begun to take steps
        try:
            process.wait(timeout=rng.uniform(0.0, 0.4))
        except subprocess.TimeoutExpired:
            process.kill()
            kills += 1
        process.communicate()
        assert begun.startswith(("ready", "end"))
    assert kills >= 2
    uncut = end(whole)
    assert uncut.startswith("end ")
    assert end(start(tmp_path / "killed")) == uncut
    lines = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "killed")]
    assert lines[0] == lines[1] and lines[0].count("\n") == STEPS
    assert not [name for name in os.listdir(tmp_path / "killed") if name.startswith(".")]
