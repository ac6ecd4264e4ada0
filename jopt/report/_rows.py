"""The rows of a report, and their table as Markdown and for the terminal."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import rich.table


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """What one stage made; what was not measured is None, and left out where no row has it."""

    name: str  # of the stage
    score: float | None  # on the test set, in the unit of the report's `Metric`
    parameters: int  # values, pruned or not
    nonzeros: int  # values that are not zero
    bytes: int  # of the weights file
    flops: int | None = None  # for one example, pruned or not: what dense hardware does
    latency: float | None = None  # time for one call, the first row's being 1
    memory: int | None = None  # bytes of temporaries of one call
    notes: tuple[str, ...] = ()  # in plain words


@dataclasses.dataclass(frozen=True, kw_only=True)
class Metric:
    """What `Row.score` is."""

    name: str = "accuracy"
    percent: bool = True  # shown as a percentage, and differences in points
    higher: bool = True  # whether more is better

    def spell(self, score: float | None) -> str:
        """A score as text."""
        if score is None:
            return "–"
        return f"{score:.2%}" if self.percent else f"{score:.4g}"

    def difference(self, score: float, base: float) -> str:
        """How much a score is off another, as text."""
        text = f"{(score - base) * 100:+.2f} points" if self.percent else f"{score - base:+.4g}"
        return text.replace("-", "\N{MINUS SIGN}", 1)


class Column(NamedTuple):
    """One column of the table."""

    title: str
    cell: Callable[[Row], str]
    meaning: str  # for those who meet it for the first time


def columns(rows: Sequence[Row], metric: Metric, *, brief: bool = False) -> list[Column]:
    """The columns for which some row has a value; `brief` are those that fit a terminal."""
    first = rows[0] if rows else None
    found = [Column("stage", lambda row: row.name, "the step of the recipe that made this model")]
    if any(row.score is not None for row in rows):
        better = "more" if metric.higher else "less"
        spell = lambda row: metric.spell(row.score)  # noqa: E731
        found.append(Column(metric.name, spell, f"on the test data; {better} is better"))
    found += [
        Column("parameters", lambda row: count(row.parameters), "numbers that the model has"),
        Column(
            "nonzeros",
            (lambda row: count(row.nonzeros)) if brief else _nonzeros,
            "parameters that were not pruned to zero",
        ),
        Column(
            "bytes",
            lambda row: size(row.bytes) if brief and row.bytes >= 10_000_000 else f"{row.bytes:,}",
            "size of the weights file",
        ),
        Column("smaller", lambda row: _ratio(first, row), "how many times, than the first row"),
    ]
    if any(row.flops is not None for row in rows):
        cell = lambda row: "–" if row.flops is None else count(row.flops)  # noqa: E731
        found.append(Column("FLOPs", cell, "additions and multiplications for one example"))
    if any(row.latency is not None for row in rows):
        cell = lambda row: "–" if row.latency is None else f"{row.latency:.2f}×"  # noqa: E731
        found.append(Column("time", cell, "of one call, against the first row; below 1 is faster"))
    if not brief and any(row.memory is not None for row in rows):
        cell = lambda row: "–" if row.memory is None else size(row.memory)  # noqa: E731
        found.append(Column("memory", cell, "for intermediate values of one call"))
    return found


def table(rows: Sequence[Row], *, metric: Metric | None = None) -> str:
    """The rows as a Markdown table, aligned so that it reads as plain text too.

    Example:
      >>> print(table([Row(name="dense", score=0.5, parameters=10, nonzeros=10, bytes=40)]))
      | stage | accuracy | parameters | nonzeros  | bytes | smaller |
      |:------|---------:|-----------:|----------:|------:|--------:|
      | dense |   50.00% |         10 | 10 (100%) |    40 |   1.00× |
    """
    shown = columns(rows, metric or Metric())
    cells = [[column.title for column in shown]]
    cells += [[_inline(column.cell(row)) for column in shown] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    rule = [
        ":" + "-" * (width + 1) if not at else "-" * (width + 1) + ":"
        for at, width in enumerate(widths)
    ]
    lines = [" | ".join(_justified(cells[0], widths, heading=True)), "|".join(rule)]
    lines += [" | ".join(_justified(line, widths)) for line in cells[1:]]
    return "\n".join(f"|{line}|" if at == 1 else f"| {line} |" for at, line in enumerate(lines))


def rich_table(rows: Sequence[Row], *, metric: Metric | None = None) -> "rich.table.Table":
    """The rows as a table for `rich.print`, narrow enough for 80 letters.

    Raises:
      ImportError: if rich is missing.
    """
    try:
        import rich.box
        import rich.table
        import rich.text
    except ImportError as error:
        raise ImportError(
            "Tables for the terminal need rich: `pip install 'jopt[run]'`."
        ) from error
    shown = columns(rows, metric or Metric(), brief=True)
    made = rich.table.Table(box=rich.box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for at, column in enumerate(shown):
        made.add_column(column.title, justify="right" if at else "left", no_wrap=True)
    for row in rows:
        # As Text, so that brackets in a stage's name are not taken for markup.
        made.add_row(*(rich.text.Text(column.cell(row)) for column in shown))
    return made


def count(number: int) -> str:
    """A count, from a million on in three digits.

    Example:
      >>> count(999_999), count(12_345_678), count(1_004_032)
      ('999,999', '12.3 M', '1.00 M')
    """
    return f"{number:,}" if number < 1_000_000 else _scaled(number)


def size(number: float) -> str:
    """Bytes in three digits and units of thousands.

    Example:
      >>> size(812), size(58_954), size(4e9)
      ('812 B', '59.0 kB', '4.00 GB')
    """
    return f"{_scaled(number)}B" if number >= 1000 else f"{number:.0f} B"


def _scaled(number: float) -> str:
    units = " kMGTPE"
    power = 0
    while number >= 999.5 and power < len(units) - 1:
        number, power = number / 1000, power + 1
    return f"{_three(number)} {units[power]}"


def _three(number: float) -> str:
    """A number with three digits, the zeros among them kept."""
    return f"{number:.{2 if number < 9.995 else 1 if number < 99.95 else 0}f}"


def _nonzeros(row: Row) -> str:
    if not row.parameters:
        return "0"
    return f"{count(row.nonzeros)} ({row.nonzeros / row.parameters:.0%})"


def _ratio(first: Row | None, row: Row) -> str:
    if first is None or not row.bytes:
        return "–"
    ratio = first.bytes / row.bytes
    return f"{_three(ratio)}×"


def _inline(text: str) -> str:
    """Text that cannot end a cell of Markdown."""
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ")


def _justified(cells: Sequence[str], widths: Sequence[int], heading: bool = False) -> list[str]:
    pairs = zip(cells, widths, strict=True)
    return [
        cell.ljust(width) if heading or not at else cell.rjust(width)
        for at, (cell, width) in enumerate(pairs)
    ]
