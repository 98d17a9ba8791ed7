"""Quality against stored bits: a filled mark at what is stored, a hollow one at what the method's paper counts.

The line between the two marks is what the headline leaves out. The grey steps are the Pareto front of stored bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from harness.report.figures.canvas import NothingToDrawError, Picture, blank, legend_above, log_axis
from harness.report.figures.source import Source, keys
from harness.report.figures.style import INK, PAPER, SOFT, Page, mark
from harness.report.records_view import distinct
from harness.report.rows import TidyRow
from harness.spec import UNQUANTIZED

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PER_MODEL = True
# How much of a mark is filled tells variants of one method apart, without colour.
_FILLS = ("full", "left", "top", "right", "bottom")
_NAMES = {"perplexity": "Perplexity", "divergence": "KL divergence, nats per token"}


def draw(source: Source, page: Page, model: str) -> Picture:
    """One panel a corpus and metric; raises NothingToDrawError without a quantized row."""
    panels = [
        (metric, dataset, tuple(row for row in source.measured(metric, model) if row.dataset == dataset))
        for metric in _NAMES
        for dataset in distinct(row.dataset for row in source.measured(metric, model))
    ]
    panels = [panel for panel in panels if any(row.method != UNQUANTIZED for row in panel[2])]
    if not panels:
        raise NothingToDrawError(f"no measured quantized row of {model}")
    across = 1 if page.narrow else min(2, len(panels))
    down = -(-len(panels) // across)
    figure, axes = blank(page, 2.1 * down + 0.5, down, across)
    for place, axis in enumerate(axes):
        if place < len(panels):
            _panel(axis, page, source, *panels[place])
        else:
            axis.set_axis_off()
    handles, labels = _legend(source, [row for *_, rows in panels for row in rows])
    legend_above(figure, handles, labels, 2 if page.narrow else 5)
    rows = tuple(row for *_, rows in panels for row in rows)
    return Picture(
        figure,
        (
            f"{model}: quality against bits a weight of the quantized layers",
            "Filled: all stored bits. Hollow: the bits that the method's paper counts. Line: the bits that count "
            "leaves out. Grey steps: Pareto front of stored bits. Bars: standard error over windows",
            *_floors(rows),
            *source.protocol(rows),
        ),
        keys(rows),
    )


def front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points (bits, loss) that no other point beats in both, by rising bits."""
    best: list[tuple[float, float]] = []
    for point in sorted(points):
        if not best or point[1] < best[-1][1]:
            best.append(point)
    return best


def _floors(rows: Sequence[TidyRow]) -> tuple[str, ...]:
    """What the unquantized model's own divergence is, in words: the noise that no method can go below."""
    found = [row for row in rows if row.method == UNQUANTIZED and row.metric == "divergence"]
    values = ", ".join(f"{row.measured:.1e} nats on {row.dataset}" for row in found)
    return (f"Divergence of the unquantized model in this dtype, the noise floor: {values}",) if found else ()


def _panel(axis: Axes, page: Page, source: Source, metric: str, dataset: str, rows: Sequence[TidyRow]) -> None:
    quantized = [row for row in rows if row.method != UNQUANTIZED and row.payload_bits is not None]
    # The unquantized model's divergence lies decades below; on the axis it would leave the methods no room.
    floor = [row.measured for row in rows if row.method == UNQUANTIZED and row.measured and metric == "perplexity"]
    values = [*floor, *(row.measured for row in quantized if row.measured)]
    steps = front([(row.payload_bits or 0.0, row.measured or 0.0) for row in quantized])
    right = max(row.payload_bits or 0.0 for row in quantized) * 1.06
    if len(steps) > 1 or len(quantized) > 1:
        x, y = zip(*steps, strict=True)
        axis.step([*x, right], [*y, y[-1]], where="post", color="#bfbfbf", zorder=1, linewidth=2 * page.venue.line)
    for row in quantized:
        look = mark(row.method)
        stored, level = row.payload_bits or 0.0, row.measured or 0.0
        nominal = row.nominal_bits
        if nominal is not None:
            axis.plot([nominal, stored], [level, level], color=look.colour, linewidth=0.8 * page.venue.line)
            axis.plot(nominal, level, look.marker, markerfacecolor=PAPER, markeredgecolor=look.colour, zorder=3)
        axis.plot(stored, level, zorder=4, **_filled(row.method, source.variant(row)))
        if row.stderr:
            low = min(row.stderr, 0.9 * level)  # a log axis has no zero
            axis.errorbar(stored, level, [[low], [row.stderr]], color=look.colour, capsize=1.5 * page.scale, zorder=2)
    if floor:
        axis.axhline(floor[0], color=INK, linestyle=(0, (4, 2)), linewidth=0.8 * page.venue.line, zorder=1)
    log_axis(axis.yaxis, min(values) / 1.1, max(values) * 1.1)
    axis.set_xlim(0, right)
    axis.set_xlabel("Bits per weight")
    axis.set_ylabel(_NAMES[metric])
    axis.set_title(dataset, color=SOFT)
    axis.grid(True, which="major")


def _filled(method: str, variant: int) -> dict[str, Any]:
    look = mark(method)
    return {
        "marker": look.marker, "color": look.colour, "markeredgecolor": look.colour, "markerfacecoloralt": PAPER,
        "fillstyle": _FILLS[variant % len(_FILLS)], "linestyle": "none",
    }  # fmt: skip


def _legend(source: Source, rows: Sequence[TidyRow]) -> tuple[list[Any], list[str]]:
    from matplotlib.lines import Line2D

    handles: list[Any] = []
    labels: list[str] = []
    for method in distinct(row.method for row in rows):
        if method == UNQUANTIZED:
            handles.append(Line2D([], [], color=INK, linestyle=(0, (4, 2))))
            labels.append(source.label(method))
            continue
        for variant in sorted({source.variant(row) for row in rows if row.method == method}):
            handles.append(Line2D([], [], **_filled(method, variant)))
            labels.append(source.labels(method)[variant])
    handles.append(Line2D([], [], color=SOFT, marker="o", markerfacecolor=PAPER, linestyle="none"))
    return handles, [*labels, "bits as claimed"]
