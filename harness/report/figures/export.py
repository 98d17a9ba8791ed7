"""Write pictures as files: PDF, SVG or PNG, the same bytes for the same records, and a LaTeX float with the caption."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from harness.report.figures import DRAWINGS
from harness.report.figures.canvas import NothingToDrawError, Picture
from harness.report.figures.source import Source
from harness.report.figures.style import Page, typography
from harness.report.latex import escape_latex
from harness.report.measured_table import slug
from kernels.atomic import atomic_path, write_text
from kernels.errors import InputError, did_you_mean

FORMATS = ("pdf", "svg", "png")
_DPI = 300


@dataclass(frozen=True)
class Drawn:
    """A picture in the formats asked for. name: file stem, label of the LaTeX float, anchor in the HTML report."""

    name: str
    title: str
    caption: tuple[str, ...]
    run_keys: tuple[str, ...]
    files: dict[str, bytes]
    narrow: bool = False  # drawn for one column


def check_formats(formats: Sequence[str]) -> None:
    """Raise InputError for a format that is not written."""
    for name in formats:
        if name not in FORMATS:
            raise InputError(f"unknown figure format {name!r}{did_you_mean(name, FORMATS)}; use {', '.join(FORMATS)}")
    if not formats:
        raise InputError(f"no figure format; use {', '.join(FORMATS)}")


def draw_figures(source: Source, page: Page, formats: Sequence[str], missing: list[str]) -> Iterator[Drawn]:
    """Every figure of a plan. What cannot be drawn from the records is named in `missing`."""
    check_formats(formats)
    for drawing in source.plan.figures:
        if drawing not in DRAWINGS:
            raise InputError(f"plan {source.plan.name!r}: unknown figure {drawing!r}{did_you_mean(drawing, DRAWINGS)}")
        module = import_module(f"harness.report.figures.{DRAWINGS[drawing]}")
        for model in source.models if module.PER_MODEL else (None,):
            name = _name(source, drawing, model)
            try:
                with typography(page):
                    picture = module.draw(source, page) if model is None else module.draw(source, page, model)
                    files = {ending: _bytes(picture, ending) for ending in formats}
            except NothingToDrawError as error:
                missing.append(f"figure {name} is not drawn: {error}")
                continue
            yield Drawn(name, source.plan.title, picture.caption, picture.run_keys, files, page.narrow)


def write_figure(drawn: Drawn, folder: Path) -> list[Path]:
    """Write the files of a figure into `folder`, and `<name>.tex`, a float that includes the PDF."""
    paths = []
    for ending, content in drawn.files.items():
        path = folder / f"{drawn.name}.{ending}"
        with atomic_path(path) as part:
            part.write_bytes(content)
        paths.append(path)
    if "pdf" in drawn.files:
        write_text(folder / f"{drawn.name}.tex", latex_float(drawn))
        paths.append(folder / f"{drawn.name}.tex")
    return paths


def caption(drawn: Drawn) -> str:
    """The caption as one text of whole sentences."""
    return " ".join(part if part.endswith(".") else f"{part}." for part in drawn.caption)


def latex_float(drawn: Drawn) -> str:
    """A figure environment; the picture has the width that it was drawn for and must not be scaled."""
    float_ = "figure" if drawn.narrow else "figure*"
    return "\n".join(
        [
            "% Generated from run records; `sagebench report` makes it again.",
            f"% Runs: {', '.join(drawn.run_keys)}",
            r"% Needs \usepackage{graphicx}.",
            rf"\begin{{{float_}}}[t]",
            r"\centering",
            rf"\includegraphics{{{drawn.name}}}",
            rf"\caption{{{escape_latex(caption(drawn))}}}",
            rf"\label{{fig:{drawn.name}}}",
            rf"\end{{{float_}}}",
            "",
        ]
    )


def _name(source: Source, drawing: str, model: str | None) -> str:
    """ "figure3" where the plan is that figure; else plan and drawing; the model where there are several."""
    stem = source.plan.name
    if not (stem.startswith("figure") and drawing == source.plan.figures[0]):
        stem = f"{stem}-{drawing}"
    return stem if model is None or len(source.models) == 1 else f"{stem}-{slug(model)}"


def _bytes(picture: Picture, ending: str) -> bytes:
    """The picture as a file: no date, no host, no random identifiers; the run keys travel inside it."""
    runs = f"runs {', '.join(picture.run_keys)}"
    title = picture.caption[0]
    metadata = {
        "pdf": {"Title": title, "Keywords": runs, "CreationDate": None, "Creator": "sagebench", "Producer": None},
        "svg": {"Title": title, "Description": runs, "Date": None, "Creator": "sagebench"},
        "png": {"Title": title, "Description": runs, "Software": "sagebench"},
    }[ending]
    target = io.BytesIO()
    picture.figure.savefig(target, format=ending, dpi=_DPI, metadata=metadata, facecolor="white")
    return target.getvalue()
