"""What `config.json` says of a packed checkpoint: each layer's layout, and the checksums that protect everything.

Checksums belong to layers and tensors, not to files: they hold however the tensors are spread over shards. The
configuration carries a checksum of itself, since a changed norm epsilon is as wrong as a changed weight.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from kernels.errors import InputError
from methods.validation import validated

QUANT_METHOD = "sagebench"
FORMAT = 1
# A configuration of the largest models is about 1 MB; no more is read than could be one.
_MOST_CONFIG_BYTES = 64_000_000


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class LayerDescription(_Part):
    """A packed layer. metadata: the layout's format parameters. sha256: of its tensors, see `tensors_sha256`."""

    layout: str
    metadata: dict[str, Any]
    sha256: str


class Description(_Part):
    """The `quantization_config`. unquantized: the checksum of every other tensor by name."""

    quant_method: Literal["sagebench"] = "sagebench"
    format: int = FORMAT
    method: str
    options: dict[str, Any]
    unquantized_dtype: Literal["float16", "bfloat16"]
    layers: dict[str, LayerDescription]
    unquantized: dict[str, str]
    sha256: str = ""
    """Of the whole config.json, see `config_sha256`."""


def read_description(folder: Path) -> Description:
    """The description in `folder`/config.json. Raises InputError if it is missing, damaged or of another version."""
    config = _read_config(folder / "config.json")
    values = config.get("quantization_config")
    if not isinstance(values, dict) or values.get("quant_method") != QUANT_METHOD:
        raise InputError(f"{folder} is no packed checkpoint: config.json has no quantization_config of {QUANT_METHOD}")
    if values.get("format") != FORMAT or type(values.get("format")) is not int:
        raise InputError(f"{folder}: checkpoint format {values.get('format')!r}; this build reads format {FORMAT}")
    description = validated(Description, values, f"{folder / 'config.json'}, quantization_config")
    if description.sha256 != config_sha256(config):
        raise InputError(
            f"{folder / 'config.json'} is not what was written (its sha256 differs): fetch or save the checkpoint again"
        )
    return description


def _read_config(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _MOST_CONFIG_BYTES:
            raise InputError(f"{path} is larger than any configuration ({path.stat().st_size} bytes)")
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path.parent} has no {path.name}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read ({error})") from error
    if not isinstance(config, dict):
        raise InputError(f"{path} does not hold a JSON object")
    return config


def config_sha256(config: Mapping[str, Any]) -> str:
    """Over a config.json as parsed, but for this checksum itself and the version of transformers that wrote it."""
    content = copy.deepcopy(dict(config))
    content.pop("transformers_version", None)
    content["quantization_config"].pop("sha256", None)
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", errors="surrogatepass")).hexdigest()


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """Over names, dtypes, shapes and bytes of `tensors`, in order of their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        # As bytes whatever the dtype: numpy has no bfloat16.
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
