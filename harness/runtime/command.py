"""`sagebench decode` and `sagebench memory`: plan the runs of a model, carry them out, show what the records say."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from importlib.resources import files
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict
from rich.console import Console
from rich.table import Table

from harness.corpora import local_checksum, resolve_corpus
from harness.devices import chosen_device
from harness.engines import InProcess
from harness.environment import package_versions
from harness.experiments import load_profile
from harness.models.source import planned_content, resolve_model
from harness.progress import TerminalReporter
from harness.quantized_cache import run_conditions
from harness.records import RecordStore
from harness.runtime.architecture import catalogued
from harness.runtime.runner import run_runtime
from harness.spec import CalibrationSpec, DecodeSpec, EvaluationSpec, MemorySpec, MethodSpec, ModelSpec, RunSpec
from harness.sweep import sweep
from kernels.cpu.build import chosen
from kernels.errors import InputError, did_you_mean
from methods import create_method
from methods.validation import validated


class RuntimeRow(BaseModel):
    """A method with options, and the name it is shown under."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: str
    label: str
    options: dict[str, Any] = {}


def runtime_rows() -> list[RuntimeRow]:
    """The rows that come with the package."""
    content = yaml.safe_load(files(__package__).joinpath("rows.yaml").read_text(encoding="utf-8"))
    return [RuntimeRow.model_validate(row) for row in content]


def run_command(metric: str, arguments: argparse.Namespace) -> int:
    """Carry out `metric`, "decode" or "memory"; returns the exit code."""
    console = Console(highlight=False)
    plan = plan_runtime(metric, arguments)
    store = RecordStore(arguments.out / "runs")
    outcome = sweep(
        list(plan.values()), {}, store, TerminalReporter(console), fresh=arguments.fresh, engine=InProcess(run_runtime)
    )
    records = {label: store.load(spec.key) for label, spec in plan.items()}
    found = {label: record for label, record in records.items() if record is not None}
    console.print((_decode_table if metric == "decode" else _memory_table)(found))
    for label, record in found.items():
        for arm, reason in record["metrics"][0].get("absent", {}).items():
            console.print(f"{label}, no arm {arm}: {reason}", markup=False)
    for line in _machines(found.values()):
        console.print(line, markup=False)
    for warning in outcome.warnings:
        console.print(f"warning: {warning}", markup=False, style="yellow", soft_wrap=True)
    for line in outcome.errors.values():
        console.print(f"failed: {line}", markup=False, style="red")
    return 1 if outcome.failed else 0


def plan_runtime(metric: str, arguments: argparse.Namespace) -> dict[str, RunSpec]:
    """The runs by label. Raises InputError for an unknown model, method or device."""
    device = chosen_device(arguments.device)
    dtype = arguments.dtype or ("bfloat16" if device == "cpu" else "float16")
    if arguments.synthetic is not None:
        catalogued(arguments.synthetic)  # raises for an unknown name
        family = "opt" if arguments.synthetic.startswith("opt") else "llama"
        model = validated(ModelSpec, {"name": arguments.synthetic, "dtype": dtype, "device": device}, "model")
    else:
        source = resolve_model(arguments.model)
        family = source.family
        values = {"name": source.name, "dtype": dtype, "device": device, "content": planned_content(source)}
        model = validated(ModelSpec, values, "model")
    evaluation = _evaluation(metric, arguments, _conditions(device))
    plan = {}
    for row in _chosen(arguments.methods):
        options = {key: family if (key, value) == ("preset", "family") else value for key, value in row.options.items()}
        method = create_method(row.method, **options)
        needs_text = method.needs != "nothing" and arguments.synthetic is None
        plan[row.label] = RunSpec(
            model=model,
            method=MethodSpec(name=row.method, options=method.config.model_dump(mode="json", exclude_defaults=True)),
            calibration=_calibration() if needs_text else None,
            evaluations=(evaluation,),
        )
    return plan


def _chosen(methods: list[str]) -> list[RuntimeRow]:
    rows = runtime_rows()
    known = [name for row in rows for name in (row.method, row.label)]
    for method in methods:
        if method not in known:
            raise InputError(f"unknown method {method!r}" + did_you_mean(method, known))
    return [row for row in rows if not methods or {row.method, row.label} & set(methods)]


def _conditions(device: str) -> dict[str, Any]:
    """What speed and memory depend on besides the options: where it differs, a finished record is of another run."""
    decisive = {**run_conditions(device), "packages": package_versions(("torch", "triton"))}
    # Kernels on a CPU are compiled for what SAGEBENCH_CPU asks for.
    return {**decisive, "instruction_set": chosen()} if device == "cpu" else decisive


def _evaluation(metric: str, arguments: argparse.Namespace, conditions: dict[str, Any]) -> EvaluationSpec:
    if arguments.band is not None and arguments.runtime != "banded":
        raise InputError(f"--band {arguments.band} is for --runtime banded, not {arguments.runtime}")
    values = {
        "runtime": arguments.runtime,
        "band": arguments.band,
        "batch": arguments.batch,
        "prompt": arguments.prompt,
        "tokens": arguments.tokens,
        "synthetic": arguments.synthetic is not None,
        "conditions": conditions,
    }
    if metric == "memory":
        return validated(MemorySpec, values, "memory")
    return validated(DecodeSpec, {**values, "rounds": arguments.rounds}, "decode")


def _calibration() -> CalibrationSpec:
    """The text of the embedded profile: speed and memory do not depend on it."""
    default = load_profile("embedded").calibration
    corpus = resolve_corpus(default.corpus, "embedded", "train")
    return CalibrationSpec(
        corpus=corpus, samples=default.samples, context=default.context, content=local_checksum(corpus, "train")
    )


def _decode_table(records: dict[str, dict[str, Any]]) -> Table:
    table = Table(
        "method", "arm", "tokens/s", "first ms", "p50/p95/p99 ms", "MB", "GB/s", "of copy", "x dense",
        title="Decode throughput",
    )  # fmt: skip
    for label, record in records.items():
        entry = record["metrics"][0]
        for name, arm in entry["arms"].items():
            speedup = entry["speedup"] if name.startswith("packed") else None
            table.add_row(
                label,
                name,
                f"{arm['tokens_per_second']:.1f} ± {(arm['iqr'][1] - arm['iqr'][0]) / 2:.1f}",
                f"{arm['time_to_first_token_ms']:.0f}",
                "/".join(f"{arm[key]:.1f}" for key in ("ms_p50", "ms_p95", "ms_p99")),
                f"{arm['bytes_per_token'] / 1e6:.0f}",
                f"{arm['effective_gb_s']:.1f}",
                f"{100 * arm['share_of_copy']:.0f} %",
                "-" if speedup is None else f"{speedup:.2f}",
            )
    return table


def _memory_table(records: dict[str, dict[str, Any]]) -> Table:
    table = Table(
        "method", "resident MB", "linears", "over ledger", "host", "in 16 bits", "KV cache",
        "peak", title="Memory of decoding",
    )  # fmt: skip
    for label, record in records.items():
        entry = record["metrics"][0]
        peak = max(phase["peak_bytes"] for phase in entry["phases"].values())
        sizes = [entry[key] for key in ("value", "linear_bytes", "host_bytes", "dense_bytes", "kv_cache_bytes")]
        shown = [f"{size / 1e6:.1f}" for size in (*sizes, peak)]
        table.add_row(label, *shown[:2], f"{100 * entry['over_ledger']:+.2f} %", *shown[2:])
    return table


def _machines(records: Iterable[dict[str, Any]]) -> list[str]:
    """What the records were measured on, a line each; copies are measured anew for every record."""
    copies: dict[str, list[float]] = {}
    for record in records:
        entry = record["metrics"][0]
        line = f"{entry['device']}, {entry['dtype']}, {entry['dataset']}"
        if "copy_gb_s" in entry:
            line += f", {entry['threads']} threads; measured copy"
        copies.setdefault(line, []).extend([entry["copy_gb_s"]] if "copy_gb_s" in entry else [])
    return [f"{line} {_range(rates)} GB/s" if rates else line for line, rates in copies.items()]


def _range(values: list[float]) -> str:
    return " to ".join(dict.fromkeys(f"{value:.1f}" for value in (min(values), max(values))))
