"""How transformers reads and writes packed checkpoints: a quantizer in its registry.

    import harness
    model = AutoModelForCausalLM.from_pretrained(folder)   # linear layers stay packed
    model = model.dequantize()                             # or dense, in the model's dtype

Everything is checked before transformers loads a tensor. `save_pretrained` writes the same tensors again; what
is not packed goes back to 16 bits where that loses nothing, whatever dtype the model was loaded in.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from harness.checkpoint.description import (
    QUANT_METHOD,
    LayerDescription,
    config_sha256,
    read_description,
    tensors_sha256,
)
from harness.checkpoint.files import Contents, check_files, folder_of
from kernels.errors import InputError
from kernels.layouts import PackedWeight, layout_class
from kernels.linear import PackedLinear

# Numbers that are compared at once when a tensor is narrowed.
_PART = 1 << 20


@register_quantization_config(QUANT_METHOD)
class SagebenchConfig(QuantizationConfigMixin):
    """The `quantization_config` of a model in memory; `Description` says what it holds.

    dequantize: decode every layer once it is loaded. Not stored.
    """

    def __init__(self, dequantize: bool = False, **description: Any) -> None:
        self.quant_method = QUANT_METHOD
        self.__dict__.update(description)
        self.dequantize = dequantize

    def to_dict(self) -> dict[str, Any]:
        return {key: copy.deepcopy(value) for key, value in self.__dict__.items() if key != "dequantize"}


@register_quantizer(QUANT_METHOD)
class SagebenchQuantizer(HfQuantizer):
    """Puts packed layers into the empty model before weights are loaded, and checks them afterwards."""

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **_: Any
    ) -> None:
        files = [Path(file) for file in checkpoint_files or []]
        if not files:
            raise InputError("a packed checkpoint is loaded from its folder, not from a state dict")
        folder = folder_of(files)
        description = read_description(folder)
        contents = check_files(description, files)
        put_packed_layers(model, description.layers, contents)
        _check_names(model, contents, folder)

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        for name, layer in packed_layers(model):
            if any(buffer.is_meta for buffer in layer.buffers()):
                continue  # offloaded to disk: checked when it is used
            _check_packed(name, layer)
        if self.quantization_config.dequantize:
            self._dequantize(model, model.dtype)
        return model

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        for name, layer in list(packed_layers(model)):
            model.set_submodule(name, layer.to_linear(dtype or model.dtype))
        return model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
        """What `save_pretrained` writes; the checksums in the model's configuration are brought up to date."""
        config = model.config.quantization_config
        layers = dict(packed_layers(model))
        inside = {f"{name}.{key}" for name, layer in layers.items() for key in layer.tensor_names}
        tensors = narrow_unquantized(model)
        config.layers = {name: describe_layer(layer.packed) for name, layer in layers.items()}
        tied = set(getattr(model, "all_tied_weights_keys", None) or {})
        config.unquantized = {
            name: tensors_sha256({name: tensor})
            for name, tensor in tensors.items()
            if name not in inside and name not in tied
        }
        # Some families are saved under older names of their tensors; here file and model use the same.
        model._weight_conversions = []
        # As save_pretrained sets them after this call: they are under the checksum too.
        model.config.dtype = str(model.dtype).removeprefix("torch.")
        model.config.architectures = [type(model).__name__]
        config.sha256 = config_sha256(json.loads(model.config.to_json_string(use_diff=True)))
        return tensors, {}

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


def packed_layers(model: nn.Module) -> Iterator[tuple[str, PackedLinear]]:
    """The packed layers of `model` by name, in order."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, PackedLinear))


def describe_layer(packed: PackedWeight) -> dict[str, Any]:
    """The entry of a layer in the `quantization_config`."""
    return {
        "layout": packed.layout,
        "metadata": packed.metadata(),
        "sha256": tensors_sha256(packed.tensors()),
    }


def put_packed_layers(model: nn.Module, layers: Mapping[str, LayerDescription], contents: Contents) -> None:
    """Replace linear layers of a model on the meta device by packed ones with empty buffers."""
    for name, layer in layers.items():
        try:
            linear = model.get_submodule(name)
        except AttributeError:
            raise InputError(f"layer {name} of the checkpoint is not in {type(model).__name__}") from None
        layout_class(layer.layout)
        shape = layer.metadata.get("shape")
        if not isinstance(linear, nn.Linear) or shape != [linear.out_features, linear.in_features]:
            kind = f"{type(linear).__name__} {[getattr(linear, side, '?') for side in ('out_features', 'in_features')]}"
            raise InputError(f"layer {name} of the checkpoint is {shape}, the model has {kind}")
        try:
            packed = PackedLinear(layer.layout, layer.metadata, contents.layers[name], linear.bias)
        except InputError as error:
            raise InputError(f"layer {name}: {error}") from None
        model.set_submodule(name, packed)


def _check_names(model: Any, contents: Contents, folder: Path) -> None:
    """transformers starts what a file lacks at random and skips what it has too much: here both are errors."""
    expected = model.state_dict()
    inside = {f"{name}.{key}" for name, tensors in contents.layers.items() for key in tensors}
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    missing = sorted(expected.keys() - inside - contents.unquantized.keys() - tied)
    unknown = sorted(contents.unquantized.keys() - expected.keys())
    if missing or unknown:
        what = f"lacks {missing[0]}" if missing else f"has {unknown[0]}, which the model has not"
        raise InputError(f"{folder} does not fit {type(model).__name__}: it {what}")
    for name, tensor in contents.unquantized.items():
        if tensor.shape != expected[name].shape:
            raise InputError(f"{folder}: {name} is {list(tensor.shape)}, the model has {list(expected[name].shape)}")


def _check_packed(name: str, layer: PackedLinear) -> None:
    try:
        _ = layer.packed
    except InputError as error:
        raise InputError(f"layer {name}: {error}") from None


def narrow_unquantized(model: Any) -> dict[str, Tensor]:
    """The state dict of a packed model, in 16 bits where nothing is lost; tied tensors stay one tensor."""
    dtype = getattr(torch, model.config.quantization_config.unquantized_dtype)
    inside = {f"{name}.{key}" for name, layer in packed_layers(model) for key in layer.tensor_names}
    narrowed: dict[tuple[int, torch.Size], Tensor] = {}
    tensors = model.state_dict()
    for name, tensor in tensors.items():
        if tensor.is_meta:
            raise InputError("a model that is offloaded to disk cannot be saved; load it with device_map='cpu'")
        key = (tensor.data_ptr(), tensor.shape)
        if name not in inside and key not in narrowed:
            narrowed[key] = _narrow(tensor, dtype)
        tensors[name] = tensor if name in inside else narrowed[key]
    return tensors


def _narrow(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    for narrow in (dtype, torch.float16, torch.bfloat16) if tensor.is_floating_point() else ():
        candidate = tensor.to(narrow)
        # Part by part: widening all of an embedding again would take more memory than the packed layers do.
        parts = zip(candidate.reshape(-1).split(_PART), tensor.reshape(-1).split(_PART), strict=True)
        if all(torch.equal(part.to(tensor.dtype), original) for part, original in parts):
            return candidate
    return tensor
