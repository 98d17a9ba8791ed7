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
        self._tasks: dict[str, tuple[TaskID, str]] = {}  # by run: its bar, and the stage that it shows
        self._started: dict[str, float] = {}
        self._spoke: dict[str, float] = {}

    def begin(self, spec: RunSpec, number: int, total: int) -> None:
        self._started[spec.key] = self._spoke[spec.key] = time.monotonic()
        self._console.print(
            f"[{number}/{total}] {spec.describe()}  ({spec.key})", markup=False, highlight=False, soft_wrap=True
        )
        if self._console.is_terminal and self._bars is None:
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

    def progress(self, spec: RunSpec, done: int, total: int, what: str) -> None:
        # Quantization is one bar over all its blocks, each evaluation another.
        stage = "quantize" if what.startswith(("block ", "done")) else what
        several = len(self._started) > 1
        if self._bars is not None:
            what = f"{spec.method.name}: {what}" if several else what
            bar, shown = self._tasks.get(spec.key, (None, ""))
            if bar is None or stage != shown:
                if bar is not None:
                    self._bars.remove_task(bar)
                bar = self._bars.add_task(what, total=total)
                self._tasks[spec.key] = bar, stage
            self._bars.update(bar, completed=done, total=total, description=what)
        elif time.monotonic() - self._spoke.get(spec.key, 0.0) > _LINE_EVERY:
            self._spoke[spec.key] = time.monotonic()
            which = f"{spec.key} " if several else ""
            self._console.print(f"  {which}{what}: {done}/{total}", markup=False, highlight=False, soft_wrap=True)

    def end(self, spec: RunSpec, status: str, record: dict[str, Any] | None) -> None:
        started = self._started.pop(spec.key, None)
        if self._bars is not None:
            if spec.key in self._tasks:
                self._bars.remove_task(self._tasks.pop(spec.key)[0])
            if not self._started:
                self._bars.stop()
                self._bars = None
        if record is None or not record["metrics"]:
            self._console.print(f"  {status}", markup=False, highlight=False, soft_wrap=True)
            return
        found = ", ".join(_measured(metric) for metric in record["metrics"])
        bits = record["ledger"]["payload_bits"]
        took = f", {time.monotonic() - started:.0f} s" if status == "done" and started is not None else ""
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
