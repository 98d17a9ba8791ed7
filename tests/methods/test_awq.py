"""AWQ on small decoder blocks: folding keeps the function, searches find what brute force finds."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from harness.calibration import BlockStream
from harness.models.blocks import find_blocks
from harness.quantize import install, quantize_model
from harness.quantized_cache import load_quantized, save_quantized
from kernels.errors import InputError
from methods import LayerStatistics, create_method
from methods.awq.activations import Activations
from methods.awq.pairs import divide
from methods.grids import round_to_groups


def _llama(kv_heads: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
    )
    return _with_outlier_channels(LlamaForCausalLM(config))


def _opt() -> OPTForCausalLM:
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=97,
        hidden_size=64,
        ffn_dim=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        word_embed_proj_dim=64,
        max_position_embeddings=64,
    )
    return _with_outlier_channels(OPTForCausalLM(config))


def _with_outlier_channels(model: Any) -> Any:
    """A few channels of every norm made large: what AWQ is for."""
    model.eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "norm" in name and name.endswith("weight"):
            parameter[::16] *= 8
    return model


MODELS = {"gqa": lambda: _llama(2), "mha": lambda: _llama(4), "opt": _opt}


@pytest.fixture(params=sorted(MODELS))
def model(request: pytest.FixtureRequest) -> Any:
    return MODELS[request.param]()


@pytest.fixture
def windows() -> torch.Tensor:
    return torch.randint(0, 97, (3, 48), generator=torch.Generator().manual_seed(1))


def test_folding_scales_leaves_the_function_unchanged(model: Any, windows: torch.Tensor) -> None:
    before = model(windows).logits
    stream = BlockStream(model, find_blocks(model), windows)
    method = create_method("awq", bits=8, group_size=32, scale_dtype="float32")
    result = method.quantize_block(stream.view(0), _contexts(stream.view(0)))
    # quantize_block folds, and leaves packing to the caller: the model still computes the unquantized function.
    assert result.folded
    torch.testing.assert_close(model(windows).logits, before, rtol=1e-4, atol=1e-4)


def test_awq_beats_rounding_on_outlier_channels(model: Any, windows: torch.Tensor) -> None:
    reference = model(windows).logits
    errors = {}
    for method in ("awq", "rtn"):
        quantized = copy.deepcopy(model)
        quantize_model(quantized, create_method(method, bits=3, group_size=32), windows)
        errors[method] = float((quantized(windows).logits - reference).norm())
    assert errors["awq"] < errors["rtn"]


def test_value_projection_takes_scales_only_without_grouped_queries(windows: torch.Tensor) -> None:
    found = {}
    for kind in ("gqa", "mha"):
        logs = quantize_model(MODELS[kind](), create_method("awq", bits=4, group_size=32), windows).layers
        found[kind] = next(log for log in logs if log.name.endswith("0.self_attn.o_proj"))
    assert "ratio" not in found["gqa"].facts
    assert "ratio" in found["mha"].facts


def test_only_folded_parameters_change_besides_the_linears(model: Any, windows: torch.Tensor) -> None:
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    result = quantize_model(model, create_method("awq", bits=4, group_size=32), windows)
    linears = {f"{name}.weight" for name in result.packed}
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed - linears <= set(result.folded)
    assert set(result.folded) & linears == set()


def test_installed_result_gives_bit_equal_logits(
    model: Any, windows: torch.Tensor, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAGEBENCH_CACHE", str(tmp_path))
    untouched = copy.deepcopy(model)
    result = quantize_model(model, create_method("awq", bits=4, group_size=32), windows)
    save_quantized("key", result, {})
    loaded = load_quantized("key")
    assert loaded is not None
    install(untouched, loaded[0])
    assert torch.equal(untouched(windows).logits, model(windows).logits)


def test_blocks_see_the_outputs_of_unquantized_blocks(windows: torch.Tensor) -> None:
    model = _llama(2)
    hidden = model(windows, output_hidden_states=True).hidden_states
    seen: list[torch.Tensor] = []
    method = create_method("awq", bits=2, group_size=32)
    original = method.quantize_block

    def watch(view: Any, contexts: Any) -> Any:
        seen.append(view.hidden.clone())
        return original(view, contexts)

    method.quantize_block = watch  # type: ignore[method-assign]
    quantize_model(model, method, windows)
    torch.testing.assert_close(seen[1], hidden[1], rtol=1e-4, atol=1e-5)


def test_clipping_finds_the_range_that_a_direct_search_finds() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 32, generator=generator)
    weight[:, 3] *= 6
    inputs = torch.randn(1, 512, 32, generator=generator)
    packed = create_method("awq", bits=3, group_size=32, scale_dtype="float32").quantize_linear(
        weight, LayerStatistics.from_inputs(inputs)
    )
    for row in range(6):
        candidates = []
        for step in range(10):
            bound = weight[row].abs().max() * (1 - step / 20)
            clamped = weight[row : row + 1].clamp(-bound, bound)
            rounded = round_to_groups(
                clamped, 3, 32, symmetric=False, scale_dtype=torch.float32, include_zero=False
            ).decode()
            lost = (inputs[0] @ (rounded - weight[row]).T).double().square().mean()
            candidates.append((float(lost), rounded[0]))
        best = min(candidates, key=lambda candidate: candidate[0])[1]
        torch.testing.assert_close(packed.decode()[row], best)


def test_logged_proxy_loss_is_the_lost_share_of_the_layers_output(model: Any, windows: torch.Tensor) -> None:
    untouched = copy.deepcopy(model)
    logs = {log.name: log for log in quantize_model(model, create_method("awq", bits=3, group_size=32), windows).layers}
    view = BlockStream(untouched, find_blocks(untouched), windows).view(0)
    found = create_method("awq", bits=3, group_size=32).quantize_block(view, _contexts(view))
    inputs: dict[str, list[torch.Tensor]] = {name: [] for name in view.linears}
    for name, linear in view.linears.items():
        linear.register_forward_pre_hook(lambda _, args, name=name: inputs[name].append(args[0].double()))
    for sample in range(len(windows)):
        view.run(sample)  # the block is folded by now, and not yet rounded
    prefix = next(iter(logs)).removesuffix(next(iter(view.linears)))
    for name, packed in found.packed.items():
        target = found.targets[name].double()
        x = torch.cat([seen.reshape(-1, target.shape[1]) for seen in inputs[name]])
        lost = (x @ (packed.decode().double() - target).T).square().sum() / (x @ target.T).square().sum()
        assert logs[prefix + name].proxy_loss == pytest.approx(float(lost), rel=1e-3)


def test_search_tokens_limit_the_samples_that_are_looked_at(windows: torch.Tensor) -> None:
    model = _llama(2)
    view = BlockStream(model, find_blocks(model), windows).view(0)
    seen = {
        tokens: Activations(view, create_method("awq", search_tokens=tokens)._search_samples(view)).inputs(
            "mlp.up_proj"
        )
        for tokens in (48, 49, 0)
    }
    assert [len(inputs) for inputs in seen.values()] == [48, 96, 144]  # whole samples of 48 tokens, of three


def test_pair_that_a_block_does_not_compute_is_left_alone(windows: torch.Tensor) -> None:
    model = _llama(2)
    block = find_blocks(model).blocks[0]
    model.get_input_embeddings().weight.mul_(50)  # a residual stream of order 1, so that the MLP has a say
    # The MLP reads the residual stream instead of the norm's output: the pair norm -> gate, up is not what it seems.
    block.post_attention_layernorm.register_forward_hook(lambda _, args, out: args[0])
    before = {name: parameter.clone() for name, parameter in block.named_parameters()}
    view = BlockStream(model, find_blocks(model), windows).view(0)
    contexts = _contexts(view)
    result = create_method("awq", bits=8, group_size=32).quantize_block(view, contexts)
    assert contexts["mlp.gate_proj"].facts["ratio"] is None
    assert "post_attention_layernorm.weight" not in result.folded
    for name in ("post_attention_layernorm.weight", "mlp.gate_proj.weight"):
        assert torch.equal(dict(block.named_parameters())[name], before[name])


def test_norm_with_offset_gain_is_divided_exactly() -> None:
    class GemmaLikeRMSNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.tensor([0.0, 1.0, -0.5]))

    norm = GemmaLikeRMSNorm().requires_grad_(False)
    divide(norm, torch.tensor([2.0, 4.0, 0.5]), torch.float32)
    torch.testing.assert_close(1 + norm.weight, torch.tensor([0.5, 0.5, 1.0]))


def test_hessian_alone_is_refused() -> None:
    with pytest.raises(InputError, match="needs the layer's inputs"):
        create_method("awq", group_size=32).quantize_linear(
            torch.ones(4, 32), LayerStatistics.from_hessian(torch.eye(32))
        )


def _contexts(view: Any) -> dict[str, Any]:
    from methods import LayerContext

    return {name: LayerContext(name) for name in view.linears}
