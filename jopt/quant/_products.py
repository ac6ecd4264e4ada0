"""Rules for products: `dot_general` and convolution of an activation with a quantized weight.

The dense form of each is defined first: the weight dequantized (or fake-quantized), the activation
fake-quantized, a float product. `QArray` with an activation format computes the same on integers,

    y = scale_x scale_w Σ (q_x - z_x)(q_w - z_w),

the sum in int32, the scales in the epilogue, and takes its derivative from the dense form. The
dense form also runs where integers cannot: where the weight's scale varies along the contracted
axes (groups), where the sum could overflow int32, for `batch_group_count`, and for weights alone.

A NaN in an activation makes the result NaN, except on integers with a static range, where it has
the code 0.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jopt import trees
from jopt.trace import Stat, rule
from jopt.trace.layered import full_along, shared_along

from ._fake import straight_through
from ._formats import Grid, Int
from ._leaves import QArray, WeightLeaf

Place = Callable[[jax.Array], jax.Array | None]


class Axes(NamedTuple):
    """The axes of one operand of a `dot_general`."""

    contract: tuple[int, ...]
    batch: tuple[int, ...]
    free: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class _Dot:
    """A `dot_general` of an activation and a weight, as a value: equal ones share their traces."""

    params: tuple[tuple[str, Any], ...]
    side: int  # 0: the weight is on the left
    weight: Axes
    other: Axes
    dtype: Any

    @property
    def contract(self) -> Sequence[int] | None:
        return self.weight.contract

    def place(self, coarse: jax.Array) -> jax.Array | None:
        return _onto_activation(coarse, self.weight, self.other)

    def dense(self, x: jax.Array, w: jax.Array) -> jax.Array:
        operands = (w, x) if self.side == 0 else (x, w)
        return jax.lax.dot_general_p.bind(*operands, **dict(self.params))

    def integers(self, codes: jax.Array, grid: Grid, leaf: QArray) -> jax.Array:
        weight = (leaf.codes, leaf.grid, self.weight)
        return _integer_dot(dict(self.params), self.side, (codes, grid, self.other), weight)


@dataclasses.dataclass(frozen=True)
class _Conv:
    """A `conv_general_dilated` of an activation and a weight, likewise."""

    params: tuple[tuple[str, Any], ...]
    dtype: Any

    @property
    def contract(self) -> Sequence[int] | None:
        params = dict(self.params)
        return (
            params["dimension_numbers"].rhs_spec[1:] if params["batch_group_count"] == 1 else None
        )

    def place(self, coarse: jax.Array) -> jax.Array | None:
        return coarse.reshape((1,) * coarse.ndim) if coarse.size == 1 else None

    def dense(self, x: jax.Array, w: jax.Array) -> jax.Array:
        return jax.lax.conv_general_dilated_p.bind(x, w, **dict(self.params))

    def integers(self, codes: jax.Array, grid: Grid, leaf: QArray) -> jax.Array:
        return _integer_conv(dict(self.params), codes, grid, leaf)


@rule(jax.lax.dot_general_p, WeightLeaf)
def _dot(call: Any, *operands: Any) -> Any:
    side = 0 if isinstance(operands[0], WeightLeaf) else 1
    leaf, x = operands[side], operands[1 - side]
    if leaf.always_dense or trees.is_typed(x):
        return NotImplemented
    contract, batch = call.params["dimension_numbers"]
    weight = _axes(contract[side], batch[side], leaf.ndim)
    other = _axes(contract[1 - side], batch[1 - side], x.ndim)
    return _product(call, leaf, x, _Dot(_frozen(call), side, weight, other, call.out[0].dtype))


@rule(jax.lax.conv_general_dilated_p, WeightLeaf)
def _conv(call: Any, x: Any, leaf: Any) -> Any:
    if not isinstance(leaf, WeightLeaf) or leaf.always_dense or trees.is_typed(x):
        return NotImplemented
    return _product(call, leaf, x, _Conv(_frozen(call), call.out[0].dtype))


def _frozen(call: Any) -> tuple[tuple[str, Any], ...]:
    return tuple(sorted(call.params.items(), key=lambda item: item[0]))


def _product(call: Any, leaf: WeightLeaf, x: jax.Array, operation: _Dot | _Conv) -> Any:
    """The product by its dense form, or on integers with the derivative of its dense form."""
    for name in getattr(leaf, "observed", ()):
        low, high = jnp.min(x, initial=0.0), jnp.max(x, initial=0.0)
        call.record(
            name, (Stat(low.astype(jnp.float32), "min"), Stat(high.astype(jnp.float32), "max"))
        )
    if leaf.activation is None or not jnp.issubdtype(x.dtype, jnp.floating):
        call.say("a float product of the dequantized weight: its activation has no format")
        return operation.dense(x, leaf.materialise())
    _check_calibrated(call.path, leaf)
    if leaf.range is not None and any(operation.place(end) is None for end in leaf.range):
        return NotImplemented  # the range differs within what one activation meets
    if why := _not_on_integers(leaf, operation.contract):
        call.say(f"a float product of dequantized values: {why}")
        return _simulated(x, leaf, operation)
    call.say("a product of integers")
    return _on_integers(x, leaf, operation)


# Compiled apart, so that products alike, as of the layers of a model, are traced and lowered once.


@functools.partial(jax.jit, static_argnames="operation")
def _simulated(x: jax.Array, leaf: WeightLeaf, operation: _Dot | _Conv) -> jax.Array:
    """The dense form."""
    return operation.dense(_rounded(x, leaf, operation.place), leaf.materialise())


@functools.partial(jax.jit, static_argnames="operation")
def _on_integers(x: jax.Array, leaf: QArray, operation: _Dot | _Conv) -> jax.Array:
    """The product of codes, with the derivative of the dense form."""

    @jax.custom_jvp
    def product(x: jax.Array, leaf: QArray) -> jax.Array:
        assert leaf.activation is not None
        grid = _activation_grid(x, leaf, operation.place)
        codes = leaf.activation.encode(x, grid).astype(jnp.int8)
        return operation.integers(codes, grid, leaf).astype(operation.dtype)

    @product.defjvp
    def _(primals: Any, tangents: Any) -> Any:
        simulated = functools.partial(_simulated, operation=operation)
        return product(*primals), jax.jvp(simulated, primals, tangents)[1]

    return product(x, leaf)


def _check_calibrated(path: str, leaf: WeightLeaf) -> None:
    if leaf.static and leaf.range is None:
        raise ValueError(
            f"`{path}` has a static activation range (`Spec(..., static=True)`) that was never "
            "measured.\nCall `params, report = jopt.quant.calibrate(apply, params, batches)` "
            "first, or choose `static=False` to find the range in each call."
        )


def _not_on_integers(leaf: WeightLeaf, contract: Sequence[int] | None) -> str:
    """Why a product cannot be computed on integers; empty if it can."""
    if not isinstance(leaf, QArray):
        return "it is being trained"
    if contract is None:
        return "`batch_group_count` is not 1"
    if not (isinstance(leaf.format, Int) and isinstance(leaf.activation, Int)):
        return f"{leaf.format} or {leaf.activation} has no integer codes"
    if not shared_along(leaf.scale, contract):
        return "the weight's scale differs along a summed axis, as that of groups does"
    terms = math.prod(leaf.codes.shape[axis] for axis in contract)
    largest = (leaf.format.high - leaf.format.low) * (leaf.activation.high - leaf.activation.low)
    return "" if terms * largest < 2**31 else f"{terms} terms could overflow 32 bits"


def _activation_grid(x: jax.Array, leaf: WeightLeaf, place: Place) -> Grid:
    format = leaf.activation
    assert format is not None
    if leaf.range is None:
        return format.grid(*format.extent(x, tuple(range(-x.ndim, 0))))
    low, high = place(leaf.range.low), place(leaf.range.high)
    assert low is not None and high is not None
    return format.grid(low, high)


def _rounded(x: jax.Array, leaf: WeightLeaf, place: Place) -> jax.Array:
    """The fake-quantized activation; beyond a static range its gradient is zero."""
    fixed, format = jax.lax.stop_gradient(x), leaf.activation
    assert format is not None
    grid = _activation_grid(fixed, leaf, place)
    values = format.decode(format.encode(fixed, grid), grid).astype(x.dtype)
    if leaf.range is None:
        return straight_through(x, values)
    values = jnp.where(jnp.isnan(fixed), fixed, values)  # a diverging run must show
    return straight_through(x, values, format.inside(fixed, grid))


# The dot product on integers.


def _axes(contract: Sequence[int], batch: Sequence[int], ndim: int) -> Axes:
    free = tuple(a for a in range(ndim) if a not in contract and a not in batch)
    return Axes(tuple(contract), tuple(batch), free)


def _onto_activation(coarse: jax.Array, weight: Axes, x: Axes) -> jax.Array | None:
    """Lays an array of the weight's rank onto the activation; only batch axes may differ in it."""
    if not shared_along(coarse, weight.contract + weight.free):
        return None
    order = x.batch + x.contract + x.free
    moved = jnp.transpose(coarse, weight.batch + weight.contract + weight.free)
    moved = moved.reshape(
        moved.shape[: len(weight.batch)] + (1,) * (len(order) - len(weight.batch))
    )
    return jnp.transpose(moved, [order.index(axis) for axis in range(len(order))])


def _onto_result(coarse: jax.Array, axes: Axes, other: Axes, side: int) -> jax.Array:
    """Lays an array of an operand's rank, 1 along contracted axes, onto the product's result."""
    moved = jnp.transpose(coarse, axes.batch + axes.free + axes.contract)
    sizes, batch = moved.shape[: len(axes.batch) + len(axes.free)], len(axes.batch)
    ones = (1,) * len(other.free)
    if side == 0:
        return moved.reshape(sizes + ones)
    return moved.reshape(sizes[:batch] + ones + sizes[batch:])


def _without_groups(coarse: jax.Array, shape: Sequence[int]) -> jax.Array:
    """A coarse array whose every axis has length 1 or the value's."""
    return full_along(coarse, shape, [a for a, n in enumerate(coarse.shape) if n != 1])


def _integer_dot(params: dict[str, Any], side: int, x: Any, weight: Any) -> jax.Array:
    (x_codes, x_grid, x_axes), (w_codes, w_grid, w_axes) = x, weight
    w_codes = w_codes.astype(jnp.int8)  # an int4 operand has no kernel on any backend

    def on_x(coarse: jax.Array) -> jax.Array:
        return _onto_result(coarse, x_axes, w_axes, 1 - side)

    def on_w(coarse: jax.Array) -> jax.Array:
        return _onto_result(_without_groups(coarse, w_codes.shape), w_axes, x_axes, side)

    total = jax.lax.dot_general(
        *((w_codes, x_codes) if side == 0 else (x_codes, w_codes)),
        params["dimension_numbers"],
        preferred_element_type=jnp.int32,
        out_sharding=params.get("out_sharding"),
    )
    # (q_x - z_x)(q_w - z_w), multiplied out; int32 wraps around, so only the result must fit.
    if x_grid.zero_point is not None:
        sums = jnp.sum(w_codes, w_axes.contract, jnp.int32, keepdims=True)
        total = total - on_x(x_grid.zero_point.astype(jnp.int32)) * on_w(sums)
    if w_grid.zero_point is not None:
        shifted = x_codes.astype(jnp.int32)
        if x_grid.zero_point is not None:
            shifted = shifted - x_grid.zero_point.astype(jnp.int32)
        sums = jnp.sum(shifted, x_axes.contract, jnp.int32, keepdims=True)
        total = total - on_x(sums) * on_w(w_grid.zero_point.astype(jnp.int32))
    return total.astype(jnp.float32) * (on_x(x_grid.scale) * on_w(w_grid.scale))


# The convolution on integers.


def _integer_conv(params: dict[str, Any], x: jax.Array, grid: Grid, leaf: QArray) -> jax.Array:
    numbers, groups = params["dimension_numbers"], params["feature_group_count"]
    x = _padded(x, grid, params)

    def on_features(coarse: jax.Array) -> jax.Array:
        coarse = _without_groups(coarse, leaf.codes.shape)
        shape = [1] * x.ndim
        shape[numbers.out_spec[1]] = coarse.shape[numbers.rhs_spec[0]]
        return coarse.reshape(shape)

    kernel, window = leaf.codes.astype(jnp.int8), numbers.rhs_spec[1:]
    total = _convolve(params, x, kernel)
    zero = None if grid.zero_point is None else grid.zero_point.astype(jnp.int32)
    if zero is not None:
        sums = jnp.sum(kernel, window, jnp.int32, keepdims=True)
        total = total - zero * on_features(sums)
    if leaf.zero_point is not None:
        # The sum of the codes under each window, one feature a group.
        feature, outputs = numbers.rhs_spec[0], kernel.shape[numbers.rhs_spec[0]]
        ones = jnp.ones_like(jax.lax.slice_in_dim(kernel, 0, groups, axis=feature))
        sums = _convolve(params, x, ones)
        if zero is not None:
            sums = sums - zero * math.prod(kernel.shape[axis] for axis in window)
        sums = jnp.repeat(sums, outputs // groups, axis=numbers.out_spec[1])
        total = total - sums * on_features(leaf.zero_point.astype(jnp.int32))
    return total.astype(jnp.float32) * (grid.scale * on_features(leaf.scale))


def _convolve(params: Any, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """The convolution of codes that are padded already, as int32."""

    def run(x: jax.Array, kernel: jax.Array, **options: Any) -> jax.Array:
        return jax.lax.conv_general_dilated(
            x,
            kernel,
            params["window_strides"],
            "VALID",
            rhs_dilation=params["rhs_dilation"],
            dimension_numbers=params["dimension_numbers"],
            feature_group_count=params["feature_group_count"],
            **options,
        )

    def integers(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return run(x, kernel, preferred_element_type=jnp.int32)

    def floats(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return run(x.astype(jnp.float32), kernel.astype(jnp.float32)).astype(jnp.int32)

    # cuDNN refuses int32 results of a convolution (jax-ml/jax#7637) and gets grouped int8 wrong
    # (openxla/xla#49123). Codes are exact in TF32, and so are float32 sums of them up to 2^24.
    return jax.lax.platform_dependent(x, kernel, cuda=floats, rocm=floats, default=integers)


def _padded(x: jax.Array, grid: Grid, params: Any) -> jax.Array:
    """Pads and dilates the codes by their own zero, which is not 0 if there is a zero point."""
    spatial = params["dimension_numbers"].lhs_spec[2:]
    widths = [(0, 0, 0)] * x.ndim
    for axis, (low, high), dilation in zip(
        spatial, params["padding"], params["lhs_dilation"], strict=True
    ):
        widths[axis] = (low, high, dilation - 1)
    if all(width == (0, 0, 0) for width in widths):
        return x
    zero = jnp.zeros((), x.dtype) if grid.zero_point is None else grid.zero_point.reshape(())
    return jax.lax.pad(x, zero, widths)
