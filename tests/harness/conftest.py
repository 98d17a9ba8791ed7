"""Tiny models, texts and experiments on disk, and a cache of its own for every test."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tiny
import torch
from refusing import Place


@pytest.fixture(autouse=True)
def isolated(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No network, no local data, an empty cache; tests of the embedded model keep the machine's own cache."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    if request.node.get_closest_marker("model") is None:
        monkeypatch.setenv("SAGEBENCH_CACHE", str(tmp_path / "cache"))
        monkeypatch.delenv("SAGEBENCH_DATA", raising=False)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Models this small lose more by a second thread than they gain, most of all on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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


@pytest.fixture
def experiment_file(tmp_path: Path) -> Callable[..., Path]:
    """Write an experiment of three rows, with top-level keys replaced or added."""
    return lambda **changes: tiny.write_experiment(tmp_path / "small.yaml", **changes)


@pytest.fixture
def place(model_folder, corpus_file, gguf_file, tmp_path):
    text, gguf = (Path(shutil.copy(source, tmp_path)) for source in (corpus_file, gguf_file))
    return Place(tmp_path, model_folder, text, gguf)
