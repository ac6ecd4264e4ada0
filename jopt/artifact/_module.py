"""The model as one StableHLO module: traced from a function, and read back with suspicion."""

import contextlib
import re
import struct
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax import export

from jopt import trees

# Custom calls that only compute on the buffers they are given. JAX promises to keep those outside
# of jaxlib's Python callbacks stable, which take a pointer from the module and are not among them.
_HARMLESS = re.compile(
    r"lapack_[a-z]+_ffi|(cusolver|hipsolver|cusparse)_[a-z0-9]+_ffi"
    r"|(cu|hip)_(lu_pivots_to_permutation|threefry2x32_ffi)"
    r"|stablehlo\.dynamic_(reduce_window|rng_bit_generator|top_k|approx_top_k)"
    r"|ApproxTopK|Eigh|Qr|LuDecomposition|ProductOfElementaryHouseholderReflectors|AllocateBuffer"
    r"|Sharding|SPMDFullToShardShape|SPMDShardToFullShape|annotate_device_placement|shape_assertion"
)
# As MLIR prints them: `custom_call @name(`, or generically with the name among the attributes.
_CALL = re.compile(r"\b\w+\.custom_call\b")
_TARGET = re.compile(r'\b\w+\.custom_call\s+@"?([^"(\s]+)|call_target_name = "([^"]*)"')
# What reading a module that is no module raises, in flatbuffers, in JAX and in jaxlib.
_UNREADABLE = (ValueError, TypeError, LookupError, AttributeError, RuntimeError, struct.error)
# What tracing at an unknown batch size raises where Python needs the number.
_UNKNOWN_SIZE = (
    jax.errors.InconclusiveDimensionOperation,
    jax.errors.ConcretizationTypeError,
    ValueError,
    TypeError,
    NotImplementedError,
)


def build(
    apply: Callable[..., Any],
    params: trees.PyTree,
    inputs: Sequence[Any],
    *,
    platforms: Sequence[str],
    batch_axis: int | None,
) -> export.Exported:
    """Exports `apply` as a function of the list of arrays in `params`, and of the inputs.

    Leaves of `params` that are not arrays (numbers, functions) are traced as they are.

    Raises:
      TypeError: if inputs or outputs hold containers that only the model's source can rebuild.
      ValueError: if the model cannot be traced with a batch of any size.
    """
    leaves, structure = jax.tree.flatten(params)
    places = [index for index, leaf in enumerate(leaves) if is_array(leaf)]

    def model(arrays: Sequence[jax.Array], *inputs: Any) -> Any:
        filled = list(leaves)
        for place, array in zip(places, arrays, strict=True):
            filled[place] = array
        return apply(jax.tree.unflatten(structure, filled), *inputs)

    arrays = [spec(leaves[place]) for place in places]
    fixed = jax.tree.map(spec, tuple(inputs))
    # Traced once at the given size: what fails here is the model's own, and is left to speak.
    out = jax.eval_shape(model, arrays, *fixed)
    for what, tree in (("inputs", fixed), ("outputs", out)):
        if (strange := _custom(jax.tree.structure(tree))) is not None:
            raise TypeError(
                f"`save(...)`: the model's {what} hold a `{strange.__name__}`, which cannot be "
                "rebuilt without its source. Use tuples, lists and dictionaries."
            )
    with _no_locations():
        exporter = export.export(jax.jit(model), platforms=tuple(platforms))
        if batch_axis is None:
            return exporter(arrays, *fixed)
        try:
            # JAX lets a reshape to a fixed size pass for any b, so another size is traced as well.
            jax.eval_shape(model, arrays, *_any_batch(fixed, batch_axis, None))
            return exporter(arrays, *_any_batch(fixed, batch_axis, export.symbolic_shape("b")[0]))
        except _UNKNOWN_SIZE as error:
            raise ValueError(_no_symbol(fixed, batch_axis, error)) from error


def read(data: bytes, allow: Collection[str]) -> export.Exported:
    """Undoes `Exported.serialize`, refusing custom calls that could do more than compute.

    Raises:
      ValueError: if `data` is no module, or calls what is neither harmless nor in `allow`.
    """
    try:
        exported = export.deserialize(bytearray(data))
        text = exported.mlir_module()
    except _UNREADABLE as error:
        raise ValueError(f"it is no module that this JAX reads: {error}") from error
    if exported.has_vjp():
        raise ValueError("it brings a derivative, which `save` never writes")
    found = [pretty or generic for pretty, generic in _TARGET.findall(text)]
    if len(found) < len(_CALL.findall(text)):
        raise ValueError("it has a custom call without a name")
    strange = sorted(
        {name for name in found if name not in allow and not _HARMLESS.fullmatch(name)}
    )
    if strange:
        raise ValueError(
            f"it calls `{strange[0]}`, which may do more than compute. "
            f'If you trust the artifact: `load(path, allow=["{strange[0]}"])`'
        )
    return exported


def is_array(leaf: Any) -> bool:
    """Whether a leaf is an argument of the module; anything else is part of the program."""
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


def arrays_of(leaf: Any) -> list[tuple[str, Any]]:
    """The arrays that a leaf, typed or not, brings to the module: `(field, array)`, in order."""
    flat, _ = jax.tree_util.tree_flatten_with_path(leaf)
    spelled = [(jax.tree_util.keystr(path, simple=True, separator="/"), x) for path, x in flat]
    return [(field, array) for field, array in spelled if is_array(array)]


def spec(leaf: Any) -> jax.ShapeDtypeStruct:
    """Shape and dtype of an argument as JAX will take it: float64 as float32, unless x64 is on."""
    leaf = leaf if is_array(leaf) else np.asarray(leaf)
    return jax.ShapeDtypeStruct(leaf.shape, jax.dtypes.canonicalize_dtype(leaf.dtype))


def input_names(exported: export.Exported) -> tuple[str, ...]:
    """The inputs as their caller counts them: `"0"` is the first, `"1/pixels"` is in the second."""
    args, _ = jax.tree.unflatten(exported.in_tree, range(exported.in_tree.num_leaves))
    return trees.paths(args[1:])


def output_names(exported: export.Exported) -> tuple[str, ...]:
    """The outputs; an array that is the only output has no name."""
    out = jax.tree.unflatten(exported.out_tree, range(exported.out_tree.num_leaves))
    return trees.paths(out)


def _any_batch(inputs: Any, axis: int, batch: Any) -> Any:
    """The inputs with a batch of size `batch`; of one more than they have if that is None."""

    def widen(spec: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        if not spec.shape:
            return spec
        if not -len(spec.shape) <= axis < len(spec.shape):
            raise ValueError(f"an input of shape {spec.shape} has no axis {axis}")
        shape = list(spec.shape)
        shape[axis] = shape[axis] + 1 if batch is None else batch
        return jax.ShapeDtypeStruct(tuple(shape), spec.dtype)

    return jax.tree.map(widen, inputs)


def _custom(structure: Any) -> type | None:
    """The first node type that is not a plain container."""
    data = structure.node_data()
    if data is not None and data[0] not in (dict, tuple, list, type(None)):
        return data[0]
    return next(filter(None, map(_custom, structure.children())), None)


def _no_symbol(inputs: Any, axis: int, error: Exception) -> str:
    sizes = {spec.shape[axis] for spec in jax.tree.leaves(inputs) if spec.shape}
    return (
        f"`save(..., batch_axis={axis})`: the model runs on batches of {sorted(sizes)}, but cannot "
        f"be traced for a batch of any size b:\n  {str(error).strip().splitlines()[0]}\n"
        "Write shapes with `-1` or from `x.shape`, or fix the size of the batch: `batch_axis=None`."
    )


@contextlib.contextmanager
def _no_locations() -> Iterator[None]:
    """Lowers without file names and line numbers.

    They would tell where the author's source lay, and make the same model another file elsewhere.
    """
    name = "jax_traceback_in_locations_limit"
    before = getattr(jax.config, name)
    jax.config.update(name, 0)
    try:
        yield
    finally:
        jax.config.update(name, before)
