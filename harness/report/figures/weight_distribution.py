"""Figures 5 to 7: histograms of weights with the fitted Gaussian, and the KL divergence of every layer from it."""

from __future__ import annotations

from math import exp, pi, sqrt
from typing import Any

from harness.report.figures.canvas import NothingToDrawError, Picture, blank, log_axis, whole_ticks
from harness.report.figures.layers import kind
from harness.report.figures.source import Source
from harness.report.figures.style import INK, Page, series

PER_MODEL = True
_SPAN = 5.0  # standard deviations that the counts cover; harness/metrics/weight_distribution.py


def draw(source: Source, page: Page, model: str) -> Picture:
    """The closest, the middle and the farthest layer from its Gaussian, and the divergence of all layers."""
    found = [record for _, record in source.planned(model) if record.get("weights")]
    if not found:
        raise NothingToDrawError(f"no record of {model} with its weight distributions; --fresh measures them")
    layers = found[0]["weights"]
    known = {name: part for name, part in layers.items() if part["kl"] is not None}
    order = sorted(known, key=lambda name: known[name]["kl"])
    chosen = list(dict.fromkeys((order[0], order[len(order) // 2], order[-1])))
    across = 1 if page.narrow else 2
    panels = len(chosen) + 1
    down = -(-panels // across)
    figure, axes = blank(page, 1.55 * down + 0.2, down, across)
    for axis, name in zip(axes, chosen, strict=False):
        _histogram(axis, page, name, known[name])
    _divergences(axes[len(chosen)], page, known)
    handles, labels = axes[len(chosen)].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4 if page.narrow else 7)
    for axis in axes[panels:]:
        axis.set_axis_off()
    return Picture(
        figure,
        (
            f"{model}: weights of three layers in units of their standard deviation, with the fitted Gaussian (line)",
            "The layers with the smallest, the median and the largest divergence; last panel: all layers. KL in nats, "
            "from 50 bins of 0.2 standard deviations and both tails",
            *source.making(found[:1]),
        ),
        (found[0]["key"],),
    )


def _histogram(axis: Any, page: Page, name: str, part: dict[str, Any]) -> None:
    counts, width = part["counts"], 2 * _SPAN / len(part["counts"])
    total = sum(counts) + part["below"] + part["above"]
    centers = [-_SPAN + (place + 0.5) * width for place in range(len(counts))]
    axis.bar(centers, [count / total / width for count in counts], width, color="#9ecae1", linewidth=0)
    axis.plot(centers, [exp(-x * x / 2) / sqrt(2 * pi) for x in centers], color=INK)
    block = next((piece for piece in name.split(".") if piece.isdigit()), "?")
    axis.set_title(f"{kind(name)}, block {block}")
    axis.text(0.98, 0.95, f"KL {part['kl']:.3g} nats", transform=axis.transAxes, ha="right", va="top",
              fontsize=page.venue.tick)  # fmt: skip
    axis.set_xlim(-_SPAN, _SPAN)
    axis.set_xlabel("Weight / standard deviation")
    axis.set_ylabel("Density")


def _divergences(axis: Any, page: Page, layers: dict[str, Any]) -> None:
    names = tuple(dict.fromkeys(kind(name) for name in layers))
    looks = series(names)
    for name in names:
        own = [(name_, part) for name_, part in layers.items() if kind(name_) == name]
        axis.plot(
            range(len(own)), [part["kl"] for _, part in own], linestyle="none", marker=looks[name].marker,
            color=looks[name].colour, markersize=2.2 * page.scale, label=name,
        )  # fmt: skip
    values = [part["kl"] for part in layers.values()]
    log_axis(axis.yaxis, min(values), max(values))
    axis.set_title("all layers")
    axis.set_xlabel("Decoder block")
    whole_ticks(axis.xaxis)
    axis.set_ylabel("KL, nats")
    axis.grid(True, axis="y")
