"""The implementations of a product [rows, inputs] x [inputs, outputs] with a quantized weight.

What each computes, for activations x and weights w, codes q and their zero points z:

- `integers`: Σ (q_x - z_x)(q_w - z_w) of int8 in int32, which is exact; scales afterwards.
- `padded`: the same, to the same bits, on two rows where there is one.
- `blocked`: the same, to the same bits, for 1,024 inputs at a time.
- `paired_vector`: the same, to the same bits, of one row and int4: two outputs in one int32.
- `grouped`: the same for each group of inputs; scaled, the groups are summed in float32.
- `bfloat16`: (q_x - z_x)(q_w - z_w) in bfloat16, which holds both exactly, and so are the products;
  summed in float32, exact up to 2^24. For activations of the format `BFloat16`, x itself for q_x.
- `grouped_bfloat16`: the same for each group of inputs.
- `dense`: the weight dequantized as a whole, a product in the function's own dtype.
- `padded_dense`, `tiled_narrow`, `tiled`, `tiled_wide`, `tiled_half`: the same numbers, summed in
  another order perhaps, on two rows where there is one; for 64, 128 or 256 outputs or half of all
  at a time, so that no dense weight exists.
- `striped`: the weight of 512 inputs at a time; in float32 a scale for each output, which rounds
  otherwise in the last place, multiplies the sum.
- `paired_...`: the one named, on an int4 weight as two of int8, its even and its odd columns.
- `pallas`: a kernel that dequantizes block by block, see `kernels.py`.

All take `Operands` and return `[rows, outputs]`. Derivatives are taken of the dense form elsewhere.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jopt.trace.layered import coarse_map, full_along

from .._formats.base import Grid, Int
from .._leaves.weights import QArray
from .operands import Operands, as_row, group_count, in_groups, per_output

Implementation = Callable[[Operands], jax.Array]
# Of codes and codes [inputs, outputs], or turned; with the weight's axis that is summed.
IntegerProduct = Callable[[jax.Array, jax.Array, int], jax.Array]

# Outputs for which `tiled` and its like dequantize a weight at a time.
WIDTHS = {"tiled_narrow": 64, "tiled": 128, "tiled_wide": 256}
# Inputs for which `striped` makes a weight dense at a time.
STRIPE = 512
# Inputs that `blocked` sums at a time: above so many XLA:CPU's kernel runs out of its caches.
BLOCK = 1024
# As many products of int8 and of four bits as a sum in 16 bits can take: 16 · 128 · 15 < 2^15.
SIXTEEN = 16
# Parts of the inputs that `paired_vector` takes one after the other.
PARTS = 8


def possible(o: Operands) -> tuple[str, ...]:
    """The implementations that can serve these operands, by their shapes alone."""
    inputs, outputs = o.leaf.codes.shape[:: -1 if o.turned else 1]
    coded, whole = o.x.dtype == jnp.int8, isinstance(o.leaf.format, Int)
    narrow, groups = o.x.dtype == jnp.bfloat16 and o.grid is None, group_count(o)
    names: list[str] = []
    if whole and (coded or narrow) and groups == 1:
        names += ["bfloat16"] + (["integers"] + ["padded"] * (o.x.shape[0] == 1)) * coded
        names += ["blocked"] * (coded and not o.turned and inputs > 2 * BLOCK)
    elif whole and (coded or narrow) and groups and inputs // groups >= 16:
        names += ["grouped_bfloat16"] + ["grouped"] * coded
    elif not coded:
        names += ["dense"] + ["padded_dense"] * (o.x.shape[0] == 1)
        names += [name for name, width in WIDTHS.items() if outputs > width]
        names += ["tiled_half"] * (outputs > 2 * max(WIDTHS.values()))
        whole_groups = groups == 1 or (groups > 0 and STRIPE * groups % inputs == 0)
        names += ["striped"] * (inputs >= 2 * STRIPE and whole_groups)
    if _splits(o):
        halves = outputs if o.turned else outputs // 2
        cut = [name for name in names if name != "striped" and halves > WIDTHS.get(name, 0)]
        names += [f"paired_{name}" for name in cut]
        if "paired_padded" in names and not o.turned and _parts(inputs) > 1:
            names.append("paired_vector")
    return tuple(names)


# Implementations, in the order of the table.


def integers(o: Operands, product: IntegerProduct | None = None) -> jax.Array:
    """Codes times codes into int32, scales afterwards."""
    assert o.grid is not None
    total = _total(o.x, o.grid.zero_point, o.leaf.codes, o.leaf.zero_point, o.turned, product)
    return total.astype(jnp.float32) * (o.grid.scale * as_row(o.leaf.scale, o))


def padded(o: Operands, inner: Implementation = integers) -> jax.Array:
    """One row as two: XLA:CPU has kernels for matrices, and makes the weight wide for a vector."""
    rows = o.x.shape[0]
    if not isinstance(rows, int) or rows != 1:
        return inner(o)
    grid = o.grid
    if grid is not None and grid.scale.shape[0] != 1:
        grid = jax.tree.map(_doubled, grid)
    return inner(o._replace(x=_doubled(o.x), grid=grid))[:1]


def blocked(o: Operands) -> jax.Array:
    """Codes times codes into int32, block after block of inputs."""
    return padded(o, functools.partial(integers, product=_in_blocks))


def paired_half(o: Operands) -> jax.Array:
    """An int4 weight dequantized by even and odd columns, one after the other."""
    pairs, four = _pairs(o.leaf.codes)
    halves = [half.split()[1] for half in _halves(o)]
    xs = jnp.stack([o.x[:, i::2] for i in (0, 1)]) if o.turned else jnp.stack([o.x, o.x])

    def product(turn: Any) -> jax.Array:
        shift, coarse, x = turn
        leaf = o.leaf.joined(jnp.right_shift(jnp.left_shift(pairs, shift), four), coarse)
        return dense(o._replace(x=x, leaf=leaf))

    shifts = jnp.stack([four, jnp.zeros_like(four)])
    both = jax.tree.map(lambda *pair: jnp.stack(pair), *halves)
    y = jax.lax.map(product, (shifts, both, xs))
    return y[0] + y[1] if o.turned else jnp.moveaxis(y, 0, -1).reshape(o.x.shape[0], -1)


def paired_vector(o: Operands) -> jax.Array:
    """One row times codes of four bits, in a loop that XLA:CPU makes of products and sums.

    The codes are never stored as wider ones, and are read once: an even column is the low half of
    an int32 and the odd one beside it the high half, as sums of sixteen products fit 16 bits.
    """
    return integers(o, _in_halves)


def grouped(o: Operands, narrow: Any = jnp.int8) -> jax.Array:
    """A loop over groups of inputs, whose integer products are scaled and summed in float32."""
    return padded(o, functools.partial(_grouped, narrow=narrow))


def bfloat16(o: Operands) -> jax.Array:
    """Codes, which bfloat16 holds exactly, as bfloat16, with sums in float32."""
    return padded(o, _bfloat16)


def dense(o: Operands) -> jax.Array:
    """The weight dequantized."""
    return jax.lax.dot_general(
        o.x,
        o.leaf.materialise(),
        (((1,), (1 if o.turned else 0,)), ((), ())),
        precision=o.precision,
        preferred_element_type=o.dtype,
    )


def tiled(o: Operands, width: int | None = None) -> jax.Array:
    """The weight dequantized for some outputs at a time, so that it never exists as a whole."""
    if width is None:
        width = -(-o.leaf.codes.shape[0 if o.turned else 1] // 2)
    return padded(o, functools.partial(_tiled, width=width))


def striped(o: Operands) -> jax.Array:
    """Sums over some inputs after others, so that no dense weight exists."""
    axis = 1 if o.turned else 0
    inputs = o.x.shape[1]
    codes, coarse = o.leaf.split()
    exact = o.x.dtype == o.leaf.value_dtype == jnp.float32 and not o.leaf.via
    late = exact and isinstance(o.leaf.format, Int) and group_count(o) == 1
    dtype = np.promote_types(o.dtype, np.float32)

    def part(start: Any, size: int) -> jax.Array:
        def cut(array: jax.Array) -> jax.Array:
            count = array.shape[axis]
            if count == 1:
                return array
            each = inputs // count
            return jax.lax.dynamic_slice_in_dim(array, start // each, size // each, axis)

        x = jax.lax.dynamic_slice_in_dim(o.x, start, size, 1)
        leaf: Any = o.leaf.joined(cut(codes), coarse_map(cut, coarse))
        if not late:
            return dense(o._replace(x=x, leaf=leaf, dtype=dtype))
        w = leaf.codes.astype(dtype)
        if leaf.zero_point is not None:
            w = w - per_output(leaf.zero_point, o).astype(dtype)
        return jax.lax.dot_general(x, w, (((1,), (axis,)), ((), ())), precision=o.precision)

    count, rest = divmod(inputs, STRIPE)
    zeros = _zeros(o).astype(dtype)
    total = jax.lax.fori_loop(0, count, lambda i, total: total + part(i * STRIPE, STRIPE), zeros)
    if rest:
        total = total + part(count * STRIPE, rest)
    return total * as_row(o.leaf.scale, o) if late else total


def paired(o: Operands, inner: Implementation) -> jax.Array:
    """An int4 weight as two of int8, unpacked by shifts: XLA:CPU takes int4 apart one by one."""
    even, odd = _halves(o)
    if o.turned:  # pairs lie along the inputs
        one, other = (o._replace(x=o.x[:, i::2], leaf=half) for i, half in enumerate((even, odd)))
        return inner(one) + inner(other)
    columns = [inner(o._replace(leaf=half)) for half in (even, odd)]
    return jnp.stack(columns, axis=-1).reshape(o.x.shape[0], -1)


_SINGLE: dict[str, Implementation] = {
    "integers": integers,
    "padded": padded,
    "blocked": blocked,
    "grouped": grouped,
    "bfloat16": bfloat16,
    "grouped_bfloat16": functools.partial(grouped, narrow=jnp.bfloat16),
    "dense": dense,
    "padded_dense": functools.partial(padded, inner=dense),
    "tiled_half": tiled,
    **{name: functools.partial(tiled, width=width) for name, width in WIDTHS.items()},
}
IMPLEMENTATIONS: dict[str, Implementation] = {
    **_SINGLE,
    "striped": striped,
    **{f"paired_{name}": functools.partial(paired, inner=f) for name, f in _SINGLE.items()},
    "paired_tiled_half": paired_half,
    "paired_vector": paired_vector,
}
NAMES = (*IMPLEMENTATIONS, "float8", "pallas")


# Helpers, in order of use.


def _parts(inputs: int) -> int:
    """Into how many parts of whole sixteens the inputs fall, at most `PARTS`; 0: into none."""
    sixteens, rest = divmod(inputs, SIXTEEN)
    if rest or not sixteens:
        return 0
    return max(count for count in range(1, PARTS + 1) if sixteens % count == 0)


def _splits(o: Operands) -> bool:
    """Whether `_halves` can take the weight apart."""
    if o.leaf.codes.dtype not in (jnp.int4, jnp.uint4) or o.leaf.codes.shape[-1] % 2:
        return False
    inputs = o.leaf.codes.shape[1 if o.turned else 0]
    groups = group_count(o)
    return not o.turned or (groups > 0 and inputs // groups % 2 == 0)


def _total(
    x: Any, x_zero: Any, w: Any, w_zero: Any, turned: bool, product: IntegerProduct | None = None
) -> jax.Array:
    """Σ (x - x_zero)(w - w_zero), multiplied out; int32 wraps, so only the result must fit."""
    axis = 1 if turned else 0
    total = (product or _wide_dot)(x, w, axis)
    if x_zero is not None:
        sums = jnp.sum(w, axis, jnp.int32)[None]
        total = total - x_zero.astype(jnp.int32) * sums
        x = x.astype(jnp.int32) - x_zero.astype(jnp.int32)
    if w_zero is not None:
        zero = w_zero.T if turned else w_zero
        total = total - jnp.sum(x, 1, jnp.int32, keepdims=True) * zero.astype(jnp.int32)
    return total


def _wide_dot(x: jax.Array, w: jax.Array, axis: int) -> jax.Array:
    dimensions = (((1,), (axis,)), ((), ()))
    return jax.lax.dot_general(x, w.astype(jnp.int8), dimensions, preferred_element_type=jnp.int32)


def _in_blocks(x: jax.Array, w: jax.Array, axis: int) -> jax.Array:
    count, rest = divmod(w.shape[axis], BLOCK)

    def part(start: Any, size: int) -> jax.Array:
        cut = jax.lax.dynamic_slice_in_dim(x, start, size, 1)
        return _wide_dot(cut, jax.lax.dynamic_slice_in_dim(w, start, size, axis), axis)

    first = part(0, BLOCK)
    total = jax.lax.fori_loop(1, count, lambda i, total: total + part(i * BLOCK, BLOCK), first)
    return total + part(count * BLOCK, rest) if rest else total


def _in_halves(x: jax.Array, w: jax.Array, axis: int) -> jax.Array:
    del axis  # the weight is not turned
    pairs, _ = _pairs(w)
    count = _parts(w.shape[0])
    size = w.shape[0] // count

    def part(i: Any, totals: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        row = jax.lax.dynamic_slice_in_dim(x[0], i * size, size)[:, None].astype(jnp.int32)
        wide = jax.lax.dynamic_slice_in_dim(pairs, i * size, size, 0).astype(jnp.int32)
        if pairs.dtype == jnp.int8:  # the shifts copy the sign
            even = jnp.right_shift(jnp.left_shift(wide, 28), 28)
        else:
            even = wide & 15
        both = even + jnp.left_shift(jnp.right_shift(wide, 4), 16)
        sums = jnp.sum((row * both).reshape(-1, SIXTEEN, both.shape[1]), 1, jnp.int32)
        low = jnp.right_shift(jnp.left_shift(sums, 16), 16)
        high = jnp.right_shift(sums - low, 16)
        even, odd = totals
        return even + jnp.sum(low, 0, jnp.int32), odd + jnp.sum(high, 0, jnp.int32)

    # A loop, as its body does not take in what comes before it, such as the rounding of the row,
    # which XLA would else do again for each output. Its zeros are made of the operands, for what
    # `shard_map` wants to know of them.
    zeros = jnp.zeros_like(pairs[0], jnp.int32) + jnp.zeros_like(x[0, :1], jnp.int32)
    even, odd = jax.lax.fori_loop(0, count, part, (zeros, zeros))
    return jnp.stack([even, odd], axis=-1).reshape(1, -1)


def _doubled(x: jax.Array) -> jax.Array:
    return jnp.concatenate([x, x])


def _bfloat16(o: Operands) -> jax.Array:
    scale = as_row(o.leaf.scale, o)
    if o.grid is not None:
        scale = o.grid.scale * scale
    x, w = _shifted(o.x, o.grid), _shifted(o.leaf.codes, o.leaf.grid)
    return _narrow_dot(x, w, o.turned) * scale


def _shifted(codes: jax.Array, grid: Grid | None) -> jax.Array:
    """Codes without their zero point: at most 255 in size, which bfloat16 holds exactly."""
    values = codes.astype(jnp.bfloat16)
    if grid is None or grid.zero_point is None:
        return values
    zero = full_along(grid.zero_point, codes.shape, in_groups(grid.zero_point, codes.shape, (0, 1)))
    return values - zero.astype(jnp.bfloat16)


def _narrow_dot(x: jax.Array, w: jax.Array, turned: bool) -> jax.Array:
    dimensions = (((1,), (1 if turned else 0,)), ((), ()))
    return jax.lax.dot_general(x, w, dimensions, preferred_element_type=jnp.float32)


def _grouped(o: Operands, narrow: Any) -> jax.Array:
    count, axis = group_count(o), 1 if o.turned else 0
    size = o.leaf.codes.shape[axis] // count
    x = jnp.moveaxis(o.x.reshape(o.x.shape[0], count, size), 1, 0)
    x_zero = None if o.grid is None else o.grid.zero_point

    def apart(array: jax.Array | None) -> jax.Array | None:
        """Codes, or an array as coarse as groups, with the groups first."""
        if array is None or array.shape[axis] == 1:
            return array if array is None else jnp.broadcast_to(array, (count, *array.shape))
        shape = (*array.shape[:axis], count, array.shape[axis] // count, *array.shape[axis + 1 :])
        return jnp.moveaxis(array.reshape(shape), axis, 0)

    def add(total: jax.Array, group: Any) -> tuple[jax.Array, None]:
        x, codes, scale, zero = group
        if narrow == jnp.int8:
            part = _total(x, x_zero, codes, zero, o.turned).astype(jnp.float32)
        else:
            shifted = _shifted(x, o.grid)
            part = _narrow_dot(shifted, _shifted(codes, Grid(scale, zero)), o.turned)
        return total + part * (scale.T if o.turned else scale), None

    grid = (None if c is None else per_output(c, o) for c in o.leaf.grid[:2])
    groups = (x, apart(o.leaf.codes), *(apart(c) for c in grid))
    total, _ = jax.lax.scan(add, _zeros(o), groups)
    return total if o.grid is None else total * o.grid.scale


def _zeros(o: Operands) -> jax.Array:
    """[rows, outputs], made of the operands, for what `shard_map` wants to know of them."""
    codes = o.leaf.codes[:, :1].T if o.turned else o.leaf.codes[:1]
    return jnp.zeros_like(o.x[:, :1], jnp.float32) + jnp.zeros_like(codes, jnp.float32)


def _tiled(o: Operands, width: int) -> jax.Array:
    axis = 0 if o.turned else 1
    outputs = o.leaf.codes.shape[axis]
    codes, coarse = o.leaf.split()
    coarse = coarse_map(lambda c: per_output(c, o), coarse)

    def columns(start: Any, size: int) -> jax.Array:
        def cut(array: jax.Array) -> jax.Array:
            if array.shape[axis] == 1:
                return array
            return jax.lax.dynamic_slice_in_dim(array, start, size, axis)

        leaf = o.leaf.joined(cut(codes), coarse_map(cut, coarse))
        return dense(o._replace(leaf=leaf))  # pyright: ignore[reportArgumentType]

    count, rest = divmod(outputs, width)
    if count < 2:
        return dense(o)
    parts = jax.lax.map(lambda i: columns(i * width, width), jnp.arange(count))
    parts = jnp.moveaxis(parts, 0, 1).reshape(o.x.shape[0], count * width)
    if rest:
        parts = jnp.concatenate([parts, columns(count * width, rest)], axis=1)
    return parts


def _halves(o: Operands) -> tuple[QArray, QArray]:
    """The even and the odd columns of a weight of four bits, as codes of eight."""
    codes, coarse = o.leaf.split()
    rows, columns = codes.shape
    pairs, four = _pairs(codes)
    low = jnp.right_shift(jnp.left_shift(pairs, four), four)
    high = jnp.right_shift(pairs, four)

    def half(array: jax.Array, first: int) -> QArray:
        def cut(c: jax.Array) -> jax.Array:
            size = c.shape[1]
            if size == 1 or (o.turned and size != columns):
                return c  # shared by pairs: groups of inputs are of even size
            return full_along(c, (rows, columns), [1])[:, first::2]

        return o.leaf.joined(array, coarse_map(cut, coarse))  # pyright: ignore[reportReturnType]

    return half(low, 0), half(high, 1)


def _pairs(codes: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Codes of four bits two by two, as bytes, and 4 as one of these."""
    # An arithmetic shift of int8 keeps the sign of int4, a logical one of uint8 that there is none.
    dtype = jnp.int8 if codes.dtype == jnp.int4 else jnp.uint8
    rows, columns = codes.shape
    pairs = jax.lax.bitcast_convert_type(codes.reshape(rows, columns // 2, 2), dtype)
    return pairs, jnp.asarray(4, dtype)
