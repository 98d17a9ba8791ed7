"""Load a model and its tokenizer with transformers, dense, in the dtype asked for."""

from __future__ import annotations

import math
from contextlib import redirect_stderr
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import torch

from harness.cache import cache_folder, require_space
from harness.memory import available_memory
from harness.models.blocks import model_linears, quantize_only
from harness.models.placement import WEIGHT_SHARE, Placement, place
from harness.models.reparameterize import reparameterize
from harness.models.source import (
    ModelSource,
    SourcePrecision,
    download,
    fingerprint,
    open_gguf,
    require_unquantized,
    resolve_model,
    source_precision,
    tensor_shapes,
)
from harness.models.streaming import round_to_stored, stream_model
from kernels.atomic import atomic_folder
from kernels.errors import InputError

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


@dataclass
class LoadedModel:
    """A dense model in evaluation mode, its tokenizer, and what a record says about where it came from."""

    model: Any
    tokenizer: Any
    source: ModelSource
    sha256: str
    precision: SourcePrecision
    parameters: int
    placement: Placement

    def as_record(self) -> dict[str, Any]:
        return {
            "name": self.source.name,
            "source": self.source.hub_id or str(self.source.path.name),
            "sha256": self.sha256,
            "class": type(self.model).__name__,
            "family": self.source.family,
            "parameters": self.parameters,
            "placement": self.placement.name,
            "source_precision": self.precision.as_record(),
        }


def load_model(
    name: str,
    dtype: str = "float32",
    device: str = "cpu",
    *,
    reparameterized: bool = False,
    seed: int = 0,
    quantized_blocks: int | None = None,
) -> LoadedModel:
    """Load model `name` (see `resolve_model`), or stream it if it is larger than memory.

    dtype: "float32", "float16" or "bfloat16".
    With `reparameterized` the weights are moved off the grid of an already quantized source (see reparameterize.py).
    quantized_blocks: how many decoder blocks will be quantized; None for all.
    Raises InputError if the model cannot be found or read.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()  # what matters is checked here and said in one line
    source = download(resolve_model(name))
    require_unquantized(source)
    sha256, precision = fingerprint(source), source_precision(source)
    folder = convert_gguf(source.path, sha256) if source.kind == "gguf" else source.path
    model: Any
    unquantized = DTYPES[precision.unquantized_dtype]
    size = _weights(folder) * DTYPES[dtype].itemsize
    if size > WEIGHT_SHARE * available_memory("cpu"):
        if reparameterized:
            raise InputError(f"--reparameterize needs all of model {name!r} in memory: {size / 1e9:.1f} GB")
        model, tokenizer = _without_weights(name, folder, dtype)
        if quantized_blocks is not None:
            quantize_only(model, quantized_blocks)
        streamed = stream_model(model, folder, torch.device(device), DTYPES[dtype], unquantized)
        return LoadedModel(model, tokenizer, source, sha256, precision, _parameters(model), streamed)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        model, report = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.float32 if reparameterized else DTYPES[dtype],
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are named below, in one line
        )
    except Exception as error:  # over damaged files transformers and tokenizers raise errors of any class
        raise InputError(f"model {name!r} cannot be loaded from {folder}: {_one_line(error)}") from error
    if missing := sorted(report["missing_keys"]):  # transformers would go on with random values in their place
        raise InputError(f"model {name!r}: {len(missing)} tensors are not in {folder}, the first is {missing[0]}")
    if mismatched := sorted(report["mismatched_keys"]):
        tensor, stored, wanted = mismatched[0]
        raise InputError(f"model {name!r}: {tensor} is {list(stored)} in {folder}, its config says {list(wanted)}")
    model.eval().requires_grad_(False)
    model.config.use_cache = False
    if reparameterized:
        reparameterize(model, seed)
    if quantized_blocks is not None:
        quantize_only(model, quantized_blocks)
    for parameter in model.parameters():  # not model.to(): rotary frequencies are buffers and stay in float32
        parameter.data = parameter.data.to(DTYPES[dtype])
    _round_unquantized(model, unquantized)
    placement = place(model, torch.device(device))
    return LoadedModel(model, tokenizer, source, sha256, precision, _parameters(model), placement)


def _parameters(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _weights(folder: Path) -> int:
    """Numbers in the weight files of a folder."""
    return sum(map(math.prod, tensor_shapes(ModelSource(str(folder), "folder", folder, None, "")).values()))


def _without_weights(name: str, folder: Path, dtype: str) -> tuple[Any, Any]:
    """The model without storage for its parameters, and its tokenizer."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config, dtype=DTYPES[dtype], trust_remote_code=False)
        model.tie_weights()  # undone by giving every module empty parameters of its own
    except Exception as error:  # over damaged files transformers and tokenizers raise errors of any class
        raise InputError(f"model {name!r} cannot be loaded from {folder}: {_one_line(error)}") from error
    model.eval().requires_grad_(False)
    model.config.use_cache = False
    return model, tokenizer


@torch.no_grad()
def _round_unquantized(model: Any, dtype: torch.dtype) -> None:
    """Round all that will not be quantized (embeddings, head, norms, biases) to the 16 bits that the ledger counts.

    What is measured is what is stored: this holds for the unquantized part of a model too.
    """
    quantized = {id(linear.weight) for linear in model_linears(model).values()}
    for name, parameter in model.named_parameters():
        if id(parameter) not in quantized:
            parameter.copy_(round_to_stored(name, parameter, dtype))


def convert_gguf(path: Path, sha256: str) -> Path:
    """The GGUF file as a dense float32 folder in the cache. Reading GGUF takes half a minute, the folder a second."""
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = cache_folder("converted") / f"{sha256[:16]}-transformers-{transformers.__version__}"
    if (folder / "config.json").is_file():
        return folder
    reader = open_gguf(path)
    require_space(
        folder.parent, sum(int(tensor.n_elements) for tensor in reader.tensors) * 5, f"converting {path.name}"
    )
    # transformers wants a folder and a file name; the weights are asked for dense, since some types would
    # otherwise stay packed in layers of its own.
    where: dict[str, Any] = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    # Releases without GgufConfig always load GGUF dense.
    dense: dict[str, Any] = (
        {}
        if not hasattr(transformers, "GgufConfig")
        else {"quantization_config": transformers.GgufConfig(dequantize=True)}
    )
    try:
        with redirect_stderr(StringIO()):  # a progress bar of the reader's own, for two seconds
            tokenizer = AutoTokenizer.from_pretrained(**where)
            model = AutoModelForCausalLM.from_pretrained(**where, **dense, dtype=torch.float32)
    except Exception as error:  # over damaged files transformers and tokenizers raise errors of any class
        raise InputError(f"{path}: transformers cannot read this GGUF file: {_one_line(error)}") from error
    # Nothing of the file's quantization may stay in the config: the folder holds a dense model.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None  # type: ignore[assignment]
    try:
        with atomic_folder(folder) as scratch:
            model.save_pretrained(scratch)
            tokenizer.save_pretrained(scratch)
    except OSError:
        if not folder.exists():  # otherwise another process was faster
            raise
    return folder


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
