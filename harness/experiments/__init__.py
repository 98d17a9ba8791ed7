"""Experiments and profiles as data: YAML files beside this module, validated, unknown keys refused."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from harness.experiments.grid import expand
from harness.report.figures import DRAWINGS
from kernels.errors import InputError, did_you_mean
from methods.validation import explain


class _Data(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Row(_Data):
    """A row of a table: a method with options, under the name that the claims give it. ours: the paper lacks it.
    runtime: how it is run where speed is measured, options of harness.spec.DecodeSpec. seed: of its calibration and its
    method, in place of the command line's; see grid.py. budgets: one row for each budget of the experiment, as the
    method's option `budget`."""

    method: str
    setting: str
    label: str
    options: dict[str, Any] = {}
    note: str = ""
    ours: bool = False
    seed: int | None = None
    runtime: dict[str, Any] = {}
    budgets: bool = False

    @property
    def names(self) -> set[str]:
        """What chooses it on a command line: its method, or that and its setting for it alone, "sage-ptq n_lut 3"."""
        return {self.method, f"{self.method} {self.setting}".strip()}


class Experiment(_Data):
    """A table or figure of the paper. models, corpora, tasks: names of the catalogue. notes: what stands in every
    caption. figures: what is drawn from its runs, names of harness.report.figures. budgets: bits per weight for the
    rows that have one budget each."""

    name: str
    item: str
    title: str
    metric: Literal[
        "perplexity", "accuracy", "quantization_minutes", "gpu_occupancy_percent", "gpu_memory_gb", "token_latency_ms"
    ]
    corpora: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    decode: dict[str, Any] = {}
    models: tuple[str, ...] = Field(min_length=1)
    rows: tuple[Row, ...] = Field(min_length=1)
    budgets: tuple[float, ...] = ()
    notes: tuple[str, ...] = ()
    figures: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _has_something_to_measure(self) -> Experiment:
        kind = {"accuracy": "tasks", "token_latency_ms": "decode"}.get(self.metric, "corpora")
        for name in ("corpora", "tasks", "decode"):
            if name == kind and not getattr(self, name):
                raise ValueError(f"{name}=[]: a table of {self.metric} needs at least one")
            if name != kind and getattr(self, name):
                raise ValueError(f"{name}={list(getattr(self, name))}: a table of {self.metric} has none")
        for figure in self.figures:
            if figure not in DRAWINGS:
                raise ValueError(f"figures: unknown figure {figure!r}{did_you_mean(figure, DRAWINGS)}")
        if any(row.budgets for row in self.rows) and not self.budgets:
            raise ValueError("budgets=[]: a row wants one run for each budget")
        return self

    def with_budgets(self, budgets: tuple[float, ...]) -> Experiment:
        """This experiment with a row for each of `budgets` (its own if none are given) where a row asks for them.

        Raises InputError for budgets where no row asks for them.
        """
        if budgets and not any(row.budgets for row in self.rows):
            raise InputError(f"--budgets: no row of {self.name} has a budget")
        rows: list[Row] = []
        for row in self.rows:
            rows += [_at_budget(row, budget) for budget in budgets or self.budgets] if row.budgets else [row]
        return self.model_copy(update={"rows": tuple(rows)})


def _at_budget(row: Row, budget: float) -> Row:
    setting = row.setting.replace("{budget}", f"{budget:g}")
    options = {**row.options, "budget": budget}
    return row.model_copy(update={"setting": setting, "options": options, "budgets": False})


class CalibrationDefaults(_Data):
    corpus: str
    samples: int = Field(ge=1)
    context: int = Field(ge=2)


class Profile(_Data):
    """Defaults of a profile. models: "paper" for the experiment's own. windows, limit (examples of a zero-shot task):
    None for all. options: by method."""

    models: Literal["paper"] | tuple[str, ...]
    dtype: Literal["float32", "float16", "bfloat16"]
    windows: int | None = Field(ge=1)
    limit: int | None = Field(ge=1)
    calibration: CalibrationDefaults
    options: dict[str, dict[str, Any]] = {}


def experiment_names() -> list[str]:
    """Names of the experiments that come with the package."""
    found = (file.name for file in files(__package__).iterdir() if file.name.endswith(".yaml"))
    return sorted(name.removesuffix(".yaml") for name in found if name != "profiles.yaml")


def load_experiment(name: str) -> Experiment:
    """An experiment by name, or from a YAML file of the user's. Raises InputError for what is unknown or invalid."""
    if name.endswith((".yaml", ".yml")):
        path = Path(name)
        try:
            return _parse(path.read_text(encoding="utf-8"), str(path))
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"experiment file {path} cannot be read ({error})") from error
    if f"{name}-table" in experiment_names():
        name = f"{name}-table"  # "slim-llm" for short
    if name not in experiment_names():
        raise InputError(f"unknown experiment {name!r}" + did_you_mean(name, experiment_names()))
    return _parse(files(__package__).joinpath(f"{name}.yaml").read_text(encoding="utf-8"), f"{name}.yaml")


def load_profile(name: str) -> Profile:
    """A profile by name: "embedded" or "paper"."""
    profiles = yaml.safe_load(files(__package__).joinpath("profiles.yaml").read_text(encoding="utf-8"))
    if name not in profiles:
        raise InputError(f"unknown profile {name!r}" + did_you_mean(name, [*profiles, "auto"]))
    return Profile.model_validate(profiles[name])


def _parse(text: str, where: str) -> Experiment:
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"{where} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise InputError(f"{where} must hold name, item, title, metric, corpora or tasks, models and rows")
    try:
        return Experiment.model_validate(expand(content, where))
    except ValidationError as error:
        raise InputError(f"{where}: {explain(error, Experiment)}") from None
