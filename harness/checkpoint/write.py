"""Write a quantized model as a packed checkpoint: the whole folder, or nothing."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from harness.assets import sha256_of
from harness.cache import require_space
from harness.checkpoint.description import FORMAT
from harness.checkpoint.quantizer import SagebenchConfig, SagebenchQuantizer
from harness.models.blocks import block_linears, find_blocks, model_linears
from harness.models.load import LoadedModel
from harness.models.placement import Placement
from harness.quantize import QuantizedModel
from kernels.errors import InputError
from kernels.linear import PackedLinear

SUMS = "SHA256SUMS"
_SHARD_SIZE = "2GB"
# Configuration, tokenizer and record, generously.
_FURTHER_BYTES = 50_000_000


def check_target(folder: Path, max_shard_size: str = _SHARD_SIZE) -> None:
    """Raise InputError if a checkpoint cannot be written to `folder`: it must be absent or empty."""
    if not re.fullmatch(r"[1-9]\d*([KMGT]B)", max_shard_size):
        raise InputError(f"--max-shard-size {max_shard_size!r}: write a size such as 2GB or 500MB")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} is there already and not empty; name a new folder, or remove it")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder.parent).close()
    except OSError as error:
        raise InputError(f"{folder} cannot be written ({error.strerror})") from error


def write_checkpoint(
    folder: Path,
    loaded: LoadedModel,
    quantized: QuantizedModel,
    record: Mapping[str, Any],
    max_shard_size: str = _SHARD_SIZE,
) -> None:
    """Write `quantized`, installed in `loaded`, with its tokenizer and `record` (a run record) to `folder`.

    Leaves packed layers in the model: its dense weights are let go, layer by layer, and its logits stay the same bits.
    """
    check_target(folder, max_shard_size)
    require_space(folder.parent, int(record["ledger"]["total_bytes"]) + _FURTHER_BYTES, "the checkpoint")
    pack_model(loaded.model, quantized, record["method"], loaded.precision.unquantized_dtype, loaded.placement)
    scratch = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        loaded.model.save_pretrained(scratch, max_shard_size=max_shard_size)
        loaded.tokenizer.save_pretrained(scratch)
        for name, content in (("record.json", record), ("ledger.json", record["ledger"])):
            text = json.dumps(content, indent=1, allow_nan=False) + "\n"
            (scratch / name).write_text(text, encoding="utf-8")
        write_sums(scratch)
        finish_folder(scratch)
        if folder.exists():
            folder.rmdir()
        scratch.rename(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def pack_model(
    model: Any,
    quantized: QuantizedModel,
    method: Mapping[str, Any],
    unquantized_dtype: str,
    placement: Placement | None = None,
) -> None:
    """Replace the quantized linear layers of `model` by packed ones, and make `save_pretrained` write them.

    method: "name" and "options", for the configuration. unquantized_dtype: "float16" or "bfloat16". placement: brings
    blocks that come one at a time. Raises InputError if packed layers and the model's are not the same.
    """
    blocks = find_blocks(model)
    if unknown := sorted(quantized.packed.keys() ^ model_linears(model).keys()):
        raise InputError(f"packed weights and model differ in their layers, first in {unknown[0]}")
    kept: dict[str, Tensor] = {}
    for index, block in enumerate(blocks.blocks):
        if placement is not None:
            placement.bring(block)
        for name, linear in block_linears(block).items():
            block.set_submodule(name, PackedLinear.from_packed(quantized.packed[blocks.name(index, name)], linear.bias))
        # The next block may take this one's place; what is left of it, norms and biases, is small.
        kept |= {blocks.name(index, name): tensor.detach().clone() for name, tensor in block.named_parameters()}
    for name, tensor in kept.items():
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, nn.Parameter(tensor, requires_grad=False))
    config = SagebenchConfig(
        format=FORMAT,
        method=method["name"],
        options=dict(method["options"]),
        unquantized_dtype=unquantized_dtype,
    )
    model.config.quantization_config = config
    model.config.use_cache = True  # switched off while measuring
    model.hf_quantizer = SagebenchQuantizer(config)


def write_sums(folder: Path) -> None:
    """Write SHA256SUMS over all files of `folder`, in the format of sha256sum."""
    lines = [f"{sha256_of(file)}  {file.name}\n" for file in sorted(folder.iterdir()) if file.name != SUMS]
    (folder / SUMS).write_text("".join(lines), encoding="utf-8")


def finish_folder(folder: Path) -> None:
    """Everything on disk, with the permissions that open() would have given it."""
    umask = os.umask(0)
    os.umask(umask)
    for path in (*folder.iterdir(), folder):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
