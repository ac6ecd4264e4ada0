"""The page and its files: whole, escaped, without a network, and right in every corner case."""

import base64
import errno
import html.parser
import json
import os
import re
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jopt import report
from jopt.report import _plots, _write

pytest.importorskip("matplotlib")

EVIL = "<script>alert('x')</script> & \"quotes\" $a_b$ `code`"
MACHINE = {"processor": "Test", "cores": "2"}


def row(name: str, score: float | None = 0.9, size: int = 1000, **others: Any) -> report.Row:
    return report.Row(name=name, score=score, parameters=10, nonzeros=5, bytes=size, **others)


def everything(directory: Path, text: str = "text") -> dict[str, Any]:
    return report.write(
        directory,
        [row(text, notes=(text,)), row("small", 0.8, 10)],
        title=text,
        curves={text: [(step, 1.0 / step) for step in range(1, 40)], "two": [(1, 0.5)]},
        sparsity={text: 0.9, "params/Dense_0/kernel": 0.5},
        skipped=[(text, text)],
        recipe={text: text},
        machine={text: text},
    )


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One report for the tests that only read."""
    directory = tmp_path_factory.mktemp("deep") / "down" / "report"
    everything(directory)
    return directory


class Page(html.parser.HTMLParser):
    """The tags, attributes and text of a page; the tags must close in order."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text: list[str] = []
        self.open: list[str] = []
        self.feed(source)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in ("meta", "img", "source"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text.append(data)


def test_all_files_are_there_and_nothing_else(written: Path) -> None:
    names = ["losses.png", "report.html", "report.json", "sparsity.png", "tradeoff.png"]
    assert sorted(os.listdir(written)) == names
    content = json.loads((written / "report.json").read_text())
    assert content["plots"] == ["tradeoff.png", "losses.png", "sparsity.png"]


def test_the_json_has_a_schema_and_the_numbers(tmp_path: Path) -> None:
    content = everything(tmp_path)
    found = json.loads((tmp_path / "report.json").read_text())
    assert found == content
    assert found["format"] == "jopt.report" and found["version"] == 1
    assert found["rows"][0] == {
        **{"name": "text", "score": 0.9, "parameters": 10, "nonzeros": 5, "bytes": 1000},
        **{"flops": None, "latency": None, "memory": None, "notes": ["text"]},
    }
    assert found["metric"] == {"name": "accuracy", "percent": True, "higher": True}
    assert found["curves"]["text"][1] == [2, 0.5]
    assert found["skipped"] == [{"what": "text", "why": "text"}]


def test_numbers_of_other_kinds_are_plain_in_the_json(tmp_path: Path) -> None:
    rows = [row("a", float("nan"), latency=np.float32(0.5).item()), row("b", float("inf"))]
    recipe = {"rate": np.float32(0.5), "widths": (np.int64(3), 4), "none": None}
    content = report.write(tmp_path, rows[:1], title="t", recipe=recipe, machine=MACHINE)
    assert content["recipe"] == {"rate": 0.5, "widths": [3, 4], "none": None}
    assert json.loads((tmp_path / "report.json").read_text())["rows"][0]["score"] == "nan"
    with pytest.raises(TypeError, match="numbers, text, lists and dictionaries"):
        report.write(tmp_path, rows, title="t", recipe={"x": object()}, machine=MACHINE)


def test_the_page_needs_no_network(written: Path) -> None:
    page = Page((written / "report.html").read_text())
    assert not {"script", "link", "iframe", "object", "embed", "base"} & set(page.tags)
    for name, value in page.attributes:
        if name in ("src", "srcset", "href"):
            assert (value or "").startswith("data:image/png;base64,")
    source = (written / "report.html").read_text()
    assert not re.search(r"https?:|//[a-z]|url\(|@import", re.sub(r"base64,[^\"]*", "", source))


def test_the_page_shows_what_it_was_given(written: Path) -> None:
    page = Page((written / "report.html").read_text())
    text = " ".join(page.text)
    assert page.tags.count("table") == 1 and page.tags.count("img") == 3
    for words in ("Stages", "Asked for and not done", "Recipe", "Machine", "90.00%", "100×"):
        assert words in text
    assert ("name", "viewport") in page.attributes
    assert ("media", "(prefers-color-scheme: dark)") in page.attributes


def test_the_pictures_in_the_page_are_the_files(written: Path) -> None:
    source = (written / "report.html").read_text()
    for name in ("losses", "sparsity", "tradeoff"):
        data = (written / f"{name}.png").read_bytes()
        assert base64.b64encode(data).decode() in source
        assert picture_size(data)[0] > 1000


def test_every_text_is_escaped(tmp_path: Path) -> None:
    everything(tmp_path, EVIL)
    page = Page((tmp_path / "report.html").read_text())
    assert "script" not in page.tags
    text = "".join(page.text)
    shown = EVIL.replace("`", "")
    # Title, heading, lead, cell, note, undone (twice), recipe, machine.
    assert text.count("<script>alert('x')</script>") >= 9
    assert shown in text and "code" in page.tags


def test_the_same_report_is_the_same_files(written: Path, tmp_path: Path) -> None:
    everything(tmp_path)
    for name in os.listdir(written):
        assert (tmp_path / name).read_bytes() == (written / name).read_bytes()


def test_an_old_report_is_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(name: str) -> None:
        report.write(tmp_path, [row(name)], title=name, machine=MACHINE)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    write("old")
    before = (tmp_path / "report.html").read_bytes()
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left") as caught:
        patch.setattr(os, "fsync", full)
        write("new")
    assert caught.value.errno == errno.ENOSPC
    assert (tmp_path / "report.html").read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["report.html", "report.json"]
    write("new")
    assert b"new" in (tmp_path / "report.html").read_bytes()


def test_without_plots_there_are_none(tmp_path: Path) -> None:
    content = report.write(tmp_path, [row("only")], title="t", machine=MACHINE)
    assert content["plots"] == []
    assert sorted(os.listdir(tmp_path)) == ["report.html", "report.json"]
    assert "Plots" not in (tmp_path / "report.html").read_text()
    assert content["lead"] == "`only`: accuracy 90.00%, 1,000 bytes."


def test_no_rows_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no rows"):
        report.write(tmp_path, [], title="t")


def test_missing_matplotlib_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"^Plots need matplotlib: `pip install 'jopt\[run\]'`.$"):
        everything(tmp_path)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("last", "words"),
    [
        (row("b", 0.8, 10), "100 times smaller, accuracy 90.00% → 80.00% (−10.00 points)."),
        (row("b", None, 2000), "2 times larger."),
        (row("b", None, 1000, latency=0.25), "1 times smaller, 4.00 times faster per call."),
        (row("b", None, 1000, latency=3.0), "1 times smaller, 3.00 times slower per call."),
    ],
)
def test_the_lead_tells_the_whole_way(last: report.Row, words: str) -> None:
    assert _write.lead([row("a"), row("x"), last], report.Metric()) == f"From `a` to `b`: {words}"


def test_long_curves_are_averaged() -> None:
    curve = [(step, float(step % 2)) for step in range(1, 10_001)]
    thin = _write._thinned(curve)
    assert len(thin) == 500 and thin[-1] == (10_000, 0.5) and thin[0] == (20, 0.5)
    assert _write._thinned(curve[:3]) == curve[:3] and _write._thinned([]) == []


def test_the_average_of_a_curve_is_unbiased() -> None:
    assert _plots._smooth([3.0] * 100) == pytest.approx([3.0] * 100)
    assert _plots._smooth([1.0, 2.0]) == [1.0, 2.0]


@pytest.mark.parametrize(
    "curves",
    [
        {"a": []},
        {"a": [(1, 0.5)]},
        {"a": [(1, 0.0), (2, -1.0)]},
        {"a": [(1, float("nan")), (2, float("inf")), (3, 1.0)]},
        {f"stage {at}": [(1, 1.0), (2, 0.5)] for at in range(12)},
        {"_hidden": [(step, 1e-9) for step in range(100)], "$": [(1, 1e9)]},
    ],
)
@pytest.mark.parametrize("style", [_plots.LIGHT, _plots.DARK])
def test_any_curves_are_drawn(curves: dict[str, Any], style: _plots.Style) -> None:
    width, height = picture_size(report.losses(curves, style))
    assert width == 1240 and height == 640


@pytest.mark.parametrize("count", [1, 7, 200])
def test_any_number_of_layers_is_drawn(count: int) -> None:
    layers = {
        f"params/a_very_long_name_{at}/that_goes_on_and_on/kernel": 0.5 for at in range(count)
    }
    _, height = picture_size(report.sparsity(layers))
    assert height == pytest.approx(200 * (0.8 + 0.26 * min(count, 60)), abs=2)


@pytest.mark.parametrize(
    "rows",
    [
        [row("a"), row("b")],
        [row("a", 0.0, 1), row("b", 0.0, 10**12)],
        [row(f"stage {at}", 0.9 + at / 1e4, 1000 + at) for at in range(9)],
        [row("none", None), row("empty", 0.5, 0)],
        [row("$x", -3.0), row("_y", 1e9, 5)],
    ],
)
def test_any_rows_are_drawn(rows: list[report.Row]) -> None:
    assert picture_size(report.tradeoff(rows, report.Metric())) == (1240, 660)


def test_dark_and_light_differ_in_their_ground() -> None:
    light, dark = (report.losses({"a": [(1, 1.0)]}, style) for style in (_plots.LIGHT, _plots.DARK))
    assert light != dark


def picture_size(png: bytes) -> tuple[int, int]:
    """Width and height from the head of a PNG file."""
    assert png[:8] == b"\x89PNG\r\n\x1a\n" and png[12:16] == b"IHDR"
    width, height = struct.unpack(">II", png[16:24])
    return width, height
