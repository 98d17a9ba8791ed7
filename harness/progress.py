"""Progress on the terminal: one bar a run, with the time that is left; plain lines where there is no terminal."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from harness.spec import RunSpec
from harness.sweep import Reporter

_LINE_EVERY = 30.0


class TerminalReporter(Reporter):
    """Bars for people, a line every half minute for log files."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars: Progress | None = None
        self._task: TaskID | None = None
        self._what = ""
        self._started = 0.0
        self._spoke = 0.0

    def begin(self, spec: RunSpec, number: int, total: int) -> None:
        self._started = self._spoke = time.monotonic()
        self._console.print(
            f"[{number}/{total}] {spec.describe()}  ({spec.key})", markup=False, highlight=False, soft_wrap=True
        )
        if self._console.is_terminal:
            self._bars = Progress(
                TextColumn("  {task.description:<34}"),
                BarColumn(),
                TextColumn("{task.percentage:>3.0f} %"),
                TimeElapsedColumn(),
                TextColumn("left"),
                # The speed is averaged over minutes: steps of very different length alternate inside a block.
                TimeRemainingColumn(),
                console=self._console,
                transient=True,
                speed_estimate_period=300,
            )
            self._bars.start()
        self._task = None
        self._what = ""

    def progress(self, done: int, total: int, what: str) -> None:
        # Quantization is one bar over all its blocks, each evaluation another.
        stage = "quantize" if what.startswith(("block ", "done")) else what
        if self._bars is not None:
            if self._task is None or stage != self._what:
                if self._task is not None:
                    self._bars.remove_task(self._task)
                self._task = self._bars.add_task(what, total=total)
            self._bars.update(self._task, completed=done, total=total, description=what)
        elif time.monotonic() - self._spoke > _LINE_EVERY:
            self._spoke = time.monotonic()
            self._console.print(f"  {what}: {done}/{total}", markup=False, highlight=False, soft_wrap=True)
        self._what = stage

    def end(self, spec: RunSpec, status: str, record: dict[str, Any] | None) -> None:
        if self._bars is not None:
            self._bars.stop()
            self._bars = None
        if record is None or not record["metrics"]:
            self._console.print(f"  {status}", markup=False, highlight=False, soft_wrap=True)
            return
        found = ", ".join(_measured(metric) for metric in record["metrics"])
        bits = record["ledger"]["payload_bits"]
        took = f", {time.monotonic() - self._started:.0f} s" if status == "done" else ""
        line = f"  {status}: {spec.describe()}: {found}; {bits:.3f} bits per weight{took}"
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)


def _measured(entry: dict[str, Any]) -> str:
    """One measurement in a few words."""
    if entry["metric"] == "zeroshot":
        return f"{entry['dataset']} {entry['value']:.1f} %"
    if entry["metric"] == "decode":
        return f"{entry['value']:.1f} tokens/s"
    if entry["metric"] == "memory":
        return f"{entry['value'] / 1e6:.1f} MB resident"
    name = "KL" if entry["metric"] == "divergence" else entry["metric"]
    return f"{name} {entry['dataset']} {entry['value']:.3f}"
