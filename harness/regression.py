"""The regression gate: perplexity and payload bits of every method under one small protocol, against a baseline.

A baseline is a JSON file: the protocol, and for each method its options, what was measured, and how far that may be
off. Tolerances come from measurements too: the same run with other numbers of threads, and on other processors
(`widen`), whose sums are rounded in another order. Payload bits are counted, and must come out equal on all of them:
where a method lets its calibration decide how much it stores, its options in the baseline are such that it does not.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from harness.checkpoint.write import write_checkpoint
from harness.environment import environment_record
from harness.models.load import LoadedModel
from harness.quantize import QuantizedModel
from harness.runner import run
from harness.spec import STORED, CalibrationSpec, MethodSpec, ModelSpec, PerplexitySpec, RunSpec
from kernels.atomic import write_text
from kernels.errors import InputError, did_you_mean
from methods import create_method
from methods.registry import builtin_method_names, method_names
from methods.validation import explain

# Perplexity may be off by this many times the largest difference that other threads and processors have made ...
_SPREADS = 3.0
# ... and by this share in any case.
_FLOOR = 0.002
# Thread counts of the spread, besides the protocol's own.
_OTHER_THREADS = (1, 3)


class SavedError(RuntimeError):
    """A checkpoint that does not give the losses, or does not take the bytes, of the model that was saved."""


class _Data(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Protocol(_Data):
    """What every method is measured on."""

    model: ModelSpec
    calibration: CalibrationSpec
    evaluation: PerplexitySpec
    threads: int = Field(2, ge=1)


class Entry(_Data):
    """A method's baseline. spread: largest relative change of perplexity by other threads and processors.
    The numbers are None until they are measured."""

    options: dict[str, Any] = {}
    perplexity: float | None = Field(None, gt=0)
    payload_bits: float | None = Field(None, gt=0)
    spread: float | None = Field(None, ge=0)

    @property
    def tolerance(self) -> float:
        """Distance of perplexities, as in `_relative`, that is noise."""
        return max(_FLOOR, _SPREADS * (self.spread or 0.0))

    def noise(self, better: bool = False) -> float:
        """The share by which a perplexity may be worse, or better, and be noise: what a change in percent is held
        against."""
        return -math.expm1(-self.tolerance) if better else math.expm1(self.tolerance)

    def widened(self, name: str, perplexity: float, payload_bits: float) -> Entry:
        """The same baseline, whose spread covers this measurement of method `name` too.

        Raises InputError if the payload differs: not every machine could meet such a baseline.
        """
        assert self.perplexity is not None
        if payload_bits != self.payload_bits:
            raise InputError(
                f"{name} with {self.options or 'its default options'} stores {payload_bits!r} bits per weight in one "
                f"run and {self.payload_bits!r} in another; if the baseline is of older code: --update --methods "
                f"{name}; if not, its size depends on how sums are rounded: give it other options in the baseline"
            )
        spread = max(self.spread or 0.0, _relative(perplexity, self.perplexity))
        return self.model_copy(update={"spread": spread})


class Baseline(_Data):
    format: int = Field(1, ge=1, le=1)
    protocol: Protocol
    measured_on: list[dict[str, Any]] = []
    methods: dict[str, Entry] = {}


@dataclass(frozen=True)
class Check:
    """One method against its baseline. seconds: how long its run took.

    problem: what is wrong; None if all is well. warning: a perplexity better than noise explains, or None.
    """

    method: str
    baseline: Entry | None
    perplexity: float | None
    payload_bits: float | None
    problem: str | None
    seconds: float = 0.0
    warning: str | None = None


# Called with a method's name before it is measured, or, with several workers, when its result is there.
Watch = Callable[[str], None]


def load_baseline(path: Path) -> Baseline:
    """Raises InputError for a file that is missing, damaged, or holds anything else than a baseline."""
    try:
        text = path.read_text(encoding="utf-8")
        json.loads(text)
        return Baseline.model_validate_json(text)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"baseline {path} cannot be read ({error})") from error
    except ValidationError as error:
        raise InputError(f"baseline {path}: {explain(error, Baseline)}") from None
    except ValueError as error:
        raise InputError(f"baseline {path} is not valid JSON ({error})") from error


def check(
    baseline: Baseline, methods: Sequence[str] = (), watch: Watch = lambda name: None, workers: int = 1
) -> list[Check]:
    """Measure the baseline's methods, or those of `methods`, and compare.

    workers: processes that measure side by side, each with the protocol's threads; the numbers do not depend on it.
    Much of a small run (loading, tokenizing, saving) keeps one core busy, so two of them fill two cores.
    Methods of this project that the baseline lacks are problems too. Raises InputError for an unknown name.
    """
    _check_names(methods, baseline)
    names = list(methods) or sorted({*baseline.methods, *builtin_method_names()})
    checks = []
    if workers == 1:
        for name in names:
            watch(name)
            checks.append(_check_one(baseline, name))
        return checks
    # Threads that wait for work would otherwise spin on the cores that another process needs.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, spawn) as pool:
        futures = [pool.submit(_check_one, baseline, name) for name in names]
        for name, future in zip(names, futures, strict=True):
            watch(name)
            try:
                checks.append(future.result())
            except BrokenProcessPool:  # a process died, its own or another's: alone, it is known whose
                checks.append(_check_alone(baseline, name, spawn))
    return checks


def _check_alone(baseline: Baseline, name: str, spawn: BaseContext) -> Check:
    """As `_check_one`, in a process that nothing else depends on."""
    try:
        with ProcessPoolExecutor(1, spawn) as pool:
            return pool.submit(_check_one, baseline, name).result()
    except BrokenProcessPool:
        problem = "failed: its process died (the system does that when memory runs out)"
        return Check(name, baseline.methods.get(name), None, None, problem)


def update(baseline: Baseline, methods: Sequence[str] = (), watch: Watch = lambda name: None) -> Baseline:
    """The baseline with numbers measured now, for all of its methods and those it lacks, or for `methods` alone.

    A method that it lacks is added with its default options. The spread is that of this machine alone; `widen` adds
    those of others. Raises InputError for a size that depends on the number of threads.
    """
    _check_names(methods, baseline)
    entries = {name: entry for name, entry in baseline.methods.items() if name in method_names()}
    for name in methods or sorted({*entries, *builtin_method_names()}):
        watch(name)
        options = entries[name].options if name in entries else {}
        value, bits = _measure(name, options, baseline.protocol, baseline.protocol.threads)
        entry = Entry(options=options, perplexity=value, payload_bits=bits, spread=0.0)
        for threads in _OTHER_THREADS:
            entry = entry.widened(name, *_measure(name, options, baseline.protocol, threads))
        entries[name] = entry
    # A part measured anew leaves the rest as it was measured before.
    measured_on = _with_this_machine(baseline.measured_on if methods else [])
    return baseline.model_copy(update={"methods": dict(sorted(entries.items())), "measured_on": measured_on})


def widen(baseline: Baseline, methods: Sequence[str] = (), watch: Watch = lambda name: None) -> Baseline:
    """The baseline with the same numbers, its spreads widened by what is measured on this machine: for another
    processor, whose differences are none of the code's. Raises InputError for a size that is another one here."""
    _check_names(methods, baseline)
    entries = dict(baseline.methods)
    for name in methods or sorted(entries):
        entry = entries.get(name)
        if entry is None or entry.perplexity is None or entry.payload_bits is None:
            raise InputError(f"method {name!r} has no numbers to widen; measure them: --update --methods {name}")
        watch(name)
        for threads in (baseline.protocol.threads, *_OTHER_THREADS):
            entry = entry.widened(name, *_measure(name, entry.options, baseline.protocol, threads))
        entries[name] = entry
    return baseline.model_copy(update={"methods": entries, "measured_on": _with_this_machine(baseline.measured_on)})


def _with_this_machine(machines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """`machines` and this one, once: what a measurement depends on besides the code."""
    found = environment_record()
    machine = {key: found[key] for key in ("python", "platform", "packages", "cpu", "cpu_capability")}
    return machines if machine in machines else [*machines, machine]


def save_baseline(path: Path, baseline: Baseline) -> None:
    write_text(path, json.dumps(baseline.model_dump(mode="json"), indent=1, ensure_ascii=False) + "\n")


def _check_names(methods: Sequence[str], baseline: Baseline) -> None:
    known = [*method_names(), *baseline.methods]
    for name in methods:
        if name not in known:
            raise InputError(f"unknown method {name!r}" + did_you_mean(name, known))


def _absent(name: str) -> Check:
    return Check(name, None, None, None, f"is registered and has no baseline; measure one: --update --methods {name}")


def _check_one(baseline: Baseline, name: str) -> Check:
    entry = baseline.methods.get(name)
    return _absent(name) if entry is None else _compare(name, entry, baseline.protocol)


def _compare(name: str, entry: Entry, protocol: Protocol) -> Check:
    if entry.perplexity is None or entry.payload_bits is None:
        return Check(name, entry, None, None, f"its baseline has no numbers; measure them: --update --methods {name}")
    start = time.perf_counter()
    try:
        value, bits = _measure(name, entry.options, protocol, protocol.threads, True)
    except Exception as error:  # a method that fails is what a gate is for; the others are checked all the same
        problem = f"failed: {type(error).__name__}: {' '.join(str(error).split())}"
        return Check(name, entry, None, None, problem, time.perf_counter() - start)
    seconds = time.perf_counter() - start
    problems: list[str] = []
    warning: str | None = None
    if not _relative(value, entry.perplexity) <= entry.tolerance:  # NaN too
        change = value / entry.perplexity - 1
        better = change < 0
        said = (
            f"perplexity {value:.6g} is {abs(change):.2%} {'better' if better else 'worse'} than "
            f"{entry.perplexity:.6g}, {entry.noise(better):.2%} is noise"
        )
        if better:
            warning = f"{said}; to hold on to it: --update"
        else:
            problems.append(said)
    if bits != entry.payload_bits:
        problems.append(f"payload is {bits!r} bits per weight, must be {entry.payload_bits!r}")
    problem = "; ".join(problems) + ("; if that is meant: --update" if problems else "")
    return Check(name, entry, value, bits, problem or None, seconds, warning)


def _relative(value: float, base: float) -> float:
    """Distance of two perplexities on a logarithmic scale; a percent is 0.01 either way."""
    return abs(math.log(value / base))


def _measure(
    name: str, options: dict[str, Any], protocol: Protocol, threads: int, saved: bool = False
) -> tuple[float, float]:
    """Perplexity and payload bits per weight of one method, measured anew.

    saved: save the model too and measure what was saved. Raises SavedError if that is not the same.
    """
    needs = create_method(name, **options).needs
    spec = RunSpec(
        model=protocol.model,
        method=MethodSpec(name=name, options=options),
        calibration=None if needs == "nothing" else protocol.calibration,
        evaluations=(protocol.evaluation,),
    )
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / name
            record = run(spec, fresh=True, keep=partial(_save, folder) if saved else None)
            if saved:
                _check_saved(folder, record, protocol)
    finally:
        torch.set_num_threads(before)
    return record["metrics"][0]["value"], record["ledger"]["payload_bits"]


def _save(folder: Path, loaded: LoadedModel, quantized: QuantizedModel, record: dict[str, Any]) -> None:
    write_checkpoint(folder, loaded, quantized, record)


def _check_saved(folder: Path, record: dict[str, Any], protocol: Protocol) -> None:
    """One window is enough: equal losses are equal weights."""
    model = ModelSpec(name=str(folder), dtype=protocol.model.dtype, device=protocol.model.device)
    window = protocol.evaluation.model_copy(update={"windows": 1})
    spec = RunSpec(model=model, method=MethodSpec(name=STORED), calibration=None, evaluations=(window,))
    stored = run(spec, fresh=True)
    for what, found, measured in (
        ("the loss of the first window", *(r["metrics"][0]["window_nll"][0] for r in (stored, record))),
        ("the payload in bytes", *(r["ledger"]["payload_bytes"] for r in (stored, record))),
    ):
        if found != measured:
            raise SavedError(f"saved and loaded again, {what} is {found!r}; measured was {measured!r}")
