"""How figures look: sizes and type of the venues, one colour and marker a method, nothing that needs colour alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from kernels.errors import InputError, did_you_mean


@dataclass(frozen=True)
class Venue:
    """Widths in inches, type sizes in points. column: one of a two-column page, or half of a single one."""

    column: float
    page: float
    label: float
    tick: float
    line: float
    font: str


VENUES = {
    # NeurIPS sets one column of 5.5 in: "column" is a figure that shares the line with another.
    "neurips": Venue(2.7, 5.5, 8.0, 7.0, 1.0, "STIXGeneral"),
    "icml": Venue(3.25, 6.75, 8.0, 7.0, 1.0, "STIXGeneral"),
    "acl": Venue(3.03, 6.3, 8.5, 7.5, 1.0, "STIXGeneral"),
    "slides": Venue(6.0, 12.0, 17.0, 15.0, 2.2, "DejaVu Sans"),
}
WIDTHS = ("column", "page")


@dataclass(frozen=True)
class Page:
    """The venue and the width that a figure is drawn for."""

    venue: Venue
    narrow: bool

    @property
    def width(self) -> float:
        """Inches."""
        return self.venue.column if self.narrow else self.venue.page

    @property
    def scale(self) -> float:
        """Heights and marks grow with the type: 1 for a paper of 8 pt labels."""
        return self.venue.label / 8.0


def page(style: str = "neurips", width: str = "page") -> Page:
    """The page for a style and a width by name. Raises InputError with suggestions."""
    if style not in VENUES:
        raise InputError(f"unknown style {style!r}{did_you_mean(style, VENUES)}")
    if width not in WIDTHS:
        raise InputError(f"unknown width {width!r}; use {' or '.join(WIDTHS)}")
    return Page(VENUES[style], width == "column")


@dataclass(frozen=True)
class Mark:
    """One method's colour, marker and hatching: any of the three tells it from the others."""

    colour: str
    marker: str
    hatch: str


# Colours of Okabe and Ito, told apart with every common kind of colour blindness; black is the unquantized model.
_MARKS = {
    "fp16": Mark("#000000", "*", ""),
    "rtn": Mark("#7f7f7f", "X", "...."),
    "gptq": Mark("#0072b2", "o", "////"),
    "awq": Mark("#56b4e9", "s", "----"),
    "binary": Mark("#999999", "P", "++++"),
    "pb-llm": Mark("#cc79a7", "^", "xxxx"),
    "billm": Mark("#e69f00", "v", "\\\\\\\\"),
    "sage-ptq": Mark("#d55e00", "D", ""),
    "slim-llm": Mark("#009e73", "<", "||||"),
    "slim-llm-plus": Mark("#006d50", ">", "oooo"),
    "mg-ptq": Mark("#b3a600", "h", "OOOO"),
    "sage-x": Mark("#5b2a86", "p", "****"),
}
_SPARE = (Mark("#8c564b", "8", "//"), Mark("#3b6f6f", "H", "\\\\"), Mark("#a05195", "d", "xx"))
# Neutral series (corpora, roles of bytes): dark to light, with a hatch each.
SERIES = (
    Mark("#0072b2", "o", ""), Mark("#e69f00", "s", "////"), Mark("#009e73", "^", "...."), Mark("#cc79a7", "v", "xxxx"),
    Mark("#56b4e9", "D", "\\\\\\\\"), Mark("#d55e00", "P", "||||"), Mark("#7f7f7f", "X", "----"),
    Mark("#b3a600", "h", "++++"),
)  # fmt: skip
INK = "#000000"
PAPER = "#ffffff"
SOFT = "#595959"
GRID = "#d9d9d9"


def mark(method: str) -> Mark:
    """The mark of a method by its registry name; of one outside this list always the same spare one."""
    return _MARKS.get(method) or _SPARE[sum(method.encode()) % len(_SPARE)]


def series(names: Sequence[str]) -> Mapping[str, Mark]:
    """A mark for each of `names` in order."""
    return {name: SERIES[place % len(SERIES)] for place, name in enumerate(names)}


@contextmanager
def typography(page: Page) -> Iterator[None]:
    """matplotlib's settings for `page`, whatever the user's own are."""
    import matplotlib

    venue = page.venue
    settings: dict[str, Any] = {
        "font.family": venue.font,
        "mathtext.fontset": "stix" if venue.font.startswith("STIX") else "dejavusans",
        "font.size": venue.label,
        "axes.labelsize": venue.label,
        "axes.titlesize": venue.label,
        "axes.titlepad": 4.0 * page.scale,
        "legend.fontsize": venue.tick,
        "xtick.labelsize": venue.tick,
        "ytick.labelsize": venue.tick,
        "lines.linewidth": venue.line,
        "lines.markersize": 4.5 * page.scale,
        "patch.linewidth": 0.6 * page.scale,
        "hatch.linewidth": 0.5 * page.scale,
        "axes.linewidth": 0.6 * page.scale,
        "grid.linewidth": 0.4 * page.scale,
        "grid.color": GRID,
        "xtick.major.width": 0.6 * page.scale,
        "ytick.major.width": 0.6 * page.scale,
        "xtick.minor.width": 0.4 * page.scale,
        "ytick.minor.width": 0.4 * page.scale,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "legend.frameon": False,
        "legend.handlelength": 1.4,
        "legend.columnspacing": 1.2,
        # TrueType outlines in the PDF; in SVG letters become paths, so no reader needs the font.
        "pdf.fonttype": 42,
        "svg.fonttype": "path",
        "svg.hashsalt": "sagebench",
        "pdf.compression": 9,
    }
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(settings)  # type: ignore[arg-type]
        yield
