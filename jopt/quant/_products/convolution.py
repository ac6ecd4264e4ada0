"""The convolution of an activation with a quantized weight: dense, in bfloat16, on integers."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jopt.trace.layered import full_along, repeated

from .._formats.base import Grid, Int
from .._leaves.weights import QArray, WeightLeaf

EXACT = 2**24  # up to here float32 holds every integer


@dataclasses.dataclass(frozen=True)
class Conv:
    """A `conv_general_dilated` of an activation and a weight, as a value."""

    params: tuple[tuple[str, Any], ...]
    dtype: Any

    @property
    def contract(self) -> Sequence[int] | None:
        """The axes of the weight that are summed over, if every output sums over all of them."""
        params = dict(self.params)
        return (
            params["dimension_numbers"].rhs_spec[1:] if params["batch_group_count"] == 1 else None
        )

    def summed(self, ndim: int) -> tuple[int, ...]:
        """The axes of the activation that share a scale where tokens have one: of an example."""
        batch = dict(self.params)["dimension_numbers"].lhs_spec[0]
        return tuple(axis for axis in range(ndim) if axis != batch)

    def place(self, coarse: jax.Array) -> jax.Array | None:
        """An array of the weight's rank laid onto the activation; None where it differs in it."""
        return coarse.reshape((1,) * coarse.ndim) if coarse.size == 1 else None

    def dense(self, x: jax.Array, w: jax.Array) -> jax.Array:
        """The convolution of arrays."""
        return jax.lax.conv_general_dilated_p.bind(x, w, **dict(self.params))

    def bfloat16(self, x: jax.Array, leaf: WeightLeaf) -> jax.Array:
        """Both operands in bfloat16, sums in float32."""
        params = {**dict(self.params), "preferred_element_type": jnp.dtype(jnp.float32)}
        x, w = x.astype(jnp.bfloat16), leaf.materialise().astype(jnp.bfloat16)
        return jax.lax.conv_general_dilated_p.bind(x, w, **params)

    def integers(self, codes: jax.Array, grid: Grid, leaf: QArray) -> jax.Array:
        """Codes with codes into int32, scales afterwards."""
        return _integers(dict(self.params), codes, grid, leaf)


def _integers(params: dict[str, Any], x: jax.Array, grid: Grid, leaf: QArray) -> jax.Array:
    numbers, groups = params["dimension_numbers"], params["feature_group_count"]
    x = _padded(x, grid, params)

    def on_features(coarse: jax.Array) -> jax.Array:
        axes = [a for a, n in enumerate(coarse.shape) if n != 1]
        coarse = full_along(coarse, leaf.codes.shape, axes)
        shape = [1] * x.ndim
        shape[numbers.out_spec[1]] = coarse.shape[numbers.rhs_spec[0]]
        return coarse.reshape(shape)

    def on_examples(coarse: jax.Array) -> jax.Array:
        shape = [1] * x.ndim
        shape[numbers.out_spec[0]] = coarse.shape[numbers.lhs_spec[0]]
        return coarse.reshape(shape)

    kernel, window = leaf.codes.astype(jnp.int8), numbers.rhs_spec[1:]
    size = _magnitude(leaf.activation), _magnitude(leaf.format)
    total = _convolve(params, x, kernel, size)
    zero = None if grid.zero_point is None else on_examples(grid.zero_point.astype(jnp.int32))
    if zero is not None:
        sums = jnp.sum(kernel, window, jnp.int32, keepdims=True)
        total = total - zero * on_features(sums)
    if leaf.zero_point is not None:
        # The sum of the codes under each window, one feature a group.
        feature, outputs = numbers.rhs_spec[0], kernel.shape[numbers.rhs_spec[0]]
        ones = jnp.ones_like(jax.lax.slice_in_dim(kernel, 0, groups, axis=feature))
        sums = _convolve(params, x, ones, (size[0], 1))
        if zero is not None:
            sums = sums - zero * math.prod(kernel.shape[axis] for axis in window)
        sums = repeated(sums, outputs // groups, numbers.out_spec[1])
        total = total - sums * on_features(leaf.zero_point.astype(jnp.int32))
    return total.astype(jnp.float32) * (on_examples(grid.scale) * on_features(leaf.scale))


def _magnitude(format: Any) -> int:
    """The largest code in size."""
    assert isinstance(format, Int)
    return max(-format.low, format.high)


def _convolve(params: Any, x: jax.Array, kernel: jax.Array, size: tuple[int, int]) -> jax.Array:
    """The convolution of codes that are padded already and at most of `size`, as int32."""
    terms = math.prod(kernel.shape[axis] for axis in params["dimension_numbers"].rhs_spec[1:])

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

    # cuDNN refuses int32 results of a convolution (jax-ml/jax#7637) and gets grouped int8 wrong
    # (openxla/xla#49123). Codes are exact in TF32, and so are float32 sums of them up to 2^24.
    # Longer sums are put together from those of half codes: 16 high + low, low in 0 ... 15.
    def floats(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return _split_sum(run, x, kernel, terms, size)

    return jax.lax.platform_dependent(x, kernel, cuda=floats, rocm=floats, default=integers)


def _split_sum(
    run: Any, x: jax.Array, kernel: jax.Array, terms: int, size: tuple[int, int]
) -> jax.Array:
    def exact(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return run(x.astype(jnp.float32), kernel.astype(jnp.float32)).astype(jnp.int32)

    if terms * size[0] * size[1] <= EXACT:
        return exact(x, kernel)
    if size[0] >= size[1] and size[0] > 15:
        high, low = _nibbles(x)
        parts = [(high, kernel), (low, kernel)]
        smaller = (15, size[1])
    elif size[1] > 15:
        high, low = _nibbles(kernel)
        parts = [(x, high), (x, low)]
        smaller = (size[0], 15)
    else:  # 15 × 15 × terms, which is below 2^24 wherever the whole sum fits 32 bits
        return exact(x, kernel)
    first, second = (_split_sum(run, *part, terms, smaller) for part in parts)
    return first * 16 + second


def _nibbles(codes: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`codes` as `16 high + low`, high in -8 ... 7 and low in 0 ... 15."""
    high = jnp.right_shift(codes, jnp.asarray(4, codes.dtype))
    return high, codes - jnp.left_shift(high, jnp.asarray(4, codes.dtype))


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
    zero = jnp.zeros((), x.dtype)
    if grid.zero_point is None:
        return jax.lax.pad(x, zero, widths)
    if grid.zero_point.size == 1:
        return jax.lax.pad(x, grid.zero_point.reshape(()), widths)
    inside = jax.lax.pad(jnp.ones_like(x), zero, widths)  # each example has its own zero
    return jnp.where(inside == 1, jax.lax.pad(x, zero, widths), grid.zero_point)
