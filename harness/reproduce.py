"""The main job: experiments -> plans -> runs -> records -> tables and figures."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence

import torch
from rich.console import Console
from rich.table import Table

from harness.claims import load_claims
from harness.engines.choice import choose_engine
from harness.estimate import estimate
from harness.experiments import load_experiment
from harness.longer import answered
from harness.planning import Choices, NothingToMeasureError, Plan, plan_table
from harness.preflight import check_memory, check_methods, check_output, lacking_memory
from harness.progress import TerminalReporter
from harness.records import RecordStore
from harness.report.saved import draw_plan, plan_path, render_page, render_plan
from harness.saving import save_finished
from harness.spec import RunSpec
from harness.sweep import shard, sweep
from kernels.errors import InputError, did_you_mean
from methods.registry import method_names


def run_experiments(names: Sequence[str], arguments: argparse.Namespace) -> int:
    """Carry out experiments with the command line's `arguments`; returns the exit code.

    Of several experiments each gets the choices that mean something to it, those without any data here are left out,
    and a run that several of them need is made once.
    """
    console = Console(highlight=False)
    plans = _plans(names, _choices(arguments), console)
    store = RecordStore(arguments.out / "runs")
    if arguments.dry_run:
        _show_plans(plans, store, console, fresh=arguments.fresh)
        return 0
    load_claims()  # a damaged claims file is found now, not after an hour of runs
    check_output(arguments.out, store)
    engine = choose_engine(arguments)
    runs, references, refused = _runs(plans), _references(plans), {}
    if arguments.shard is not None:
        # Every task must cut the same list and save the same plan, whatever memory its machine has. So its own share
        # is all that it looks at, and what does not fit fails: the plan keeps its row for a machine where it does.
        runs = shard(runs, references, arguments.shard)
    taken = {} if arguments.fresh else answered(runs, references, store)
    for key, record in taken.items():
        store.save(key, record)
        other = record["taken_from"]["key"]
        console.print(f"{key}: run {other} has measured what it asks for", markup=False, soft_wrap=True)
    # Ray's nodes are elsewhere, and Ray knows their memory.
    force = arguments.force or arguments.engine == "ray"
    for plan in plans:
        check_methods(plan, store, fresh=arguments.fresh)
        if arguments.shard is None:
            asked_for, at_once = bool(arguments.model), arguments.workers
            check_memory(plan, store, asked_for=asked_for, force=force, at_once=at_once, fresh=arguments.fresh)
        # Saved before the first run: whatever interrupts the table, `sagebench report` shows what there is.
        plan.table.save(plan_path(arguments.out, plan.table.name))
    if arguments.shard is None:
        runs, references = _runs(plans), _references(plans)  # those that memory leaves
    elif not force:
        refused = _too_large(runs, store, arguments.workers, fresh=arguments.fresh)
    reporter = TerminalReporter(console)
    outcome = sweep(runs, references, store, reporter, fresh=arguments.fresh, engine=engine, refused=refused)
    if arguments.save:
        for folder in save_finished(arguments.out, runs, store, reporter, renew=[*outcome.done, *taken]):
            console.print(f"saved: {folder}", markup=False, soft_wrap=True)
    for warning in outcome.warnings:
        console.print(f"warning: {warning}", markup=False, style="yellow", soft_wrap=True)
    paths = []
    for plan in plans:
        paths += render_plan(plan.table, arguments.out, console)
        paths += draw_plan(plan.table, arguments.out, console)
    paths.append(render_page(arguments.out))
    for path in paths:
        console.print(f"written: {path}", markup=False)
    for line in outcome.errors.values():
        console.print(f"failed: {line}", markup=False, style="red", soft_wrap=True)
    return 1 if outcome.failed else 0


def _plans(names: Sequence[str], choices: Choices, console: Console) -> list[Plan]:
    if len(names) == 1:
        return [plan_table(load_experiment(names[0]), choices)]
    for method in choices.methods:
        name = method.split(" ", 1)[0]
        if name not in method_names():
            raise InputError(f"unknown method {name!r}" + did_you_mean(name, method_names()))
    plans = []
    for name in names:
        experiment = load_experiment(name)
        try:
            plans.append(plan_table(experiment, choices.suited_to(experiment)))
        except NothingToMeasureError as error:
            console.print(f"left out: {error}", markup=False, style="yellow")
    if not plans:
        raise InputError("nothing is left to run")
    return plans


def _runs(plans: Sequence[Plan]) -> list[RunSpec]:
    """The runs of all plans, each once, in order: the unquantized reference of a run stands before it."""
    return list({spec.key: spec for plan in plans for spec in plan.runs}.values())


def _references(plans: Sequence[Plan]) -> dict[str, str]:
    """Run key -> key of the unquantized run it is compared with."""
    return {key: reference for plan in plans for key, reference in plan.references.items()}


def _too_large(runs: Sequence[RunSpec], store: RecordStore, at_once: int, *, fresh: bool) -> dict[str, str]:
    """Why runs that are not finished, or are repeated, do not fit in this machine's memory, by key."""
    needs = {spec.key: lacking_memory(spec, at_once) for spec in runs if fresh or store.load(spec.key) is None}
    return {key: f"{why}; --force runs it all the same" for key, why in needs.items() if why}


def _choices(arguments: argparse.Namespace) -> Choices:
    # On a cluster the devices are those of its nodes: what is asked of it tells, not what this machine has.
    elsewhere, device = arguments.engine == "ray", arguments.device
    if elsewhere:
        device = device or ("cuda" if arguments.gpus_per_run else "cpu")
        if device not in ("cpu", "cuda"):
            raise InputError(f"--device {device}: a run on Ray sees no GPUs but its own; use cuda or cpu")
        if arguments.save and device == "cuda" and not torch.cuda.is_available():
            raise InputError("--save makes checkpoints on this machine, which has no CUDA device; leave it out")
    return Choices(
        profile=arguments.profile,
        models=tuple(arguments.model),
        methods=_names("--methods", arguments.methods),
        corpora=tuple(dict.fromkeys(arguments.corpus)),
        tasks=_names("--tasks", arguments.tasks),
        windows=arguments.windows,
        limit=arguments.limit,
        budgets=_budgets(arguments.budgets),
        divergence=arguments.divergence,
        context=arguments.context,
        calibration_samples=arguments.calibration_samples,
        calibration_corpus=arguments.calibration_corpus,
        dtype=arguments.dtype,
        device=device,
        elsewhere=elsewhere,
        seed=arguments.seed,
        reparameterize=arguments.reparameterize,
        synthetic=arguments.synthetic,
    )


def _names(option: str, entries: Sequence[str]) -> tuple[str, ...]:
    """Names given apart or with commas between. An option that is there but empty (an unset variable) is refused.

    A name with a space is a row's, whose setting may hold commas: it stays whole.
    """
    parts = [[entry] if " " in entry.split(",")[0] else entry.split(",") for entry in entries]
    names = tuple(name.strip() for name in itertools.chain(*parts) if name.strip())
    if entries and not names:
        raise InputError(f"{option} names nothing; name at least one, or leave it out for all")
    return names


def _budgets(text: str) -> tuple[float, ...]:
    try:
        return tuple(dict.fromkeys(float(part) for part in text.split(",") if part))
    except ValueError:
        raise InputError(f"--budgets {text}: bits per weight with commas between, such as 1.6,2.2,3.15") from None


def _show_plans(plans: Sequence[Plan], store: RecordStore, console: Console, *, fresh: bool) -> None:
    titles = [plan.table.title for plan in plans]
    table = Table(title=titles[0] if len(titles) == 1 else None)
    table.add_column("run", no_wrap=True, min_width=16)  # a key that is cut off names nothing
    for column in ("method", "model", "time", "memory", "state"):
        table.add_column(column)
    if len(plans) > 1:
        table.add_column("for")
    seconds, quantized = 0.0, set[str]()
    known = {} if fresh else answered(_runs(plans), _references(plans), store)
    for spec in _runs(plans):
        weights = spec.quantization_key()
        cost = estimate(spec, quantized=weights in quantized)  # what is measured twice is quantized once
        quantized.add(weights)
        finished = not fresh and (spec.key in known or store.load(spec.key) is not None)
        seconds += 0.0 if finished else cost.seconds
        options = ", ".join(f"{key}={value}" for key, value in spec.method.options.items())
        cells = [
            spec.key,
            f"{spec.method.name} {options}".strip(),
            spec.model.name,
            f"{cost.seconds / 60:.1f} min",
            f"{cost.memory_bytes / 1e9:.1f} GB",
            "finished" if finished else "to do",
        ]
        if len(plans) > 1:
            cells.append(", ".join(plan.table.name for plan in plans if spec in plan.runs))
        table.add_row(*cells)
    console.print(table)
    for row in dict.fromkeys(
        (row.label, row.setting, row.run_key, row.note) for plan in plans for row in plan.table.rows
    ):
        label, setting, key, note = row
        if key is None and note == "method not registered":
            console.print(f"not run: {label} ({setting}): {note}", markup=False)
    for warning in store.warnings:
        console.print(f"warning: {warning}", markup=False, style="yellow")
    console.print(f"to do: about {seconds / 60:.0f} minutes (an estimate, within a factor of two)")
