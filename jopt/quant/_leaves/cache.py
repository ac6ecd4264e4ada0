"""Quantized caches of keys and values: a leaf that a function reads, writes to and returns."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jopt import trees
from jopt.trace import Layered, lift

from .._formats.base import Format, Grid, Int
from .._formats.floats import FP8

PyTree = Any


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["codes", "scale", "zero_point"],
    meta_fields=["format", "query", "value_dtype"],
)
@dataclasses.dataclass(frozen=True)
class Cache(Layered):
    """A cache whose entries are codes with a scale for each token and head. Made by `kv_cache`.

    It is used in two ways. In a loop of one's own, `update` writes tokens and `attend` reads them.
    Or it takes the place of an array among the arguments of `jopt.lift(apply)`: what the function
    writes by `dynamic_update_slice` or `.at[...].set` is quantized, attention's products read the
    codes, and the function returns the leaf, through scans, branches and checkpoints as well. What
    is written has no gradient.
    """

    codes: jax.Array  # int4, int8 or float8, the shape of the value
    scale: jax.Array  # float32, rank of the value; 1 along the axes that share one
    zero_point: jax.Array | None  # int8, the shape of scale; None is zero
    format: Format
    query: Format | None  # of what the entries are multiplied by, in rows; None: floats
    value_dtype: Any  # of the array that this stands for
    travels = True

    def materialise(self) -> jax.Array:
        """All entries as floats."""
        grid = Grid(self.scale, self.zero_point)
        return self.format.decode(self.codes, grid).astype(self.value_dtype)

    def split(self) -> tuple[jax.Array, Any]:
        """Codes; and the grid."""
        return self.codes, Grid(self.scale, self.zero_point)

    def joined(self, array: jax.Array, coarse: Any) -> "Cache":
        """This leaf with other arrays."""
        return dataclasses.replace(
            self, codes=array, scale=coarse.scale, zero_point=coarse.zero_point
        )

    def update(self, values: jax.Array, position: Any, *, axis: int = -3) -> "Cache":
        """Writes tokens from `position` on.

        Args:
          values: floats `"[..., tokens, heads, size]"`.
          position: of the first of them; an integer, or an array of one. A negative one counts from
            the end. As in `jax.lax.dynamic_update_slice`, one from which the values would reach
            beyond the end is moved back until they fit, so that they overwrite earlier tokens: no
            error can come from inside a compiled program, and the caller counts.
          axis: along which tokens lie.

        Raises:
          ValueError: if the values do not fit: another rank, other sizes than the cache's along any
            axis but that of tokens, or more tokens than it holds.
        """
        values, shape = jnp.asarray(values), self.codes.shape
        if not -len(shape) <= axis < len(shape):
            raise ValueError(f"`update(..., axis={axis})`: the cache has {len(shape)} axes.")
        sizes = [*values.shape]
        if len(sizes) == len(shape) and sizes[axis] <= shape[axis]:
            sizes[axis] = shape[axis]
        if tuple(sizes) != shape:
            raise ValueError(
                f"`update(values, position, axis={axis})`: values of shape {values.shape} do not "
                f"fit into a cache of shape {shape}: the sizes are those of the cache along every "
                "axis but that of tokens, and of tokens there are at most as many."
            )

        def write(cache: Any, values: jax.Array, position: Any) -> Any:
            return jax.lax.dynamic_update_slice_in_dim(
                cache, values.astype(cache.dtype), position, axis % cache.ndim
            )

        return lift(write)(self, values, jnp.asarray(position))

    def storage(self) -> dict[str, tuple[Any, int]]:
        """The arrays to keep on disk, and the bits of one element, of which codes have few."""
        kept = super().storage()
        for name in ("codes", "zero_point"):
            if name in kept:
                kept[name] = (kept[name][0], self.format.bits)
        return kept

    def size(self) -> trees.Size:
        """Entries, codes that differ from the zero point, and bits in all."""
        levels = np.asarray(self.codes).astype(np.float32)
        zero = 0 if self.zero_point is None else np.asarray(self.zero_point)
        bits = sum(array.size * width for array, width in self.storage().values())
        return trees.Size(levels.size, int(np.count_nonzero(levels != zero)), bits)


def kv_cache(
    shape: Sequence[int],
    format: Format | None = None,
    *,
    axes: Sequence[int] = (-1,),
    query: Format | None = None,
    dtype: Any = jnp.float32,
) -> Cache:
    """Makes an empty cache of keys or values.

    One token of one head has a scale of its own: with s_t that of token t and c_t its codes,

        scores    q · k_t = s_t (q · c_t)            values    Σ p_t v_t = Σ (p_t s_t) c_t

    so that products run on the codes, which are never multiplied out. With `query` the other
    operand is quantized as well, each row with a range of its own, and products run on integers.

    Args:
      shape: such as `"[batch, tokens, heads, size]"`, in any order.
      format: `Int`, `FP8`. Default: `Int(8)`.
      axes: those that share a scale. Default: the last, the head's size.
      query: `Int` format of what meets the entries: queries, and probabilities times scales.
      dtype: that the entries have for the function that reads them.

    Raises:
      TypeError: if the format is not `Int` or `FP8`, or the dtype is not floating.
      ValueError: if it has groups, or rounds stochastically, or `query` cannot be served, or the
        shape lacks one of `axes`.

    Example:
      >>> import jax.numpy as jnp
      >>> from jopt import quant
      >>> keys = quant.kv_cache((1, 16, 2, 4)).update(jnp.ones((1, 3, 2, 4)), 0)
      >>> keys.codes.dtype, keys.scale.shape
      (dtype('int8'), (1, 16, 2, 1))

    References:
      Ying Sheng et al., FlexGen: high-throughput generative inference of large language models with
      a single GPU, 2023, arXiv:2303.06865 (a quantized cache, in groups).
    """
    format = Int(8) if format is None else format
    _check(format, query)
    if not jnp.issubdtype(jnp.dtype(dtype), jnp.floating):
        raise TypeError(
            f"`kv_cache(..., dtype={jnp.dtype(dtype)})`: a cache stands for floats, such as "
            "`jnp.float32` or `jnp.bfloat16`; `format` says how they are stored."
        )
    rank = len(shape)
    if not all(-rank <= axis < rank for axis in axes):
        raise ValueError(
            f"`kv_cache({tuple(shape)}, axes={tuple(axes)})`: the shape has {rank} axes; those "
            f"that share a scale are from {-rank} to {rank - 1}."
        )
    shared = {axis % rank for axis in axes}
    coarse = [1 if axis in shared else n for axis, n in enumerate(shape)]
    affine = isinstance(format, Int) and not format.symmetric
    return Cache(
        jnp.zeros(tuple(shape), format.container),
        jnp.zeros(coarse, jnp.float32),
        jnp.zeros(coarse, jnp.int8) if affine else None,
        format,
        query,
        jnp.dtype(dtype),
    )


def cached(
    tree: PyTree,
    where: trees.Where,
    format: Format | None = None,
    *,
    axes: Sequence[int] = (-1,),
    query: Format | None = None,
) -> PyTree:
    """Replaces arrays in a tree of caches, such as flax's collection `cache`, by `Cache` leaves.

    Give the result to `jopt.lift(apply)` in place of the arrays: where the function returns what it
    has updated, it returns `Cache` leaves.

    Args:
      tree: any pytree; what the arrays hold is quantized.
      where: which of them are keys or values, such as `"**/cached_*"`.
      format: as in `kv_cache`, and so are the rest.
      axes: likewise.
      query: likewise.

    Raises:
      TypeError: if a matched leaf is not floating, or as `kv_cache` does.
      ValueError: if `where` matches nothing, or as `kv_cache` does.
    """
    marked = dict(trees.items(trees.select(tree, where, caller="cached")))

    def make(path: str, leaf: Any) -> Any:
        if not marked[path]:
            return leaf
        if trees.is_typed(leaf) or not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            kind = type(leaf).__name__ if trees.is_typed(leaf) else jnp.result_type(leaf)
            raise TypeError(f"`cached(...)`: `{path}` is {kind}; a cache is made of floats.")
        empty = kv_cache(leaf.shape, format, axes=axes, query=query, dtype=leaf.dtype)
        return empty.update(leaf, 0, axis=0)

    return trees.map_with_path(make, tree)


def attend(
    queries: jax.Array,
    keys: Cache | jax.Array,
    values: Cache | jax.Array,
    *,
    mask: jax.Array | None = None,
    scale: float | None = None,
) -> jax.Array:
    """Attention over caches: `softmax(scale q kᵀ) v`, on their codes.

    Args:
      queries: `"[..., queries, heads, size]"`.
      keys: `"[..., tokens, kv_heads, size]"`, where `kv_heads` divides `heads`.
      values: likewise.
      mask: booleans that broadcast to `"[..., heads, queries, tokens]"`; False is not looked at. A
        query that may look at nothing gets zeros. A token of a `Cache` that no query may look at
        may hold anything, infinities and NaN too; else all values must be finite.
      scale: default `1 / sqrt(size)`.

    Returns:
      `"[..., queries, heads, size]"`. The softmax is computed in float32.

    Raises:
      ValueError: if keys and values differ in shape, or their heads do not divide the queries'.
    """
    size, heads = queries.shape[-1], queries.shape[-2]
    if keys.shape != values.shape or not keys.shape[-2] or heads % keys.shape[-2]:
        raise ValueError(
            f"`attend(queries, keys, values)`: keys {keys.shape} and values {values.shape} must be "
            f"alike, and their heads divide the {heads} of the queries."
        )
    if 0 in (*queries.shape, keys.shape[-3]):  # nothing to look at, or nobody who does
        return jnp.zeros_like(queries)
    factor = 1.0 / math.sqrt(size) if scale is None else scale
    if mask is not None:
        seen = _seen(mask, heads, keys.shape[-2])
        keys, values = _only(keys, seen), _only(values, seen)

    def attention(q: jax.Array, k: Any, v: Any, mask: jax.Array | None) -> jax.Array:
        grouped = q.reshape((*q.shape[:-2], k.shape[-2], heads // k.shape[-2], size)) * factor
        scores = jnp.einsum("...qhgd,...khd->...hgqk", grouped, k.astype(q.dtype))
        scores = scores.reshape((*q.shape[:-3], heads, q.shape[-3], k.shape[-3]))
        probs = _softmax(scores.astype(jnp.float32), mask).astype(q.dtype)
        probs = probs.reshape((*q.shape[:-3], k.shape[-2], -1, *probs.shape[-2:]))
        out = jnp.einsum("...hgqk,...khd->...qhgd", probs, v.astype(q.dtype))
        return out.reshape(q.shape)

    return lift(attention)(queries, keys, values, mask)


def _seen(mask: jax.Array, heads: int, kv_heads: int) -> jax.Array:
    """Which tokens any query looks at, `"[..., tokens, kv_heads, 1]"`, each axis maybe 1."""
    mask = jnp.asarray(mask, bool)
    mask = mask.reshape((1,) * max(0, 3 - mask.ndim) + mask.shape).any(-2)
    if mask.shape[-2] == heads:
        mask = mask.reshape((*mask.shape[:-2], kv_heads, heads // kv_heads, -1)).any(-2)
    return mask.swapaxes(-1, -2)[..., None]


def _only(cache: Cache | jax.Array, seen: jax.Array) -> Cache | jax.Array:
    """A cache whose unseen tokens are zeros, whatever they hold: zero times NaN would be NaN."""
    if not isinstance(cache, Cache):
        return cache
    seen = seen.any(tuple(range(max(0, seen.ndim - cache.ndim))))
    seen = seen.reshape((1,) * (cache.ndim - seen.ndim) + seen.shape)

    def zeroed(array: jax.Array) -> jax.Array:
        shared = [axis for axis, n in enumerate(array.shape) if n == 1]
        return jnp.where(seen.any(tuple(shared), keepdims=True), array, jnp.zeros_like(array))

    codes = zeroed(cache.codes) if isinstance(cache.format, FP8) else cache.codes
    return dataclasses.replace(cache, codes=codes, scale=zeroed(cache.scale))


def _softmax(scores: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Probabilities of what the mask leaves; zeros where it leaves nothing."""
    if mask is None:
        return jax.nn.softmax(scores)
    mask = jnp.broadcast_to(mask, scores.shape)
    seen = jnp.any(mask, axis=-1, keepdims=True)
    # Rows of nothing are computed as rows of everything, so that derivatives are no NaN.
    return jnp.where(seen, jax.nn.softmax(jnp.where(mask | ~seen, scores, -jnp.inf)), 0.0)


def _check(format: Format, query: Format | None) -> None:
    if not isinstance(format, Int | FP8):
        raise TypeError(f"`kv_cache(..., format={format!r})`: a cache holds `Int` or `FP8` codes.")
    if format.granularity == "group" or format.rounding == "stochastic":
        raise ValueError(
            f"`kv_cache(..., format={format})`: what is written is rounded without a key, with one "
            "scale along `axes`; neither groups nor stochastic rounding are for it."
        )
    if query is None:
        return
    pair = (format, query)
    if not all(isinstance(f, Int) and f.symmetric for f in pair) or query.rounding == "stochastic":
        raise ValueError(
            f"`kv_cache(..., format={format}, query={query})`: products of integers need two "
            "symmetric `Int` formats that round without a key. Leave `query` out."
        )
