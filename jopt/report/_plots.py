"""The plots of a report, as the bytes of PNG files.

Drawn on figures of their own, never through pyplot: no window, no state, no thread of another's.
"""

import dataclasses
import io
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from . import _rows
from ._rows import Metric, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Curve = Sequence[tuple[float, float]]  # (step, loss)

_DOTS = 200  # an inch
_BARS = 60  # more layers than these would not be read
# Told apart by those who see colors differently, on light and on dark ground.
_COLORS = ("#4269d0", "#e0872b", "#3ca951", "#d9534f", "#8a63d2", "#6aa5b8", "#c06fa0", "#9c6b4e")


@dataclasses.dataclass(frozen=True)
class Style:
    """The ground a plot is drawn on, and what is written on it."""

    ground: str
    text: str
    faint: str  # lines of the grid


LIGHT = Style(ground="#ffffff", text="#1f2933", faint="#e3e8ee")
DARK = Style(ground="#171b22", text="#d7dde5", faint="#2c333d")


def losses(curves: Mapping[str, Curve], style: Style = LIGHT) -> bytes:
    """The loss of every stage, one after the other along the steps.

    Args:
      curves: stage to its (step, loss) pairs, in the order of training.
      style: colors.

    Raises:
      ImportError: if matplotlib is missing.
    """
    figure, axes = _figure(6.2, 3.2, style)
    begin = 0.0
    positive = all(value > 0 for curve in curves.values() for _, value in curve)
    for at, (name, curve) in enumerate(curves.items()):
        color = _COLORS[at % len(_COLORS)]
        steps = [begin + step for step, value in curve if math.isfinite(value)]
        values = [value for _, value in curve if math.isfinite(value)]
        smooth = _smooth(values)
        if len(values) > 30:
            axes.plot(steps, values, color=color, linewidth=0.6, alpha=0.3)
        marker = "o" if len(values) < 3 else None
        axes.plot(steps, smooth, color=color, linewidth=1.8, label=_plain(name), marker=marker)
        if at:
            axes.axvline(begin, color=style.faint, linewidth=1, zorder=0)
        begin += max((step for step, _ in curve), default=0.0)
    if positive and any(curves.values()):
        axes.set_yscale("log")
        _plain_decades(axes.yaxis)
    axes.set(xlabel="step, counted through all stages", ylabel="loss")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.set_xlim(0, begin or 1)
    _legend(axes, style)
    return _png(figure)


def sparsity(layers: Mapping[str, float], style: Style = LIGHT) -> bytes:
    """The share of zeros in every layer, as bars.

    Args:
      layers: path to share, between 0 and 1. Of many, the first sixty are drawn.
      style: colors.

    Raises:
      ImportError: if matplotlib is missing.
    """
    shown = list(layers.items())[:_BARS]
    figure, axes = _figure(6.2, 0.8 + 0.26 * max(len(shown), 1), style)
    places = range(len(shown))
    shares = [share for _, share in shown]
    axes.barh(places, [1.0] * len(shown), color=style.faint, height=0.62)
    axes.barh(places, shares, color=_COLORS[0], height=0.62)
    axes.set_yticks(places, [_plain(_short(path)) for path, _ in shown])
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.set_xlim(0, 1)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0%", "25%", "50%", "75%", "100%"])
    for place, share in zip(places, shares, strict=True):
        axes.annotate(
            f"{share:.1%}", (1, place), (6, 0), textcoords="offset points", va="center", fontsize=8,
            color=style.text, annotation_clip=False,
        )  # fmt: skip
    axes.grid(visible=False)
    axes.tick_params(axis="y", length=0)
    axes.spines[:].set_visible(False)
    more = len(layers) - len(shown)
    axes.set_xlabel("zeros" + (f" (the first {_BARS} of {len(layers)} layers)" if more > 0 else ""))
    return _png(figure)


def tradeoff(rows: Sequence[Row], metric: Metric, style: Style = LIGHT) -> bytes:
    """Score against bytes, every stage a labelled point, joined in the order of the stages.

    Args:
      rows: those without a score or without bytes are left out.
      metric: what the score is.
      style: colors.

    Raises:
      ImportError: if matplotlib is missing.
    """
    shown = placeable(rows)
    figure, axes = _figure(6.2, 3.3, style)
    scale = 100.0 if metric.percent else 1.0
    xs = [row.bytes for row in shown]
    ys = [scale * (row.score or 0.0) for row in shown]
    axes.plot(xs, ys, color=style.text, linewidth=1, alpha=0.35, zorder=1)
    for at, (x, y) in enumerate(zip(xs, ys, strict=True)):
        axes.scatter([x], [y], s=46, color=_COLORS[at % len(_COLORS)], zorder=2)
    axes.set_xscale("log")
    axes.set(xlabel="weights file", ylabel=metric.name + (" (%)" if metric.percent else ""))
    _room(axes, xs, ys)
    if metric.percent:  # room above the points is no accuracy beyond 100 %
        low, high = axes.get_ylim()
        axes.set_yticks([tick for tick in axes.get_yticks() if low <= tick <= min(high, 100)])
    _sizes(axes)
    _label(axes, [row.name for row in shown], xs, ys, style)
    return _png(figure)


def placeable(rows: Sequence[Row]) -> list[Row]:
    """The rows that have a place on the axes of `tradeoff`."""
    return [
        row for row in rows if row.score is not None and math.isfinite(row.score) and row.bytes > 0
    ]


def _figure(width: float, height: float, style: Style) -> "tuple[Figure, Axes]":
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Plots need matplotlib: `pip install 'jopt[run]'`.") from error
    figure = Figure(
        figsize=(width, height), dpi=_DOTS, layout="constrained", facecolor=style.ground
    )
    axes = figure.add_subplot(facecolor=style.ground)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(style.faint)
    axes.tick_params(colors=style.text, which="both", labelsize=8, color=style.faint)
    axes.tick_params(which="minor", length=0)
    axes.grid(color=style.faint, linewidth=0.7)
    axes.set_axisbelow(True)
    for axis in (axes.xaxis, axes.yaxis):
        axis.label.set_color(style.text)
        axis.label.set_fontsize(9)
    return figure, axes


def _png(figure: "Figure") -> bytes:
    # A canvas that only draws into memory, whatever backend the user has chosen.
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    file = io.BytesIO()
    # Without the version of matplotlib among its text, the same plot is the same file.
    FigureCanvasAgg(figure).print_png(file, metadata={"Software": None})
    return file.getvalue()


def _smooth(values: Sequence[float]) -> list[float]:
    """An exponential average over about a fiftieth of the curve, unbiased at its start."""
    weight = math.exp(-1 / max(len(values) / 50, 1e-9)) if len(values) > 30 else 0.0
    total, norm, found = 0.0, 0.0, []
    for value in values:
        total = weight * total + (1 - weight) * value
        norm = weight * norm + (1 - weight)
        found.append(total / norm)
    return found


def _legend(axes: "Axes", style: Style) -> None:
    if axes.get_legend_handles_labels()[1]:
        axes.legend(
            loc="lower left", bbox_to_anchor=(0, 1), ncols=4, frameon=False, fontsize=8,
            labelcolor=style.text, borderaxespad=0.2, handlelength=1.4,
        )  # fmt: skip


def _room(axes: "Axes", xs: Sequence[float], ys: Sequence[float]) -> None:
    """Margins in which labels fit; at least a third of a decade, and a point of score."""
    if not xs:
        return
    low, high = math.log10(min(xs)), math.log10(max(xs))
    side = max(0.12 * (high - low), 0.15)
    axes.set_xlim(10 ** (low - side), 10 ** (high + 1.6 * side))
    tall = max(0.22 * (max(ys) - min(ys)), 0.002 * max(map(abs, ys)), 1e-6)
    axes.set_ylim(min(ys) - tall, max(ys) + tall)


def _sizes(axes: "Axes") -> None:
    """Ticks at 1, 2 and 5 times powers of ten, spelled `20 kB`."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    low, high = axes.get_xlim()
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1, 2, 5) if high / low < 300 else (1,)
    ticks = [step * 10.0**power for power in powers for step in steps]
    axes.xaxis.set_major_locator(FixedLocator([tick for tick in ticks if low <= tick <= high]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _round(value)))
    axes.xaxis.set_minor_locator(NullLocator())


def _round(size: float) -> str:
    """A size without the zeros behind its point."""
    return _rows.size(size).replace(".00", "").replace(".0", "")


def _plain_decades(axis: Any) -> None:
    """Numbers such as 0.5 on a logarithmic axis, in the place of powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axis.get_view_interval()
    few = high / max(low, 1e-300) < 300
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if few else (1.0,)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _label(
    axes: "Axes", names: Sequence[str], xs: Sequence[float], ys: Sequence[float], style: Style
) -> None:
    """Names beside their points, each where it covers the fewest others."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.patheffects import withStroke

    halo = [withStroke(linewidth=3, foreground=style.ground)]  # where it crosses a line
    figure = axes.figure
    canvas = FigureCanvasAgg(figure)  # pyright: ignore[reportArgumentType]
    canvas.draw()
    taken = [_around(axes.transData.transform((x, y))) for x, y in zip(xs, ys, strict=True)]
    frame = axes.get_window_extent()
    for name, x, y in zip(names, xs, ys, strict=True):
        best = None
        for offset, side, height in _SIDES:
            text = axes.annotate(
                _plain(name), (x, y), offset, textcoords="offset points", ha=side, va=height,
                fontsize=8.5, color=style.text, path_effects=halo,
            )  # fmt: skip
            box = text.get_window_extent(canvas.get_renderer())
            cost = sum(box.overlaps(other) for other in taken)
            cost += 2 * (box.x0 < frame.x0 or box.x1 > frame.x1 or box.y1 > frame.y1)
            if best is None or cost < best[0]:
                if best is not None:
                    best[1].remove()
                best = (cost, text, box)
            else:
                text.remove()
        if best is not None:
            taken.append(best[2])


# Where a label may stand: offset in points, and how it is aligned there.
_SIDES = (
    ((0, 7), "center", "bottom"),
    ((0, -8), "center", "top"),
    ((8, 0), "left", "center"),
    ((-8, 0), "right", "center"),
    ((7, 7), "left", "bottom"),
    ((-7, 7), "right", "bottom"),
    ((7, -7), "left", "top"),
    ((-7, -7), "right", "top"),
)


def _around(point: Any) -> Any:
    """The box that a point's disc covers, in dots."""
    from matplotlib.transforms import Bbox

    return Bbox.from_bounds(point[0] - 12, point[1] - 12, 24, 24)


def _short(path: str) -> str:
    """A path without its middle, where it is long."""
    return path if len(path) <= 44 else f"{path[:14]}…{path[-29:]}"


def _plain(text: str) -> str:
    """Text that matplotlib does not take for mathematics, nor for a name to hide (`_name`)."""
    text = text.replace("$", r"\$")
    return f"\N{ZERO WIDTH SPACE}{text}" if text.startswith("_") else text
