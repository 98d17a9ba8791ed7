"""Packed weights in one safetensors file.

Tensor `t` of weight `name` is stored under `name.t`; the file's header carries the layout and the format parameters
of each weight. safetensors is the only format read or written: nothing is ever unpickled.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from kernels.errors import InputError
from kernels.layouts.base import PackedWeight, layout_class
from kernels.tensor_files import save_tensors

FORMAT_VERSION = 1
_HEADER = "sagebench"


def save_packed(path: Path, weights: Mapping[str, PackedWeight]) -> None:
    """Write `weights` (name to packed weight) to `path`, whole or not at all."""
    described: dict[str, dict[str, Any]] = {}
    tensors = {}
    for name, weight in weights.items():
        described[name] = {"layout": weight.layout, **weight.metadata(), "tensors": sorted(weight.tensors())}
        for key, tensor in weight.tensors().items():
            tensors[f"{name}.{key}"] = tensor
    header = {_HEADER: json.dumps({"version": FORMAT_VERSION, "weights": described}, sort_keys=True)}
    save_tensors(path, tensors, header)


def load_packed(path: Path) -> dict[str, PackedWeight]:
    """Read what `save_packed` wrote. Raises InputError for a file that is missing, damaged or of another version."""
    try:
        with safe_open(path, framework="pt") as file:
            described = _parse_header(path, file.metadata() or {})
            stored = set(file.keys())
            weights = {}
            for name, entry in described.items():
                keys = {key: f"{name}.{key}" for key in entry["tensors"]}
                missing = sorted(set(keys.values()) - stored)
                if missing:
                    raise InputError(f"{path}: tensor {missing[0]!r} is missing")
                stored -= set(keys.values())
                tensors = {key: file.get_tensor(full) for key, full in keys.items()}
                try:
                    weights[name] = layout_class(entry["layout"]).from_tensors(tensors, entry)
                    weights[name].check_content()
                except InputError as error:
                    raise InputError(f"{path}: {name}: {error}") from error
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: not a readable safetensors file ({error})") from error
    if stored:
        raise InputError(f"{path}: tensor {sorted(stored)[0]!r} belongs to no weight")
    return weights


def _parse_header(path: Path, header: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    if _HEADER not in header:
        raise InputError(f"{path}: a safetensors file, but not one of packed weights")
    try:
        content = json.loads(header[_HEADER])
        version, weights = content["version"], content["weights"]
        well_formed = isinstance(weights, dict) and all(
            isinstance(entry, dict)
            and isinstance(entry.get("layout"), str)
            and isinstance(entry.get("tensors"), list)
            and all(isinstance(key, str) for key in entry["tensors"])
            for entry in weights.values()
        )
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        raise InputError(f"{path}: header of packed weights is damaged ({error})") from error
    if version != FORMAT_VERSION:
        raise InputError(f"{path}: packed format version {version!r}; this build reads version {FORMAT_VERSION}")
    if not well_formed:
        raise InputError(f"{path}: header of packed weights is damaged")
    return weights
