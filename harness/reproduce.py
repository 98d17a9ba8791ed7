"""The main job: experiment -> plan -> runs -> records -> table."""

from __future__ import annotations

import argparse

from rich.console import Console
from rich.table import Table

from harness.claims import load_claims
from harness.estimate import estimate
from harness.experiments import load_experiment
from harness.planning import Choices, Plan, plan_table
from harness.preflight import check_memory, check_methods, check_output
from harness.progress import TerminalReporter
from harness.records import RecordStore
from harness.report.saved import plan_path, render_plan
from harness.sweep import sweep
from kernels.errors import InputError


def run_experiment(name: str, arguments: argparse.Namespace) -> int:
    """Carry out an experiment with the command line's `arguments`; returns the exit code."""
    console = Console(highlight=False)
    plan = plan_table(load_experiment(name), _choices(arguments))
    store = RecordStore(arguments.out / "runs")
    if arguments.dry_run:
        _show_plan(plan, store, console)
        return 0
    load_claims()  # a damaged claims file is found now, not after an hour of runs
    check_output(arguments.out, store)
    check_methods(plan, store)
    check_memory(plan, store, asked_for=bool(arguments.model), force=arguments.force)
    # Saved before the first run: whatever interrupts the table, `sagebench report` shows what there is.
    plan.table.save(plan_path(arguments.out, plan.table.name))
    outcome = sweep(plan.runs, plan.references, store, TerminalReporter(console), fresh=arguments.fresh)
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
        tasks=tuple(part for entry in arguments.tasks for part in entry.split(",") if part),
        windows=arguments.windows,
        limit=arguments.limit,
        budgets=_budgets(arguments.budgets),
        divergence=arguments.divergence,
        context=arguments.context,
        calibration_samples=arguments.calibration_samples,
        calibration_corpus=arguments.calibration_corpus,
        dtype=arguments.dtype,
        device=arguments.device,
        seed=arguments.seed,
        reparameterize=arguments.reparameterize,
    )


def _budgets(text: str) -> tuple[float, ...]:
    try:
        return tuple(dict.fromkeys(float(part) for part in text.split(",") if part))
    except ValueError:
        raise InputError(f"--budgets {text}: bits per weight with commas between, such as 1.6,2.2,3.15") from None


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
    for warning in store.warnings:
        console.print(f"warning: {warning}", markup=False, style="yellow")
    console.print(f"to do: about {seconds / 60:.0f} minutes (an estimate, within a factor of two)")
