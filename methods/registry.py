"""Method names to classes.

Built-in methods are named here as "module:Class" and imported on first use. Other packages add theirs through the
entry-point group `sagebench.methods`, or by the decorator `@register_method("name")`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from typing import Any, TypeVar

from kernels.errors import InputError, did_you_mean
from methods.base import MethodConfig, Provenance, QuantizationMethod
from methods.validation import validated

ENTRY_POINT_GROUP = "sagebench.methods"

_BUILTIN: dict[str, str] = {
    "fp16": "methods.fp16:Fp16",
    "rtn": "methods.rtn:Rtn",
    "awq": "methods.awq:Awq",
    "gptq": "methods.gptq:Gptq",
    "binary": "methods.binary:Binary",
    "pb-llm": "methods.pb_llm:PbLlm",
    "billm": "methods.billm:Billm",
    "slim-llm": "methods.slim_llm:SlimLlm",
    "slim-llm-plus": "methods.slim_llm:SlimLlmPlus",
    "mg-ptq": "methods.mg_ptq:MgPtq",
    "cmpq": "methods.cmpq:Cmpq",
    "aptq": "methods.aptq:Aptq",
    "micromix": "methods.micromix:MicroMix",
    "sage-ptq": "methods.sage_ptq:SagePtq",
}
_registered: dict[str, type[QuantizationMethod]] = {}

M = TypeVar("M", bound=type[QuantizationMethod])


@dataclass(frozen=True)
class MethodInfo:
    """A registered method as `list_methods` shows it."""

    name: str
    provenance: Provenance
    config: type[MethodConfig]


def register_method(name: str) -> Callable[[M], M]:
    """Class decorator: make a QuantizationMethod subclass available as `name`."""

    def register(cls: M) -> M:
        _check_class(name, cls)
        taken = _registered.get(name)
        # A module that is imported anew (in a notebook) registers what is the same class to its author.
        same = taken is None or (taken.__module__, taken.__qualname__) == (cls.__module__, cls.__qualname__)
        if name in _BUILTIN or not same:
            raise InputError(f"method name {name!r} is taken; register under another name")
        cls.name = name
        _registered[name] = cls
        return cls

    return register


def method_class(name: str) -> type[QuantizationMethod]:
    """The class registered as `name`, imported now if need be. Raises InputError for an unknown name."""
    if name in _registered:
        return _registered[name]
    if name in _BUILTIN:
        module, _, attribute = _BUILTIN[name].partition(":")
        cls = getattr(importlib.import_module(module), attribute)
    else:
        points = _entry_points()
        if name not in points:
            raise InputError(f"unknown method {name!r}" + did_you_mean(name, method_names()))
        try:
            cls = points[name].load()
        except (Exception, SystemExit) as error:  # a plug-in may fail in any way; its name must be in the message
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            where = f"method {name!r} of {points[name].value!r}"
            raise InputError(f"{where} cannot be imported ({reason}); repair or uninstall its package") from error
    _check_class(name, cls)
    cls.name = name
    _registered[name] = cls
    return cls


def method_names() -> list[str]:
    """Every registered name, without importing anything."""
    return sorted({*_BUILTIN, *_registered, *_entry_points()})


def builtin_method_names() -> list[str]:
    """The methods of this project, without those of other packages."""
    return sorted(_BUILTIN)


def list_methods() -> list[MethodInfo]:
    """Every registered method with its provenance and options; those of broken plug-ins are left out."""
    broken = broken_methods()
    classes = {name: method_class(name) for name in method_names() if name not in broken}
    return [MethodInfo(name, cls.provenance, cls.Config) for name, cls in classes.items()]


def broken_methods() -> dict[str, str]:
    """Methods that are registered and cannot be used, by name, and what is wrong with each."""
    broken = {}
    for name in method_names():
        try:
            method_class(name)
        except InputError as error:
            broken[name] = str(error)
    return broken


def create_method(name: str, /, **options: Any) -> QuantizationMethod:
    """The method `name` with `options`. Raises InputError for an unknown name or option, or a value out of range."""
    cls = method_class(name)
    return cls(validated(cls.Config, options, f"method {name!r}"))


def _entry_points() -> dict[str, metadata.EntryPoint]:
    return {point.name: point for point in metadata.entry_points(group=ENTRY_POINT_GROUP)}


def _check_class(name: str, cls: Any) -> None:
    if not (isinstance(cls, type) and issubclass(cls, QuantizationMethod)):
        raise InputError(f"method {name!r} is {cls!r}; it must be a subclass of methods.QuantizationMethod")
    if not isinstance(getattr(cls, "provenance", None), Provenance):
        raise InputError(f"method {name!r}: class {cls.__name__} has no `provenance`")
