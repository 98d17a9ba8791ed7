import pytest

from harness.cache import cache_folder
from harness.zeroshot.results_cache import load_result, result_key, save_result

ENTRY = {"metric": "zeroshot", "dataset": "piqa", "value": 61.5}


def test_what_was_kept_comes_back():
    key = result_key("weights", task="piqa", limit=None)
    assert load_result(key) is None
    save_result(key, ENTRY)
    assert load_result(key) == ENTRY


def test_anything_that_decides_a_result_decides_its_key():
    base = {"task": "piqa", "limit": 200, "versions": ["1", "2"], "data": "a"}
    changed = [{**base, name: "other"} for name in base]
    keys = [result_key("w", **facts) for facts in (base, *changed)] + [result_key("v", **base)]
    assert len(set(keys)) == len(keys)
    assert result_key("w", **base) == result_key("w", **dict(reversed(base.items())))


@pytest.mark.parametrize("content", ["", "[1]", '{"metric": "perplexity"}', "\x00"])
def test_a_damaged_entry_counts_as_absent(content):
    (cache_folder("zeroshot") / "k.json").write_text(content)
    assert load_result("k") is None
