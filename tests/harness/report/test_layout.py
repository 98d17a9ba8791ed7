import dataclasses

from harness.report.document import Footnotes
from harness.report.layout import build_document


def test_measured_model_comes_first_then_the_papers_values(plan, records, claims):
    titles = [table.title for table in build_document(plan, records, claims).tables]
    assert titles == ["toy-model: perplexity", "The paper's own values, table 1: OPT, perplexity on wikitext2"]


def test_the_caption_says_windows_context_dtype_calibration_and_the_plans_notes(plan, records, claims):
    assert build_document(plan, records, claims).tables[0].caption == (
        "Measured: 12 of 148 windows of wikitext2, context 2048, float32",
        "Calibration of methods that need it: 4 x 64 of c4-sample",
        "Profile embedded",
    )


def test_columns_stand_in_the_agreed_order(plan, records, claims):
    assert [column.title for column in build_document(plan, records, claims).tables[0].columns] == [
        "Method", "Setting", "Paper", "Measured", "Difference", "Nominal weight bits", "Nominal scale bits",
        "Payload bits", "Total MB", "Notes",
    ]  # fmt: skip


def test_the_best_quantized_value_is_bold_and_the_unquantized_one_is_not(plan, records, claims):
    table = build_document(plan, records, claims).tables[0]
    assert [cell.text for row in table.rows for cell in row if cell.bold] == ["30.00"]


def test_equal_footnotes_share_a_number():
    footnotes = Footnotes()
    assert footnotes.marks(["b", "a"]) == (1, 2)
    assert footnotes.marks(["a"]) == (2,)
    assert footnotes.texts == ["b", "a"]


def test_a_note_of_several_rows_is_one_footnote(plan, records, claims, planned):
    again = planned("pb-llm", "10% salient", None, note="method not registered")
    table = build_document(dataclasses.replace(plan, rows=(*plan.rows, again)), records, claims).tables[0]
    assert table.footnotes.count("method not registered") == 1
    mark = table.footnotes.index("method not registered") + 1
    assert [row[0].text for row in table.rows if mark in row[-1].marks] == ["BILLM", "PB-LLM"]


def test_a_note_of_all_measured_rows_is_said_once_for_the_table(plan, records, claims):
    table = build_document(plan, records, claims).tables[0]
    assert [remark for remark in table.remarks if "flattered" in remark] == [table.remarks[0]]
    assert not any("flattered" in note for note in table.footnotes)


def test_a_row_without_a_number_keeps_a_note_that_all_measured_rows_share(plan, records, claims):
    rows = [dataclasses.replace(row, note="odd setting") for row in plan.rows]
    table = build_document(dataclasses.replace(plan, rows=tuple(rows)), records, claims).tables[0]
    assert "All measured rows: odd setting." in table.remarks
    mark = table.footnotes.index("odd setting") + 1
    assert [row[0].text + row[3].text for row in table.rows if mark in row[-1].marks] == ["GPTQ-", "BILLMnot run"]


def test_a_note_of_some_measured_rows_stays_with_them(plan, records, claims):
    records["k-fp16"]["model"] = {}
    table = build_document(plan, records, claims).tables[0]
    assert not any("flattered" in remark for remark in table.remarks)
    (mark,) = [number for number, note in enumerate(table.footnotes, 1) if "flattered" in note]
    assert [row[0].text for row in table.rows if mark in row[-1].marks] == ["GPTQ", "SAGE-PTQ"]


def test_rows_measured_on_different_windows_say_so_one_by_one(plan, records, claims, make_record):
    records["k-sage"] = make_record("k-sage", "sage-ptq", 30.0, windows=4, calibrated=False)
    footnotes = build_document(plan, records, claims).tables[0].footnotes
    assert "4 of 148 windows of wikitext2, context 2048, float32" in footnotes
    assert "12 of 148 windows of wikitext2, context 2048, float32" in footnotes


def test_rows_that_were_not_run_say_why(plan, records, claims):
    table = build_document(plan, records, claims).tables[0]
    (row,) = [row for row in table.rows if row[0].text == "BILLM"]
    assert row[3].text == "not run"
    assert [table.footnotes[mark - 1] for mark in row[-1].marks] == ["method not registered"]


def test_a_paper_model_that_was_not_run_is_explained_below_the_papers_values(plan, records, claims):
    assert build_document(plan, records, claims).tables[1].remarks == ("OPT-66B: not run: profile embedded.",)


def test_table_2_has_the_papers_values_by_family_with_its_misprints(plan, claims, planned):
    llama = planned("sage-ptq", "n_lut 4", None, model="LLaMA-2-70B", note="not run: profile embedded")
    document = build_document(dataclasses.replace(plan, name="table2", item="table 2", rows=(llama,)), {}, claims)
    assert [table.title.split(":")[1].split(",")[0].strip() for table in document.tables] == [
        "LLaMA", "LLaMA-2", "LLaMA-3",
    ]  # fmt: skip
    second = document.tables[1]
    assert second.footnotes == (
        "1.70 in table 7",
        "equals the C4 value of fig. 8; fig. 8 and table 7 have 4.67 for wikitext2",
    )
    assert [(cell.text, cell.marks) for row in second.rows for cell in row if cell.marks] == [
        ("1.000", (1,)), ("7.51", (2,)),
    ]  # fmt: skip
    assert document.notes == plan.notes


def test_two_datasets_have_two_papers_tables_and_columns_of_their_own(plan, records, claims):
    both = dataclasses.replace(plan, item="table 3", datasets=("wikitext2", "c4"), rows=plan.rows[:-1])
    records["k-sage"]["metrics"].append({"metric": "perplexity", "dataset": "c4", "value": 44.0})
    measured, *papers = build_document(both, records, claims).tables
    heads = [column.title for column in measured.columns]
    assert heads[3:9:3] == ["Measured (wikitext2)", "Measured (c4)"]
    assert [table.title for table in papers] == [
        "The paper's own values, table 3: perplexity on wikitext2",
        "The paper's own values, table 3: perplexity on c4",
    ]


def test_text_that_stands_in_for_a_corpus_is_named_in_the_head_and_in_a_note(plan, records, claims, make_record):
    for key, record in records.items():
        records[key] = make_record(key, record["method"]["name"], 30.0, dataset="wiki-sample")
    table = build_document(plan, records, claims).tables[0]
    assert table.columns[3].title == "Measured (wiki-sample)"
    assert any("wiki-sample is not the paper's wikitext2" in remark for remark in table.remarks)


def test_without_the_unquantized_model_the_table_says_so(plan, records, claims):
    with_it = build_document(plan, records, claims).tables[0].remarks
    without = build_document(dataclasses.replace(plan, rows=plan.rows[1:]), records, claims).tables[0].remarks
    assert not any("no measured row of the unquantized model" in remark for remark in with_it)
    assert any("no measured row of the unquantized model" in remark for remark in without)
