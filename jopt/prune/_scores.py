"""Scores: how much each weight matters. The lowest go first.

The protocol that every score follows is `Score`; nothing else in this room knows one score from
another.
"""

import math
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jopt import trees

PyTree = Any


def _nothing(params: PyTree) -> PyTree:
    return ()


def _unchanged(updates: PyTree, state: PyTree, params: PyTree, **extra_args: Any) -> PyTree:
    return state


def _as_kept(state: PyTree, params: PyTree, **extra_args: Any) -> PyTree:
    return state


class Score(NamedTuple):
    """How much each weight matters, in the manner of an optax transformation.

    All trees hold the weights that may be pruned, as plain arrays, and `optax.MaskedNode` (which
    `jax.tree.map` passes over) in place of the other leaves. `sparsify` keeps the state in its own,
    calls `update` at every step, and `observe` and `rank` when masks are due; `masks` calls `init`,
    `observe` and `rank`.

    Attributes:
      rank: `rank(state, params)` gives floats, shaped like the weights. NaN ranks above all
        numbers, so a weight whose score is NaN goes last and stays to be seen. Minus infinity is
        the mark that `sparsify` itself puts on what is pruned already.
      init: `init(params)` gives the state, arrays only; `()` for a score that needs none.
      update: `update(updates, state, params, **extra_args)` gives the next state; `updates` are
        those that reach `sparsify`, and extra arguments are those of the chain. Inside
        `sparsify(..., inner=tx)` the updates are gradients, and extra arguments have them as `grad`
        and the state of `tx` as `inner_state`.
      observe: `observe(state, params, **extra_args)` gives what `rank` gets as its state, for what
        is of this step alone and need not be kept. `sparsify` adds `steps`, their number so far.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jopt import prune
      >>> distance = prune.Score(
      ...     lambda state, params: jax.tree.map(lambda w: jnp.abs(w - 1.0), params))
      >>> prune.masks(jnp.array([[0.0, 0.9], [1.2, 5.0]]), 0.5, score=distance)
      Array([[ True, False],
             [False,  True]], dtype=bool)
    """

    rank: Callable[[PyTree, PyTree], PyTree]
    init: Callable[[PyTree], PyTree] = _nothing
    update: Callable[..., PyTree] = _unchanged
    observe: Callable[..., PyTree] = _as_kept


def magnitude(p: float = 1) -> Score:
    """Scores a weight by its magnitude, `|w|^p`.

    Single weights rank alike for every `p`; it matters where a pattern sums scores over a group.
    For `p = 1` the score keeps the weight's dtype and is exact; for others it is float32, in which
    very small weights may meet at 0.

    Args:
      p: the exponent, above 0: 1 for L1, 2 for L2.

    Returns:
      A `Score` without state.

    Raises:
      ValueError: if `p` is not a positive finite number.
    """
    if not (isinstance(p, int | float | np.number) and p > 0 and math.isfinite(p)):
        raise ValueError(
            f"`magnitude({p})` expects a positive finite exponent: 1 for L1, 2 for L2."
        )

    def power(weight: jax.Array) -> jax.Array:
        size = jnp.abs(weight)
        if p == 1:
            return size
        return size.astype(np.promote_types(size.dtype, np.float32)) ** p

    return Score(lambda state, params: jax.tree.map(power, params))


_RAW = ((2,), (4,))  # shapes of keys that are arrays of uint32, by their implementation


def check_key(key: Any, caller: str) -> None:
    """Refuses what is no random key, neither a new one nor an array of uint32."""
    dtype, shape = getattr(key, "dtype", None), getattr(key, "shape", None)
    typed = dtype is not None and jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key)
    if shape != () if typed else dtype != np.uint32 or shape not in _RAW:
        given = repr(key) if dtype is None else f"{dtype} of shape {shape}"
        raise TypeError(
            f"`{caller}(..., key=...)` expects one random key, such as `jax.random.key(0)`, "
            f"and was given {given}."
        )


def random(key: jax.Array) -> Score:
    """Scores weights at random: uniform in [0, 1), independent of the weights.

    A leaf's scores depend on the key and its path alone, so they are the same at every step, and a
    rising sparsity prunes ever more of the same order.

    Args:
      key: a random key.

    Returns:
      A `Score` without state.

    Raises:
      TypeError: if it is none.
    """
    check_key(key, "prune.random")

    def uniform(path: str, weight: jax.Array) -> jax.Array:
        own = jax.random.fold_in(key, zlib.crc32(path.encode()))
        return jax.random.uniform(own, jnp.shape(weight))

    return Score(lambda state, params: trees.map_with_path(uniform, params))
