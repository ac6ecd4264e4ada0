"""Checkpoints: the same bits back, damage seen, nothing lost."""

import contextlib
import dataclasses
import errno
import json
import logging
import os
import resource
import shutil
import threading
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy_training as toy
from jax.sharding import NamedSharding, PartitionSpec

from jopt import train

pytest.importorskip("orbax.checkpoint")

SGD = optax.sgd(0.1, momentum=0.9)


class Pair(NamedTuple):
    first: jax.Array
    second: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Codes:
    codes: jax.Array
    scale: jax.Array
    bits: int = dataclasses.field(metadata={"static": True})


def varied():
    """A tree of every kind of leaf that a state may hold."""
    rng = np.random.default_rng(0)
    return {
        "pair": Pair(jnp.ones(3, jnp.bfloat16) / 3, jnp.array([1 + 2j], jnp.complex64)),
        "leaf": Codes(
            jnp.asarray(rng.integers(-8, 8, (4, 5)), jnp.int4), jnp.ones((1, 5)) / 7, bits=4
        ),
        "small": [jnp.array(rng.standard_normal(7), jnp.float8_e4m3fn), jnp.array([True, False])],
        "odd": (jnp.array([jnp.nan, -0.0, jnp.inf]), jnp.zeros((0, 3)), jnp.uint32(2**32 - 1)),
        "large": jnp.asarray(rng.standard_normal((600, 500)), jnp.float32),
        "key": jax.random.key(3),
        "other": jax.random.key(4, impl="rbg"),
        "none": None,
    }


def state_of(params, step=5, collections=None, key=None):
    state = train.init(params, optax.identity(), collections=collections, key=key)
    return state._replace(step=jnp.int32(step))


def test_every_kind_of_leaf_comes_back_bit_for_bit(tmp_path, key):
    state = state_of(varied(), collections={"mean": jnp.arange(3.0)}, key=key)
    checkpoints = train.Checkpoints(tmp_path / "new" / "folder", metadata={"recipe": {"a": [1]}})
    assert checkpoints.latest() is None and checkpoints.restore(state) is None
    checkpoints.save(state, {"step": 5, "seed": 3})
    blank = jax.tree.map(jnp.zeros_like, state._replace(key=None, params=None))
    blank = blank._replace(key=jax.random.key(9), params=varied())
    got = checkpoints.restore(blank)
    assert got.step == 5 and got.feed == {"step": 5, "seed": 3}
    assert got.metadata == {"recipe": {"a": [1]}}
    assert toy.same(got.state, state)
    assert isinstance(got.state.params["pair"], Pair) and got.state.params["leaf"].bits == 4
    assert not any(x.committed for x in jax.tree.leaves(got.state))


def test_shardings_come_back(tmp_path):
    mesh = jax.make_mesh((8,), ("data",))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    params = {
        "large": jax.device_put(
            np.random.default_rng(0).standard_normal((800, 500)).astype("f"), rows
        ),
        "small": jax.device_put(np.arange(16.0, dtype=np.float32), rows),
    }
    state = train.init(params, SGD, mesh=mesh)
    checkpoints = train.Checkpoints(tmp_path)
    checkpoints.save(state)
    got = checkpoints.restore(state).state
    assert toy.same(got, state)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(state), strict=True):
        assert x.sharding == y.sharding
    # On one device just as well.
    alone = checkpoints.restore(train.init(jax.tree.map(np.asarray, params), SGD)).state
    assert toy.same(alone, state) and len(alone.params["large"].devices()) == 1


def test_the_newest_are_kept_and_nothing_else(tmp_path):
    checkpoints = train.Checkpoints(tmp_path, keep=2)
    (tmp_path / ".saving-00000009" / "state").mkdir(parents=True)
    (tmp_path / ".deleting-00000001").mkdir()
    for step in (1, 2, 3, 4, 4):
        checkpoints.save(state_of(jnp.full(3, float(step)), step))
    assert sorted(os.listdir(tmp_path)) == ["00000003", "00000004"]
    assert checkpoints.steps() == [3, 4] and checkpoints.latest() == 4
    assert float(checkpoints.restore(state_of(jnp.zeros(3))).state.params[0]) == 4


def damage(kind, folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)
    about = folder / "checkpoint.json"
    data = max((path for path in files if path != about), key=lambda path: path.stat().st_size)
    if kind == "cut":
        data.write_bytes(data.read_bytes()[:-7])
    elif kind == "flipped":
        content = bytearray(data.read_bytes())
        content[len(content) // 2] ^= 1
        data.write_bytes(content)
    elif kind == "gone":
        data.unlink()
    elif kind == "emptied":
        shutil.rmtree(folder / "state")
    elif kind == "no manifest":
        about.unlink()
    elif kind == "manifest cut":
        about.write_text(about.read_text()[:-20])
    elif kind == "manifest changed":
        about.write_text(about.read_text().replace('"feed"', '"food"'))
    elif kind == "manifest garbled":
        about.write_bytes(b"\xff\x00\xfe" * 50)


KINDS = ["cut", "flipped", "gone", "emptied", "no manifest", "manifest cut", "manifest changed"]


@pytest.mark.parametrize("kind", [*KINDS, "manifest garbled"])
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_taken(tmp_path, kind):
    checkpoints = train.Checkpoints(tmp_path)
    for step in (1, 2):
        checkpoints.save(state_of(jnp.full(3, float(step)), step))
    damage(kind, tmp_path / "00000002")
    with pytest.warns(UserWarning, match=r"step 2: .*went back to the checkpoint of step 1"):
        got = checkpoints.restore(state_of(jnp.zeros(3)))
    assert got.step == 1 and float(got.state.params[0]) == 1
    assert checkpoints.steps() == [1] and (tmp_path / ".corrupt-00000002").is_dir()
    damage(kind, tmp_path / "00000001")
    with pytest.raises(train.CheckpointError, match=r"holds no good checkpoint \(step 1: "):
        checkpoints.restore(state_of(jnp.zeros(3)))
    assert checkpoints.steps() == [1]


def test_another_model_or_feed_is_an_error_that_says_how_they_differ(tmp_path):
    checkpoints = train.Checkpoints(tmp_path)
    feed = train.Feed(np.zeros(10), 2, seed=1)
    checkpoints.save(state_of({"a": jnp.ones(3), "b": jnp.ones(2)}), feed.state(5))
    with pytest.raises(
        ValueError, match=r"(?s)2 leaves differ:.*`params/a`: float32\[3\] there, float"
    ):
        checkpoints.restore(
            state_of({"a": jnp.ones(3, jnp.float16), "c": jnp.ones(2), "b": jnp.ones(2)})
        )
    same = state_of({"a": jnp.ones(3), "b": jnp.ones(2)})
    other = train.Feed(np.zeros(10), 5, seed=2)
    with pytest.raises(ValueError, match=r"another feed: .*seed 1 there, 2 here"):
        checkpoints.restore(same, feed=other)
    assert checkpoints.restore(same, feed=feed).step == 5
    assert checkpoints.restore(same, feed=object()).step == 5
    assert checkpoints.steps() == [5]


def test_a_full_disk_is_an_error_and_the_earlier_checkpoint_stays(tmp_path):
    """The system refuses to write files above a size, as a full disk would."""
    checkpoints = train.Checkpoints(tmp_path)
    params = jnp.asarray(np.random.default_rng(0).standard_normal(3000), jnp.float32)
    checkpoints.save(state_of(params, 1))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, hard))
    try:
        with pytest.raises(train.CheckpointError) as info:
            checkpoints.save(state_of(params, 2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert info.value.errno == errno.EFBIG and isinstance(info.value, OSError)
    assert "step 2 was not written" in str(info.value)
    assert "That of step 1 is still there" in str(info.value)
    assert os.listdir(tmp_path) == ["00000001"]
    assert toy.same(checkpoints.restore(state_of(params)).state.params, params)
    checkpoints.save(state_of(params, 2))
    assert checkpoints.steps() == [1, 2]


def test_a_directory_that_cannot_be_made_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(train.CheckpointError, match=r"step 5 was not written.*There is none yet"):
        train.Checkpoints(tmp_path / "file" / "below").save(state_of(jnp.ones(3)))


def test_fit_stops_on_a_full_disk_and_goes_on_later(tmp_path, monkeypatch):
    step = train.make_step(toy.plain, SGD)
    state = train.init(toy.params(), SGD)
    feed = train.Feed(toy.data(), 16, seed=0)
    checkpoints = train.Checkpoints(tmp_path, every_steps=5)
    whole, _ = train.fit(step, state, feed, steps=20)
    sync, calls = os.fsync, []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) == 4:  # each save syncs twice: this is the second of the second
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(train.CheckpointError, match="No space left on device"):
            train.fit(step, state, feed, steps=20, checkpoints=checkpoints)
    resumed, history = train.fit(step, state, feed, steps=20, checkpoints=checkpoints)
    assert history.steps[0] in (6, 11) and toy.same(whole, resumed)


class Killed(BaseException):
    """What no handler expects."""


@pytest.mark.parametrize("last", range(9))
def test_a_kill_between_any_two_changes_leaves_a_good_directory(tmp_path, monkeypatch, last):
    """The third save, with room for two, dies at its `last`th change to the directory."""
    checkpoints = train.Checkpoints(tmp_path, keep=2)
    for step in (1, 2):
        checkpoints.save(state_of(jnp.full(3, float(step)), step))
    calls = []

    def dying(change):
        def changed(*args, **options):
            calls.append(change)
            if len(calls) > last:
                raise Killed
            return change(*args, **options)

        return changed

    with monkeypatch.context() as patched:
        for owner, name in ((os, "replace"), (os, "fsync"), (os, "mkdir"), (shutil, "rmtree")):
            patched.setattr(owner, name, dying(getattr(owner, name)))
        with contextlib.suppress(Killed):
            checkpoints.save(state_of(jnp.full(3, 3.0), 3))
            assert last >= 8, "the save has more moments to die at than the test tries"
    got = checkpoints.restore(state_of(jnp.zeros(3)))
    assert got.step == float(got.state.params[0]) in (2, 3)
    checkpoints.save(state_of(jnp.full(3, 4.0), 4))
    assert checkpoints.latest() == 4 and len(checkpoints.steps()) == 2
    assert len(os.listdir(tmp_path)) == 2


def test_when_one_is_due():
    checkpoints = train.Checkpoints("there", every_s=2.0, every_steps=10)
    assert checkpoints.due(20, 0.0) and checkpoints.due(3, 2.5) and not checkpoints.due(3, 1.0)
    never = train.Checkpoints("there", every_s=None)
    assert not never.due(10, 1e9)
    for options in ({"keep": 0}, {"every_steps": 0}, {"every_s": -1.0}):
        with pytest.raises(ValueError, match=rf"`Checkpoints\(..., {next(iter(options))}="):
            train.Checkpoints("there", **options)


def test_saving_is_silent_and_leaves_no_threads(tmp_path, caplog, capfd):
    caplog.set_level(logging.DEBUG)
    checkpoints = train.Checkpoints(tmp_path)
    state = state_of(varied())
    for step in (1, 2):
        checkpoints.save(state._replace(step=jnp.int32(step)))
    checkpoints.restore(state)
    ours = [record for record in caplog.records if not record.name.startswith(("jax", "asyncio"))]
    assert ours == [] and capfd.readouterr() == ("", "")
    until = time.monotonic() + 5
    while threading.active_count() > 1 and time.monotonic() < until:
        for thread in threading.enumerate():
            if thread is not threading.current_thread():
                thread.join(0.1)
    assert all(
        thread.daemon or "asyncio" in thread.name or thread is threading.current_thread()
        for thread in threading.enumerate()
    )


def test_the_manifest_is_plain_json(tmp_path):
    train.Checkpoints(tmp_path).save(state_of({"w": jnp.ones(3)}), {"step": 5})
    _, text = (tmp_path / "00000005" / "checkpoint.json").read_text().split("\n", 1)
    about = json.loads(text)
    assert about["leaves"] == {"step": "int32[]", "params/w": "float32[3]"}
    assert about["feed"] == {"step": 5}
