"""The loop: the same bits however it is cut, one compilation, and what it does in trouble."""

import functools
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy_training as toy

from jopt import train
from jopt.train import _loop, _loopable

SGD = optax.sgd(0.1, momentum=0.9)


@functools.cache
def compiled(loss=None, parallel=None):
    """A step that tests share, so that it is compiled once for all."""
    options = {"parallel": parallel} if parallel == "pmap" else {}
    if parallel == "mesh":
        options = {"mesh": jax.make_mesh((8,), ("data",))}
    axis = "batch" if parallel == "pmap" else None
    loss = toy.full(axis, dropout=axis is None) if loss is None else loss
    return train.make_step(loss, SGD, **options)


@functools.cache
def feed():
    return train.Feed(toy.data(), 16, seed=4)


def begun(key, loss=None, **options):
    stateful = {} if loss is not None else {"collections": toy.collections(), "key": key}
    return train.init(toy.params(), SGD, **stateful, **options)


def convolved(params, batch):
    images = batch["x"][:, :4].reshape(-1, 2, 2, 1)
    kernel = params["first"]["kernel"][:4].reshape(2, 2, 1, 8)
    hidden = jax.lax.conv_general_dilated(
        images, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return toy.cross_entropy(toy.logits(params, jnp.tanh(hidden.reshape(-1, 8))), batch["y"])


@pytest.fixture
def seven(monkeypatch):
    """Chunks of seven steps, whatever the clock says."""
    monkeypatch.setattr(_loop, "next_length", lambda count, seconds: 7)


@pytest.mark.parametrize("loss", [None, convolved], ids=["looped", "stepped"])
def test_how_the_work_is_cut_has_no_effect_on_the_bits(key, loss, monkeypatch):
    step, state = compiled(loss), begun(key, loss)
    finals, losses = [], []
    for length in (1, 7, 50):
        monkeypatch.setattr(_loop, "next_length", lambda count, seconds, n=length: n)
        final, history = train.fit(step, state, feed(), steps=30)
        finals.append(final)
        losses.append(history.metrics["loss"])
    pieces, piece = [], state
    for until in (1, 11, 12, 30):
        piece, history = train.fit(step, piece, feed(), steps=until)
        pieces.append(history.metrics["loss"])
    finals.append(piece)
    losses.append(np.concatenate(pieces))
    assert all(toy.same(finals[0], final) for final in finals[1:])
    assert all(toy.bits(losses[0]) == toy.bits(other) for other in losses[1:])
    assert int(finals[0].step) == 30 and losses[0].shape == (30,)


def test_the_loop_takes_the_steps_that_a_plain_loop_takes(key):
    step, state = compiled(), begun(key)
    final, history = train.fit(step, state, feed(), steps=12)
    take = jax.jit(feed().batch)
    for i in range(12):
        state, metrics = step(state, take(feed().arrays, i))
        np.testing.assert_allclose(history.metrics["loss"][i], metrics["loss"], rtol=1e-5)
    toy.close(final._replace(key=None), state._replace(key=None))
    assert history.steps.tolist() == list(range(1, 13))
    assert set(history.metrics) == {"loss", "accuracy"}


@pytest.mark.parametrize("loss", [None, convolved], ids=["looped", "stepped"])
def test_one_compilation_serves_every_chunk_and_every_fit(key, loss, seven, tmp_path):
    pytest.importorskip("orbax.checkpoint")
    step, state = train.make_step(toy.full() if loss is None else loss, SGD), begun(key, loss)
    with toy.compilations() as seen:
        state, _ = train.fit(step, state, feed(), steps=3)
        before = len(seen)
        checkpoints = train.Checkpoints(tmp_path, every_steps=10)
        state, _ = train.fit(step, state, feed(), steps=50, checkpoints=checkpoints)
        assert seen[before:] == []
        train.fit(step, state, feed(), steps=60, checkpoints=checkpoints)
    assert seen[before:] == []
    names = [name for name in seen if "many" in name or "fed" in name]
    assert names == (["jit(many)"] if loss is None else ["jit(fed)"])


@pytest.mark.parametrize("parallel", ["mesh", "pmap"])
def test_eight_devices_fit_like_one(key, parallel, seven):
    step = compiled() if parallel == "mesh" else compiled(toy.full(dropout=False))
    one = train.fit(step, begun(key), feed(), steps=10)
    with toy.compilations() as seen:
        eight = train.fit(compiled(None, parallel), begun(key), feed(), steps=10)
    assert len([name for name in seen if "many" in name or "_fun" in name]) == 1, seen
    toy.close(one[0]._replace(key=None), eight[0]._replace(key=None), 1e-5)
    toy.close(one[1].metrics, eight[1].metrics, 1e-5)


@pytest.mark.parametrize("parallel", ["mesh", "pmap"])
def test_eight_devices_resume_with_the_same_bits(key, parallel, seven, tmp_path):
    pytest.importorskip("orbax.checkpoint")
    step, checkpoints = compiled(None, parallel), train.Checkpoints(tmp_path)
    whole, _ = train.fit(step, begun(key), feed(), steps=20)
    train.fit(step, begun(key), feed(), steps=11, checkpoints=checkpoints)
    resumed, history = train.fit(step, begun(key), feed(), steps=20, checkpoints=checkpoints)
    assert toy.same(whole, resumed) and history.steps[0] == 12


def test_the_state_given_stays_and_the_one_returned_is_new(key):
    step, state = compiled(), begun(key)
    final, _ = train.fit(step, state, feed(), steps=2)
    assert not any(x.is_deleted() for x in jax.tree.leaves((state, final)))
    assert int(state.step) == 0
    again, history = train.fit(step, final, feed(), steps=2)
    assert toy.same(final, again) and history.metrics == {} and history.steps.size == 0


def test_a_stream_gives_batches_by_number(key, seven):
    step, state = compiled(), begun(key)
    take = jax.jit(feed().batch)
    asked = []

    class Stream:
        def __getitem__(self, i):
            asked.append(i)
            return jax.tree.map(np.asarray, take(feed().arrays, i))

    ours, history = train.fit(step, state, Stream(), steps=20)
    theirs, reference = train.fit(step, state, feed(), steps=20)
    toy.close(ours._replace(key=None), theirs._replace(key=None), 1e-5)
    toy.close(history.metrics, reference.metrics, 1e-5)
    assert asked == list(range(20))
    halfway, _ = train.fit(step, state, Stream(), steps=9)
    resumed, _ = train.fit(step, halfway, Stream(), steps=20)
    assert toy.same(ours, resumed)


def test_evaluations_come_at_their_steps(key, tmp_path):
    step, state = compiled(), begun(key)
    log = train.MetricLog(tmp_path)
    seen = []

    def evaluate(state):
        seen.append(int(state.step))
        return {"test": jnp.sum(state.collections["mean"])}

    plain, _ = train.fit(step, state, feed(), steps=25)
    final, history = train.fit(step, state, feed(), steps=25, evaluate=evaluate, every=10, log=log)
    assert toy.same(plain, final)
    assert seen == [10, 20] == [at for at, _ in history.evaluations]
    assert [line for line in log.read() if "test" in line] == [
        {"step": at} | numbers for at, numbers in history.evaluations
    ]
    with pytest.raises(TypeError, match=r"as `feed\[i\]`; got a generator"):
        train.fit(step, state, (batch for batch in [toy.batch()]), steps=2)
    for options in ({"evaluate": evaluate}, {"every": 3}):
        with pytest.raises(ValueError, match="give both or neither"):
            train.fit(step, state, feed(), steps=2, **options)
    for every in (0, 2.5, "3"):
        with pytest.raises(ValueError, match="a number of steps, at least 1"):
            train.fit(step, state, feed(), steps=2, evaluate=evaluate, every=every)


def spoiled(at):
    """A loss that is nan at one step, which the parameters survive."""

    def loss(params, batch, *, collections):
        value = toy.plain(params, batch)
        count = collections["batches"]
        return jnp.where(count == at, jnp.nan, value), train.Aux({"batches": count + 1})

    return loss


def test_a_nan_loss_stops_and_names_the_step(seven, tmp_path):
    pytest.importorskip("orbax.checkpoint")
    step = train.make_step(spoiled(at=25), SGD)
    collections = {"batches": jnp.zeros((), jnp.int32)}
    state = train.init(toy.params(), SGD, collections=collections)
    log = train.MetricLog(tmp_path)
    checkpoints = train.Checkpoints(tmp_path / "kept", every_steps=10)
    with pytest.raises(train.TrainingDiverged, match=r"the loss is nan at step 26\. The") as info:
        train.fit(step, state, feed(), steps=40, checkpoints=checkpoints, log=log)
    assert info.value.step == 26 and info.value.checkpoint == 20
    assert f"checkpoint of step 20, from before, is in `{tmp_path / 'kept'}`" in str(info.value)
    assert [line["step"] for line in log.read()] == list(range(1, 26))
    assert checkpoints.steps() == [10, 20]
    assert all(
        np.isfinite(x).all() for x in jax.tree.leaves(checkpoints.restore(state).state.params)
    )
    with pytest.raises(train.TrainingDiverged, match="at step 26"):  # goes on from 20
        train.fit(step, state, feed(), steps=40, checkpoints=checkpoints, log=log)
    assert [line["step"] for line in log.read()] == list(range(1, 26))
    with pytest.raises(train.TrainingDiverged, match="There is no checkpoint from before"):
        train.fit(step, state, feed(), steps=40)


def test_parameters_gone_bad_are_never_saved(seven, tmp_path):
    pytest.importorskip("orbax.checkpoint")

    def loss(params, batch):  # finite, with a gradient that is not
        return toy.plain(params, batch) + jnp.sqrt(jnp.sum(params["extra"]))

    params = toy.params() | {"extra": np.zeros(2, np.float32), "unset": np.array([np.inf, np.nan])}
    step = train.make_step(loss, SGD)
    state = train.init(params, SGD)
    checkpoints = train.Checkpoints(tmp_path, every_steps=1)
    with pytest.raises(train.TrainingDiverged, match=r"`extra` is not finite after step 1\."):
        train.fit(step, state, feed(), steps=40, checkpoints=checkpoints)
    assert checkpoints.steps() == []
    fine = train.init(params | {"extra": np.ones(2, np.float32)}, SGD)
    train.fit(step, fine, feed(), steps=2, checkpoints=checkpoints)
    assert checkpoints.steps() == [1, 2]


@pytest.fixture
def interruptible():
    """Ctrl-C as Python has it, which a shell takes away from what it starts in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_interrupt_saves_then_rises(key, seven, tmp_path, interruptible):
    pytest.importorskip("orbax.checkpoint")
    step, state = compiled(), begun(key)
    whole, _ = train.fit(step, state, feed(), steps=40)
    checkpoints = train.Checkpoints(tmp_path, every_s=None)
    log = train.MetricLog(tmp_path)

    def evaluate(state):
        if int(state.step) == 20:
            os.kill(os.getpid(), signal.SIGINT)
        return {}

    options = {"steps": 40, "checkpoints": checkpoints, "log": log}
    with pytest.raises(KeyboardInterrupt):
        train.fit(step, state, feed(), evaluate=evaluate, every=20, **options)
    assert checkpoints.steps() == [20]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    resumed, history = train.fit(step, state, feed(), **options)
    assert toy.same(whole, resumed) and history.steps[0] == 21
    assert [line["step"] for line in log.read() if "loss" in line] == list(range(1, 41))


def test_what_is_slow_in_a_loop_is_seen_in_the_jaxpr():
    image = jnp.ones((1, 4, 4, 1))

    def convolution(x):
        kernel = jnp.ones((2, 2, 1, 1))
        return jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    def pool(x):
        return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")

    def nested(x):
        def body(carry, _):
            return jax.lax.cond(jnp.sum(carry) > 0, jax.jit(convolution), jnp.sin, carry), None

        return jax.lax.scan(jax.checkpoint(body), x, length=2)[0]

    def elsewhere(x):
        return jax.lax.platform_dependent(x, cpu=jnp.sin, default=convolution)

    def here(x):
        return jax.lax.platform_dependent(x, tpu=jnp.sin, default=convolution)

    def loops(f, platform="cpu"):
        return _loopable.loops(jax.make_jaxpr(f)(image), platform)

    assert not loops(convolution) and not loops(jax.grad(lambda x: jnp.sum(convolution(x) ** 2)))
    assert not loops(pool) and not loops(jax.grad(lambda x: jnp.sum(pool(x))))
    assert not loops(nested) and not loops(here)
    assert loops(elsewhere) and loops(lambda x: jnp.tanh(x) * x)
    assert loops(convolution, "cuda") and loops(convolution, "tpu")


def test_accumulation_unrolls_what_is_slow_in_a_loop():
    def whiles(loss):
        step = train.make_step(loss, SGD, accumulate=2)
        state = train.init(toy.params(), SGD)
        return jax.jit(step.body).lower(state, toy.batch()).compile().as_text().count(" while(")

    assert whiles(toy.plain) == 1
    assert whiles(convolved) == 0


def test_a_spread_state_needs_a_mesh(key):
    state = begun(key, mesh=jax.make_mesh((8,), ("data",)))
    with pytest.raises(ValueError, match=r"lies on 8 devices.*`make_step\(..., mesh=mesh\)`"):
        train.fit(compiled(), state, feed(), steps=1)
