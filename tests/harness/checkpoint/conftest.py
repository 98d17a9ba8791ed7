"""Checkpoints of tiny models, made by the code that a run goes through."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from harness.checkpoint.write import write_checkpoint
from harness.runner import run
from harness.spec import CalibrationSpec, MethodSpec, ModelSpec, RunSpec
from methods import create_method, method_class

# What makes any method quick: no search for the number of groups, a short one for AWQ's scales, and little training.
_SMALL = {"group_count": 2, "search_tokens": 32, "steps": 20, "epochs": 2}


@dataclass(frozen=True)
class Saved:
    """A checkpoint, its record, and the logits that the quantized model gave in memory for `tokens`.

    logits: with dense weights, as they are measured. packed_logits: with packed layers, by whatever kernel reads them.
    """

    folder: Path
    record: dict[str, Any]
    tokens: Tensor
    logits: Tensor
    packed_logits: Tensor


def _small_options(name: str, width: int) -> dict[str, Any]:
    """Options of method `name` for layers that groups of `width` columns divide."""
    known = method_class(name).Config.model_fields
    return {key: value for key, value in {**_SMALL, "group_size": width, "block_size": width}.items() if key in known}


def quantize_and_save(
    name: str, model: Path, corpus: Path, folder: Path, tokens: Tensor, *,
    samples: int = 4, context: int = tiny.CONTEXT, shard: str = "2GB", dtype: str = "float32", width: int = 32,
    **options: Any,
) -> Saved:  # fmt: skip
    """Quantize `model` with method `name` and write it to `folder`."""
    options = {**_small_options(name, width), **options}
    calibration = CalibrationSpec(corpus=str(corpus), samples=samples, context=context)
    spec = RunSpec(
        model=ModelSpec(name=str(model), dtype=dtype),
        method=MethodSpec(name=name, options=options),
        calibration=None if create_method(name, **options).needs == "nothing" else calibration,
        evaluations=(),
    )
    logits = []

    def keep(loaded: Any, quantized: Any, record: dict[str, Any]) -> None:
        with torch.inference_mode():
            logits.append(loaded.model(tokens).logits.clone())
        write_checkpoint(folder, loaded, quantized, {"key": spec.key, **record}, shard)
        with torch.inference_mode():
            logits.append(loaded.model(tokens).logits.clone())

    record = run(spec, keep=keep)
    return Saved(folder, record, tokens, *logits)


@pytest.fixture(scope="session")
def pristine(tiny_folder: Path, corpus_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """A sharded checkpoint of a tiny model with 3-bit layers in groups of 32; not to be changed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SAGEBENCH_CACHE", str(tmp_path_factory.mktemp("cache")))
        folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
        return quantize_and_save(
            "rtn", tiny_folder, corpus_file, folder, tiny.tokens(), shard="20KB", bits=3
        )  # fmt: skip


@pytest.fixture
def checkpoint(pristine: Saved, tmp_path: Path) -> Path:
    """A copy of `pristine` that a test may damage."""
    return Path(shutil.copytree(pristine.folder, tmp_path / "checkpoint"))


@pytest.fixture
def save(tmp_path: Path, corpus_file: Path) -> Callable[..., Saved]:
    """Quantize a model with a method and save it: `save("gptq", folder)`."""
    return lambda name, model, **more: quantize_and_save(
        name, model, corpus_file, tmp_path / "saved", more.pop("tokens", tiny.tokens()), **more
    )
