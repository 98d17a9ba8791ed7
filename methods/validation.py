"""One line for what pydantic found wrong: the field, its value, and what would be right."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

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
        fields = model.model_fields if len(first["loc"]) == 1 else {}
        return f"unknown option {path!r}" + did_you_mean(key, fields)
    if first["type"] == "missing":
        return f"{path} is missing"
    message = first["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    return f"{path}={first['input']!r}: {message}" if path else message
