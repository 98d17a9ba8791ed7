"""The weight files of a packed checkpoint: found, and compared with its description, before anything is loaded.

Headers (names, dtypes, shapes, offsets against the size of the file) are checked by safetensors itself, which
allocates nothing for a header that lies. Then every layer is read once, one at a time, for its checksum and content.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from harness.checkpoint.description import Description, tensors_sha256
from kernels.errors import InputError
from kernels.layouts import layout_class

_INDEX = "model.safetensors.index.json"
_SHARD = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")
_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
}


@dataclass(frozen=True)
class Contents:
    """Empty tensors (on the meta device) with the dtypes and shapes of the stored ones.

    layers: by layer and by the layout's own names. unquantized: all others, by name.
    """

    layers: dict[str, dict[str, Tensor]] = field(default_factory=lambda: defaultdict(dict))
    unquantized: dict[str, Tensor] = field(default_factory=dict)


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights of `folder`, from its index if it has one.

    Raises InputError for an index that is damaged or names a file elsewhere, and for a file that is not there.
    """
    names = {"model.safetensors"}
    index = folder / _INDEX
    if index.is_file():
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
            raise InputError(f"{index} is damaged ({error})") from error
    files = [folder / name for name in sorted(names, key=str) if _is_shard(name, index)]
    for file in files:
        if not file.is_file():
            raise InputError(f"{folder}: shard {file.name} is missing")
    return files


def _is_shard(name: Any, where: Path) -> bool:
    if not isinstance(name, str) or not _SHARD.fullmatch(name):
        raise InputError(f"{where}: {name!r} is no shard; shards are called model-00001-of-00002.safetensors")
    return True


def folder_of(files: Sequence[Path]) -> Path:
    """The one folder that `files` lie in. Raises InputError for a file elsewhere, or that is no shard."""
    for file in files:
        _is_shard(file.name, file.parent)
        if file.parent != files[0].parent:
            raise InputError(f"{file} lies outside the checkpoint, next to {files[0]}")
    return files[0].parent


def check_files(description: Description, files: Sequence[Path]) -> Contents:
    """Compare `files` with the description, and see that each packed layer can be decoded.

    Raises InputError for the first tensor or layer that is not as it was written or cannot have been, and names it.
    """
    folder = folder_of(files)
    with ExitStack() as opened:
        where: dict[str, Any] = {}
        for file in files:
            try:
                shard = opened.enter_context(safe_open(file, framework="pt"))
            except FileNotFoundError:
                raise InputError(f"{file}: no such file") from None
            except (SafetensorError, OSError) as error:
                raise InputError(f"{file}: not a readable safetensors file ({error}); it may be truncated") from error
            for name in shard.keys():  # noqa: SIM118 - not a mapping
                if name in where:
                    raise InputError(f"{file}: tensor {name!r} is there twice")
                where[name] = shard
        contents = _sort(description, where, folder)
        _check_sums(description, contents, where, folder)
    return contents


def _sort(description: Description, where: Mapping[str, Any], folder: Path) -> Contents:
    """Stored tensors by the layer they belong to, from the headers alone."""
    contents = Contents()
    for name, shard in where.items():
        header = shard.get_slice(name)
        dtype = _DTYPES.get(header.get_dtype())
        if dtype is None:
            raise InputError(f"{folder}: tensor {name!r} is {header.get_dtype()}; use {', '.join(_DTYPES)}")
        tensor = torch.empty(header.get_shape(), dtype=dtype, device="meta")
        layer, _, key = name.rpartition(".")
        if name in description.unquantized:
            contents.unquantized[name] = tensor
        elif layer in description.layers:
            contents.layers[layer][key] = tensor
        else:
            raise InputError(f"{folder}: tensor {name!r} belongs to no layer of config.json")
    absent = sorted(description.unquantized.keys() - contents.unquantized.keys())
    absent += sorted(description.layers.keys() - contents.layers.keys())
    if absent:
        raise InputError(f"{folder}: {absent[0]} is missing from the weight files")
    return contents


def _check_sums(description: Description, contents: Contents, where: Mapping[str, Any], folder: Path) -> None:
    for layer, tensors in contents.layers.items():
        stored = {key: where[f"{layer}.{key}"].get_tensor(f"{layer}.{key}") for key in tensors}
        described = description.layers[layer]
        _check_sum(tensors_sha256(stored), described.sha256, f"layer {layer}", folder)
        # Anybody can sign: what kernels and decoders rely on is checked whatever the checksum says.
        try:
            layout_class(described.layout).from_tensors(stored, described.metadata).check_content()
        except InputError as error:
            raise InputError(f"{folder}: layer {layer}: {error}") from None
    for name in contents.unquantized:
        found = tensors_sha256({name: where[name].get_tensor(name)})
        _check_sum(found, description.unquantized[name], f"tensor {name}", folder)


def _check_sum(found: str, written: str, what: str, folder: Path) -> None:
    if found != written:
        raise InputError(f"{folder}: {what} is damaged: its sha256 is {found[:12]}..., written was {written[:12]}...")
