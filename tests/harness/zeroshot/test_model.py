import weakref

import pytest
import tiny
import torch
from lm_eval.models.huggingface import HFLM

from harness.zeroshot import model as module
from harness.zeroshot.model import InMemoryModel, fitting_sequences


@pytest.mark.parametrize(("free", "tokens", "expected"), [(10**6, 100, 1), (10**9, 100, 6), (10**9, 50, 13)])
def test_the_batch_fits_into_a_part_of_the_free_memory(free, tokens, expected, monkeypatch):
    # A row of 100 tokens over 50,000 words in float32, three times: 60 MB of the 400 MB that may be used.
    monkeypatch.setattr(module, "available_memory", lambda device: free)
    assert fitting_sequences(tokens, 50_000, "cpu") == expected


def request(context, answer):
    return ("", ""), context, answer


def requests():
    """Five questions with contexts of two lengths, some with several answers, one of one token."""
    rows = tiny.tokens(12, 14).tolist()
    found = []
    for number, row in enumerate(rows[:5]):
        context = row[: 6 + number % 2]
        found += [request(context, rows[5 + answer][: 1 + (number + answer) % 7]) for answer in range(1 + number)]
    return found[::2] + found[1::2]


def likelihoods(model, asked):
    """Straight from the definition, one request at a time, in float64; too long ones lose tokens on the left."""
    found = []
    for _, context, answer in asked:
        ids = (context + answer)[-(model.config.max_position_embeddings + 1) :]
        logits = model(torch.tensor([ids[:-1]])).logits[0].double().log_softmax(dim=-1)[-len(answer) :]
        chosen = sum(float(row[token]) for row, token in zip(logits, answer, strict=True))
        found.append((chosen, logits.argmax(dim=-1).tolist() == answer))
    return found


def greedy(model, context, count):
    """The `count` tokens that the model finds most likely after `context`."""
    ids = list(context)
    for _ in range(count):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(context) :]


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_likelihoods_equal_the_definition_and_the_harness_s_own_loop(family):
    model, asked = tiny.build(family), requests()
    asked.append(request(asked[0][1], greedy(model, asked[0][1], 3)))
    found = InMemoryModel(model, tiny.tokenizer(), lambda done, total: None)._loglikelihood_tokens(asked)
    stock = HFLM(pretrained=model, tokenizer=tiny.tokenizer(), batch_size=2)._loglikelihood_tokens(asked, True)
    expected = likelihoods(model, asked)
    for other in (expected, stock):
        assert [score for score, _ in found] == pytest.approx([score for score, _ in other], rel=1e-5)
        assert [is_greedy for _, is_greedy in found] == [is_greedy for _, is_greedy in other]
    assert found[-1][1]
    assert not all(is_greedy for _, is_greedy in found)


def test_every_context_goes_through_the_model_once():
    model, passes = tiny.build(), []
    wrapped = InMemoryModel(model, tiny.tokenizer(), lambda done, total: None)
    model.register_forward_pre_hook(lambda _, given: passes.append(tuple(given[0].shape)))
    asked = requests()
    wrapped._loglikelihood_tokens(asked)
    distinct = {tuple(context) for _, context, _ in asked}
    contexts = passes[::2]
    assert sum(rows * length for rows, length in contexts) == sum(map(len, distinct))
    assert len(contexts) == len({len(context) for context in distinct})
    assert wrapped.largest_batch == 9


def test_progress_counts_every_answer():
    seen, asked = [], requests()
    wrapped = InMemoryModel(tiny.build(), tiny.tokenizer(), lambda *step: seen.append(step))
    wrapped._loglikelihood_tokens(asked)
    assert seen[-1] == (len(asked), len(asked))
    assert seen == sorted(set(seen))


@pytest.mark.parametrize("length", [127, 128, 129, 200])
def test_requests_around_and_beyond_the_model_s_context_are_scored_too(length):
    model, seen = tiny.build(), []
    one, other = tiny.tokens(2, length).tolist()
    asked = [*requests(), request(one[:-4], one[-4:]), request(other[:-2], other[-2:])]
    found = InMemoryModel(model, tiny.tokenizer(), lambda *step: seen.append(step))._loglikelihood_tokens(asked)
    assert [score for score, _ in found] == pytest.approx([score for score, _ in likelihoods(model, asked)], rel=1e-5)
    assert seen[-1] == (len(asked), len(asked))


def test_a_model_without_kept_keys_and_values_goes_through_the_harness_s_loop(monkeypatch):
    monkeypatch.setattr(module, "_keeps_keys_and_values", lambda model: False)
    model, seen = tiny.build(), []
    wrapped = InMemoryModel(model, tiny.tokenizer(), lambda *step: seen.append(step))
    found = wrapped._loglikelihood_tokens(requests())
    assert [score for score, _ in found] == pytest.approx([one for one, _ in likelihoods(model, requests())], rel=1e-5)
    assert seen[-1] == (15, 15)
    assert wrapped.largest_batch == 15


def test_a_batch_that_does_not_fit_after_all_is_halved(monkeypatch):
    model, sizes = tiny.build(), []
    wrapped = InMemoryModel(model, tiny.tokenizer(), lambda done, total: None)
    real = wrapped._share

    def small_memory(questions):
        sizes.append(len(questions))
        if len(questions) > 1:
            raise torch.OutOfMemoryError("too much")
        return real(questions)

    monkeypatch.setattr(wrapped, "_share", small_memory)
    found = wrapped._loglikelihood_tokens(requests())
    assert [score for score, _ in found] == pytest.approx([one for one, _ in likelihoods(model, requests())], rel=1e-5)
    # Contexts of 7 tokens first: two at once fail; from then on they go one by one.
    assert sizes == [2, 1, 1, 1, 1, 1]


def test_what_did_not_fit_is_let_go_before_the_halves_are_tried(monkeypatch):
    wrapped = InMemoryModel(tiny.build(), tiny.tokenizer(), lambda done, total: None)
    real, held = wrapped._share, []

    def small_memory(questions):
        assert not any(tensor() is not None for tensor in held)
        large = torch.zeros(1)
        held.append(weakref.ref(large))
        if len(questions) > 1:
            raise torch.OutOfMemoryError("too much")
        return real(questions)

    monkeypatch.setattr(wrapped, "_share", small_memory)
    assert len(wrapped._loglikelihood_tokens(requests())) == 15


def test_memory_that_holds_not_even_one_is_an_error(monkeypatch):
    wrapped = InMemoryModel(tiny.build(), tiny.tokenizer(), lambda done, total: None)

    def none(*arguments, **more):
        raise torch.OutOfMemoryError("too much")

    monkeypatch.setattr(wrapped, "_share", none)
    with pytest.raises(torch.OutOfMemoryError):
        wrapped._loglikelihood_tokens(requests())
