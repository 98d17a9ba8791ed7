"""Panels of models: measured ones first, then the paper's, so that what was run stands beside what was claimed."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from harness.claims import find
from harness.report.figures.canvas import NothingToDrawError
from harness.report.figures.source import Source
from harness.report.records_view import distinct

Place = tuple[str, str]  # (setting, dataset)


@dataclass(frozen=True)
class Panel:
    """One model: measured values with their standard errors, and the paper's, by setting and corpus."""

    model: str
    measured: Mapping[Place, tuple[float, float]]
    paper: Mapping[Place, float]

    @property
    def title(self) -> str:
        return f"{self.model} ({'measured' if self.measured else 'paper'})"

    @property
    def values(self) -> list[float]:
        return [*(value for value, _ in self.measured.values()), *self.paper.values()]


def panels(source: Source, metric: str, method: str | None = None) -> list[Panel]:
    """A panel for every model with a number of `metric`; raises NothingToDrawError if nothing is measured."""
    rows = [row for row in source.measured(metric) if method in (None, row.method)]
    if not rows:
        raise NothingToDrawError(f"no measured {metric}")
    claims = [claim for claim in find(source.of_item, metric=metric) if method in (None, claim.method)]
    models = distinct((*(row.model for row in rows), *(claim.model for claim in claims)))
    return [
        Panel(
            model,
            {
                (row.setting, row.dataset): (row.measured or 0.0, row.stderr or 0.0)
                for row in rows
                if row.model == model
            },
            {(claim.setting, claim.dataset): claim.value for claim in claims if claim.model == model},
        )
        for model in models
    ]


def short(settings: Sequence[str], width: int = 11) -> list[str]:
    """Settings for tick labels: without the part that all share ("n_lut 3, "), wrapped."""
    heads = {setting.split(", ", 1)[0] for setting in settings}
    if len(heads) == 1 and all(", " in setting for setting in settings):
        settings = [setting.split(", ", 1)[1] for setting in settings]
    return ["\n".join(textwrap.wrap(setting, width)) for setting in settings]
