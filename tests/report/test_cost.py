"""Timing is fair: in turn, after warm-up, waiting for results, and compared within rounds."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jopt import report


class Clock:
    """A clock that only the functions under test move on."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[str] = []
        self.drift = 0.0

    def __call__(self) -> float:
        return self.now

    def function(self, name: str, seconds: float, compiling: float = 0.0) -> Any:
        """Takes `seconds`, the first time `compiling` more; the machine slows down by `drift`."""

        def call(*args: Any) -> jax.Array:
            first = name not in self.calls
            self.calls.append(name)
            self.now += seconds * (1 + self.drift * len(self.calls)) + compiling * first
            return jnp.zeros(())

        return call, (1, 2)


def test_ratios_are_to_the_first_without_compilation() -> None:
    clock = Clock()
    dense, small = clock.function("dense", 4.0, 99.0), clock.function("small", 1.0, 9.0)
    found = report.latency({"dense": dense, "small": small}, rounds=5, clock=clock)
    assert found["dense"] == report.Latency(4.0, 4.0, 1.0)
    assert found["small"] == report.Latency(1.0, 1.0, 0.25)


def test_functions_take_turns_and_turns_begin_with_another() -> None:
    clock = Clock()
    calls = {name: clock.function(name, 1.0) for name in "abc"}
    report.latency(calls, rounds=4, clock=clock)
    assert clock.calls[:9] == ["a"] * 3 + ["b"] * 3 + ["c"] * 3
    assert clock.calls[9:] == [*"abc", *"bca", *"cab", *"abc"]


def test_a_machine_that_slows_down_does_not_shift_the_ratio() -> None:
    clock = Clock()
    clock.drift = 0.05
    calls = {"dense": clock.function("dense", 2.0), "small": clock.function("small", 1.0)}
    found = report.latency(calls, rounds=30, clock=clock)
    assert found["small"].ratio == pytest.approx(0.5, rel=0.03)
    assert found["dense"].median > 1.5 * found["dense"].minimum  # it did slow down


def test_short_calls_are_repeated_within_one_timing() -> None:
    clock = Clock()
    calls = {"fast": clock.function("fast", 0.001)}
    found = report.latency(calls, rounds=2, at_least=0.01, clock=clock)
    assert len(clock.calls) == 3 + 2 * 10
    assert found["fast"].median == pytest.approx(0.001)


def test_results_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[Any] = []
    monkeypatch.setattr(jax, "block_until_ready", waited.append)
    clock = Clock()
    report.latency({"a": clock.function("a", 1.0)}, rounds=2, clock=clock)
    assert len(waited) == len(clock.calls) == 5


def test_nothing_to_time_is_an_error() -> None:
    with pytest.raises(ValueError, match="0 functions"):
        report.latency({})
    with pytest.raises(ValueError, match="0 rounds"):
        report.latency({"a": (jnp.sin, (1.0,))}, rounds=0)


def test_the_machine_is_named() -> None:
    found = report.machine()
    assert found["jax"] == jax.__version__ and int(found["cores"]) >= 1
    assert found["device"] == "8 × cpu" and found["processor"]


def test_memory_counts_the_intermediate_values() -> None:
    def outer(x: jax.Array) -> jax.Array:
        return jnp.sort(jnp.sort(x)[::-1] * jnp.arange(x.size, dtype=x.dtype)).sum()

    found = report.memory(outer, jnp.ones(100_000))
    assert found is not None and found >= 400_000
    assert (report.memory(lambda x: x, jnp.ones(100_000)) or 0) < 400_000


def test_flops_count_every_iteration_of_a_scan() -> None:
    def apply(params: jax.Array, x: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, w: (x @ w, None), x, params)[0]

    layers, x = jnp.ones((7, 16, 16)), jnp.ones((3, 16))
    assert report.flops(apply, layers, x) == 7 * 2 * 3 * 16 * 16
