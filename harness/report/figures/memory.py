"""Figure 2: gigabytes while decoding, and in storage, by the size of the model; straight lines are bits a parameter."""

from __future__ import annotations

from typing import TYPE_CHECKING

from harness.catalog import models as catalogue
from harness.claims import find
from harness.report.figures.canvas import NothingToDrawError, Picture, blank, legend_above, log_axis, plain
from harness.report.figures.source import Source, keys
from harness.report.figures.style import GRID, INK, PAPER, SOFT, Page, mark
from harness.report.rows import TidyRow

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PER_MODEL = False
_PANELS = {"gpu_memory_gb": "Memory while decoding, GB", "storage_gb": "Storage, GB"}
_LINES = (16, 5, 1)  # bits a parameter


def draw(source: Source, page: Page) -> Picture:
    """Filled: counted from our tensors. Hollow: the paper's values."""
    from matplotlib.lines import Line2D

    rows = [row for metric in _PANELS for row in source.measured(metric)]
    if not rows:
        raise NothingToDrawError("no measured memory")
    across, down = (1, 2) if page.narrow else (2, 1)
    figure, axes = blank(page, 2.2 * down + 0.25, down, across)
    sizes = {entry.claims: entry.parameters for entry in catalogue().values() if entry.claims}
    settings = list(dict.fromkeys((row.method, row.setting) for row in rows))
    markers = dict(zip(settings, "*osD^vP", strict=False))
    for axis, (metric, label) in zip(axes, _PANELS.items(), strict=True):
        points = [(_parameters(source, row), row.measured or 0.0, row) for row in rows if row.metric == metric]
        claims = [(sizes[c.model], c) for c in find(source.of_item, metric=metric) if c.model in sizes]
        x = [*(size for size, *_ in points), *(size for size, _ in claims)]
        y = [*(value for _, value, _ in points), *(claim.value for _, claim in claims)]
        log_axis(axis.xaxis, 0.6 * min(x), 1.9 * max(x))
        log_axis(axis.yaxis, 0.5 * min(y), 2 * max(y))
        low, high = axis.get_xlim()
        for bits in _LINES:
            ends = [size * bits / 8e9 for size in (low, high)]
            axis.plot((low, high), ends, color=GRID, zorder=1)
            _label(axis, page, bits, (low, high))
        for size, value, row in points:
            axis.plot(size, value, markers[row.method, row.setting], color=mark(row.method).colour, zorder=3)
        for size, claim in claims:
            marker = markers.get((claim.method, claim.setting), "o")
            axis.plot(size, claim.value, marker, markerfacecolor=PAPER, markeredgecolor=mark(claim.method).colour)
        axis.set_xlabel("Parameters")
        axis.set_ylabel(label)
        axis.xaxis.set_major_formatter(lambda value, _: _billions(value))
    handles = [Line2D([], [], color=mark(m).colour, marker=markers[m, s], linestyle="none") for m, s in settings]
    handles.append(Line2D([], [], color=INK, marker="o", markerfacecolor=PAPER, linestyle="none"))
    labels = [f"{source.label(method)} {setting}".strip() for method, setting in settings]
    legend_above(figure, handles, [*labels, "the paper's value"], 2 if page.narrow else 4)
    return Picture(
        figure,
        (
            f"{source.plan.title}, {source.plan.item}",
            "Filled: counted from all stored tensors, the unquantized rest of the model in 16 bits. Hollow: the "
            "paper's values, whose memory leaves the lookup index out. Grey lines: bits a parameter",
            *source.protocol(rows),
        ),
        keys(rows),
    )


def _parameters(source: Source, row: TidyRow) -> int:
    return int(source.records[row.run_key]["model"]["parameters"])


def _billions(value: float) -> str:
    return f"{value / 1e9:.3g}B" if value >= 1e9 else f"{plain(value / 1e6)}M"


def _label(axis: Axes, page: Page, bits: int, span: tuple[float, float]) -> None:
    """Name a line of bits above its upper end, where it leaves the axes; the models lie further down."""
    top = axis.get_ylim()[1]
    x = 0.8 * min(span[1], top * 8e9 / bits)
    axis.annotate(
        f"{bits} bit", (x, x * bits / 8e9), xytext=(-3 * page.scale, 0), textcoords="offset points", color=SOFT,
        fontsize=page.venue.tick, ha="right", va="center",
    )  # fmt: skip
