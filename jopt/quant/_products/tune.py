"""Measures the implementations of quantized products on this machine, for a table of times."""

import functools
import math
import random
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jopt.trace import lift

from .._formats.base import Grid, Int
from .._formats.bfloat16 import BFloat16
from .._leaves.weights import QArray
from .._policy import Spec
from .._quantize import quantize
from . import kernels, timings
from .implementations import possible
from .lowering import use_implementation
from .operands import Operands
from .timings import Timing, Timings

Shape = tuple[int, int, int]
GROUP = 64
# To how many places in memory operands are copied: with few rows it matters where they lie.
PLACES = 3
# Products of at most so many multiplications are measured so many at a time.
SHORT, LAYERS = 64 * 2048 * 2048, 3

# What `jopt profile --tune` measures without being told.
COMMON_SHAPES: tuple[Shape, ...] = tuple(
    (rows, size, size) for size in (512, 1024, 2048, 4096) for rows in (1, 8, 64, 512)
)

# What `tune` measures: the kinds of operands, as tables of times call them.
KINDS: dict[str, Spec] = {
    "w8a8": Spec(Int(8), Int(8)),
    "w4a8": Spec(Int(4), Int(8)),
    "w4a8-group": Spec(Int(4, granularity="group", group_size=GROUP), Int(8)),
    "w8": Spec(Int(8)),
    "w4": Spec(Int(4)),
    "w4-group": Spec(Int(4, granularity="group", group_size=GROUP)),
    "w8a16": Spec(Int(8), BFloat16()),
    "w4a16": Spec(Int(4), BFloat16()),
    "w4a16-group": Spec(Int(4, granularity="group", group_size=GROUP), BFloat16()),
}


def tune(
    shapes: Sequence[Shape],
    *,
    kinds: Sequence[str] | None = None,
    rounds: int = 10,
    seconds: float = 0.003,
    report: Callable[[Timing], None] | None = None,
) -> Timings:
    """Measures every implementation of quantized products of the given shapes on this machine.

    The implementations of one product take turns, in `rounds` short rounds, and the least time of
    each counts: whatever else a machine does only adds to a time. Use the result in
    `jopt.quant.use_table`, or as the command `jopt profile --tune`, which writes it to a file.

    Args:
      shapes: rows of the activation, inputs and outputs of the weight. `64` inputs or a multiple
        are needed where weights are grouped; other shapes are left out there, with a warning.
      kinds: of operands, such as `"w8a8"` or `"w4-group"`. Default: all.
      rounds: how many, at least one.
      seconds: how long one implementation runs in one round, about; positive.
      report: called with each result as it comes.

    Raises:
      ValueError: if a shape is not three positive integers, a kind is unknown, `rounds` or
        `seconds` is not positive, or nothing is left to measure.
    """
    if isinstance(rounds, bool) or not isinstance(rounds, int) or rounds < 1:
        raise ValueError(f"`tune(rounds={rounds!r})`: expected a positive integer, such as 10.")
    if not 0 < seconds < math.inf:
        raise ValueError(f"`tune(seconds={seconds!r})`: expected a positive number, such as 0.003.")
    for shape in shapes:
        if len(shape) != 3 or not all(isinstance(size, int) and size > 0 for size in shape):
            raise ValueError(f"`tune(...)`: a shape is (rows, inputs, outputs), got {shape!r}.")
    kinds = kinds or tuple(KINDS)
    for kind in kinds:
        if kind not in KINDS:
            raise ValueError(f"`tune(kinds=...)`: {kind!r} is none of {', '.join(KINDS)}.")
    pairs = [(kind, shape) for kind in kinds for shape in dict.fromkeys(shapes)]
    served = [pair for pair in pairs if _served(*pair)]
    left_out = dict.fromkeys("x".join(map(str, s)) for kind, s in pairs if not _served(kind, s))
    why = f"kinds in groups need {GROUP} inputs or a multiple, unlike {', '.join(left_out)}"
    if not served:
        raise ValueError(
            f"`tune(...)`: nothing to measure: {why if left_out else 'no shape is given'}."
        )
    if left_out:
        warnings.warn(f"`tune(...)` measures less than was asked for: {why}.", stacklevel=2)
    entries = []
    for kind, shape in served:
        entries.append(measured(kind, shape, rounds, seconds))
        if report is not None:
            report(entries[-1])
    return timings.here(entries)


def least_times(
    functions: dict[str, Callable[[], Any]], rounds: int, seconds: float, seed: int = 0
) -> dict[str, float]:
    """The least time of each function in seconds; each is called once before.

    They take turns, in another order each round: what ran before has left its values in the caches.
    """
    calls = {}
    for name, function in functions.items():
        jax.block_until_ready(function())
        began = time.perf_counter()
        jax.block_until_ready(function())
        calls[name] = max(1, round(seconds / max(time.perf_counter() - began, 1e-7)))
    least = dict.fromkeys(functions, float("inf"))
    order, shuffled = list(functions), random.Random(seed)
    for _ in range(rounds):
        shuffled.shuffle(order)
        for name in order:
            began = time.perf_counter()
            call(functions[name], calls[name])
            least[name] = min(least[name], (time.perf_counter() - began) / calls[name])
    return least


def call(function: Callable[[], Any], times: int) -> None:
    """Calls a compiled function so many times, one after the other as the layers of a model are.

    A GPU or TPU works off a queue. On CPU calls that do not wait for each other would run side by
    side, and what keeps one core busy would look as good as what keeps all of them busy.
    """
    for _ in range(times - 1):
        result = function()
        if jax.default_backend() == "cpu":
            jax.block_until_ready(result)
    jax.block_until_ready(function())


def measured(
    kind: str, shape: Shape, rounds: int, seconds: float, only: Sequence[str] = ()
) -> Timing:
    """The times of one product by every implementation that can serve it, or by those named.

    In a program of several that wait for each other, as layers do: what it takes to wake threads
    for one product counts as often as in a model.
    """
    rows, inputs, outputs = shape
    count = LAYERS if rows * inputs * outputs <= SHORT else 1
    keys = jax.random.split(jax.random.key(0))
    x = jax.random.normal(keys[0], (rows, inputs))
    leaf = quantize(jax.random.normal(keys[1], (inputs, outputs)), KINDS[kind])
    leaves = [leaf] * count
    programs = {}
    for name in [name for name in _names(leaf, x) if not only or name in only]:
        with use_implementation(name):
            programs[name] = jax.jit(lift(_layers)).lower(leaves, x).compile()
    least = dict.fromkeys(programs, float("inf"))
    for place in range(min(rounds, PLACES)):
        leaves, x = jax.tree.map(jnp.copy, (leaves, x))
        calls = {name: functools.partial(program, leaves, x) for name, program in programs.items()}
        found = least_times(calls, -(-rounds // PLACES), seconds, place)
        for name, seconds_each in found.items():
            least[name] = min(least[name], seconds_each / count)
    return Timing(kind, *shape, tuple((name, time * 1e6) for name, time in least.items()))


# Helpers, in order of use.


def _layers(weights: Sequence[Any], x: jax.Array) -> jax.Array:
    y = x
    for w in weights:
        y = x @ w
        first = y[0, 0]
        x = x + jnp.where(jnp.isnan(first), first, 0)  # nothing, but it has to be waited for
    return y


def _served(kind: str, shape: Shape) -> bool:
    """Whether weights of this kind can have this shape."""
    return not kind.endswith("-group") or shape[1] % GROUP == 0


def _names(leaf: QArray, x: jax.Array) -> list[str]:
    """The implementations that can serve a product."""
    grid, dtype, plain = None, x.dtype, "dense"
    if isinstance(leaf.activation, BFloat16):
        dtype, plain = jnp.bfloat16, "bfloat16"
    elif leaf.activation is not None:
        grid, dtype = Grid(jnp.ones((1, 1)), None), jnp.int8
    operands = Operands(x.astype(dtype), grid, leaf, False, None, x.dtype)
    names = [plain, *possible(operands)]
    if kernels.serves(operands) and timings.backend() in ("cuda", "tpu"):
        names.append("pallas")
    return list(dict.fromkeys(names))
