"""Reading an artifact: everything in it is checked before it is believed."""

import dataclasses
import functools
import os
import stat
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from . import _folder, _manifest, _module, _weights
from ._manifest import ArtifactError


@dataclasses.dataclass(frozen=True, eq=False)
class Artifact:
    """A model read from a folder; `artifact(*inputs)` runs it."""

    manifest: dict[str, Any]  # what the folder says of itself
    arrays: dict[str, np.ndarray]  # every weight by name, in the order of the module's arguments
    exported: export.Exported  # the module, a function of the list of arrays and the inputs

    def __call__(self, *inputs: Any) -> Any:
        """Runs the model, compiled once for each batch size.

        Raises:
          TypeError: if the inputs are not as many, nested, or of the dtypes that the model takes.
          ValueError: if a shape is not one that the model takes.
        """
        inputs = jax.tree.map(jnp.asarray, inputs)
        self._check(inputs)
        return self._run(self._on_device, *inputs)

    def describe(self) -> str:
        """The artifact as text: what it takes, gives and weighs, and each parameter."""
        manifest, sizes = self.manifest, self.manifest["sizes"]
        head = [
            f"saved by jopt {manifest['jopt']} with jax {manifest['jax']}",
            f"runs on  {', '.join(map(str, manifest['platforms']))}",
            f"inputs   {_signature(manifest['inputs'])}",
            f"outputs  {_signature(manifest['outputs'])}",
            f"weights  {sizes['weights_bytes']:,} bytes for {sizes['parameters']:,} parameters, "
            f"{sizes['nonzeros']:,} of them not zero; module {sizes['model_bytes']:,} bytes",
        ]
        head += [f"{name}  {_number(value)}" for name, value in manifest["metrics"].items()]
        rows = [("parameter", "shape", "as", "zeros", "bytes")]
        for leaf in manifest["leaves"]:
            count = leaf["parameters"]
            zeros = f"{1 - leaf['nonzeros'] / count:.1%}" if count else "-"
            size = sum(entry["bytes"] for entry in leaf["arrays"])
            kind = leaf["dtype"] if leaf["type"] == "array" else leaf["type"]
            rows.append((leaf["path"], str(tuple(leaf["shape"])), kind, zeros, f"{size:,}"))
        return "\n".join(map(_printable, [*head, "", *_columns(rows)]))

    @functools.cached_property
    def _on_device(self) -> list[jax.Array]:
        # Kept, so they must be arrays even if the first call is traced.
        with jax.ensure_compile_time_eval():
            return [jnp.asarray(array) for array in self.arrays.values()]

    @functools.cached_property
    def _run(self) -> Callable[..., Any]:
        return jax.jit(self.exported.call)

    def _check(self, inputs: tuple[Any, ...]) -> None:
        expected = self.exported.in_tree
        found = jax.tree.structure(((list(self.arrays.values()), *inputs), {}))
        if found != expected:
            takes = _signature(self.manifest["inputs"])
            raise TypeError(f"`artifact(...)` takes {takes}; found {_found(inputs)}.")
        sizes: dict[str, int] = {}
        avals = self.exported.in_avals[len(self.arrays) :]
        names = _module.input_names(self.exported)
        for name, aval, value in zip(names, avals, jax.tree.leaves(inputs), strict=True):
            spelled = (
                f"input {name} is {value.dtype.name}{list(value.shape)}; expected {_spell(aval)}"
            )
            if value.dtype != aval.dtype:
                raise TypeError(f"`artifact(...)`: {spelled}.")
            if not _fits(value.shape, aval.shape, sizes):
                held = "".join(f", with {name} = {size}" for name, size in sizes.items())
                raise ValueError(f"`artifact(...)`: {spelled}{held}.")


def load(path: str | os.PathLike[str], *, allow: Collection[str] = ()) -> Artifact:
    """Reads the artifact in the folder `path`, checks it, and gives the model to run.

    Sizes and hashes of the files are compared with the manifest, and what each array claims to be
    with its bytes and with the module's arguments. Nothing in the folder is executed but the
    module, by XLA, and a module that calls out of XLA, as into Python, is refused. Hashes tell
    damage, not malice: jaxlib's own reader of modules is not hardened, and a module crafted to
    confuse it can crash the process, so read a stranger's artifact in a sandbox.

    Args:
      path: the folder that `save` made.
      allow: names of custom calls to accept in a module from a trusted source, such as Pallas
        kernels.

    Returns:
      The model; `.manifest` and `.arrays` are what it was read from.

    Raises:
      ArtifactError: if anything is missing, damaged, altered or refused. The message names the
        file.
      ImportError: if safetensors or flatbuffers is missing.
    """
    folder = _folder.current(Path(path).resolve())
    if not folder.is_dir():
        raise ArtifactError(f"`{path}` is not a folder, so it is no artifact.")
    manifest = _manifest.parse(_bytes(folder, _manifest.MANIFEST, None), _manifest.MANIFEST)
    model, weights = (
        _bytes(folder, name, manifest["files"][name])
        for name in (_manifest.MODEL, _manifest.WEIGHTS)
    )
    entries = _manifest.entries(manifest)
    try:
        arrays = _weights.read(weights, entries)
    except ValueError as error:
        raise ArtifactError(f"`{_manifest.WEIGHTS}` is damaged: {error}.") from error
    try:
        exported = _module.read(model, allow)
    except ValueError as error:
        raise ArtifactError(f"`{_manifest.MODEL}` is refused: {error}.") from error
    _agree(exported, arrays)
    return Artifact(manifest, arrays, exported)


def _bytes(folder: Path, name: str, expected: Mapping[str, Any] | None) -> bytes:
    """A file's bytes, if they are those that the manifest expects."""
    file = folder / name
    try:
        found = file.stat()
        limit = _manifest.LIMIT if expected is None else expected["bytes"]
        # A pipe would be waited for, and a device may have no end.
        if not stat.S_ISREG(found.st_mode):
            raise ArtifactError(f"`{name}` in `{folder}` is not a regular file.")
        if found.st_size > limit or (expected is not None and found.st_size != limit):
            raise ArtifactError(
                f"`{name}` in `{folder}` has {found.st_size} bytes, expected {limit}: "
                "it is cut short or altered."
            )
        data = file.read_bytes()
    except FileNotFoundError as error:
        raise ArtifactError(f"`{name}` is missing from `{folder}`.") from error
    if expected is not None and (sha256 := _manifest.digest(data)) != expected["sha256"]:
        raise ArtifactError(
            f"`{name}` in `{folder}` has the SHA-256 {sha256}, expected {expected['sha256']}: "
            "it is damaged or altered."
        )
    return data


def _agree(exported: export.Exported, arrays: Mapping[str, np.ndarray]) -> None:
    """The module takes exactly these arrays, and inputs after them."""
    args = exported.in_tree.children()[0].children() if exported.in_tree.num_nodes > 2 else []
    expected = jax.tree.structure(list(arrays.values()))
    if not args or args[0] != expected:
        raise ArtifactError(f"`{_manifest.MODEL}` does not take {len(arrays)} arrays.")
    for (name, array), aval in zip(arrays.items(), exported.in_avals, strict=False):
        if array.shape != aval.shape or array.dtype != aval.dtype:
            raise ArtifactError(
                f"`{_manifest.MODEL}` takes {_spell(aval)} for `{name}`, "
                f"`{_manifest.WEIGHTS}` holds {_spell(array)}."
            )


def _fits(shape: Sequence[int], expected: Sequence[Any], sizes: dict[str, int]) -> bool:
    """Whether a shape is as expected; dimensions of any size are entered in `sizes` by name."""
    if len(shape) != len(expected):
        return False
    for found, size in zip(shape, expected, strict=True):
        wanted = size if isinstance(size, int) else sizes.setdefault(str(size), found)
        if found != wanted or (found < 1 and not isinstance(size, int)):
            return False
    return True


def _spell(value: Any) -> str:
    return f"{value.dtype.name}[{', '.join(str(size) for size in value.shape)}]"


def _found(inputs: tuple[Any, ...]) -> str:
    spelled = jax.tree.map(_spell, inputs)
    return f"{len(inputs)} inputs, {spelled}" if len(inputs) != 1 else f"{spelled[0]}"


def _number(value: Any) -> Any:
    """The digits of a float that a reader needs."""
    return f"{value:.6g}" if isinstance(value, float) else value


def _signature(values: Sequence[Mapping[str, Any]]) -> str:
    spelled = [
        f"{value['name']}: {value['dtype']}[{', '.join(map(str, value['shape']))}]".removeprefix(
            ": "
        )
        for value in values
    ]
    return ", ".join(spelled) or "nothing"


def _printable(line: str) -> str:
    """Without control characters, with which a stranger's names could rewrite a terminal."""
    return "".join(
        letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in line
    )


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if place > 2 else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
