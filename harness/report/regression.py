"""What the regression gate found: a table on the terminal, and JUnit XML for CI systems."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

from rich.console import Console
from rich.table import Table

from harness.regression import Check
from kernels.atomic import write_text


def show_checks(checks: Sequence[Check], console: Console) -> None:
    """The difference in one table, and a line for each problem."""
    table = Table("method", "perplexity", "baseline", "change", "noise", "bits", "baseline", "verdict")
    for check in checks:
        base = check.baseline
        old = None if base is None else base.perplexity
        change = "" if check.perplexity is None or old is None else f"{check.perplexity / old - 1:+.3%}"
        table.add_row(
            check.method,
            _number(check.perplexity),
            _number(old),
            change,
            "" if base is None else f"{base.noise():.2%}",
            _number(check.payload_bits),
            _number(None if base is None else base.payload_bits),
            _verdict(check),
        )
    console.print(table)
    for check in checks:
        for said in filter(None, (check.problem, check.warning)):
            console.print(f"{check.method}: {said}", markup=False, soft_wrap=True)


def write_junit(path: Path, checks: Sequence[Check], suite: str) -> None:
    """One test case a method, in the form that Jenkins, GitLab and GitHub actions read."""
    failures = sum(check.problem is not None for check in checks)
    root = ElementTree.Element(
        "testsuite",
        name=f"sagebench {suite}",
        tests=str(len(checks)),
        failures=str(failures),
        errors="0",
        time=f"{sum(check.seconds for check in checks):.3f}",
    )
    for check in checks:
        case = ElementTree.SubElement(
            root, "testcase", classname=f"regression.{suite}", name=check.method, time=f"{check.seconds:.3f}"
        )
        if check.problem is not None:
            ElementTree.SubElement(case, "failure", message=check.problem).text = check.problem
        if check.warning is not None:
            ElementTree.SubElement(case, "system-out").text = check.warning
    ElementTree.indent(root)
    write_text(path, ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n")


def _verdict(check: Check) -> str:
    if check.problem is not None:
        return "CHANGED" if check.perplexity else "FAILED"
    return "better" if check.warning else "ok"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"
