import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import tiny

from harness.models.blocks import model_linears
from harness.runtime.architecture import of_config
from harness.runtime.build import model_weights
from harness.runtime.decoder import Decoder
from harness.runtime.measure import dense_products
from harness.runtime.stepper import Stepper
from kernels.errors import InputError
from methods import create_method

FAMILIES = ("llama", "qwen2", "opt")


def packed_model(model, method):
    quantizer = create_method(method, **({} if method == "sage-ptq" else {"bits": 4, "group_size": 32}))
    packed = {name: quantizer.quantize_linear(linear.weight) for name, linear in model_linears(model).items()}
    for name, linear in model_linears(model).items():
        linear.weight.copy_(packed[name].decode())
    return packed


def generated(weights, prompt, steps=6):
    decoder = Decoder(weights, prompt.shape[0], prompt.shape[1] + steps)
    logits = [decoder.prefill(prompt)]
    for _ in range(steps):
        logits.append(decoder.step(logits[-1].argmax(-1, keepdim=True)))
    return torch.stack(logits, dim=1)


@pytest.mark.parametrize("family", FAMILIES)
def test_steps_give_the_logits_of_the_whole_sequence(family):
    model = tiny.build(family)
    prompt = tiny.tokens(samples=2, context=7)
    logits = generated(model_weights(model, None, torch.float32), prompt)
    tokens = torch.cat([prompt, logits[:, :-1].argmax(-1)], dim=1)
    with torch.inference_mode():
        expected = model(tokens).logits[:, 6:]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_step_that_can_be_captured_gives_the_same_logits(family):
    weights = model_weights(tiny.build(family), None, torch.float32)
    prompt = tiny.tokens(samples=2, context=7)
    expected = Decoder(weights, 2, 12)
    captured = Decoder(weights, 2, 16)
    captured._on_cpu = False
    for decoder in (expected, captured):
        decoder.prefill(prompt)
    for token in prompt.T[:4]:
        torch.testing.assert_close(captured.step(token[:, None]), expected.step(token[:, None]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["rtn", "sage-ptq"])
def test_packed_products_give_the_logits_of_the_decoded_weights(method):
    model = tiny.build("llama")
    packed = packed_model(model, method)
    prompt = tiny.tokens(samples=1, context=5)
    found = generated(model_weights(model, packed, torch.float32), prompt)
    expected = generated(model_weights(model, None, torch.float32), prompt)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_the_dense_runtime_decodes_the_packed_weights():
    model = tiny.build("llama")
    packed = packed_model(model, "rtn")
    make = dense_products(torch.device("cpu"), torch.float32)
    prompt = tiny.tokens(samples=1, context=5)
    found = generated(model_weights(model, packed, torch.float32, make), prompt)
    assert torch.equal(found, generated(model_weights(model, None, torch.float32), prompt))


def test_a_round_begins_with_an_empty_cache():
    weights = model_weights(tiny.build("llama"), None, torch.float32)
    prompt = tiny.tokens(samples=1, context=9)
    stepper = Stepper(Decoder(weights, 1, 16), prompt, steps=5)
    first, second = stepper.run(), stepper.run()
    assert torch.equal(first.tokens, second.tokens)
    assert first.tokens.shape == (1, 6) and len(first.steps) == 5


def test_warming_up_stays_inside_the_cache():
    weights = model_weights(tiny.build("llama"), None, torch.float32)
    prompt = tiny.tokens(samples=1, context=9)
    stepper = Stepper(Decoder(weights, 1, 10), prompt, steps=1)  # room for one step
    stepper.decoder.prefill(prompt)
    stepper._warm_up()
    assert stepper.decoder.cache.filled == int(stepper.decoder.cache.position) == 9
    assert stepper.run().tokens.shape == (1, 2)


def test_bytes_of_a_step_are_those_of_weights_head_and_filled_cache():
    weights = model_weights(tiny.build("llama"), None, torch.float32)
    decoder = Decoder(weights, batch=2, length=20)
    a = weights.architecture
    linear = 4 * a.linear_weights
    head = 4 * a.vocabulary * a.hidden
    assert decoder.cache.nbytes == a.cache_bytes(2, 20, 4) == 2 * 3 * 2 * 2 * 20 * 16 * 4
    assert decoder.bytes_per_step(5) == linear + head + decoder.cache.nbytes // 4


def test_other_blocks_are_refused_by_name():
    with pytest.raises(InputError, match="decoding of model type 'gpt_neox' is not there; known: llama"):
        of_config(tiny.config("neox"))
