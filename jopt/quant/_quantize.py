"""Weights into typed leaves: as integer codes, or trainable under fake quantization."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jopt import trees
from jopt.trace import Site

from ._formats.base import Grid
from ._leaves.weights import FakeQuant, QArray, Range
from ._policy import Policy, Spec, axes_of, resolve
from ._training.fake import keyed
from ._training.learned import TrainedQuant, first_step, marked
from ._training.noise import with_key

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
      key: for formats that round stochastically. Of `FakeQuant` leaves it gives what training saw
        of `with_key(params, key)`.

    Returns:
      `params` with `QArray` leaves.

    Raises:
      TypeError: if a matched leaf is not floating, or the policy is no policy.
      ValueError: if a `where` matches nothing, groups do not divide, a matched leaf is a scalar or
        is quantized already, a stochastic format has no key, or a `Spec` is for training alone.

    Example:
      >>> import jax.numpy as jnp
      >>> from jopt.quant import Int, quantize
      >>> params = {"dense": {"kernel": jnp.ones((4, 2)), "bias": jnp.zeros(2)}}
      >>> quantize(params, [("**/kernel", Int(8))])["dense"]["kernel"].codes.dtype
      dtype('int8')
    """
    if policy is None:
        return _converted(params, key)
    order = trees.paths(params)

    def make(path: str, leaf: jax.Array, spec: Spec, axes: tuple[int, ...]) -> QArray:
        if spec.trains:
            raise ValueError(
                f"`quantize(...)`: `{path}` has {spec}, part of which is for training.\n"
                "Call `qat(params, policy)`, train, and then `quantize(params)`."
            )
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

    A `Spec` may say more: `weight_step` and `activation_step` learn the steps of the grids (arrays
    of the leaf, which train with the rest), `backward` runs products on codes in both directions.
    What is rounded at random needs `with_key(params, key)` in the loss; `noise` and `with_bits`
    change what a step sees likewise.

    Args:
      params: any pytree of arrays.
      policy: as in `quantize`.
      sites: as in `quantize`.

    Returns:
      `params` with `FakeQuant` leaves. Static activation ranges are filled in by `calibrate`,
      learned activation steps by `init_steps`.

    Raises:
      TypeError: as in `quantize`.
      ValueError: as in `quantize`.

    References:
      Benoit Jacob et al., Quantization and training of neural networks for efficient
      integer-arithmetic-only inference, 2017, arXiv:1712.05877.
    """

    def make(path: str, leaf: jax.Array, spec: Spec, axes: tuple[int, ...]) -> FakeQuant:
        weight = jnp.asarray(leaf)
        plain = FakeQuant(weight, None, spec.weight, axes, spec.activation, spec.static)
        if not spec.trains:
            return plain
        method, step = spec.weight_step, None
        if method is not None:
            step = first_step(weight, spec.weight, axes, method)
        return TrainedQuant(
            **{field.name: getattr(plain, field.name) for field in dataclasses.fields(plain)},
            step=step,
            weight_method=method,
            activation_method=spec.activation_step,
            backward=spec.backward,
        )

    if policy is None:
        raise TypeError("`qat(params, policy)` needs a policy, such as `Int(8)`.")
    return _mapped("qat", params, policy, sites, make)


def trainable(params: PyTree) -> PyTree:
    """Marks what an optimizer may change: floating arrays and learned steps, no codes, no ranges.

    For `optax.masked(tx, trainable(params))`, or the mask of a weight decay.

    Example:
      >>> import jax.numpy as jnp
      >>> from jopt.quant import Int, quantize, trainable
      >>> params = quantize({"bias": jnp.ones(2), "kernel": jnp.ones((2, 2))}, Int(8))
      >>> trainable(params)["bias"], trainable(params)["kernel"].scale
      (True, False)
    """

    return marked(params, lambda leaf: leaf.trained, True)


def coded(
    weight: jax.Array,
    spec: Spec,
    axes: tuple[int, ...],
    *,
    key: jax.Array | None = None,
    range: Range | None = None,
    grid: Grid | None = None,
) -> QArray:
    """One weight as codes, on a grid of its own or the one given."""
    weight, format = jnp.asarray(weight), spec.weight
    grid = format.fit(weight, axes) if grid is None else grid
    codes = keyed(lambda x, g, k: format.encode(x, g, key=k), weight, grid, key)
    codes = codes.astype(format.container)
    return QArray(
        codes, *grid, range, format, spec.activation, spec.static, jnp.dtype(weight.dtype)
    )


# Helpers, in order of use.


def _converted(params: PyTree, key: jax.Array | None) -> PyTree:
    def convert(path: str, leaf: Any) -> Any:
        if not isinstance(leaf, FakeQuant):
            return leaf
        if leaf.keep is not None or leaf.bits is not None:
            raise ValueError(
                f"`quantize(params)`: `{path}` is as `noise` or `with_bits` made it for one step.\n"
                "Pass the parameters that train."
            )
        if leaf.format.rounding == "stochastic" and leaf.key is None:
            raise ValueError(
                f"`quantize(...)`: `{path}` rounds stochastically: pass `key=`, or "
                "`quantize(deterministic(params))` to round to nearest."
            )
        range, static = leaf.activation_range(), leaf.static
        if isinstance(leaf, TrainedQuant) and leaf.activation_method is not None:
            if range is None:
                raise ValueError(
                    f"`quantize(params)`: `{path}` has a learned activation step that was never "
                    "begun.\nCall `params = jopt.quant.init_steps(apply, params, batches)`."
                )
            static = True
        spec = Spec(leaf.format, leaf.activation, static)
        options: dict[str, Any] = {"key": leaf.weight_key, "range": range}
        return coded(leaf.weight, spec, leaf.axes, grid=leaf.weight_grid(), **options)

    if not any(isinstance(leaf, FakeQuant) for _, leaf in trees.items(params)):
        raise ValueError(
            "`quantize(params)` without a policy converts the leaves that `qat` made, and there "
            "are none. Pass a policy, such as `Int(8)`."
        )
    return trees.map_with_path(convert, params if key is None else with_key(params, key))


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
