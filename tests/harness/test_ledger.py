import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from harness.ledger import build_ledger, bytes_by_role, count_weights, other_bytes
from harness.models.blocks import model_linears
from harness.quantize import quantize_model
from kernels.layouts import UniformWeight, save_packed
from methods import create_method

OPTIONS = {
    "fp16": {}, "rtn": {"group_size": 32, "bits": 3}, "gptq": {"group_size": 32, "bits": 3},
    "sage-ptq": {"group_count": 2}, "billm": {"block_size": 32}, "pb-llm": {},
}  # fmt: skip


@pytest.fixture(params=OPTIONS, scope="module")
def case(request, tmp_path_factory):
    """A model quantized by each method, its ledger, and the file of its packed weights."""
    model = tiny.build()
    quantized = quantize_model(model, create_method(request.param, **OPTIONS[request.param]), tiny.tokens())
    path = tmp_path_factory.mktemp(request.param) / "packed.safetensors"
    save_packed(path, quantized.packed)
    return model, quantized, build_ledger(model, quantized, path.stat().st_size), path


def test_payload_equals_the_byte_sum_of_the_saved_tensors(case):
    _, _, ledger, path = case
    stored = load_file(path)
    assert ledger["payload_bytes"] == sum(t.numel() * t.element_size() for t in stored.values())
    assert ledger["payload_bits"] == 8 * ledger["payload_bytes"] / ledger["weights"]
    assert ledger["packed_file_bytes"] == path.stat().st_size > ledger["payload_bytes"]


def test_roles_sum_to_the_payload(case):
    _, quantized, ledger, _ = case
    assert sum(ledger["bytes_by_role"].values()) == ledger["payload_bytes"]
    by_hand = {}
    for weight in quantized.packed.values():
        for name, tensor in weight.tensors().items():
            role = weight.role(name)
            by_hand[role] = by_hand.get(role, 0) + tensor.numel() * tensor.element_size()
    assert bytes_by_role(quantized.packed) == by_hand


def test_total_is_payload_and_the_rest_in_16_bits(case):
    model, _, ledger, path = case
    linear = sum(linear.weight.numel() for linear in model_linears(model).values())
    everything = sum(parameter.numel() for parameter in model.parameters())
    assert ledger["weights"] == linear
    assert ledger["other_bytes"] == 2 * (everything - linear)
    assert ledger["total_bytes"] == ledger["payload_bytes"] + ledger["other_bytes"]
    assert ledger["artifact_bytes"] == path.stat().st_size + ledger["other_bytes"]
    assert ledger["artifact_bits"] == pytest.approx(8 * ledger["artifact_bytes"] / everything)
    assert ledger["resident_bytes"]["packed"] == ledger["total_bytes"]
    assert ledger["resident_bytes"]["evaluated_dense"] == 4 * everything


def test_unquantized_weights_are_16_bits_each():
    model = tiny.build()
    quantized = quantize_model(model, create_method("fp16"), None)
    ledger = build_ledger(model, quantized, 0)
    assert (ledger["payload_bits"], ledger["nominal_scale_bits"]) == (16.0, 0.0)
    assert ledger["nominal_weight_bits"] == pytest.approx(16.0)


def test_nominal_bits_are_weighted_by_the_size_of_the_layers():
    model = tiny.build()
    quantized = quantize_model(model, create_method("rtn", bits=3, group_size=-1), None)
    ledger = build_ledger(model, quantized, 0)
    shapes = [tuple(linear.weight.shape) for linear in model_linears(model).values()]
    expected = sum(m * n * 32 / n for m, n in shapes) / sum(m * n for m, n in shapes)
    assert ledger["nominal_scale_bits"] == pytest.approx(expected)
    assert len({n for _, n in shapes}) > 1  # else every average would do


def untie(model):
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
    return model


def test_tied_embeddings_count_once_and_a_head_of_its_own_apart():
    parts = {family: other_bytes(tiny.build(family)) for family in ("opt", "llama")}
    table = 2 * tiny.VOCABULARY * tiny.HIDDEN
    opt = tiny.build("opt")
    assert opt.lm_head.weight is opt.get_input_embeddings().weight
    assert (parts["opt"]["embeddings"], parts["opt"]["head"]) == (table, 0)
    assert (parts["llama"]["embeddings"], parts["llama"]["head"]) == (table, table)
    untied = other_bytes(untie(opt))
    assert untied["head"] == table
    assert untied["embeddings"] == parts["opt"]["embeddings"]


def test_norms_and_biases_are_the_rest():
    model = tiny.build("qwen2")
    rest = sum(p.numel() for p in model.parameters() if p.dim() == 1)
    assert other_bytes(model)["norms_and_biases"] == 2 * rest


@given(
    shapes=st.lists(st.tuples(st.integers(1, 12), st.integers(1, 40)), min_size=1, max_size=4),
    bits=st.integers(1, 8),
    data=st.data(),
)
@settings(max_examples=60)
def test_any_model_s_bytes_are_those_of_its_tensors_and_roles_add_up(shapes, bits, data):
    packed = {}
    for number, (rows, columns) in enumerate(shapes):
        group_size = data.draw(st.integers(1, columns))
        groups = -(-columns // group_size)
        packed[f"layer{number}"] = UniformWeight.pack(
            torch.full((rows, columns), 2**bits - 1, dtype=torch.uint8),
            torch.ones(rows, groups, dtype=torch.float16),
            torch.zeros(rows, groups, dtype=torch.uint8),
            bits=bits,
            group_size=group_size,
        )
    by_role = bytes_by_role(packed)
    stored = sum(t.numel() * t.element_size() for weight in packed.values() for t in weight.tensors().values())
    assert sum(by_role.values()) == stored == sum(weight.nbytes() for weight in packed.values())
    assert count_weights(packed) == sum(rows * columns for rows, columns in shapes)
    # Nothing is stored for less than its information needs, and codes waste less than a byte a layer.
    wasted = 8 * by_role["code"] - bits * count_weights(packed)
    assert 0 <= wasted < 8 * len(shapes)
    assert by_role["scale"] == sum(2 * weight.scales().numel() for weight in packed.values())
