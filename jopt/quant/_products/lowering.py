"""Which implementation a quantized product runs by, chosen per platform when it is traced.

The choice follows from the kinds of the operands, the shape [rows, inputs] x [inputs, outputs] and
measured times (`timings.py`): the nearest measured shape decides, in log space. What each
implementation computes is in `implementations.py`.
"""

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax

from jopt import backends

from . import timings
from .timings import Timings

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
KERNELS = ("cuda", "tpu")  # platforms that compile Pallas kernels
# Below this many values in the weight no choice matters, and the plain form is the easiest to read.
SMALL = 64 * 1024
# An implementation that makes the whole weight dense may take this share of another's time.
WORTH = 0.5


class Case(NamedTuple):
    """What is known of a product when it is traced."""

    kind: str  # of operands: "w8a8", "w4-group", ...
    rows: int | None  # None: not known, as when exported for any batch
    inputs: int
    outputs: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """The implementation for each platform, and why."""

    names: tuple[str, ...]  # in the order of PLATFORMS
    reasons: tuple[str, ...]

    @property
    def only(self) -> str | None:
        """The one implementation for all platforms, or None."""
        return self.names[0] if len(set(self.names)) == 1 else None

    def describe(self, plain: str) -> str:
        """What differs from `plain`, for `explain`; empty if nothing does."""
        said: dict[tuple[str, str], list[str]] = {}
        for platform, name, why in zip(PLATFORMS, self.names, self.reasons, strict=True):
            if name != plain:
                said.setdefault((name, why), []).append(platform)
        return ", ".join(f"`{name}` on {'/'.join(on)} ({why})" for (name, why), on in said.items())


@dataclasses.dataclass(frozen=True)
class _Settings:
    table: Timings | None = None
    implementation: str | None = None


# Part of the key of JAX's caches, so that a change is seen by functions compiled before.
_settings = jax.make_user_context(None)


@contextlib.contextmanager
def use_table(table: str | os.PathLike[str] | Timings) -> Iterator[None]:
    """Lets measured times choose how quantized products are computed, within a `with` block.

    The table counts for what is traced inside the block, for the backend it was measured on; jopt's
    own table serves the rest. The environment variable `JOPT_PRODUCTS=FILE` does the same for a
    whole process. Without either no file of the user is read: the choice depends on the program and
    on whether this machine's CPU has units for products of bfloat16, and on nothing else.
    What implementations of one product compute differs by rounding of float32 sums.

    Args:
      table: a file that `jopt profile --tune` wrote, or the table itself. A file that is damaged,
        or was measured with another version of JAX or on another kind of device, is ignored with a
        warning.

    Example:
      >>> from jopt.quant import use_table
      >>> with use_table("products.json"):  # doctest: +SKIP
      ...     y = jax.jit(jopt.lift(apply))(params, x)
    """
    found = table if isinstance(table, Timings) else timings.read(table)
    with _changed(table=found):
        yield


@contextlib.contextmanager
def use_implementation(name: str) -> Iterator[None]:
    """Computes quantized products by one implementation wherever it can, within a `with` block.

    For measurements and tests, and for what jopt does not choose by itself (`"pallas"`, where
    `jopt profile --tune` has not measured it). Products that it cannot serve are computed as ever.

    Args:
      name: such as `"dense"`, `"integers"`, `"tiled"`, `"pallas"`.

    Raises:
      ValueError: if there is no implementation of that name.

    Example:
      >>> from jopt.quant import use_implementation
      >>> with use_implementation("dense"):
      ...     pass
    """
    from .implementations import NAMES

    if name not in NAMES:
        known = ", ".join(f"`{known}`" for known in NAMES)
        raise ValueError(f"`use_implementation({name!r})`: the implementations are {known}.")
    with _changed(implementation=name):
        yield


def plan(case: Case, possible: Sequence[str], plain: str) -> Plan:
    """The implementation of a product for each platform.

    Args:
      case: the product.
      possible: names of the implementations that can serve it, `plain` among them.
      plain: the one to take where nothing speaks for another.
    """
    settings = _settings.value or _Settings()
    if settings.implementation in possible:
        name = str(settings.implementation)
        served = KERNELS if name == "pallas" else PLATFORMS
        names = tuple(name if platform in served else plain for platform in PLATFORMS)
        return Plan(names, ("as asked for",) * len(PLATFORMS))
    table = settings.table
    if table is None and (path := os.environ.get("JOPT_PRODUCTS")):
        table = timings.from_environment(path)
    chosen = [_chosen(platform, table, case, possible, plain) for platform in PLATFORMS]
    return Plan(tuple(name for name, _ in chosen), tuple(why for _, why in chosen))


def fastest(times: dict[str, float]) -> str:
    """The fastest; of those that are nearly so, one that does not make the weight dense."""
    best = min(times, key=times.__getitem__)
    spare = lean(times)
    least = min(spare, key=spare.__getitem__)
    return least if times[best] >= WORTH * times[least] else best


def lean(times: dict[str, float]) -> dict[str, float]:
    """The times of what does not make the whole weight dense, where there is such."""
    whole = ["dense"] + ["bfloat16"] * any(name.endswith(("striped", "half")) for name in times)
    spare = {name: t for name, t in times.items() if name.split("_")[-1] not in whole}
    return spare or times


# Helpers, in order of use.


@contextlib.contextmanager
def _changed(**changes: object) -> Iterator[None]:
    settings = dataclasses.replace(_settings.value or _Settings(), **changes)
    with _settings(settings):
        yield


def _chosen(
    platform: str, table: Timings | None, case: Case, possible: Sequence[str], plain: str
) -> tuple[str, str]:
    if plain != "float8" and (case.inputs * case.outputs < SMALL or case.rows == 0):
        return plain, "small"
    rows = 64 if case.rows is None else case.rows
    tables = [table, timings.built_in().get(platform)]
    for known in tables:
        if known is None or known.backend != platform:
            continue
        timing = known.nearest(case.kind, rows, case.inputs, case.outputs)
        times = {n: t for n, t in timing.microseconds if n in possible} if timing else {}
        if timing and times:
            name = fastest(times)
            shape = f"{timing.rows}×{timing.inputs}×{timing.outputs}"
            others = [time for other, time in times.items() if other == plain != name]
            gain = f", {others[0] / times[name]:.1f} times as fast as `{plain}`" if others else ""
            return name, f"measured at {shape}{gain}"
    if plain == "float8":
        # Only Nvidia has units for e4m3fn and e5m2 that XLA multiplies without a cast before.
        return (plain, "") if platform == "cuda" else ("dense", "no units for float8")
    wanted = backends.choices(platform).weights_alone
    if plain == "dense" and wanted in possible:
        return wanted, "does not make the whole weight dense"
    return plain, "not measured"
