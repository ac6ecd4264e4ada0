"""jopt: model optimization for JAX, as pure functions over the model you already have.

`jopt.lift`, `jopt.sites`, `jopt.taps` and `jopt.size` act on any function and its parameters;
`jopt.prune`, `jopt.quant`, `jopt.distill` and `jopt.schedules` make the pieces of a train step. The
rooms above them (`jopt.nn`, `jopt.data`, `jopt.train`, `jopt.artifact`, `jopt.report`,
`jopt.recipe`) load when first used.
"""

import importlib
from typing import Any

from jopt import distill as distill
from jopt import prune as prune
from jopt import quant as quant
from jopt import schedules as schedules
from jopt import trace as trace
from jopt import trees as trees
from jopt.trace import lift as lift
from jopt.trace import sites as sites
from jopt.trace import taps as taps
from jopt.trees import size as size

__version__ = "0.1.0"

_LATER = (
    "artifact",
    "data",
    "nn",
    "recipe",
    "report",
    "train",
)  # these need flax or the extra `run`


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return importlib.import_module(f"jopt.{name}")
    raise AttributeError(f"module `jopt` has no attribute `{name}`")


def __dir__() -> list[str]:
    return sorted([*globals(), *_LATER])
