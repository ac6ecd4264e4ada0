"""Tables of measured times: which implementation of a quantized product is fastest where.

A table belongs to one backend and one kind of device. `jopt profile --tune` writes one; nothing is
read unless `use_table` or the environment variable `JOPT_PRODUCTS` names the file. Two come with
jopt: of a CPU with AMX, and of one with AVX-512 and units for products of bfloat16, which is for
all others; where there are no such units those products do not count.
"""

import contextlib
import dataclasses
import functools
import json
import math
import os
import pathlib
import platform
import re
import reprlib
import warnings
from collections.abc import Sequence
from typing import Any

import jax

FORMAT = "jopt products 1"
# What a CPU must have one of for products of bfloat16 to be fast: about half of float32's time with
# such units, twice float32's without them.
BFLOAT16_UNITS = frozenset({"avx512_bf16", "amx_bf16"})
# Of what a CPU can do, what products get fast by.
UNITS = frozenset({"avx2", "avx_vnni", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16"})
# The largest size, and the longest time in microseconds, that a file may say: still exact floats.
LARGEST = 2**53


@dataclasses.dataclass(frozen=True)
class Timing:
    """How long one product takes by each implementation that was tried."""

    kind: str  # of operands, such as "w8a8" or "w4-group"
    rows: int  # of the activation
    inputs: int  # summed over
    outputs: int  # of the weight
    microseconds: tuple[tuple[str, float], ...]  # by implementation

    def __post_init__(self) -> None:
        """Makes tuples of lists: a table is part of the keys of JAX's caches."""
        object.__setattr__(self, "microseconds", tuple(map(tuple, self.microseconds)))


@dataclasses.dataclass(frozen=True)
class Timings:
    """The measurements of one device."""

    backend: str  # "cpu", "cuda", "rocm" or "tpu"
    device: str  # the kind of device, as JAX names it
    jax_version: str
    entries: tuple[Timing, ...]

    def __post_init__(self) -> None:
        """Makes a tuple of a list, as `Timing` does."""
        object.__setattr__(self, "entries", tuple(self.entries))

    def nearest(self, kind: str, rows: int, inputs: int, outputs: int) -> Timing | None:
        """The measurement of this kind whose shape is nearest, in log space."""
        shape = (rows, inputs, outputs)

        def distance(timing: Timing) -> float:
            measured = (timing.rows, timing.inputs, timing.outputs)
            return sum(math.log2(a / b) ** 2 for a, b in zip(shape, measured, strict=True))

        return min((t for t in self.entries if t.kind == kind), key=distance, default=None)


def here(entries: Sequence[Timing]) -> Timings:
    """Measurements made by this process on its default device."""
    return Timings(backend(), device(), jax.__version__, tuple(entries))


def backend() -> str:
    """The name that lowering has for the default backend."""
    name = jax.default_backend()
    if name != "gpu":
        return name
    return "rocm" if "rocm" in jax.devices()[0].client.platform_version.lower() else "cuda"


@functools.cache
def device() -> str:
    """The kind of the default device; of a CPU, which JAX calls `cpu`, model, cores and units."""
    kind = jax.devices()[0].device_kind
    if backend() != "cpu":
        return kind
    model = _of_cpu("model name") or platform.processor() or platform.machine()
    units = " and ".join(sorted(UNITS & cpu_units()))  # one name may stand for several CPUs
    return f"{model}, {os.cpu_count()} cores" + (f" with {units}" if units else "")


@functools.cache
def cpu_units() -> frozenset[str]:
    """What the CPU of this machine can do, as Linux lists it; elsewhere nothing is known."""
    return frozenset(_of_cpu("flags").split())


def cache_path() -> pathlib.Path:
    """Where `jopt profile --tune` writes by default: one file a backend, device and JAX version."""
    root = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    kind = re.sub(r"[^a-z0-9]+", "-", device().lower()).strip("-")
    name = f"products-{backend()}-{kind}-jax{jax.__version__}.json"
    return pathlib.Path(root) / "jopt" / name


def write_table(timings: Timings, path: str | os.PathLike[str]) -> None:
    """Writes a table so that a reader sees the old file or the new one, never a part."""
    path = pathlib.Path(path)
    rows = [
        {
            "kind": t.kind,
            "shape": [t.rows, t.inputs, t.outputs],
            "microseconds": {name: round(time, 2) for name, time in t.microseconds},
        }
        for t in timings.entries
    ]
    head = {
        "format": FORMAT,
        "backend": timings.backend,
        "device": timings.device,
        "jax": timings.jax_version,
    }
    lines = ",\n".join(f"    {json.dumps(row)}" for row in rows)
    text = json.dumps(head, indent=2)[:-2] + f',\n  "products": [\n{lines}\n  ]\n}}\n'
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        part.write_text(text)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def parse(text: str) -> Timings:
    """The table in a file's text, which may come from anyone.

    Raises:
      ValueError: if it is not what `write_table` writes.
    """
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it is no JSON ({error})") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f'its "format" is not "{FORMAT}"')
    heads = [content.get(name) for name in ("backend", "device", "jax")]
    rows = content.get("products")
    if not all(isinstance(head, str) for head in heads) or not isinstance(rows, list):
        raise ValueError('it lacks "backend", "device", "jax" or "products"')
    entries = tuple(_timing(row) for row in rows)
    platform_name, kind, version = (str(head) for head in heads)
    return Timings(platform_name, kind, version, entries)


def _timing(row: Any) -> Timing:
    def positive(value: Any, kind: Any) -> bool:
        number = isinstance(value, kind) and not isinstance(value, bool)
        return number and 0 < value <= LARGEST

    if isinstance(row, dict) and set(row) == {"kind", "shape", "microseconds"}:
        kind, shape, times = row["kind"], row["shape"], row["microseconds"]
        if (
            isinstance(kind, str)
            and isinstance(shape, list)
            and len(shape) == 3
            and all(positive(size, int) for size in shape)
            and isinstance(times, dict)
            and all(positive(time, (int, float)) for time in times.values())
        ):
            rows, inputs, outputs = shape
            known = tuple((name, float(time)) for name, time in times.items())
            return Timing(kind, rows, inputs, outputs, known)
    raise ValueError(f"one of its products is {reprlib.repr(row)}")


def read(path: str | os.PathLike[str]) -> Timings | None:
    """A table from a file; None, with a warning that says why, where it is of no use here."""
    name = str(path)
    try:
        timings = parse(pathlib.Path(path).read_text())
    except (OSError, ValueError) as error:
        return _ignored(name, str(error))
    if timings.jax_version != jax.__version__:
        return _ignored(
            name, f"it was measured with JAX {timings.jax_version}, not {jax.__version__}"
        )
    if timings.backend == backend() and timings.device != device():
        return _ignored(name, f"it was measured on {timings.device!r}, not {device()!r}")
    return timings


def _of_cpu(field: str) -> str:
    """A field of what Linux says of the first core; empty where it says nothing."""
    with contextlib.suppress(OSError):
        text = pathlib.Path("/proc/cpuinfo").read_text()
        found = re.search(rf"^{field}\s*:\s*(.+)$", text, re.MULTILINE)
        return found.group(1) if found else ""
    return ""


def _ignored(name: str, why: str) -> None:
    warnings.warn(
        f"The table of products `{name}` is ignored: {why}.\n"
        "Measure anew with `jopt profile --tune`; until then jopt's own table decides.",
        stacklevel=3,
    )


def built_in() -> dict[str, Timings]:
    """What jopt's own table says of this machine, by backend."""
    units = cpu_units()
    name = "measured_cpu_amx.json" if "amx_int8" in units else "measured_cpu.json"
    return {"cpu": _shipped(name, bfloat16=bool(BFLOAT16_UNITS & units))}


@functools.cache
def _shipped(name: str, *, bfloat16: bool) -> Timings:
    """A table of jopt's, without products of bfloat16 where operands of another type can serve."""
    table = parse((pathlib.Path(__file__).parent / name).read_text())
    if bfloat16:
        return table

    def left(timing: Timing) -> Timing:
        if "a16" in timing.kind:  # the activations are bfloat16 already
            return timing
        others = tuple(t for t in timing.microseconds if not t[0].endswith("bfloat16"))
        return dataclasses.replace(timing, microseconds=others)

    return dataclasses.replace(table, entries=tuple(map(left, table.entries)))


@functools.cache
def from_environment(path: str) -> Timings | None:
    """The table that `JOPT_PRODUCTS` names, read once."""
    return read(path)
