"""Where a model comes from: its name resolved, its files found and checked before anything is loaded.

Weights are read from safetensors or GGUF alone. Pickled checkpoints (.bin, .pt) are refused.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError, safe_open

from harness.assets import asset_path, sha256_of
from harness.catalog import models
from harness.hub import require_hub
from kernels.errors import InputError, did_you_mean

# The number of a decoder block in a tensor's name: "model.layers.3.mlp", "blk.3.ffn_up".
_NUMBERED = re.compile(r"\.\d+\.")
# Files of a model folder without which it would be another model: weights, configuration, tokenizer.
_DECISIVE = (
    "*.safetensors", "config.json", "tokenizer*", "vocab*", "merges.txt", "spiece.model", "added_tokens.json",
    "special_tokens_map.json",
)  # fmt: skip


@dataclass(frozen=True)
class ModelSource:
    """kind: "gguf" (path is the file), "folder" (path is the folder) or "hub" (path is unused).

    quantized: the `quant_method` of a folder that holds a quantized model ("gptq", ...), which can be measured as it
    is but not quantized; None for all others, GGUF files too, since their weights are read dense.
    """

    name: str
    kind: Literal["gguf", "folder", "hub"]
    path: Path
    hub_id: str | None
    family: str
    quantized: str | None = None


@dataclass(frozen=True)
class SourcePrecision:
    """What the weights were before they were loaded. bits: per weight of the linear layers, constants included."""

    quantized: bool
    format: str
    bits: float
    detail: str

    @property
    def unquantized_dtype(self) -> str:
        """The 16 bits to which all that is not quantized is rounded, and in which it is counted and stored."""
        return "bfloat16" if self.format == "BF16" else "float16"

    def as_record(self) -> dict[str, Any]:
        return {"quantized": self.quantized, "format": self.format, "bits": self.bits, "detail": self.detail}


def resolve_model(name: str) -> ModelSource:
    """Find model `name`: a name of the catalogue, a folder, a GGUF file, or a hub id "owner/name".

    Fetches an embedded asset if need be. Raises InputError if there is no such model or its files are unusable.
    """
    entry = models().get(name.lower())
    if entry is not None:
        if entry.asset is not None:
            return ModelSource(name.lower(), "gguf", asset_path(entry.asset), None, entry.family)
        return ModelSource(name.lower(), "hub", Path(), entry.hub, entry.family)
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise InputError(f"model {name!r}: no such GGUF file")
        return ModelSource(name, "gguf", path, None, _gguf_family(path))
    if name and path.is_dir():  # Path("") would be the current folder
        return ModelSource(name, "folder", path, None, *_check_folder(path))
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        return ModelSource(name, "hub", Path(), name, _family(name.split("/")[1]))
    raise InputError(
        f"unknown model {name!r}" + did_you_mean(name, models()) + " (or a folder, a .gguf file, owner/name)"
    )


def is_local(name: str) -> bool:
    """True if model `name` is a folder, a GGUF file, or an asset of the catalogue: nothing of it lies on the hub."""
    entry = models().get(name.lower())
    if entry is not None:
        return entry.asset is not None
    path = Path(name).expanduser()
    return path.suffix == ".gguf" or path.is_dir()


def download(source: ModelSource) -> ModelSource:
    """A hub model as a local folder: configuration, tokenizer and safetensors, nothing that could be executed."""
    if source.kind != "hub":
        return source
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.json", "*.safetensors", "*.model", "*.txt"]
    hub_id = source.hub_id or source.name
    try:
        try:
            folder = snapshot_download(hub_id, allow_patterns=patterns, local_files_only=True)
            complete = _is_complete(Path(folder))
        except LocalEntryNotFoundError:
            complete = False
        if not complete:
            require_hub(f"model {source.name!r}", hub_id, "--model with a local folder")
            folder = snapshot_download(hub_id, allow_patterns=patterns, revision=_safetensors_revision(hub_id))
    except (HfHubHTTPError, HFValidationError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"model {source.name!r} cannot be fetched from the hub ({reason})") from error
    return ModelSource(source.name, "folder", Path(folder), hub_id, *_check_folder(Path(folder)))


def _is_complete(folder: Path) -> bool:
    """True if a cached snapshot holds its configuration and every shard."""
    files = {file.name for file in folder.glob("*.safetensors")}
    return (folder / "config.json").is_file() and bool(files) and _shards(folder) <= files


def _safetensors_revision(hub_id: str) -> str | None:
    """The revision of a hub model that has safetensors: None for its main branch, or the hub's own conversion.

    Older models (OPT) keep pickled weights on their main branch; the hub's conversion bot has opened a pull request
    with the same weights as safetensors, which can be fetched as a revision.
    """
    from huggingface_hub import HfApi

    hub = HfApi()
    if any(name.endswith(".safetensors") for name in hub.list_repo_files(hub_id)):
        return None
    requests = hub.get_repo_discussions(hub_id, author="SFconvertbot", discussion_type="pull_request")
    return next((f"refs/pr/{request.num}" for request in requests if "safetensors" in request.title), None)


def _shards(folder: Path) -> set[str]:
    """Names of the weight files that a folder's index asks for; empty without an index."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return set()
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        for name in names:
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise InputError(f"{index} names {name!r}; a shard must be a .safetensors file in the same folder")
        return names
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise InputError(f"{index} is damaged ({error})") from error


def fingerprint(source: ModelSource) -> str:
    """sha256 over the names and the content of all files that decide a model's function: weights, configuration and
    tokenizer. Of a GGUF file, which holds all three, the file's own."""
    if source.kind == "gguf":
        return _sha256(source.path)
    digest = hashlib.sha256()
    for file in sorted({file for pattern in _DECISIVE for file in source.path.glob(pattern)}):
        digest.update(file.name.encode() + b"\0" + _sha256(file).encode() + b"\n")
    return digest.hexdigest()


def planned_content(source: ModelSource) -> str | None:
    """The checksum (16 digits) that belongs in a run's key: of a folder or file of the user's, which may change. None
    for a name of the catalogue, which stands for fixed files, and for the hub."""
    fixed = source.name.lower() in models() or source.kind == "hub"
    return None if fixed else fingerprint(source)[:16]


def _sha256(file: Path) -> str:
    """The checksum of a file, read once as long as its size and time stay the same, however many runs ask for it."""
    found = file.stat()
    return _sha256_of_version(file, found.st_size, found.st_mtime_ns)


@cache
def _sha256_of_version(file: Path, size: int, changed: int) -> str:
    return sha256_of(file)


def source_precision(source: ModelSource) -> SourcePrecision:
    """In which precision the source file holds the weights of its linear layers."""
    if source.kind == "gguf":
        return _gguf_precision(source.path)
    counts: Counter[str] = Counter()
    for file in sorted(source.path.glob("*.safetensors")):
        with safe_open(file, framework="np") as opened:
            for key in opened.keys():  # noqa: SIM118 - not a mapping
                tensor = opened.get_slice(key)
                if len(tensor.get_shape()) == 2:
                    rows, columns = tensor.get_shape()
                    counts[tensor.get_dtype()] += rows * columns
    dtype = counts.most_common(1)[0][0] if counts else "?"
    return SourcePrecision(False, dtype, {"F32": 32.0, "F64": 64.0}.get(dtype, 16.0), f"safetensors, mostly {dtype}")


def require_unquantized(source: ModelSource) -> None:
    """Raise InputError for a model that cannot be quantized because it already is."""
    if source.quantized is not None:
        raise InputError(
            f"model {source.name!r} is already quantized ({source.quantized}); give the unquantized model "
            "(a local folder can be measured as it is: reproduce.py --model)"
        )


def linear_weights(source: ModelSource) -> tuple[int, int]:
    """Parameters of a local model, and those in matrices of its decoder blocks, from the headers of its files.

    A hub model that is not in the catalogue counts as (0, 0): nothing is known before it is fetched.
    """
    shapes = tensor_shapes(source)
    return sum(map(math.prod, shapes.values())), sum(map(math.prod, block_matrices(shapes).values()))


def block_matrices(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Of `tensor_shapes`, the matrices inside decoder blocks: [out_features, in_features]."""
    return {name: shape for name, shape in shapes.items() if len(shape) == 2 and _NUMBERED.search(name)}


def tensor_shapes(source: ModelSource) -> dict[str, tuple[int, ...]]:
    """Shapes of a local model's tensors by name, from the headers of its files; empty for a hub model."""
    sizes: list[tuple[str, tuple[int, ...]]] = []
    if source.kind == "gguf":
        # GGUF lists the fastest axis first.
        tensors = open_gguf(source.path).tensors
        sizes = [(tensor.name, tuple(int(size) for size in reversed(tensor.shape))) for tensor in tensors]
    elif source.kind == "folder":
        for file in source.path.glob("*.safetensors"):
            with safe_open(file, framework="np") as opened:
                sizes += [(key, tuple(opened.get_slice(key).get_shape())) for key in opened.keys()]  # noqa: SIM118
    return dict(sizes)


def open_gguf(path: Path) -> Any:
    """A GGUF reader. Raises InputError for a file that is not GGUF or is cut short.

    The last file stays open as long as its size and time stay the same: reading its vocabulary takes seconds, and
    every row of a table asks.
    """
    found = path.stat()
    return _open_gguf(path, found.st_size, found.st_mtime_ns)


@lru_cache(maxsize=1)
def _open_gguf(path: Path, size: int, changed: int) -> Any:
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
        for tensor in reader.tensors:
            if tensor.data.nbytes != tensor.n_bytes:
                raise ValueError(f"tensor {tensor.name} is cut short")
        return reader
    except (ValueError, IndexError, OSError, KeyError, UnicodeDecodeError, OverflowError) as error:
        raise InputError(f"{path}: not a readable GGUF file ({error}); it may be truncated, fetch it again") from error


def _gguf_precision(path: Path) -> SourcePrecision:
    from gguf import GGML_QUANT_SIZES

    weights: Counter[str] = Counter()
    stored = 0
    for tensor in open_gguf(path).tensors:
        if tensor.name.startswith("blk.") and len(tensor.shape) == 2:
            weights[tensor.tensor_type.name] += int(tensor.n_elements)
            block, size = GGML_QUANT_SIZES[tensor.tensor_type]
            stored += int(tensor.n_elements) // block * size
    if not weights:
        raise InputError(f"{path}: a GGUF file without decoder blocks")
    total = sum(weights.values())
    kind = weights.most_common(1)[0][0]
    detail = ", ".join(f"{name} {100 * count / total:.0f} %" for name, count in weights.most_common())
    quantized = any(name not in {"F32", "F16", "BF16", "F64"} for name in weights)
    return SourcePrecision(quantized, kind, round(8 * stored / total, 3), f"GGUF, linear weights: {detail}")


def _gguf_family(path: Path) -> str:
    field = open_gguf(path).get_field("general.architecture")
    return _family(bytes(field.parts[field.data[0]]).decode() if field else "llama")


def _check_folder(folder: Path) -> tuple[str, str | None]:
    """Refuse folders that cannot be loaded safely; returns the model family, and how the model is quantized."""
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise InputError(f"model folder {folder} has no config.json")
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("not an object")
    except ValueError as error:
        raise InputError(f"{config_file} is not valid JSON ({error})") from error
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickled = [*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")]
        hint = f"; {pickled[0].name} is a pickle and is never read, convert it to safetensors" if pickled else ""
        raise InputError(f"model folder {folder} has no weights (*.safetensors){hint}")
    missing = sorted(_shards(folder) - {file.name for file in files})
    if missing:
        raise InputError(f"model folder {folder}: shard {missing[0]} is missing")
    for file in files:
        try:
            with safe_open(file, framework="np"):
                pass
        except (SafetensorError, OSError) as error:
            raise InputError(f"{file}: not a readable safetensors file ({error}); it may be truncated") from error
    described = config.get("quantization_config")
    quantized = str(described.get("quant_method", "unknown")) if isinstance(described, dict) else None
    return _family(str(config.get("model_type", "llama"))), quantized


def _family(architecture: str) -> str:
    """The family of settings an architecture belongs to: "opt", "qwen", or "llama" for all others."""
    architecture = architecture.lower()
    return next((family for family in ("opt", "qwen") if architecture.startswith(family)), "llama")
