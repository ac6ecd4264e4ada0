"""The report as one HTML page that needs no network: style, pictures and all inside."""

import base64
import html
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ._rows import Metric, Row, columns


class Picture(NamedTuple):
    """A plot on light and on dark ground."""

    title: str
    words: str  # what it shows, for those who cannot see it as well
    light: bytes
    dark: bytes


_STYLE = """
:root { color-scheme: light dark; --ground: #f6f8fa; --card: #ffffff; --text: #1f2933;
  --soft: #5b6673; --line: #e3e8ee; --accent: #4269d0; --warn: #a15c00; }
@media (prefers-color-scheme: dark) { :root { --ground: #0f1319; --card: #171b22;
  --text: #d7dde5; --soft: #93a0ae; --line: #2c333d; --accent: #8fabf5; --warn: #e3a548; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--text);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 2rem 1rem 3rem; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .4rem; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 0 0 .8rem; }
.lead { font-size: 1.05rem; margin: 0 0 1.6rem; overflow-wrap: anywhere; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: 1.1rem 1.2rem; margin: 0 0 1.1rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .45rem .7rem; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-weight: 600; font-size: .86rem; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
th:last-child, td:last-child { padding-right: 0; }
tbody tr:last-child td { border-bottom: 0; }
td:first-child { font-weight: 600; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem; margin: 0; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
ul { margin: 0; padding-left: 1.2rem; overflow-wrap: anywhere; }
.notes { margin-top: 1rem; }
code { font: .88em ui-monospace, Menlo, Consolas, monospace; }
figure { margin: 0; } figure + figure { margin-top: 1.6rem; }
figcaption { margin-bottom: .5rem; } figcaption b { display: block; }
figcaption span { color: var(--soft); font-size: .92rem; }
img { display: block; width: 100%; height: auto; border-radius: 6px; }
details { margin-top: 1rem; } summary { cursor: pointer; color: var(--soft); font-size: .92rem; }
details[open] summary { margin-bottom: .6rem; }
pre { margin: 0; overflow-x: auto; font: .84rem/1.5 ui-monospace, Menlo, Consolas, monospace; }
.undone h2 { color: var(--warn); } footer { color: var(--soft); font-size: .88rem; }
@media (max-width: 34rem) { img { min-width: 28rem; } main { padding: 1.2rem .6rem 2rem; } section {
padding: .9rem .8rem; }
  h1 { font-size: 1.35rem; } dl { grid-template-columns: 1fr; gap: 0; } dd { margin-bottom: .5rem; }
  }
@media print { body { background: none; } section { break-inside: avoid; } }
"""


def page(
    *,
    title: str,
    lead: str,
    rows: Sequence[Row],
    metric: Metric,
    pictures: Sequence[Picture],
    skipped: Sequence[Mapping[str, str]],
    recipe: Mapping[str, Any] | None,
    machine: Mapping[str, str],
    version: str,
) -> str:
    """The whole page. Every text is escaped, so none can be more than text."""
    sections = [
        _section("Stages", _table(rows, metric) + _notes(rows)),
        _section("Plots", "".join(map(_figure, pictures))) if pictures else "",
        _section("Asked for and not done", _undone(skipped), "undone") if skipped else "",
        _section("Recipe", _recipe(recipe)) if recipe is not None else "",
        _section("Machine", _definitions(machine)),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_text(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        f'<h1>{_text(title)}</h1>\n<p class="lead">{_prose(lead)}</p>\n'
        + "\n".join(filter(None, sections))
        + f"\n<footer>Made by jopt {_text(version)}.</footer>\n</main>\n</body>\n</html>\n"
    )


def _section(title: str, body: str, kind: str = "") -> str:
    mark = f' class="{kind}"' if kind else ""
    return f"<section{mark}>\n<h2>{_text(title)}</h2>\n{body}\n</section>"


def _table(rows: Sequence[Row], metric: Metric) -> str:
    shown = columns(rows, metric)
    head = "".join(
        f'<th scope="col" title="{_text(column.meaning)}">{_text(column.title)}</th>'
        for column in shown
    )
    body = "\n".join(
        "<tr>" + "".join(f"<td>{_text(column.cell(row))}</td>" for column in shown) + "</tr>"
        for row in rows
    )
    meanings = _definitions({column.title: column.meaning for column in shown})
    return (
        f'<div class="scroll"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n'
        f"</table></div>\n<details><summary>What the columns mean</summary>{meanings}</details>"
    )


def _notes(rows: Sequence[Row]) -> str:
    notes = [(row.name, note) for row in rows for note in row.notes]
    items = "".join(f"<li><b>{_text(name)}</b>: {_prose(note)}</li>" for name, note in notes)
    return f'\n<ul class="notes">{items}</ul>' if notes else ""


def _figure(picture: Picture) -> str:
    return (
        f"<figure><figcaption><b>{_text(picture.title)}</b>"
        f'<span>{_text(picture.words)}</span></figcaption><div class="scroll"><picture>'
        f'<source media="(prefers-color-scheme: dark)" srcset="{_data(picture.dark)}">'
        f'<img src="{_data(picture.light)}" alt="{_text(picture.title)}: {_text(picture.words)}">'
        "</picture></div></figure>\n"
    )


def _undone(skipped: Sequence[Mapping[str, str]]) -> str:
    items = [f"<li><b>{_prose(one['what'])}</b>: {_prose(one['why'])}</li>" for one in skipped]
    return f"<ul>{''.join(items)}</ul>"


def _recipe(recipe: Mapping[str, Any]) -> str:
    text = json.dumps(recipe, indent=2, ensure_ascii=False)
    return (
        "<details><summary>Everything that makes the run what it is</summary>"
        f"<pre>{_text(text)}</pre></details>"
    )


def _definitions(pairs: Mapping[str, str]) -> str:
    items = [f"<dt>{_text(name)}</dt><dd>{_text(value)}</dd>" for name, value in pairs.items()]
    return f"<dl>{''.join(items)}</dl>"


def _prose(text: Any) -> str:
    """Text in which what stands in backticks is code."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", _text(text))


def _data(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _text(value: Any) -> str:
    return html.escape(str(value), quote=True)
