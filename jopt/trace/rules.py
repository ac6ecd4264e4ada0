"""What is registered: rules for (primitive, leaf type), and constructs that have bodies."""

from collections.abc import Callable
from typing import Any

Rule = Callable[..., Any]
Structure = Callable[..., Any]  # f(frame, equation, operands) -> results; see `walk`

_rules: dict[tuple[Any, type], Rule] = {}
_structures: dict[Any, Structure] = {}


def rule(primitive: Any, leaf_type: type) -> Callable[[Rule], Rule]:
    """Registers how a primitive acts on a typed leaf, as a decorator.

    The function is called with a `Call` and the operands, arrays or typed leaves, at least one of
    them of `leaf_type` or a subclass. It returns the result (an array or a typed leaf; a sequence
    where the primitive has several results), or `NotImplemented` where it cannot help. Operands
    are asked in order, each through its type's bases; the first rule that answers wins.

    Args:
      primitive: such as `jax.lax.dot_general_p`.
      leaf_type: the class of leaf, or a base of it.

    Raises:
      ValueError: if another function is already registered for the pair.
    """

    def register(function: Rule) -> Rule:
        old = _rules.get((primitive, leaf_type), function)
        if (old.__module__, old.__qualname__) != (function.__module__, function.__qualname__):
            raise ValueError(
                f"`rule({primitive}, {leaf_type.__name__})` is taken by `{old.__qualname__}` of "
                f"`{old.__module__}`. Register for a subclass of `{leaf_type.__name__}` instead."
            )
        _rules[primitive, leaf_type] = function
        return function

    return register


def structure(*primitives: Any) -> Callable[[Structure], Structure]:
    """Registers how constructs with bodies are called again: `f(frame, equation, operands)`.

    Operands are arrays or `Tracked`; so are the results.
    """

    def register(function: Structure) -> Structure:
        _structures.update(dict.fromkeys(primitives, function))
        return function

    return register


def rules_of(primitive: Any, leaf_type: type) -> list[Rule]:
    """The rules that a leaf's type has for a primitive, the most derived type's first."""
    found = (_rules.get((primitive, base)) for base in leaf_type.__mro__)
    return [function for function in found if function is not None]


def structure_of(primitive: Any) -> Structure | None:
    """How a construct is called again, if it is one."""
    return _structures.get(primitive)
