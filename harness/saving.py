"""Runs whose packed checkpoints are kept: `sagebench quantize`, and `--save` of a table."""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Collection, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from harness.checkpoint.write import check_target, write_checkpoint
from harness.planning import Choices, plan_quantization
from harness.preflight import check_method, lacking_memory
from harness.progress import TerminalReporter
from harness.records import RecordStore
from harness.runner import Keep, NoOpError, run
from harness.spec import STORED, UNQUANTIZED, RunSpec
from harness.sweep import Reporter
from kernels.errors import InputError, NumericalError


def checkpoint_folder(out: Path, key: str) -> Path:
    """Where `--save` keeps the checkpoint of run `key`."""
    return out / "checkpoints" / key


def save_finished(
    out: Path, runs: Iterable[RunSpec], store: RecordStore, reporter: Reporter, renew: Collection[str] = ()
) -> list[Path]:
    """Folders of all quantized runs that are finished; a checkpoint that is not there yet is made, without measuring.

    renew: keys of runs that were just carried out; a checkpoint of an earlier time is made again. The weights that were
    measured come from the cache, where a worker process left them too; if they are gone, they are made again.
    """
    folders = []
    for spec in runs:
        record = store.load(spec.key)
        if record is None or not _is_kept(spec):
            continue
        folder = checkpoint_folder(out, spec.key)
        if spec.key in renew or not folder.exists():
            shutil.rmtree(folder, ignore_errors=True)
            reporter.begin(spec, 1, 1)
            run(
                spec.model_copy(update={"evaluations": ()}),
                keep=_keep(folder, record),
                progress=partial(reporter.progress, spec),
                weights=_measured_weights(record),
            )
            reporter.end(spec, "saved", None)
        folders.append(folder)
    return folders


def quantize(arguments: argparse.Namespace) -> int:
    """The command `sagebench quantize`; returns the exit code."""
    console = Console(highlight=False)
    choices = Choices(
        profile=arguments.profile,
        context=arguments.context,
        calibration_samples=arguments.calibration_samples,
        calibration_corpus=arguments.calibration_corpus,
        dtype=arguments.dtype,
        device=arguments.device,
        seed=arguments.seed,
        reparameterize=arguments.reparameterize,
    )
    spec = plan_quantization(arguments.model, arguments.method, parse_options(arguments.option), choices)
    check_target(arguments.out, arguments.max_shard_size)
    check_method(spec)
    if (needs := lacking_memory(spec)) and not arguments.force:
        raise InputError(f"{spec.describe()} {needs}; --force runs it all the same")
    reporter = TerminalReporter(console)
    reporter.begin(spec, 1, 1)

    def keep(loaded: Any, quantized: Any, record: dict[str, Any]) -> None:
        keyed = {"key": spec.key, **record}
        write_checkpoint(arguments.out, loaded, quantized, keyed, arguments.max_shard_size)

    try:
        record = run(spec, fresh=arguments.fresh, progress=partial(reporter.progress, spec), keep=keep)
    except (NoOpError, NumericalError) as error:
        reporter.end(spec, "failed", None)
        print(f"failed: {error}", file=sys.stderr)
        return 1
    reporter.end(spec, "done", record)
    ledger = record["ledger"]
    console.print(
        f"written: {arguments.out}: {ledger['payload_bits']:.3f} bits per weight, {ledger['total_bytes'] / 1e6:.1f} MB",
        markup=False,
        soft_wrap=True,
    )
    return 0


def parse_options(given: list[str]) -> dict[str, Any]:
    """`bits=3` and the like as a method's options; values are read as YAML scalars."""
    options = {}
    for entry in given:
        name, equals, value = entry.partition("=")
        if not (name and equals):
            raise InputError(f"--option {entry!r}: write name=value, such as bits=3")
        try:
            options[name.replace("-", "_")] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise InputError(f"--option {entry!r}: {value!r} cannot be read as a number, a name or a list") from None
    return options


def _measured_weights(record: dict[str, Any]) -> str | None:
    """The key in the cache of the weights that `record` measured."""
    return (record.get("quantization") or {}).get("key")


def _is_kept(spec: RunSpec) -> bool:
    return spec.method.name not in (UNQUANTIZED, STORED) and bool(spec.quality)


def _keep(folder: Path, finished: dict[str, Any]) -> Keep:
    """Writes a checkpoint with the record of the run that is `finished`; weights that had to be made again by other
    code, versions or processors are not those that it measured, and get a record of their own without its figures."""

    def keep(loaded: Any, quantized: Any, record: dict[str, Any]) -> None:
        same = _measured_weights(record) == _measured_weights(finished)
        write_checkpoint(folder, loaded, quantized, finished if same else {"key": finished["key"], **record})

    return keep
