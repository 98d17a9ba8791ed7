"""A run that measures a quantized model as it is stored: a row of a table that no method of ours has made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from harness.environment import environment_record
from harness.evaluations import check_model, measure, prepare
from harness.metrics.phases import Phases
from harness.models.source import require_unquantized, resolve_model
from harness.models.stored import load_stored, stored_format, stored_size
from harness.plan import PlannedRow
from harness.spec import STORED, DivergenceSpec, EvaluationSpec, MethodSpec, ModelSpec, RunSpec


@dataclass(frozen=True)
class PlannedStored:
    """A run that measures a model as stored, and its row. can_be_quantized: methods can start from it too (GGUF)."""

    run: RunSpec
    row: PlannedRow
    can_be_quantized: bool


def plan_stored(model: ModelSpec, evaluations: tuple[EvaluationSpec, ...]) -> PlannedStored | None:
    """The run of a quantized model or of a GGUF file that was named by its path; None for all other models.

    What such a model diverges from is not known: divergence is left out. Raises InputError for a format that nothing
    here can read, and for a quantized model where nothing is measured that a stored model can give.
    """
    source = resolve_model(model.name)
    if source.quantized is None and not model.name.endswith(".gguf"):
        return None
    measured = tuple(evaluation for evaluation in evaluations if not isinstance(evaluation, DivergenceSpec))
    if not measured:
        require_unquantized(source)
        return None
    as_stored = model.model_copy(update={"reparameterize": False, "seed": 0})
    run = RunSpec(model=as_stored, method=MethodSpec(name=STORED), calibration=None, evaluations=measured)
    method, setting, _ = stored_format(source)
    note = "measured as stored, by its own library; payload counted from its files"
    row = PlannedRow(method, f"{setting}, as stored", method.upper(), source.name, None, run.key, note)
    return PlannedStored(run, row, source.quantized is None)


def run_stored(
    spec: RunSpec,
    *,
    fresh: bool = False,
    progress: Callable[[int, int, str], None] = lambda done, total, what: None,
) -> dict[str, Any]:
    """Measure the model of `spec` and return the run's record; nothing is quantized.

    Raises InputError if the model cannot be read.
    """
    source = resolve_model(spec.model.name)
    phases = Phases(spec.model.device)
    progress(0, 1, "loading the model")
    with phases.measure("load"):
        loaded = load_stored(source, spec.model.dtype, spec.model.device)
        check_model(spec, loaded)
        evaluations = [prepare(evaluation, loaded) for evaluation in spec.quality]
    method, setting, nominal_bits = stored_format(source)
    key = spec.quantization_key(loaded.sha256)
    metrics = []
    for evaluation in evaluations:
        label = evaluation.label
        with phases.measure("evaluate"):
            metrics.append(
                measure(evaluation, loaded, key, partial(_labelled, progress, label), fresh=fresh)
            )  # fmt: skip
    return {
        "spec": spec.model_dump(mode="json"),
        "environment": environment_record(),
        "model": loaded.as_record(),
        "method": {
            "name": method,
            "options": {"setting": setting},
            "provenance": {"paper": "", "code": "stored checkpoint", "parity": "read by its own library"},
        },
        "data": {"calibration": None, "evaluations": [evaluation.data_record() for evaluation in evaluations]},
        "metrics": metrics,
        "reference": None,
        "ledger": stored_size(source, loaded.model.config).as_ledger(nominal_bits),
        "layers": [],
        "phases": phases.measured,
        "quantization": {"key": key, "from_cache": False, "file_bytes": None},
        "warnings": [],
    }


def _labelled(progress: Callable[[int, int, str], None], what: str, done: int, total: int) -> None:
    progress(done, total, what)
