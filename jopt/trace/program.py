"""A function as one jaxpr over flat operands, where `lift`, `sites`, `taps` and `hoist` begin."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from jopt import trees

from . import compat
from .leaf import aval_of


class Operand(NamedTuple):
    """An array among the arguments, or a typed leaf that stands for one."""

    value: Any
    path: str  # within its argument, such as `params/Dense_0/kernel`
    parameter: bool  # whether it belongs to the first argument
    typed: bool  # a typed leaf, or an array inside one


class Program(NamedTuple):
    """A traced function: what it computes, from what, and how its results are arranged."""

    jaxpr: Any
    operands: tuple[Operand, ...]
    out: Any  # a tree of shapes

    def results(self, flat: Sequence[Any]) -> Any:
        """Arranges results as the function returns them."""
        return jax.tree.unflatten(jax.tree.structure(self.out), flat)


def program(
    apply: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    *,
    opened: bool = False,
) -> Program:
    """Traces `apply(*args, **kwargs)`; Python values among the arguments stay Python.

    Arrays may be `jax.ShapeDtypeStruct`s. A typed leaf counts as the array it stands for or, with
    `opened`, as the arrays that it holds.
    """
    tree = (tuple(args), dict(kwargs or {}))
    flat, structure = jax.tree_util.tree_flatten_with_path(tree, is_leaf=trees.is_typed)
    leaves, operands, spread = [leaf for _, leaf in flat], [], []
    for i, (key, leaf) in enumerate(flat):
        typed = trees.is_typed(leaf)
        if not typed and not is_array(leaf):
            continue
        path = jax.tree_util.keystr(key[2:], simple=True, separator="/")
        parameter = key[0] == jax.tree_util.SequenceKey(0) and key[1] == key[0]
        values, inner = jax.tree.flatten(leaf) if typed and opened else ([leaf], None)
        operands += [Operand(value, path, parameter, typed) for value in values]
        spread.append((i, inner, len(values)))

    def flat_apply(*arrays: Any) -> Any:
        filled, rest = list(leaves), iter(arrays)
        for i, inner, count in spread:
            values = [next(rest) for _ in range(count)]
            filled[i] = values[0] if inner is None else jax.tree.unflatten(inner, values)
        args, kwargs = jax.tree.unflatten(structure, filled)
        return apply(*args, **kwargs)

    flat_apply.__name__ = getattr(apply, "__name__", type(apply).__name__)  # JAX's errors name it
    avals = [aval_of(o.value) if trees.is_typed(o.value) else o.value for o in operands]
    jaxpr, out = jax.make_jaxpr(flat_apply, return_shape=True)(*avals)
    return Program(jaxpr, tuple(operands), out)


def is_array(leaf: Any) -> bool:
    """Whether a leaf of the arguments is an array or the shape of one; else it stays Python."""
    return compat.is_array(leaf) or isinstance(leaf, jax.ShapeDtypeStruct)
