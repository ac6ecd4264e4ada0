"""How the axes of an operation's results run along those of its operands: rules that users add.

JAX's own primitives are known to `origins` and `sites`. A primitive of one's own (a kernel of the
hardware behind a `jax.extend.core.Primitive`) says with `axes` what it does with them.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

Source = tuple[int, int]  # an operand, and an axis of it


class Along(NamedTuple):
    """Where the axes of an operation's results come from."""

    results: Sequence[Sequence[Sequence[Source]]]
    """For each result, for each of its axes: the operands' axes that it runs along, entry by entry;
    none for an axis that is the result's own."""
    summed: Sequence[Sequence[Source]] = ()
    """Groups of operands' axes that are multiplied entry by entry and summed, as a product does."""


Rule = Callable[[dict[str, Any], Sequence[jax.ShapeDtypeStruct]], Along]

_rules: dict[Any, Rule] = {}


def axes(primitive: Any) -> Callable[[Rule], Rule]:
    """Registers how a primitive's results run along its operands, as a decorator.

    With it `sites` lists the primitive if it sums axes, with its weight, the weight's summed axes
    and its FLOPs (two for each entry of the first result and of each group of summed axes); and a
    parameter is followed through it where all operands are parameters. Without it, what comes out
    of an unknown primitive has no known origin, which is never wrong.

    Args:
      primitive: a `jax.extend.core.Primitive`. The function is called with the equation's
        parameters and the shapes of the operands, and returns `Along`.

    Raises:
      ValueError: if the primitive has a rule from elsewhere.

    Example:
      >>> from jax.extend.core import Primitive
      >>> from jopt.trace import Along, axes
      >>> matmul = Primitive("my_matmul")
      >>> @axes(matmul)
      ... def _(params, operands):
      ...     return Along(results=[[[(0, 0)], [(1, 1)]]], summed=[[(0, 1), (1, 0)]])
    """

    def register(function: Rule) -> Rule:
        old = _rules.get(primitive, function)
        if (old.__module__, old.__qualname__) != (function.__module__, function.__qualname__):
            raise ValueError(
                f"`axes({primitive})` is taken by `{old.__qualname__}` of `{old.__module__}`."
            )
        _rules[primitive] = function
        return function

    return register


def axes_of(equation: Any) -> Along | None:
    """What the rule for an equation says, checked; None without one.

    Raises:
      ValueError: if it names axes that are not there or of different lengths.
    """
    rule = _rules.get(equation.primitive)
    if rule is None:
        return None
    operands = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in equation.invars]
    found = rule(equation.params, operands)
    shapes = [variable.aval.shape for variable in equation.outvars]
    if [len(axes) for axes in found.results] != [len(shape) for shape in shapes]:
        raise ValueError(
            f"The axes rule for `{equation.primitive}` describes {len(found.results)} results of "
            f"ranks {[len(axes) for axes in found.results]}; the operation's shapes are {shapes}."
        )
    groups = [
        (sources, size)
        for axes, shape in zip(found.results, shapes, strict=True)
        for sources, size in zip(axes, shape, strict=True)
    ]
    for sources, size in [*groups, *((group, None) for group in found.summed)]:
        sizes = {_size(equation.primitive, operands, source) for source in sources}
        if len(sizes | ({size} - {None} if sources else set())) > 1:
            raise ValueError(
                f"The axes rule for `{equation.primitive}` joins axes of different lengths: "
                f"{list(sources)} of operands of shapes {[o.shape for o in operands]}"
                + (f", and a result's axis of {size}." if size is not None else ".")
            )
    return found


def _size(primitive: Any, operands: Sequence[jax.ShapeDtypeStruct], source: Source) -> int:
    operand, axis = source
    if not (0 <= operand < len(operands) and 0 <= axis < len(operands[operand].shape)):
        raise ValueError(
            f"The axes rule for `{primitive}` names axis {axis} of operand {operand}; the operands "
            f"have shapes {[o.shape for o in operands]}."
        )
    return operands[operand].shape[axis]
