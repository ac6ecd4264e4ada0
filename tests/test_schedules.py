"""Schedules against their formulas in float64, and against PyTorch."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jopt import schedules

STEPS = np.arange(0, 260)


def multistep(t):
    return 0.1 * 0.3 ** sum(t >= m for m in (10, 100, 150))


def natural(t):
    return 0.3 * np.exp(-0.02 * t)


def trapezoid(fall, end=0.0):
    def value(t):
        if t < 20:
            return 2.0 * t / 20
        x = np.clip((t - 140) / 60, 0, 1)
        return end + (2.0 - end) * fall(x)

    return value


def cubic(t):
    return 0.8 + (0.3 - 0.8) * (1 - np.clip((t - 40) / (200 - 40), 0, 1)) ** 3


def jumps(t):
    return 0.75 if t >= 175 else 0.5 if t >= 150 else 0.0


TABLE = {
    "multistep": (schedules.multistep(0.1, [10, 100, 150], 0.3), multistep),
    "natural": (schedules.natural_decay(0.3, 0.02), natural),
    "1-sqrt": (
        schedules.warmup_stable_decay(2.0, 200, warmup=20, decay=60),
        trapezoid(lambda x: 1 - np.sqrt(x)),
    ),
    "linear": (
        schedules.warmup_stable_decay(2.0, 200, warmup=20, decay=60, end=0.5, shape="linear"),
        trapezoid(lambda x: 1 - x, 0.5),
    ),
    "cosine": (
        schedules.warmup_stable_decay(2.0, 200, warmup=20, decay=60, end=0.1, shape="cosine"),
        trapezoid(lambda x: (1 + np.cos(np.pi * x)) / 2, 0.1),
    ),
    "cubic": (schedules.cubic_sparsity(0.8, begin=40, end=200, initial=0.3), cubic),
    "phases": (
        schedules.alternating_sparsity(0.9, begin=30, period=40, end=230),
        lambda t: 0.9 if t >= 230 or (t >= 30 and (t - 30) // 40 % 2 == 0) else 0.0,
    ),
    "jumps": (schedules.steps_sparsity([(150, 0.5), (175, 0.75)]), jumps),
}
METHODS = pytest.mark.parametrize("name", TABLE)


@METHODS
def test_formula(name):
    schedule, formula = TABLE[name]
    found = np.array([float(schedule(int(t))) for t in STEPS[::7]])
    expected = np.array([formula(t) for t in STEPS[::7]], np.float64)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


@METHODS
def test_traced_batched_and_of_any_dtype(name):
    schedule, formula = TABLE[name]
    expected = np.array([formula(t) for t in STEPS], np.float64)
    for steps in (jnp.asarray(STEPS), jnp.asarray(STEPS, jnp.float32)):
        for found in (jax.vmap(schedule)(steps), jax.jit(schedule)(steps)):
            assert found.dtype == jnp.float32
            np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
    assert jax.jit(schedule)(jnp.int32(3)).shape == ()
    counts = []
    jitted = jax.jit(lambda step: counts.append(0) or schedule(step))
    for step in range(3):
        jitted(jnp.int32(step))
    assert len(counts) == 1


@METHODS
def test_exports(name):
    step = jax.ShapeDtypeStruct((), jnp.int32)
    jax.export.export(jax.jit(TABLE[name][0]), platforms=("cpu", "cuda", "tpu"))(step)


def test_steps_beyond_float32():
    schedule = schedules.cubic_sparsity(0.8, begin=2**30, end=2**30 + 4)
    x = (1 - 1 / 4) ** 3
    np.testing.assert_allclose(schedule(jnp.int32(2**30 + 1)), 0.8 - 0.8 * x, rtol=1e-6)


def test_multistep_is_torch_multisteplr():
    torch = pytest.importorskip("torch")
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    peer = torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 7], 0.1)
    schedule = schedules.multistep(0.1, [3, 7], 0.1)
    for step in range(10):
        np.testing.assert_allclose(schedule(step), peer.get_last_lr()[0], rtol=1e-6)
        optimizer.step()
        peer.step()


def test_natural_decay_is_optax_exponential_decay():
    peer = optax.exponential_decay(0.5, transition_steps=10, decay_rate=0.8)
    schedule = schedules.natural_decay(0.5, -np.log(0.8) / 10)
    for step in (0, 1, 25):
        np.testing.assert_allclose(schedule(step), peer(step), rtol=1e-6)


def test_drives_optax():
    with jax.numpy_dtype_promotion("standard"):
        tx = optax.sgd(schedules.warmup_stable_decay(1.0, 10, warmup=2, decay=4))
        state = tx.init(jnp.zeros(2))
        for rate in (0.0, 0.5, 1.0):
            updates, state = jax.jit(tx.update)(jnp.ones(2), state)
            np.testing.assert_allclose(updates, -rate * np.ones(2))


def test_plateau_without_ends():
    schedule = schedules.warmup_stable_decay(0.5, 10, warmup=0, decay=0)
    assert [float(schedule(step)) for step in (0, 5, 10, 11)] == [0.5] * 4


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: schedules.multistep(0.1, [10, 5], 0.1), "milestones of 0 or more that strictly"),
        (lambda: schedules.multistep(0.1, [5, 5], 0.1), "strictly increase"),
        (lambda: schedules.multistep(0.1, [], 0.1), "strictly increase"),
        (lambda: schedules.multistep(0.1, [5], -0.1), "`gamma >= 0`"),
        (lambda: schedules.natural_decay(0.1, -1.0), "`k >= 0`"),
        (
            lambda: schedules.warmup_stable_decay(1.0, 10, warmup=6, decay=5),
            r"fit into `steps` together: 6 \+ 5 > 10",
        ),
        (lambda: schedules.warmup_stable_decay(1.0, 10, warmup=-1, decay=5), "0 or more"),
        (
            lambda: schedules.warmup_stable_decay(1.0, 10, warmup=1, decay=5, shape="sqrt"),
            "one of '1-sqrt', 'linear', 'cosine'",
        ),
        (lambda: schedules.cubic_sparsity(1.0, begin=0, end=5), r"in \[0, 1\).*1.0 is not"),
        (lambda: schedules.cubic_sparsity(0.5, begin=0, end=5, initial=-0.1), "-0.1 is not"),
        (lambda: schedules.cubic_sparsity(0.5, begin=5, end=5), "`0 <= begin < end`"),
        (lambda: schedules.alternating_sparsity(1.0, begin=0, period=1, end=5), "1.0 is not"),
        (
            lambda: schedules.alternating_sparsity(0.5, begin=6, period=1, end=5),
            "`0 <= begin <= end` and `period >= 1`",
        ),
        (lambda: schedules.steps_sparsity([]), "steps of 0 or more"),
        (lambda: schedules.steps_sparsity([(5, 0.5), (3, 0.6)]), "strictly increase"),
        (lambda: schedules.steps_sparsity([(5, 1.5)]), "1.5 is not"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()
