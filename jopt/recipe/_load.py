"""From a YAML file to a checked `Recipe`, with errors that name the file, the line and the key."""

import difflib
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import pydantic
import yaml

from jopt.recipe._schema import Recipe

Path = tuple[str | int, ...]
BUILT_IN = (
    pathlib.Path(__file__).parent / "configs",  # installed
    pathlib.Path(__file__).parents[2] / "configs",  # a checkout
)


class RecipeError(ValueError):
    """A recipe that cannot be run; the message names file, line, key and what to do."""


def built_in() -> dict[str, pathlib.Path]:
    """The recipes that come with jopt, by name."""
    folder = next((folder for folder in BUILT_IN if folder.is_dir()), None)
    return {} if folder is None else {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find(name: str) -> pathlib.Path:
    """The file of a recipe: a path, or the name of a built-in one (`digits`).

    Raises:
      RecipeError: if there is no such file and no such built-in recipe.
    """
    path = pathlib.Path(name)
    if path.is_file():
        return path
    known = built_in()
    if path.stem in known and path.suffix in ("", ".yaml") and path.parent.name in ("", "configs"):
        return known[path.stem]
    raise RecipeError(
        f"`{name}` is neither a file nor a built-in recipe; built-in: {', '.join(known) or 'none'}."
    )


def load(path: pathlib.Path | str, overrides: Sequence[str] = ()) -> Recipe:
    """Reads and checks a recipe.

    Args:
      path: the YAML file.
      overrides: `key.path=value` each, the value in YAML; a stage is named by its place or its
        name, as in `stages.teacher.epochs=2`.

    Returns:
      The recipe, every default filled in.

    Raises:
      RecipeError: if the file is no YAML, or anything in it is not as the schema wants it.
    """
    path = pathlib.Path(path)
    text = path.read_text(encoding="utf-8")
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or str(error)
        raise RecipeError(f"{path}{line}: not valid YAML: {problem}") from error
    if not isinstance(data, dict):
        raise RecipeError(
            f"{path}:1: a recipe is a mapping (name, data, stages), found {data!r:.60}"
        )
    try:
        lines = _lines(node)
    except RecipeError as error:
        raise RecipeError(f"{path}: {error}") from None
    except RecursionError:
        raise RecipeError(f"{path}: a block of it contains itself.") from None
    for override in overrides:
        _override(data, lines, override)
    try:
        return Recipe.model_validate(data)
    except pydantic.ValidationError as error:
        raise RecipeError(_explain(path, lines, error)) from error


def _lines(node: yaml.Node | None, path: Path = ()) -> dict[Path, str]:
    """Where each key and item of the document stands, as `:line`."""
    if node is None:
        return {}
    found = {path: f":{node.start_mark.line + 1}"}
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if (*path, key.value) in found:
                raise RecipeError(f"line {key.start_mark.line + 1}: `{key.value}` stands twice.")
            found |= _lines(value, (*path, key.value))
            found[(*path, key.value)] = f":{key.start_mark.line + 1}"
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            found |= _lines(item, (*path, index))
    return found


def _override(data: dict[str, Any], lines: dict[Path, str], override: str) -> None:
    """Writes one `key.path=value` into `data`, and its origin into `lines`."""
    keys, equals, text = override.partition("=")
    if not equals or not keys:
        raise RecipeError(f"`--set {override}`: write it as `key.path=value`.")
    try:
        # A glob such as `**/kernel` is text, though YAML would take `*` for a reference.
        value = text if text.startswith("*") else yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"`--set {override}`: the value is not valid YAML.") from error
    place: Any = data
    path: Path = ()
    *parents, last = keys.split(".")
    for key in parents:
        step = _step(place, key, override)
        path = (*path, step)
        if isinstance(place, dict) and place.get(step) is None:
            place[step] = {}
        place = place[step]
    step = _step(place, last, override)
    place[step] = value
    lines[(*path, step)] = f" (--set {override})"


def _step(place: Any, key: str, override: str) -> str | int:
    if isinstance(place, dict):
        return key
    if not isinstance(place, list):
        raise RecipeError(f"`--set {override}`: `{key}` cannot be set inside {place!r:.40}.")
    if key.lstrip("-").isdigit():
        if -len(place) <= int(key) < len(place):
            return int(key) % len(place)
        raise RecipeError(f"`--set {override}`: no item {key}, there are {len(place)}.")
    names = [_name(item) for item in place]
    if key in names:
        return names.index(key)
    raise RecipeError(
        f"`--set {override}`: nothing is named `{key}` there; "
        f"use a number or one of: {', '.join(name for name in names if name)}."
    )


def _name(item: Any) -> str:
    if not isinstance(item, Mapping):
        return ""
    return str(item.get("name") or item.get("stage") or "")


def _explain(path: pathlib.Path, lines: dict[Path, str], error: pydantic.ValidationError) -> str:
    """One line a mistake: file, line, key, what is wrong."""
    mistakes: list[tuple[Path, str, str]] = []  # place, kind, words
    for mistake in error.errors(include_url=False):
        where, context = _locate(lines, mistake["loc"]), mistake.get("ctx", {})
        words = mistake["msg"].removeprefix("Value error, ")
        match mistake["type"]:
            case "unknown_key":
                for key, hint in context["keys"].items():
                    mistakes.append(((*where, key), "unknown_key", f"unknown key `{key}`; {hint}"))
                continue
            case "missing":
                where = (*where, mistake["loc"][-1])
            case "union_tag_invalid":
                where = (*where, context["discriminator"].strip("'"))
                words = _unknown_kind(context["tag"], context["expected_tags"])
            case "value_error":
                pass
            case "tuple_type":
                words = f"Input should be a list, found {mistake['input']!r:.60}"
            case _:
                words += f", found {mistake['input']!r:.60}"
        mistakes.append((where, mistake["type"], words))
    found = []
    for where, kind, words in mistakes:
        # A block that failed inside also fails as a whole (as another member of a union, as an item
        # missing from its list): only the innermost mistake helps.
        if any(len(other) > len(where) and other[: len(where)] == where for other, *_ in mistakes):
            continue
        own_words = any(other == where and k == "value_error" for other, k, _ in mistakes)
        if own_words and kind != "value_error":
            continue
        dotted = ".".join(str(part) for part in where) or "recipe"
        line = lines.get(where, lines.get(where[:-1], ""))
        found.append(f"{path}{line}: `{dotted}`: {words}")
    return "\n".join(dict.fromkeys(found))


def _unknown_kind(tag: str, expected: str) -> str:
    known = [name.strip(" '") for name in expected.split(",")]
    near = difflib.get_close_matches(tag, known, n=1, cutoff=0.5)
    hint = f"did you mean `{near[0]}`?" if near else ""
    return f"unknown `{tag}`; {hint or 'known: ' + ', '.join(f'`{name}`' for name in known)}"


def _locate(lines: dict[Path, str], location: Sequence[str | int]) -> Path:
    """The part of a pydantic location that stands in the document: union tags do not."""
    where: Path = ()
    for place, part in enumerate(location):
        tag = place == 2 and location[0] == "stages"  # which `distill` and others share with keys
        if not tag and (*where, part) in lines:
            where = (*where, part)
    return where
