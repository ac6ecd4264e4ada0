"""Pallas kernels for products of floats with quantized weights, for GPU (Triton) and TPU (Mosaic).

The weight is read as codes and dequantized block by block, so that memory traffic is that of the
codes; with few rows a product is bound by that traffic, and nothing else matters much. A block of
the result is a loop over blocks of inputs, each within one group,

    y = Σ_blocks scale_group Σ_inputs x (q - z),

in which integers (q - z) enter the inner product as they are (bfloat16 holds them exactly) and a
table format (NF4) its code values, rounded to the activation's dtype; sums are float32. The last
sum is taken in parts side by side on a GPU, where few blocks would leave units idle.

Not chosen by default: no GPU or TPU has measured them yet, `jax.export` gives a Triton call no
guarantee of stability, and XLA cannot split a kernel over devices by itself. A table that
`jopt profile --tune` measured chooses them, or `use_implementation("pallas")`.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jopt.trace.layered import full_along

from .._formats.base import Int
from .._formats.floats import FP8
from .._formats.tables import TableFormat
from .._leaves.weights import QArray
from .operands import Operands

ROWS = 16  # of a block: the least that a GPU's matrix unit takes
MOST_ROWS = 256  # with more rows a product is no longer bound by reading the weight
SIZES = (128, 64, 32)  # of blocks of inputs and outputs
UNITS = 512  # blocks at work, about, that keep a large GPU busy


class _Blocks(NamedTuple):
    inputs: int
    outputs: int
    parts: int  # into which the sum over inputs is cut


def serves(o: Operands) -> bool:
    """Whether a kernel can compute this product."""
    return _blocks(o, "tpu") is not None


def product(o: Operands, platform: str, *, interpret: bool = False) -> jax.Array:
    """The product `[rows, outputs]` by a kernel.

    Args:
      o: floating values of the activation, and a weight `[inputs, outputs]` of `Int`, `FP8`, `NF4`.
      platform: whose compiler the kernel is for: `"cuda"` or `"tpu"`.
      interpret: run the kernel's steps by XLA instead, on any backend, to test it.
    """
    blocks = _blocks(o, platform)
    assert blocks is not None
    packed = o.leaf.format.bits <= 4
    (inputs, outputs), rows = o.leaf.codes.shape, o.x.shape[0]
    count = inputs // blocks.inputs
    x = jnp.pad(o.x, ((0, -rows % ROWS), (0, 0)))
    x = jnp.moveaxis(x.reshape(x.shape[0], count, blocks.inputs), 1, 0)
    codes = _as_bytes(o.leaf.codes) if packed else o.leaf.codes
    codes = codes.reshape(count, blocks.inputs, -1)
    grid = [c for c in (o.leaf.scale, o.leaf.zero_point) if c is not None]
    coarse = [_rows_of(c, count, outputs, packed) for c in grid]
    y = _call(blocks, x, codes, coarse, _levels(o.leaf), packed, platform, interpret)
    y = jnp.sum(y, 0)  # parts of the sum: [even and odd columns, rows, columns]
    return jnp.moveaxis(y, 0, -1).reshape(x.shape[1], outputs)[:rows].astype(o.dtype)


def _call(
    blocks: _Blocks,
    x: jax.Array,  # [blocks of inputs, rows, inputs]
    codes: jax.Array,  # [blocks of inputs, inputs, columns]
    coarse: list[jax.Array],  # [blocks of inputs, or 1, planes, 1, columns]
    levels: tuple[float, ...] | None,
    packed: bool,
    platform: str,
    interpret: bool,
) -> jax.Array:
    from jax.experimental import pallas as pl  # a second to import, for few programs

    (count, rows, size), columns, planes = x.shape, codes.shape[2], coarse[0].shape[1]
    steps = count // blocks.parts
    groups, width = coarse[0].shape[0], blocks.outputs
    held, per_part = (1, 0) if groups == 1 else (steps, 1)
    specs = [
        pl.BlockSpec((steps, ROWS, size), lambda p, i, j: (p, i, 0)),
        pl.BlockSpec((steps, size, width), lambda p, i, j: (p, 0, j)),
        *[pl.BlockSpec((held, planes, 1, width), lambda p, i, j: (p * per_part, 0, 0, j))]
        * len(coarse),
    ]
    body = functools.partial(_kernel, steps=steps, shared=groups == 1, levels=levels, packed=packed)
    return pl.pallas_call(
        body,
        jax.ShapeDtypeStruct((blocks.parts, planes, rows, columns), jnp.float32),
        grid=(blocks.parts, rows // ROWS, columns // width),
        in_specs=specs,
        out_specs=pl.BlockSpec((1, planes, ROWS, width), lambda p, i, j: (p, 0, i, j)),
        interpret=interpret,
        name="quantized_product",
        **({} if interpret else _options(platform)),
    )(x, codes, *coarse)


def _kernel(
    x_ref: Any,
    codes_ref: Any,
    scale_ref: Any,
    *rest: Any,
    steps: int,
    shared: bool,
    levels: tuple[float, ...] | None,
    packed: bool,
) -> None:
    """One block of the result: the loop over blocks of inputs."""
    *zero_refs, out_ref = rest
    dtype, precision = x_ref.dtype, None
    if dtype == jnp.float32:
        precision = jax.lax.Precision.HIGHEST
    planes = 2 if packed else 1

    def step(k: Any, totals: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        x, codes = x_ref[k], codes_ref[k]
        row = 0 if shared else k
        sums = []
        for plane, total in enumerate(totals):
            values = _decoded(codes, plane, levels, packed, dtype)
            for zero_ref in zero_refs:
                values = values - zero_ref[row, plane].astype(dtype)
            part = jnp.dot(x, values, precision=precision, preferred_element_type=jnp.float32)
            sums.append(total + (part if shared else part * scale_ref[row, plane]))
        return tuple(sums)

    start = jnp.zeros((x_ref.shape[1], out_ref.shape[3]), jnp.float32)
    totals = jax.lax.fori_loop(0, steps, step, (start,) * planes)
    for plane, total in enumerate(totals):
        out_ref[0, plane] = total * scale_ref[0, plane] if shared else total


def _decoded(
    codes: jax.Array,
    plane: int,
    levels: tuple[float, ...] | None,
    packed: bool,
    dtype: Any,
) -> jax.Array:
    """The values of a block of codes without scale; of packed ones, those of one half byte."""
    if packed:
        wide = codes.astype(jnp.int32)
        if plane == 0:
            wide = jnp.left_shift(wide, jnp.int32(28))
        codes = jnp.right_shift(wide, jnp.int32(4 if plane else 28))
    if levels is None:
        return codes.astype(jnp.float32).astype(dtype)
    index = codes.astype(jnp.int32) & jnp.int32(len(levels) - 1)
    values = jnp.full(codes.shape, levels[0], jnp.float32)
    for place, level in enumerate(levels[1:], 1):
        values = jnp.where(index == place, jnp.float32(level), values)
    return values.astype(dtype)


# Helpers, in order of use.


def _blocks(o: Operands, platform: str) -> _Blocks | None:
    """How a product is cut into blocks; None where it cannot be."""
    if o.turned or o.grid is not None or not jnp.issubdtype(o.x.dtype, jnp.floating):
        return None
    codes, scale = o.leaf.codes, o.leaf.scale
    if not isinstance(o.leaf.format, Int | FP8) and _levels(o.leaf) is None:
        return None
    if not isinstance(o.x.shape[0], int) or not 0 < o.x.shape[0] <= MOST_ROWS:
        return None
    if 0 in codes.shape:
        return None
    (inputs, outputs), groups = codes.shape, scale.shape[0]
    columns = outputs // 2 if o.leaf.format.bits <= 4 else outputs
    within = [size for size in SIZES if (inputs // groups) % size == 0]
    across = [size for size in SIZES[:2] if columns % size == 0 and outputs % 2 == 0]
    if not within or not across or scale.shape[1] not in (1, outputs) or o.leaf.via:
        return None
    count, parts = inputs // within[0], 1
    if platform == "cuda":
        units = columns // across[0] * math.ceil(o.x.shape[0] / ROWS)
        while count % (2 * parts) == 0 and units * parts < UNITS:
            parts *= 2
    return _Blocks(within[0], across[0], parts)


def _levels(leaf: QArray) -> tuple[float, ...] | None:
    """The code values of a format that is one fixed table of sixteen or so."""
    if not isinstance(leaf.format, TableFormat):
        return None
    levels = leaf.format.levels(leaf.grid)
    return levels if isinstance(levels, tuple) and len(levels) in (2, 4, 8, 16) else None


def _as_bytes(codes: jax.Array) -> jax.Array:
    rows, columns = codes.shape
    return jax.lax.bitcast_convert_type(codes.reshape(rows, columns // 2, 2), jnp.int8)


def _rows_of(coarse: jax.Array, count: int, outputs: int, packed: bool) -> jax.Array:
    """A coarse array as float32 [blocks or 1, planes, 1, columns]; a plane for each half byte."""
    full = full_along(coarse.astype(jnp.float32), (count, outputs), [1])
    if full.shape[0] != 1:
        full = full_along(full, (count, outputs), [0])
    if not packed:
        return full[:, None, None]
    return jnp.stack([full[:, None, 0::2], full[:, None, 1::2]], axis=1)


def _options(platform: str) -> dict[str, Any]:
    """What tells `pallas_call` which compiler to use: by default a GPU gets Mosaic."""
    if platform == "tpu":
        return {}
    from jax.experimental.pallas import triton

    return {"compiler_params": triton.CompilerParams(num_warps=4, num_stages=3)}
