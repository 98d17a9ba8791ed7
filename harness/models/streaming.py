"""A model that is larger than memory: its decoder blocks are read from the safetensors files when they run.

Embeddings, norms and head are loaded; the blocks have no storage until one is brought. The next one that is brought
takes its place. A block that is quantized is from then on decoded from its packed weights, which are mapped from their
file on disk. What runs is bit for bit what the loaded model would run.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from harness.models.blocks import block_linears, find_blocks
from harness.models.placement import Placement, put
from kernels.errors import InputError
from kernels.finite import all_finite
from kernels.layouts import PackedWeight

_OLD_NAMES = {"lm_head.weight": "embed_out.weight"}  # GPT-NeoX


class StreamedBlocks(Placement):
    """Brings a block from `weights`, or from its packed weights once it is quantized, and lets the last one go."""

    name = "streamed from disk"

    def __init__(self, model: Any, weights: TensorFiles, device: torch.device, dtype: torch.dtype, other: torch.dtype):
        """dtype: of all parameters. other: to which those that are not quantized are rounded (see load.py)."""
        self._weights = weights
        self._device = device
        self._dtype = dtype
        self._other = other
        self._there: nn.Module | None = None
        self._quantized: dict[nn.Module, tuple[Mapping[str, PackedWeight], Mapping[str, Tensor]]] = {}
        blocks = find_blocks(model)
        self._names = {block: blocks.name(index, "") for index, block in enumerate(blocks.blocks)}
        for block in blocks.blocks:
            block.register_forward_pre_hook(lambda module, _: self.bring(module))

    @torch.no_grad()
    def bring(self, block: nn.Module) -> None:
        if self._there is block:
            return
        if self._there is not None:
            _let_go(self._there)
        self._there = block
        packed, folded = self._quantized.get(block, ({}, {}))
        decoded = {f"{name}.weight" for name in packed}
        linear = {f"{name}.weight" for name in block_linears(block)}
        start = self._names[block]
        # A parameter that is decoded next needs storage, and no reading.
        read = self._weights.read([start + name for name, _ in block.named_parameters() if name not in decoded])
        for name, parameter in list(block.named_parameters()):
            if name in decoded:
                value = torch.empty(parameter.shape, dtype=self._dtype, device=self._device)
            else:
                value = read.pop(start + name).to(self._dtype)
                value = value if name in linear else round_to_stored(start + name, value, self._other)
            _set(block, name, value.to(self._device))
        put(block, packed, folded)

    def replace(self, block: nn.Module, packed: Mapping[str, PackedWeight], folded: Mapping[str, Tensor]) -> None:
        self.remember(block, packed, folded)
        if self._there is block:
            put(block, packed, folded)

    def remember(self, block: nn.Module, packed: Mapping[str, PackedWeight], folded: Mapping[str, Tensor]) -> None:
        self._quantized[block] = (packed, folded)


class TensorFiles:
    """The tensors of a model folder, read one by one. prefix: that of the model's inner part ("model")."""

    def __init__(self, folder: Path, prefix: str) -> None:
        self._prefix = prefix
        self._file: dict[str, Path] = {}
        for file in sorted(folder.glob("*.safetensors")):
            with safe_open(file, framework="pt") as opened:
                self._file.update(dict.fromkeys(opened.keys(), file))

    def check(self, names: list[str]) -> None:
        """Raise InputError if one of the tensors that the model calls `names` is in no file."""
        for name in names:
            self._key(name)

    def read(self, names: list[str]) -> dict[str, Tensor]:
        """Copies of the tensors that the model calls `names`, in the dtype they are stored in.

        Raises InputError for one that no file has.
        """
        keys = {name: self._key(name) for name in names}
        found: dict[str, Tensor] = {}
        for file in sorted({self._file[key] for key in keys.values()}):
            with safe_open(file, framework="pt") as opened:  # a copy: the mapping of the file ends with this block
                found |= {n: opened.get_tensor(key).clone() for n, key in keys.items() if self._file[key] == file}
        return found

    def _key(self, name: str) -> str:
        """Files of older releases lack the inner part's prefix, have it where the model does not, or name the head
        otherwise."""
        candidates = (name, name.removeprefix(f"{self._prefix}."), f"{self._prefix}.{name}", _OLD_NAMES.get(name))
        for key in candidates:
            if key in self._file:
                return key
        raise InputError(
            f"tensor {name} is in no file of the model: stored in another form, it cannot be streamed from disk; "
            "a machine with more memory can load it whole"
        )


def stream_model(model: Any, folder: Path, device: torch.device, dtype: torch.dtype, other: torch.dtype) -> Placement:
    """Fill all but the blocks of `model`, whose parameters have no storage, and return what brings the blocks."""
    weights = TensorFiles(folder, model.base_model_prefix)
    prefix = find_blocks(model).prefix
    names = [name for name, _ in model.named_parameters()]
    weights.check(names)
    for name in names:
        if name.startswith(f"{prefix}."):
            continue
        value = weights.read([name])[name].to(dtype)
        _set(model, name, round_to_stored(name, value, other).to(device))
    for name, buffer in list(model.named_buffers()):
        _owner(model, name)._buffers[name.rpartition(".")[2]] = buffer.to(device)
    model.tie_weights()
    return StreamedBlocks(model, weights, device, dtype, other)


def round_to_stored(name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    """`value` rounded to the 16-bit `dtype` in which the ledger counts what is not quantized, in its own dtype.

    Raises InputError if it holds NaN or infinity, or does not fit.
    """
    if not all_finite(value):
        raise InputError(f"parameter {name} holds NaN or infinity")
    rounded = value.to(dtype)
    if not all_finite(rounded):
        raise InputError(f"parameter {name} does not fit in {str(dtype).removeprefix('torch.')}")
    return rounded.to(value.dtype)


def _let_go(block: nn.Module) -> None:
    """Give the storage of a block's parameters back."""
    for name, parameter in list(block.named_parameters()):
        _set(block, name, torch.empty(parameter.shape, dtype=parameter.dtype, device="meta"))


def _set(module: nn.Module, name: str, value: Tensor) -> None:
    _owner(module, name)._parameters[name.rpartition(".")[2]] = nn.Parameter(value, requires_grad=False)


def _owner(module: nn.Module, name: str) -> nn.Module:
    return module.get_submodule(name.rpartition(".")[0])
