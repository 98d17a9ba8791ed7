"""Open a packed checkpoint: all of it checked first, then loaded by transformers."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from safetensors import safe_open

from harness.assets import sha256_of
from harness.checkpoint.description import Description, read_description
from harness.checkpoint.files import check_files, weight_files
from harness.checkpoint.write import SUMS
from kernels.errors import InputError
from kernels.layouts import PackedWeight, layout_class

_SUM = re.compile(r"([0-9a-f]{64})  ([^/\\]+)")


def verify_checkpoint(folder: Path) -> Description:
    """Check every file of `folder` and every tensor in it. Raises InputError for the first that is not as written.

    SHA256SUMS is checked where it is: a checkpoint that `save_pretrained` wrote has none.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    description = read_description(folder)
    check_files(description, weight_files(folder))
    if (folder / SUMS).is_file():
        _check_sums(folder)
    return description


def packed_weights(folder: Path) -> Iterator[tuple[str, PackedWeight]]:
    """The packed weights of `folder` by layer, read one at a time; nothing of the model is built.

    Raises InputError for a layer that is damaged.
    """
    description, files = read_description(folder), weight_files(folder)
    contents = check_files(description, files)
    with ExitStack() as opened:
        shards = [opened.enter_context(safe_open(file, framework="pt")) for file in files]
        where = {name: shard for shard in shards for name in shard.keys()}  # noqa: SIM118 - not a mapping
        for name, layer in description.layers.items():
            tensors = {key: where[f"{name}.{key}"].get_tensor(f"{name}.{key}") for key in contents.layers[name]}
            yield name, layout_class(layer.layout).from_tensors(tensors, layer.metadata)


def load_checkpoint(folder: Path, *, dequantize: bool = False, **options: Any) -> Any:
    """The model in `folder`, in evaluation mode, after checking the whole folder.

    dequantize: decode the linear layers to dense ones. options: of transformers' from_pretrained (dtype, device_map).
    Raises InputError for a folder that is damaged or of another version.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    verify_checkpoint(folder)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    config.quantization_config["dequantize"] = dequantize
    return AutoModelForCausalLM.from_pretrained(
        folder, config=config, use_safetensors=True, trust_remote_code=False, **options
    )


def _check_sums(folder: Path) -> None:
    try:
        lines = (folder / SUMS).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{folder / SUMS} cannot be read ({error})") from error
    listed = set()
    for line in lines:
        found = _SUM.fullmatch(line)
        if found is None:
            raise InputError(f"{folder / SUMS}: {line[:80]!r} is not a checksum and a file of this folder")
        listed.add(found[2])
        if not (folder / found[2]).is_file():
            raise InputError(f"{folder}: {found[2]} is missing")
        if sha256_of(folder / found[2]) != found[1]:
            raise InputError(f"{folder}: {found[2]} is not what was written (its sha256 differs)")
    unlisted = sorted({file.name for file in folder.iterdir()} - listed - {SUMS})
    if unlisted:
        raise InputError(f"{folder}: {unlisted[0]} was not written with the checkpoint")
