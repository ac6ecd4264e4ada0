"""Paths and selectors over pytrees, and the accounting of bits and bytes.

A path names a leaf: `params/Dense_0/kernel`. A *typed leaf* (a quantized or fake-quantized weight:
any object whose type has a `materialise` method) stands where an array stood, so it counts as one
leaf here, though to JAX it is a node of its own.
"""

import difflib
import functools
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

PyTree = Any
Where = str | Sequence[str] | Callable[[str, Any], bool]


class Size(NamedTuple):
    """What parameters take: counts, and bits in the leaves' own formats."""

    parameters: int  # values, pruned or not
    nonzeros: int  # values that are not zero
    bits: int  # of codes, scales, zero points and plain arrays together

    @property
    def bytes(self) -> int:
        """Bits in whole bytes, rounded up."""
        return -(-self.bits // 8)


def is_typed(leaf: Any) -> bool:
    """Whether `leaf` is a typed leaf: a pytree node that stands for one array."""
    return hasattr(type(leaf), "materialise")


def merged(one: PyTree, other: PyTree, absent: Callable[[Any], bool], clash: str) -> PyTree:
    """Fills what is absent in one tree from the other.

    Args:
      one, other: trees of one structure but for what is absent, which may be whole subtrees.
      absent: whether a node stands for what was left out, such as `optax.MaskedNode`.
      clash: what to say where both have a leaf.

    Raises:
      ValueError: if both have the same leaf, or the structures differ.
    """
    if absent(one):
        return other
    if absent(other):
        return one
    children, treedef = jax.tree.flatten(one, is_leaf=lambda node: node is not one)
    others, same = jax.tree.flatten(other, is_leaf=lambda node: node is not other)
    if treedef != same or (len(children) == 1 and children[0] is one):
        raise ValueError(clash)
    pairs = zip(children, others, strict=True)
    return treedef.unflatten([merged(a, b, absent, clash) for a, b in pairs])


def items(tree: PyTree) -> list[tuple[str, Any]]:
    """Lists `(path, leaf)` in the tree's order; a typed leaf is one leaf.

    Example:
      >>> from jopt import trees
      >>> trees.items({"dense": {"bias": 0.0, "kernel": 1.0}})
      [('dense/bias', 0.0), ('dense/kernel', 1.0)]
    """
    flat, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_typed)
    return [(_spell(path), leaf) for path, leaf in flat]


def paths(tree: PyTree) -> tuple[str, ...]:
    """The path of every leaf, in the tree's order."""
    return tuple(path for path, _ in items(tree))


def map_with_path(f: Callable[..., Any], tree: PyTree, *rest: PyTree) -> PyTree:
    """Maps `f(path, leaf, *others)` over `tree`; typed leaves are leaves, in `rest` as well.

    A tree in `rest` has the structure of `tree`; where `tree` has a leaf it may have a subtree,
    which `f` then receives as it is.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf, *others: f(_spell(path), leaf, *others), tree, *rest, is_leaf=is_typed
    )


def select(tree: PyTree, where: Where, *, caller: str) -> PyTree:
    """Marks the leaves that `where` selects.

    In a glob `*` and `?` stay within one segment and `**` crosses segments, so `**/kernel` is every
    leaf named `kernel` at any depth. The whole path must match. Of a list of globs any may match. A
    predicate is called with `(path, leaf)`.

    Args:
      tree: any pytree.
      where: a glob, a list of globs, or a predicate.
      caller: what the error message calls the culprit, such as `"quantize"`.

    Returns:
      A tree of Python bools, one for each leaf (typed leaves being leaves).

    Raises:
      ValueError: if a glob, or the predicate, selects nothing.
    """
    if callable(where):
        chosen = map_with_path(lambda path, leaf: bool(where(path, leaf)), tree)
        if not any(jax.tree.leaves(chosen)):
            raise ValueError(_nothing(f"`{caller}(..., where=<predicate>)`", paths(tree)))
        return chosen
    globs = [where] if isinstance(where, str) else list(where)
    known = paths(tree)
    if not globs:
        raise ValueError(_nothing(f"`{caller}(..., where=[])`", known))
    for glob in globs:
        if not any(_compiled(glob).fullmatch(path) for path in known):
            raise ValueError(_nothing(f'`{caller}(..., where="{glob}")`', known, glob))
    return map_with_path(lambda path, leaf: matches(globs, path, leaf), tree)


def matches(where: Where, path: str, leaf: Any) -> bool:
    """Whether `where` selects the leaf at `path`."""
    if callable(where):
        return bool(where(path, leaf))
    globs = [where] if isinstance(where, str) else where
    return any(_compiled(glob).fullmatch(path) is not None for glob in globs)


def broadcasts(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    """Whether an array of one shape broadcasts to another."""
    tail = to[len(to) - len(shape) :]
    return len(shape) <= len(to) and all(a in (1, b) for a, b in zip(shape, tail, strict=True))


def bare(path: str) -> str:
    """A path without the `/value` by which flax nnx ends those of its variables.

    `nnx.Optimizer` puts its state into variables of its own, and takes parameters out of theirs.
    """
    return path.removesuffix("/value")


def weight_of(leaf: Any) -> Any:
    """The trained array inside a leaf: the leaf itself, or what a typed leaf calls its `weight`."""
    return leaf.weight if is_typed(leaf) else leaf


def with_weight(leaf: Any, weight: Any) -> Any:
    """`leaf` with another trained array: `weight` itself where the leaf is a plain array."""
    return leaf.with_weight(weight) if is_typed(leaf) else weight


def bits_of(array: Any) -> int:
    """The bits of one element of `array`: 4 for int4, 1 for bool, whatever the container takes."""
    dtype = getattr(array, "dtype", None)
    if dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key):
        return dtype.itemsize * 8
    dtype = jnp.dtype(jnp.result_type(array) if dtype is None else dtype)
    if dtype == jnp.bool_:
        return 1
    if jnp.issubdtype(dtype, jnp.integer):
        return int(jnp.iinfo(dtype).bits)
    if jnp.issubdtype(dtype, jnp.floating):
        return int(jnp.finfo(dtype).bits)
    return dtype.itemsize * 8


def jitted(function: Callable[..., Any]) -> Callable[..., Any]:
    """`jax.jit` of a function whose arguments may hold functions, as Equinox modules do."""

    @functools.partial(jax.jit, static_argnums=0)
    def run(known: tuple[Any, tuple[Any, ...]], arrays: list[Any]) -> Any:
        structure, leaves = known
        rest = iter(arrays)
        return function(*structure.unflatten([next(rest) if f is None else f for f in leaves]))

    def call(*args: Any) -> Any:
        leaves, structure = jax.tree.flatten(args)
        functions = tuple(leaf if callable(leaf) else None for leaf in leaves)
        return run((structure, functions), [leaf for leaf in leaves if not callable(leaf)])

    return call


def size(params: PyTree) -> Size:
    """Counts parameters, nonzeros and bits, each leaf in its own format.

    Runs outside `jit`, since it looks at values. Functions, as Equinox modules hold, count nothing.

    Example:
      >>> import jax.numpy as jnp, jopt
      >>> jopt.size({"kernel": jnp.array([[0.0, 1.0]]), "bias": jnp.zeros(3, jnp.bfloat16)})
      Size(parameters=5, nonzeros=1, bits=112)
    """
    sizes = [_size(leaf) for _, leaf in items(params)]
    return Size(*(sum(column) for column in zip(*sizes, strict=True))) if sizes else Size(0, 0, 0)


def _size(leaf: Any) -> Size:
    if is_typed(leaf):
        return leaf.size()
    if callable(leaf):
        return Size(0, 0, 0)
    array = np.asarray(leaf)
    return Size(array.size, int(np.count_nonzero(array)), array.size * bits_of(leaf))


def _spell(path: Iterable[Any]) -> str:
    return jax.tree_util.keystr(tuple(path), simple=True, separator="/")


@functools.lru_cache(maxsize=4096)
def _compiled(glob: str) -> re.Pattern[str]:
    pattern = []
    for part in re.split(r"(\*\*/|/\*\*$|\*\*|\*|\?)", glob):
        match part:
            case "**/":
                pattern.append(r"(?:[^/]+/)*")
            case "/**":
                pattern.append(r"(?:/[^/]+)*")
            case "**":
                pattern.append(r".*")
            case "*":
                pattern.append(r"[^/]*")
            case "?":
                pattern.append(r"[^/]")
            case _:
                pattern.append(re.escape(part))
    return re.compile("".join(pattern))


def _nothing(call: str, known: Sequence[str], glob: str | None = None) -> str:
    lines = [f"{call} matched none of {len(known)} parameters."]
    shown = known[:8]
    if glob is not None and (near := difflib.get_close_matches(glob, known, n=3, cutoff=0.0)):
        shown = near
        lines.append("The nearest paths are:")
    else:
        lines.append("The paths are:")
    lines += [f"  `{path}`" for path in shown]
    lines.append("`jopt.trees.paths(params)` lists them all; `**/kernel` matches at any depth.")
    return "\n".join(lines)
