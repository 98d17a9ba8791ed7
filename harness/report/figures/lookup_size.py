"""Figures 4 and 10: perplexity by the bits of the group index, what was measured beside what the paper plots."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from harness.report.figures.canvas import Picture, blank, log_axis
from harness.report.figures.panels import Panel, panels
from harness.report.figures.source import Source, keys
from harness.report.figures.style import INK, PAPER, Page, series
from harness.spec import UNQUANTIZED

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PER_MODEL = False


def draw(source: Source, page: Page) -> Picture:
    """Left what was measured, with the bits that each index size really stores; right the paper's values."""
    every = panels(source, "perplexity", "sage-ptq")
    sides = [("measured", [panel for panel in every if panel.measured])]
    if any(panel.paper for panel in every):
        sides.append(("paper", [panel for panel in every if panel.paper]))
    across = 1 if page.narrow else len(sides)
    down = len(sides) if page.narrow else 1
    figure, axes = blank(page, 2.3 * down, down, across)
    looks = series([panel.model for panel in every])
    rows = [row for row in source.measured("perplexity") if row.method in ("sage-ptq", UNQUANTIZED)]
    stored = {_bits(row.setting): row.payload_bits for row in rows if row.method == "sage-ptq" and row.payload_bits}
    for axis, (side, shown) in zip(axes, sides, strict=True):
        for panel in shown:
            look = looks[panel.model]
            points = _points(panel, side)
            x, y, errors = zip(*points, strict=True)
            hollow = side == "paper"
            axis.errorbar(
                x, y, [[min(e, 0.9 * v) for e, v in zip(errors, y, strict=True)], errors] if not hollow else None,
                color=look.colour, marker=look.marker, markerfacecolor=PAPER if hollow else look.colour,
                linestyle=(0, (3, 1.5)) if hollow else "-", capsize=1.5 * page.scale, label=panel.model,
            )  # fmt: skip
        _frame(axis, page, side, stored)
        if side == "measured":
            for row in rows:
                if row.method == UNQUANTIZED:
                    colour = looks[row.model].colour if len(shown) > 1 and row.model in looks else INK
                    axis.axhline(
                        row.measured or 1.0, color=colour, linestyle=(0, (4, 2)), linewidth=0.8 * page.venue.line,
                        label=f"{row.model}, FP16",
                    )  # fmt: skip
        values = [value for panel in shown for _, value, _ in _points(panel, side)]
        values += [row.measured or 1.0 for row in rows if row.method == UNQUANTIZED and side == "measured"]
        # Curves fall: the room for the legend is made above them.
        log_axis(axis.yaxis, min(values), max(values) * (max(values) / min(values)) ** 0.35)
        handles, labels = axis.get_legend_handles_labels()
        order = sorted(range(len(labels)), key=lambda place: labels[place].endswith(", FP16"))
        axis.legend(
            [handles[place] for place in order], [labels[place] for place in order], loc="upper right",
            ncols=1 if len(labels) < 4 else 2,
        )  # fmt: skip
    return Picture(
        figure,
        (
            f"{source.plan.title}, {source.plan.item}",
            "Below each index size, in brackets: all stored bits a weight. Bars: standard error over windows",
            *source.protocol(rows),
        ),
        keys(rows),
    )


def _points(panel: Panel, side: str) -> list[tuple[int, float, float]]:
    if side == "paper":
        return sorted((_bits(setting), value, 0.0) for (setting, _), value in panel.paper.items())
    return sorted((_bits(setting), value, error) for (setting, _), (value, error) in panel.measured.items())


def _bits(setting: str) -> int:
    found = re.search(r"n_lut (\d+)", setting)
    return int(found[1]) if found else 0


def _frame(axis: Axes, page: Page, side: str, stored: dict[int, float]) -> None:
    ticks = sorted(stored) if side == "measured" else [3, 4, 5, 6]
    labels = [f"{tick}\n({stored[tick]:.2f})" if side == "measured" else str(tick) for tick in ticks]
    axis.set_xticks(ticks, labels)
    axis.set_xlim(min(ticks) - 0.4, max(ticks) + 0.4)
    axis.set_xlabel("Index bits (stored bits per weight)" if side == "measured" else "Index bits")
    axis.set_ylabel("Perplexity")
    axis.set_title(side.capitalize())
    axis.grid(True, axis="y")
