"""Quantized weights on disk, block by block as they are made: what an interrupted run goes on from, and what a second
evaluation of the same weights needs no quantization for.

An entry is a folder under a key that covers the model's files, the method and its options, the calibration text, the
code, and the machine and versions that decide the last bits (`run_conditions`): weights made under other ones are
neither continued nor taken for those that this run would make.

    block-00003.safetensors         packed weights          block-00003.folded.safetensors   folded parameters, if any
    block-00003.json                log and checksums, written last: a block without it does not count
    stream.safetensors              activations in front of the first block that is not finished
    whole.safetensors, ...          the same of all blocks, in their place: a method has refined them together
    quantized.json                  written last of all: an entry without it is unfinished

Every file is written whole or not at all. A file that is damaged all the same (its checksum differs) is named in a
warning, and what depends on it is made again.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from harness.assets import sha256_of
from harness.cache import cache_folder, cache_limit, prune, require_space
from harness.environment import cpu_name, package_versions
from harness.layer_log import LayerLog
from harness.quantize import QuantizedModel
from kernels.atomic import remove_stale_parts, write_text
from kernels.errors import InputError
from kernels.layouts import load_packed, save_packed
from kernels.tensor_files import save_tensors

# The piece that takes the place of all blocks.
_WHOLE = "whole"
# Bytes kept in all; the entries used longest ago go first. SAGEBENCH_CACHE_GB overrides it.
_DEFAULT_GB = 8.0
_LOG = logging.getLogger(__name__)
_COMPUTING = ("torch", "transformers", "numpy", "scipy", "scikit-learn")
# What reading a damaged file can raise.
_DAMAGE = (InputError, SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError)


class QuantizedEntry:
    """The entry of one key."""

    def __init__(self, key: str) -> None:
        self.folder = entry_folder(key)
        self.restored_blocks = 0
        self._blocks = 0
        self._replaced = False
        self._spent = 0.0
        self._since = time.perf_counter()

    def load(self) -> tuple[QuantizedModel, dict[str, Any], int] | None:
        """The finished weights, their phases and the bytes of their packed files, or None. A damaged entry is
        dropped."""
        marker = self.folder / "quantized.json"
        if not marker.is_file():
            return None
        try:
            content = json.loads(marker.read_text(encoding="utf-8"))
            whole, phases, size = QuantizedModel({}, []), dict(content["phases"]), int(content["file_bytes"])
            for piece in [_WHOLE] if content.get("whole") else map(_block, range(content["blocks"])):
                whole.extend(self._read(piece)[0])
        except _DAMAGE as error:
            _LOG.warning("quantized weights in %s are damaged (%s); they are made again", self.folder, error)
            shutil.rmtree(self.folder, ignore_errors=True)
            return None
        os.utime(marker)  # used now: pruning goes by it
        return whole, phases, size

    def restore(self) -> tuple[list[QuantizedModel], dict[str, Tensor] | None]:
        """The finished blocks of an interrupted run, and the state of the stream of activations after them."""
        self._since = time.perf_counter()
        self._replaced = False
        remove_stale_parts(self.folder)
        stream, wanted = self._read_stream()
        blocks: list[QuantizedModel] = []
        while (wanted is None or len(blocks) < wanted) and self._described(_block(len(blocks))).is_file():
            try:
                block, seconds = self._read(_block(len(blocks)))
            except _DAMAGE as error:
                _LOG.warning("checkpoint in %s is damaged (%s); quantizing from there again", self.folder, error)
                break
            blocks.append(block)
            self._spent += seconds
        # Activations of a later block, or a first block whose activations were not kept in time: of no use.
        if len(blocks) < (wanted or 0) or (blocks and wanted is None and self._needs_stream()):
            blocks, stream, self._spent = [], None, 0.0
        self.restored_blocks = self._blocks = len(blocks)
        return blocks, stream

    def save(self, index: int, block: QuantizedModel, stream: dict[str, Tensor] | None) -> QuantizedModel:
        """Keep block `index` and the state of the stream after it; returns the block, mapped from its file."""
        stream_size = sum(tensor.numel() * tensor.element_size() for tensor in (stream or {}).values())
        kept = self._write(_block(index), block, stream is not None, stream_size)
        if stream is not None:
            save_tensors(self.folder / "stream.safetensors", stream, {"blocks": str(index + 1)})
        self._blocks = index + 1
        return kept

    def replace(self, whole: QuantizedModel) -> QuantizedModel:
        """Keep `whole` in place of the blocks; returns it, mapped from its file.

        The blocks' files stay until the entry is finished: before, an interrupted run goes on from them.
        """
        kept = self._write(_WHOLE, whole, False, 0)
        self._replaced = True
        return kept

    def _write(self, piece: str, block: QuantizedModel, has_stream: bool, more: int) -> QuantizedModel:
        """Write the files of one piece, of which a stream of `more` bytes is to follow."""
        weights, folded = self._files(piece)
        size = sum(weight.nbytes() for weight in block.packed.values())
        self.folder.mkdir(parents=True, exist_ok=True)
        require_space(self.folder, size + more + 1_000_000, "quantized weights")
        save_packed(weights, block.packed)
        checksums = {weights.name: sha256_of(weights)}
        if block.folded:
            save_tensors(folded, block.folded)
            checksums[folded.name] = sha256_of(folded)
        now = time.perf_counter()
        content = {
            "layers": [layer.as_record() for layer in block.layers],
            "sha256": checksums,
            "stream": has_stream,
            "seconds": now - self._since,
        }
        self._since = now
        write_text(self._described(piece), json.dumps(content))
        return QuantizedModel({**block.packed, **load_packed(weights)}, block.layers, block.folded)

    def finish(self, phases: dict[str, Any]) -> int:
        """Mark the entry as finished; returns the bytes of its files of packed weights.

        Folded parameters are not among them: they are unquantized ones of the model, changed, and counted as such.
        """
        blocks = [_block(index) for index in range(self._blocks)]
        pieces = [_WHOLE] if self._replaced else blocks
        size = sum(self._files(piece)[0].stat().st_size for piece in pieces)
        marker = {"blocks": len(blocks), "whole": self._replaced, "phases": phases, "file_bytes": size}
        write_text(self.folder / "quantized.json", json.dumps(marker))
        (self.folder / "stream.safetensors").unlink(missing_ok=True)
        for piece in blocks if self._replaced else [_WHOLE]:  # or what an interrupted run has left
            for file in (*self._files(piece), self._described(piece)):
                file.unlink(missing_ok=True)
        prune([self.folder], "quantized.json", cache_limit(_DEFAULT_GB))
        return size

    def clear(self) -> None:
        """Forget all that is there."""
        shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def seconds_before(self) -> float:
        """Time that earlier, interrupted runs spent on the blocks that were restored."""
        return self._spent

    def _files(self, piece: str) -> tuple[Path, Path]:
        return self.folder / f"{piece}.safetensors", self.folder / f"{piece}.folded.safetensors"

    def _described(self, piece: str) -> Path:
        return self.folder / f"{piece}.json"

    def _read(self, piece: str) -> tuple[QuantizedModel, float]:
        content = json.loads(self._described(piece).read_text(encoding="utf-8"))
        weights, folded = self._files(piece)
        for file in (weights, folded):
            if file.name in content["sha256"] and sha256_of(file) != content["sha256"][file.name]:
                raise InputError(f"{file.name}: content differs from its checksum")
        stored = load_packed(weights)
        layers = [LayerLog(**{**layer, "shape": tuple(layer["shape"])}) for layer in content["layers"]]
        packed = {layer.name: stored[layer.name] for layer in layers}  # in model order again
        parameters = load_file(folded) if folded.name in content["sha256"] else {}
        return QuantizedModel(packed, layers, parameters), float(content["seconds"])

    def _needs_stream(self) -> bool:
        """True if the blocks behind the first one see activations that come through it."""
        return bool(json.loads(self._described(_block(0)).read_text(encoding="utf-8"))["stream"])

    def _read_stream(self) -> tuple[dict[str, Tensor] | None, int | None]:
        """The activations, and the number of blocks that they come through; None where no method needed any."""
        file = self.folder / "stream.safetensors"
        if not file.is_file():
            return None, None
        try:
            with safe_open(file, framework="pt") as opened:
                # Copies: quantization writes into them.
                state = {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118
                return state, int((opened.metadata() or {})["blocks"])
        except _DAMAGE as error:
            _LOG.warning("%s is damaged (%s); quantizing from the first block again", file, error)
            return None, 0


def _block(index: int) -> str:
    """The piece that holds block `index`."""
    return f"block-{index:05d}"


def run_conditions(device: str) -> dict[str, Any]:
    """What the bits of quantized weights depend on besides model, method, text and code: processors, threads, and the
    versions of what computes."""
    kind = torch.device(device)
    return {
        "device": torch.cuda.get_device_name(kind) if kind.type == "cuda" else "cpu",
        "cpu": cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "packages": package_versions(_COMPUTING),
    }


def entry_folder(key: str) -> Path:
    return cache_folder("quantized") / key


def load_quantized(key: str) -> tuple[QuantizedModel, dict[str, Any], int] | None:
    """The finished weights of `key`, their phases and the bytes of their packed files, or None."""
    return QuantizedEntry(key).load()


def save_quantized(key: str, quantized: QuantizedModel, phases: dict[str, Any]) -> int:
    """Keep `quantized`, made elsewhere, under `key` as one piece; returns the size of its packed file in bytes."""
    entry = QuantizedEntry(key)
    entry.save(0, quantized, None)
    return entry.finish(phases)
