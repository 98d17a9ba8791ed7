"""The plan of a table: which rows it has, and which run fills each.

The plan is made when the runs are started and saved beside them, so that a table can be rendered again later from
the plan and the records alone, without loading a model or asking the method registry anything.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from kernels.atomic import write_text
from kernels.errors import InputError, did_you_mean

FORMAT = 1
# Names become file names and keys stand in file headers: nothing that could leave a folder or end a comment.
_PLAIN = re.compile(r"[0-9A-Za-z][0-9A-Za-z_.-]*")


@dataclass(frozen=True)
class PlannedRow:
    """One (method, setting, model) of a table."""

    method: str  # registry name, as the claims have it: "sage-ptq"
    setting: str  # as the claims have it: "n_lut 4"
    label: str  # what the Method column shows: "SAGE-PTQ"; "" shows `method`
    model: str
    family: str | None  # the claims' family for bit counts ("OPT"); None: bit counts stand under the model, or nowhere
    run_key: str | None  # None: not run
    note: str  # why it was not run, or anything to say; "" if nothing

    def __post_init__(self) -> None:
        _check_fields(self, texts=("method", "model"), maybe_empty=("setting", "label", "note"))
        for name in ("family", "run_key"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, str) and value):
                raise InputError(f"planned row {self.method!r}: {name}={value!r} must be a text or null")
        if self.run_key is not None and not _PLAIN.fullmatch(self.run_key):
            raise InputError(f"planned row {self.method!r}: run_key={self.run_key!r} must be letters, digits, _ . -")


@dataclass(frozen=True)
class TablePlan:
    """All rows of one table, in the order in which it shows them."""

    name: str  # file stem: "table1"
    item: str  # the item in the claims: "table 1"
    title: str
    metric: str  # "perplexity"
    datasets: tuple[str, ...]  # the datasets asked for, as the claims call them: ("wikitext2",)
    rows: tuple[PlannedRow, ...]
    notes: tuple[str, ...] = ()  # facts for the caption: substitutions, profile
    figures: tuple[str, ...] = ()  # what is drawn from the runs: names of harness.report.figures

    def __post_init__(self) -> None:
        _check_fields(self, texts=("name", "item", "title", "metric"), maybe_empty=())
        if not _PLAIN.fullmatch(self.name):
            raise InputError(f"table plan: name={self.name!r} must be letters, digits, _ . - (it names files)")
        for name in ("datasets", "notes", "figures"):
            values = getattr(self, name)
            if not isinstance(values, tuple) or not all(isinstance(value, str) and value for value in values):
                raise InputError(f"table plan {self.name!r}: {name}={values!r} must be a list of texts")
        if not self.datasets:
            raise InputError(f"table plan {self.name!r}: datasets is empty; name at least one, such as wikitext2")
        seen: set[tuple[str, str, str]] = set()
        for row in self.rows:
            place = (row.method, row.setting, row.model)
            if place in seen:
                raise InputError(f"table plan {self.name!r}: two rows for method, setting, model {place}")
            seen.add(place)

    @property
    def run_keys(self) -> tuple[str, ...]:
        """The keys of the runs that fill this table, each once, in row order."""
        return tuple(dict.fromkeys(row.run_key for row in self.rows if row.run_key is not None))

    def to_json(self) -> str:
        """This plan as JSON text; equal plans give equal bytes."""
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> TablePlan:
        """The plan that `to_json` wrote. Raises InputError for anything else."""
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise InputError(f"table plan is not JSON: {error}") from None
        if not isinstance(data, dict):
            raise InputError("table plan must be a JSON object")
        version = data.pop("format", None)
        if version != FORMAT:
            raise InputError(f"table plan: format={version!r}, must be {FORMAT}")
        _check_keys(cls, data, "table plan", optional=("notes", "figures"))
        data["rows"] = tuple(_row(row, number) for number, row in enumerate(_list(data, "rows"), start=1))
        data["datasets"] = tuple(_list(data, "datasets"))
        for name in ("notes", "figures"):
            data[name] = tuple(_list(data, name)) if name in data else ()
        return cls(**data)

    def save(self, path: Path) -> None:
        """Write the plan to `path`, whole or not at all."""
        write_text(Path(path), self.to_json())

    @classmethod
    def load(cls, path: Path) -> TablePlan:
        """Read a plan from `path`. Raises InputError naming the file if it is missing or not a plan."""
        try:
            return cls.from_json(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"table plan {path} cannot be read: {error}") from None
        except InputError as error:
            raise InputError(f"{path}: {error}") from None


def _row(data: Any, number: int) -> PlannedRow:
    where = f"table plan row {number}"
    if not isinstance(data, dict):
        raise InputError(f"{where} must be a JSON object")
    _check_keys(PlannedRow, data, where, optional=())
    return PlannedRow(**data)


def _list(data: Mapping[str, Any], name: str) -> list[Any]:
    if not isinstance(data[name], list):
        raise InputError(f"table plan: {name} must be a list")
    return data[name]


def _check_keys(cls: type, data: Mapping[str, Any], where: str, optional: tuple[str, ...]) -> None:
    known = [field.name for field in fields(cls)]
    for key in data:
        if key not in known:
            raise InputError(f"{where}: unknown key {key!r}{did_you_mean(key, known)}")
    missing = [name for name in known if name not in data and name not in optional]
    if missing:
        raise InputError(f"{where}: missing {', '.join(missing)}")


def _check_fields(item: object, texts: tuple[str, ...], maybe_empty: tuple[str, ...]) -> None:
    kind = "planned row" if isinstance(item, PlannedRow) else "table plan"
    for name in (*texts, *maybe_empty):
        value = getattr(item, name)
        if not isinstance(value, str) or (name in texts and not value):
            raise InputError(f"{kind}: {name}={value!r} must be a text{'' if name in maybe_empty else ', not empty'}")
