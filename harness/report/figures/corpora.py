"""Figure 8: models across, one panel a corpus, one mark a method; filled: measured, hollow: the paper."""

from __future__ import annotations

from harness.catalog import corpora as catalogue
from harness.report.figures.canvas import NothingToDrawError, Picture, blank, legend_above, log_axis
from harness.report.figures.source import Source, keys
from harness.report.figures.style import INK, PAPER, SOFT, Page, mark
from harness.report.records_view import distinct

PER_MODEL = False


def draw(source: Source, page: Page) -> Picture:
    """One axis of models for all panels; text that stands in for a corpus is named in the panel's title."""
    from matplotlib.lines import Line2D

    rows = source.measured("perplexity")
    if not rows:
        raise NothingToDrawError("no measured perplexity")
    claims = [claim for claim in source.of_item if claim.metric == "perplexity"]
    datasets = distinct((*source.plan.datasets, *(claim.dataset for claim in claims)))
    datasets = (*datasets, *distinct(row.dataset for row in rows if _corpus(row.dataset) not in datasets))
    models = distinct((*(row.model for row in rows), *(claim.model for claim in claims)))
    methods = distinct((*(row.method for row in source.plan.rows), *(claim.method for claim in claims)))
    # Side by side: values of two methods are often too close to see both.
    offsets = {method: 0.36 * (place / max(1, len(methods) - 1) - 0.5) for place, method in enumerate(methods)}
    figure, axes = blank(page, 1.35 * len(datasets) + 0.8, len(datasets), 1, sharex=True)
    for axis, dataset in zip(axes, datasets, strict=True):
        own = [row for row in rows if _corpus(row.dataset) == dataset]
        values = []
        for row in own:
            look = mark(row.method)
            x = models.index(row.model) + offsets[row.method]
            value, error = row.measured or 0.0, row.stderr or 0.0
            axis.errorbar(x, value, [[min(error, 0.9 * value)], [error]], color=look.colour, capsize=1.5 * page.scale)
            axis.plot(x, value, look.marker, color=look.colour)
            values.append(value)
        for claim in claims:
            if claim.dataset == dataset:
                look = mark(claim.method)
                axis.plot(
                    models.index(claim.model) + offsets[claim.method], claim.value, look.marker, markerfacecolor=PAPER,
                    markeredgecolor=look.colour,
                )  # fmt: skip
                values.append(claim.value)
        log_axis(axis.yaxis, 0.9 * min(values), 1.1 * max(values))
        stand_ins = distinct(row.dataset for row in own if row.dataset != dataset)
        missing = "" if own else " (not measured here)"
        axis.set_title(f"{dataset}, measured on {', '.join(stand_ins)}" if stand_ins else f"{dataset}{missing}")
        axis.set_ylabel("Perplexity")
        axis.grid(True, axis="y")
        count = len(distinct(row.model for row in rows))
        if count < len(models):
            axis.axvline(count - 0.5, color=SOFT, linewidth=0.6 * page.venue.line, linestyle=":")
    axes[-1].set_xticks(range(len(models)), models, rotation=40, ha="right", rotation_mode="anchor")
    axes[-1].set_xlim(-0.6, len(models) - 0.4)
    handles = [Line2D([], [], color=mark(name).colour, marker=mark(name).marker, linestyle="none") for name in methods]
    handles.append(Line2D([], [], color=INK, marker="o", markerfacecolor=PAPER, linestyle="none"))
    legend_above(
        figure, handles, [*(source.label(name) for name in methods), "the paper's value"], 2 if page.narrow else 4
    )
    return Picture(
        figure,
        (
            f"{source.plan.title}, {source.plan.item}",
            "Filled: measured, with the standard error over windows. Hollow: the paper's values. Logarithmic axes",
            *source.protocol(rows),
        ),
        keys(rows),
    )


def _corpus(dataset: str) -> str:
    """The corpus that an embedded sample stands in for; any other text itself."""
    entry = catalogue().get(dataset)
    return entry.sample_of or dataset if entry else dataset
