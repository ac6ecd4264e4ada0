"""Masks in the optimizer state, one bit a weight, and how to find them again."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from jopt import trees

from ._bits import by_shape, pack, packed_axis, unpack
from ._select import Selection

PyTree = Any
_CLASH = (
    "`masks_of(opt_state)` found several masks for the same leaves: two of `prune.sparsify` and "
    "`prune.hold` act on them. Call it on the state of one."
)
_OTHER = "Give the state that `init` made for parameters of these shapes, and the same options."
Words = list[jax.Array] | jax.Array  # of each chosen weight, or one array for all of them


class Packed(NamedTuple):
    """Masks as bits, 1 where pruned. `masks_of` finds it in any optimizer state.

    Words have the rank of their weight: one axis shrinks to an eighth, the others stay. Of the axes
    that waste no bits it is the one whose words the most devices can share (in powers of two). So a
    weight's sharding does for its words where it divides that eighth.
    """

    words: PyTree  # uint8, an array for each array of params; zeros for leaves that stay dense
    layout: jax.Array  # int32 [leaves, 2]: the packed axis, from the end, and its size; 0, 0: dense


class Pooled(NamedTuple):
    """The same bits in one array, that of `pooled=True`. `masks_of` finds it, too."""

    words: jax.Array  # uint8 [bytes], the words of the chosen weights one after the other
    layout: jax.Array  # int32 [leaves, 1 + rank]: as `_rows` has it
    tree: PyTree  # the structure of params, `optax.MaskedNode` for each leaf


def masks_of(opt_state: PyTree) -> PyTree:
    """Finds the masks that `sparsify` or `hold` keeps, in the state of any chain they are part of.

    The parts of `optax.multi_transform` are put together. Those of `nnx.Optimizer` come in its own
    variables, and fit the parameters of its model. Looks at values, so it runs outside `jit`.

    Args:
      opt_state: an optimizer state.

    Returns:
      A mask tree: boolean arrays, False where pruned, and a scalar True for leaves that stay dense.

    Raises:
      ValueError: if the state holds no masks, or several for the same leaf.
      TypeError: if it is called under `jit`.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from jopt import prune
      >>> params = {"kernel": jnp.array([[1.0, -4.0], [3.0, -2.0]])}
      >>> tx = optax.chain(optax.sgd(0.1), prune.sparsify(0.5))
      >>> updates, state = tx.update(params, tx.init(params), params)
      >>> prune.masks_of(state)["kernel"]
      Array([[False,  True],
             [ True, False]], dtype=bool)
    """
    nodes = jax.tree.leaves(opt_state, is_leaf=is_packed)
    found = [_masks(node) for node in nodes if is_packed(node)]
    if not found:
        raise ValueError(
            "`masks_of(opt_state)` found no masks: neither `prune.sparsify` nor `prune.hold` is in "
            f"the chain whose state this is ({type(opt_state).__name__})."
        )
    together = found[0]
    for other in found[1:]:
        together = trees.merged(together, other, _is_absent, _CLASH)
    absent = _is_absent
    return jax.tree.map(lambda m: jnp.ones((), bool) if absent(m) else m, together, is_leaf=absent)


def is_packed(node: Any) -> bool:
    """Whether it holds masks."""
    return isinstance(node, Packed | Pooled)


def blank(params: PyTree, selection: Selection, *, pooled: bool) -> Packed | Pooled:
    """Nothing pruned yet."""
    if pooled:
        leaves = jax.tree.leaves(params, is_leaf=_is_position)
        absent, shapes = [_is_absent(leaf) for leaf in leaves], []
        chosen = iter(zip(selection.leaves, selection.chosen, strict=True))
        for out in absent:
            leaf, mine = (None, False) if out else next(chosen)
            shapes.append(jnp.shape(trees.weight_of(leaf)) if mine else ())
        tree = jax.tree.map(lambda leaf: optax.MaskedNode(), params, is_leaf=_is_position)
        words = jnp.zeros(sum(map(_bytes, shapes)), jnp.uint8)
        return Pooled(words, jnp.asarray(_rows(shapes, absent)), tree)
    rows = []
    for leaf, mine in zip(selection.leaves, selection.chosen, strict=True):
        shape = jnp.shape(trees.weight_of(leaf)) if mine else ()
        axis = packed_axis(shape)
        rows.append((axis, shape[axis]) if mine else (0, 0))
    return Packed(jax.tree.map(_blank_words, params), jnp.asarray(rows, jnp.int32).reshape(-1, 2))


def placeholder(params: PyTree, *, pooled: bool) -> Packed | Pooled:
    """The state of a tree without arrays, such as `optax.tree_map_params` makes one of."""
    if pooled:
        return Pooled(jnp.zeros(0, jnp.uint8), jnp.zeros((0, 1), jnp.int32), params)
    return Packed(params, jnp.zeros((0, 2), jnp.int32))


def words_of(packed: Packed | Pooled, selection: Selection, *, pooled: bool, caller: str) -> Words:
    """The words of the chosen weights.

    Raises:
      ValueError: if they are of other weights, or kept in the other way.
    """
    if isinstance(packed, Pooled) != pooled:
        now, then = ("True", "False") if pooled else ("False", "True")
        raise ValueError(
            f"`{caller}(..., pooled={now})` was given a state made with `pooled={then}`. Keep to "
            "one of them, or carry the masks over: `masks_of` finds those of the old state, and "
            "`prune.rewind` puts them into a new one."
        )
    shapes = [jnp.shape(weight) for weight in selection.chosen_weights]
    if isinstance(packed, Pooled):
        expected = sum(map(_bytes, shapes))
        if packed.words.shape[-1:] != (expected,):
            raise ValueError(
                f"`{caller}(...)`: the masks in the state take {packed.words.size} bytes, and "
                f"those of these parameters {expected}. {_OTHER}"
            )
        return packed.words
    try:
        words = [trees.weight_of(leaf) for leaf in selection.among(packed.words)]
    except ValueError as error:
        raise ValueError(
            f"`{caller}(...)`: the masks in the state have another structure than `params`. "
            f"{_OTHER}\n{error}"
        ) from error
    for path, word, shape in zip(selection.chosen_paths, words, shapes, strict=True):
        if jnp.shape(word) != (_packed_shape(shape) if shape else ()):
            raise ValueError(
                f"`{caller}(...)`: the mask of `{path}` in the state is of another weight than one "
                f"of shape {list(shape)}. {_OTHER}"
            )
    return words


def with_words(packed: Packed | Pooled, selection: Selection, words: Words) -> Packed | Pooled:
    """Other words for the chosen weights."""
    if isinstance(packed, Pooled):
        assert isinstance(words, jax.Array)
        return packed._replace(words=words)
    leaves = selection.treedef.flatten_up_to(packed.words)
    own = [leaf for leaf, mine in zip(leaves, selection.chosen, strict=True) if mine]
    new = [trees.with_weight(leaf, word) for leaf, word in zip(own, words, strict=True)]
    rest = iter(new)
    pairs = zip(leaves, selection.chosen, strict=True)
    tree = selection.treedef.unflatten([next(rest) if mine else leaf for leaf, mine in pairs])
    return packed._replace(words=tree)


def pack_all(gone: Sequence[jax.Array], *, pooled: bool) -> Words:
    """The words of booleans, True where pruned."""
    if not pooled:
        return [pack(mask) for mask in gone]
    words: dict[int, jax.Array] = {}
    for shape, places in by_shape(gone).items():
        stacked = pack(jnp.stack([gone[i] for i in places]), packed_axis(shape))
        words.update(zip(places, stacked.reshape(len(places), -1), strict=True))
    flat = [words[i] for i in range(len(gone))]
    return jnp.concatenate(flat) if flat else jnp.zeros(0, jnp.uint8)


def unpack_all(words: Words, shapes: Sequence[tuple[int, ...]]) -> list[jax.Array]:
    """The booleans of weights of these shapes; one array of words may have axes before its last."""
    found, begin = [], 0
    for i, shape in enumerate(shapes):
        axis = packed_axis(shape)
        if isinstance(words, list):
            word = words[i]
        else:
            end = begin + _bytes(shape)
            word = jax.lax.slice_in_dim(words, begin, end, axis=-1)
            word = word.reshape(*words.shape[:-1], *_packed_shape(shape))
            begin = end
        found.append(unpack(word, axis, shape[axis]))
    return found


def pooled_shapes(pooled: Pooled) -> list[tuple[int, ...] | None]:
    """The shape of each leaf's weight, () where it stays dense, None where there is no leaf."""
    # Under vmap and pmap the state is stacked along leading axes: rows are the same in all of it.
    rows = np.asarray(pooled.layout)
    rows = rows.reshape(-1, *rows.shape[-2:])[0] if rows.size else rows.reshape(0, 1)
    return [
        None if kind < 0 else tuple(shape[len(shape) - kind :]) for kind, *shape in rows.tolist()
    ]


# Helpers, in order of use.


def _is_position(node: Any) -> bool:
    return _is_absent(node) or trees.is_typed(node)


def _packed_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    at = packed_axis(shape) + len(shape)
    return (*shape[:at], -(-shape[at] // 8), *shape[at + 1 :])


def _bytes(shape: tuple[int, ...]) -> int:
    return math.prod(_packed_shape(shape)) if shape else 0


def _rows(shapes: Sequence[tuple[int, ...]], absent: Sequence[bool]) -> np.ndarray:
    """The rank (0: dense, -1: `optax.masked` left it out) and the shape, zeros before it."""
    rank = max(map(len, shapes), default=0)
    rows = [
        (-1 if out else len(shape), *(0,) * (rank - len(shape)), *shape)
        for shape, out in zip(shapes, absent, strict=True)
    ]
    return np.asarray(rows, np.int32).reshape(-1, 1 + rank)


def _blank_words(array: Any) -> jax.Array:
    shape = jnp.shape(array)
    if not shape:
        return jnp.zeros((), jnp.uint8)
    floats = isinstance(array, jax.Array) and jnp.issubdtype(array.dtype, jnp.inexact)
    # Made from the array, so that words are placed on devices as it is.
    return pack(jnp.zeros_like(array, dtype=bool) if floats else jnp.zeros(shape, bool))


def _masks(packed: Packed | Pooled) -> PyTree:
    if isinstance(packed.layout, Tracer):
        raise TypeError(
            "`masks_of(opt_state)` looks at values: call it outside `jit`, and pass the masks as "
            "an argument to the function that needs them."
        )
    if isinstance(packed, Pooled):
        shapes = pooled_shapes(packed)
        (words,) = jax.tree.leaves(packed.words)  # in `nnx.Optimizer` it is inside a variable
        gone = iter(unpack_all(words, [shape for shape in shapes if shape]))
        masks = [
            optax.MaskedNode() if shape is None else ~next(gone) if shape else jnp.ones((), bool)
            for shape in shapes
        ]
        return jax.tree.structure(packed.tree, is_leaf=_is_absent).unflatten(masks)
    items = trees.items(packed.words)
    # Under vmap and pmap the state is stacked along leading axes: rows are the same in all of it.
    rows = np.asarray(packed.layout).reshape(-1, len(items), 2)[0]
    masks = [
        ~unpack(trees.weight_of(leaf), int(axis), int(size)) if size else jnp.ones((), bool)
        for (_, leaf), (axis, size) in zip(items, rows, strict=True)
    ]
    return jax.tree.structure(packed.words, is_leaf=trees.is_typed).unflatten(masks)


def _is_absent(node: Any) -> bool:
    return isinstance(node, optax.MaskedNode)
