"""One line for what pydantic found wrong: the field, its value, and what would be right."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from kernels.errors import InputError, did_you_mean

M = TypeVar("M", bound=BaseModel)


def validated(model: type[M], values: Mapping[str, Any], where: str) -> M:
    """`values` as an instance of `model`. Raises InputError, beginning with `where`, for the first thing wrong."""
    try:
        return model(**values)
    except ValidationError as error:
        raise InputError(f"{where}: {explain(error, model)}") from None


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """The first problem of `error` in one line; an unknown key comes with suggestions."""
    first = error.errors()[0]
    path = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        key = str(first["loc"][-1])
        return f"unknown option {path!r}" + did_you_mean(key, _fields_beside(model, first["loc"]))
    if first["type"] == "missing":
        return f"{path} is missing"
    message = first["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    return f"{path}={first['input']!r}: {message}" if path else message


def _fields_beside(model: type[BaseModel], path: tuple[int | str, ...]) -> list[str]:
    """Names of the fields that stand where the last part of `path` does, in `model` or in a model inside it."""
    for part in path[:-1]:
        if part not in model.model_fields:  # a place in a list, or a key of a mapping
            continue
        annotation = model.model_fields[part].annotation
        # For Python 3.10 `dict[str, Entry]` is a type too, and no class.
        inner = [kind for kind in (annotation, *get_args(annotation)) if isinstance(kind, type) and not get_args(kind)]
        model = next(kind for kind in inner if issubclass(kind, BaseModel))
    return list(model.model_fields)
