"""Observers: how the range of an activation is found from what it was on some batches.

An observer is a static rule of three pure functions: `init` gives a state of arrays, `update` adds
values to it, `range` reads the range off it for a format. States have one entry for each part that
is observed apart: one for a tensor, one a channel, one a token.
"""

import abc
import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jopt.trace import reductions

from .._formats.base import Format
from .._leaves.weights import Range
from . import histogram


class Extremes(NamedTuple):
    """The lowest and highest value seen, or averages of them."""

    low: jax.Array  # float32; infinity where nothing was seen
    high: jax.Array  # float32; minus infinity there


class Binned(NamedTuple):
    """A histogram of what was seen."""

    low: jax.Array  # float32, where the first bin begins
    high: jax.Array  # float32, where the last bin ends
    counts: jax.Array  # float32, an axis more than low and high


class Observer(abc.ABC):
    """How ranges are found; subclasses are frozen dataclasses.

    `init`, `update` and, for observers without a histogram, `range` run under `jit` and `vmap`. A
    range always includes zero, which every format has a code for.
    """

    @abc.abstractmethod
    def init(self, shape: tuple[int, ...] = ()) -> Any:
        """The state of having seen nothing, with an entry for each part of that shape."""

    @abc.abstractmethod
    def update(self, state: Any, x: jax.Array, *, keep: tuple[int, ...] = ()) -> Any:
        """The state after seeing `x` as well.

        Args:
          state: as `init` and `update` return it.
          x: floating array.
          keep: the axes of `x` along which parts are observed apart, in the order of the state's:
            none for the whole tensor, `(-1,)` for channels, all but the last for tokens.
        """

    @abc.abstractmethod
    def range(self, state: Any, format: Format) -> Range:
        """The range of each part, for activations in that format."""


class ExtremesObserver(Observer):
    """An observer of each batch's smallest and largest value. Subclasses say how they `fold`."""

    @abc.abstractmethod
    def fold(self, state: Extremes, new: Extremes) -> Extremes:
        """The state after a batch of those extremes."""

    def init(self, shape: tuple[int, ...] = ()) -> Extremes:
        """Nothing seen."""
        return Extremes(jnp.full(shape, jnp.inf), jnp.full(shape, -jnp.inf))

    def update(self, state: Extremes, x: jax.Array, *, keep: tuple[int, ...] = ()) -> Extremes:
        """Folds in the extremes of `x`."""
        return self.fold(state, extremes(_parts(x, keep)))

    def range(self, state: Extremes, format: Format) -> Range:
        """From the low to the high of the state."""
        return _with_zero(state.low, state.high)


@dataclasses.dataclass(frozen=True)
class MinMax(ExtremesObserver):
    """From the smallest to the largest value seen.

    Equal to PyTorch's `MinMaxObserver`, and with kept axes to `PerChannelMinMaxObserver`.

    Example:
      >>> import jax.numpy as jnp
      >>> from jopt.quant import Int, MinMax
      >>> observer = MinMax()
      >>> state = observer.update(observer.init(), jnp.array([-1.0, 3.0]))
      >>> [float(end) for end in observer.range(state, Int(8))]
      [-1.0, 3.0]
    """

    def fold(self, state: Extremes, new: Extremes) -> Extremes:
        """Widens the range."""
        return Extremes(jnp.minimum(state.low, new.low), jnp.maximum(state.high, new.high))


@dataclasses.dataclass(frozen=True)
class MovingAverage(ExtremesObserver):
    """A moving average of each batch's smallest and largest value.

        low ← low + (1 - momentum) (min(x) - low),   likewise high; the first batch as it is

    Equal to PyTorch's `MovingAverageMinMaxObserver`, whose averaging constant is 1 - momentum.

    Args:
      momentum: how much of the average a batch keeps, from 0 up to and without 1.

    References:
      Benoit Jacob et al., Quantization and training of neural networks for efficient
      integer-arithmetic-only inference, 2017, arXiv:1712.05877.
    """

    momentum: float = 0.99

    def __post_init__(self) -> None:
        """Checks the momentum."""
        _within("MovingAverage", "momentum", self.momentum, 0 <= self.momentum < 1, "in [0, 1)")

    def fold(self, state: Extremes, new: Extremes) -> Extremes:
        """Moves the range towards the new one."""

        def move(old: jax.Array, end: jax.Array) -> jax.Array:
            old = jnp.where(jnp.isinf(old), end, old)  # the first batch
            return jnp.where(jnp.isinf(end), old, old + (1 - self.momentum) * (end - old))

        return Extremes(move(state.low, new.low), move(state.high, new.high))


class HistogramObserver(Observer):
    """An observer that reads its range off a histogram. Subclasses say how in `search`.

    A stream is counted on the range seen so far; where a batch is wider, what was counted before
    moves to the wider range, each bin in 16 parts. `calibrate` goes over the batches twice instead,
    and counts on the range of them all. `range` looks at numbers, so it runs outside of `jit`.
    Infinities are not counted.
    """

    bins: int

    @abc.abstractmethod
    def search(
        self, counts: np.ndarray, low: float, high: float, format: Format
    ) -> tuple[float, float]:
        """The range for one histogram of `counts` from `low` to `high`."""

    def ends(self, low: jax.Array, high: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Where a histogram of values between `low` and `high` begins and ends."""
        return low, high

    def init(self, shape: tuple[int, ...] = ()) -> Binned:
        """Nothing seen."""
        counts = jnp.zeros((*shape, self.bins))
        return Binned(jnp.full(shape, jnp.inf), jnp.full(shape, -jnp.inf), counts)

    def update(self, state: Binned, x: jax.Array, *, keep: tuple[int, ...] = ()) -> Binned:
        """Counts the values of `x`."""
        x = _parts(x, keep)
        new = extremes(x, finite=True)
        seen = MinMax().fold(Extremes(state.low, state.high), new)
        empty = seen.low > seen.high
        low, high = self.ends(*(jnp.where(empty, 0.0, end) for end in seen))
        first = state.low > state.high
        old_low, old_high = jnp.where(first, low, state.low), jnp.where(first, high, state.high)
        counts = histogram.moved(state.counts, old_low, old_high, low, high)
        counts = counts + histogram.count(x, low, high, self.bins)
        low, high = (jnp.where(empty, *pair) for pair in ((state.low, low), (state.high, high)))
        return Binned(low, high, counts)

    def range(self, state: Binned, format: Format) -> Range:
        """The range that `search` finds for each part."""
        low, high, counts = (np.asarray(array) for array in state)
        found = np.zeros((2, *low.shape), np.float32)
        for index in np.ndindex(low.shape):
            begin, end = float(low[index]), float(high[index])
            found[:, *index] = begin, end
            if begin < end:
                found[:, *index] = self.search(counts[index], begin, end, format)
        return _with_zero(jnp.asarray(found[0]), jnp.asarray(found[1]))


@dataclasses.dataclass(frozen=True)
class Histogram(HistogramObserver):
    """The range of least squared error that PyTorch's `HistogramObserver` finds.

    From both ends of the histogram the fraction 1e-5 of all values is given up at a time, where
    that takes more bins, until the squared error of rounding what is left to 2^bits levels rises.

    Args:
      bins: of the histogram.
    """

    bins: int = 2048

    def __post_init__(self) -> None:
        """Checks the bins."""
        _bins("Histogram", self.bins)

    def search(
        self, counts: np.ndarray, low: float, high: float, format: Format
    ) -> tuple[float, float]:
        """As above."""
        return histogram.least_squares(counts, low, high, 2**format.bits)


@dataclasses.dataclass(frozen=True)
class Percentile(HistogramObserver):
    """The range that holds `percent` of all values, the rest divided evenly among both ends.

    For a symmetric format the magnitudes are taken. Within a bin values count as spread evenly.

    Args:
      percent: above 50, at most 100.
      bins: of the histogram.

    References:
      Hao Wu et al., Integer quantization for deep learning inference: principles and empirical
      evaluation, 2020, arXiv:2004.09602.
    """

    percent: float = 99.99
    bins: int = 2048

    def __post_init__(self) -> None:
        """Checks the arguments."""
        _bins("Percentile", self.bins)
        fits = 50 < self.percent <= 100
        _within("Percentile", "percent", self.percent, fits, "above 50 and at most 100")

    def search(
        self, counts: np.ndarray, low: float, high: float, format: Format
    ) -> tuple[float, float]:
        """As above."""
        beyond = 1 - self.percent / 100
        if histogram.format_is_symmetric(format):
            # Bisection on how much lies within ±end: bins need not lie evenly about zero.
            end = _within_magnitude(counts, low, high, 1 - beyond)
            return -end, end
        return (
            histogram.quantile(counts, low, high, beyond / 2),
            histogram.quantile(counts, low, high, 1 - beyond / 2),
        )


@dataclasses.dataclass(frozen=True)
class MSE(HistogramObserver):
    """The range whose rounding, by the format itself, has the least squared error.

    Ends are tried in `steps` parts of the whole range: for a symmetric format both together, else
    also one after the other until neither gets better.

    Args:
      bins: of the histogram; a value counts as lying in the middle of its bin.
      steps: how finely an end is tried.

    References:
      Ron Banner, Yury Nahshan, Elad Hoffer, Daniel Soudry, Post training 4-bit quantization of
      convolution networks for rapid-deployment, 2018, arXiv:1810.05723 (clipping by squared error).
    """

    bins: int = 2048
    steps: int = 128

    def __post_init__(self) -> None:
        """Checks the arguments."""
        _bins("MSE", self.bins)
        _within("MSE", "steps", self.steps, self.steps >= 1, "at least 1")

    def search(
        self, counts: np.ndarray, low: float, high: float, format: Format
    ) -> tuple[float, float]:
        """As above."""
        return histogram.rounded_least_squares(counts, low, high, format, self.steps)


@dataclasses.dataclass(frozen=True)
class Entropy(HistogramObserver):
    """TensorRT's calibration: the clipping threshold whose rounding loses the least information.

    On a histogram of magnitudes, for each number of bins kept, the kept counts (all beyond added to
    the last) are compared by Kullback–Leibler divergence with their version in 2^(bits-1) levels,
    each level spread evenly over its non-empty bins. The best number m gives the threshold
    (m + ½) × the width of a bin; the range is what of -threshold to threshold has values. Where a
    format has a zero point and all values one sign, there are 2^bits levels. Zeros, which every
    range holds exactly, say nothing of where to clip, and those of a ReLU would outweigh all else:
    the first bin counts as much as the second.

    Args:
      bins: of the histogram of magnitudes.

    References:
      Szymon Migacz, 8-bit inference with TensorRT, GPU Technology Conference, 2017.
    """

    bins: int = 4096  # of both signs: 2048 of magnitudes

    def __post_init__(self) -> None:
        """Checks the bins."""
        _bins("Entropy", self.bins)
        _within("Entropy", "bins", self.bins, self.bins % 2 == 0, "even, one half for each sign")

    def ends(self, low: jax.Array, high: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Evenly about zero, so that two bins of one magnitude can be added."""
        most = jnp.maximum(-low, high)
        return -most, most

    def search(
        self, counts: np.ndarray, low: float, high: float, format: Format
    ) -> tuple[float, float]:
        """As above."""
        half = self.bins // 2
        below, above = counts[:half][::-1], counts[half:]
        one_sided = not below.any() or not above.any()
        affine = not histogram.format_is_symmetric(format)
        levels = 2 ** (format.bits - (0 if affine and one_sided else 1))
        magnitudes = below + above
        magnitudes[0] = magnitudes[1]
        end = high * histogram.entropy(magnitudes, levels)
        if not affine:
            return -end, end
        width = high / half
        least = -width * (np.flatnonzero(below)[-1:].sum() + 1 if below.any() else 0)
        most = width * (np.flatnonzero(above)[-1:].sum() + 1 if above.any() else 0)
        return max(-end, least), min(end, most)


OBSERVERS: dict[str, Callable[[], Observer]] = {
    "minmax": MinMax,
    "moving_average": MovingAverage,
    "percentile": Percentile,
    "mse": MSE,
    "entropy": Entropy,
    "histogram": Histogram,
}


def extremes(x: jax.Array, *, finite: bool = False) -> Extremes:
    """The lowest and highest of the last axis; `finite` leaves infinities and NaN out."""
    x = x.astype(jnp.float32)
    if not finite:
        low, high = reductions.ends(x, -1, initial=(np.inf, -np.inf))
        lost = jnp.any(jnp.isnan(x), -1)
        return Extremes(jnp.where(lost, jnp.nan, low), jnp.where(lost, jnp.nan, high))
    fits = jnp.isfinite(x)
    low, high = jnp.where(fits, x, jnp.inf), jnp.where(fits, x, -jnp.inf)
    return Extremes(
        jnp.min(low, axis=-1, initial=jnp.inf), jnp.max(high, axis=-1, initial=-jnp.inf)
    )


# Helpers, in order of use.


def _parts(x: jax.Array, keep: tuple[int, ...]) -> jax.Array:
    """`[*kept, N]`: the values of each part that is observed apart."""
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"`update(state, x)` needs a floating x, got {x.dtype}.")
    if any(not -x.ndim <= axis < x.ndim for axis in keep):
        raise ValueError(f"`update(..., keep={keep})`: x has shape {x.shape}.")
    first = [axis % x.ndim for axis in keep]
    rest = [axis for axis in range(x.ndim) if axis not in first]
    return jnp.transpose(x, (*first, *rest)).reshape(
        *(x.shape[axis] for axis in first), math.prod(x.shape[axis] for axis in rest)
    )


def _with_zero(low: jax.Array, high: jax.Array) -> Range:
    low = jnp.where(low == jnp.inf, 0.0, low)
    high = jnp.where(high == -jnp.inf, 0.0, high)
    return Range(jnp.minimum(low, 0.0), jnp.maximum(high, 0.0))


def _within_magnitude(counts: np.ndarray, low: float, high: float, fraction: float) -> float:
    """The end such that `fraction` of the counts lie between -end and end."""
    bounds = np.linspace(low, high, len(counts) + 1)
    below = np.concatenate([[0.0], np.cumsum(counts, dtype=np.float64)])
    ends = np.unique(np.concatenate([[0.0], np.abs(bounds)]))
    held = np.interp(ends, bounds, below) - np.interp(-ends, bounds, below)
    reached = int(np.searchsorted(held, fraction * below[-1], side="left"))
    reached = min(max(reached, 1), len(ends) - 1)
    (a, b), (at, to) = held[reached - 1 : reached + 1], ends[reached - 1 : reached + 1]
    return float(to if b <= a else at + (to - at) * min((fraction * below[-1] - a) / (b - a), 1.0))


def _bins(name: str, bins: int) -> None:
    _within(name, "bins", bins, isinstance(bins, int) and bins >= 2, "an integer of at least 2")


def _within(name: str, argument: str, value: Any, fits: bool, what: str) -> None:
    if not fits:
        raise ValueError(f"`{name}({argument}={value!r})`: {argument} must be {what}.")
