"""What SAGE-PTQ decided layer by layer: how much is salient, and how many groups its graph chose."""

from __future__ import annotations

from typing import Any

from harness.report.figures.canvas import NothingToDrawError, Picture, blank, heat_map, legend_above, whole_ticks
from harness.report.figures.layers import blocks, kind, kinds
from harness.report.figures.source import Source
from harness.report.figures.style import SOFT, Page, series

PER_MODEL = True


def draw(source: Source, page: Page, model: str) -> Picture:
    """One column of panels a row of the table: salient fraction above, group count below, a mark a layer."""
    from matplotlib.colors import BoundaryNorm

    lines = [
        (row, record)
        for row, record in source.planned(model)
        if record.get("layers") and all("groups" in layer.get("facts", {}) for layer in record["layers"])
    ]
    if not lines:
        raise NothingToDrawError(f"no run of {model} whose layers have groups")
    figure, axes = blank(page, 3.4, 2, len(lines), sharex=True, sharey="row")
    names = kinds(lines[0][1]["layers"])
    looks = series(names)
    counts = [layer["facts"]["groups"] for _, record in lines for layer in record["layers"]]
    edges = [count - 0.5 for count in range(min(counts), max(counts) + 2)]
    norm = BoundaryNorm(edges, 256)
    one_method = len({row.method for row, _ in lines}) == 1
    image: Any = None
    for column, (row, record) in enumerate(lines):
        top, bottom = axes[column], axes[len(lines) + column]
        depth = blocks(record["layers"])
        groups = [[float("nan")] * depth for _ in names]
        for name in names:
            layers = [layer for layer in record["layers"] if kind(layer["name"]) == name]
            for layer in layers:
                groups[names.index(name)][layer["block"]] = layer["facts"]["groups"]
            top.plot(
                [layer["block"] for layer in layers], [100 * layer["facts"]["salient_fraction"] for layer in layers],
                label=name, color=looks[name].colour, marker=looks[name].marker, markersize=2.2 * page.scale,
                linestyle="none",
            )  # fmt: skip
        image = heat_map(bottom, groups, norm)
        zeta = record["method"]["options"].get("max_salient")
        if zeta:
            top.axhline(100 * zeta, color=SOFT, linestyle=(0, (4, 2)), linewidth=0.8 * page.venue.line)
        top.set_title(row.setting if one_method and row.setting else source.name(row))
        top.set_ylim(bottom=0)
        top.grid(True, axis="y")
        bottom.set_yticks(range(len(names)), names)
        bottom.tick_params(axis="y", length=0)
        bottom.set_xlabel("Decoder block")
        whole_ticks(bottom.xaxis)
    axes[0].set_ylabel("Salient weights, %")
    axes[len(lines)].invert_yaxis()
    bar = figure.colorbar(image, ax=axes[len(lines) :], location="right", aspect=14, pad=0.01)
    step = -(-len(edges) // 8)
    bar.set_ticks(range(min(counts), max(counts) + 1, step), minor=False)
    bar.ax.minorticks_off()
    bar.set_label("Groups")
    handles, labels = axes[0].get_legend_handles_labels()
    legend_above(figure, handles, labels, 4 if page.narrow else 7)
    return Picture(
        figure,
        (
            f"{model}: salient fraction (above) and number of groups (below) of each layer",
            "Dashed: the largest salient fraction that was asked for; it is a threshold of the fitted Gaussian, and "
            "tails heavier than a Gaussian's let more through",
            *source.making([record for _, record in lines]),
        ),
        tuple(record["key"] for _, record in lines),
    )
