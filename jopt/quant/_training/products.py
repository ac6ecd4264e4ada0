"""Products in training: with learned steps, and in few bits forward and backward.

Without a `backward` format a product is that of two fake-quantized values. With one it runs on the
codes themselves, and so do both products of its derivative (of y = x W, over codes q, scales s):

    y  = s_x s_w  q_x q_w
    dx = s_1  q_1 q_wᵀ,    q_1 s_1 ≈ dy s_w   (scales are taken in before rounding, since they
    dW = s_2  q_xᵀ q_2,    q_2 s_2 ≈ dy s_x    may differ along what is summed now)

The sums are in int32 (of 8-bit floats in float32). What comes back, dy, is rounded anew for either
product, at random where its format says so: then both have the mean of the float products.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jopt import trees
from jopt.trace import Stat, reductions, rule
from jopt.trace.layered import shared_along

from .._formats.base import Format, Int
from .fake import fake_quant, on_grid, on_this
from .forms import (
    Form,
    arranged,
    form_of,
    ones_for,
    onto,
    swapped,
    w_on_result,
    without_groups,
    x_on_result,
)
from .learned import TrainedQuant, TrainedValue
from .steps import stepped


class Options(NamedTuple):
    """What a product in few bits is; equal ones share their traces."""

    form: Form
    backward: Format
    x_codes: Any  # dtypes
    w_codes: Any
    dy_codes: Any


@rule(jax.lax.dot_general_p, TrainedQuant)
@rule(jax.lax.dot_general_p, TrainedValue)
def _dot(call: Any, *operands: Any) -> Any:
    side = 0 if isinstance(operands[0], TrainedQuant | TrainedValue) else 1
    leaf, x = _seen(operands[side]), operands[1 - side]
    if trees.is_typed(x):
        return NotImplemented
    form = form_of(call, side, x, leaf)

    def dense(x: jax.Array, w: jax.Array) -> jax.Array:
        return call.bind(w, x) if side == 0 else call.bind(x, w)

    rounded, scale = _activation(call, leaf, x, lambda c: onto(c, form), form.x.contract)
    if leaf.backward is None:
        return dense(rounded, leaf.value)
    key = _key_of(call, leaf)
    dtypes = tuple(_code_dtype(f) for f in (leaf.activation, leaf.format, leaf.backward))
    if why := _not_on_codes(call, leaf, form, scale, dtypes):
        call.say(f"a float product of fake-quantized values, backward of rounded ones: {why}")
        return coming_back(dense(rounded, leaf.value), key, leaf.backward)
    call.say("products of codes, forward and backward")
    options = Options(form, leaf.backward, *dtypes)
    result: Any = _product(options, rounded, leaf.value, scale, leaf.meets.scale, key)
    return result if side == 1 else swapped(result, form)


@rule(jax.lax.conv_general_dilated_p, TrainedQuant)
@rule(jax.lax.conv_general_dilated_p, TrainedValue)
def _conv(call: Any, x: Any, leaf: Any) -> Any:
    """Convolutions compute in floats, on rounded values, also of what comes back."""
    if not isinstance(leaf, TrainedQuant | TrainedValue) or trees.is_typed(x):
        return NotImplemented
    leaf = _seen(leaf)
    batch = call.params["dimension_numbers"].lhs_spec[0]
    summed = tuple(axis for axis in range(x.ndim) if axis != batch)

    def place(coarse: jax.Array) -> jax.Array | None:
        return coarse.reshape((1,) * x.ndim) if coarse.size == 1 else None

    result = call.bind(_activation(call, leaf, x, place, summed)[0], leaf.value)
    if leaf.backward is None:
        return result
    call.say("a float product of fake-quantized values, backward of rounded ones: a convolution")
    return coming_back(result, _key_of(call, leaf), leaf.backward)


@rule(jax.lax.concatenate_p, TrainedQuant)
@rule(jax.lax.concatenate_p, TrainedValue)
@rule(jax.lax.stack_p, TrainedQuant)
@rule(jax.lax.stack_p, TrainedValue)
def _together(call: Any, *leaves: Any) -> Any:
    """Two weights that become one would have two steps for one activation."""
    if all(getattr(leaf, "always_dense", False) for leaf in leaves):
        return NotImplemented
    raise ValueError(
        f"`lift(apply)`: `{call.path}` is joined with another weight ({call.primitive}), and each "
        "has a learned activation step or a backward format of its own.\nGive these weights a "
        "`Spec` without `activation_step` and `backward`, or quantize what they make: "
        "`jopt.trace.hoist(apply, params, ...)`."
    )


# The activation.


def _seen(leaf: Any) -> TrainedValue:
    return leaf if isinstance(leaf, TrainedValue) else leaf.joined(*leaf.split())


def _activation(
    call: Any,
    leaf: TrainedValue,
    x: jax.Array,
    place: Callable[[jax.Array], jax.Array | None],
    summed: Sequence[int],
) -> tuple[jax.Array, jax.Array | None]:
    """The fake-quantized activation and, of a symmetric format, its scale."""
    if leaf.observed:
        call.record(leaf.observed, _moments(x))
    format, floating = leaf.activation, jnp.issubdtype(x.dtype, jnp.floating)
    if format is None or not floating:
        call.say("a float product of the rounded weight: its activation has no format")
        return x, None
    _check_begun(call.path, leaf)
    arrays, structure = jax.tree.flatten((leaf.meets.range, leaf.meets.step))
    placed = [place(array) for array in arrays]
    if any(array is None for array in placed):
        raise ValueError(
            f"`{call.path}`: the step or range of its activation differs within what one product "
            "meets.\nLayers that are stacked are used one by one, as `scan` and indexing do."
        )
    extent, step = jax.tree.unflatten(structure, placed)
    if leaf.backward is None:
        call.say("a float product of fake-quantized values: it is being trained")
    if leaf.activation_method is not None:
        assert isinstance(format, Int)
        count = math.prod(x.shape[axis] for axis in summed)
        rounded = stepped(x, format, leaf.activation_method, step, count)
        grid = leaf.activation_method.grid(step, format)
    elif extent is not None:
        rounded, grid = fake_quant(x, format, range=tuple(extent)), format.grid(*extent)
    else:
        shared = summed if format.granularity == "token" else range(x.ndim)
        axes = tuple(axis - x.ndim for axis in shared)
        rounded, grid = fake_quant(x, format, axes=axes), format.fit(x, axes)
    grid = jax.lax.stop_gradient(grid)
    return rounded, grid.scale if grid.zero_point is None else None


def _moments(x: jax.Array) -> tuple[Stat, ...]:
    """What `init_steps` wants to know of an activation."""
    x = x.astype(jnp.float32)
    low, high = reductions.ends(x, range(x.ndim))
    return (
        Stat(jnp.sum(jnp.abs(x)), "sum"),
        Stat(jnp.sum(jnp.ones_like(x)), "sum"),
        Stat(low, "min"),
        Stat(high, "max"),
    )


def _check_begun(path: str, leaf: TrainedValue) -> None:
    if leaf.activation_method is not None and leaf.meets.step is None:
        raise ValueError(
            f"`{path}` has a learned activation step that was never begun.\n"
            "Call `params = jopt.quant.init_steps(apply, params, batches)` after `qat`."
        )
    if leaf.static and leaf.meets.range is None:
        raise ValueError(
            f"`{path}` has a static activation range (`Spec(..., static=True)`) that was never "
            "measured.\nCall `params, report = jopt.quant.calibrate(apply, params, batches)` first."
        )


def _key_of(call: Any, leaf: TrainedValue) -> jax.Array | None:
    assert leaf.backward is not None
    if leaf.backward.rounding != "stochastic":
        return None
    if leaf.meets.key is None:
        raise ValueError(
            f"`{call.path}` has `Spec(..., backward={leaf.backward})`, which rounds at random, and "
            "no key.\nCall `lift(apply)(quant.with_key(params, key), ...)` in the loss, with a new "
            "key in each step; `quant.deterministic(params)` rounds to nearest."
        )
    return leaf.meets.key.reshape(-1)[0]


# The product on codes.


def _code_dtype(format: Format | None) -> Any:
    """The dtype of codes that a product can take; None if there is none."""
    if isinstance(format, Int):
        return jnp.int8 if format.symmetric else None
    if format is None or not jnp.issubdtype(format.container, jnp.floating):
        return None
    return format.container


def _not_on_codes(
    call: Any, leaf: TrainedValue, form: Form, scale: jax.Array | None, dtypes: Sequence[Any]
) -> str:
    """Why a product cannot be computed on codes; empty if it can."""
    for format, dtype in zip((leaf.activation, leaf.format, leaf.backward), dtypes, strict=True):
        if dtype is None:
            return f"{format} has no symmetric codes that products take"
    if len({jnp.issubdtype(dtype, jnp.integer) for dtype in dtypes}) > 1:
        return "integers and floats do not multiply"
    if call.params.get("out_sharding") is not None:
        return "its result's sharding is part of its type"
    if leaf.meets.scale is None or scale is None:
        return "the weight is not wholly on its grid in this step"
    if not shared_along(leaf.meets.scale, form.w.contract):
        return "the weight's scale differs along a summed axis, as that of groups does"
    return ""


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(
    options: Options, x: jax.Array, w: jax.Array, sx: jax.Array, sw: jax.Array, key: Any
) -> jax.Array:
    return _forward(options, x, w, sx, sw, key)[0]


def _forward(
    options: Options, x: jax.Array, w: jax.Array, sx: jax.Array, sw: jax.Array, key: Any
) -> tuple[jax.Array, Any]:
    """The product of codes; what is kept for the backward pass takes a byte a value."""
    form = options.form
    x_codes = _codes(x, sx, options.x_codes)
    w_codes = _codes(w, without_groups(sw, w.shape), options.w_codes)
    numbers = ((form.x.contract, form.w.contract), (form.x.batch, form.w.batch))
    total = _sums(x_codes, w_codes, numbers)
    y = total * (x_on_result(sx, form) * w_on_result(sw, w.shape, form))
    return y.astype(form.out), (x_codes, w_codes, sx, sw, key)


def _backward(options: Options, kept: Any, dy: jax.Array) -> tuple[Any, ...]:
    x_codes, w_codes, sx, sw, key = kept
    form, format = options.form, options.backward
    one, two = (None, None) if key is None else jax.random.split(key)
    dy, batch = dy.astype(jnp.float32), tuple(range(len(form.x.batch)))
    first, summed = len(batch), len(form.w.contract)
    # Of scales that differ along what is summed now, the gradient takes care before it is rounded.
    scaled = dy * w_on_result(sw, w_codes.shape, form)
    codes, scale = _rounded(scaled, format, form.columns, options.dy_codes, one)
    dx = _sums(codes, w_codes, ((form.columns, form.w.free), (batch, form.w.batch)))
    dx = dx * ones_for(scale, first + len(form.rows), len(form.columns), summed)
    dx = arranged(dx, form.x, form.w, free=first, contract=first + len(form.rows))
    scaled = dy * x_on_result(sx, form)
    codes, scale = _rounded(scaled, format, form.rows, options.dy_codes, two)
    dw = _sums(x_codes, codes, ((form.x.free, form.rows), (form.x.batch, batch)))
    dw = dw * ones_for(scale, first, len(form.rows), summed)
    dw = arranged(dw, form.w, form.x, free=first + summed, contract=first)
    return dx.astype(form.x_dtype), dw.astype(form.w_dtype), None, None, None


_product.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def coming_back(y: jax.Array, key: jax.Array | None, format: Format) -> jax.Array:
    """`y`; the gradient that comes back is rounded to a format, each row on a grid of its own."""
    del key, format
    return y


def _coming_back_forward(y: jax.Array, key: jax.Array | None, format: Format) -> tuple[Any, Any]:
    return y, key


def _coming_back_backward(format: Format, key: jax.Array | None, dy: jax.Array) -> tuple[Any, ...]:
    whole = format.granularity == "tensor"
    axes = tuple(range(-dy.ndim, 0)) if whole else (-1,) if dy.ndim else ()
    return on_grid(dy, format, axes, key), None


coming_back.defvjp(_coming_back_forward, _coming_back_backward)


# Helpers, in order of use.


def _codes(values: jax.Array, scale: jax.Array, dtype: Any) -> jax.Array:
    """The codes of values that are whole multiples of their scale already."""
    steps = values.astype(jnp.float32) * (1.0 / scale)
    return (jnp.round(steps) if jnp.issubdtype(dtype, jnp.integer) else steps).astype(dtype)


def _rounded(
    dy: jax.Array, format: Format, shared: Sequence[int], dtype: Any, key: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Codes and scales of a gradient, of which a product will sum over the axes `shared`."""
    axes = range(dy.ndim) if format.granularity == "tensor" else shared
    grid = format.fit(dy, tuple(axis - dy.ndim for axis in axes))
    return _codes(on_this(dy, format, grid, key), grid.scale, dtype), grid.scale


def _sums(left: jax.Array, right: jax.Array, numbers: Any) -> jax.Array:
    """The sums of products of codes, in int32 where they fit, as float32."""
    integers = jnp.issubdtype(left.dtype, jnp.integer)
    terms = math.prod(left.shape[axis] for axis in numbers[0][0])
    if integers and terms * 127 * 127 >= 2**31:
        left, right, integers = left.astype(jnp.float32), right.astype(jnp.float32), False
    dtype = jnp.int32 if integers else jnp.float32
    total = jax.lax.dot_general(left, right, numbers, preferred_element_type=dtype)
    return total.astype(jnp.float32)
