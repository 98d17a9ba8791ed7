"""Decode speed against the roofline: a bar an arm, a diamond where its bytes at the copy bandwidth would be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from harness.report.figures.canvas import NothingToDrawError, Picture, blank, legend_above
from harness.report.figures.source import Source
from harness.report.figures.style import INK, PAPER, Page, mark

PER_MODEL = True


def draw(source: Source, page: Page, model: str) -> Picture:
    """All arms of all rows with a decode entry, in the table's order."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    lines = [
        (row, record["key"], entry, name, arm)
        for row, record in source.planned(model)
        for entry in record.get("metrics", ())
        if entry.get("metric") == "decode"
        for name, arm in entry["arms"].items()
    ]
    if not lines:
        raise NothingToDrawError(f"no run of {model} measured decode throughput")
    figure, (axis,) = blank(page, 0.27 * len(lines) + 0.95)
    found = tuple(dict.fromkeys(key for _, key, *_ in lines))
    rooflines = []
    for place, (row, _, entry, name, arm) in enumerate(lines):
        look = mark("fp16" if name.startswith("dense") else row.method)
        low, high = arm["iqr"]
        speed = arm["tokens_per_second"]
        axis.barh(place, speed, 0.62, color=look.colour, alpha=0.85, edgecolor=PAPER)
        axis.plot([low, high], [place, place], color=INK)
        roofline = entry["batch"] * entry["copy_gb_s"] * 1e9 / arm["bytes_per_token"]
        axis.plot(roofline, place, "D", markerfacecolor=PAPER, markeredgecolor=INK)
        rooflines.append(roofline)
        axis.annotate(
            f"{100 * arm['share_of_copy']:.0f} %", (max(speed, high, roofline), place), xytext=(5 * page.scale, 0),
            textcoords="offset points", va="center", fontsize=page.venue.tick,
        )  # fmt: skip
    axis.set_yticks(
        range(len(lines)), [_label(row.label or row.method, row.setting, name) for row, _, _, name, _ in lines]
    )
    axis.set_ylim(len(lines) - 0.5, -0.5)
    axis.set_xlim(
        0, (1.25 if page.narrow else 1.12) * max(*rooflines, *(arm["tokens_per_second"] for *_, arm in lines))
    )
    axis.set_xlabel("Tokens per second")
    axis.grid(True, axis="x")
    handles = [
        Patch(facecolor=mark("sage-ptq").colour), Patch(facecolor=INK),
        Line2D([], [], color=INK), Line2D([], [], marker="D", markerfacecolor=PAPER, color=INK, linestyle="none"),
    ]  # fmt: skip
    legend_above(figure, handles, ["packed", "dense", "quartiles", "roofline"], 2 if page.narrow else 4)
    return Picture(
        figure,
        (
            f"{model}: decode throughput, arms of one row in turns, median over rounds",
            "Diamond: the bytes that the arm reads for a token, at the copy bandwidth measured on the same device; "
            "percent: of that bandwidth",
            " / ".join(dict.fromkeys(_protocol(entry) for _, _, entry, _, _ in lines)),
            *source.making([source.records[key] for key in found]),
        ),
        found,
    )


def _label(method: str, setting: str, arm: str) -> str:
    return f"{method} {setting.split(', ')[-1]}: {arm}"


def _protocol(entry: Mapping[str, Any]) -> str:
    synthetic = ", random weights of the model's shapes" if entry["synthetic"] else ""
    return (
        f"Measured: {entry['device']}, {entry['dtype']}, batch {entry['batch']}, {entry['prompt']} + {entry['tokens']} "
        f"tokens, copy bandwidth {entry['copy_gb_s']:.4g} GB/s{synthetic}"
    )
