"""Schedules that optax lacks: functions of the step, for learning rates and for sparsity.

Each factory returns an `optax.Schedule`: `schedule(step)` takes a number or an array (traced,
batched, integer or float) and gives float32 of the same shape.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer


def multistep(init: float, milestones: Sequence[int], gamma: float) -> optax.Schedule:
    """Multiplies the value by `gamma` at each milestone.

        value(t) = init · gamma^|{m in milestones : m <= t}|

    Args:
      init: the value before the first milestone.
      milestones: steps, strictly increasing.
      gamma: the factor, not negative.

    Returns:
      A schedule.

    Raises:
      ValueError: if the milestones do not increase, or `gamma` is negative.

    Example:
      >>> from jopt import schedules
      >>> rate = schedules.multistep(1.0, [100, 150], 0.5)
      >>> [float(rate(step)) for step in (99, 100, 150)]
      [1.0, 0.5, 0.25]
    """
    call = f"multistep({init}, {list(milestones)}, {gamma})"
    _increasing(call, "milestones", milestones)
    if gamma < 0:
        raise ValueError(f"`{call}` expects `gamma >= 0`, a factor such as 0.1.")
    inner = optax.piecewise_constant_schedule(init, dict.fromkeys(milestones, gamma))
    return lambda step: jnp.asarray(inner(_float(step)))


def natural_decay(lr0: float, k: float) -> optax.Schedule:
    """Decays exponentially with the base e.

        value(t) = lr0 · exp(-k · t)

    `optax.exponential_decay(lr0, steps, rate)` is the same curve for `k = -log(rate) / steps`.

    Args:
      lr0: the value at step 0.
      k: the rate of decay for one step, not negative.

    Returns:
      A schedule.

    Raises:
      ValueError: if `k` is negative.

    Example:
      >>> from jopt import schedules
      >>> rate = schedules.natural_decay(0.5, 0.01)
      >>> print(f"{rate(0):.4f} {rate(100):.4f}")
      0.5000 0.1839
    """
    if k < 0:
        raise ValueError(f"`natural_decay({lr0}, {k})` expects `k >= 0`: the value would grow.")
    return lambda step: lr0 * jnp.exp(-k * _float(step))


def warmup_stable_decay(
    peak: float, steps: int, *, warmup: int, decay: int, end: float = 0.0, shape: str = "1-sqrt"
) -> optax.Schedule:
    """Rises to a plateau, stays there, and falls during the last steps (a trapezoid).

        value(t) = peak · t / warmup                        for t < warmup
                 = peak                                     for warmup <= t <= steps - decay
                 = end + (peak - end) · f(x)                after, x = (t - (steps - decay)) / decay

    with f(x) = 1 - sqrt(x) for `"1-sqrt"`, 1 - x for `"linear"` and (1 + cos(pi x)) / 2 for
    `"cosine"`. From `steps` on the value is `end`.

    Args:
      peak: the value of the plateau.
      steps: the length of the whole run.
      warmup: the steps of the rise; 0 starts on the plateau.
      decay: the steps of the fall; 0 stays on the plateau.
      end: the last value.
      shape: the form of the fall, `"1-sqrt"`, `"linear"` or `"cosine"`.

    Returns:
      A schedule.

    Raises:
      ValueError: if the parts do not fit into `steps`, or `shape` is unknown.

    Example:
      >>> from jopt import schedules
      >>> rate = schedules.warmup_stable_decay(1.0, 100, warmup=10, decay=20)
      >>> [round(float(rate(step)), 3) for step in (0, 5, 50, 85, 100)]
      [0.0, 0.5, 1.0, 0.5, 0.0]

    References:
      Hägele, Bakouch, Kosson, Ben Allal, von Werra, Jaggi, "Scaling Laws and Compute-Optimal
      Training Beyond Fixed Training Durations", 2024, arXiv 2405.18392 (the 1 - sqrt fall). Hu et
      al., "MiniCPM: Unveiling the Potential of Small Language Models with Scalable Training
      Strategies", 2024, arXiv 2404.06395 (the schedule).
    """
    call = f"warmup_stable_decay({peak}, {steps}, warmup={warmup}, decay={decay}, shape={shape!r})"
    if warmup < 0 or decay < 0 or warmup + decay > steps:
        raise ValueError(
            f"`{call}` expects `warmup` and `decay` of 0 or more that fit into `steps` together:"
            f" {warmup} + {decay} > {steps} or negative."
        )
    falls = {
        "1-sqrt": lambda x: 1 - jnp.sqrt(x),
        "linear": lambda x: 1 - x,
        "cosine": lambda x: (1 + jnp.cos(jnp.pi * x)) / 2,
    }
    if shape not in falls:
        raise ValueError(f"`{call}`: `shape` is one of {', '.join(map(repr, falls))}.")

    def schedule(step: jax.typing.ArrayLike) -> jax.Array:
        rise = _progress(step, 0, warmup)
        fall = falls[shape](_progress(step, steps - decay, steps) if decay else jnp.zeros(()))
        return peak * rise * fall + end * (1 - fall)

    return schedule


def cubic_sparsity(final: float, *, begin: int, end: int, initial: float = 0.0) -> optax.Schedule:
    """Raises the sparsity from `initial` to `final`, fast at first and ever slower.

        s(t) = final + (initial - final) · (1 - x)³,   x = clip((t - begin) / (end - begin), 0, 1)

    So it is `initial` until `begin` and `final` from `end` on.

    Args:
      final: the sparsity at the end, in [0, 1).
      begin: the step at which it starts to rise.
      end: the step at which it is reached.
      initial: the sparsity until `begin`, in [0, 1).

    Returns:
      A schedule for `jopt.prune.sparsify`.

    Raises:
      ValueError: if a sparsity is outside [0, 1), or `begin >= end`.

    Example:
      >>> from jopt import schedules
      >>> sparsity = schedules.cubic_sparsity(0.8, begin=100, end=300)
      >>> [round(float(sparsity(step)), 3) for step in (100, 200, 300)]
      [0.0, 0.7, 0.8]

    References:
      Zhu, Gupta, "To prune, or not to prune: exploring the efficacy of pruning for model
      compression", 2017, arXiv 1710.01878.
    """
    call = f"cubic_sparsity({final}, begin={begin}, end={end}, initial={initial})"
    _sparsities(call, [final, initial])
    if begin < 0 or end <= begin:
        raise ValueError(f"`{call}` expects steps with `0 <= begin < end`.")
    return lambda step: final + (initial - final) * (1 - _progress(step, begin, end)) ** 3


def steps_sparsity(points: Sequence[tuple[int, float]]) -> optax.Schedule:
    """Jumps to the given sparsity at each of the given steps, and stays there.

        s(t) = the sparsity of the last point whose step is <= t, and 0 before the first

    Sparsity counts from the whole: half of all weights at step 100 and half of what is left at step
    200 is `[(100, 0.5), (200, 0.75)]`.

    Args:
      points: pairs `(step, sparsity)` with increasing steps and sparsities in [0, 1).

    Returns:
      A schedule for `jopt.prune.sparsify`.

    Raises:
      ValueError: if there is no point, the steps do not increase, or a sparsity is outside [0, 1).

    Example:
      >>> from jopt import schedules
      >>> sparsity = schedules.steps_sparsity([(100, 0.5), (200, 0.75)])
      >>> [float(sparsity(step)) for step in (99, 100, 200)]
      [0.0, 0.5, 0.75]
    """
    call = f"steps_sparsity({list(points)})"
    _increasing(call, "steps", [step for step, _ in points])
    _sparsities(call, [sparsity for _, sparsity in points])

    def schedule(step: jax.typing.ArrayLike) -> jax.Array:
        step = jnp.asarray(step)
        value = jnp.zeros(step.shape, jnp.float32)
        for start, sparsity in points:
            value = jnp.where(step >= start, jnp.float32(sparsity), value)
        return value

    return schedule


def alternating_sparsity(final: float, *, begin: int, period: int, end: int) -> optax.Schedule:
    """Switches between dense and sparse phases of equal length, and stays sparse at the end.

        s(t) = 0                                              for t < begin
             = final if ⌊(t - begin) / period⌋ is even, else 0  for begin <= t < end
             = final                                          for t >= end

    Args:
      final: the sparsity of the sparse phases, in [0, 1).
      begin: the length of the first, dense phase.
      period: the length of each other phase.
      end: the step from which it is sparse for good.

    Returns:
      A schedule for `jopt.prune.ac_dc`, or for `sparsify(..., regrow=True)`.

    Raises:
      ValueError: if the sparsity is outside [0, 1), or not `0 <= begin <= end` and `period >= 1`.

    Example:
      >>> from jopt import schedules
      >>> sparsity = schedules.alternating_sparsity(0.9, begin=10, period=5, end=20)
      >>> [round(float(sparsity(step)), 3) for step in (9, 10, 14, 15, 19, 20, 25)]
      [0.0, 0.9, 0.9, 0.0, 0.0, 0.9, 0.9]

    References:
      Peste, Iofinova, Vladu, Alistarh, "AC/DC: Alternating Compressed/DeCompressed Training of Deep
      Neural Networks", 2021, arXiv 2106.12379.
    """
    call = f"alternating_sparsity({final}, begin={begin}, period={period}, end={end})"
    _sparsities(call, [final])
    traced = any(isinstance(option, Tracer) for option in (begin, period, end))
    if not traced and (period < 1 or not 0 <= begin <= end):
        raise ValueError(f"`{call}` expects steps with `0 <= begin <= end` and `period >= 1`.")

    def schedule(step: jax.typing.ArrayLike) -> jax.Array:
        step = jnp.asarray(step)
        sparse = jnp.floor_divide(step - begin, period) % 2 == 0
        sparse = (step >= begin) & (sparse | (step >= end))
        return jnp.where(sparse, jnp.asarray(final, jnp.float32), jnp.float32(0))

    return schedule


def is_number(value: Any) -> bool:
    """Whether it is one number, traced or not: no array of several, no text, no bool."""
    known = isinstance(value, int | float | np.number | np.ndarray | jax.Array)
    return known and not isinstance(value, bool) and np.ndim(value) == 0


def whole_steps(count: Any) -> bool:
    """Whether it is one number of steps from 1 on, as far as that is known without tracing."""
    if not is_number(count):
        return False
    return isinstance(count, Tracer) or (float(count) >= 1 and float(count) % 1 == 0)


def _float(step: jax.typing.ArrayLike) -> jax.Array:
    return jnp.asarray(step).astype(jnp.float32)


def _progress(step: jax.typing.ArrayLike, begin: int, end: int) -> jax.Array:
    """How far `step` is from `begin` to `end`, from 0 to 1; 1 where there is no way to go."""
    # The difference is taken in the step's own dtype: float32 would lose digits of large steps.
    passed = _float(jnp.asarray(step) - begin)
    return jnp.clip(passed / (end - begin), 0.0, 1.0) if end > begin else jnp.ones_like(passed)


def _increasing(call: str, name: str, steps: Sequence[Any]) -> None:
    if not steps or list(steps) != sorted(set(steps)) or min(steps) < 0:
        raise ValueError(f"`{call}` expects {name} of 0 or more that strictly increase.")


def _sparsities(call: str, values: Sequence[float]) -> None:
    for value in values:
        if not isinstance(value, Tracer) and not 0 <= value < 1:
            raise ValueError(
                f"`{call}` expects sparsities in [0, 1), the fraction of weights that are zero;"
                f" {value} is not."
            )
