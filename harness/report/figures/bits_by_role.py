"""What the stored bits are spent on: codes, signs, index, masks, scales, one stacked bar a row of the table."""

from __future__ import annotations

from math import nan

from harness.report.figures.canvas import NothingToDrawError, Picture, blank, legend_above
from harness.report.figures.source import Source
from harness.report.figures.style import INK, PAPER, Page, series
from harness.report.records_view import RecordView, distinct
from harness.spec import UNQUANTIZED

PER_MODEL = True
_SMALLEST = 0.0005  # bits a weight; less cannot be seen


def draw(source: Source, page: Page, model: str) -> Picture:
    """Bars from the ledgers; the hollow diamond is what the method's paper counts."""
    lines = [
        (row, record["ledger"], record)
        for row, record in source.planned(model)
        if row.method != UNQUANTIZED and record.get("ledger", {}).get("bytes_by_role")
    ]
    if not lines:
        raise NothingToDrawError(f"no ledger of a quantized run of {model} with bytes by role")
    bits = [
        {role: 8 * size / ledger["weights"] for role, size in ledger["bytes_by_role"].items()} for _, ledger, _ in lines
    ]
    roles = [role for role in distinct(role for part in bits for role in part) if _largest(bits, role) > _SMALLEST]
    roles.sort(key=lambda role: -sum(part.get(role, 0.0) for part in bits))
    looks = series(roles)
    figure, (axis,) = blank(page, 0.24 * len(lines) + 1.0)
    left = [0.0] * len(lines)
    places = range(len(lines))
    for role in roles:
        widths = [part.get(role, 0.0) for part in bits]
        axis.barh(
            places, widths, 0.66, left=left, label=role, color=looks[role].colour, edgecolor=PAPER,
            hatch=looks[role].hatch,
        )  # fmt: skip
        left = [start + width for start, width in zip(left, widths, strict=True)]
    counted = [RecordView(record).ledger.nominal_bits for *_, record in lines]
    nominal = [nan if bits is None else bits for bits in counted]  # which draws no diamond
    claimed = axis.plot(nominal, places, "D", markerfacecolor=PAPER, markeredgecolor=INK, linestyle="none")[0]
    for place, total, count in zip(places, left, nominal, strict=True):
        # Right of the bar and of the diamond, wherever that lies.
        axis.annotate(
            f"{total:.2f}", (max(total, count if count > total - 0.1 else 0.0), place), xytext=(5 * page.scale, 0),
            textcoords="offset points", va="center", fontsize=page.venue.tick,
        )  # fmt: skip
    axis.set_yticks(places, [source.name(row) for row, _, _ in lines])
    axis.invert_yaxis()
    axis.set_xlim(0, max(left) * 1.12)
    axis.set_xlabel("Stored bits per weight")
    axis.grid(True, axis="x")
    handles, labels = axis.get_legend_handles_labels()
    legend_above(figure, [*handles, claimed], [*labels, "bits as claimed"], 3 if page.narrow else 8)
    return Picture(
        figure,
        (
            f"{model}: stored bits by role, all quantized layers",
            "Diamond: weight and scale bits as the method's paper counts them",
            *source.making([record for *_, record in lines]),
        ),
        tuple(record["key"] for *_, record in lines),
    )


def _largest(bits: list[dict[str, float]], role: str) -> float:
    return max(part.get(role, 0.0) for part in bits)
