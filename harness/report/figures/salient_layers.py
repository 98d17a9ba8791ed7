"""What SAGE-PTQ decided layer by layer: how much is salient, and how many groups its graph chose."""

from __future__ import annotations

from harness.report.figures.canvas import NothingToDrawError, Picture, blank, legend_above
from harness.report.figures.layers import kind, kinds
from harness.report.figures.source import Source
from harness.report.figures.style import SOFT, Page, series

PER_MODEL = True


def draw(source: Source, page: Page, model: str) -> Picture:
    """One column of panels a row of the table: salient fraction above, group count below, a mark a layer."""
    lines = [
        (row, record)
        for row, record in source.planned(model)
        if record.get("layers") and all("groups" in layer.get("facts", {}) for layer in record["layers"])
    ]
    if not lines:
        raise NothingToDrawError(f"no run of {model} whose layers have groups")
    figure, axes = blank(page, 3.3, 2, len(lines), sharex=True, sharey="row")
    names = kinds(lines[0][1]["layers"])
    looks = series(names)
    small = 2.2 * page.scale
    for column, (row, record) in enumerate(lines):
        top, bottom = axes[column], axes[len(lines) + column]
        for name in names:
            layers = [layer for layer in record["layers"] if kind(layer["name"]) == name]
            x = [layer["block"] for layer in layers]
            style = {"color": looks[name].colour, "marker": looks[name].marker, "markersize": small, "linestyle": "none"}
            top.plot(x, [100 * layer["facts"]["salient_fraction"] for layer in layers], label=name, **style)
            bottom.plot(x, [layer["facts"]["groups"] for layer in layers], **style)
        zeta = record["method"]["options"].get("max_salient")
        if zeta:
            top.axhline(100 * zeta, color=SOFT, linestyle=(0, (4, 2)), linewidth=0.8 * page.venue.line)
        top.set_title(source.name(row))
        top.set_ylim(bottom=0)
        bottom.set_xlabel("Decoder block")
        bottom.yaxis.get_major_locator().set_params(integer=True)
        top.grid(True, axis="y")
        bottom.grid(True, axis="y")
    axes[0].set_ylabel("Salient weights, %")
    axes[len(lines)].set_ylabel("Groups")
    handles, labels = axes[0].get_legend_handles_labels()
    legend_above(figure, handles, labels, 4 if page.narrow else 7)
    return Picture(
        figure,
        (
            f"{model}: salient fraction (above) and number of groups (below) of each layer",
            "Dashed: the largest salient fraction that was asked for; it is a threshold of the fitted Gaussian, and tails "
            "heavier than a Gaussian's let more through",
            *source.plan.notes,
        ),
        tuple(record["key"] for _, record in lines),
    )
