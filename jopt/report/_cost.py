"""What a model costs to run: time, interleaved so that drift hits all alike, and memory."""

import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jaxlib


class Latency(NamedTuple):
    """Seconds of one call, and how they compare."""

    minimum: float
    median: float
    ratio: float  # to the first function: the median over rounds of the ratio within a round


def latency(
    calls: Mapping[str, tuple[Callable[..., Any], Sequence[Any]]],
    *,
    rounds: int = 30,
    at_least: float = 2e-3,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Latency]:
    """Times functions against the first of them, round after round in turn.

    Each function is called three times first, so that compilation is over. In every round all are
    timed, beginning with another one each time, so that what the machine does meanwhile falls on
    all alike; the ratio is taken within rounds. Results are waited for (`jax.block_until_ready`).

    Args:
      calls: name to `(function, arguments)`; the first is what the others are compared with.
      rounds: how often each is timed.
      at_least: seconds that one timing takes; faster functions are called several times in it.
      clock: returns seconds.

    Returns:
      The times of one call by name.

    Raises:
      ValueError: if there is nothing to time.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> x = jnp.ones((8, 8))
      >>> found = latency({"dot": (jax.jit(jnp.dot), (x, x)), "add": (jax.jit(jnp.add), (x, x))})
      >>> found["dot"].ratio
      1.0
    """
    if not calls or rounds < 1:
        raise ValueError(f"`latency` has {len(calls)} functions to time in {rounds} rounds.")
    repeats = {name: _repeats(call, at_least, clock) for name, call in calls.items()}
    names = list(calls)
    times: dict[str, list[float]] = {name: [] for name in names}
    for start in range(rounds):
        for place in range(len(names)):
            name = names[(start + place) % len(names)]
            times[name].append(_seconds(calls[name], repeats[name], clock))
    first = times[names[0]]
    return {
        name: Latency(
            minimum=min(times[name]),
            median=statistics.median(times[name]),
            ratio=statistics.median(map(_divide, times[name], first)),
        )
        for name in names
    }


def memory(function: Callable[..., Any], *args: Any) -> int | None:
    """The bytes of temporaries that the compiled `function` needs for one call.

    Returns:
      The bytes, or None where the backend does not say.
    """
    analysis = jax.jit(function).lower(*args).compile().memory_analysis()
    return None if analysis is None else int(analysis.temp_size_in_bytes)


def machine() -> dict[str, str]:
    """The machine in words: processor, cores, device, and versions of Python, JAX and jaxlib."""
    device = jax.devices()[0]
    kind = (
        device.device_kind
        if device.device_kind == device.platform
        else (f"{device.device_kind} ({device.platform})")
    )
    return {
        "processor": _processor(),
        "cores": str(_cores()),
        "device": f"{jax.device_count()} × {kind}",
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
    }


def _seconds(
    call: tuple[Callable[..., Any], Sequence[Any]], repeats: int, clock: Callable[[], float]
) -> float:
    function, args = call
    begin = clock()
    for _ in range(repeats):
        jax.block_until_ready(function(*args))
    return (clock() - begin) / repeats


def _repeats(
    call: tuple[Callable[..., Any], Sequence[Any]], at_least: float, clock: Callable[[], float]
) -> int:
    """Calls that take `at_least` seconds, after calls that compile and warm up."""
    warm = [_seconds(call, 1, clock) for _ in range(3)]
    return max(1, math.ceil(at_least / max(min(warm), 1e-9)))


def _divide(time: float, first: float) -> float:
    return time / first if first else math.nan


def _processor() -> str:
    """The processor's own name, where the system gives it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine() or "unknown"


def _cores() -> int:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
