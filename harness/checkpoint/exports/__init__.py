"""Packed checkpoints in other tools' formats, for uniform grids of one width (rtn, gptq, awq)."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from torch import Tensor

from harness.checkpoint.exports import compressed_tensors, gptq
from harness.checkpoint.exports.grid import Grid, common_grid
from harness.checkpoint.quantizer import narrow_unquantized, packed_layers
from harness.checkpoint.read import load_checkpoint
from harness.checkpoint.write import check_target, finish_folder
from kernels import __version__
from kernels.errors import InputError, did_you_mean

FORMATS = ("gptq", "gptq_v2", "compressed-tensors")


def export_checkpoint(source: Path, out: Path, format: str, max_shard_size: str = "2GB") -> None:
    """Write the packed checkpoint `source` to folder `out` in `format`, one of FORMATS; codes and scales stay the same.

    Raises InputError if the format does not hold what the checkpoint does.
    """
    from huggingface_hub import save_torch_state_dict
    from transformers import AutoTokenizer

    if format not in FORMATS:
        raise InputError(f"unknown format {format!r}" + did_you_mean(format, FORMATS))
    check_target(out, max_shard_size)
    model = load_checkpoint(source)
    layers = dict(packed_layers(model))
    weights = {name: layer.packed for name, layer in layers.items()}
    grid = common_grid(weights)
    tensors, inside = narrow_unquantized(model), tuple(f"{name}." for name in layers)
    biases = {f"{name}.bias" for name, layer in layers.items() if layer.bias is not None}
    exported: dict[str, Tensor] = {
        name: tensor for name, tensor in tensors.items() if name in biases or not name.startswith(inside)
    }
    config: dict[str, Any] = _without_quantization(model)
    if format == "compressed-tensors":
        config["quantization_config"] = compressed_tensors.configuration(grid, _ignored(model))
    else:
        config["quantization_config"] = gptq.configuration(grid, format, __version__)
    for name, weight in weights.items():
        packed = (
            compressed_tensors.pack(weight, name)
            if format == "compressed-tensors"
            else gptq.pack(weight, name, v2=format == "gptq_v2")
        )
        exported |= {f"{name}.{key}": tensor for key, tensor in packed.items()}
    scratch = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    try:
        tied = set(getattr(model, "all_tied_weights_keys", None) or {})
        kept = {name: tensor.contiguous() for name, tensor in exported.items() if name not in tied}
        save_torch_state_dict(kept, scratch, max_shard_size=max_shard_size, safe_serialization=True)
        (scratch / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
        if format != "compressed-tensors":  # AutoGPTQ looks for it here
            text = json.dumps(config["quantization_config"], indent=1) + "\n"
            (scratch / "quantize_config.json").write_text(text, encoding="utf-8")
        if model.can_generate():
            model.generation_config.save_pretrained(scratch)
        AutoTokenizer.from_pretrained(source, trust_remote_code=False).save_pretrained(scratch)
        finish_folder(scratch)
        if out.exists():
            out.rmdir()
        scratch.rename(out)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _without_quantization(model: Any) -> dict[str, Any]:
    """The model's configuration, with the keys that releases before transformers 5 read."""
    config = json.loads(model.config.to_json_string(use_diff=True))
    del config["quantization_config"]
    narrow = "bfloat16" if model.config.quantization_config.unquantized_dtype == "bfloat16" else "float16"
    config["dtype"] = config["torch_dtype"] = narrow
    rope = config.get("rope_parameters")
    if isinstance(rope, dict) and "rope_theta" in rope:
        config["rope_theta"] = rope["rope_theta"]
        scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
        config["rope_scaling"] = None if scaling.get("rope_type", "default") == "default" else scaling
    return config


def _ignored(model: Any) -> list[str]:
    """Linear layers that are not packed."""
    from torch import nn

    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


__all__ = ["FORMATS", "Grid", "export_checkpoint"]
