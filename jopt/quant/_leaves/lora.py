"""Low-rank adapters on any weight, quantized or not: LoRA, and QLoRA as a nested leaf."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jopt import trees
from jopt.trace import Layered, Site, Table, rule
from jopt.trace.layered import full_along

from .._formats.layout import contracted
from .._policy import _layout as layout_of

PyTree = Any


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["base", "down", "up"],
    meta_fields=["scaling"],
)
@dataclasses.dataclass(frozen=True)
class LoRA(Layered):
    """A weight plus a product of two thin ones, made by `jopt.quant.lora`: `W + s A B`.

    The base may be an array or any typed leaf, such as int8 or NF4 codes. A product with the leaf
    is the base's own product plus two thin ones, so that the merged weight is never formed. Use it
    inside `jopt.lift(apply)`.

    Each factor has the weight's rank and one axis more, the adapter's rank, last: `down` has length
    1 along the axes that are not summed, `up` along those that are.
    """

    base: Any  # an array or a typed leaf
    down: jax.Array  # [*weight's axes, rank]
    up: jax.Array  # [*weight's axes, rank]
    scaling: float

    def materialise(self) -> jax.Array:
        """The merged weight, the sum taken in float32."""
        base = self.base.materialise() if trees.is_typed(self.base) else self.base
        wide = base.dtype if base.dtype.itemsize > 4 else jnp.float32
        return (base.astype(wide) + self.delta(wide)).astype(base.dtype)

    def delta(self, dtype: Any) -> jax.Array:
        """What is added to the base."""
        total = jnp.einsum("...r,...r->...", self.down, self.up) * self.scaling
        return total.astype(dtype)

    def split(self) -> tuple[Any, Any]:
        """The base; and the factors."""
        return self.base, (Table(self.down), Table(self.up))

    def joined(self, array: Any, coarse: Any) -> "LoRA":
        """This leaf with other arrays."""
        down, up = coarse
        return dataclasses.replace(self, base=array, down=down.entries, up=up.entries)

    def trainable(self, mark: Callable[[Any], Any]) -> "LoRA":
        """What of this trains: of the factors what `mark` says, and nothing of the base."""
        frozen = jax.tree.map(lambda _: False, self.base)
        return dataclasses.replace(self, base=frozen, down=mark(self.down), up=mark(self.up))

    def storage(self) -> dict[str, tuple[Any, int]]:
        """The base's arrays and the factors."""
        kept = super().storage()
        if trees.is_typed(self.base):
            kept |= {f"base/{name}": array for name, array in self.base.storage().items()}
        return kept

    def size(self) -> trees.Size:
        """Values of the base and of the factors, those that are not zero, and bits in all."""
        return trees.size({"base": self.base, "down": self.down, "up": self.up})


def lora(
    params: PyTree,
    where: trees.Where,
    rank: int,
    alpha: float | None = None,
    *,
    key: jax.Array,
    sites: Sequence[Site] | None = None,
    rank_stabilized: bool = False,
    dtype: Any = jnp.float32,
) -> PyTree:
    """Adds low-rank adapters to weights; use the result in `jopt.lift(apply)`.

        W' = W + s A B,   A [in, rank] ~ N(0, 1 / in),   B [rank, out] = 0,   s = alpha / rank

    so that the function is unchanged at first. On weights that `quantize` made this is QLoRA: the
    base stays integers. `trainable` marks the adapters (and whatever else is floating): train with
    `partition(params, adapters(params))`, so that nothing else is differentiated, and `merge` them
    in the end.

    Args:
      params: any pytree of arrays and typed leaves.
      where: which leaves get adapters.
      rank: of the adapters.
      alpha: strength. Default: `rank`, that is `s = 1`.
      key: for `A`.
      sites: `jopt.sites(apply, params, *inputs)`, which tells which axes each weight is summed
        over. Without it the layout is taken to be `[..., in, out]`, from rank 4 a convolution's
        `[*window, in, out]`.
      rank_stabilized: `s = alpha / sqrt(rank)`.
      dtype: of the adapters.

    Returns:
      `params` with `LoRA` leaves.

    Raises:
      TypeError: if a matched leaf is not floating.
      ValueError: if `where` matches nothing, the rank is not positive, `alpha` is not finite, or a
        leaf is a vector or has adapters already.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jopt import quant
      >>> params = quant.quantize({"kernel": jnp.ones((64, 32))}, quant.Int(4))
      >>> adapted = quant.lora(params, "kernel", 4, key=jax.random.key(0))
      >>> adapted["kernel"].down.shape, adapted["kernel"].up.shape
      ((64, 1, 4), (1, 32, 4))

    References:
      Edward J. Hu et al., LoRA: low-rank adaptation of large language models, 2021,
      arXiv:2106.09685. Tim Dettmers et al., QLoRA: efficient finetuning of quantized LLMs, 2023,
      arXiv:2305.14314. Damjan Kalajdzievski, A rank stabilization scaling factor for fine-tuning
      with LoRA, 2023, arXiv:2312.03732.
    """
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(f"`lora(params, where, {rank!r})`: rank is a positive integer.")
    marked = dict(trees.items(trees.select(params, where, caller="lora")))
    order = trees.paths(params)
    strength = rank if alpha is None else alpha
    if not math.isfinite(strength):
        raise ValueError(
            f"`lora(params, where, {rank}, alpha={alpha!r})`: alpha is a finite number; leave it "
            "out for the rank itself."
        )
    scaling = strength / (math.sqrt(rank) if rank_stabilized else rank)

    def adapt(path: str, leaf: Any) -> Any:
        if not marked[path]:
            return leaf
        shape, summed, stacked = _axes(path, leaf, sites)
        inputs = math.prod(shape[axis] for axis in summed)
        whole = (*range(stacked), *summed)
        own = jax.random.fold_in(key, order.index(path))
        down = jax.random.normal(own, (*_only(shape, whole), rank), dtype) / math.sqrt(inputs)
        rest = [axis for axis in range(len(shape)) if axis not in summed]
        up = jnp.zeros((*_only(shape, rest), rank), dtype)
        return LoRA(leaf, down.astype(dtype), up, float(scaling))

    return trees.map_with_path(adapt, params)


def merge(params: PyTree) -> PyTree:
    """Replaces weights with adapters by arrays, `W + s A B`; all else stays as it is.

    Quantize the result anew if need be, `quantize(merge(params), policy, sites=sites)`, which
    rounds again.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jopt import quant
      >>> adapted = quant.lora({"kernel": jnp.eye(2)}, "kernel", 1, key=jax.random.key(0))
      >>> quant.merge(adapted)["kernel"].tolist()
      [[1.0, 0.0], [0.0, 1.0]]
    """
    return trees.map_with_path(
        lambda _, leaf: leaf.materialise() if isinstance(leaf, LoRA) else leaf, params
    )


def adapters(params: PyTree) -> PyTree:
    """Marks the adapters and nothing else, like `trainable` does all that floats.

    For `optax.masked`, `optax.multi_transform` or `partition`.

    Raises:
      ValueError: if there are none.
    """

    def mark(leaf: Any) -> Any:
        if isinstance(leaf, LoRA):
            return leaf.trainable(lambda _: True)
        return jax.tree.map(lambda _: False, leaf)

    if not any(isinstance(leaf, LoRA) for _, leaf in trees.items(params)):
        raise ValueError("`adapters(params)`: there are none; `lora(params, ...)` makes them.")
    return jax.tree.map(mark, params, is_leaf=trees.is_typed)


def partition(params: PyTree, mask: PyTree) -> tuple[PyTree, PyTree]:
    """Splits parameters in two of the same structure, each with None where the other has arrays.

    What `jax.grad` and optax get is the first, which holds no integers; `combine` puts the two
    together inside the loss.

    Args:
      params: any pytree.
      mask: booleans in its structure, such as `adapters(params)` or `trainable(params)`.

    Returns:
      What is marked, and the rest.

    Example:
      >>> import jax.numpy as jnp
      >>> from jopt import quant
      >>> params = quant.quantize({"bias": jnp.ones(2), "kernel": jnp.ones((2, 2))}, quant.Int(8))
      >>> trained, rest = quant.partition(params, quant.trainable(params))
      >>> len(jax.tree.leaves(trained)), len(jax.tree.leaves(rest))
      (1, 2)
      >>> quant.combine(trained, rest)["bias"]
      Array([1., 1.], dtype=float32)
    """
    return (
        jax.tree.map(lambda marked, x: x if marked else None, mask, params),
        jax.tree.map(lambda marked, x: None if marked else x, mask, params),
    )


def combine(trained: PyTree, rest: PyTree) -> PyTree:
    """Puts together what `partition` split."""
    return jax.tree.map(
        lambda one, other: other if one is None else one, trained, rest, is_leaf=lambda x: x is None
    )


# Rules.


@rule(jax.lax.dot_general_p, LoRA)
def _dot(call: Any, *operands: Any) -> Any:
    """The base's product, plus one with each factor."""
    side = 0 if isinstance(operands[0], LoRA) else 1
    leaf, x = operands[side], operands[1 - side]
    if trees.is_typed(x):
        return NotImplemented
    base = call.bind(*_placed(side, leaf.base, x))
    summed, batch = (axes[side] for axes in call.params["dimension_numbers"])
    factors = _factors(leaf, summed, batch)
    if factors is None:
        return base + call.bind(*_placed(side, leaf.delta(leaf.dtype), x)).astype(base.dtype)
    return base + _thin(call, leaf, x, factors, side).astype(base.dtype)


@rule(jax.lax.conv_general_dilated_p, LoRA)
def _conv(call: Any, x: Any, leaf: Any) -> Any:
    """The base's convolution, plus a thin one and a product over its features."""
    if not isinstance(leaf, LoRA) or trees.is_typed(x):
        return NotImplemented
    base, params = call.bind(x, leaf.base), call.params
    numbers = params["dimension_numbers"]
    output, summed = numbers.rhs_spec[0], numbers.rhs_spec[1:]
    groups = params["feature_group_count"] * params["batch_group_count"]
    factors = _factors(leaf, summed, ()) if groups == 1 else None
    if factors is None:
        return base + call.bind(x, leaf.delta(leaf.dtype)).astype(base.dtype)
    first, second = (factor.astype(x.dtype) for factor in factors)
    thin = call.bind(x, jnp.moveaxis(jnp.squeeze(first, output), -1, output))
    feature, last = numbers.out_spec[1], jnp.squeeze(second, summed)  # [out, rank]
    result = jax.lax.dot_general(thin, last, (((feature,), (1,)), ((), ())), params["precision"])
    return base + jnp.moveaxis(result * leaf.scaling, -1, feature).astype(base.dtype)


@rule(jax.lax.convert_element_type_p, LoRA)
def _convert(call: Any, leaf: LoRA) -> Any:
    """A cast of the base; the factors are cast where they are multiplied."""
    if not jnp.issubdtype(call.params["new_dtype"], jnp.floating):
        return NotImplemented
    return dataclasses.replace(leaf, base=call.bind(leaf.base))


@rule(jax.lax.gather_p, LoRA)
def _gather(call: Any, leaf: Any, indices: Any) -> Any:
    """Rows of an embedding: those of the base, and of the adapter."""
    if not isinstance(leaf, LoRA) or trees.is_typed(indices):
        return NotImplemented
    rows = call.bind(leaf.base, indices)
    return rows + call.bind(leaf.delta(rows.dtype), indices)


# Helpers, in order of use.


def _axes(
    path: str, leaf: Any, sites: Sequence[Site] | None
) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """Shape of a weight, the axes that its products sum, and how many leading ones count layers."""
    shape, dtype = jnp.shape(leaf), jnp.result_type(leaf)
    if isinstance(leaf, LoRA):
        raise ValueError(f"`lora(...)`: `{path}` has adapters already; `merge` them first.")
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"`lora(...)`: `{path}` is {dtype}; only floating weights get adapters.")
    if len(shape) < 2:
        raise ValueError(
            f"`lora(...)`: `{path}` has shape {shape}; adapters are for matrices and larger."
        )
    summed, stacked = layout_of(path, len(shape), sites)
    if summed is None:
        summed, stacked = contracted(len(shape)), 1 if len(shape) == 3 else 0
    return shape, tuple(axis % len(shape) for axis in summed), stacked or 0


def _only(shape: Sequence[int], kept: Sequence[int]) -> tuple[int, ...]:
    return tuple(size if axis in kept else 1 for axis, size in enumerate(shape))


def _placed(side: int, weight: Any, x: Any) -> tuple[Any, Any]:
    return (weight, x) if side == 0 else (x, weight)


def _factors(
    leaf: LoRA, summed: Sequence[int], batch: Sequence[int]
) -> tuple[jax.Array, jax.Array] | None:
    """The factor that meets the activation, and the other; None if both run along one of the axes.

    Where a weight is used transposed, as tied embeddings are, the two change places.
    """
    shape = leaf.shape
    free = [axis for axis in range(len(shape)) if axis not in (*summed, *batch)]
    for first, second in ((leaf.down, leaf.up), (leaf.up, leaf.down)):
        if all(first.shape[a] == 1 for a in free) and all(second.shape[a] == 1 for a in summed):
            first = full_along(first, shape, (*summed, *batch))
            return first, full_along(second, shape, (*free, *batch))
    return None


def _thin(call: Any, leaf: LoRA, x: jax.Array, factors: Any, side: int) -> jax.Array:
    """The products of an activation with one factor and then with the other."""
    first, second = (factor.astype(x.dtype) for factor in factors)
    summed, batch = call.params["dimension_numbers"]
    (own, others), (mine, theirs) = ((axes[side], axes[1 - side]) for axes in (summed, batch))
    free = [axis for axis in range(leaf.ndim) if axis not in (*own, *mine)]
    precision = call.params["precision"]

    def placed(factor: jax.Array, gone: Sequence[int]) -> jax.Array:
        """Batch axes first, then those that are left, the adapter's rank last."""
        rest = [a for a in range(leaf.ndim) if a not in (*mine, *gone)]
        kept = (*mine, *rest, leaf.ndim, *gone)
        moved = jnp.transpose(factor, kept)
        return moved.reshape(moved.shape[: len(mine) + len(rest) + 1])

    down, up = placed(first, free), placed(second, own)
    # `placed` keeps the weight's order of summed axes, the product names them in its own.
    order = [sorted(own).index(axis) + len(mine) for axis in own]
    batches = tuple(range(len(mine)))
    thin = jax.lax.dot_general(x, down, ((others, order), (theirs, batches)), precision)
    left, right = (thin, up) if side == 1 else (up, thin)
    last = ((left.ndim - 1,), (right.ndim - 1,))
    result = jax.lax.dot_general(left, right, (last, (batches, batches)), precision)
    return result * leaf.scaling
