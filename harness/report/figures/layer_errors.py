"""Where the error sits: relative error of every layer as a heat map, blocks across, kinds of layer down."""

from __future__ import annotations

from typing import Any

from harness.report.figures.canvas import NothingToDrawError, Picture, blank, heat_map, whole_ticks
from harness.report.figures.layers import blocks, kind, kinds
from harness.report.figures.source import Source
from harness.report.figures.style import Page
from harness.spec import UNQUANTIZED

PER_MODEL = True


def draw(source: Source, page: Page, model: str) -> Picture:
    """||W - Q||^2 / ||W||^2 of each layer, one colour scale for all rows."""
    from matplotlib.colors import LogNorm

    lines = [
        (row, record)
        for row, record in source.planned(model)
        if row.method != UNQUANTIZED and record.get("layers") and any(x["relative_error"] for x in record["layers"])
    ]
    if not lines:
        raise NothingToDrawError(f"no log of layers of a quantized run of {model}")
    names = kinds(lines[0][1]["layers"])
    depth = blocks(lines[0][1]["layers"])
    across = 1 if page.narrow else 2
    down = -(-len(lines) // across)
    figure, axes = blank(page, (0.11 * len(names) + 0.25) * down + 0.45, down, across, sharex=True, sharey=True)
    errors = [layer["relative_error"] for _, record in lines for layer in record["layers"] if layer["relative_error"]]
    norm = LogNorm(min(errors), max(errors))
    image: Any = None
    for place, axis in enumerate(axes):
        if place >= len(lines):
            axis.set_axis_off()
            continue
        row, record = lines[place]
        grid = [[float("nan")] * depth for _ in names]
        for layer in record["layers"]:
            if layer["relative_error"]:
                grid[names.index(kind(layer["name"]))][layer["block"]] = layer["relative_error"]
        image = heat_map(axis, grid, norm)
        axis.set_title(source.name(row))
        axis.set_yticks(range(len(names)), names)
        axis.tick_params(length=0)
    axes[0].invert_yaxis()  # shared by all maps
    whole_ticks(axes[0].xaxis)
    # Said once below all maps: a label of its own would tear a gap above an empty place of the grid.
    figure.supxlabel("Decoder block", fontsize=page.venue.label)
    bar = figure.colorbar(image, ax=axes, location="right", aspect=9 * down, pad=0.01)
    bar.set_label("Relative squared error of the weights")
    bar.outline.set_visible(False)  # type: ignore[operator]
    return Picture(
        figure,
        (
            f"{model}: squared error of each layer's weights over their energy",
            "Measured on weights decoded from the stored tensors; one logarithmic colour scale for all maps",
            *source.making([record for _, record in lines]),
        ),
        tuple(record["key"] for _, record in lines),
    )
