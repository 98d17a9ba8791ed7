import os

import pytest
import tiny
import torch

from harness import quantized_cache
from harness.quantize import QuantizedModel, quantize_model
from harness.quantized_cache import QuantizedEntry, entry_folder, load_quantized, run_conditions, save_quantized
from kernels.errors import InputError
from methods import create_method

PHASES = {"quantize": {"seconds": 1.5, "peak_bytes": 7}}


@pytest.fixture(scope="module")
def quantized():
    found = quantize_model(tiny.build(), create_method("rtn", bits=3, group_size=32), None)
    return QuantizedModel(found.packed, found.layers, {"model.norm.weight": torch.arange(64.0)})


def test_what_is_kept_comes_back_bit_for_bit(quantized):
    size = save_quantized("a", quantized, PHASES)
    found, phases, same_size = load_quantized("a")
    assert phases == PHASES
    assert found.layers == quantized.layers
    assert list(found.packed) == list(quantized.packed)
    for name, weight in quantized.packed.items():
        assert torch.equal(found.packed[name].decode(), weight.decode())
    assert torch.equal(found.folded["model.norm.weight"], torch.arange(64.0))
    # Folded parameters are the model's own, changed: they are counted with the rest of it.
    assert size == same_size == (entry_folder("a") / "block-00000.safetensors").stat().st_size
    assert (entry_folder("a") / "block-00000.folded.safetensors").is_file()


def test_another_key_finds_nothing(quantized):
    save_quantized("a", quantized, PHASES)
    assert load_quantized("b") is None


def test_an_entry_without_its_description_does_not_count(quantized):
    save_quantized("a", quantized, PHASES)
    (entry_folder("a") / "quantized.json").unlink()
    assert load_quantized("a") is None


FILES = ["block-00000.safetensors", "block-00000.json", "quantized.json", "block-00000.folded.safetensors"]


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", ["truncated", "empty", "other", "flipped", "missing"])
def test_a_damaged_entry_is_named_dropped_and_made_again(quantized, caplog, file, damage):
    save_quantized("a", quantized, PHASES)
    path = entry_folder("a") / file
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        flipped = content[:-9] + bytes([content[-9] ^ 1]) + content[-8:]
        damaged = {"truncated": content[: len(content) // 2], "empty": b"", "other": b'{"layers": 3}'}
        path.write_bytes({**damaged, "flipped": flipped}[damage])
    assert load_quantized("a") is None or (damage == "flipped" and file.endswith(".json"))
    if damage != "missing" and not file.endswith(".json"):
        assert str(entry_folder("a")) in caplog.text
        assert "are made again" in caplog.text
    save_quantized("a", quantized, PHASES)
    assert load_quantized("a") is not None


def age(key, days):
    """Make an entry look as if it was written `days` ago."""
    folder = entry_folder(key)
    for path in (*folder.iterdir(), folder):
        then = path.stat().st_mtime - days * 86400
        os.utime(path, (then, then))


def test_the_entries_used_longest_ago_go_first(quantized, monkeypatch):
    save_quantized("a", quantized, PHASES)
    size = sum(file.stat().st_size for file in entry_folder("a").iterdir())
    save_quantized("b", quantized, PHASES)
    save_quantized("c", quantized, PHASES)
    for key, days in (("a", 3), ("b", 2), ("c", 1)):
        age(key, days)
    assert load_quantized("a") is not None  # used just now
    monkeypatch.setenv("SAGEBENCH_CACHE_GB", str(3.5 * size / 1e9))
    save_quantized("d", quantized, PHASES)
    assert {key: load_quantized(key) is not None for key in "abcd"} == {"a": True, "b": False, "c": True, "d": True}


def test_the_entry_just_written_stays_however_small_the_cache(quantized, monkeypatch):
    save_quantized("a", quantized, PHASES)
    monkeypatch.setenv("SAGEBENCH_CACHE_GB", "0")
    save_quantized("b", quantized, PHASES)
    assert load_quantized("a") is None
    assert load_quantized("b") is not None


def test_a_cache_size_that_is_no_number_is_named(quantized, monkeypatch):
    monkeypatch.setenv("SAGEBENCH_CACHE_GB", "8GB")
    with pytest.raises(InputError, match="SAGEBENCH_CACHE_GB='8GB'; it must be a number of gigabytes"):
        save_quantized("a", quantized, PHASES)


def test_an_unfinished_entry_is_as_old_as_its_last_file(quantized, monkeypatch):
    save_quantized("a", quantized, PHASES)
    size = sum(file.stat().st_size for file in entry_folder("a").iterdir())
    age("a", 1)
    unfinished = QuantizedEntry("b")
    unfinished.save(0, quantized, None)
    monkeypatch.setenv("SAGEBENCH_CACHE_GB", str(2.5 * size / 1e9))
    save_quantized("c", quantized, PHASES)
    assert load_quantized("a") is None  # used longest ago
    assert (entry_folder("b") / "block-00000.json").is_file()


def test_what_another_process_may_be_making_stays_however_small_the_cache(quantized, monkeypatch):
    monkeypatch.setenv("SAGEBENCH_CACHE_GB", "0")
    for key in "ab":
        QuantizedEntry(key).save(0, quantized, None)
    age("a", 2)  # nobody is at work here any more
    save_quantized("c", quantized, PHASES)
    assert not entry_folder("a").exists()
    assert (entry_folder("b") / "block-00000.json").is_file()


def test_an_entry_that_lost_a_block_is_not_finished(quantized):
    entry = QuantizedEntry("a")
    for index in range(2):
        entry.save(index, quantized, None)
    (entry_folder("a") / "block-00000.safetensors").unlink()
    with pytest.raises(FileNotFoundError):
        entry.finish(PHASES)
    assert load_quantized("a") is None


@pytest.fixture
def blocks():
    """Three blocks of a model, and activations that come through some of them."""
    return [
        quantize_model(tiny.build(seed=seed), create_method("rtn", bits=3, group_size=32), None) for seed in range(3)
    ], {"hidden": torch.randn(2, 5, 7)}


def begun(blocks, hidden):
    """An entry that was interrupted after `blocks`."""
    entry = QuantizedEntry("a")
    assert entry.restore() == ([], None)
    for index, block in enumerate(blocks):
        entry.save(index, block, hidden)
    return QuantizedEntry("a")


def test_finished_blocks_and_activations_are_restored_bit_for_bit(blocks):
    made, hidden = blocks
    found, activations = begun(made, hidden).restore()
    assert len(found) == 3
    for block, kept in zip(made, found, strict=True):
        assert kept.layers == block.layers
        for name, weight in block.packed.items():
            assert torch.equal(kept.packed[name].decode(), weight.decode())
    assert torch.equal(activations["hidden"], hidden["hidden"])


def test_a_block_without_the_activations_behind_it_is_made_again(blocks):
    made, hidden = blocks
    entry = begun(made[:2], hidden)
    entry.save(2, made[2], None)  # killed before its activations were kept
    found, activations = QuantizedEntry("a").restore()
    assert len(found) == 2
    assert torch.equal(activations["hidden"], hidden["hidden"])


def test_a_first_block_whose_activations_were_not_kept_in_time_is_made_again(blocks):
    made, hidden = blocks
    entry = begun(made[:1], hidden)
    (entry.folder / "stream.safetensors").unlink()  # killed between the block's log and its activations
    assert entry.restore() == ([], None)
    assert entry.restored_blocks == 0


def test_without_activations_whole_blocks_are_enough(blocks):
    begun(blocks[0], None)
    (entry_folder("a") / "block-00001.json").unlink()
    entry = QuantizedEntry("a")
    found, activations = entry.restore()
    assert (len(found), activations, entry.restored_blocks) == (1, None, 1)


def test_conditions_are_those_of_the_processor_the_threads_and_what_computes(monkeypatch):
    here = run_conditions("cpu")
    assert here == run_conditions("cpu")
    assert {"torch", "numpy", "scipy"} <= here["packages"].keys()
    changes = [
        (quantized_cache, "cpu_name", lambda: "another processor"),
        (torch.backends.cpu, "get_cpu_capability", lambda: "NO AVX"),
        (torch, "get_num_threads", lambda: 64),
        (quantized_cache, "package_versions", lambda names: {"torch": "1.0"}),
    ]
    for changed in changes:
        with monkeypatch.context() as patch:
            patch.setattr(*changed)
            assert run_conditions("cpu") != here, changed[1]


@pytest.mark.parametrize("file", ["block-00001.safetensors", "block-00001.json", "stream.safetensors"])
def test_a_damaged_block_begins_again_where_nothing_is_lost(blocks, caplog, file):
    made, hidden = blocks
    entry = begun(made, hidden)
    path = entry.folder / file
    path.write_bytes(path.read_bytes()[:-20])
    # The activations are those behind block 2: without block 1 they are of no use.
    assert entry.restore() == ([], None)
    assert "is damaged" in caplog.text


def test_space_is_asked_for_before_anything_is_written(quantized, monkeypatch):
    asked = []
    monkeypatch.setattr(quantized_cache, "require_space", lambda folder, needed, purpose: asked.append(needed))
    save_quantized("a", quantized, PHASES)
    assert asked[0] >= sum(weight.nbytes() for weight in quantized.packed.values())
