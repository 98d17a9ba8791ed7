"""Many runs, one after the other: finished ones are skipped, failed ones are kept and do not stop the rest."""

from __future__ import annotations

import errno
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from harness.environment import code_fingerprint
from harness.records import RecordStore
from harness.runner import run
from harness.spec import RunSpec
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

    def progress(self, done: int, total: int, what: str) -> None: ...

    def end(self, spec: RunSpec, status: str, record: dict[str, Any] | None) -> None: ...


def sweep(
    runs: list[RunSpec],
    references: dict[str, str],
    store: RecordStore,
    reporter: Reporter | None = None,
    *,
    fresh: bool = False,
    execute: Callable[..., dict[str, Any]] = run,
) -> Outcome:
    """Carry out `runs` in order. references: run key -> key of the unquantized run it is compared with.

    InputError stops the sweep: nothing is recorded for the run it came from. Any other failure is recorded and the
    sweep goes on. With `fresh` finished runs are repeated.
    """
    reporter = reporter or Reporter()
    outcome = Outcome()
    for number, spec in enumerate(runs, start=1):
        finished = None if fresh else store.load(spec.key)
        if finished is not None:
            if finished["environment"].get("code") != code_fingerprint():
                outcome.warnings.append(f"{spec.describe()}: measured with other code than this; --fresh repeats it")
            outcome.skipped.append(spec.key)
            reporter.end(spec, "finished before", finished)
            continue
        reporter.begin(spec, number, len(runs))
        try:
            record = execute(
                spec,
                reference=_reference(spec, references, store, outcome),
                fresh=fresh,
                progress=reporter.progress,
            )
            store.save(spec.key, record)
        except (InputError, KeyboardInterrupt):
            reporter.end(spec, "stopped", None)
            raise
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise InputError(
                    f"no disk space left ({error.filename or store.folder}); finished runs are kept"
                ) from error
            _fail(spec, error, store, outcome, reporter)
        except Exception as error:  # one failed run must not lose the others
            _fail(spec, error, store, outcome, reporter)
        else:
            outcome.done.append(spec.key)
            reporter.end(spec, "done", record)
    outcome.warnings += store.warnings
    return outcome


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
        raise RuntimeError("the unquantized model was not measured under this protocol: its run failed")
    return record


def _fail(spec: RunSpec, error: Exception, store: RecordStore, outcome: Outcome, reporter: Reporter) -> None:
    line = f"{type(error).__name__}: {' '.join(str(error).split())}"
    store.save_failure(spec.key, spec.model_dump(mode="json"), line, traceback.format_exc())
    outcome.failed.append(spec.key)
    outcome.errors[spec.key] = f"{spec.describe()}: {line}"
    reporter.end(spec, "failed", None)
