"""Metrics as files, and the display."""

import io
import json
import sys

import numpy as np
import optax
import pytest
import toy_training as toy

from jopt import train

SGD = optax.sgd(0.1)


def columns(first, count):
    return {"loss": np.arange(first, first + count, dtype=np.float32) / 10}


def test_a_line_a_step(tmp_path):
    log = train.MetricLog(tmp_path / "new" / "folder")
    assert log.read() == []
    log.extend(1, columns(1, 3))
    log.write(3, {"test/accuracy": 0.5})
    assert log.path.read_text().splitlines() == [
        '{"step": 1, "loss": 0.1}',
        '{"step": 2, "loss": 0.2}',
        '{"step": 3, "loss": 0.3}',
        '{"step": 3, "test/accuracy": 0.5}',
    ]


def test_every_few_steps_by_number_whatever_the_chunks(tmp_path):
    log = train.MetricLog(tmp_path, every=10)
    for first, count in ((1, 9), (10, 1), (11, 25), (36, 0)):
        log.extend(first, columns(first, count))
    assert [line["step"] for line in log.read()] == [10, 20, 30]


def test_truncation_forgets_what_came_after_and_half_a_line(tmp_path):
    log = train.MetricLog(tmp_path)
    log.extend(1, columns(1, 5))
    with log.path.open("a") as file:
        file.write('{"step": 6, "lo')
    assert [line["step"] for line in log.read()] == [1, 2, 3, 4, 5]
    log.truncate(3)
    log.extend(4, columns(4, 1))
    assert [line["step"] for line in log.read()] == [1, 2, 3, 4]
    log.truncate(0)
    assert log.read() == []


def test_what_json_lacks_is_null(tmp_path):
    log = train.MetricLog(tmp_path)
    log.write(1, {"a": float("nan"), "b": np.float32(np.inf), "c": np.float32(1 / 3)})
    assert log.path.read_text() == '{"step": 1, "a": null, "b": null, "c": 0.33333334}\n'
    assert np.float32(log.read()[0]["c"]) == np.float32(1 / 3)


def test_tensorboard_events(tmp_path):
    pytest.importorskip("tensorboardX")
    from tensorboardX.proto import event_pb2
    from tensorboardX.record_writer import masked_crc32c

    log = train.MetricLog(tmp_path, tensorboard=True)
    log.extend(1, columns(1, 3))
    log.truncate(2)
    log.extend(3, columns(3, 1))
    log.close()
    seen, purged = [], []
    for path in sorted(tmp_path.glob("events.*")):
        content = path.read_bytes()
        while content:
            length = int.from_bytes(content[:8], "little")
            record = content[12 : 12 + length]
            assert int.from_bytes(content[12 + length : 16 + length], "little") == masked_crc32c(
                record
            )
            event = event_pb2.Event.FromString(record)
            seen += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
            if event.HasField("session_log"):
                purged.append(event.step)
            content = content[16 + length :]
    assert [(step, tag) for step, tag, _ in seen] == [
        (1, "loss"),
        (2, "loss"),
        (3, "loss"),
        (3, "loss"),
    ]
    np.testing.assert_allclose([value for *_, value in seen], [0.1, 0.2, 0.3, 0.3], rtol=1e-6)
    assert purged == [3]


def test_fit_logs_what_it_measured(tmp_path):
    step = train.make_step(toy.plain, SGD)
    feed = train.Feed(toy.data(), 16, seed=0)
    log = train.MetricLog(tmp_path)
    _, history = train.fit(step, train.init(toy.params(), SGD), feed, steps=5, log=log)
    logged = [line["loss"] for line in log.read()]
    np.testing.assert_array_equal(np.float32(logged), history.metrics["loss"])


def test_lines_where_there_is_no_terminal():
    stream = io.StringIO()
    step = train.make_step(toy.plain, SGD)
    feed = train.Feed(toy.data(), 16, seed=0)
    state = train.init(toy.params(), SGD)
    shown, _ = train.fit(
        step, state, feed, steps=40, progress=train.Progress("teacher", stream=stream, every_s=0.0)
    )
    hidden, _ = train.fit(step, state, feed, steps=40)
    assert toy.same(shown, hidden)
    lines = stream.getvalue().splitlines()
    assert lines[0].startswith("teacher  1/40  loss ")
    assert lines[0].endswith(" s with compiling")
    assert lines[-1].startswith("teacher  40/40  loss ")
    assert lines[-1].endswith("examples/s  0:00:00 left")
    quiet = io.StringIO()
    train.fit(step, state, feed, steps=40, progress=train.Progress(stream=quiet, every_s=1e6))
    assert len(quiet.getvalue().splitlines()) == 1


def test_a_bar_on_a_terminal():
    pytest.importorskip("rich")

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = Terminal()
    progress = train.Progress("teacher", stream=stream)
    progress.start(10, 40)
    progress.update(11, {"loss": 0.5}, 1.0)  # it compiles: no pace to go by
    assert "s with compiling" in progress._bar.tasks[0].fields["numbers"]
    assert progress._bar.tasks[0].fields["left"] == ""
    progress.update(30, {"loss": 0.25, "accuracy": 0.5}, 1234.5)
    progress.stop()
    text = stream.getvalue()
    for part in ("teacher", "30/40", "loss 0.25", "accuracy 0.5", "examples/s", "left"):
        assert part in text


def test_the_rest_is_said_in_one_sentence(tmp_path, monkeypatch):
    for name in (
        "rich",
        "rich.console",
        "rich.progress",
        "tensorboardX",
        "orbax",
        "orbax.checkpoint",
    ):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ModuleNotFoundError, match=r'tensorboardX: `pip install "jopt\[run\]"`'):
        train.MetricLog(tmp_path, tensorboard=True)
    with pytest.raises(ModuleNotFoundError, match=r'rich: `pip install "jopt\[run\]"`'):
        train.Progress(mode="bar")
    with pytest.raises(ModuleNotFoundError, match=r'orbax-checkpoint: `pip install "jopt\[run\]"`'):
        train.Checkpoints(tmp_path / "c").save(train.init(toy.params(), SGD))
    with pytest.raises(ValueError, match='expects "auto", "bar" or "lines"'):
        train.Progress(mode="dots")
    with pytest.raises(
        ValueError, match=r"`MetricLog\(..., every=0\)` expects a number of steps, at"
    ):
        train.MetricLog(tmp_path, every=0)


def test_lines_are_json(tmp_path):
    log = train.MetricLog(tmp_path)
    log.extend(1, {"loss": np.float32([1e-8, 1e20]), "n": np.int32([1, 2])})
    assert [json.loads(line) for line in log.path.read_text().splitlines()] == [
        {"step": 1, "loss": 1e-8, "n": 1.0},
        {"step": 2, "loss": 1e20, "n": 2.0},
    ]
