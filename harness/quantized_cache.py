"""Quantized weights kept between runs, so that an interrupted or a second evaluation does not quantize again.

An entry is one safetensors file of packed weights and one JSON file (log, phases), under a key that covers the model's
files, the method and its options, the calibration text and the code. The JSON file is written last: an entry without it
does not count.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from harness.cache import cache_folder, cache_limit, prune, require_space
from harness.quantize import LayerLog, QuantizedModel
from kernels.atomic import atomic_path, write_text
from kernels.errors import InputError
from kernels.layouts import load_packed, save_packed

# Bytes kept in all; the entries used longest ago go first. SAGEBENCH_CACHE_GB overrides it.
_DEFAULT_GB = 8.0


def entry_folder(key: str) -> Path:
    return cache_folder("quantized") / key


def load_quantized(key: str) -> tuple[QuantizedModel, dict[str, Any], int] | None:
    """The cached weights, their phases and the size of the packed file, or None. A damaged entry is dropped."""
    folder = entry_folder(key)
    described = folder / "quantized.json"
    if not described.is_file():
        return None
    try:
        content = json.loads(described.read_text(encoding="utf-8"))
        stored = load_packed(folder / "packed.safetensors")
        layers = [LayerLog(**{**layer, "shape": tuple(layer["shape"])}) for layer in content["layers"]]
        packed = {layer.name: stored[layer.name] for layer in layers}  # in model order again
        phases, file_bytes = content["phases"], int(content["file_bytes"])
        folded = load_file(folder / "folded.safetensors") if content["folded"] else {}
    except (InputError, SafetensorError, OSError, ValueError, KeyError, TypeError):
        shutil.rmtree(folder, ignore_errors=True)
        return None
    os.utime(described)  # used now: pruning goes by it
    return QuantizedModel(packed, layers, folded), phases, file_bytes


def save_quantized(key: str, quantized: QuantizedModel, phases: dict[str, Any]) -> int:
    """Keep `quantized` under `key`; returns the size of the packed file in bytes."""
    folder = entry_folder(key)
    size = sum(weight.nbytes() for weight in quantized.packed.values())
    require_space(folder.parent, size + 1_000_000, "quantized weights")
    save_packed(folder / "packed.safetensors", quantized.packed)
    if quantized.folded:
        with atomic_path(folder / "folded.safetensors") as part:
            save_file({name: tensor.cpu() for name, tensor in quantized.folded.items()}, part)
    content = {
        "layers": [layer.as_record() for layer in quantized.layers],
        "folded": sorted(quantized.folded),
        "phases": phases,
    }
    size = (folder / "packed.safetensors").stat().st_size
    write_text(folder / "quantized.json", json.dumps({**content, "file_bytes": size}))
    prune(folder, "quantized.json", cache_limit(_DEFAULT_GB))
    return size
