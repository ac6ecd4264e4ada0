"""Pruned weights packed into leaves that do not store their zeros, each in the form that suits."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jopt import trees
from jopt.trace import Leaf, Site

from . import _select
from ._leaves import bits, csr, nm24
from ._leaves.sparse import Sparse
from ._leaves.within import PackedLeaf

PyTree = Any
FORMS = ("nm24", "bits", "csr")
UNUSED = "no product in `sites` has it as its weight"


class Packing(NamedTuple):
    """How one leaf is stored."""

    form: str  # "nm24", "bits", "csr" or "dense"
    bits_before: int
    bits: int
    reason: str = ""  # why it stays dense


def pack(
    params: PyTree,
    form: str = "smallest",
    *,
    where: trees.Where | None = None,
    sites: Sequence[Site] | None = None,
    unfit: str = "error",
) -> tuple[PyTree, dict[str, Packing]]:
    """Stores pruned weights without their zeros; use the result in `jopt.lift(apply)`.

    | form | stores | bits a weight in float32 |
    |---|---|---|
    | `"nm24"` | two values of four, and their places | 17 |
    | `"bits"` | a bitmap and the values that are left | 1 + 32 density |
    | `"csr"` | values and inputs of each output | 48 density, and padding to the longest row |

    Weights come back bit for bit, but for -0, which is a zero like any other. This saves memory at
    rest. Only `"csr"` saves time, on CPU from about 90 % sparsity; other products unpack the weight
    first (see `docs/sparsity.md`). Typed leaves with codes, such as `jopt.quant.quantize` makes,
    have their codes packed and keep their products. Looks at values, so it runs outside `jit`.

    Args:
      params: any pytree, pruned: `apply_masks`, or what training with `sparsify` ends with.
      form: one of the above, or `"smallest"`, which takes the least bits for each weight.
      where: the leaves to pack; by default all of two axes and more that hold numbers, of which
        those that no product in `sites` has stay dense.
      sites: from `jopt.sites`, tells along which axis a weight's inputs lie, and which axes count
        layers. Without it weights are `[..., in, out]`, and of three axes the first counts layers.
      unfit: what to do with a weight that the form does not fit, such as one that is not 2:4:
        `"error"` lists all such leaves, `"skip"` leaves them dense and reports them.

    Returns:
      `params` with `NM24`, `BitSparse` and `CSR` leaves (`PackedLeaf` around codes), and by path
      how each chosen leaf is stored. What would not get smaller stays as it is, with the reason.

    Raises:
      ValueError: if the form does not fit leaves, `where` selects nothing, or an option is unknown.
      TypeError: if a leaf that `where` names holds no numbers to pack, or under `jit`.

    Example:
      >>> import jax.numpy as jnp
      >>> from jopt import prune
      >>> params = {"kernel": jnp.array([[0.0, 3.0], [1.0, 0.0], [0.0, 0.0], [2.0, 4.0]])}
      >>> packed, report = prune.pack(params, "nm24")
      >>> report["kernel"]
      Packing(form='nm24', bits_before=256, bits=144, reason='')
      >>> bool((packed["kernel"].materialise() == params["kernel"]).all())
      True
    """
    if form not in ("smallest", *FORMS) or unfit not in ("error", "skip"):
        raise ValueError(
            f'`prune.pack(params, {form!r}, unfit={unfit!r})`: `form` is "smallest", "nm24", '
            '"bits" or "csr", `unfit` is "error" or "skip".'
        )
    chosen = trees.select(params, _default if where is None else where, caller="prune.pack")
    wanted = FORMS if form == "smallest" else (form,)
    used = None if sites is None else {path for site in sites for path in site.paths}
    new, report, wrong = [], {}, {}
    pairs = zip(trees.items(params), jax.tree.leaves(chosen), strict=True)
    for (path, leaf), mine in pairs:
        if not mine:
            new.append(leaf)
            continue
        _check(path, leaf)
        if where is None and used is not None and path not in used:
            new.append(leaf)
            report[path] = Packing("dense", _bits(leaf), _bits(leaf), UNUSED)
            continue
        made, misfits, large = _forms(path, leaf, wanted, sites)
        if unfit == "error" and form in misfits:
            wrong |= {path: misfits[form]}
        best, report[path] = _smallest(leaf, made, {**large, **misfits})
        new.append(best)
    if wrong:
        raise ValueError(
            f'`prune.pack(params, "{form}")` does not fit {len(wrong)} of {len(report)} weights:\n'
            + "\n".join(f"  `{path}`: {reason}" for path, reason in wrong.items())
            + "\nLeave them out with `where=`, choose another form, or leave them dense with "
            '`unfit="skip"`. `sites=jopt.sites(apply, params, *inputs)` says along which axis '
            "the inputs lie."
        )
    return jax.tree.structure(params, is_leaf=trees.is_typed).unflatten(new), report


def unpack(params: PyTree) -> PyTree:
    """Undoes `pack`: arrays, and the typed leaves that were packed, whole again.

    Example:
      >>> import jax.numpy as jnp
      >>> from jopt import prune
      >>> packed, _ = prune.pack({"kernel": jnp.zeros((8, 8)).at[1, 2].set(3.0)})
      >>> prune.unpack(packed)["kernel"].shape
      (8, 8)
    """

    def whole(_: str, leaf: Any) -> Any:
        if isinstance(leaf, PackedLeaf):
            return leaf.unpacked()
        return leaf.materialise() if isinstance(leaf, Sparse) else leaf

    return trees.map_with_path(whole, params)


# Helpers, in order of use.


def _default(path: str, leaf: Any) -> bool:
    return not isinstance(leaf, Sparse | PackedLeaf) and bool(_inside(leaf))


def _inside(leaf: Any) -> list[Any]:
    """The arrays to pack: the leaf itself, or those of a typed leaf that are of its shape."""
    shape = getattr(leaf, "shape", ())
    if len(shape) < 2:
        return []
    if not trees.is_typed(leaf):
        return [leaf] if jnp.issubdtype(leaf.dtype, jnp.floating) else []
    if not isinstance(leaf, Leaf) or hasattr(leaf, "with_weight"):  # which trains
        return []
    return [x for x in jax.tree.leaves(leaf) if getattr(x, "shape", None) == tuple(shape)]


def _check(path: str, leaf: Any) -> None:
    if isinstance(leaf, Sparse | PackedLeaf) or not (arrays := _inside(leaf)):
        kind = type(leaf).__name__
        raise TypeError(
            f"`prune.pack(...)` cannot pack `{path}`, a {kind}: it takes arrays of floats with two "
            "axes and more, and typed leaves that hold codes of such a shape; what trains under "
            "fake quantization is for `jopt.quant.quantize` first. Choose leaves with `where=`."
        )
    if any(isinstance(array, Tracer) for array in arrays):
        raise TypeError(
            "`prune.pack(params)` looks at values, to know how many are not zero: call it outside "
            "`jit`."
        )


def _forms(
    path: str, leaf: Any, wanted: Sequence[str], sites: Sequence[Site] | None
) -> tuple[dict[str, Any], dict[str, str], dict[str, str]]:
    """The leaf in each form, or why that does not fit it, or why it cannot be smaller."""
    shape = tuple(leaf.shape)
    axis, unknown = -2, None
    if sites is not None:
        axis, unknown = _select.summed(sites, path)
    layers = _layers(path, len(shape), sites)
    make: dict[str, Callable[[np.ndarray], Sparse]] = {
        "nm24": lambda array: nm24.packed(array, axis),
        "bits": lambda array: bits.packed(array, layers),
        "csr": lambda array: csr.packed(array, axis),
    }
    made, misfits, large = {}, {}, {}
    arrays = [np.asarray(array) for array in _inside(leaf)]
    for form in wanted:
        found = (_misfit(form, array, axis, unknown, layers) for array in arrays)
        if reason := next(filter(None, found), None):
            misfits[form] = reason
        elif all(_hopeless(form, array) for array in arrays):
            kept = sum(np.count_nonzero(array) for array in arrays)
            share = kept / max(1, sum(array.size for array in arrays))
            large[form] = f"{share:.1%} of its weights are not zero: nothing to gain by `{form}`"
        else:
            made[form] = _with_inside(leaf, make[form])
    return made, misfits, large


def _layers(path: str, ndim: int, sites: Sequence[Site] | None) -> int:
    """How many leading axes count layers, each used on its own."""
    spare = [
        max(0, min(ndim - len(site.shapes[use.operand]), ndim + min(use.contracted)))
        for site in sites or ()
        for use in site.uses
        if use.path == path and use.contracted
    ]
    return min(spare) if spare else int(ndim == 3)


def _misfit(
    form: str, array: np.ndarray, axis: int, unknown: str | None, layers: int
) -> str | None:
    if form == "bits":
        return None
    if unknown:
        return unknown
    if form == "nm24":
        return nm24.misfit(array, axis)
    if array.ndim - layers != 2:
        return f"shape {array.shape} is not of a matrix, or of stacked ones"
    return None


def _hopeless(form: str, array: np.ndarray) -> bool:
    """Whether a form would take more than the array for sure; packing large ones is slow."""
    width, density = trees.bits_of(array), np.count_nonzero(array) / max(1, array.size)
    least = {"nm24": 0.5, "bits": density + 1 / width, "csr": density * (1 + 16 / width)}
    return least[form] >= 1


def _with_inside(leaf: Any, make: Callable[[np.ndarray], Sparse]) -> Any:
    if not trees.is_typed(leaf):
        return make(np.asarray(leaf))
    own = {id(array) for array in _inside(leaf)}
    packed = jax.tree.map(lambda x: make(np.asarray(x)) if id(x) in own else x, leaf)
    return PackedLeaf(packed)


def _smallest(leaf: Any, made: dict[str, Any], reasons: dict[str, str]) -> tuple[Any, Packing]:
    """The smallest of a leaf's forms, if it is smaller than the leaf."""
    before = _bits(leaf)
    sizes = {form: _bits(packed) for form, packed in made.items()}
    best = min(sizes, key=lambda form: sizes[form], default=None)
    if best is not None and sizes[best] < before:
        return made[best], Packing(best, before, sizes[best])
    if best is None:
        return leaf, Packing("dense", before, before, "; ".join(reasons.values()))
    reason = f"`{best}` would take {sizes[best]} bits, and dense it takes {before}"
    return leaf, Packing("dense", before, before, reason)


def _bits(leaf: Any) -> int:
    if not isinstance(leaf, Leaf):
        return math.prod(leaf.shape) * trees.bits_of(leaf)
    return sum(array.size * width for array, width in leaf.storage().values())
