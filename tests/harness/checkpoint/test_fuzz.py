"""The loader under mutated files: it refuses, or what it loads is what was written. It never crashes the interpreter,
never allocates by a size that a file claims, never loads something else."""

import copy
import json
import resource
import shutil

import psutil
import pytest
import tiny
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from harness.checkpoint.description import config_sha256, read_description
from harness.checkpoint.files import weight_files
from harness.checkpoint.read import verify_checkpoint
from kernels.errors import InputError

# Bytes that keep JSON parseable get furthest: digits, quotes, brackets, letters of dtypes.
likely = st.sampled_from([*b'0123456789"[]{},: -FUIB8163264.eE', 0, 0x80, 0xFF]) | st.integers(0, 255)
changes = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), likely), min_size=1, max_size=4)
few = settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])


@pytest.fixture(autouse=True)
def little_memory():
    """Two more gigabytes of address space and no more: an allocation by a size that a file claims fails the test."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + (2 << 30), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.fixture(scope="module")
def victim(pristine, tmp_path_factory):
    """A copy of the checkpoint whose files are replaced and put back."""
    return shutil.copytree(pristine.folder, tmp_path_factory.mktemp("fuzz") / "victim")


def mutated(content, edits, first=0, last=None):
    """`content` with bytes replaced; places are given as shares of the part from `first` to `last`."""
    out = bytearray(content)
    length = (len(out) if last is None else last) - first
    for share, value in edits:
        out[first + int(share * length)] = value
    return bytes(out)


def refused_or_the_same(folder, file, content):
    """Put `content` in place of `file` and check the folder: refused, or every tensor is as it was."""
    before = file.read_bytes()
    file.write_bytes(content)
    try:
        verified = verify_checkpoint(folder)
    except InputError:
        return
    finally:
        file.write_bytes(before)
    assert verified == read_description(folder)


@given(edits=changes, number=st.integers(0, 3))
@few
def test_a_mutated_header_of_a_shard(victim, edits, number):
    file = weight_files(victim)[number % len(weight_files(victim))]
    content = file.read_bytes()
    (victim / "SHA256SUMS").unlink(missing_ok=True)  # it would find everything by itself
    end = 8 + int.from_bytes(content[:8], "little")
    refused_or_the_same(victim, file, mutated(content, edits, 0, end))


@given(edits=changes, number=st.integers(0, 3))
@few
def test_mutated_data_of_a_shard(victim, edits, number):
    file = weight_files(victim)[number % len(weight_files(victim))]
    content = file.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    after = mutated(content, edits, start)
    refused_or_the_same(victim, file, after)


@given(size=st.integers(0, 2**64 - 1) | st.sampled_from([2**31, 2**63, 2**64 - 1, 100_000_001]))
@few
def test_a_header_that_claims_another_length(victim, size):
    file = weight_files(victim)[0]
    refused_or_the_same(victim, file, size.to_bytes(8, "little") + file.read_bytes()[8:])


@given(edits=changes)
@few
def test_a_mutated_configuration(victim, edits):
    refused_or_the_same(victim, victim / "config.json", mutated((victim / "config.json").read_bytes(), edits))


@given(edits=changes)
@few
def test_a_mutated_index(victim, edits):
    index = victim / "model.safetensors.index.json"
    refused_or_the_same(victim, index, mutated(index.read_bytes(), edits))


json_values = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8)
nested = json_values | st.lists(json_values, max_size=3) | st.dictionaries(st.text(max_size=4), json_values, max_size=2)
sizes = st.sampled_from([0, 1, 2, 3, 16, 31, 33, 64, 2**31, 2**62, -1])


@st.composite
def signed_lies(draw):
    """A change of one layer's description, by somebody who renews the checksum of the configuration."""
    key = draw(st.sampled_from(["layout", "bits", "group_size", "symmetric", "shape", "sha256", "metadata", "name"]))
    layouts = st.sampled_from(["dense", "binary", "codebook", "partial_binary", "residual_binary", "uniform", "?"])
    value = draw(layouts if key == "layout" else sizes | nested | st.lists(sizes, min_size=2, max_size=2))
    return draw(st.integers(0, 20)), key, value


@given(lie=signed_lies())
@settings(few, max_examples=40)
def test_a_signed_lie_about_a_layer(pristine, victim, lie):
    number, key, value = lie
    path = victim / "config.json"
    before = path.read_text(encoding="utf-8")
    config = json.loads(before)
    described = config["quantization_config"]["layers"]
    name = sorted(described)[number]
    true = copy.deepcopy(described[name])
    if key == "name":
        described[str(value)] = described.pop(name)
    elif key in ("layout", "sha256", "metadata"):
        described[name][key] = value
    else:
        described[name]["metadata"][key] = value
    config["quantization_config"]["sha256"] = config_sha256(config)
    path.write_text(json.dumps(config), encoding="utf-8")
    try:
        model = AutoModelForCausalLM.from_pretrained(victim)
        with torch.inference_mode():
            found = model(tiny.tokens()).logits
    except InputError:
        return
    finally:
        path.write_text(before, encoding="utf-8")
    # 33 and more columns a group than a row has, or true for 1: the layouts' own tests say what is equal.
    assert described.get(name) == true or torch.equal(found, pristine.packed_logits)
