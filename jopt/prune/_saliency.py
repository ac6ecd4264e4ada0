"""Scores from statistics: gradients, what was summed of them, second moments, activation norms.

What reaches the end of a chain are updates, not gradients. So these scores take gradients from
where they are: from `sparsify(..., inner=tx)`, which stands before the optimizer; from the extra
argument `grad=`, as optax's line searches do; or from the caller, for `masks`.

Scores that run over the steps pass over what is not finite: one NaN, kept, would decide for good.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jopt import trees

from ._scores import Score

PyTree = Any


def snip(grads: PyTree | None = None) -> Score:
    """Scores a weight by its connection sensitivity, `|g · w| / Σ |g · w|`, of one gradient.

    The sum is over all weights that may be pruned, so scores are shares of one; what is infinite
    has no part in the sum, and ranks above the rest. Meant for masks chosen once, before training,
    from the gradient of a large batch.

    Args:
      grads: the gradients, in the structure of the parameters; `None` takes those of the step at
        which `sparsify` looks.

    Returns:
      A `Score` without state; float32 or wider.

    Raises:
      ValueError: when it is used without gradients.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jopt import prune
      >>> params = jnp.array([[1.0, -2.0], [3.0, 4.0]])
      >>> grads = jax.grad(lambda w: jnp.sum(w * jnp.array([[5.0, 1.0], [2.0, 0.1]])))(params)
      >>> prune.masks(params, 0.5, score=prune.snip(grads))
      Array([[ True, False],
             [ True, False]], dtype=bool)

    References:
      Lee, Ajanthan, Torr, "SNIP: Single-shot Network Pruning based on Connection Sensitivity",
      2018, arXiv 1810.02340.
    """

    def rank(state: PyTree, params: PyTree) -> PyTree:
        sizes = jax.tree.map(_size, params, state)
        finite = [jnp.where(jnp.isfinite(size), size, 0) for size in jax.tree.leaves(sizes)]
        most = jnp.stack([jnp.max(size, initial=0) for size in finite]).max()
        # Far from the ends of float32, where the sum overflows, or its inverse: all would be alike.
        scale = jnp.where(most > 1e20, 1e-30, jnp.where(most < 1e-20, 1e20, 1)).astype(most.dtype)
        total = sum(jnp.sum(size * scale) for size in finite)
        return jax.tree.map(lambda size: size * scale / jnp.where(total > 0, total, 1), sizes)

    return Score(rank, observe=_gradients_of_step("snip", grads))


def taylor(grads: PyTree | None = None, *, decay: float = 0.0) -> Score:
    """Scores a weight by the first-order change of the loss without it, `|g · w|`.

    With `decay` above 0 it is the running mean of the steps,

        s ← decay · s + (1 - decay) · |g · w|,

    kept in float32 beside the masks. A step at which `g · w` is not finite leaves the weight's mean
    as it is.

    Args:
      grads: the gradients, in the structure of the parameters; `None` takes those of the step.
      decay: of the running mean, in [0, 1); 0 looks at one step only and keeps nothing.

    Returns:
      A `Score`; its state holds the means where `decay` is not 0.

    Raises:
      ValueError: if `decay` is outside [0, 1), and when it is used without gradients.

    References:
      Molchanov, Tyree, Karras, Aila, Kautz, "Pruning Convolutional Neural Networks for Resource
      Efficient Inference", 2016, arXiv 1611.06440. Molchanov, Mallya, Tyree, Frosio, Kautz,
      "Importance Estimation for Neural Network Pruning", 2019, arXiv 1906.10771 (running means).
    """
    _fraction("taylor", decay)
    if grads is not None or decay == 0:
        return Score(
            lambda state, params: jax.tree.map(_size, params, state),
            observe=_gradients_of_step("taylor", grads),
        )

    def update(updates: PyTree, state: PyTree, params: PyTree, **extra_args: Any) -> PyTree:
        found = _gradients("taylor", params, extra_args)
        return jax.tree.map(
            lambda mean, w, g: _mean(mean, _size(w, g), decay), state, params, found
        )

    return Score(_the_state, init=_zeros, update=update, observe=_kept("taylor"))


def movement(grads: PyTree | None = None) -> Score:
    """Scores a weight by how far it moved away from zero, `s ← s - g · w` summed over the steps.

    A weight that the gradient drives towards zero has a negative score and goes first. The sum
    starts with training; what is not finite is not added. To let pruned weights come back, use
    `sparsify(..., regrow=True)` with `straight_through` in the loss: a weight at zero moves
    nowhere.

    Args:
      grads: the gradients of one step, in the structure of the parameters; `None` adds up those of
        all steps.

    Returns:
      A `Score` whose state holds the sums, in float32 or wider.

    Raises:
      ValueError: when it is used without gradients.

    References:
      Sanh, Wolf, Rush, "Movement Pruning: Adaptive Sparsity by Fine-Tuning", 2020,
      arXiv 2005.07683.
    """
    if grads is not None:
        return Score(
            lambda state, params: jax.tree.map(lambda w, g: -_product(w, g), params, state),
            observe=_gradients_of_step("movement", grads),
        )

    def update(updates: PyTree, state: PyTree, params: PyTree, **extra_args: Any) -> PyTree:
        found = _gradients("movement", params, extra_args)
        return jax.tree.map(
            lambda s, w, g: _unless_broken(s - _product(w, g), s), state, params, found
        )

    return Score(_the_state, init=_zeros, update=update, observe=_kept("movement"))


def fisher(moments: PyTree | None = None, *, decay: float | None = None) -> Score:
    """Scores a weight by the loss's rise in a diagonal Fisher approximation, `w² · E[g²] / 2`.

    Second moments come from the optimizer that `sparsify(..., inner=tx)` wraps, from the field `nu`
    of its state (Adam, AdamW, LAMB, RMSProp and others of their kind), at no cost. Adam's bias
    correction is one factor for all weights and changes no order, so it is left out. Before the
    optimizer's first step, when moments are all zero, it is the squared gradient of the step, which
    is what the corrected moments would be.

    Args:
      moments: mean squares of the gradients, in the structure of the parameters.
      decay: keep running mean squares beside the masks, in float32, for optimizers that have none;
        a step's square that is not finite is passed over.

    Returns:
      A `Score`; float32 or wider.

    Raises:
      ValueError: if both are given, if `decay` is outside [0, 1), and when no moments are found.

    References:
      Theis, Korshunova, Tejani, Huszár, "Faster gaze prediction with dense networks and Fisher
      pruning", 2018, arXiv 1801.05787.
    """
    if moments is not None and decay is not None:
        raise ValueError("`fisher(moments, decay=...)` expects one of the two: given, or running.")

    def rank(state: PyTree, params: PyTree) -> PyTree:
        return jax.tree.map(lambda w, v: _wide(w) ** 2 * _wide(v) / 2, params, state)

    if decay is None:

        def observe(state: PyTree, params: PyTree, **extra_args: Any) -> PyTree:
            if moments is not None:
                return _among(moments, params, "fisher(moments)")
            found = _second_moments(extra_args.get("inner_state"), params)
            # All zero before the optimizer's first step: the order of the weights would decide.
            blank = jnp.stack([jnp.all(v == 0) for v in jax.tree.leaves(found)]).all()
            squares = jax.tree.map(
                lambda g: _wide(g) ** 2, _gradients("fisher", params, extra_args)
            )
            return jax.tree.map(
                lambda v, g: jnp.where(blank, g, _wide(v).astype(g.dtype)), found, squares
            )

        return Score(rank, observe=observe)
    _fraction("fisher", decay)

    def update(updates: PyTree, state: PyTree, params: PyTree, **extra_args: Any) -> PyTree:
        found = _gradients("fisher", params, extra_args)
        return jax.tree.map(lambda mean, g: _mean(mean, _wide(g) ** 2, decay), state, found)

    return Score(rank, init=_zeros, update=update, observe=_kept("fisher"))


def activation_norm(norms: PyTree | None = None, *, decay: float = 0.9) -> Score:
    """Scores a weight by what it adds to its output, `|w| · ‖x‖`, x being the input it meets.

    Norms are statistics that the caller has, for instance from `jopt.taps`: a tree in the structure
    of the parameters whose arrays broadcast to the weights (`[in, 1]` for a kernel `[in, out]`);
    leaves that are not pruned may have anything. While training they come as the extra argument
    `activations=` of `update`, mean squares of each input, of which a running mean is kept:

        m ← decay · m + (1 - decay) · activations,   ‖x‖ = √m

    A step's mean square that is not finite is passed over.

    Args:
      norms: the norms; `None` takes the running ones.
      decay: of the running mean, in [0, 1).

    Returns:
      A `Score`; its state, where norms are not given, is shaped like the weights, in float32 or
      wider.

    Raises:
      ValueError: if `decay` is outside [0, 1), and when it is used without norms.

    References:
      Sun, Liu, Bair, Kolter, "A Simple and Effective Pruning Approach for Large Language Models",
      2023, arXiv 2306.11695 (the score).
    """
    _fraction("activation_norm", decay)

    def rank(state: PyTree, params: PyTree) -> PyTree:
        return jax.tree.map(
            lambda w, x: jnp.broadcast_to(jnp.abs(_wide(w)) * _wide(x), jnp.shape(w)), params, state
        )

    if norms is not None:
        return Score(rank, observe=lambda state, params, **extra_args: _spread(norms, params))

    def update(updates: PyTree, state: PyTree, params: PyTree, **extra_args: Any) -> PyTree:
        if "activations" not in extra_args:
            raise ValueError(
                "`prune.activation_norm()` needs the extra argument `activations=` of `update`, "
                "mean squares of each weight's inputs; for `prune.masks` give norms: "
                "`prune.activation_norm(norms)`."
            )
        found = _spread(extra_args["activations"], params)
        return jax.tree.map(lambda mean, x: _mean(mean, _wide(x), decay), state, found)

    def observe(state: PyTree, params: PyTree, **extra_args: Any) -> PyTree:
        return jax.tree.map(jnp.sqrt, _kept("activation_norm")(state, params, **extra_args))

    return Score(rank, init=_zeros, update=update, observe=observe)


# Helpers, in order of use.


def _size(weight: jax.Array, gradient: jax.Array) -> jax.Array:
    return jnp.abs(_product(weight, gradient))


def _product(weight: jax.Array, gradient: jax.Array) -> jax.Array:
    return _wide(weight) * _wide(gradient)


def _wide(array: jax.Array) -> jax.Array:
    array = jnp.asarray(array)
    return array.astype(np.promote_types(array.dtype, np.float32))


def _gradients_of_step(name: str, given: PyTree | None) -> Any:
    def observe(state: PyTree, params: PyTree, **extra_args: Any) -> PyTree:
        if given is not None:
            return _among(given, params, f"{name}(grads)")
        return _gradients(name, params, extra_args)

    return observe


def _gradients(name: str, params: PyTree, extra_args: dict[str, Any]) -> PyTree:
    grads = extra_args.get("grad")
    if grads is None:
        raise ValueError(
            f"`prune.{name}()` needs gradients, and what reaches the end of a chain are updates. "
            "Put the optimizer inside, `prune.sparsify(..., inner=tx)`, or pass them on, "
            f"`tx.update(grads, state, params, grad=grads)`; for `prune.masks` give them, "
            f"`prune.{name}(grads)`."
        )
    return _among(grads, params, f"{name}()")


def _spread(norms: PyTree, params: PyTree) -> PyTree:
    return _among(norms, params, "activation_norm(norms)", spread=True)


def _among(tree: PyTree, params: PyTree, call: str, *, spread: bool = False) -> PyTree:
    """What `tree` has in the places of `params`, which has `optax.MaskedNode` where it has none.

    Raises:
      ValueError: if an array is not shaped like its weight; `spread`: does not broadcast to it.
    """
    places, treedef = jax.tree.flatten(params, is_leaf=_is_masked)
    try:
        leaves = treedef.flatten_up_to(tree)
    except ValueError as error:
        raise ValueError(
            f"`prune.{call}`: what it was given has another structure than `params`:\n{error}"
        ) from error
    found, paths = [], iter(trees.paths(params))
    for place, leaf in zip(places, leaves, strict=True):
        if _is_masked(place):
            found.append(place)
            continue
        path, own = next(paths), trees.weight_of(leaf)
        shape, expected = jnp.shape(own), jnp.shape(place)
        if shape != expected and not (spread and trees.broadcasts(shape, expected)):
            raise ValueError(
                f"`prune.{call}`: the array for `{path}` has shape {list(shape)}, and the weight "
                f"{list(expected)}."
            )
        found.append(own)
    return treedef.unflatten(found)


def _is_masked(node: Any) -> bool:
    return isinstance(node, optax.MaskedNode)


def _fraction(name: str, decay: float) -> None:
    if not 0 <= decay < 1:
        raise ValueError(f"`{name}(decay={decay})` expects a share in [0, 1), such as 0.9.")


def _mean(mean: jax.Array, value: jax.Array, decay: float) -> jax.Array:
    value = jnp.broadcast_to(value.astype(mean.dtype), mean.shape)
    return _unless_broken(decay * mean + (1 - decay) * value, mean)


def _unless_broken(new: jax.Array, old: jax.Array) -> jax.Array:
    return jnp.where(jnp.isfinite(new), new, old)


def _the_state(state: PyTree, params: PyTree) -> PyTree:
    # What was added up knows nothing of a weight that is NaN now, which goes last.
    return jax.tree.map(lambda s, w: jnp.where(jnp.isnan(w), jnp.nan, s), state, params)


def _zeros(params: PyTree) -> PyTree:
    return jax.tree.map(lambda w: jnp.zeros_like(_wide(w)), params)


def _kept(name: str) -> Any:
    """What was kept; but outside `sparsify` nothing was."""

    def observe(state: PyTree, params: PyTree, **extra_args: Any) -> PyTree:
        if "steps" not in extra_args:
            raise ValueError(
                f"`prune.{name}()` adds up over the steps of `prune.sparsify`; for `prune.masks` "
                f"give it statistics, `prune.{name}(...)`."
            )
        return state

    return observe


def _second_moments(state: PyTree, params: PyTree) -> PyTree:
    """The field `nu` of an optimizer's state; of the parts of a `multi_transform` each its own."""
    places, treedef = jax.tree.flatten(params, is_leaf=_is_masked)
    found = [value for _, value in optax.tree_utils.tree_get_all_with_path(state, "nu")]
    rows = [_arrays(value, params) for value in found]
    moments: list[Any] = []
    for i, place in enumerate(places):
        mine = [row[i] for row in rows if row[i] is not None]
        if _is_masked(place):
            moments.append(place)
            continue
        if not mine or jnp.shape(mine[0]) != jnp.shape(place):
            raise ValueError(
                "`prune.fisher()` found no second moments (a field `nu`) for all weights. Wrap an "
                "optimizer that has them, `prune.sparsify(..., inner=optax.adam(...))`, keep them "
                "here, `prune.fisher(decay=0.999)`, or give them, `prune.fisher(moments)`."
            )
        moments.append(mine[0])
    return treedef.unflatten(moments)


def _arrays(value: PyTree, params: PyTree) -> list[Any]:
    """For each place of `params` the array that `value` has there, or `None`."""
    found: list[Any] = []

    def collect(held: Any, places: PyTree) -> None:
        array = trees.weight_of(held)
        # What `optax.masked` leaves out may be a whole subtree, or the arrays of a typed leaf.
        many = len(jax.tree.leaves(places, is_leaf=_is_masked))
        found.extend([None if _is_masked(array) else array] * many)

    stop = lambda node: _is_masked(node) or trees.is_typed(node)  # noqa: E731
    jax.tree.map(collect, value, params, is_leaf=stop)
    return found
