"""Many runs on an engine: finished ones are skipped, failed ones are kept and do not stop the rest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from harness.engines.base import Engine, InProcess, Result, Task
from harness.environment import code_fingerprint, runtime_fingerprint
from harness.records import RecordStore
from harness.spec import UNQUANTIZED, RunSpec
from kernels.errors import InputError


@dataclass
class Outcome:
    """Keys of runs by what became of them. errors: one line for each failed run."""

    done: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    errors: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


class Reporter:
    """What a sweep tells the user; this one says nothing. The command line shows progress bars."""

    def begin(self, spec: RunSpec, number: int, total: int) -> None: ...

    def progress(self, spec: RunSpec, done: int, total: int, what: str) -> None: ...

    def end(self, spec: RunSpec, status: str, record: dict[str, Any] | None) -> None: ...


def sweep(
    runs: list[RunSpec],
    references: dict[str, str],
    store: RecordStore,
    reporter: Reporter | None = None,
    *,
    fresh: bool = False,
    engine: Engine | None = None,
    refused: Mapping[str, str] | None = None,
) -> Outcome:
    """Carry out `runs`. references: run key -> key of the unquantized run it is compared with, which goes first.

    Bad input stops the sweep: nothing is recorded for the run it came from, and InputError is raised. Any other failure
    is recorded and the sweep goes on. With `fresh` finished runs are repeated. engine: in this process if not given.
    refused: run key -> why it cannot be carried out here; it fails without having been begun.
    """
    reporter, engine = reporter or Reporter(), engine or InProcess()
    outcome = Outcome()
    number = {spec.key: position for position, spec in enumerate(runs, start=1)}
    refused = refused or {}
    weights = {spec.key: _weights(spec) for spec in runs}
    waiting = [spec for spec in runs if fresh or not _is_finished(spec, store, outcome, reporter)]
    running: dict[str, RunSpec] = {}
    try:
        while waiting or running:
            while len(running) < engine.slots and (spec := _ready(waiting, running, references, weights)):
                waiting.remove(spec)
                reporter.begin(spec, number[spec.key], len(runs))
                if spec.key in refused:
                    _fail(Result(spec, None, refused[spec.key], refused[spec.key]), store, outcome, reporter)
                    continue
                try:
                    reference = _reference(spec, references, store, outcome)
                except LookupError as error:
                    _fail(Result(spec, None, f"RuntimeError: {error}", str(error)), store, outcome, reporter)
                    continue
                running[spec.key] = spec
                engine.start(Task(spec, reference, fresh))
            if running:
                result = engine.wait(reporter.progress)
                del running[result.spec.key]
                _settle(result, store, outcome, reporter)
    except BaseException:
        for spec in running.values():
            reporter.end(spec, "stopped", None)
        raise
    finally:
        engine.close()
    outcome.warnings += store.warnings
    return outcome


def shard(runs: list[RunSpec], references: dict[str, str], part: str) -> list[RunSpec]:
    """The share of `runs` that falls to `part`, "2/8" for the second of eight, with the references that it needs.

    Runs of the same weights fall to one part, which makes them once. A reference whose record is there already is not
    run again. Raises InputError for anything else than i/n.
    """
    first, _, second = part.partition("/")
    if not (first.isdecimal() and second.isdecimal() and 1 <= int(first) <= int(second)):
        raise InputError(f"--shard {part!r}: must be i/n with i from 1 to n, such as 1/4")
    index, count = int(first) - 1, int(second)
    compared = {references.get(spec.key, spec.key) for spec in runs}
    mine = _every([spec for spec in runs if spec.key not in compared], index, count)
    needed = {references[spec.key] for spec in mine if spec.key in references}
    alone = _every([spec for spec in runs if spec.key in compared], index, count)
    keep = {spec.key for spec in (*mine, *alone)} | needed
    return [spec for spec in runs if spec.key in keep]


def _every(runs: list[RunSpec], index: int, count: int) -> list[RunSpec]:
    """Of the weights that `runs` measure every `count`-th from `index` on: the runs of those."""
    weights = {spec.key: _weights(spec) for spec in runs}
    share = set(list(dict.fromkeys(weights.values()))[index::count])
    return [spec for spec in runs if weights[spec.key] in share]


def _weights(spec: RunSpec) -> str:
    """The same for runs that measure the same quantized weights; nobody makes the unquantized ones."""
    return spec.key if spec.method.name == UNQUANTIZED else spec.quantization_key()


def _is_finished(spec: RunSpec, store: RecordStore, outcome: Outcome, reporter: Reporter) -> bool:
    record = store.load(spec.key)
    if record is None:
        return False
    # Speed and memory depend on the runtime's code as well.
    measured_by, now = record["environment"], runtime_fingerprint()
    if measured_by.get("code") != code_fingerprint() or measured_by.get("runtime_code", now) != now:
        outcome.warnings.append(f"{spec.describe()}: measured with other code than this; --fresh repeats it")
    outcome.skipped.append(spec.key)
    reporter.end(spec, "finished before", record)
    return True


def _ready(
    waiting: list[RunSpec], running: dict[str, RunSpec], references: dict[str, str], weights: dict[str, str]
) -> RunSpec | None:
    """The first run whose reference is neither waiting nor running, and whose weights no other run is making: that one
    leaves them in the cache, and two of them would write the same files."""
    unsettled = {spec.key for spec in waiting} | running.keys()
    being_made = {weights[key] for key in running}
    for spec in waiting:
        reference = references.get(spec.key, "")
        if (reference == spec.key or reference not in unsettled) and weights[spec.key] not in being_made:
            return spec
    return None


def _reference(
    spec: RunSpec, references: dict[str, str], store: RecordStore, outcome: Outcome
) -> dict[str, Any] | None:
    """The record of the unquantized model that `spec` is compared with; a quantized number does not count without."""
    key = references.get(spec.key)
    if key is None or key == spec.key:
        return None
    # With `fresh` an older record may be there even though the run has just failed.
    record = None if key in outcome.failed else store.load(key)
    if record is None:
        raise LookupError("the unquantized model was not measured under this protocol: its run failed")
    return record


def _settle(result: Result, store: RecordStore, outcome: Outcome, reporter: Reporter) -> None:
    """Keep what came of a run."""
    if result.bad_input:
        reporter.end(result.spec, "stopped", None)
        raise InputError(result.error)
    if result.record is None:
        _fail(result, store, outcome, reporter)
        return
    store.save(result.spec.key, result.record)
    outcome.done.append(result.spec.key)
    reporter.end(result.spec, "done", result.record)


def _fail(result: Result, store: RecordStore, outcome: Outcome, reporter: Reporter) -> None:
    spec = result.spec
    store.save_failure(spec.key, spec.model_dump(mode="json"), result.error, result.details)
    outcome.failed.append(spec.key)
    outcome.errors[spec.key] = f"{spec.describe()}: {result.error}"
    reporter.end(spec, "failed", None)
