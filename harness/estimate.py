"""What a run will cost, roughly: for `--dry-run`, and to refuse a run that cannot fit in memory.

Time comes from a short measurement of this machine's matrix product and the operations a run needs; expect it to be
right within a factor of two.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cache

import torch

from harness.catalog import ModelEntry, find_task, models
from harness.determinism import prepare_products
from harness.memory import available_memory
from harness.models.source import linear_weights, resolve_model
from harness.spec import STORED, DecodeSpec, ModelSpec, QualitySpec, RunSpec, ZeroShotSpec
from methods import create_method

_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
_ALL_WINDOWS = 150  # what "all windows" of WikiText-2 come to, give or take the tokenizer
_TOKENS_AN_ANSWER = 60  # of a zero-shot task: its question and one answer, give or take the task
_LOAD_SECONDS_PER_PARAMETER = 3e-8
_QUANTIZE_SECONDS_PER_WEIGHT = 6e-7
_COPY_BYTES_PER_SECOND = {"cpu": 1e10, "cuda": 1e12}
_GPU_OPERATIONS_PER_SECOND = 2e14  # of one that cannot be asked
_PROCESS_BYTES = 1_500_000_000  # Python, torch, transformers, and activations
_ATTENTION_SHARE = 1.4  # forward pass with attention and loss over its matrix products alone


@dataclass(frozen=True)
class Estimate:
    """seconds of wall time, bytes of memory at the peak."""

    seconds: float
    memory_bytes: int


def estimate(spec: RunSpec, *, quantized: bool = False) -> Estimate:
    """The expected cost of a run on this machine. quantized: another run will have made its weights, to be loaded."""
    parameters, weights = _sizes(spec.model.name)
    speed = _operations_per_second(spec.model.device, spec.model.dtype)
    seconds = parameters * _LOAD_SECONDS_PER_PARAMETER
    passes = sum(_tokens(evaluation) for evaluation in spec.quality)
    for part in spec.evaluations:
        if isinstance(part, DecodeSpec):
            rounds = (part.rounds + 1) * (
                1 if spec.method.name == "fp16" else 2
            )  # a warm-up; packed and dense in turns
            passes += rounds * part.batch * part.prompt
            # A step reads every weight once, of whatever size they are.
            width = _COPY_BYTES_PER_SECOND["cpu" if spec.model.device == "cpu" else "cuda"]
            seconds += rounds * part.tokens * parameters * _BYTES[spec.model.dtype] / width
    seconds += _ATTENTION_SHARE * 2 * parameters * passes / speed
    memory = parameters * _BYTES[spec.model.dtype] + _PROCESS_BYTES
    here = _is_here(spec.model.device)
    if here and memory > available_memory(spec.model.device) and _comes_in_blocks(spec.model):
        # The largest models of the catalogue have 60 blocks and more.
        memory = (parameters - weights + weights // 20) * _BYTES[spec.model.dtype] + _PROCESS_BYTES
    if spec.method.name == STORED or quantized:
        return Estimate(seconds, memory)
    if spec.method.name != "fp16":
        seconds += weights * _QUANTIZE_SECONDS_PER_WEIGHT
    method = create_method(spec.method.name, **spec.method.options)
    if method.needs != "nothing" and spec.calibration is not None:
        tokens = spec.calibration.samples * spec.calibration.context
        # Two forward passes over the blocks, and the products of the Hessians: about as much again. Training is a
        # forward pass and, for the gradients of weights and of activations, two more.
        seconds += (3 + 3 * method.training_epochs(tokens)) * _ATTENTION_SHARE * 2 * weights * tokens / speed
        memory += int(tokens * (weights / 1e6) ** 0.5 * 64)
    return Estimate(seconds, memory)


def _comes_in_blocks(model: ModelSpec) -> bool:
    """True if a model that does not fit comes to its device one block at a time: to a GPU from host memory, to the CPU
    from its safetensors files."""
    if torch.device(model.device).type != "cpu":
        return True
    entry = models().get(model.name.lower())
    gguf = model.name.endswith(".gguf") if entry is None else entry.asset is not None
    return not gguf and not model.reparameterize


def _tokens(evaluation: QualitySpec) -> int:
    """Tokens that go through the model for one evaluation."""
    if isinstance(evaluation, ZeroShotSpec):
        task = find_task(evaluation.task)
        return min(evaluation.limit or task.documents, task.documents) * task.choices * _TOKENS_AN_ANSWER
    return (evaluation.windows or _ALL_WINDOWS) * evaluation.context


def _sizes(name: str) -> tuple[int, int]:
    """Parameters of a model, and those of its linear layers; from the catalogue, or from the model's files."""
    entry: ModelEntry | None = models().get(name.lower())
    if entry is not None:
        return entry.parameters, entry.linear_parameters
    return linear_weights(resolve_model(name))


def _is_here(device: str) -> bool:
    """False for a GPU where this machine has none: the run is planned for another."""
    return torch.device(device).type == "cpu" or torch.cuda.is_available()


@cache
def _operations_per_second(device: str, dtype: str) -> float:
    if not _is_here(device):
        return _GPU_OPERATIONS_PER_SECOND
    prepare_products(device)
    kind = getattr(torch, dtype)
    size = 8192
    if torch.device(device).type == "cpu":
        # Processors without instructions for 16-bit numbers are so slow at them that a small product must do.
        size = 1024 if kind == torch.float32 else 512
    left = torch.ones(size, size, dtype=kind, device=device)
    fastest = float("inf")
    for _ in range(5):  # the first warms up, and others may wait for whatever else runs here
        start = time.perf_counter()
        result = left @ left
        float(result[0, 0])  # waits for the device
        fastest = min(fastest, time.perf_counter() - start)
    return 2 * size**3 / fastest
