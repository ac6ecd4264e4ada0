"""Weights into typed leaves: as integer codes, or trainable under fake quantization."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jopt import trees
from jopt.trace import Site

from ._leaves import FakeQuant, QArray, Range
from ._policy import Policy, Spec, axes_of, resolve

PyTree = Any


def quantize(
    params: PyTree,
    policy: Policy = None,
    *,
    sites: Sequence[Site] | None = None,
    key: jax.Array | None = None,
) -> PyTree:
    """Replaces weights by integer codes; use the result in `jopt.lift(apply)`.

    A policy is an ordered list of `(where, value)`, the first match wins, and weights that match
    nothing stay as they are. A value is a format (weight only), a `Spec`, or None (leave it). A
    bare format or `Spec` in place of the list is for every weight: with `sites` those that meet a
    product, without them every floating leaf of rank 2 or more.

    Args:
      params: any pytree of arrays; leaves already quantized stay as they are.
      policy: as above. None turns the `FakeQuant` leaves that `qat` made into what training saw,
        bit for bit, with their activation formats and ranges.
      sites: `jopt.sites(apply, params, *inputs)`, which tells which axes each weight is summed
        over. Without it the layout is taken to be `[..., in, out]`, from rank 4 a convolution's
        `[*window, in, out]`.
      key: for formats that round stochastically.

    Returns:
      `params` with `QArray` leaves.

    Raises:
      TypeError: if a matched leaf is not floating, or the policy is no policy.
      ValueError: if a `where` matches nothing, groups do not divide, a matched leaf is a scalar or
        is quantized already, or a stochastic format has no key.

    Example:
      >>> import jax.numpy as jnp
      >>> from jopt.quant import Int, quantize
      >>> params = {"dense": {"kernel": jnp.ones((4, 2)), "bias": jnp.zeros(2)}}
      >>> quantize(params, [("**/kernel", Int(8))])["dense"]["kernel"].codes.dtype
      dtype('int8')
    """
    if policy is None:
        return _converted(params)
    order = trees.paths(params)

    def make(path: str, leaf: jax.Array, spec: Spec, axes: tuple[int, ...]) -> QArray:
        if spec.weight.rounding != "stochastic":
            return coded(leaf, spec, axes)
        if key is None:
            raise ValueError(f"`quantize(...)`: `{path}` rounds stochastically: pass `key=`.")
        return coded(leaf, spec, axes, key=jax.random.fold_in(key, order.index(path)))

    return _mapped("quantize", params, policy, sites, make)


def qat(params: PyTree, policy: Policy, *, sites: Sequence[Site] | None = None) -> PyTree:
    """Replaces weights by leaves that train under quantization; use them in `jopt.lift(apply)`.

    Each product then sees `fake_quant` of its weight and, with an activation format, of its
    activation; gradients pass straight through to the weight. Optimizers, masks and checkpoints see
    the weights as ordinary arrays. `quantize(params)` afterwards gives the integers, bit-equal to
    what training saw.

    Args:
      params: any pytree of arrays.
      policy: as in `quantize`.
      sites: as in `quantize`.

    Returns:
      `params` with `FakeQuant` leaves. Static activation ranges are filled in by `calibrate`.

    Raises:
      TypeError: as in `quantize`.
      ValueError: as in `quantize`, and for formats that round stochastically: `fake_quant(x,
        format, key=key)` in the loss does that, with a key of its own in each step.

    References:
      Benoit Jacob et al., Quantization and training of neural networks for efficient
      integer-arithmetic-only inference, 2017, arXiv:1712.05877.
    """

    def make(path: str, leaf: jax.Array, spec: Spec, axes: tuple[int, ...]) -> FakeQuant:
        if spec.weight.rounding == "stochastic":
            raise ValueError(
                f"`qat(...)`: `{path}` has {spec.weight}, which needs a new key in every step.\n"
                "Call `jopt.quant.fake_quant(x, format, key=key)` in the loss instead."
            )
        return FakeQuant(jnp.asarray(leaf), None, spec.weight, axes, spec.activation, spec.static)

    if policy is None:
        raise TypeError("`qat(params, policy)` needs a policy, such as `Int(8)`.")
    return _mapped("qat", params, policy, sites, make)


def trainable(params: PyTree) -> PyTree:
    """Marks what an optimizer may change: floating arrays, but no codes, scales or ranges.

    For `optax.masked(tx, trainable(params))`, or the mask of a weight decay.

    Example:
      >>> import jax.numpy as jnp
      >>> from jopt.quant import Int, quantize, trainable
      >>> params = quantize({"bias": jnp.ones(2), "kernel": jnp.ones((2, 2))}, Int(8))
      >>> trainable(params)["bias"], trainable(params)["kernel"].scale
      (True, False)
    """

    def mark(leaf: Any) -> Any:
        if not trees.is_typed(leaf):
            return bool(jnp.issubdtype(jnp.result_type(leaf), jnp.floating))
        frozen = jax.tree.map(lambda _: False, leaf)
        return trees.with_weight(frozen, True) if hasattr(leaf, "with_weight") else frozen

    return jax.tree.map(mark, params, is_leaf=trees.is_typed)


def coded(
    weight: jax.Array,
    spec: Spec,
    axes: tuple[int, ...],
    *,
    key: jax.Array | None = None,
    range: Range | None = None,
) -> QArray:
    """One weight as codes."""
    weight = jnp.asarray(weight)
    grid = spec.weight.fit(weight, axes)
    codes = spec.weight.encode(weight, grid, key=key).astype(spec.weight.container)
    return QArray(
        codes, *grid, range, spec.weight, spec.activation, spec.static, jnp.dtype(weight.dtype)
    )


# Helpers, in order of use.


def _converted(params: PyTree) -> PyTree:
    def convert(leaf: Any) -> Any:
        if not isinstance(leaf, FakeQuant):
            return leaf
        spec = Spec(leaf.format, leaf.activation, leaf.static)
        return coded(leaf.weight, spec, leaf.axes, range=leaf.range)

    if not any(isinstance(leaf, FakeQuant) for _, leaf in trees.items(params)):
        raise ValueError(
            "`quantize(params)` without a policy converts the leaves that `qat` made, and there "
            "are none. Pass a policy, such as `Int(8)`."
        )
    return jax.tree.map(convert, params, is_leaf=trees.is_typed)


def _mapped(
    caller: str,
    params: PyTree,
    policy: Policy,
    sites: Sequence[Site] | None,
    make: Callable[[str, Any, Spec, tuple[int, ...]], Any],
) -> PyTree:
    chosen = resolve(params, policy, sites=sites, caller=caller)

    def replace(path: str, leaf: Any) -> Any:
        if path not in chosen:
            return leaf
        spec = chosen[path]
        return make(path, leaf, spec, axes_of(path, leaf, spec, sites, caller))

    return trees.map_with_path(replace, params)
