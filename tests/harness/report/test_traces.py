"""Every number in a document of results/ traces to a run: its record lies beside the document and holds the number."""

import csv
import json
import math
import re
import statistics
from pathlib import Path

import pytest

from harness.claims import load_claims

RESULTS = Path(__file__).resolve().parents[3] / "results"
DOCUMENTS = sorted(
    path
    for path in RESULTS.rglob("*")
    if path.suffix in (".md", ".tex", ".html", ".csv")
    # What papers print is tested with the claims; the rest is what the reader of this has run.
    and path.relative_to(RESULTS).parts[0] not in ("claims", "baselines", "tables", "figures", "runs", "report.html")
    and path.name != "README.md"
)
NAMES = {"Method", "Setting", "Seeds", "Model", "Task", "Notes"}
# Units of a printed number: as it is, percent, minutes, mega- and gigabytes, bits over 16 in percent.
SCALES = (1.0, 100.0, 1 / 60, 1e-6, 1e-9, 100 / 16)


def runs_beside(path):
    """The records of the results folder that `path` lies in."""
    folder = next(parent for parent in path.parents if (parent / "runs").is_dir())
    found = {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in (folder / "runs").glob("*.json")}
    assert found
    return found


def numbers(part, skip=("layers", "weights", "spec", "environment")):
    """Every number of a record but those of single layers."""
    if isinstance(part, dict):
        for name, value in part.items():
            if name not in skip:
                yield from numbers(value)
    elif isinstance(part, list):
        for value in part:
            yield from numbers(value)
    elif isinstance(part, (int, float)) and not isinstance(part, bool):
        yield float(part)


def derived(record):
    """The figures that tables compute: the error of a perplexity, mean accuracy and its error, nominal occupancy."""
    tasks = [entry for entry in record["metrics"] if entry["metric"] == "zeroshot"]
    if tasks:
        yield sum(entry["value"] for entry in tasks) / len(tasks)
        yield math.sqrt(sum(entry["stderr"] ** 2 for entry in tasks)) / len(tasks)
    for entry in record["metrics"]:
        if entry["metric"] == "perplexity":
            yield entry["value"] * entry["nll_stderr"]
    ledger = record["ledger"]
    yield ledger["nominal_weight_bits"] + ledger["nominal_scale_bits"]


def over_seeds(records):
    """Means and standard deviations of runs that differ by their seed alone, and of their gaps to the unquantized."""
    groups, unquantized = {}, {}
    for record in records:
        spec = json.loads(json.dumps(record["spec"]))
        for part in (spec["calibration"] or {}, spec["method"]["options"]):
            part.pop("seed", None)
        for entry in record["metrics"]:
            if entry["metric"] == "perplexity":
                if record["method"]["name"] == "fp16":
                    unquantized[entry["dataset"]] = entry["value"]
                groups.setdefault((json.dumps(spec), entry["dataset"]), []).append(entry["value"])
    for (_, dataset), values in groups.items():
        if len(values) > 1:
            gaps = [math.log(value) - math.log(unquantized[dataset]) for value in values]
            yield from (
                statistics.mean(values),
                statistics.stdev(values),
                statistics.mean(gaps),
                statistics.stdev(gaps),
            )


def pool(records):
    records = list(records)
    return [
        *(number for record in records for number in (*numbers(record), *derived(record))),
        *over_seeds(records),
    ]


def traces(text, known):
    """True if a number of `known` prints as `text`."""
    value = abs(float(text))
    if "e" in text:
        return any(float(f"{abs(x):.3g}") == value for x in known)
    decimals = len(text.partition(".")[2])
    return any(abs(round(abs(x) * scale, decimals) - value) < 10.0**-decimals / 1e3 for x in known for scale in SCALES)


def cells(path):
    """(head, text) of every cell of every pipe table in a Markdown file."""
    head = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("|"):
            head = []
            continue
        parts = [part.strip() for part in re.split(r"(?<!\\)\|", line)[1:-1]]
        if not head:
            head = parts
        elif not set("".join(parts)) <= set("-: "):
            yield from zip(head, parts, strict=True)


def test_there_are_documents_to_walk():
    assert {path.suffix for path in DOCUMENTS} >= {".md", ".tex", ".html", ".csv"}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(RESULTS)))
def test_the_runs_that_a_document_names_lie_beside_it(path):
    if path.suffix == ".csv":
        named = {row["run_key"] for row in csv.DictReader(path.open(encoding="utf-8")) if row["measured"]}
    else:
        found = re.search(r"Runs: ([0-9a-f, ]+)", path.read_text(encoding="utf-8"))
        assert found, "the document does not name its runs"
        named = set(found[1].strip(", ").split(", "))
    assert named
    assert named <= runs_beside(path).keys()


@pytest.mark.parametrize("path", [path for path in DOCUMENTS if path.suffix == ".csv"], ids=lambda path: path.name)
def test_every_number_of_a_csv_is_in_the_record_of_its_row(path):
    records = runs_beside(path)
    walked = 0
    for row in csv.DictReader(path.open(encoding="utf-8")):
        if not row["measured"]:
            continue
        known = pool([records[row["run_key"]]])
        for column in (
            "measured",
            "stderr",
            "nominal_weight_bits",
            "nominal_scale_bits",
            "payload_bits",
            "total_bytes",
        ):
            if row[column]:
                value = float(row[column])
                assert any(
                    math.isclose(value, x * scale, rel_tol=1e-9, abs_tol=1e-12) for x in known for scale in SCALES
                )
                walked += 1
    assert walked


@pytest.mark.parametrize("path", [path for path in DOCUMENTS if path.suffix == ".md"], ids=lambda path: path.name)
def test_every_number_in_a_cell_is_measured_or_claimed(path):
    claimed = [claim.value for claim in load_claims()]
    known = [*pool(runs_beside(path).values()), *claimed]
    walked = 0
    for head, text in cells(path):
        if head in NAMES:
            continue
        for number in re.findall(r"\d+(?:\.\d+)?(?:e-?\d+)?", re.sub(r"\\\[.*", "", text)):
            if head.startswith("Difference"):  # measured less claimed
                assert any(traces(f"{number}", [x - claim]) for x in known for claim in claimed), (head, text)
            else:
                assert traces(number, known), (head, text)
            walked += 1
    assert walked


def test_a_number_that_no_run_measured_is_found_out():
    path = next(path for path in DOCUMENTS if path.suffix == ".md")
    known = pool(runs_beside(path).values())
    value = next(entry["value"] for entry in next(iter(runs_beside(path).values()))["metrics"])
    assert traces(f"{value:.2f}", known)
    assert not traces("31415.93", known)
