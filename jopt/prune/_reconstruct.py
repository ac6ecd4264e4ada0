"""Layer-wise least squares: what a mask leaves of a layer makes good what it took."""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from jopt import trees
from jopt.trace import Stop, gram, sites
from jopt.trace.sweep import EXACT, damped

from . import _masks
from ._layerwise import check_plain, layer_by_layer, listed, name_of
from ._select import selection_of

PyTree = Any

_ROOM = 2**24  # entries of the systems that are solved at once: 64 MiB


def reconstruct(
    apply: Callable[..., Any],
    params: PyTree,
    batches: Iterable[Any],
    masks: PyTree,
    *,
    damping: float = 1e-4,
) -> PyTree:
    """Applies masks and changes what they keep so that the outputs of each layer change least.

    For each output, with S the inputs that its mask keeps and P those that it prunes,

        w̃ = argmin ‖X w - X_S w̃_S‖² + λ ‖w̃_S - w_S‖²,   (H_SS + λ I) (w̃_S - w_S) = H_SP w_P

    where H = Σ x xᵀ and λ is `damping` times its mean diagonal, so that directions the data do not
    have stay as they are. The error on the data behind H is never above that of the masks alone.
    The function is run in stages, so that each layer is solved on what the layers before it give,
    solved already; stacked layers, experts and groups of features one by one. Solving takes the
    time of a Cholesky factor of H for each output.

    Args:
      apply: any function `apply(params, *inputs)`.
      params: the parameters before pruning; the leaves that masks prune are plain arrays.
      batches: each a tuple of the inputs, or the one input; all of the same shapes.
      masks: a mask tree from any method, as of `prune.apply_masks`.
      damping: as a part of the mean diagonal of H; 0 is plain least squares, which needs H_SS to be
        positive definite.

    Returns:
      `params` with zeros where the masks are False, whatever was there; a NaN that is kept stays.

    Raises:
      ValueError: if a mask does not fit or none prunes, a batch has no rows, a masked weight is met
        by no product as it is, an activation is not finite, or a system has no solution.
      TypeError: if a masked leaf is no plain array, and under `jit`.

    Example:
      >>> import jax.numpy as jnp
      >>> from jopt import prune
      >>> x, apply = jnp.array([[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]]), lambda w, x: x @ w
      >>> masks = jnp.array([[True], [False]])  # two inputs that are the same
      >>> prune.reconstruct(apply, jnp.array([[1.0], [2.0]]), [x], masks).round(2)
      Array([[3.],
             [0.]], dtype=float32)

    References:
      Yihui He, Xiangyu Zhang, Jian Sun, "Channel Pruning for Accelerating Very Deep Neural
      Networks", 2017, arXiv 1707.06168 (least squares for channels; here for any mask).
    """
    caller = "prune.reconstruct"
    if damping < 0:
        raise ValueError(f"`{caller}(..., damping={damping})` expects a number of at least 0.")
    inputs = listed(params, batches, caller)
    aligned = _masks.aligned(masks, params, caller=caller)
    selection = selection_of(params, [not _masks.is_dense(mask) for mask in aligned])
    if not any(selection.chosen):
        raise ValueError(f"`{caller}(..., masks)`: the masks keep all: there is nothing to do.")
    check_plain(selection, caller)
    kept = dict(zip(selection.paths, aligned, strict=True))
    leaves = dict(trees.items(params))

    def settle(stop: Stop) -> jax.Array:
        mask = jnp.broadcast_to(kept[stop.path], jnp.shape(leaves[stop.path]))[stop.index]
        new, fine = solved(stop.matrices(), stop.matrices(mask), stop.stats["gram"], damping)
        if not bool(jnp.all(fine)):
            raise ValueError(
                f"`{caller}(...)`: the least squares of `{name_of(stop)}` with damping={damping} "
                "have no one solution in float32. Raise `damping`, or calibrate on more data."
            )
        return stop.restored(new).astype(stop.weight.dtype)

    found = sites(apply, params, *inputs[0])
    paths = selection.chosen_paths
    return layer_by_layer(apply, params, inputs, paths, gram, settle, found=found, caller=caller)


@jax.jit
def solved(
    weight: jax.Array, mask: jax.Array, hessian: jax.Array, damping: Any
) -> tuple[jax.Array, jax.Array]:
    """The new `[blocks, in, out]` in float32, and whether each output had one solution. Pure."""
    return jax.vmap(functools.partial(_matrix, damping=damping))(weight, mask, hessian)


# Helpers, in order of use.


def _matrix(
    weight: jax.Array, mask: jax.Array, hessian: jax.Array, damping: Any
) -> tuple[jax.Array, jax.Array]:
    weight = weight.astype(jnp.float32)
    known = jnp.isfinite(weight)
    lost = jnp.where(mask | ~known, 0.0, weight)
    missing = jnp.dot(hessian, lost, precision=EXACT)  # what the outputs of P were
    system = damped(hessian, damping)
    some = max(1, _ROOM // hessian.size)

    def column(args: Any) -> jax.Array:
        free, right = args
        both = free[:, None] & free[None]
        left = jnp.where(both, system, jnp.eye(len(free), dtype=jnp.float32))
        factor = jax.lax.linalg.cholesky(left, symmetrize_input=False)
        right = jnp.where(free, right, 0.0)[:, None]
        half = jax.lax.linalg.triangular_solve(factor, right, left_side=True, lower=True)
        return jax.lax.linalg.triangular_solve(
            factor, half, left_side=True, lower=True, transpose_a=True
        )[:, 0]

    change = jax.lax.map(column, ((mask & known).T, missing.T), batch_size=some).T
    fine = jnp.all(jnp.isfinite(change), axis=0)
    return jnp.where(mask, weight + change, 0.0), fine
