"""Tables of time, occupancy and memory: the paper's number, the measured one, and where it comes from."""

import pytest
import toy

from harness.report.facts import FACTS, fact
from harness.report.layout import build_document
from harness.report.rows import build_rows


def page(name, **more):
    source = toy.source(name, **more)
    return source, build_document(source.plan, source.records, source.claims)


def column(table, head):
    place = [column.title for column in table.columns].index(head)
    return [row[place].text for row in table.rows]


def test_table_6_is_the_time_of_the_quantize_phase_in_minutes():
    source, document = page("table6", model="OPT-1.3B")
    table = document.tables[0]
    assert column(table, "Method") == ["BiLLM", "SAGE-PTQ"]
    assert column(table, "Quantization min (paper)") == ["5.10", "4.20"]
    seconds = [record["phases"]["quantize"]["seconds"] for record in source.records.values()]
    assert column(table, "Quantization min (measured)") == [f"{value / 60:.2f}" for value in seconds]
    assert "Measured on Some CPU, 2 threads" in table.caption


def test_table_6_does_not_show_the_papers_gpu_as_the_setting_of_our_rows():
    _, document = page("table6")
    measured, paper = document.tables[0], document.tables[-1]
    assert "Setting" not in [head.title for head in measured.columns]
    assert column(paper, "Setting") == ["L40", "L40"]


def test_table_7_has_occupancy_as_claimed_and_as_stored():
    source, document = page("table7")
    table = document.tables[0]
    ledger = source.records["key-04"]["ledger"]
    nominal = 100 * (ledger["nominal_weight_bits"] + ledger["nominal_scale_bits"]) / 16
    assert column(table, "Occupancy % (measured)")[4] == f"{nominal:.2f}"
    assert column(table, "Stored %")[4] == f"{100 * ledger['payload_bits'] / 16:.2f}"
    assert column(table, "Perplexity (measured)")[0] == "20.00"


def test_table_7_has_a_column_for_each_text():
    source = toy.source("table7")
    for record in source.records.values():
        record["metrics"].append({**record["metrics"][0], "dataset": "c4-sample", "value": 33.0})
    table = build_document(source.plan, source.records, source.claims).tables[0]
    assert column(table, "Perplexity wikitext2 (measured)")[0] == "20.00"
    assert column(table, "Perplexity c4-sample")[0] == "33.00"


def test_table_7_of_the_paper_has_all_its_numbers_with_their_notes():
    _, document = page("table7")
    paper = document.tables[-1]
    assert len(paper.rows) == 12
    assert column(paper, "Occupancy %")[:4] == ["14.06", "13.75", "13.19", "6.70"]
    assert paper.footnotes == ("computed as (weight bits + scale bits)/16",)


def test_figure_2_counts_every_tensor():
    source, document = page("figure2")
    resident = source.records["key-02"]["ledger"]["resident_bytes"]["packed"]
    assert column(document.tables[0], "Memory GB (measured)")[2] == f"{resident / 1e9:.3f}"


def test_table_5_has_the_latency_of_a_token_beside_the_papers():
    source, document = page("table5", model="LLaMA-2-70B")
    table = document.tables[0]
    assert column(table, "Method") == ["FP16", "FP16, streamed", "SAGE-PTQ, banded", "SAGE-PTQ"]
    assert "Decoding: float16, batch 1, prompt 1984, 64 tokens" in table.caption
    assert column(table, "Token ms (paper)") == ["-", "972.10", "646.30", "-"]
    assert column(table, "Token ms (measured)") == [f"{1e3 / 30:.2f}", "not run", *[f"{1e3 / 55:.2f}"] * 2]
    assert column(table, "Resident GB")[3] == f"{source.records['key-03']['metrics'][1]['value'] / 1e9:.3f}"


@pytest.mark.parametrize("name", ["table6", "table7", "figure2"])
def test_each_measured_fact_is_a_tidy_row_with_its_run(name):
    source = toy.source(name)
    rows = build_rows(source.plan, source.records, source.claims)
    for metric in {entry.metric for entry in FACTS[source.plan.metric]} - {"perplexity", "weight_bits", "scale_bits"}:
        own = [row for row in rows if row.metric == metric]
        assert {row.run_key for row in own} == source.records.keys()
        assert all(row.measured == fact(source.records[row.run_key], metric) for row in own)


def test_a_record_without_the_number_gives_none():
    assert fact({}, "quantization_minutes") is None
    assert fact({"phases": {"quantize": {"seconds": "soon"}}}, "quantization_minutes") is None
    assert fact({"ledger": {"nominal_weight_bits": 1.0}}, "gpu_occupancy_percent") is None
