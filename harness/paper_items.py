"""What the paper numbers, and the experiment file that reproduces it. Needs no torch: reports use it too."""

from __future__ import annotations

import re
from pathlib import Path

from kernels.errors import InputError

_EXPERIMENTS = Path(__file__).resolve().parent / "experiments"


def experiments_of_paper() -> dict[str, str]:
    """ "table 1" to "table1", "figure 6" to "figure5-7": tables first, then figures, by number."""
    found: dict[tuple[bool, int], tuple[str, str]] = {}
    for path in _EXPERIMENTS.glob("*.yaml"):
        match = re.fullmatch(r"(table|figure)(\d+)(?:-(\d+))?", path.stem)
        if match is None:
            continue
        first, last = int(match[2]), int(match[3] or match[2])
        for number in range(first, last + 1):
            found[match[1] == "figure", number] = (f"{match[1]} {number}", path.stem)
    return dict(found[place] for place in sorted(found))


def experiment_of(table: int | None, figure: int | None) -> str | None:
    """The experiment of a table or a figure; None if neither is asked for. Raises InputError if there is none."""
    if table is None and figure is None:
        return None
    kind, number = ("table", table) if table is not None else ("figure", figure)
    known = experiments_of_paper()
    if f"{kind} {number}" not in known:
        numbers = ", ".join(item.split()[1] for item in known if item.startswith(kind))
        raise InputError(f"{kind} {number} is unknown; known: {numbers}")
    return known[f"{kind} {number}"]
