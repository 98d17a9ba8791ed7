import math

import pytest
import tiny
import torch
from torch import nn

from harness.metrics.perplexity import cut_windows, perplexity, window_loss
from kernels.errors import InputError, NumericalError


def reference_losses(model, windows):
    """Loss of each window in float64 straight from the definition: mean of -log p(target) over the shifted targets."""
    losses = []
    for window in windows:
        logits = model(window[None]).logits[0].double()
        chosen = logits[:-1].log_softmax(dim=-1)[torch.arange(len(window) - 1), window[1:]]
        losses.append(float(-chosen.mean()))
    return losses


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_perplexity_equals_the_plain_definition_in_float64(family):
    model = tiny.build(family)
    ids = tiny.tokens(1, 10 * 32 + 7).flatten()
    found = perplexity(model, ids, context=32)
    losses = reference_losses(model, ids[:320].view(10, 32))
    mean = sum(losses) / 10
    deviation = math.sqrt(sum((loss - mean) ** 2 for loss in losses) / 9)
    assert found.nll == pytest.approx(mean, rel=1e-6)
    assert found.value == pytest.approx(math.exp(mean), rel=1e-5)
    assert found.nll_stderr == pytest.approx(deviation / math.sqrt(10), rel=1e-3)
    assert found.window_nll == pytest.approx(losses, rel=1e-5)


def test_the_record_says_what_was_measured():
    record = perplexity(tiny.build(), tiny.tokens(1, 100).flatten(), context=24, bos=True).as_record()
    told = {key: record[key] for key in record.keys() - {"value", "nll", "nll_stderr", "window_nll"}}
    assert told == {
        "metric": "perplexity", "tokens": 4 * 23, "windows": 4, "windows_available": 4, "context": 24, "stride": 24,
        "dtype": "float32", "bos": True,
    }  # fmt: skip


def test_logits_of_lower_precision_are_named_and_scored_in_float32():
    model, ids = tiny.build().bfloat16(), tiny.tokens(1, 96).flatten()
    found = perplexity(model, ids, context=32)
    assert found.dtype == "bfloat16"
    assert found.nll == pytest.approx(sum(reference_losses(model, ids.view(3, 32))) / 3, rel=1e-5)


def test_the_last_partial_window_is_dropped():
    ids = torch.arange(70)
    assert torch.equal(cut_windows(ids, 32), ids[:64].view(2, 32))
    model, ids = tiny.build(), tiny.tokens(1, 95).flatten()
    changed = ids.clone()
    changed[64:] = 5
    assert perplexity(model, ids, context=32) == perplexity(model, changed, context=32)
    assert perplexity(model, ids, context=32).windows == 2


def test_a_limit_takes_the_first_windows_and_is_visible():
    model, ids = tiny.build(), tiny.tokens(1, 320).flatten()
    found = perplexity(model, ids, context=32, limit=3)
    assert (found.windows, found.windows_available) == (3, 10)
    assert found.nll == perplexity(model, ids[:96], context=32).nll
    assert perplexity(model, ids, context=32, limit=99).windows == 10


def test_nothing_is_carried_from_window_to_window():
    model, ids = tiny.build(), tiny.tokens(1, 96).flatten()
    swapped = torch.cat([ids[32:64], ids[:32], ids[64:]])
    assert perplexity(model, ids, context=32).nll == pytest.approx(perplexity(model, swapped, context=32).nll, rel=1e-6)


@pytest.mark.parametrize("count", [0, 1, 31])
def test_a_text_shorter_than_one_window_is_refused(count):
    with pytest.raises(InputError, match=f"the text has {count} tokens, less than one window of 32"):
        cut_windows(torch.zeros(count, dtype=torch.int64), 32)


def test_one_window_has_no_standard_error():
    assert perplexity(tiny.build(), tiny.tokens(1, 32).flatten(), context=32).nll_stderr is None


@pytest.mark.parametrize("count", [2, 255, 256, 257, 258, 600])
def test_the_loss_is_the_same_however_the_rows_are_cut(count):
    torch.manual_seed(0)
    logits, window = torch.randn(count, 11), torch.randint(0, 11, (count,))
    expected = nn.functional.cross_entropy(logits[:-1].double(), window[1:])
    assert window_loss(logits, window) == pytest.approx(float(expected), rel=1e-6)


def test_logits_that_overflow_are_not_reported_as_a_number():
    model = tiny.build()
    model.lm_head.weight[3] = float("nan")
    with pytest.raises(NumericalError, match="not finite"):
        perplexity(model, tiny.tokens(1, 32).flatten(), context=32)


def test_progress_counts_windows():
    seen = []
    ids = tiny.tokens(1, 96).flatten()
    perplexity(tiny.build(), ids, context=32, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]
