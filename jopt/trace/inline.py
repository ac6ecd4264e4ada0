"""A jaxpr with the calls that hold products inlined, so that one may stop within them."""

from collections.abc import Sequence
from typing import Any

import jax

from . import compat


def inlined(jaxpr: Any) -> Any:
    """The same equations with calls inlined, so that stops may lie within them."""
    invars = compat.opened(jaxpr)[0].invars
    avals = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in invars]
    return jax.make_jaxpr(lambda *values: _values(jaxpr, values))(*avals)


def _values(jaxpr: Any, operands: Sequence[Any]) -> list[Any]:
    jaxpr, constants = compat.opened(jaxpr)
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*constants, *operands], strict=True))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, compat.Literal) else values[atom]

    for equation in jaxpr.eqns:
        operands = [read(v) for v in equation.invars]
        with compat.context(equation):
            if equation.primitive in compat.CALLS and _has_products(equation):
                results = _values(compat.body_of(equation), operands)
            else:
                results = compat.bind(equation, operands)
        values.update(zip(equation.outvars, results, strict=True))
    return [read(v) for v in jaxpr.outvars]


def _has_products(equation: Any) -> bool:
    bodies = (compat.opened(body)[0] for body in compat.bodies(equation))
    return any(
        inner.primitive.name in ("dot_general", "conv_general_dilated") or _has_products(inner)
        for body in bodies
        for inner in body.eqns
    )
