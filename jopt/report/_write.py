"""Writing a report: one folder with the numbers, the page and its plots."""

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from . import _cost, _html, _plots
from ._rows import Metric, Row

FORMAT, VERSION = "jopt.report", 1
_POINTS = 500  # of a curve; the log has them all


def write(
    directory: str | os.PathLike[str],
    rows: Sequence[Row],
    *,
    title: str,
    metric: Metric | None = None,
    curves: Mapping[str, _plots.Curve] | None = None,
    sparsity: Mapping[str, float] | None = None,
    skipped: Sequence[tuple[str, str]] = (),
    recipe: Mapping[str, Any] | None = None,
    machine: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Writes `report.json`, `report.html` and the plots as PNG files into `directory`.

    The page is one file that needs no network. Each file appears whole or not at all, the page
    last.

    Args:
      directory: where to; made if it is not there. Files of the same names are replaced.
      rows: one for each stage, the first being what the others are compared with.
      title: of the page.
      metric: what the scores are; accuracy by default.
      curves: stage to its (step, loss) pairs, in the order of training; long ones are averaged.
      sparsity: path of a layer to its share of zeros.
      skipped: what was asked for and not done, and why.
      recipe: how the models were made, as JSON holds it.
      machine: where it ran; `machine()` by default.

    Returns:
      What `report.json` holds.

    Raises:
      ValueError: if there are no rows.
      ImportError: if matplotlib is missing.
      OSError: if a file cannot be written, for instance because the disk is full.
    """
    if not rows:
        raise ValueError("`report.write` has no rows: there is nothing to report.")
    metric = metric or Metric()
    machine = _cost.machine() if machine is None else machine
    curves = {name: _thinned(curve) for name, curve in (curves or {}).items()}
    pictures = _pictures(rows, metric, curves, sparsity or {})
    undone = [{"what": what, "why": why} for what, why in skipped]
    content = _plain(
        {
            "format": FORMAT,
            "version": VERSION,
            "jopt": _version(),
            "title": title,
            "lead": lead(rows, metric),
            "metric": vars(metric),
            "rows": [vars(row) for row in rows],
            "curves": curves,
            "sparsity": sparsity or {},
            "skipped": undone,
            "recipe": recipe,
            "machine": machine,
            "plots": [f"{name}.png" for name in pictures],
        }
    )
    page = _html.page(
        title=title,
        lead=content["lead"],
        rows=rows,
        metric=metric,
        pictures=list(pictures.values()),
        skipped=undone,
        recipe=content["recipe"],
        machine=machine,
        version=_version(),
    )
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    for name, picture in pictures.items():
        _replace(folder / f"{name}.png", picture.light)
    text = json.dumps(content, indent=1, allow_nan=False)
    # Pairs of a curve in one line each.
    text = re.sub(r"\[\s+([^\s\[\]{}\"]+),\s+([^\s\[\]{}\"]+)\s+\]", r"[\1, \2]", text)
    _replace(folder / "report.json", f"{text}\n".encode())
    _replace(folder / "report.html", page.encode())
    return content


def lead(rows: Sequence[Row], metric: Metric) -> str:
    """The report in one or two sentences, from the first row to the last.

    Example:
      >>> dense = Row(name="dense", score=0.99, parameters=9, nonzeros=9, bytes=400)
      >>> small = Row(name="small", score=0.98, parameters=9, nonzeros=3, bytes=10)
      >>> lead([dense, small], Metric())
      'From `dense` to `small`: 40 times smaller, accuracy 99.00% → 98.00% (−1.00 points).'
    """
    first, last = rows[0], rows[-1]
    if len(rows) == 1:
        return f"`{first.name}`: {metric.name} {metric.spell(first.score)}, {first.bytes:,} bytes."
    said = []
    if first.bytes and last.bytes:
        smaller = first.bytes / last.bytes
        ratio = smaller if smaller >= 1 else 1 / smaller
        said.append(f"{ratio:.3g} times {'smaller' if smaller >= 1 else 'larger'}")
    if first.score is not None and last.score is not None:
        said.append(
            f"{metric.name} {metric.spell(first.score)} → {metric.spell(last.score)} "
            f"({metric.difference(last.score, first.score)})"
        )
    if last.latency is not None and last.latency > 0:
        faster = last.latency <= 1
        ratio = 1 / last.latency if faster else last.latency
        said.append(f"{ratio:.2f} times {'faster' if faster else 'slower'} per call")
    return f"From `{first.name}` to `{last.name}`: {', '.join(said)}."


def _pictures(
    rows: Sequence[Row],
    metric: Metric,
    curves: Mapping[str, _plots.Curve],
    sparsity: Mapping[str, float],
) -> dict[str, _html.Picture]:
    """The plots for which there is something to show, by file name."""
    styles = (_plots.LIGHT, _plots.DARK)
    found = {}
    if len(_plots.placeable(rows)) > 1:
        better = "up" if metric.higher else "down"
        found["tradeoff"] = _html.Picture(
            f"{metric.name.capitalize()} against size",
            f"Each point is a stage; further {better} and further left is better.",
            *(_plots.tradeoff(rows, metric, style) for style in styles),
        )
    if any(curves.values()):
        found["losses"] = _html.Picture(
            "Loss while training",
            "The stages one after another. What each of them minimizes may differ.",
            *(_plots.losses(curves, style) for style in styles),
        )
    if sparsity:
        found["sparsity"] = _html.Picture(
            "Zeros in each layer",
            "The share of weights pruned to zero.",
            *(_plots.sparsity(sparsity, style) for style in styles),
        )
    return found


def _thinned(curve: _plots.Curve) -> _plots.Curve:
    """A curve in at most `_POINTS` points: means over as many steps each, at the last of them."""
    pairs = [(float(step), float(value)) for step, value in curve]
    each = -(-len(pairs) // _POINTS)
    pieces = [pairs[start : start + each] for start in range(0, len(pairs), each or 1)]
    return [(piece[-1][0], sum(value for _, value in piece) / len(piece)) for piece in pieces]


def _plain(value: Any) -> Any:
    """`value` as JSON holds it; a number that is not finite becomes text."""
    match value:
        case Mapping():
            return {str(key): _plain(item) for key, item in value.items()}
        case list() | tuple():
            return [_plain(item) for item in value]
        case None | bool() | int() | str():
            return value
        case float():
            return float(value) if math.isfinite(value) else str(float(value))
    array = np.asarray(value)
    if array.dtype == object:
        raise TypeError(f"A report holds numbers, text, lists and dictionaries, not {value!r}.")
    return _plain(array.tolist())


def _replace(path: Path, data: bytes) -> None:
    """Writes a file so that whoever reads it finds the old one or the new one."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        reason = error.strerror or error
        raise OSError(error.errno, f"could not write the report's `{path}`: {reason}") from error


def _version() -> str:
    from jopt import __version__

    return __version__
