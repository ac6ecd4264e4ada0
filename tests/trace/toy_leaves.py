"""Two small typed leaves for the tests of the engine, and how to see what reached the products."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jopt import trees
from jopt.trace import Leaf, Stat, rule


@functools.partial(jax.tree_util.register_dataclass, data_fields=["codes", "scale"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Scaled(Leaf):
    """int8 codes times a scale of the value's rank."""

    codes: jax.Array
    scale: jax.Array

    def materialise(self):
        return self.codes.astype(self.scale.dtype) * self.scale


def scaled(weight, contracted=(-2,)):
    """Rounds a float array to `Scaled`, one scale for each entry of the other axes."""
    axes = tuple(axis % weight.ndim for axis in contracted)
    scale = jnp.max(jnp.abs(weight), axes, keepdims=True) / 127
    return Scaled(jnp.round(weight / scale).astype(jnp.int8), scale)


def dense(tree):
    """The tree with typed leaves as arrays."""
    return trees.map_with_path(lambda _, x: x.materialise() if isinstance(x, Leaf) else x, tree)


@rule(lax.dot_general_p, Scaled)
def _dot(call, left, right):
    (contract, batch) = call.params["dimension_numbers"]
    side = 0 if isinstance(left, Scaled) else 1
    weight, other = (left, right) if side == 0 else (right, left)
    if isinstance(other, Leaf) or any(weight.scale.shape[i] != 1 for i in contract[side]):
        return NotImplemented
    codes = weight.codes.astype(other.dtype)
    product = call.bind(codes, other) if side == 0 else call.bind(other, codes)
    free = [i for i in range(codes.ndim) if i not in (*contract[side], *batch[side])]
    others = other.ndim - len(contract[0]) - len(batch[0])
    scale = lax.transpose(weight.scale, (*batch[side], *free, *contract[side]))
    shape = [scale.shape[i] for i in range(len(batch[side]) + len(free))]
    shape[len(batch[side]) if side == 1 else len(shape) :] = (
        [1] * others + shape[len(batch[side]) :] if side == 1 else [1] * others
    )
    return product * scale.reshape(shape).astype(product.dtype)


@rule(lax.conv_general_dilated_p, Scaled)
def _conv(call, image, kernel):
    numbers = call.params["dimension_numbers"]
    features = numbers.rhs_spec[0]
    if isinstance(image, Leaf) or kernel.scale.size != kernel.scale.shape[features]:
        return NotImplemented
    product = call.bind(image, kernel.codes.astype(image.dtype))
    shape = [1] * product.ndim
    shape[numbers.out_spec[1]] = kernel.scale.size
    return product * kernel.scale.reshape(shape)


@rule(lax.transpose_p, Scaled)
def _transpose(call, weight):
    order = call.params["permutation"]
    return Scaled(lax.transpose(weight.codes, order), lax.transpose(weight.scale, order))


@rule(lax.squeeze_p, Scaled)
def _squeeze(call, weight):
    axes = call.params["dimensions"]
    return Scaled(lax.squeeze(weight.codes, axes), lax.squeeze(weight.scale, axes))


@rule(lax.slice_p, Scaled)
def _slice(call, weight):
    start, stop = call.params["start_indices"], call.params["limit_indices"]
    if call.params["strides"] is not None:
        return NotImplemented
    full = [size != 1 for size in weight.scale.shape]
    scale = lax.slice(
        weight.scale,
        [a if on else 0 for a, on in zip(start, full, strict=True)],
        [b if on else 1 for b, on in zip(stop, full, strict=True)],
    )
    return Scaled(call.bind(weight.codes), scale)


@rule(lax.reshape_p, Scaled)
def _reshape(call, weight):
    old, new = weight.codes.shape, call.params["new_sizes"]
    if [n for n in old if n != 1] == [n for n in new if n != 1]:  # ones come and go
        kept = iter([s for s, n in zip(weight.scale.shape, old, strict=True) if n != 1])
        shape = [1 if n == 1 else next(kept) for n in new]
    elif math.prod(weight.scale.shape[:-1]) == 1 and old[-1] == new[-1]:
        shape = [1] * (len(new) - 1) + [weight.scale.shape[-1]]
    else:
        return NotImplemented
    return Scaled(weight.codes.reshape(new), weight.scale.reshape(shape))


@rule(lax.broadcast_in_dim_p, Scaled)
def _broadcast(call, weight):
    shape, places = call.params["shape"], call.params["broadcast_dimensions"]
    small = [1] * len(shape)
    for place, size in zip(places, weight.scale.shape, strict=True):
        small[place] = size
    return Scaled(call.bind(weight.codes), lax.broadcast_in_dim(weight.scale, small, tuple(places)))


@rule(lax.gather_p, Scaled)
def _gather(call, weight, indices):
    numbers = call.params["dimension_numbers"]
    rows = numbers.collapsed_slice_dims == numbers.start_index_map == (0,)
    if not rows or isinstance(indices, Leaf) or weight.scale.shape[0] == 1:
        return NotImplemented
    options = {**call.params, "fill_value": 0}  # the traced one may be NaN, which no code is
    codes = lax.gather_p.bind(weight.codes, indices, **options)
    scale = weight.scale[indices[..., 0]]
    return codes.astype(scale.dtype) * scale


@rule(lax.convert_element_type_p, Scaled)
def _convert(call, weight):
    return Scaled(weight.codes, weight.scale.astype(call.params["new_dtype"]))


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["base", "down", "up"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class LowRank(Leaf):
    """A base, an array or another leaf, plus a product of two thin arrays."""

    base: jax.Array | Leaf
    down: jax.Array
    up: jax.Array

    def materialise(self):
        base = self.base.materialise() if isinstance(self.base, Leaf) else self.base
        return base + self.down @ self.up


@rule(lax.dot_general_p, LowRank)
def _low_rank_dot(call, left, right):
    if call.params["dimension_numbers"] != (((left.ndim - 1,), (0,)), ((), ())):
        return NotImplemented
    if not isinstance(right, LowRank) or isinstance(left, Leaf):
        return NotImplemented
    return call.bind(left, right.base) + call.bind(call.bind(left, right.down), right.up)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["value"], meta_fields=["name"])
@dataclasses.dataclass(frozen=True)
class Watched(Leaf):
    """A plain weight whose products record range and count of what it is multiplied with."""

    value: jax.Array
    name: str
    always_dense = True

    def materialise(self):
        return self.value


@rule(lax.transpose_p, Watched)
def _watched_transpose(call, weight):
    return Watched(call.bind(weight.value), weight.name)


@rule(lax.dot_general_p, Watched)
@rule(lax.conv_general_dilated_p, Watched)
def _watched_product(call, left, right):
    side = 0 if isinstance(left, Watched) else 1
    other = right if side == 0 else left
    if isinstance(other, Leaf):
        return NotImplemented
    count = jnp.asarray(other.size, jnp.float32)
    call.record(
        (left, right)[side].name,
        {
            "low": Stat(jnp.min(other), "min"),
            "high": Stat(jnp.max(other), "max"),
            "count": Stat(count, "sum"),
        },
    )
    return call.bind(left.value, right) if side == 0 else call.bind(left, right.value)


def bodies(jaxpr):
    """A jaxpr and all jaxprs inside it."""
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    yield jaxpr
    for equation in jaxpr.eqns:
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                    yield from bodies(inner)


def products(jaxpr):
    """For each product anywhere in a jaxpr, whether int8 codes reach it, cast or not."""
    found = []
    for body in bodies(jaxpr):
        made = {v: e for e in body.eqns for v in e.outvars}
        for equation in body.eqns:
            if equation.primitive in (lax.dot_general_p, lax.conv_general_dilated_p):
                found.append(any(_is_code(v, made) for v in equation.invars))
    return found


def _is_code(variable, made):
    while variable.aval.dtype != np.int8:
        equation = made.get(variable)
        if equation is None or equation.primitive is not lax.convert_element_type_p:
            return False
        (variable,) = equation.invars
    return True
