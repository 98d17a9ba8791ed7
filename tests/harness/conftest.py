"""Tiny models, texts and experiments on disk, and a cache of its own for every test."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml


@pytest.fixture(autouse=True)
def isolated(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No network, no local data, an empty cache; tests of the embedded model keep the machine's own cache."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    if request.node.get_closest_marker("model") is None:
        monkeypatch.setenv("SAGEBENCH_CACHE", str(tmp_path / "cache"))
        monkeypatch.delenv("SAGEBENCH_DATA", raising=False)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaMA-like model folder; not to be changed."""
    return tiny.save(tmp_path_factory.mktemp("tiny-llama"))


@pytest.fixture
def model_folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy of `tiny_folder` that a test may damage."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "model"))


@pytest.fixture(scope="session")
def corpus_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of 1000 words: 31 windows of 32 tokens."""
    path = tmp_path_factory.mktemp("text") / "story.txt"
    path.write_text(tiny.words(1000), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small valid GGUF file; not to be changed."""
    return tiny.write_gguf(tmp_path_factory.mktemp("gguf") / "small.gguf")


ROWS = [
    {"method": "fp16", "setting": "16 bit", "label": "FP16"},
    {"method": "rtn", "setting": "3 bit g32", "label": "RTN", "options": {"bits": 3, "group_size": 32}},
    {"method": "gptq", "setting": "3 bit g32", "label": "GPTQ", "options": {"bits": 3, "group_size": 32}},
]


@pytest.fixture
def experiment_file(tmp_path: Path) -> Callable[..., Path]:
    """Write an experiment of three rows, with top-level keys replaced or added."""

    def write(**changes: Any) -> Path:
        content = {
            "name": "small", "item": "table 1", "title": "A small table", "metric": "perplexity",
            "corpora": ["wikitext2"], "models": ["opt-1.3b"], "rows": ROWS, **changes,
        }  # fmt: skip
        path = tmp_path / "small.yaml"
        path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
        return path

    return write
