import os
import shutil

import pytest
import tiny
import torch
from torch import nn

from harness.cache import cache_folder, prune
from harness.reference import build_reference, load_reference, reference_key
from kernels.errors import InputError


def size(key="k"):
    return sum(file.stat().st_size for file in (cache_folder("reference") / key).glob("*"))


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_kept_logits_are_the_model_s_own_to_the_last_bit(family):
    model, windows = tiny.build(family), tiny.tokens(3)
    for reference in (build_reference("k", model, windows), load_reference("k")):
        assert reference.kind == "hidden"
        for index, window in enumerate(windows):
            assert torch.equal(reference.logits(index), model(window[None]).logits[0])


def test_the_soft_cap_of_logits_is_part_of_the_head():
    model = tiny.build("gemma2")
    assert model.config.final_logit_softcapping == 30.0
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    reference = build_reference("k", model, tiny.tokens(2))
    assert (reference.kind, reference.softcap) == ("hidden", 30.0)
    assert float(reference.logits(0).abs().max()) > 25


class Scaled(nn.Module):
    """A model that does something of its own behind its head."""

    def __init__(self, model):
        super().__init__()
        self.inner, self.config = model, model.config

    def get_output_embeddings(self):
        return self.inner.lm_head

    def forward(self, ids, use_cache=False):
        found = self.inner(ids, use_cache=use_cache)
        found.logits = found.logits * 3
        return found


def test_a_model_that_does_more_behind_its_head_is_kept_as_whole_logits():
    model, windows = Scaled(tiny.build()), tiny.tokens(2)
    reference = build_reference("k", model, windows)
    assert reference.kind == "logits"
    assert torch.equal(reference.logits(1), model(windows[1][None]).logits[0])


def test_the_size_does_not_grow_with_the_vocabulary_times_the_windows():
    build_reference("few", tiny.build(), tiny.tokens(2))
    build_reference("many", tiny.build(), tiny.tokens(12))
    # Each further window of 32 tokens takes the inputs of the head, 32 x 64 float32, and a header.
    assert size("many") - size("few") < 10 * (32 * tiny.HIDDEN * 4 + 200)


def test_a_head_that_was_rounded_to_16_bits_is_kept_in_16_bits():
    model = tiny.build()
    with torch.no_grad():
        model.lm_head.weight.copy_(model.lm_head.weight.half())
    build_reference("half", model, tiny.tokens(1))
    model.lm_head.weight.add_(1e-7)
    build_reference("full", model, tiny.tokens(1))
    assert size("full") - size("half") == pytest.approx(tiny.VOCABULARY * tiny.HIDDEN * 2, abs=100)
    assert load_reference("half").logits(0).dtype == torch.float32


def test_a_reference_larger_than_the_cache_is_refused_and_leaves_nothing(monkeypatch):
    monkeypatch.setenv("SAGEBENCH_CACHE_GB", "0.00001")
    with pytest.raises(InputError, match=r"takes 0.0 GB; the cache may hold 0.0 GB: use fewer --windows"):
        build_reference("k", tiny.build(), tiny.tokens(2))
    assert not (cache_folder("reference") / "k").exists()


def test_references_of_one_run_stay_together_and_must_fit_together(monkeypatch):
    for key in ("old", "a"):
        build_reference(key, tiny.build(), tiny.tokens(2))
    os.utime(cache_folder("reference") / "a" / "reference.json", (1, 1))  # used longest ago, and still needed
    monkeypatch.setenv("SAGEBENCH_CACHE_GB", str(2.5 * size("a") / 1e9))
    build_reference("b", tiny.build(), tiny.tokens(2), beside=["a"])
    assert {key: load_reference(key) is not None for key in ("old", "a", "b")} == {"old": False, "a": True, "b": True}
    with pytest.raises(InputError, match=r"takes 0\.0 GB, and the run's others 0\.0 GB; the cache may hold 0\.0 GB"):
        build_reference("c", tiny.build(), tiny.tokens(2), beside=["a", "b"])


def test_a_reference_in_use_can_be_read_when_it_is_taken_from_the_cache():
    model, windows = tiny.build(), tiny.tokens(2)
    reference = build_reference("k", model, windows)
    shutil.rmtree(cache_folder("reference") / "k")
    assert torch.equal(reference.logits(1), model(windows[1][None]).logits[0])


def test_a_reference_that_is_whole_and_not_yet_in_its_place_stays(monkeypatch):
    monkeypatch.setenv("SAGEBENCH_CACHE_GB", "0.001")
    syncing = cache_folder("reference", ".c.1234.part")
    (syncing / "reference.json").write_text("{}")
    (syncing / "window").write_bytes(bytes(1_000_000))
    build_reference("k", tiny.build(), tiny.tokens(2))
    assert syncing.is_dir()


def test_of_two_processes_that_make_one_reference_the_faster_one_has_it():
    model, windows = tiny.build(), tiny.tokens(2)

    def overtaken(done, total):
        if done == total:
            build_reference("k", model, windows)

    slower = build_reference("k", model, windows, overtaken)
    assert torch.equal(slower.logits(1), model(windows[1][None]).logits[0])
    assert [folder.name for folder in cache_folder("reference").iterdir()] == ["k"]


def test_an_interrupted_reference_does_not_count():
    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_reference("k", tiny.build(), tiny.tokens(2), stop)
    assert load_reference("k") is None


@pytest.mark.parametrize("damage", ["reference.json", "head.safetensors", "window-00001.safetensors"])
def test_a_damaged_reference_counts_as_absent(damage):
    build_reference("k", tiny.build(), tiny.tokens(2))
    path = cache_folder("reference") / "k" / damage
    path.unlink() if damage.startswith("window") else path.write_bytes(b"{}")
    assert load_reference("k") is None


def test_anything_that_decides_the_logits_decides_the_key():
    base = {"model": "a", "text": "b", "dtype": "float32", "windows": 3}
    keys = {reference_key(**base), *(reference_key(**{**base, name: "other"}) for name in base)}
    assert len(keys) == 5


def test_pruning_removes_what_was_used_longest_ago():
    for number, name in enumerate(("old", "used", "new")):
        folder = cache_folder("things", name)
        (folder / "data").write_bytes(bytes(100))
        os.utime(folder / "data", (number, number))
    os.utime(cache_folder("things", "old") / "data", (9, 9))
    prune([cache_folder("things", "new")], "data", 250)
    assert sorted(folder.name for folder in cache_folder("things").iterdir()) == ["new", "old"]


def test_a_limit_that_is_no_number_is_refused(monkeypatch):
    monkeypatch.setenv("SAGEBENCH_CACHE_GB", "lots")
    with pytest.raises(InputError, match="SAGEBENCH_CACHE_GB='lots'; it must be a number of gigabytes"):
        build_reference("k", tiny.build(), tiny.tokens(1))
