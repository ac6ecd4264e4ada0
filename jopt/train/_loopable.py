"""Whether a step may sit inside a compiled loop on its platform: the one place to ask."""

from collections.abc import Iterator
from typing import Any

from jopt import backends
from jopt.trace import compat

# What XLA:CPU runs many times slower inside a loop (jopt.backends has the measurement).
_SLOW = frozenset(
    {
        "conv_general_dilated",
        "reduce_window",
        "reduce_window_max",
        "reduce_window_min",
        "reduce_window_sum",
        "select_and_gather_add",
        "select_and_scatter",
        "select_and_scatter_add",
    }
)


def loops(jaxpr: Any, platform: str) -> bool:
    """Whether `platform` runs `jaxpr` as fast inside a compiled loop as outside.

    Looks through nested jaxprs, but not into branches that `lax.platform_dependent` keeps for other
    platforms.
    """
    if backends.choices(platform).loops_convolutions:
        return True
    return not any(name in _SLOW for name in _primitives(jaxpr, platform))


def _primitives(jaxpr: Any, platform: str) -> Iterator[str]:
    jaxpr, _ = compat.opened(jaxpr)
    for equation in jaxpr.eqns:
        yield equation.primitive.name
        for inner in _inner(equation, platform):
            yield from _primitives(inner, platform)


def _inner(equation: Any, platform: str) -> Iterator[Any]:
    if compat.branch_platforms(equation) is not None:
        yield from compat.branches_on(equation, platform)
        return
    for value in equation.params.values():
        for part in value if isinstance(value, tuple | list) else (value,):
            if hasattr(compat.opened(part)[0], "eqns"):
                yield part
