"""Tables of zero-shot accuracy and of divergence, from made-up records."""

import copy
import dataclasses

import pytest

from harness.plan import PlannedRow, TablePlan
from harness.report.layout import build_document
from harness.report.markdown import render_markdown
from harness.report.rows import build_rows
from harness.report.tables import write_table

TASKS = ("piqa", "boolq", "arc_challenge", "arc_easy", "winogrande")
NORMED = ("piqa", "arc_challenge", "arc_easy")


def entry(task, acc, examples=200):
    scores = {"acc": {"value": acc, "stderr": 3.0, "correct": "1"}}
    if task in NORMED:
        scores["acc_norm"] = {"value": acc + 1, "stderr": 3.5, "correct": "1"}
    return {
        "metric": "zeroshot", "dataset": task, "task": task, "value": acc, "stderr": 3.0, "scores": scores,
        "examples": examples, "examples_available": 1000, "task_version": "1.0", "lm_eval": "0.4.13",
        "dtype": "float32",
    }  # fmt: skip


@pytest.fixture
def accuracy_plan():
    rows = [("fp16", "", "FP16"), ("gptq", "4 bit g128", "GPTQ"), ("sage-ptq", "n_lut 4", "SAGE-PTQ")]
    return TablePlan(
        name="table4", item="table 4", title="Zero-shot accuracy", metric="accuracy", datasets=TASKS,
        rows=tuple(
            PlannedRow(method, setting, label, "OPT-6.7B", "OPT", f"k-{method}", "") for method, setting, label in rows
        ),
        notes=("A note of the plan.",),
    )  # fmt: skip


@pytest.fixture
def accuracy_records(make_record):
    found = {}
    for method, shift in (("fp16", 0.0), ("gptq", -1.0), ("sage-ptq", -4.0)):
        record = make_record(f"k-{method}", method, 1.0, calibrated=method == "gptq", quantized_source=False)
        shifts = {"piqa": 70 + shift, "arc_challenge": 30 + shift, "arc_easy": 60 + shift, "winogrande": 50 - shift}
        record["metrics"] = [entry(task, value) for task, value in shifts.items()]
        found[f"k-{method}"] = record
    return found


def texts(table):
    return [[f"{cell.text} {cell.tail}".strip() for cell in row] for row in table.rows]


def test_the_overview_has_a_column_a_task_their_mean_and_the_stored_bits(accuracy_plan, accuracy_records, claims):
    table = build_document(accuracy_plan, accuracy_records, claims).tables[0]
    assert [column.title for column in table.columns] == [
        "Method", "Setting", "piqa", "arc_challenge", "arc_easy", "winogrande", "Mean", "Payload bits", "Total MB",
        "Notes",
    ]  # fmt: skip
    assert texts(table)[1] == [
        "GPTQ", "4 bit g128", "69.00 ± 3.00", "29.00 ± 3.00", "59.00 ± 3.00", "51.00 ± 3.00", "52.00 ± 1.50", "3.500",
        "1.5", "",
    ]  # fmt: skip


def test_the_largest_accuracy_of_a_quantized_row_is_bold(accuracy_plan, accuracy_records, claims):
    table = build_document(accuracy_plan, accuracy_records, claims).tables[0]
    assert [cell.text for row in table.rows for cell in row if cell.bold] == ["69.00", "29.00", "59.00", "54.00"]


def test_each_task_is_held_against_the_paper_with_acc_norm_beside_it(accuracy_plan, accuracy_records, claims):
    table = build_document(accuracy_plan, accuracy_records, claims).tables[1]
    assert [column.title for column in table.columns] == [
        "Task", "Method", "Setting", "Paper", "Measured (acc)", "Difference", "Measured (acc_norm)", "Notes",
    ]  # fmt: skip
    by_place = {(row[0], row[1]): row[3:7] for row in texts(table)}
    assert by_place["piqa", "SAGE-PTQ"] == ["73.94", "66.00 ± 3.00", "-7.94", "67.00 ± 3.50"]
    assert by_place["winogrande", "FP16"] == ["60.38", "50.00 ± 3.00", "-10.38", "-"]
    assert by_place["piqa", "GPTQ"][0] == "-"


def test_the_mislabelled_column_stands_under_arc_challenge_with_a_footnote(accuracy_plan, accuracy_records, claims):
    _, by_task, *papers = build_document(accuracy_plan, accuracy_records, claims).tables
    by_place = {(row[0].text, row[1].text): row for row in by_task.rows}
    challenge, easy = by_place["arc_challenge", "FP16"], by_place["arc_easy", "FP16"]
    assert (challenge[3].text, easy[3].text) == ("31.10", "-")
    notes = [by_task.footnotes[mark - 1] for mark in challenge[-1].marks]
    assert "paper: column headed ARC-e; the values are ARC-challenge" in notes
    assert not any("headed ARC-e" in by_task.footnotes[mark - 1] for mark in easy[-1].marks)
    (of_paper,) = [table for table in papers if table.title.endswith("arc_challenge")]
    assert of_paper.footnotes == ("column headed ARC-e; the values are ARC-challenge",)
    assert not any(table.title.endswith("arc_easy") for table in papers)


def test_the_caption_says_how_and_on_how_many_examples(accuracy_plan, accuracy_records, claims):
    caption = build_document(accuracy_plan, accuracy_records, claims).tables[0].caption
    assert caption[0].startswith(
        "Measured: 0-shot, lm_eval 0.4.13, float32, first 200 of 1000 examples of piqa v1.0 / "
    )
    assert caption[1:] == ("A note of the plan.",)


def test_a_part_of_the_examples_is_called_indicative_and_all_of_them_are_not(accuracy_plan, accuracy_records, claims):
    rows = build_rows(accuracy_plan, accuracy_records, claims)
    (part,) = [row for row in rows if (row.method, row.metric, row.dataset) == ("fp16", "accuracy", "piqa")]
    assert "the paper used every example, this run a part; the difference is indicative only" in part.notes
    accuracy_records["k-fp16"]["metrics"] = [entry("piqa", 70.0, examples=1000)]
    rows = build_rows(accuracy_plan, accuracy_records, claims)
    (whole,) = [row for row in rows if (row.method, row.metric, row.dataset) == ("fp16", "accuracy", "piqa")]
    assert "indicative" not in whole.note
    assert "1000 examples of piqa" in whole.protocol


def test_the_csv_has_a_row_for_each_accuracy(accuracy_plan, accuracy_records, claims):
    rows = build_rows(accuracy_plan, accuracy_records, claims)
    of_gptq = [(row.metric, row.dataset, row.measured) for row in rows if row.method == "gptq" and row.measured]
    assert ("accuracy", "winogrande", 51.0) in of_gptq
    assert [dataset for metric, dataset, _ in of_gptq if metric == "accuracy_norm"] == list(NORMED)


def test_a_missing_task_leaves_the_mean_out(accuracy_plan, accuracy_records, claims):
    accuracy_records["k-gptq"]["metrics"].pop()
    table = build_document(accuracy_plan, accuracy_records, claims).tables[0]
    assert texts(table)[1][5:7] == ["-", "-"]
    assert texts(table)[0][6] == "52.50 ± 1.50"


def test_a_plan_without_records_still_makes_its_page(accuracy_plan, claims):
    tables = build_document(accuracy_plan, {}, claims).tables
    assert tables[0].caption[0] == f"Nothing measured yet on {', '.join(TASKS)}"


@pytest.mark.parametrize("scores", [None, {}, {"acc": None}, {"acc": {"value": "x"}}])
def test_a_damaged_entry_is_not_a_number(accuracy_plan, accuracy_records, claims, scores):
    broken = copy.deepcopy(accuracy_records)
    broken["k-gptq"]["metrics"][0]["scores"] = scores
    assert texts(build_document(accuracy_plan, broken, claims).tables[0])[1][2] == "-"


def test_every_format_is_written(accuracy_plan, accuracy_records, claims, tmp_path):
    paths = write_table(accuracy_plan, accuracy_records, claims, tmp_path)
    assert [path.name for path in paths] == ["table4.md", "table4.csv", "table4.tex", "table4.html"]
    assert all("69.00" in path.read_text() or path.suffix == ".csv" for path in paths)


APART = {
    "metric": "divergence", "dataset": "wikitext2", "value": 0.0123456, "stderr": 0.001, "kl_median": 0.004,
    "kl_p99": 0.25, "same_top": 0.91, "rms_target": 0.031, "windows": 3, "windows_available": 148, "context": 2048,
    "dtype": "bfloat16", "reference_dtype": "float32",
}  # fmt: skip


def test_divergence_has_a_table_of_its_own_with_the_noise_floor(plan, records, claims):
    assert not any("divergence" in table.title for table in build_document(plan, records, claims).tables)
    records["k-gptq"]["metrics"].append(APART)
    records["k-fp16"]["metrics"].append({**APART, "value": 0.0000123, "stderr": 1e-6})
    table = build_document(plan, records, claims).tables[1]
    assert table.title == "toy-model: divergence from the unquantized model on wikitext2"
    assert texts(table) == [
        ["FP16 (noise floor)", "16 bit", "1.23e-05 ± 1e-06", "0.004", "0.25", "91.00", "3.10"],
        ["GPTQ", "3 bit g128", "0.0123 ± 0.001", "0.004", "0.25", "91.00", "3.10"],
    ]
    assert table.caption == ("Measured: 3 of 148 windows, context 2048, bfloat16 against a reference in float32",)
    assert "1.23e-05" in render_markdown(build_document(dataclasses.replace(plan), records, claims))
