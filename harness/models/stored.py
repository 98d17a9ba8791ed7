"""Models that are quantized already, as others or we have stored them: loaded by the library that owns the format.

GPTQ and AWQ by GPTQModel, compressed-tensors by its own package, GGUF by transformers' reader, packed checkpoints of
this project by itself. What they take is counted from their files, never from their configuration.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from harness.checkpoint.description import QUANT_METHOD
from harness.checkpoint.read import packed_weights, verify_checkpoint
from harness.models.blocks import model_linears
from harness.models.load import DTYPES, LoadedModel, convert_gguf
from harness.models.placement import Placement
from harness.models.source import ModelSource, SourcePrecision, fingerprint, open_gguf
from kernels.errors import InputError
from kernels.layouts.base import Role

# What a tensor of a linear layer is for, by the name that its format gives it.
_ROLES: dict[str, Role] = {
    "qweight": "code", "weight_packed": "code", "weight": "code",
    "qzeros": "zero", "weight_zero_point": "zero",
    "scales": "scale", "weight_scale": "scale", "weight_global_scale": "scale",
    "g_idx": "index", "weight_g_idx": "index", "weight_shape": "tag",
}  # fmt: skip
_LIBRARIES = {"gptq": "gptqmodel", "awq": "gptqmodel", "compressed-tensors": "compressed_tensors"}


@dataclass(frozen=True)
class StoredSize:
    """What a quantized model takes in its files. weights: of its linear layers; payload: bytes of all tensors of these
    layers but biases, by role; other: bytes of all other tensors."""

    weights: int
    payload: dict[str, int]
    other: int

    def as_ledger(self, nominal_bits: float | None) -> dict[str, Any]:
        """The ledger of a record; `nominal_bits` is what the format calls itself ("4 bit")."""
        payload = sum(self.payload.values())
        return {
            "weights": self.weights,
            "nominal_weight_bits": nominal_bits,
            "nominal_scale_bits": None,
            "payload_bytes": payload,
            "payload_bits": 8 * payload / self.weights,
            "bytes_by_role": dict(sorted(self.payload.items())),
            "other_bytes": self.other,
            "total_bytes": payload + self.other,
            "packed_file_bytes": None,
            "artifact_bytes": payload + self.other,
        }


def stored_format(source: ModelSource) -> tuple[str, str, float | None]:
    """How a quantized model is stored, from its configuration: format, setting ("4 bit g128"), nominal bits.

    Raises InputError for a format that nothing here can read.
    """
    if source.kind == "gguf":
        kinds = Counter[str]()
        for tensor in open_gguf(source.path).tensors:
            kinds[tensor.tensor_type.name] += int(tensor.n_elements) if len(tensor.shape) == 2 else 0
        return "gguf", kinds.most_common(1)[0][0], None
    config = json.loads((source.path / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    method = source.quantized or "unknown"
    if method == QUANT_METHOD:
        return method, str(config.get("method")), None
    if method not in _LIBRARIES:
        raise InputError(
            f"model {source.name!r} is quantized by {method!r}; what can be measured as it is: "
            f"{', '.join((*_LIBRARIES, QUANT_METHOD))} and GGUF"
        )
    groups = config.get("config_groups")
    if isinstance(groups, dict) and groups:  # compressed-tensors
        config = next(iter(groups.values())).get("weights") or {}
    bits, group = config.get("bits", config.get("num_bits")), config.get("group_size")
    if type(bits) is not int:
        raise InputError(f"model {source.name!r}: its quantization_config names no bits")
    return method, f"{bits} bit" + (f" g{group}" if type(group) is int and group > 0 else ""), float(bits)


def load_stored(source: ModelSource, dtype: str, device: str) -> LoadedModel:
    """Load a quantized model. dtype: of activations and of what is not quantized.

    Raises InputError if its library is not installed or cannot read it.
    """
    from transformers import AutoTokenizer

    sha256 = fingerprint(source)
    folder = convert_gguf(source.path, sha256) if source.kind == "gguf" else source.path
    try:
        model = _load(source, folder, DTYPES[dtype], device)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except ImportError as error:
        library = _LIBRARIES.get(source.quantized or "", "gguf")
        raise InputError(f"model {source.name!r} needs the package {library} ({error}); pip install it") from error
    except Exception as error:  # over damaged files the libraries raise errors of any class
        if isinstance(error, InputError):
            raise
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"model {source.name!r} cannot be loaded by its own library: {reason}") from error
    model.eval().requires_grad_(False)
    size, (method, setting, _) = stored_size(source, model.config), stored_format(source)
    bits = 8 * sum(size.payload.values()) / size.weights
    precision = SourcePrecision(True, method, round(bits, 3), f"{method} {setting}, as stored")
    parameters = size.weights + size.other // 2
    return LoadedModel(model, tokenizer, source, sha256, precision, parameters, Placement())


def _load(source: ModelSource, folder: Path, dtype: torch.dtype, device: str) -> Any:
    if source.quantized in ("gptq", "awq"):
        from gptqmodel import BACKEND, GPTQModel

        backend = BACKEND.TORCH if device == "cpu" else BACKEND.AUTO
        return GPTQModel.load(str(folder), device=device, backend=backend, dtype=dtype).model
    from transformers import AutoConfig, AutoModelForCausalLM

    if source.quantized == QUANT_METHOD:
        verify_checkpoint(folder)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if source.quantized == "compressed-tensors":
        import compressed_tensors  # noqa: F401 - its absence is found here and not in the middle of loading
    if source.quantized is not None:
        config.quantization_config["dequantize"] = True  # once, not in every forward pass
    return AutoModelForCausalLM.from_pretrained(
        folder, config=config, dtype=dtype, device_map={"": device}, use_safetensors=True, trust_remote_code=False
    )


def stored_size(source: ModelSource, config: Any) -> StoredSize:
    """Count the bytes of a quantized model in its files. config: the model's configuration, for the layers it has.

    Raises InputError if the files lack a linear layer.
    """
    if source.kind == "gguf":
        return _gguf_size(source.path)
    if source.quantized == QUANT_METHOD:
        return _packed_size(source.path)
    shapes = _linear_shapes(config)
    payload: Counter[str] = Counter()
    found: set[str] = set()
    other = 0
    for name, size in _tensor_bytes(source.path).items():
        layer, _, key = name.rpartition(".")
        if layer in shapes and key != "bias":
            payload[_ROLES.get(key, "code")] += size
            found.add(layer)
        else:
            other += size
    if missing := sorted(shapes.keys() - found):
        raise InputError(f"model {source.name!r}: its files hold no layer {missing[0]}")
    return StoredSize(sum(shapes.values()), dict(payload), other)


def _linear_shapes(config: Any) -> Mapping[str, int]:
    """Weights of each linear layer that methods quantize, from the dense model without storage."""
    from copy import deepcopy

    from transformers import AutoModelForCausalLM

    dense = deepcopy(config)
    if hasattr(dense, "quantization_config"):
        del dense.quantization_config
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(dense, trust_remote_code=False)
    return {name: linear.weight.numel() for name, linear in model_linears(model).items()}


def _tensor_bytes(folder: Path) -> dict[str, int]:
    """Bytes of each tensor, from the headers of the weight files."""
    sizes: dict[str, int] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - not a mapping
                header = opened.get_slice(name)
                sizes[name] = math.prod(header.get_shape()) * _WIDTHS[header.get_dtype()]
    return sizes


_WIDTHS = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8,
}  # fmt: skip


def _packed_size(folder: Path) -> StoredSize:
    weights, payload = 0, Counter[str]()
    for _, packed in packed_weights(folder):
        weights += packed.shape[0] * packed.shape[1]
        payload.update(packed.bytes_by_role())
    return StoredSize(weights, dict(payload), sum(_tensor_bytes(folder).values()) - payload.total())


def _gguf_size(path: Path) -> StoredSize:
    weights = payload = other = 0
    for tensor in open_gguf(path).tensors:
        if tensor.name.startswith("blk.") and len(tensor.shape) == 2:
            weights += int(tensor.n_elements)
            payload += int(tensor.n_bytes)
        else:
            other += int(tensor.n_bytes)
    return StoredSize(weights, {"code": payload}, other)
