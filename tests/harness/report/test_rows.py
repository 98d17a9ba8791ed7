import copy
import dataclasses
import math
from dataclasses import asdict

import pytest

from harness.report.rows import COLUMNS, TidyRow, build_rows
from harness.report.tidy_csv import render_csv
from methods import create_method

EXPECTED_COLUMNS = (
    "item,method,setting,model,metric,dataset,paper,measured,stderr,difference,"
    "nominal_weight_bits,nominal_scale_bits,payload_bits,total_bytes,run_key,note"
)


def one_row_plan(plan, row, **changes):
    return dataclasses.replace(plan, rows=(row,), **changes)


def only(rows, metric="perplexity", dataset="wikitext2"):
    (row,) = [row for row in rows if (row.metric, row.dataset) == (metric, dataset)]
    return row


def test_the_csv_has_exactly_the_public_columns(plan, records, claims):
    text = render_csv(build_rows(plan, records, claims))
    assert text.splitlines()[0] == EXPECTED_COLUMNS
    assert ",".join(COLUMNS) == EXPECTED_COLUMNS


def test_there_is_one_row_for_each_method_setting_model_metric_dataset(plan, records, claims):
    rows = build_rows(plan, records, claims)
    places = [(row.method, row.setting, row.model, row.metric, row.dataset) for row in rows]
    assert len(set(places)) == len(places)
    # Six planned rows with perplexity, weight bits and scale bits each.
    assert len(places) == 18


def test_a_paper_model_that_was_run_gets_the_difference_and_the_error_in_perplexity(plan, claims, make_record, planned):
    row = planned("gptq", "3 bit g128", "k", model="OPT-1.3B")
    tidy = only(build_rows(one_row_plan(plan, row), {"k": make_record("k", "gptq", 30.0)}, claims))
    assert tidy.paper == 20.97
    assert tidy.difference == pytest.approx(9.03)
    assert tidy.stderr == pytest.approx(30.0 * 0.05)
    assert "every window" in tidy.note
    assert "12 of 148 windows of wikitext2, context 2048, float32; calibration 4 x 64 of c4-sample" in tidy.note


def test_all_windows_make_no_note_about_a_part_of_them(plan, claims, make_record, planned):
    row = planned("gptq", "3 bit g128", "k", model="OPT-1.3B")
    tidy = only(build_rows(one_row_plan(plan, row), {"k": make_record("k", "gptq", 30.0, windows=148)}, claims))
    assert "every window" not in tidy.note


@pytest.mark.parametrize("context", [512, 2048])
def test_windows_of_another_length_than_the_papers_are_named(plan, claims, make_record, planned, context):
    record = make_record("k", "gptq", 30.0, windows=148)
    record["metrics"][0]["context"] = context
    row = planned("gptq", "3 bit g128", "k", model="OPT-1.3B")
    tidy = only(build_rows(one_row_plan(plan, row), {"k": record}, claims))
    assert ("the paper's windows have 2048 tokens, this run's 512" in tidy.note) == (context == 512)


def test_a_model_outside_the_paper_has_no_paper_value_and_no_difference(plan, records, claims):
    row = build_rows(plan, records, claims)[0]
    assert (row.paper, row.measured, row.difference) == (None, 20.0, None)


def test_bit_rows_take_the_paper_value_of_the_family_and_say_so(plan, records, claims):
    rows = [row for row in build_rows(plan, records, claims) if row.run_key == "k-sage"]
    scale = only(rows, "scale_bits", "")
    assert (scale.paper, scale.measured) == (0.009, 0.25)
    assert scale.difference == pytest.approx(0.241)
    assert "OPT family" in scale.note


def test_bit_rows_are_left_out_where_neither_paper_nor_run_has_them(plan, claims, planned):
    row = planned("rtn", "3 bit g128", None)
    assert [row.metric for row in build_rows(one_row_plan(plan, row), {}, claims)] == ["perplexity"]


@pytest.mark.parametrize(
    ("setting", "note"), [("2 bit g128", "no record of run k-lost"), ("block 128", "method not registered")]
)
def test_a_row_without_a_record_says_why_and_has_no_number(plan, records, claims, setting, note):
    rows = [row for row in build_rows(plan, records, claims) if row.setting == setting and row.model == "toy-model"]
    assert rows
    for row in rows:
        assert (row.measured, row.payload_bits, row.total_bytes) == (None, None, None)
        assert note in row.note


def test_a_claims_note_comes_with_the_papers_value(plan, records, claims):
    (row,) = [row for row in build_rows(plan, records, claims) if row.paper == 14.16]
    assert row.note == "not run: profile embedded; paper: BiLLM paper has 10.51"


def test_text_that_stands_in_for_a_corpus_never_meets_the_papers_number(plan, claims, make_record, planned):
    row = planned("gptq", "3 bit g128", "k", model="OPT-1.3B")
    record = make_record("k", "gptq", 30.0, dataset="wiki-sample")
    rows = build_rows(one_row_plan(plan, row), {"k": record}, claims)
    asked, stand_in = only(rows), only(rows, dataset="wiki-sample")
    assert (asked.paper, asked.measured, asked.difference) == (20.97, None, None)
    assert "not measured on wikitext2, but on wiki-sample" in asked.note
    assert (stand_in.paper, stand_in.measured, stand_in.difference) == (None, 30.0, None)
    assert "wiki-sample is not the paper's wikitext2" in stand_in.note


def test_a_value_that_is_not_finite_has_no_difference(plan, claims, make_record, planned):
    row = planned("gptq", "3 bit g128", "k", model="OPT-1.3B")
    tidy = only(build_rows(one_row_plan(plan, row), {"k": make_record("k", "gptq", math.inf)}, claims))
    assert (tidy.measured, tidy.difference) == (math.inf, None)


def test_a_methods_remark_stands_at_every_number_of_it(plan, records, claims):
    emulated = copy.deepcopy(records)
    emulated["k-gptq"]["method"]["provenance"]["remark"] = "activations are quantized too"
    notes = {row.run_key: row.notes for row in build_rows(plan, emulated, claims) if row.run_key}
    assert "activations are quantized too" in notes["k-gptq"]
    assert "activations are quantized too" not in notes["k-sage"]


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ("mg-ptq", ("reconstruction from the paper's abstract alone", "no public code")),
        ("cmpq", ("reconstruction from the paper's abstract alone", "no public code")),
        ("aptq", ("reconstruction from the paper's abstract alone", "no public code")),
        ("sage-ptq", ("reconstruction from the paper's text", "no code released")),
        ("micromix", ("W+A", "emulated in software", "no speed is claimed")),
    ],
)
def test_the_notes_say_what_a_method_was_made_from(plan, records, claims, method, said):
    own = copy.deepcopy(records)
    own["k-gptq"]["method"]["provenance"] = asdict(create_method(method).provenance)
    for row in build_rows(plan, own, claims):
        if row.run_key == "k-gptq":
            assert [part for part in said if part not in row.note] == [], row.metric


def test_a_reconstruction_and_an_already_quantized_source_are_noted(plan, records, claims):
    by_key = {row.run_key: row.note for row in build_rows(plan, records, claims) if row.metric == "perplexity"}
    assert "reconstruction" in by_key["k-sage"]
    assert "reconstruction" not in by_key["k-gptq"]
    assert (
        "weights come from an already quantized file (Q4_1, 5.0 bits a weight); a 4-bit group-32 grid reproduces them "
        "exactly, so results at 4 bits or more are flattered; use --reparameterize"
    ) in by_key["k-gptq"]


@pytest.mark.parametrize("options", [{"reparameterize": True}, {"quantized_source": False}])
def test_weights_off_the_grid_are_not_called_flattered(plan, claims, options, make_record):
    record = make_record("k-gptq", "gptq", 30.0, **options)
    row = only(build_rows(one_row_plan(plan, plan.rows[1]), {"k-gptq": record}, claims))
    assert "flattered" not in row.note
    assert ("reparameterized" in row.note) == ("reparameterize" in options)


@pytest.mark.parametrize(
    "record",
    [
        {},
        {"metrics": None, "ledger": [], "spec": 3, "warnings": {}},
        {"metrics": [None, {"metric": "perplexity"}, {"metric": "perplexity", "dataset": "wikitext2", "value": "x"}]},
        {"model": {"source_precision": {"quantized": "yes"}}, "method": {"provenance": None}},
    ],
)
def test_a_record_that_lacks_parts_still_gives_its_row(plan, claims, record):
    row = only(build_rows(one_row_plan(plan, plan.rows[1]), {"k-gptq": record}, claims))
    assert (row.measured, row.stderr, row.payload_bits, row.run_key) == (None, None, None, "k-gptq")
    assert row.note == "not measured on wikitext2"


def test_a_metric_without_error_or_windows_is_shown_bare(plan, claims):
    record = {"metrics": [{"metric": "perplexity", "dataset": "wikitext2", "value": 30}]}
    row = only(build_rows(one_row_plan(plan, plan.rows[1]), {"k-gptq": record}, claims))
    assert (row.measured, row.stderr, row.note) == (30, None, "wikitext2")


def test_csv_cells_are_exact_integers_full_floats_or_empty():
    bits = (3.0, 0.25, None)
    row = TidyRow("table 1", "m", "s", "M", "ppl", "d", 20.97, 20.11, None, *bits, 123456789012345, "k", ("a", "b"))
    assert render_csv([row]).splitlines()[1] == (
        "table 1,m,s,M,ppl,d,20.97,20.11,,-0.86,3,0.25,,123456789012345,k,a; b"
    )
