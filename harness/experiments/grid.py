"""Grids in an experiment file: rows that stand for every combination of option values, and for every seed.

    rows:
      - {method: gptq, setting: "", label: GPTQ, grid: {bits: [2, 3, 4], group_size: [64, 128]}}
    seeds: [0, 1, 2]

are 18 rows for each of the experiment's models: "bits=2 group_size=64 seed=0" and so on. The row of the unquantized
model stays one: nothing is drawn there.
"""

from __future__ import annotations

from itertools import product
from typing import Any

from harness.spec import UNQUANTIZED
from kernels.errors import InputError


def expand(content: dict[str, Any], where: str) -> dict[str, Any]:
    """`content` of an experiment file with plain rows in place of `grid` and `seeds`.

    Raises InputError, beginning with `where`, for a grid that is none; whatever else is wrong is left to validation.
    """
    rows, seeds = content.get("rows"), content.get("seeds")
    if not isinstance(rows, list):
        return content
    if seeds is not None and not (_is_filled(seeds) and all(type(seed) is int and seed >= 0 for seed in seeds)):
        raise InputError(f"{where}: seeds={seeds!r}; must be a list of whole numbers from 0, such as [0, 1, 2]")
    plain = [one for number, row in enumerate(rows) for one in _combinations(row, f"{where}: rows.{number}")]
    if seeds is not None:
        plain = [one for row in plain for one in _seeded(row, seeds)]
    return {**{key: value for key, value in content.items() if key != "seeds"}, "rows": plain}


def _seeded(row: Any, seeds: list[int]) -> list[Any]:
    """`row` with each seed, if seeds can make a difference."""
    if not isinstance(row, dict) or row.get("method") == UNQUANTIZED:
        return [row]
    return [_with(row, {"seed": seed}, seed=seed) for seed in seeds]


def _combinations(row: Any, where: str) -> list[Any]:
    """The rows that `row` stands for; itself, if it has no grid."""
    if not isinstance(row, dict) or "grid" not in row:
        return [row]
    grid, rest = row["grid"], {key: value for key, value in row.items() if key != "grid"}
    options = rest.get("options", {})
    if not (isinstance(grid, dict) and grid and isinstance(options, dict)):
        raise InputError(f"{where}.grid={grid!r}; must give options lists of values, such as {{bits: [2, 3]}}")
    for name, values in grid.items():
        if not _is_filled(values):
            raise InputError(f"{where}.grid.{name}={values!r}; must be a list of values, such as [2, 3]")
        if name in options:
            raise InputError(f"{where}: {name!r} stands under both options and grid; leave it out of one")
    combinations = [dict(zip(grid, values, strict=True)) for values in product(*grid.values())]
    return [_with(rest, values, options={**options, **values}) for values in combinations]


def _with(row: dict[str, Any], named: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """`row` with `changes`, and what is `named` added to its setting."""
    words = [str(row.get("setting", "")), *(f"{name}={value}" for name, value in named.items())]
    return {**row, **changes, "setting": " ".join(word for word in words if word)}


def _is_filled(values: Any) -> bool:
    return isinstance(values, list) and len(values) > 0
