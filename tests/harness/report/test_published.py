"""The tables that the project publishes are what their records say."""

import io
import itertools
import json
import re
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from harness.compare import compare_records
from harness.plan import TablePlan
from harness.report.saved import render_plan

_ROOT = Path(__file__).parents[3]
PUBLISHED = sorted((_ROOT / "results" / "published").iterdir())


@pytest.mark.parametrize("folder", PUBLISHED, ids=lambda folder: folder.name)
def test_published_tables_follow_from_their_records(folder, tmp_path):
    shutil.copytree(folder / "runs", tmp_path / "runs")
    plans = sorted((folder / "tables").glob("*.plan.json"))
    assert plans
    for plan in plans:
        for path in render_plan(TablePlan.load(plan), tmp_path, Console(file=io.StringIO())):
            assert path.read_bytes() == (folder / "tables" / path.name).read_bytes(), path.name


@pytest.mark.parametrize(
    ("folder", "table"),
    [
        ("paper-smollm2-135m", "table1"),
        ("paper-smollm2-135m", "table4"),
        ("mixed-precision-2bit-smollm2-135m", "mixed-precision-2bit"),
    ],
)
def test_a_table_in_the_readme_is_the_published_one(folder, table):
    file = _ROOT / "results" / "published" / folder / "tables" / f"{table}.md"
    lines = file.read_text(encoding="utf-8").splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("| "))
    rows = list(itertools.takewhile(lambda line: line.startswith("|"), lines[first:]))
    assert len(rows) > 5
    assert "\n".join(rows) in (_ROOT / "README.md").read_text(encoding="utf-8")


def test_scores_are_those_of_the_harness_s_own_command_line():
    folder = _ROOT / "results/published/zeroshot-smollm2-135m"
    theirs = json.loads((folder / "lm_eval.json").read_text(encoding="utf-8"))
    (run,) = (folder / "runs").iterdir()
    readme = (_ROOT / "README.md").read_text(encoding="utf-8")
    tasks = {metric["task"]: metric for metric in json.loads(run.read_text(encoding="utf-8"))["metrics"]}
    assert tasks.keys() == theirs["results"].keys() == {"piqa", "arc_easy"}
    for task, metric in tasks.items():
        cells = []
        assert metric["examples"] == metric["examples_available"] == theirs["n-samples"][task]["effective"]
        for name, score in metric["scores"].items():
            value, stderr = (100 * theirs["results"][task][f"{name}{what},none"] for what in ("", "_stderr"))
            assert abs(score["value"] - value) < score["stderr"]
            assert score["stderr"] == pytest.approx(stderr, rel=1e-6)
            cells += [f"{score['value']:.2f} ± {score['stderr']:.2f}", f"{value:.2f} ± {stderr:.2f}"]
        assert f"| {task} | {' | '.join(cells)} |" in readme


def test_what_the_readme_says_of_sage_x_and_others_follows_from_their_records():
    """A line of its table: what `sagebench compare` finds for the two keys at its end."""
    records = {
        path.stem: path for folder in PUBLISHED if "rivals" in folder.name for path in folder.glob("runs/*.json")
    }
    readme = (_ROOT / "README.md").read_text(encoding="utf-8")
    lines = re.findall(r"^\| (.+): ([\d.]+) \| .+: ([\d.]+) \| (.+) \| (\w{16}) (\w{16}) \|$", readme, re.MULTILINE)
    assert len(lines) == 9
    for bits, first, second, apart, *keys in lines:
        ours, other = (json.loads(records[key].read_text(encoding="utf-8")) for key in keys)
        assert float(bits.split(" ")[0]) == pytest.approx(ours["ledger"]["payload_bits"], abs=1e-3)
        options = ours["spec"]["method"]["options"]
        assert ("no data" in bits) == (options.get("mode") == "weights-only")
        assert re.findall(r"tuning: (\w+)", bits) == [kind for kind in (options.get("tuning"),) if kind]
        seen = [record["spec"]["calibration"] for record in (ours, other)]
        assert {each["samples"] for each in seen if each} <= {16 if "16 samples" in bits else 8}
        (found,) = compare_records(ours, other)
        assert [f"{found.first:.2f}", f"{found.second:.2f}"] == [first, second]
        assert apart.startswith(f"{found.difference:.2f} ({found.low:.2f} to {found.high:.2f})")
        if "windows" in apart:
            assert f"{apart.split()[-4]} windows" in found.detail
            assert int(apart.split()[-2]) == found.pairs


def test_what_the_readme_says_of_divergence_and_tasks_follows_from_their_records():
    """Its table has a line for each row of the published divergence, with the accuracies of the same weights."""
    rows, tasks = (published_rows(f"front-{what}-reparameterized-smollm2-135m") for what in ("divergence", "zeroshot"))
    readme = (_ROOT / "README.md").read_text(encoding="utf-8")
    assert len(rows) == 8
    assert tasks.keys() < rows.keys()
    for method, (label, record) in rows.items():
        kl = {m["dataset"]: m["value"] for m in record["metrics"] if m["metric"] == "divergence"}
        scores = {m["task"]: m["scores"]["acc"] for m in tasks[method][1]["metrics"]} if method in tasks else {}
        cells = [label, f"{record['ledger']['payload_bits']:.2f}"]
        cells += [f"{kl[dataset]:.3f}" for dataset in ("wikitext2", "c4-sample")]
        for task in ("piqa", "arc_easy"):
            cells.append(f"{scores[task]['value']:.1f} ± {scores[task]['stderr']:.1f}" if scores else "-")
        assert f"| {' | '.join(cells)} |" in readme


def test_the_readme_has_the_published_gaps_over_seeds():
    file = _ROOT / "results/published/front-reparameterized-smollm2-135m/tables/front-reparameterized.md"
    text = file.read_text(encoding="utf-8")
    head, _, *rows = [line.split("|") for line in text[text.index("over seeds") :].splitlines() if line.startswith("|")]
    place = [cell.strip() for cell in head].index("Gap nats")
    gaps = [row[place].strip() for row in rows]
    assert len(gaps) == 2
    assert f"standard deviation | {' | '.join(gaps)} | |" in (_ROOT / "README.md").read_text(encoding="utf-8")


def published_rows(name):
    """(label and setting, record) by what the row's method is."""
    folder = _ROOT / "results" / "published" / name
    (plan,) = folder.glob("tables/*.plan.json")
    found = {}
    for row in TablePlan.load(plan).rows:
        record = json.loads((folder / "runs" / f"{row.run_key}.json").read_text(encoding="utf-8"))
        method, calibration = record["spec"]["method"], record["spec"]["calibration"]
        found[json.dumps([method, calibration], sort_keys=True)] = f"{row.label}, {row.setting}", record
    return found
