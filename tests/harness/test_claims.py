import csv

import pytest

from harness.claims import CLAIMS_FOLDER, COLUMNS, bit_families, family_of, find, load_claims
from kernels.errors import InputError

HEADER = "source,item,model,method,setting,metric,dataset,value,note"
GOOD = "a paper,table 1,M-1B,gptq,3 bit,perplexity,wikitext2,20.5,"


def write(path, *lines):
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


FILES = sorted(CLAIMS_FOLDER.glob("*.csv"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_line_of_a_file_is_a_claim_with_its_printed_value(path):
    with path.open(encoding="utf-8", newline="") as file:
        printed = list(csv.DictReader(file))
    claims = load_claims(path)
    assert len(claims) == len(printed) > 0
    for claim, line in zip(claims, printed, strict=True):
        assert claim.value == float(line.pop("value"))
        assert {name: getattr(claim, name) for name in line} == line


def test_all_files_are_loaded_and_no_item_is_in_two():
    assert load_claims() == tuple(claim for path in FILES for claim in load_claims(path))
    items = [{claim.item for claim in load_claims(path)} for path in FILES]
    assert len(set().union(*items)) == sum(map(len, items))
    text = (CLAIMS_FOLDER / "README.md").read_text(encoding="utf-8")
    assert [path.name for path in FILES if f"`{path.name}`" not in text] == []


def test_headline_numbers_of_slim_llm():
    of_table = find(load_claims(), item="SliM-LLM LLaMA", model="LLaMA-7B", metric="perplexity", dataset="wikitext2")
    printed = {(claim.method, claim.setting): claim.value for claim in of_table}
    assert printed["slim-llm", "2 bit g128"] == 14.58
    assert printed["gptq", "2 bit g128"] == 152.31
    assert printed["slim-llm-plus", "2 bit g128"] == 9.68
    assert printed["slim-llm", "3 bit g128"] == 6.40
    (gptq,) = find(of_table, method="gptq", setting="2 bit g128")
    assert "44.01" in gptq.note


def test_table_1_has_six_models_by_eight_rows_and_bits_under_the_family():
    claims = load_claims()
    assert len(find(claims, item="table 1", metric="perplexity")) == 48
    assert {claim.model for claim in find(claims, item="table 1", metric="weight_bits")} == {"OPT"}
    (fp16,) = find(claims, item="table 1", model="OPT-1.3B", method="fp16")
    assert fp16.value == 14.62


def test_misprints_carry_their_note():
    (claim,) = find(load_claims(), item="table 2", model="LLaMA-2-70B", method="sage-ptq", metric="perplexity")
    assert claim.value == 7.51
    assert "4.67" in claim.note


def test_an_empty_text_is_a_criterion_and_none_is_not():
    claims = load_claims()
    assert {claim.setting for claim in find(claims, item="table 7", setting="")} == {""}
    assert len({claim.setting for claim in find(claims, item="table 1", setting=None)}) > 1


def test_families_are_those_with_bit_counts_only():
    claims = load_claims()
    assert bit_families(claims, "table 2") == ("LLaMA", "LLaMA-2", "LLaMA-3")
    assert bit_families(claims, "table 7") == ()


@pytest.mark.parametrize(
    ("model", "family"),
    [("LLaMA-2-7B", "LLaMA-2"), ("LLaMA-7B", "LLaMA"), ("LLaMA-3-70B", "LLaMA-3"), ("OPT-1.3B", None)],
)
def test_a_model_belongs_to_the_longest_family_name(model, family):
    assert family_of(model, ("LLaMA", "LLaMA-2", "LLaMA-3")) == family


def test_a_file_of_ones_own_loads(tmp_path):
    (claim,) = load_claims(write(tmp_path / "own.csv", HEADER, GOOD))
    assert (claim.model, claim.value, claim.note) == ("M-1B", 20.5, "")


def test_a_byte_order_mark_is_no_part_of_the_header(tmp_path):
    path = tmp_path / "own.csv"
    path.write_text(f"{HEADER}\n{GOOD}\n", encoding="utf-8-sig")
    assert len(load_claims(path)) == 1


@pytest.mark.parametrize(
    ("lines", "where", "problem"),
    [
        ([HEADER + ",color", GOOD + ",red"], "line 1", "unknown columns ['color']"),
        ([HEADER.replace("value,", ""), GOOD], "line 1", "missing columns ['value']"),
        ([HEADER, GOOD, GOOD.replace("20.5", "twenty")], "line 3", "value='twenty'"),
        ([HEADER, GOOD.replace("20.5", "nan")], "line 2", "value='nan'"),
        ([HEADER, GOOD.replace("20.5", "")], "line 2", "value=''"),
        ([HEADER, GOOD.replace("gptq", " ")], "line 2", "method is empty"),
        ([HEADER, GOOD + ",one too many"], "line 2", "10 cells, must be 9"),
        ([HEADER, GOOD, GOOD.replace("20.5", "21")], "line 3", "repeats line 2"),
        ([HEADER, '"a paper"x,' + GOOD], "line 2", "not a csv line"),
        ([""], "line 1", "missing columns"),
    ],
)
def test_a_bad_file_is_refused_with_file_and_line(tmp_path, lines, where, problem):
    path = write(tmp_path / "bad.csv", *lines)
    with pytest.raises(InputError) as caught:
        load_claims(path)
    assert f"{path} {where}" in str(caught.value)
    assert problem in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"absent\.csv does not exist"):
        load_claims(tmp_path / "absent.csv")


def test_the_readme_names_every_column():
    text = (CLAIMS_FOLDER / "README.md").read_text(encoding="utf-8")
    assert [name for name in COLUMNS if f"| `{name}` |" not in text] == []
