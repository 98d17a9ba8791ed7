"""Claimed against measured, row by row: the loss of quality, and the bits.

Perplexities of different models cannot be compared; their ratio to the unquantized model's can. Hollow marks are the
paper's models, one each; filled ones were measured.
"""

from __future__ import annotations

from harness.catalog import models as catalogue
from harness.claims import Claim, find
from harness.report.figures.canvas import NothingToDrawError, Picture, blank, log_axis
from harness.report.figures.source import Source, keys
from harness.report.figures.style import PAPER, SOFT, Page, mark
from harness.report.records_view import distinct
from harness.report.rows import TidyRow
from harness.spec import UNQUANTIZED

PER_MODEL = False


def draw(source: Source, page: Page) -> Picture:
    """Left: perplexity over the unquantized model's. Right: bits a weight, claimed and stored."""
    from matplotlib.lines import Line2D

    lines = distinct_rows(source)
    measured = [row for row in source.measured("perplexity") if _ratio(source, row) is not None]
    if not measured:
        raise NothingToDrawError("no measured quantized row with its unquantized reference")
    claims = [claim for claim in find(source.of_item, metric="perplexity") if claim.method != UNQUANTIZED]
    across, down = (1, 2) if page.narrow else (2, 1)
    height = 0.27 * len(lines) + 0.75
    figure, (left, right) = blank(page, height * down + 0.2, down, across, sharey=not page.narrow)
    ratios = []
    for claim in claims:
        reference = _claimed_reference(source, claim)
        if reference is not None and (claim.method, claim.setting) in lines:
            look = mark(claim.method)
            y = lines.index((claim.method, claim.setting)) - 0.13
            left.plot(
                claim.value / reference, y, look.marker, markerfacecolor="none", markeredgecolor=look.colour,
                markersize=3.4 * page.scale, markeredgewidth=0.7 * page.scale,
            )  # fmt: skip
            ratios.append(claim.value / reference)
    for row in measured:
        look = mark(row.method)
        value = _ratio(source, row) or 1.0
        error = value * (row.stderr or 0.0) / (row.measured or 1.0)
        y = lines.index((row.method, row.setting)) + 0.13
        left.errorbar(value, y, xerr=[[min(error, 0.9 * value)], [error]], color=look.colour, capsize=1.5 * page.scale)
        left.plot(value, y, look.marker, color=look.colour, zorder=3)
        ratios.append(value + error)
        stored = row.payload_bits or 0.0
        y = lines.index((row.method, row.setting))
        if row.nominal_bits is not None:
            right.plot([row.nominal_bits, stored], [y, y], color=look.colour, linewidth=0.8 * page.venue.line)
            right.plot(row.nominal_bits, y, look.marker, markerfacecolor=PAPER, markeredgecolor=look.colour)
        right.plot(stored, y, look.marker, color=look.colour)
    log_axis(left.xaxis, 0.9 * min([1.0, *ratios]), 1.1 * max(ratios))
    left.axvline(1.0, color=SOFT, linewidth=0.8 * page.venue.line, linestyle=(0, (4, 2)))
    left.set_xlabel("Perplexity / unquantized")
    right.set_xlabel("Bits per weight")
    right.set_xlim(left=0)
    labels = [f"{source.label(method)} {setting}".strip() for method, setting in lines]
    for axis in (left, right):
        axis.set_yticks(range(len(lines)), labels)
        axis.set_ylim(len(lines) - 0.5, -0.5)
        axis.grid(True, axis="x")
        axis.tick_params(axis="y", length=0)
    handles = [
        Line2D([], [], color=SOFT, marker="o", linestyle="none"),
        Line2D([], [], color=SOFT, marker="o", markerfacecolor=PAPER, linestyle="none"),
    ]
    figure.legend(handles, ["measured", "claimed"], loc="outside upper center", ncols=2)
    names = ", ".join(distinct(row.model for row in measured))
    of_paper = ", ".join(distinct(claim.model for claim in claims))
    return Picture(
        figure,
        (
            f"Claimed and measured, {source.plan.item}",
            f"Left: loss of quality; filled: {names}; hollow: the paper's models ({of_paper}), over its own or the "
            "published FP16 value. Right: bits as the method's paper counts them (hollow) and as stored (filled)",
            *source.protocol(measured),
        ),
        keys(measured),
    )


def distinct_rows(source: Source) -> list[tuple[str, str]]:
    """The quantized (method, setting) of the plan in its order."""
    return list(dict.fromkeys((row.method, row.setting) for row in source.plan.rows if row.method != UNQUANTIZED))


def _ratio(source: Source, row: TidyRow) -> float | None:
    """Perplexity of `row` over that of the unquantized model on the same text; None for the latter itself."""
    if row.method == UNQUANTIZED:
        return None
    for other in source.measured("perplexity", row.model):
        if other.method == UNQUANTIZED and other.dataset == row.dataset and other.measured and row.measured:
            return row.measured / other.measured
    return None


def _claimed_reference(source: Source, claim: Claim) -> float | None:
    """The paper's own FP16 value of the model on the corpus, or the published one where the paper prints none."""
    own = find(source.claims, model=claim.model, method=UNQUANTIZED, metric="perplexity", dataset=claim.dataset)
    if own:
        return own[0].value
    if claim.dataset != "wikitext2":
        return None
    return next((entry.anchor for entry in catalogue().values() if entry.claims == claim.model), None)
