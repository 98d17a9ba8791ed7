"""Rows that differ by their seed alone, as mean and spread."""

import dataclasses
import math
import statistics

import pytest
import toy

from harness.plan import PlannedRow, TablePlan
from harness.report.layout import build_document
from harness.report.tables import write_table

VALUES = {0: 30.0, 1: 31.5, 2: 29.7}


def run(method, seed, value, text_seed=None, **options):
    """A row and its record. text_seed: that of the calibration text, if it is another one."""
    key = f"{method}-{seed}-{text_seed}-{'-'.join(map(str, options.values()))}"
    record = toy.record(key, method, {**options, **({"seed": seed} if seed else {})}, ("wikitext2",), 1)
    if method != "fp16":
        record["spec"]["calibration"] = {"corpus": "wikitext2", "samples": 8, "context": 2048}
        record["spec"]["calibration"]["seed"] = seed if text_seed is None else text_seed
        record["method"]["options"]["seed"] = seed
    record["metrics"][0].update(value=value, nll=math.log(value))
    setting = " ".join([f"seed={seed}", *(f"{name}={value}" for name, value in options.items())])
    setting += f" text {text_seed}" if text_seed is not None else ""
    return PlannedRow(method, setting, method.upper(), "toy-model", None, key, ""), record


def planned(runs, metric="perplexity"):
    """The plan of a table, its records, and no claims."""
    rows = tuple(row for row, _ in runs)
    plan = TablePlan(name="front", item="front", title="Front", metric=metric, datasets=("wikitext2",), rows=rows)
    return plan, {row.run_key: record for row, record in runs}, ()


def seeds_table(*runs):
    found = [table for table in build_document(*planned(runs)).tables if table.name.endswith("-seeds-wikitext2")]
    return found[0] if found else None


def texts(table):
    return [[" ".join(filter(None, (cell.text, cell.tail))) for cell in row] for row in table.rows]


@pytest.fixture
def runs():
    return [run("fp16", 0, 20.0), *(run("sage-x", seed, value, budget=2.2) for seed, value in VALUES.items())]


def test_mean_spread_and_distance_from_the_unquantized_model(runs):
    table = seeds_table(*runs)
    values, gaps = list(VALUES.values()), [math.log(value / 20.0) for value in VALUES.values()]
    assert texts(table) == [
        [
            "SAGE-X", "budget=2.2", "0, 1, 2",
            f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}",
            f"{statistics.mean(gaps):.4f} ± {statistics.stdev(gaps):.4f}",
            "2.200",
        ]
    ]  # fmt: skip
    assert [column.title for column in table.columns] == [
        "Method", "Setting", "Seeds", "Mean", "Gap nats", "Payload bits",
    ]  # fmt: skip
    assert table.caption == ("Measured: 12 of 148 windows of wikitext2, context 2048, float32",)


def test_other_options_and_single_seeds_are_not_mixed_in(runs):
    others = [run("sage-x", seed, 50.0 + seed, budget=1.6) for seed in (1, 2)]
    table = seeds_table(*runs, *others, run("gptq", 0, 40.0, bits=3))
    assert [row[1:3] for row in texts(table)] == [["budget=2.2", "0, 1, 2"], ["budget=1.6", "1, 2"]]
    assert texts(table)[1][3] == "51.50 ± 0.71"


def test_one_seed_makes_no_table(runs):
    assert seeds_table(*runs[:2]) is None


def test_without_the_unquantized_model_or_on_other_windows_there_is_no_distance(runs):
    assert [column.title for column in seeds_table(*runs[1:]).columns][-2:] == ["Mean", "Payload bits"]
    runs[0][1]["metrics"][0]["windows"] = 148
    assert texts(seeds_table(*runs))[0][4] == "-"


def test_a_loss_that_is_no_number_has_no_mean(runs):
    runs[1][1]["metrics"][0]["value"] = math.nan
    assert texts(seeds_table(*runs))[0][3] == "-"


@pytest.mark.parametrize("value", [math.inf, 0.0, math.nan])
def test_of_an_unquantized_model_that_is_broken_there_is_no_distance(runs, value):
    runs[0][1]["metrics"][0]["value"] = value
    assert texts(seeds_table(*runs))[0][4] == "-"


def test_records_from_before_a_field_of_the_spec_belong_to_the_others(runs):
    for _, record in runs[2:]:
        record["spec"]["model"]["quantized_blocks"] = None
    assert texts(seeds_table(*runs))[0][2] == "0, 1, 2"


def test_seeds_of_text_and_of_draws_are_told_apart():
    runs = [run("sage-x", seed, 30.0 + seed, text_seed=1, budget=2.2) for seed in (0, 1, 2)]
    ((_, setting, seeds, *_),) = texts(seeds_table(*runs))
    assert seeds == "1, 1/0, 1/2"
    assert setting == "budget=2.2 text 1"


def test_hand_written_settings_are_all_named(runs):
    runs = [(dataclasses.replace(row, setting=f"run {row.setting[5:6]}"), record) for row, record in runs]
    assert texts(seeds_table(*runs))[0][1] == "run 0 / run 1 / run 2"


def test_tables_of_facts_have_none(runs):
    tables = build_document(*planned(runs, "gpu_memory_gb")).tables
    assert tables
    assert not [table for table in tables if "seeds" in table.name]


def test_every_format_shows_it(runs, tmp_path):
    for path in write_table(*planned(runs), tmp_path):
        assert ("over seeds" in path.read_text(encoding="utf-8")) == (path.suffix != ".csv")
