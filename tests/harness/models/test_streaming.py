import json

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from harness.models import load
from harness.models.blocks import find_blocks
from harness.models.load import load_model
from harness.models.streaming import StreamedBlocks
from harness.quantize import QuantizedModel, install, quantize_model
from kernels.errors import InputError
from methods import create_method

OPTIONS = {"rtn": {"bits": 3, "group_size": 32}, "gptq": {"bits": 3, "group_size": 32}, "awq": {"group_size": 32}}


@pytest.fixture
def little_memory(monkeypatch):
    monkeypatch.setattr(load, "available_memory", lambda device: 1000)


@pytest.fixture
def both(tmp_path, monkeypatch):
    """The model of a family: whole, and streamed."""

    def make(family="llama", dtype="float32"):
        folder = str(tiny.save(tmp_path / family, family))
        whole = load_model(folder, dtype)
        with monkeypatch.context() as patch:
            patch.setattr(load, "available_memory", lambda device: 1000)
            return whole, load_model(folder, dtype)

    return make


def stored_blocks(loaded):
    """Whether each block's parameters have storage."""
    return [not any(p.is_meta for p in block.parameters()) for block in find_blocks(loaded.model).blocks]


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_streamed_model_computes_the_same_bits_with_one_block_in_memory(both, family):
    whole, streamed = both(family)
    assert isinstance(streamed.placement, StreamedBlocks)
    assert stored_blocks(streamed) == [False] * tiny.LAYERS
    ids = tiny.tokens()
    assert torch.equal(streamed.model(ids).logits, whole.model(ids).logits)
    assert stored_blocks(streamed) == [False] * (tiny.LAYERS - 1) + [True]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_dtypes_are_those_of_a_loaded_model(both, dtype):
    whole, streamed = both(dtype=dtype)
    streamed.model(tiny.tokens())
    for block, other in zip(find_blocks(streamed.model).blocks, find_blocks(whole.model).blocks, strict=True):
        streamed.placement.bring(block)
        for (name, mine), theirs in zip(block.named_parameters(), other.parameters(), strict=True):
            assert mine.dtype == theirs.dtype
            assert torch.equal(mine, theirs), name


@pytest.mark.parametrize("method", OPTIONS)
def test_quantization_of_a_streamed_model_gives_the_same_bits(both, method):
    whole, streamed = both()
    found = [
        quantize_model(
            loaded.model, create_method(method, **OPTIONS[method]), tiny.tokens(8), placement=loaded.placement
        )
        for loaded in (whole, streamed)
    ]
    for name, packed in found[0].packed.items():
        assert torch.equal(packed.decode(), found[1].packed[name].decode()), name
    ids = tiny.tokens(seed=9)
    assert torch.equal(streamed.model(ids).logits, whole.model(ids).logits)
    assert stored_blocks(streamed).count(True) == 1


def test_weights_from_the_cache_are_installed_into_a_streamed_model(both):
    whole, streamed = both()
    quantized = quantize_model(whole.model, create_method("awq", group_size=32), tiny.tokens(8))
    install(streamed.model, quantized, streamed.placement)
    assert torch.equal(streamed.model(tiny.tokens()).logits, whole.model(tiny.tokens()).logits)
    with pytest.raises(InputError, match="folded parameter model"):
        install(
            streamed.model, QuantizedModel(quantized.packed, [], {"model.nom.weight": torch.ones(3)}), whole.placement
        )


def test_tied_embeddings_stay_tied(tmp_path, little_memory):
    folder = tmp_path / "tied"
    configuration = tiny.config("llama")
    configuration.tie_word_embeddings = True
    model = type(tiny.build())(configuration)
    tiny.save(folder, model=model)
    streamed = load_model(str(folder))
    assert streamed.model.lm_head.weight is streamed.model.model.embed_tokens.weight
    assert not streamed.model.lm_head.weight.is_meta


def test_the_names_of_older_releases_are_understood(model_folder, little_memory):
    file = model_folder / "model.safetensors"
    tensors = {name.removeprefix("model."): tensor for name, tensor in load_file(file).items()}
    save_file(tensors, file, {"format": "pt"})
    assert torch.isfinite(load_model(str(model_folder)).model(tiny.tokens()).logits).all()


def test_a_tensor_that_is_not_there_is_named(model_folder, little_memory):
    file = model_folder / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.2.mlp.up_proj.weight"]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(InputError, match=r"tensor model\.layers\.2\.mlp\.up_proj\.weight is in no file"):
        load_model(str(model_folder))


def test_what_a_record_says_is_the_same_but_for_the_placement(both):
    whole, streamed = both()
    said = [loaded.as_record() for loaded in (whole, streamed)]
    assert [record.pop("placement") for record in said] == ["whole", "streamed from disk"]
    assert json.dumps(said[0]) == json.dumps(said[1])


def test_reparameterize_needs_the_whole_model(model_folder, little_memory):
    with pytest.raises(InputError, match="--reparameterize needs all of model"):
        load_model(str(model_folder), reparameterized=True)
