"""The table says what the rows say, in Markdown and in a terminal of 80 letters."""

import sys

import pytest

from jopt import report
from jopt.report import _rows

DENSE = report.Row(
    name="dense",
    score=0.98888,
    parameters=188_554,
    nonzeros=188_554,
    bytes=755_312,
    flops=3_214_848,
    latency=1.0,
    memory=2_000_000,
)
SMALL = report.Row(
    name="small|er",
    score=0.98055,
    parameters=58_954,
    nonzeros=6_290,
    bytes=9_312,
    flops=1_004_032,
    latency=0.527,
)


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.replace("\\|", "¦").strip("|").split("|")]


def test_markdown_holds_every_value() -> None:
    head, rule, dense, small = report.table([DENSE, SMALL]).splitlines()
    assert cells(head) == [
        *("stage", "accuracy", "parameters", "nonzeros", "bytes", "smaller", "FLOPs", "time"),
        "memory",
    ]
    assert set(rule) == set("|:-")
    assert cells(dense)[1:] == [
        *("98.89%", "188,554", "188,554 (100%)", "755,312", "1.00×", "3.21 M", "1.00×"),
        "2.00 MB",
    ]
    assert cells(small) == [
        *("small¦er", "98.06%", "58,954", "6,290 (11%)", "9,312", "81.1×", "1.00 M", "0.53×"),
        "–",
    ]
    assert len({len(line) for line in (head, rule, dense, small)}) == 1


def test_columns_without_a_value_are_left_out() -> None:
    row = report.Row(name="a", score=None, parameters=0, nonzeros=0, bytes=0)
    head, _, line = report.table([row]).splitlines()
    assert cells(head) == ["stage", "parameters", "nonzeros", "bytes", "smaller"]
    assert cells(line) == ["a", "0", "0", "0", "–"]
    assert cells(report.table([]).splitlines()[0])[0] == "stage"


def test_another_metric_has_its_name_and_unit() -> None:
    metric = report.Metric(name="perplexity", percent=False, higher=False)
    text = report.table([DENSE], metric=metric)
    assert "perplexity" in text and "0.9889" in text and "%" not in text.replace("(100%)", "")
    assert metric.difference(3.5, 3.25) == "+0.25"
    assert report.Metric().difference(0.9, 0.91) == "−1.00 points"
    meaning = {column.title: column.meaning for column in _rows.columns([DENSE], metric)}
    assert "less is better" in meaning["perplexity"]


def test_the_terminal_table_fits_80_letters_and_takes_names_as_they_are() -> None:
    console = pytest.importorskip("rich.console").Console(width=80)
    row = report.Row(name="[red]x[/]", score=0.1, parameters=99, nonzeros=9, bytes=10**9)
    with console.capture() as capture:
        console.print(report.rich_table([DENSE, SMALL, row]))
    text = capture.get()
    assert "…" not in text and "[red]x[/]" in text
    for value in ("98.89%", "188,554", "1.00 GB", "81.1×", "0.53×", "3.21 M"):
        assert value in text


def test_missing_rich_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rich.table", None)
    with pytest.raises(ImportError, match=r"need rich: `pip install 'jopt\[run\]'`"):
        report.rich_table([DENSE])


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (9_994, "9.99 kB"),
        (9_996, "10.0 kB"),
        (99_960, "100 kB"),
        (999_499, "999 kB"),
        (999_500, "1.00 MB"),
        (5e20, "500 EB"),
    ],
)
def test_sizes_have_three_digits(number: float, text: str) -> None:
    assert _rows.size(number) == text
