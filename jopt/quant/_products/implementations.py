"""The implementations of a product [rows, inputs] x [inputs, outputs] with a quantized weight.

What each computes, for activations x and weights w, codes q and their zero points z:

- `integers`: Σ (q_x - z_x)(q_w - z_w) of int8 in int32, which is exact; scales afterwards.
- `padded`: the same, to the same bits, on two rows where there is one.
- `blocked`: the same, to the same bits, for 1,024 inputs at a time.
- `grouped`: the same for each group of inputs; scaled, the groups are summed in float32.
- `bfloat16`: (q_x - z_x)(q_w - z_w) in bfloat16, which holds both exactly, and so are the products;
  summed in float32, exact up to 2^24. For activations of the format `BFloat16`, x itself for q_x.
- `grouped_bfloat16`: the same for each group of inputs.
- `dense`: the weight dequantized as a whole, a product in the function's own dtype.
- `padded_dense`, `tiled_narrow`, `tiled`, `tiled_wide`, `tiled_half`: the same numbers, summed in
  another order perhaps, on two rows where there is one; for 64, 128 or 256 outputs or half of all
  at a time, so that no dense weight exists.
- `striped`: the weight of 512 inputs at a time, or of three times 256 where they are few. A scale
  for each output, which rounds otherwise in the last place, multiplies the sum in float32; with
  activations in bfloat16, `bfloat16` by parts.
- `vector`: one row times codes in one kernel: of four bits and codes of the row in integers, to the
  bits of `integers`; of a weight alone in float32, scaled after the sum over inputs of one scale.
- `paired_...`: the one named, on an int4 weight as two of int8, its even and its odd columns.
- `pallas`: a kernel that dequantizes block by block, see `kernels.py`.

All take `Operands` and return `[rows, outputs]`. Derivatives are taken of the dense form elsewhere.
"""

import functools

import jax
import jax.numpy as jnp

from .._formats.base import Int
from . import vector
from .halves import paired, splits
from .integers import (
    BLOCK,
    bfloat16,
    blocked,
    grouped,
    integers,
    paired_blocked,
)
from .operands import Implementation, Operands, codes_in_bfloat16, group_count, padded
from .values import STRIPE, dense, half, paired_half, paired_striped, striped, tiled

# Outputs for which `tiled` and its like dequantize a weight at a time.
WIDTHS = {"tiled_narrow": 64, "tiled": 128, "tiled_wide": 256}


def possible(o: Operands) -> tuple[str, ...]:
    """The implementations that can serve these operands, by their shapes alone."""
    inputs, outputs = o.leaf.codes.shape[:: -1 if o.turned else 1]
    coded, whole = o.x.dtype == jnp.int8, isinstance(o.leaf.format, Int)
    narrow, groups = codes_in_bfloat16(o), group_count(o)
    whole_groups = groups == 1 or (groups > 0 and STRIPE * groups % inputs == 0)
    stripes = ["striped"] * (inputs >= 2 * STRIPE and whole_groups)
    halves = ["tiled_half"] * (outputs > 2 * max(WIDTHS.values()))
    names: list[str] = []
    if whole and (coded or narrow) and groups == 1:
        names += ["bfloat16"] + (["integers"] + ["padded"] * (o.x.shape[0] == 1)) * coded
        names += ["blocked"] * (coded and not o.turned and inputs >= 2 * BLOCK)
        names += halves * narrow + stripes * narrow
    elif whole and (coded or narrow) and groups and inputs // groups >= 16:
        names += ["grouped_bfloat16"] + ["grouped"] * coded
    elif o.leaf.activation is None:
        names += ["dense"] + ["padded_dense"] * (o.x.shape[0] == 1)
        names += [name for name, width in WIDTHS.items() if outputs > width]
        names += halves + stripes
    if splits(o):
        own = outputs if o.turned else outputs // 2
        cut = [name for name in names if own > WIDTHS.get(name, 0)]
        names += [f"paired_{name}" for name in cut if name != "striped" or not o.turned]
    if vector.serves(o):
        names.append("vector")
    return tuple(names)


def _many(o: Operands) -> jax.Array:
    """What `vector` leaves to others: several rows, which are one of each of many under `vmap`."""
    if o.grid is not None:
        return paired(o, integers if group_count(o) == 1 else grouped)
    if group_count(o) > 1 and codes_in_bfloat16(o):
        inner = _SINGLE["grouped_bfloat16"]
        return paired(o, inner) if splits(o) else inner(o)
    return paired_half(o) if splits(o) else half(o)


_SINGLE: dict[str, Implementation] = {
    "integers": integers,
    "padded": functools.partial(padded, inner=integers),
    "blocked": blocked,
    "grouped": grouped,
    "bfloat16": bfloat16,
    "grouped_bfloat16": functools.partial(grouped, narrow=jnp.bfloat16),
    "dense": dense,
    "padded_dense": functools.partial(padded, inner=dense),
    "tiled_half": half,
    **{name: functools.partial(tiled, width=width) for name, width in WIDTHS.items()},
}
IMPLEMENTATIONS: dict[str, Implementation] = {
    **_SINGLE,
    "striped": striped,
    **{f"paired_{name}": functools.partial(paired, inner=f) for name, f in _SINGLE.items()},
    "paired_blocked": paired_blocked,
    "paired_striped": paired_striped,
    "paired_tiled_half": paired_half,
    "vector": functools.partial(vector.vector, many=_many),
}
NAMES = (*IMPLEMENTATIONS, "float8", "pallas")
