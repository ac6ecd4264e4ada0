"""Rules for products: `dot_general` and convolution of an activation with a quantized weight.

The dense form of each is defined first: the weight dequantized (or fake-quantized), the activation
fake-quantized, a float product. `QArray` with an activation format computes the same on integers,

    y = scale_x scale_w Σ (q_x - z_x)(q_w - z_w),

the sum in int32, the scales in the epilogue, and takes its derivative from the dense form. The
dense form also runs where integers cannot: where the sum could overflow int32, and for
`batch_group_count`. How a product runs otherwise (groups of inputs with their own scales, weights
alone, one row, int4) is chosen per platform and shape: see `lowering.py`.

A NaN in an activation makes the result NaN, except on integers with a static range, where it has
the code 0.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jopt import trees
from jopt.trace import rule
from jopt.trace.layered import shared_along

from .._formats.base import Grid, Int
from .._formats.bfloat16 import BFloat16
from .._formats.floats import FP8
from .._leaves.weights import QArray, WeightLeaf
from .._training.fake import straight_through
from . import kernels
from .convolution import Conv
from .dot import Dot, axes
from .implementations import IMPLEMENTATIONS, possible
from .lowering import PLATFORMS, Case, Plan, plan
from .order import in_order

GROUPS = "the weight's scale differs along a summed axis, as that of groups does"


@rule(jax.lax.dot_general_p, WeightLeaf)
def _dot(call: Any, *operands: Any) -> Any:
    side = 0 if isinstance(operands[0], WeightLeaf) else 1
    leaf, x = operands[side], operands[1 - side]
    if leaf.always_dense or trees.is_typed(x):
        return NotImplemented
    contract, batch = call.params["dimension_numbers"]
    rank = call.equation.invars[side].aval.ndim  # the leaf's own, which it would trace for
    weight = axes(contract[side], batch[side], rank)
    other = axes(contract[1 - side], batch[1 - side], x.ndim)
    return _product(call, leaf, x, Dot(_frozen(call), side, weight, other, call.out[0].dtype))


@rule(jax.lax.conv_general_dilated_p, WeightLeaf)
def _conv(call: Any, x: Any, leaf: Any) -> Any:
    if not isinstance(leaf, WeightLeaf) or leaf.always_dense or trees.is_typed(x):
        return NotImplemented
    return _product(call, leaf, x, Conv(_frozen(call), call.out[0].dtype))


def _frozen(call: Any) -> tuple[tuple[str, Any], ...]:
    return tuple(sorted(call.params.items(), key=lambda item: item[0]))


def _product(call: Any, leaf: WeightLeaf, x: jax.Array, operation: Dot | Conv) -> Any:
    """The product by its dense form, or by an implementation with the derivative of that."""
    if leaf.activation is None or not jnp.issubdtype(x.dtype, jnp.floating):
        return _weight_alone(call, leaf, x, operation)
    _check_calibrated(call.path, leaf)
    if leaf.range is not None and any(operation.place(end) is None for end in leaf.range):
        return NotImplemented  # the range differs within what one activation meets
    if not isinstance(leaf, QArray):
        call.say("a float product of dequantized values: it is being trained")
        return _simulated(x, leaf, operation)
    if narrower := _rounded_since(leaf):
        call.say(f"a float product of dequantized values: the function rounds them to {narrower}")
        return _simulated(x, leaf, operation)
    if isinstance(leaf.activation, BFloat16):
        chosen = _plan(leaf, x, operation, "bfloat16")
        call.say(_told("a product in bfloat16 with sums in float32", chosen, "bfloat16"))
        return _computed(x, leaf, operation, chosen, "bfloat16")
    if isinstance(operation, Dot) and _is_float8(leaf, operation.contract):
        chosen = _plan(leaf, x, operation, "float8")
        call.say(_told("a product of float8 where there are units for it", chosen, "float8"))
        return _computed(x, leaf, operation, chosen, "dense")
    why = _not_on_integers(leaf, operation.contract)
    plain = "dense" if why else "integers"
    chosen = _plan(leaf, x, operation, plain) if why in ("", GROUPS) else None
    if chosen is None or chosen.only == "dense":
        call.say(f"a float product of dequantized values: {why or 'as asked for'}")
        return _simulated(x, leaf, operation)
    text = "a product of integers"
    call.say(_told(text, chosen, plain) + (f"; elsewhere of dequantized values: {why}" * bool(why)))
    return _computed(x, leaf, operation, chosen, plain)


def _weight_alone(call: Any, leaf: WeightLeaf, x: jax.Array, operation: Dot | Conv) -> jax.Array:
    text = "a float product of the dequantized weight: its activation has no format"
    if not isinstance(leaf, QArray) or leaf.activation is not None:
        call.say(text)
        return operation.dense(x, leaf.materialise())
    chosen = _plan(leaf, x, operation, "dense")
    if chosen.only == "dense" or not jnp.issubdtype(x.dtype, jnp.floating):
        call.say(text)
        return operation.dense(x, leaf.materialise())
    call.say(_told(text, chosen, "dense"))
    return _computed(x, leaf, operation, chosen, "dense")


def _told(text: str, chosen: Plan, plain: str) -> str:
    differs = chosen.describe(plain)
    return f"{text}; {differs}" if differs else text


def _plan(leaf: QArray, x: jax.Array, operation: Dot | Conv, plain: str) -> Plan:
    """The implementation on each platform; convolutions have but the plain one."""
    shape = operation.shape(x, leaf) if isinstance(operation, Dot) else None
    if shape is None:
        return Plan((plain,) * len(PLATFORMS), ("",) * len(PLATFORMS))
    assert isinstance(operation, Dot)
    arrays, structure = jax.tree.flatten((x, leaf))
    # Types, with what they say of devices.
    avals = tuple(jax.typeof(array) for array in arrays)
    fixed = all(isinstance(size, int) for aval in avals for size in aval.shape)
    found = (_serving if fixed else _serving.__wrapped__)(structure, avals, operation)
    names = (plain, "dense", *found)
    return plan(Case(_kind(leaf, x, operation.contract), *shape), names, plain)


@functools.lru_cache(4096)  # most products of a model are alike
def _serving(structure: Any, avals: Sequence[Any], operation: Dot) -> tuple[str, ...]:
    """The implementations that can serve operands of these types."""
    names: list[str] = []

    def matrices(x: jax.Array, leaf: QArray) -> Any:
        operand, grid = _operand(x, leaf, operation)
        flat = operation.matrices(operand, grid, leaf)
        if flat is not None:
            names.extend((*possible(flat), *(["pallas"] * kernels.serves(flat))))

    jax.eval_shape(matrices, *jax.tree.unflatten(structure, avals))
    return tuple(names)


def _kind(leaf: QArray, x: jax.Array, contract: Sequence[int] | None) -> str:
    """How tables of times call these operands: `w8a8`, `w4-group`."""
    format = leaf.format
    if isinstance(format, Int):
        weight = "w4" if leaf.codes.dtype == jnp.int4 else "w8"
    else:
        weight = type(format).__name__.lower()
    if leaf.activation is None:
        activation = "a16" if x.dtype == jnp.bfloat16 else ""
    else:
        activation = "a16" if isinstance(leaf.activation, BFloat16) else "a8"
    groups = "" if contract is None or shared_along(leaf.scale, contract) else "-group"
    return weight + activation + groups


# Compiled apart, so that products alike, as of the layers of a model, are traced and lowered once.


@functools.partial(jax.jit, static_argnames="operation")
def _simulated(x: jax.Array, leaf: WeightLeaf, operation: Dot | Conv) -> jax.Array:
    """The dense form."""
    if leaf.activation is not None:
        x = _rounded(x, leaf, operation)
    return operation.dense(x, leaf.materialise())


@functools.partial(jax.jit, static_argnames=("operation", "chosen", "plain"))
def _computed(
    x: jax.Array, leaf: QArray, operation: Dot | Conv, chosen: Plan, plain: str
) -> jax.Array:
    """The product by the chosen implementations, with the derivative of the dense form."""

    @jax.custom_jvp
    def product(x: jax.Array, leaf: QArray) -> jax.Array:
        branches = [_branch(name, platform, operation) for name, platform in _named(chosen)]
        if chosen.only is not None:
            return branches[0](x, leaf)
        named = dict(zip(PLATFORMS, branches, strict=True))
        return jax.lax.platform_dependent(x, leaf, **named, default=_branch(plain, "", operation))

    @product.defjvp
    def _(primals: Any, tangents: Any) -> Any:
        simulated = functools.partial(_simulated, operation=operation)
        return product(*primals), jax.jvp(simulated, primals, tangents)[1]

    return product(x, leaf)


def _named(chosen: Plan) -> list[tuple[str, str]]:
    return list(zip(chosen.names, PLATFORMS, strict=True))


def _branch(name: str, platform: str, operation: Dot | Conv) -> Callable[..., jax.Array]:
    """One implementation, from the activation's values to the result."""

    def run(x: jax.Array, leaf: QArray) -> jax.Array:
        if name == "dense":
            return _simulated(x, leaf, operation)
        operand, grid = _operand(x, leaf, operation)
        flat = operation.matrices(operand, grid, leaf) if isinstance(operation, Dot) else None
        if name == "pallas":
            assert flat is not None and isinstance(operation, Dot)
            y = kernels.product(flat, platform)
        elif name == "integers":
            assert grid is not None
            if flat is None or grid.zero_point is None or not in_order(flat.x):
                return operation.integers(operand, grid, leaf).astype(operation.dtype)
            y = IMPLEMENTATIONS[name](flat)  # of matrices, which sums the weight's codes for less
        elif name == "float8":
            assert grid is not None and isinstance(operation, Dot)
            return operation.float8(operand, grid, leaf).astype(operation.dtype)
        elif name == "bfloat16" and not (flat is not None and name in possible(flat)):
            return operation.bfloat16(x, leaf).astype(operation.dtype)
        else:
            assert flat is not None
            y = IMPLEMENTATIONS[name](flat)
        assert isinstance(operation, Dot)
        return operation.unflattened(y, x, leaf).astype(operation.dtype)

    return run


# The activation.


def _operand(x: jax.Array, leaf: QArray, operation: Dot | Conv) -> tuple[jax.Array, Grid | None]:
    """What a product takes of an activation: its codes and their grid, or its values."""
    if leaf.activation is None:
        return x, None
    if isinstance(leaf.activation, BFloat16):
        return x.astype(jnp.bfloat16), None
    grid = _activation_grid(x, leaf, operation)
    dynamic = leaf.range is None or leaf.activation.granularity == "token"
    codes = (leaf.activation.encode_own if dynamic else leaf.activation.encode)(x, grid)
    return codes.astype(jnp.int8 if isinstance(leaf.activation, Int) else leaf.codes.dtype), grid


def _is_float8(leaf: QArray, contract: Sequence[int] | None) -> bool:
    """Whether both operands are of one float8 format, and their scales can wait for the sums."""
    if contract is None or not isinstance(leaf.format, FP8):
        return False
    both = isinstance(leaf.activation, FP8) and leaf.activation.kind == leaf.format.kind
    return both and shared_along(leaf.scale, contract)


def _rounded_since(leaf: QArray) -> str:
    """A dtype of fewer than 16 bits that the function has cast the weight to; else empty."""
    cast = (jnp.dtype(dtype) for dtype in (*leaf.via, leaf.value_dtype))
    return next((dtype.name for dtype in cast if dtype.itemsize < 2), "")


def _check_calibrated(path: str, leaf: WeightLeaf) -> None:
    if leaf.static and leaf.range is None:
        raise ValueError(
            f"`{path}` has a static activation range (`Spec(..., static=True)`) that was never "
            "measured.\nCall `params, report = jopt.quant.calibrate(apply, params, batches)` "
            "first, or choose `static=False` to find the range in each call."
        )


def _not_on_integers(leaf: QArray, contract: Sequence[int] | None) -> str:
    """Why a product cannot be computed on integers in one sum; empty if it can."""
    if contract is None:
        return "`batch_group_count` is not 1"
    if not (isinstance(leaf.format, Int) and isinstance(leaf.activation, Int)):
        return f"{leaf.format} or {leaf.activation} has no integer codes"
    terms = math.prod(leaf.codes.shape[axis] for axis in contract)
    largest = (leaf.format.high - leaf.format.low) * (leaf.activation.high - leaf.activation.low)
    if terms * largest >= 2**31:
        return f"{terms} terms could overflow 32 bits"
    return "" if shared_along(leaf.scale, contract) else GROUPS


def _activation_grid(x: jax.Array, leaf: WeightLeaf, operation: Dot | Conv) -> Grid:
    format = leaf.activation
    assert format is not None
    if format.granularity == "token":
        summed = tuple(axis - x.ndim for axis in operation.summed(x.ndim))
        return format.grid(*format.extent(x, summed))
    if leaf.range is None:
        return format.grid(*format.extent(x, tuple(range(-x.ndim, 0))))
    low, high = operation.place(leaf.range.low), operation.place(leaf.range.high)
    assert low is not None and high is not None
    return format.grid(low, high)


def _rounded(x: jax.Array, leaf: WeightLeaf, operation: Dot | Conv) -> jax.Array:
    """The fake-quantized activation; beyond a static range its gradient is zero."""
    fixed, format = jax.lax.stop_gradient(x), leaf.activation
    assert format is not None
    grid = _activation_grid(fixed, leaf, operation)
    values = format.decode(format.encode(fixed, grid), grid).astype(x.dtype)
    if leaf.range is None or format.granularity == "token":
        return straight_through(x, values)
    values = jnp.where(jnp.isnan(fixed), fixed, values)  # a diverging run must show
    return straight_through(x, values, format.inside(fixed, grid))
