import os

import pytest
import tiny
import torch

from harness import quantized_cache
from harness.quantize import QuantizedModel, quantize_model
from harness.quantized_cache import entry_folder, load_quantized, save_quantized
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
    assert size == same_size == (entry_folder("a") / "packed.safetensors").stat().st_size


def test_another_key_finds_nothing(quantized):
    save_quantized("a", quantized, PHASES)
    assert load_quantized("b") is None


def test_an_entry_without_its_description_does_not_count(quantized):
    save_quantized("a", quantized, PHASES)
    (entry_folder("a") / "quantized.json").unlink()
    assert load_quantized("a") is None


@pytest.mark.parametrize("file", ["packed.safetensors", "quantized.json", "folded.safetensors"])
@pytest.mark.parametrize("damage", ["truncated", "empty", "other", "missing"])
def test_a_damaged_entry_is_dropped_and_made_again(quantized, file, damage):
    save_quantized("a", quantized, PHASES)
    path = entry_folder("a") / file
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes({"truncated": content[: len(content) // 2], "empty": b"", "other": b'{"layers": 3}'}[damage])
    assert load_quantized("a") is None
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


def test_space_is_asked_for_before_anything_is_written(quantized, monkeypatch):
    asked = []
    monkeypatch.setattr(quantized_cache, "require_space", lambda folder, needed, purpose: asked.append(needed))
    save_quantized("a", quantized, PHASES)
    assert asked[0] >= sum(weight.nbytes() for weight in quantized.packed.values())
