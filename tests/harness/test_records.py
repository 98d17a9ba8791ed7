import json
import os

import pytest

from harness.records import FORMAT, RecordStore

KEY = "0123456789abcdef"
RECORD = {
    "spec": {},
    "metrics": [{"metric": "perplexity", "dataset": "wikitext2", "value": 20.5}],
    "ledger": {"payload_bits": 3.0},
    "environment": {},
}


@pytest.fixture
def store(tmp_path):
    return RecordStore(tmp_path / "runs")


def names(store):
    return sorted(path.name for path in store.folder.iterdir())


def test_what_is_saved_is_loaded(store):
    store.save(KEY, RECORD)
    loaded = store.load(KEY)
    assert loaded == {**RECORD, "format": FORMAT, "key": KEY, "created": loaded["created"]}
    assert loaded["created"].endswith("Z")
    assert store.warnings == []


def test_an_absent_record_is_none(store):
    assert store.load(KEY) is None
    assert store.load_all() == {}


def test_a_record_is_written_whole_or_not_at_all(store, monkeypatch):
    store.save(KEY, RECORD)
    before = store.path(KEY).read_bytes()
    with pytest.raises(ValueError, match="JSON"):  # not a number that JSON has
        store.save(KEY, {**RECORD, "metrics": [{"value": float("nan")}]})

    def crash(*_):
        raise OSError("power cut")

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(OSError, match="power cut"):
        store.save(KEY, {**RECORD, "metrics": []})
    monkeypatch.undo()
    assert store.path(KEY).read_bytes() == before
    assert names(store) == [f"{KEY}.json"]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "Expecting value"),
        (b'{"format": 1, "key": "0123', "Unterminated string"),
        (b"\xff\xfe\x00", "codec can't decode"),
        (b"[]", "not a JSON object"),
        (b"{}", f"format None, this build writes {FORMAT}"),
        (json.dumps({**RECORD, "format": 99, "key": KEY}).encode(), "format 99"),
        (json.dumps({**RECORD, "format": FORMAT, "key": "f" * 16}).encode(), "holds key 'ffffffffffffffff'"),
        (json.dumps({"format": FORMAT, "key": KEY, "spec": {}, "metrics": []}).encode(), "no 'ledger'"),
        *(
            (json.dumps({**RECORD, "format": FORMAT, "key": KEY, part: []}).encode(), f"{part!r} is no JSON object")
            for part in ("spec", "ledger", "environment")
        ),
        *(
            (json.dumps({**RECORD, "format": FORMAT, "key": KEY, "metrics": metrics}).encode(), problem)
            for metrics, problem in (
                ({}, "metrics without their values"),
                ([20.5], "metrics without their values"),
                ([{"metric": "perplexity", "value": 20.5}], "metrics without their dataset"),
            )
        ),
    ],
)
def test_a_corrupt_record_is_moved_aside_and_reported(store, content, problem):
    store.save(KEY, RECORD)
    store.path(KEY).write_bytes(content)
    assert store.load(KEY) is None
    assert names(store) == [f"{KEY}.json.corrupt"]
    assert (store.folder / f"{KEY}.json.corrupt").read_bytes() == content
    (warning,) = store.warnings
    assert str(store.path(KEY)) in warning
    assert problem in warning
    assert "the run is repeated" in warning
    assert store.load(KEY) is None
    assert len(store.warnings) == 1


def test_a_failure_is_kept_until_the_run_succeeds(store):
    store.save_failure(KEY, {"model": "m"}, "RuntimeError: no", "Traceback ...")
    kept = json.loads(store.failure_path(KEY).read_text(encoding="utf-8"))
    assert (kept["key"], kept["error"], kept["details"]) == (KEY, "RuntimeError: no", "Traceback ...")
    assert store.load(KEY) is None
    assert store.load_all() == {}
    store.save(KEY, RECORD)
    assert names(store) == [f"{KEY}.json"]


def test_all_finished_records_are_loaded_and_nothing_else(store):
    store.save(KEY, RECORD)
    store.save("b" * 16, RECORD)
    store.save_failure("c" * 16, {}, "error", "")
    store.path("d" * 16).write_text("{", encoding="utf-8")
    assert sorted(store.load_all()) == [KEY, "b" * 16]
    assert len(store.warnings) == 1
