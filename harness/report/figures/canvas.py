"""A blank figure of a page's width, and what the drawings share: axes that say perplexity in plain numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import ceil, floor, log10
from typing import TYPE_CHECKING, Any

from harness.report.figures.style import Page

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class NothingToDrawError(Exception):
    """The records lack what a figure shows; the text says what."""


@dataclass
class Picture:
    """A figure with its caption, and the keys of the runs whose numbers it shows."""

    figure: Figure
    caption: tuple[str, ...]
    run_keys: tuple[str, ...] = field(default_factory=tuple)


def blank(page: Page, height: float, rows: int = 1, columns: int = 1, **grid: Any) -> tuple[Figure, list[Axes]]:
    """A figure of the page's width and `height` inches at 8 pt type, with rows x columns axes in reading order."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    pad = 0.02 * page.scale
    figure = Figure(figsize=(page.width, height * page.scale), layout=ConstrainedLayoutEngine(w_pad=pad, h_pad=pad))
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False, **grid)
    return figure, list(axes.flat)


# Ticks of a decade, from sparse to dense: the first that gives four of them is taken.
_STEPS = (
    (1.0,), (1, 3), (1, 2, 5), (1, 2, 3, 5, 7), (1, 1.5, 2, 3, 4, 5, 6, 8),
    (1, 1.2, 1.5, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 8, 9),
)  # fmt: skip


def log_axis(axis: Any, low: float, high: float) -> None:
    """A logarithmic axis from below `low` to above `high`, ticks written as plain numbers: 20, 50, 100, 8k."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

    margin = max(1.15, (high / low) ** 0.05)
    low, high = low / margin, high * margin
    if axis.axis_name == "y":
        axis.axes.set_yscale("log")
        axis.axes.set_ylim(low, high)
    else:
        axis.axes.set_xscale("log")
        axis.axes.set_xlim(low, high)
    decades = range(floor(log10(low)), ceil(log10(high)) + 1)
    for steps in _STEPS:
        ticks = [step * 10.0**decade for decade in decades for step in steps]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) >= 4:
            break
    axis.set_major_locator(FixedLocator(ticks[:: -(-len(ticks) // 8)]))
    axis.set_major_formatter(FuncFormatter(lambda value, _: plain(value)))
    axis.set_minor_formatter(NullFormatter())
    if len(steps) > 3:
        axis.set_minor_locator(NullLocator())


def whole_ticks(axis: Any) -> None:
    """Ticks at whole numbers only: there is no half of a decoder block."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(integer=True))


def heat_map(axis: Axes, grid: Sequence[Sequence[float]], norm: Any) -> Any:
    """Draw `grid` [rows, columns] in cividis, whose lightness rises from end to end: it reads the same in grey."""
    places = range(len(grid[0])), range(len(grid))
    # Without an edge in its own colour a viewer shows hair lines between the cells.
    return axis.pcolormesh(
        *places, grid, norm=norm, cmap="cividis", shading="nearest", edgecolors="face", linewidth=0.2
    )


def plain(value: float) -> str:
    """A tick or label as short as it can be read: 0.5, 20, 1.5k, 200k."""
    if value >= 1e6:
        return f"{value / 1e6:.3g}M"
    return f"{value / 1e3:.3g}k" if value >= 1e3 else f"{value:.3g}"


def legend_above(figure: Figure, handles: Sequence[Any], labels: Sequence[str], columns: int) -> None:
    """One legend over all axes, `columns` wide."""
    figure.legend(handles, labels, loc="outside upper center", ncols=min(columns, len(labels)))
