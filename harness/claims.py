"""What papers print, as data: the csv files of results/claims, loaded and checked.

A claim is one printed number. Its value is never corrected; a misprint has a note. results/claims/README.md says
what the columns mean.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from kernels.errors import InputError

CLAIMS_FOLDER = Path(__file__).resolve().parent.parent / "results" / "claims"
BIT_METRICS = ("weight_bits", "scale_bits")
_REQUIRED = ("source", "item", "model", "method", "metric")


@dataclass(frozen=True)
class Claim:
    """One number that a paper prints."""

    source: str
    item: str  # "table 1"
    model: str  # the model, or for bit counts its family
    method: str
    setting: str  # "3 bit g128"; "" where the paper does not say
    metric: str  # "perplexity"; the unit is the metric's own
    dataset: str  # "" where the metric has none
    value: float
    note: str

    @property
    def identity(self) -> tuple[str, ...]:
        """What a claims file may hold only once."""
        return (self.source, self.item, self.model, self.method, self.setting, self.metric, self.dataset)


COLUMNS = tuple(field.name for field in fields(Claim))


def load_claims(path: Path | None = None) -> tuple[Claim, ...]:
    """The claims of one csv file in its own order; by default those of all files of results/claims, by file name.

    Raises InputError naming the file and the line if a column is missing or unknown, a needed cell is empty,
    a value is not a finite number, or a claim is there twice.
    """
    if path is None:
        return tuple(claim for file in sorted(CLAIMS_FOLDER.glob("*.csv")) for claim in load_claims(file))
    path = Path(path)
    try:
        # "utf-8-sig": a spreadsheet that saved the file may have put a byte order mark in front of it.
        with path.open(encoding="utf-8-sig", newline="") as file:
            return _parse(file, path)
    except FileNotFoundError:
        raise InputError(f"claims file {path} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"claims file {path} cannot be read: {error}") from None


def _parse(file: Iterable[str], path: Path) -> tuple[Claim, ...]:
    reader = csv.reader(file, strict=True)
    claims: list[Claim] = []
    first_seen: dict[tuple[str, ...], int] = {}
    try:
        _check_header(next(reader, []), path)
        for cells in reader:
            if not cells:
                continue
            claim = _claim(cells, f"{path} line {reader.line_num}")
            if claim.identity in first_seen:
                raise InputError(f"{path} line {reader.line_num}: repeats line {first_seen[claim.identity]}")
            first_seen[claim.identity] = reader.line_num
            claims.append(claim)
    except csv.Error as error:
        raise InputError(f"{path} line {reader.line_num}: not a csv line: {error}") from None
    return tuple(claims)


def _check_header(header: Sequence[str], path: Path) -> None:
    if tuple(header) == COLUMNS:
        return
    unknown = [name for name in header if name not in COLUMNS]
    missing = [name for name in COLUMNS if name not in header]
    problem = f"unknown columns {unknown}, " if unknown else ""
    problem += f"missing columns {missing}, " if missing else ""
    raise InputError(f"{path} line 1: {problem}the header must be {','.join(COLUMNS)}")


def _claim(cells: Sequence[str], where: str) -> Claim:
    if len(cells) != len(COLUMNS):
        raise InputError(f"{where}: {len(cells)} cells, must be {len(COLUMNS)}: {','.join(COLUMNS)}")
    row = dict(zip(COLUMNS, cells, strict=True))
    for name in _REQUIRED:
        if not row[name].strip():
            raise InputError(f"{where}: {name} is empty")
    printed = row.pop("value")
    try:
        value = float(printed)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise InputError(f"{where}: value={printed!r} is not a finite number")
    return Claim(value=value, **row)


def find(
    claims: Iterable[Claim],
    *,
    item: str | None = None,
    model: str | None = None,
    method: str | None = None,
    setting: str | None = None,
    metric: str | None = None,
    dataset: str | None = None,
) -> tuple[Claim, ...]:
    """The claims that have every value given, in file order; None stands for any."""
    asked = {"item": item, "model": model, "method": method, "setting": setting, "metric": metric, "dataset": dataset}
    wanted = {name: value for name, value in asked.items() if value is not None}
    return tuple(claim for claim in claims if all(getattr(claim, name) == value for name, value in wanted.items()))


def bit_families(claims: Iterable[Claim], item: str) -> tuple[str, ...]:
    """The families under which an item prints its bit counts ("LLaMA", "LLaMA-2", ...), in file order.

    A name that also has other numbers, as in table 7, is a model and not a family.
    """
    of_item = find(claims, item=item)
    models = {claim.model for claim in of_item if claim.metric not in BIT_METRICS}
    named = (claim.model for claim in of_item if claim.metric in BIT_METRICS and claim.model not in models)
    return tuple(dict.fromkeys(named))


def family_of(model: str, families: Iterable[str]) -> str | None:
    """The family a model belongs to by its name: the longest of `families` that it starts with, or None.

    "LLaMA-2-7B" is of "LLaMA-2" and not of "LLaMA".
    """
    return max((name for name in families if model.startswith(f"{name}-")), key=len, default=None)
