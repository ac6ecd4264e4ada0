"""Lottery tickets: back to an earlier state of training with the masks of a later one."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

from jopt import trees

from . import _landing, _masks, _packed
from ._packed import Packed, Pooled, is_packed
from ._select import Selection, selection_of

PyTree = Any


def rewind(
    tx: optax.GradientTransformation, params: PyTree, opt_state: PyTree, masks: PyTree
) -> tuple[PyTree, PyTree]:
    """Takes the masks of a trained network back to an earlier checkpoint of its training.

    Weights are those of the checkpoint, zero where pruned; moments and whatever else the optimizer
    keeps for each weight stand there as at the start; counts, and with them schedules, stand where
    they stood. Masks inside the state (of `sparsify`, `hold`, `rigl`, ...) become the given ones. A
    pure function: the same checkpoint may be rewound again and again, as iterative pruning does.

    A chain without masks of its own goes on with them as `optax.chain(tx, prune.hold(masks))`, with
    state `(opt_state, prune.hold(masks).init(params))`.

    Args:
      tx: the transformation whose state it is.
      params: the parameters of the checkpoint.
      opt_state: its optimizer state.
      masks: a mask tree, such as `masks_of` or `masks` gives.

    Returns:
      The parameters and the state to train on from.

    Raises:
      ValueError: if the masks do not fit, or prune a leaf that the masks in the state leave dense;
        if the state is not one of `tx` for these parameters.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from jopt import prune
      >>> tx = optax.chain(optax.adam(0.1), prune.sparsify(0.5))
      >>> start = {"kernel": jnp.array([[1.0, -4.0], [3.0, -2.0]])}
      >>> trained = {"kernel": jnp.array([[9.0, -4.0], [0.1, -0.2]])}
      >>> ticket, state = prune.rewind(tx, start, tx.init(start), prune.masks(trained, 0.5))
      >>> ticket["kernel"]
      Array([[ 1., -4.],
             [ 0.,  0.]], dtype=float32)

    References:
      Frankle, Carbin, "The Lottery Ticket Hypothesis: Finding Sparse, Trainable Neural Networks",
      2018, arXiv 1803.03635. Frankle, Dziugaite, Roy, Carbin, "Linear Mode Connectivity and the
      Lottery Ticket Hypothesis", 2019, arXiv 1912.05671 (back to an early step, not the first).
    """
    found = _masks.aligned(masks, params, caller="rewind")
    selection = selection_of(params, [not _masks.is_dense(mask) for mask in found])
    gone = [
        ~jnp.broadcast_to(mask, jnp.shape(weight))
        for mask, weight in zip(
            [mask for mask in found if not _masks.is_dense(mask)],
            selection.chosen_weights,
            strict=True,
        )
    ]
    wrapped = jax.tree.structure(opt_state)
    opt_state = _checked(tx, params, opt_state)
    params = _landing.zeroed(params, gone, selection)
    state = _landing.forgotten(tx, opt_state, params, gone, selection)
    state = jax.tree.map(
        lambda node: _replaced(node, gone, selection) if is_packed(node) else node,
        state,
        is_leaf=is_packed,
    )
    if jax.tree.structure(state) != wrapped:
        state = wrapped.unflatten(jax.tree.leaves(state))
    return params, state


# Helpers, in order of use.


def _checked(tx: optax.GradientTransformation, params: PyTree, opt_state: PyTree) -> PyTree:
    """The state, out of the variables that `nnx.Optimizer` puts it in; another model's raises."""
    try:
        expected = jax.eval_shape(tx.init, params)
    except jax.errors.ConcretizationTypeError:  # it looks at values
        return opt_state
    treedef = jax.tree.structure(expected)
    if treedef != jax.tree.structure(opt_state) and _names(expected) == _names(opt_state):
        opt_state = treedef.unflatten(jax.tree.leaves(opt_state))
    if treedef != jax.tree.structure(opt_state):
        raise ValueError(
            "`rewind(tx, params, opt_state, masks)`: the state has another structure than "
            "`tx.init(params)`. Give the transformation and the parameters it was made with."
        )
    for (path, own), found in zip(
        jax.tree_util.tree_flatten_with_path(expected)[0], jax.tree.leaves(opt_state), strict=True
    ):
        if jnp.shape(found) != own.shape:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise ValueError(
                f"`rewind(tx, params, opt_state, masks)`: `{name}` of the state has shape "
                f"{list(jnp.shape(found))}, and `tx.init(params)` has {list(own.shape)} there. "
                "Give the state and the parameters of the same checkpoint."
            )
    return opt_state


def _names(tree: PyTree) -> list[str]:
    found = [path for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]
    spelled = [jax.tree_util.keystr(path, simple=True, separator="/") for path in found]
    return list(map(trees.bare, spelled))


def _replaced(
    packed: Packed | Pooled, gone: list[jax.Array], selection: Selection
) -> Packed | Pooled:
    """Other masks in a state; what `optax.masked` left out of it stays out."""
    own = iter(gone)
    marks = [next(own) if mine else None for mine in selection.chosen]
    held = selection.treedef.unflatten(
        [_Mark(p, m) for p, m in zip(selection.paths, marks, strict=True)]
    )
    return (_in_pool if isinstance(packed, Pooled) else _in_arrays)(packed, held)


def _in_arrays(packed: Any, held: PyTree) -> Packed:
    rows, layout = iter(range(len(packed.layout))), packed.layout
    known = not isinstance(layout, Tracer)

    def replace(words: Any, mark: Any) -> Any:
        if isinstance(words, optax.MaskedNode):
            return words
        dense = known and not int(layout[next(rows), 1])
        array = trees.weight_of(words)
        if isinstance(array, optax.MaskedNode):
            return words
        if mark.gone is None:
            return trees.with_weight(words, jnp.zeros_like(array))
        if dense:
            raise ValueError(_left_dense(mark.path))
        return trees.with_weight(words, _packed.pack(mark.gone))

    stop = lambda node: isinstance(node, optax.MaskedNode) or trees.is_typed(node)  # noqa: E731
    return packed._replace(words=jax.tree.map(replace, packed.words, held, is_leaf=stop))


def _in_pool(pooled: Any, held: PyTree) -> Pooled:
    if isinstance(pooled.layout, Tracer):
        raise TypeError(
            "`rewind(...)` looks at where masks lie in a state that has them in one array "
            "(`pooled=True`): call it outside `jit`."
        )
    shapes, found = iter(_packed.pooled_shapes(pooled)), []

    def collect(_: optax.MaskedNode, mark: Any) -> None:
        shape = next(shapes)
        if shape is None:
            return
        if mark.gone is not None and not shape:
            raise ValueError(_left_dense(mark.path))
        if shape:
            found.append(jnp.zeros(shape, bool) if mark.gone is None else mark.gone)

    is_masked = lambda node: isinstance(node, optax.MaskedNode)  # noqa: E731
    jax.tree.map(collect, pooled.tree, held, is_leaf=is_masked)
    return pooled._replace(words=_packed.pack_all(found, pooled=True))


def _left_dense(path: str) -> str:
    return (
        f"`rewind(...)`: the masks prune `{path}`, which the masks in the state leave dense. Give "
        "the transformation the same `where=` as the masks."
    )


@dataclasses.dataclass(frozen=True)
class _Mark:
    """What is pruned of a leaf, itself one leaf."""

    path: str
    gone: jax.Array | None
