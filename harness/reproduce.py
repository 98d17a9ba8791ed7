"""The main job: experiment -> plan -> runs -> records -> table."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console
from rich.table import Table

from harness.cache import require_space
from harness.claims import load_claims
from harness.estimate import available_memory, estimate
from harness.experiments import load_experiment
from harness.planning import Choices, Plan, plan_table
from harness.progress import TerminalReporter
from harness.records import RecordStore
from harness.report.saved import plan_path, render_plan
from harness.sweep import sweep
from kernels.errors import InputError

_RECORD_BYTES = 20_000_000


def run_experiment(name: str, arguments: argparse.Namespace) -> int:
    """Carry out an experiment with the command line's `arguments`; returns the exit code."""
    console = Console(highlight=False)
    plan = plan_table(load_experiment(name), _choices(arguments))
    store = RecordStore(arguments.out / "runs")
    if arguments.dry_run:
        _show_plan(plan, store, console)
        return 0
    load_claims()  # a damaged claims file is found now, not after an hour of runs
    _check_room(plan, arguments.out, store, force=arguments.force)
    try:
        outcome = sweep(plan.runs, plan.references, store, TerminalReporter(console), fresh=arguments.fresh)
    finally:
        # An interrupted table shows what there is; the next start completes it.
        plan.table.save(plan_path(arguments.out, plan.table.name))
    for warning in outcome.warnings:
        console.print(f"warning: {warning}", markup=False, style="yellow")
    for path in render_plan(plan.table, arguments.out, console):
        console.print(f"written: {path}", markup=False)
    for line in outcome.errors.values():
        console.print(f"failed: {line}", markup=False, style="red")
    return 1 if outcome.failed else 0


def _choices(arguments: argparse.Namespace) -> Choices:
    return Choices(
        profile=arguments.profile,
        models=tuple(arguments.model),
        methods=tuple(part for entry in arguments.methods for part in entry.split(",") if part),
        corpora=tuple(arguments.corpus),
        windows=arguments.windows,
        context=arguments.context,
        calibration_samples=arguments.calibration_samples,
        calibration_corpus=arguments.calibration_corpus,
        dtype=arguments.dtype,
        device=arguments.device,
        seed=arguments.seed,
        reparameterize=arguments.reparameterize,
    )


def _show_plan(plan: Plan, store: RecordStore, console: Console) -> None:
    table = Table("run", "method", "model", "time", "memory", "state", title=plan.table.title)
    seconds = 0.0
    for spec in plan.runs:
        cost = estimate(spec)
        finished = store.load(spec.key) is not None
        seconds += 0.0 if finished else cost.seconds
        options = ", ".join(f"{key}={value}" for key, value in spec.method.options.items())
        table.add_row(
            spec.key,
            f"{spec.method.name} {options}".strip(),
            spec.model.name,
            f"{cost.seconds / 60:.1f} min",
            f"{cost.memory_bytes / 1e9:.1f} GB",
            "finished" if finished else "to do",
        )
    console.print(table)
    for row in plan.table.rows:
        if row.run_key is None and row.note == "method not registered":
            console.print(f"not run: {row.label} ({row.setting}): {row.note}", markup=False)
    console.print(f"to do: about {seconds / 60:.0f} minutes (an estimate, within a factor of two)")


def _check_room(plan: Plan, out: Path, store: RecordStore, *, force: bool) -> None:
    """Refuse what cannot work before anything long begins: an unwritable or full disk, too little memory."""
    try:
        store.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {out} cannot be written ({error.strerror})") from error
    require_space(store.folder, _RECORD_BYTES, "records")
    for spec in plan.runs:
        cost, free = estimate(spec).memory_bytes, available_memory(spec.model.device)
        if cost > free and not force and store.load(spec.key) is None:
            raise InputError(
                f"{spec.describe()} needs about {cost / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free; "
                "--force runs it all the same"
            )
