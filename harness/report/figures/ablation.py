"""Ablations (figures 3 and 9): one panel a model, one group of bars a setting, one bar a corpus."""

from __future__ import annotations

from typing import TYPE_CHECKING

from harness.report.figures.canvas import Picture, blank, legend_above, log_axis
from harness.report.figures.panels import Panel, panels, short
from harness.report.figures.source import Source, keys
from harness.report.figures.style import INK, PAPER, Mark, Page, series
from harness.report.records_view import distinct
from harness.spec import UNQUANTIZED

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PER_MODEL = False


def draw(source: Source, page: Page) -> Picture:
    """Measured models in filled bars, the paper's in hollow ones; a diamond where a measured model has both."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    shown = panels(source, "perplexity", "sage-ptq")
    settings = distinct(row.setting for row in source.plan.rows if row.method == "sage-ptq")
    datasets = distinct(dataset for panel in shown for _, dataset in (*panel.measured, *panel.paper))
    looks = dict(series(datasets))
    across = 1 if page.narrow else 2
    down = -(-len(shown) // across)
    figure, axes = blank(page, 1.6 * down + 0.25, down, across)
    unquantized = [row for row in source.measured("perplexity") if row.method == UNQUANTIZED]
    for place, axis in enumerate(axes):
        if place < len(shown):
            own = {row.dataset: row.measured or 1.0 for row in unquantized if row.model == shown[place].model}
            _panel(axis, page, shown[place], settings, own, looks)
        else:
            axis.set_axis_off()
        if place % across == 0:
            axis.set_ylabel("Perplexity")
    handles: list[object] = [Patch(facecolor=look.colour, hatch=look.hatch, edgecolor=PAPER) for look in looks.values()]
    handles.append(Line2D([], [], color=INK, linestyle=(0, (4, 2))))
    legend_above(figure, handles, [*datasets, "FP16"], 2 if page.narrow else 5)
    rows = [row for row in source.measured("perplexity") if row.method in ("sage-ptq", UNQUANTIZED)]
    return Picture(
        figure,
        (
            f"{source.plan.title}, {source.plan.item}",
            "Filled bars: measured, with the standard error over windows. Hollow bars: the paper's values. Logarithmic "
            "axes, which do not begin at zero",
            *source.protocol(rows),
        ),
        keys(rows),
    )


def _panel(
    axis: Axes, page: Page, panel: Panel, settings: tuple[str, ...], reference: dict[str, float], looks: dict[str, Mark]
) -> None:
    datasets = [name for name in looks if any(name == dataset for _, dataset in (*panel.measured, *panel.paper))]
    width = 0.8 / len(datasets)
    values = [*panel.values, *reference.values()]
    for number, dataset in enumerate(datasets):
        look = looks[dataset]
        offset = (number - (len(datasets) - 1) / 2) * width
        for place, setting in enumerate(settings):
            x = place + offset
            if (setting, dataset) in panel.measured:
                value, error = panel.measured[setting, dataset]
                axis.bar(x, value, width, color=look.colour, hatch=look.hatch, edgecolor=PAPER)
                axis.errorbar(x, value, [[min(error, 0.9 * value)], [error]], color=INK, capsize=1.5 * page.scale)
                if (setting, dataset) in panel.paper:
                    axis.plot(x, panel.paper[setting, dataset], "D", markerfacecolor=PAPER, markeredgecolor=INK)
            elif (setting, dataset) in panel.paper:
                value = panel.paper[setting, dataset]
                axis.bar(x, value, 0.9 * width, facecolor=PAPER, edgecolor=look.colour, hatch=look.hatch)
    for dataset, value in reference.items():
        axis.axhline(value, color=looks[dataset].colour, linestyle=(0, (4, 2)), linewidth=0.8 * page.venue.line)
    log_axis(axis.yaxis, 0.8 * min(values), 1.1 * max(values))
    axis.set_xticks(range(len(settings)), short(settings, 12), linespacing=1.0)
    axis.tick_params(axis="x", length=0)
    axis.set_title(panel.title)
    axis.grid(True, axis="y")
