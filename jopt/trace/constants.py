"""Arrays that a function closes over: baked into it, and out of reach of everything here."""

import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

from jopt import trees

from . import compat
from .program import program

WARNED_BYTES = 2**20  # more than tables and masks usually take


class Constant(NamedTuple):
    """An array that a function does not get as an argument."""

    shape: tuple[int, ...]
    dtype: Any
    bytes: int
    source: str  # the user's line that uses it first


def constants(apply: Callable[..., Any], params: Any, *inputs: Any) -> tuple[Constant, ...]:
    """Lists the arrays that `apply(params, *inputs)` closes over, the largest first.

    Such an array is no parameter: it can be neither quantized nor pruned nor trained, and becomes a
    part of every compiled and exported program. Weights belong into `params`.

    Args:
      apply: any JAX function.
      params: its parameters; arrays may be `jax.ShapeDtypeStruct`s.
      *inputs: its other arguments, likewise.

    Example:
      >>> import jax.numpy as jnp
      >>> from jopt.trace import constants
      >>> table = jnp.ones((3, 2))
      >>> [(c.shape, c.bytes) for c in constants(lambda p, x: x @ table, {}, jnp.ones((1, 3)))]
      [((3, 2), 24)]
    """
    return baked(program(apply, (params, *inputs), opened=True).jaxpr)


def warn_of(jaxpr: Any, caller: str) -> None:
    """Warns if a traced function has many bytes of constants."""
    found = baked(jaxpr)
    total = sum(constant.bytes for constant in found)
    if total >= WARNED_BYTES:
        largest = found[0]
        warnings.warn(
            f"`{caller}`: {total / 2**20:,.1f} MB of constants are baked into the function, the "
            f"largest {largest.dtype}{list(largest.shape)} ({largest.source}). Arrays that a "
            "function closes over are no parameters: they can be neither quantized nor pruned. "
            "Pass them as arguments.",
            UserWarning,
            stacklevel=3,
        )


def baked(jaxpr: Any) -> tuple[Constant, ...]:
    """The array constants of a jaxpr and of all inside it, each once, the largest first."""
    found: dict[int, Constant] = {}
    _gather(jaxpr, found)
    return tuple(sorted(found.values(), key=lambda constant: -constant.bytes))


def _gather(jaxpr: Any, found: dict[int, Constant]) -> None:
    jaxpr, values = compat.opened(jaxpr)
    named = dict(zip(jaxpr.constvars, values, strict=False))
    for reader in [*jaxpr.eqns, None]:  # None: the function itself returns it
        for atom in jaxpr.outvars if reader is None else reader.invars:
            value: Any = atom.val if isinstance(atom, compat.Literal) else named.get(atom)
            size = math.prod(getattr(value, "shape", ()))
            if size > 1 and id(value) not in found:
                bytes = -(-size * trees.bits_of(value) // 8)
                used = "returned as it is" if reader is None else compat.source_of(reader)
                found[id(value)] = Constant(tuple(value.shape), value.dtype, bytes, used)
    for equation in jaxpr.eqns:
        for body in compat.bodies(equation):
            _gather(body, found)
