"""Saving a model as a folder that runs without its source."""

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jaxlib
import numpy as np

from jopt import trace, trees

from . import _folder, _manifest, _module, _weights


def save(
    path: str | os.PathLike[str],
    apply: Callable[..., Any],
    params: trees.PyTree,
    *inputs: Any,
    platforms: Sequence[str] = ("cpu", "cuda", "tpu"),
    batch_axis: int | None = 0,
    allow_dense: bool = False,
    metrics: Mapping[str, Any] | None = None,
    recipe: Mapping[str, Any] | None = None,
    extra: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Saves a model, compressed or not, as a folder that `load` runs without the model's source.

    The folder holds `model.stablehlo`, one module for all platforms whose arguments are the weights
    and the inputs; `weights.safetensors`, each array in the fewest bytes that give its bits back;
    and `manifest.json`, which says how to read both. It appears whole or not at all.

    Args:
      path: the folder to make; its parents are made too.
      apply: the model, `apply(params, *inputs)`. Typed leaves in `params` are seen to
        (`jopt.lift`).
      params: any pytree. Its arrays are saved; its other leaves become part of the program.
      *inputs: examples of the inputs, or `jax.ShapeDtypeStruct`s. Trees of tuples, lists,
        dictionaries.
      platforms: where the module is to run: `"cpu"`, `"cuda"`, `"rocm"`, `"tpu"`.
      batch_axis: the axis of every input (scalars apart) that may have any size; `None` fixes all.
      allow_dense: as in `jopt.lift`: materialise typed leaves where an operation has no rule for
        them.
      metrics: numbers to keep in the manifest.
      recipe: how the model was made, to keep in the manifest.
      extra: whatever else to keep in the manifest, as JSON holds it.
      overwrite: replace an artifact that is there. It stays as it is until the new one is complete.

    Returns:
      The manifest. `manifest["sizes"]` has the bytes of the files, parameters, nonzeros and bits.

    Raises:
      ValueError: if the model cannot be traced with a batch of any size.
      TypeError: if a parameter has a dtype that cannot be saved, or inputs or outputs hold
        containers that only the source can rebuild, or metrics, recipe or extra hold more than JSON
        does.
      FileExistsError: if `path` holds something and is not to be replaced.
      OSError: if it cannot be written, for instance because the disk is full.
      ImportError: if safetensors or flatbuffers is missing.

    Example:
      >>> import tempfile, jax.numpy as jnp
      >>> from jopt import artifact
      >>> apply, params = lambda params, x: x @ params["kernel"], {"kernel": jnp.ones((4, 2))}
      >>> folder = tempfile.mkdtemp()
      >>> manifest = artifact.save(folder, apply, params, jnp.ones((1, 4)))
      >>> artifact.load(folder)(jnp.ones((3, 4))).shape
      (3, 2)
    """
    told = _manifest.plain({"metrics": metrics or {}, "recipe": recipe, "extra": extra or {}})
    leaves, arrays, centers = _gather(params)
    weights, entries = _weights.write(arrays, centers)
    if any(map(trees.is_typed, jax.tree.leaves(params, is_leaf=trees.is_typed))):
        apply = trace.lift(apply, allow_dense=allow_dense)
    exported = _module.build(apply, params, inputs, platforms=platforms, batch_axis=batch_axis)
    model = _serialize(exported)
    manifest = {
        "format": _manifest.FORMAT,
        "version": _manifest.VERSION,
        "jopt": _version(),
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "files": {
            name: {"bytes": len(data), "sha256": _manifest.digest(data)}
            for name, data in ((_manifest.MODEL, model), (_manifest.WEIGHTS, weights))
        },
        "platforms": list(exported.platforms),
        "inputs": _values(_module.input_names(exported), exported.in_avals[len(arrays) :]),
        "outputs": _values(_module.output_names(exported), exported.out_avals),
        "sizes": {**_total(leaves), "model_bytes": len(model), "weights_bytes": len(weights)},
        **told,
        "leaves": [_described(leaf, entries) for leaf in leaves],
    }
    text = _manifest.dump(manifest)
    names = (_manifest.MODEL, _manifest.WEIGHTS, _manifest.MANIFEST)
    with _folder.replacing(Path(path).resolve(), overwrite=overwrite, names=names) as folder:
        for name, data in zip(names, (model, weights, text), strict=True):
            _folder.write(folder / name, data)
    return _manifest.parse(text, _manifest.MANIFEST)


def weights_bytes(params: trees.PyTree) -> int:
    """The bytes of the weights file that `save` would write for `params`.

    Example:
      >>> import jax.numpy as jnp
      >>> weights_bytes({"kernel": jnp.arange(4096.0)}) - 4 * 4096  # the header
      80
    """
    _, arrays, centers = _gather(params)
    return len(_weights.write(arrays, centers)[0])


def _gather(
    params: trees.PyTree,
) -> tuple[list[dict[str, Any]], dict[str, np.ndarray], dict[str, str]]:
    """Leaves for the manifest; arrays by name, in order; the zero points that codes have."""
    leaves: list[dict[str, Any]] = []
    arrays: dict[str, np.ndarray] = {}
    centers: dict[str, str] = {}
    for path, leaf in trees.items(params):
        found = _module.arrays_of(leaf)
        if not found:
            continue
        stored = leaf.storage() if trees.is_typed(leaf) else {}
        names = {}
        for field, array in found:
            names[field] = _unique(f"{path}/{field}" if field else path, arrays)
            arrays[names[field]] = _on_host(names[field], array)
        bits = {field: stored.get(field, (None, trees.bits_of(array)))[1] for field, array in found}
        if {"codes", "zero_point"} <= set(names):
            centers[names["codes"]] = names["zero_point"]
        kept = [{"name": names[field], "bits": bits[field]} for field, _ in found]
        leaves.append({**_leaf(path, leaf), "arrays": kept})
    return leaves, arrays, centers


def _on_host(name: str, array: Any) -> np.ndarray:
    if jax.dtypes.issubdtype(array.dtype, jax.dtypes.extended):
        raise TypeError(
            f"`save(...)`: parameter `{name}` is a random key, {array.dtype}. "
            "Pass keys as inputs, through `jax.random.key_data`."
        )
    return np.asarray(array).astype(_module.spec(array).dtype, copy=False)


def _leaf(path: str, leaf: Any) -> dict[str, Any]:
    size = trees.size(leaf)
    if not trees.is_typed(leaf):
        return _entry(path, "array", leaf, size)
    aval = jax.eval_shape(lambda leaf: leaf.materialise(), leaf)
    fields = dataclasses.fields(leaf) if dataclasses.is_dataclass(leaf) else ()
    settings = {field.name: getattr(leaf, field.name) for field in fields}
    static = {
        name: repr(value)
        for name, value in settings.items()
        if value is not None and not any(map(_module.is_array, jax.tree.leaves(value)))
    }
    return {**_entry(path, type(leaf).__name__, aval, size), "static": static}


def _entry(path: str, kind: str, value: Any, size: trees.Size) -> dict[str, Any]:
    return {
        "path": path,
        "type": kind,
        "shape": list(value.shape),
        "dtype": value.dtype.name,
        **size._asdict(),
    }


def _described(leaf: Mapping[str, Any], entries: Mapping[str, Any]) -> dict[str, Any]:
    return {**leaf, "arrays": [{**entry, **entries[entry["name"]]} for entry in leaf["arrays"]]}


def _total(leaves: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    return {name: sum(leaf[name] for leaf in leaves) for name in trees.Size._fields}


def _values(names: Sequence[str], avals: Sequence[Any]) -> list[dict[str, Any]]:
    """Name, shape and dtype of inputs or outputs; a dimension of any size by its name."""
    return [
        {
            "name": name,
            "shape": [size if isinstance(size, int) else str(size) for size in aval.shape],
            "dtype": aval.dtype.name,
        }
        for name, aval in zip(names, avals, strict=True)
    ]


def _serialize(exported: Any) -> bytes:
    try:
        return bytes(exported.serialize())
    except ImportError as error:
        raise ImportError(
            "An artifact keeps its model with flatbuffers: `pip install 'jopt[run]'`."
        ) from error


def _unique(name: str, taken: Mapping[str, Any]) -> str:
    while name in taken:  # {"a/b": x, "a": {"b": y}} spells one path twice
        name += "'"
    return name


def _version() -> str:
    from jopt import __version__

    return __version__
