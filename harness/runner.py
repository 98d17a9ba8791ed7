"""One run: load, calibrate and quantize, evaluate, and what goes into its record."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

from harness.calibration import check_sample_size
from harness.catalog import models
from harness.corpora import SELF, Text, calibration_windows, load_text
from harness.determinism import prefer_deterministic_kernels, seed_everything
from harness.environment import environment_record, quantization_fingerprint
from harness.evaluations import (
    check_model,
    check_vocabulary,
    gap,
    make_reference,
    measure,
    prepare,
    same_as_reference,
    text_record,
)
from harness.generation import self_calibration
from harness.ledger import build_ledger
from harness.metrics.phases import Phases
from harness.metrics.weight_distribution import weight_distribution
from harness.models.blocks import block_linears, find_blocks, model_linears
from harness.models.load import LoadedModel, load_model
from harness.quantize import QuantizedModel, check_shapes, install, quantize_model
from harness.quantized_cache import QuantizedEntry, run_conditions
from harness.spec import STORED, UNQUANTIZED, RunSpec
from harness.stored import run_stored
from kernels.errors import InputError
from methods import QuantizationMethod, create_method

# Called with (steps done, steps in all, what is being done).
Progress = Callable[[int, int, str], None]
# Called with a model, what is installed in it, and the record of the run.
Keep = Callable[[LoadedModel, QuantizedModel, dict[str, Any]], None]

_ANCHOR_TOLERANCE = 0.02


class NoOpError(RuntimeError):
    """A quantized model that equals the unquantized one: the method did nothing."""


def run(
    spec: RunSpec,
    *,
    reference: dict[str, Any] | None = None,
    fresh: bool = False,
    progress: Progress = lambda done, total, what: None,
    keep: Keep | None = None,
    weights: str | None = None,
) -> dict[str, Any]:
    """Carry out `spec` and return its record (without key and date, which the store adds).

    reference: the record of the unquantized model under the same evaluations. fresh: quantize even if cached. keep:
    called at the end with the quantized model and the record, for whoever wants to store it. weights: the key in the
    cache of the weights that an earlier run of this spec measured, perhaps with other threads; taken if they are there.
    Raises InputError for bad input and NoOpError if nothing was quantized.
    """
    if spec.method.name == STORED:
        return run_stored(spec, fresh=fresh, progress=progress)
    method = create_method(spec.method.name, **spec.method.options)
    seed_everything(method.config.seed)
    prefer_deterministic_kernels(spec.model.device)
    phases = Phases(spec.model.device)
    progress(0, 1, "loading the model")
    with phases.measure("load"):
        loaded = load_model(
            spec.model.name,
            spec.model.dtype,
            spec.model.device,
            reparameterized=spec.model.reparameterize,
            seed=spec.model.seed,
            quantized_blocks=spec.model.quantized_blocks,
        )
        # Everything that can be wrong with the input is found before the long part begins.
        check_shapes(loaded.model, method)
        check_model(spec, loaded)
        evaluations = [prepare(evaluation, loaded) for evaluation in spec.quality]
        calibration = calibration_text(spec, method, loaded, progress)
    references: list[str] = []
    for evaluation in evaluations:
        if evaluation.spec.metric == "divergence":  # needs the model while it is not quantized yet
            steps = partial(_with_label, progress, "reference")
            with phases.measure("reference"):
                references.append(make_reference(evaluation, spec.model, loaded, steps, beside=references))

    distributions = _distributions(loaded) if method.name == UNQUANTIZED else None
    quantized, origin = quantize_or_load(spec, method, loaded, calibration, phases, fresh, progress, weights)
    if method.name != UNQUANTIZED and all(layer.relative_error == 0 for layer in quantized.layers):
        raise NoOpError(f"{spec.describe()}: every decoded weight equals the original")

    metrics = []
    for evaluation in evaluations:
        steps = partial(_with_label, progress, evaluation.label)
        with phases.measure("evaluate"):
            metrics.append(measure(evaluation, loaded, origin["key"], steps, fresh=fresh))
    reference_entry = compare(spec, metrics, reference)
    record = {
        "spec": spec.model_dump(mode="json"),
        "environment": environment_record(),
        "model": loaded.as_record(),
        "method": {
            "name": method.name,
            "options": method.config.model_dump(mode="json"),
            "provenance": asdict(method.provenance),
        },
        "data": {
            "calibration": None if calibration is None else text_record(calibration[0]),
            "evaluations": [evaluation.data_record() for evaluation in evaluations],
        },
        "metrics": metrics,
        "reference": reference_entry,
        "ledger": build_ledger(loaded.model, quantized, origin["file_bytes"]),
        "layers": [layer.as_record() for layer in quantized.layers],
        **({} if distributions is None else {"weights": distributions}),
        "phases": phases.measured,
        "quantization": origin,
        "warnings": [*_warnings(quantized, spec), *anchor_warnings(spec, metrics)],
    }
    if keep is not None:
        keep(loaded, quantized, record)
    return record


def _distributions(loaded: LoadedModel) -> dict[str, Any]:
    """How the weights of each layer are distributed: a property of the model, so its own record alone holds it."""
    found, blocks = {}, find_blocks(loaded.model)
    for index, block in enumerate(blocks.blocks):
        loaded.placement.bring(block)  # one that is streamed from disk has no weights before
        for name, linear in block_linears(block).items():
            found[blocks.name(index, name)] = weight_distribution(linear.weight)
    return found


def _with_label(progress: Progress, what: str, done: int, total: int) -> None:
    progress(done, total, what)


def calibration_text(
    spec: RunSpec,
    method: QuantizationMethod,
    loaded: LoadedModel,
    progress: Progress = lambda done, total, what: None,
) -> tuple[Text, Any] | None:
    if method.needs == "nothing":
        return None
    if spec.calibration is None:
        raise InputError(f"method {method.name!r} needs calibration text")
    widest = max(linear.in_features for linear in model_linears(loaded.model).values())
    check_sample_size(spec.calibration.samples, spec.calibration.context, widest)
    asked = spec.calibration
    if asked.corpus == SELF:
        steps = partial(_with_label, progress, "writing calibration text")
        return self_calibration(loaded, asked.samples, asked.context, asked.seed, steps)
    text = load_text(asked.corpus, asked.split, asked.content)
    windows = calibration_windows(text, loaded.tokenizer, asked.samples, asked.context, asked.seed)
    check_vocabulary(windows, loaded)
    return text, windows


def quantize_or_load(
    spec: RunSpec,
    method: QuantizationMethod,
    loaded: LoadedModel,
    calibration: tuple[Text, Any] | None,
    phases: Phases,
    fresh: bool,
    progress: Progress,
    weights: str | None = None,
) -> tuple[QuantizedModel, dict[str, Any]]:
    """The quantized weights, installed in the model, and where they come from: the cache, or made now and kept there,
    block by block, so that an interrupted run goes on from its last block.

    The unquantized model is not kept: it is made at once, and would be by far the largest entry.
    """
    text_hash = "" if calibration is None else calibration[0].sha256
    conditions = json.dumps(run_conditions(spec.model.device), sort_keys=True)
    key = spec.quantization_key(loaded.sha256, text_hash, quantization_fingerprint(), conditions)
    entry = None if method.name == UNQUANTIZED else QuantizedEntry(key)
    if entry is not None and fresh:
        entry.clear()
    for known in (weights, key):
        cached = None if known is None or entry is None else QuantizedEntry(known).load()
        if cached is not None:
            quantized, earlier, size = cached
            install(loaded.model, quantized, loaded.placement)
            phases.measured.update(earlier)
            return quantized, {"key": known, "from_cache": True, "file_bytes": size}
    with phases.measure("quantize"):
        windows = None if calibration is None else calibration[1]
        quantized = quantize_model(loaded.model, method, windows, progress, loaded.placement, entry)
    if entry is None:
        return quantized, {"key": key, "from_cache": False, "file_bytes": None}
    if entry.restored_blocks:
        phases.measured["quantize"]["seconds"] += entry.seconds_before
    size = entry.finish({"quantize": phases.measured["quantize"]})
    return quantized, {
        "key": key, "from_cache": False, "restored_blocks": entry.restored_blocks, "file_bytes": size,
    }  # fmt: skip


def compare(spec: RunSpec, metrics: list[dict[str, Any]], reference: dict[str, Any] | None) -> dict[str, Any] | None:
    """What the unquantized model has under the same protocol; a quantized model must not equal it exactly."""
    if spec.method.name == UNQUANTIZED:
        return None
    # Divergence shows a no-op alone, without a record of the unquantized model.
    pairs = list(zip(metrics, reference["metrics"] if reference else [{}] * len(metrics), strict=True))
    for mine, theirs in pairs:
        if same_as_reference(mine, theirs):
            what = f"{mine['metric']} on {mine['dataset']}"
            raise NoOpError(f"{spec.describe()}: {what} equals the unquantized model's exactly")
    if reference is None:
        return None
    entry = {"key": reference["key"], "gaps": [gap(mine, theirs) for mine, theirs in pairs]}
    nll_gaps = [gap(mine, theirs) for mine, theirs in pairs if mine["metric"] == "perplexity"]
    return {**entry, "nll_gap": nll_gaps} if nll_gaps else entry


def _warnings(quantized: QuantizedModel, spec: RunSpec) -> list[str]:
    retried = [layer.name for layer in quantized.layers if "damping" in layer.facts]
    if not retried:
        return []
    return [f"{len(retried)} layers needed more damping than asked for, the first is {retried[0]} (see layers.facts)"]


def anchor_warnings(spec: RunSpec, metrics: list[dict[str, Any]]) -> list[str]:
    """The unquantized model on all of WikiText-2 must agree with what everybody publishes for it."""
    entry = models().get(spec.model.name)
    if entry is None or entry.anchor is None or spec.method.name != UNQUANTIZED:
        return []
    return [
        f"unquantized perplexity {metric['value']:.3f} on wikitext2 is not the published {entry.anchor:.2f}"
        for metric in metrics
        if (metric["metric"], metric["dataset"], metric.get("context")) == ("perplexity", "wikitext2", 2048)
        and metric["windows"] == metric["windows_available"]
        and abs(metric["value"] - entry.anchor) > _ANCHOR_TOLERANCE
    ]
