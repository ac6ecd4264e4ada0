"""The manifest: what an artifact says of itself, checked before anything in it is believed."""

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

FORMAT = "jopt.artifact"
VERSION = 1
MANIFEST, MODEL, WEIGHTS = "manifest.json", "model.stablehlo", "weights.safetensors"
# What every manifest has besides; `recipe` and `extra` may be anything.
_PARTS = {
    "jopt": str,
    "jax": str,
    "files": dict,
    "platforms": list,
    "inputs": list,
    "outputs": list,
    "sizes": dict,
    "metrics": dict,
    "leaves": list,
}
LIMIT = 64 << 20  # bytes; a manifest takes a few hundred for each array


class ArtifactError(ValueError):
    """An artifact that is missing, damaged, or not one that this version reads."""


def digest(data: bytes) -> str:
    """The SHA-256 of `data`, in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def dump(manifest: Mapping[str, Any]) -> bytes:
    """The manifest as JSON text that carries its own digest, with a line for each leaf."""
    body = plain(manifest)
    body["digest"] = _self_digest(body)
    leaves = ",\n  ".join(json.dumps(leaf, allow_nan=False) for leaf in body.pop("leaves"))
    head = json.dumps(body, indent=1, allow_nan=False).removesuffix("\n}")
    return f'{head},\n "leaves": [\n  {leaves}\n ]\n}}\n'.encode()


def parse(data: bytes, file: str) -> dict[str, Any]:
    """Reads and checks a manifest.

    Args:
      data: the bytes of the file.
      file: its name, for messages.

    Raises:
      ArtifactError: if it is not JSON, of another format or version, altered, or incomplete.
    """
    try:
        manifest = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"`{file}` is not JSON: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ArtifactError(f"`{file}` is not the manifest of an artifact.")
    if manifest.get("version") != VERSION:
        raise ArtifactError(
            f"`{file}` is of format version {manifest.get('version')!r}; "
            f"this jopt reads version {VERSION}. Load it with the jopt that wrote it, "
            f"{manifest.get('jopt')!r}."
        )
    found, expected = manifest.pop("digest", None), _self_digest(manifest)
    if found != expected:
        raise ArtifactError(f"`{file}` was altered: it says digest {found!r}, found {expected!r}.")
    problem = (
        _parts_problem(manifest)
        or _files_problem(manifest["files"])
        or _leaves_problem(manifest["leaves"])
    )
    if problem is not None:
        raise ArtifactError(f"`{file}` is damaged: {problem}.")
    return manifest


def entries(manifest: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Every array's entry by name, in the order of the module's arguments."""
    return {entry["name"]: entry for leaf in manifest["leaves"] for entry in leaf["arrays"]}


def plain(value: Any) -> Any:
    """`value` as JSON holds it: NumPy and JAX scalars as numbers, tuples as lists.

    A number that is not finite becomes the text `"nan"`, `"inf"` or `"-inf"`, since JSON has none.

    Raises:
      TypeError: for anything else.
    """
    match value:
        case Mapping():
            return {str(key): plain(item) for key, item in value.items()}
        case list() | tuple():
            return [plain(item) for item in value]
        case None | bool() | int() | str():
            return value
        case float():
            return float(value) if math.isfinite(value) else str(float(value))
    if hasattr(value, "dtype") and getattr(value, "ndim", None) == 0:
        return plain(np.asarray(value).item())
    raise TypeError(f"A manifest holds numbers, text, lists and dictionaries, not {value!r}.")


def _self_digest(body: Mapping[str, Any]) -> str:
    return digest(json.dumps(body, sort_keys=True, separators=(",", ":")).encode())


def _parts_problem(manifest: Mapping[str, Any]) -> str | None:
    for name, kind in _PARTS.items():
        if not isinstance(manifest.get(name), kind):
            return f"`{name}` is missing or no {kind.__name__}"
    for name in ("parameters", "nonzeros", "bits", "model_bytes", "weights_bytes"):
        if not _count(manifest["sizes"].get(name)):
            return f"`sizes` has no `{name}`"
    for value in (*manifest["inputs"], *manifest["outputs"]):
        if not isinstance(value, dict) or not {"name", "shape", "dtype"} <= set(value):
            return "an input or output has no name, shape or dtype"
        if not isinstance(value["shape"], list):
            return "the shape of an input or output is no list"
    return None


def _files_problem(files: Mapping[str, Any]) -> str | None:
    # Only the two names that an artifact has are ever opened, so no name leads out of its folder.
    if set(files) != {MODEL, WEIGHTS}:
        return f"its files are not `{MODEL}` and `{WEIGHTS}`"
    for name, entry in files.items():
        if not isinstance(entry, dict) or not isinstance(entry.get("sha256"), str):
            return f"`{name}` has no SHA-256"
        if not _count(entry.get("bytes")):
            return f"`{name}` has no size"
    return None


def _leaves_problem(leaves: list[Any]) -> str | None:
    seen: set[str] = set()
    for leaf in leaves:
        if not isinstance(leaf, dict) or not isinstance(leaf.get("arrays"), list):
            return "a leaf has no list of arrays"
        texts = all(isinstance(leaf.get(name), str) for name in ("path", "type", "dtype"))
        counts = all(_count(leaf.get(name)) for name in ("parameters", "nonzeros", "bits"))
        if not texts or not counts or not _shape(leaf.get("shape")):
            return f"leaf {leaf.get('path')!r} is incomplete"
        for entry in leaf["arrays"]:
            name = entry.get("name") if isinstance(entry, dict) else None
            if not isinstance(name, str) or name in seen:
                return f"an array has no name of its own: {name!r}"
            seen.add(name)
            if not _shape(entry.get("shape")):
                return f"array `{name}` has the shape {entry.get('shape')!r}"
            if not isinstance(entry.get("dtype"), str) or not _count(entry.get("bytes")):
                return f"array `{name}` has no dtype or size"
    return None


def _shape(value: Any) -> bool:
    return isinstance(value, list) and len(value) <= 32 and all(map(_count, value))


def _count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63
