import math
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from torch import nn

from harness.cache import cache_folder
from harness.metrics.divergence import compare_logits, divergence
from harness.metrics.perplexity import cut_windows
from harness.reference import build_reference
from kernels.errors import InputError


def noisy(model, seed=1, size=0.02):
    """`model` with noise on its linear layers, as quantization leaves it."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "proj" in name:
                parameter.add_(size * torch.randn_like(parameter))
    return model


@torch.no_grad()
def by_definition(reference, model, windows):
    """KL of every token and the targets' probabilities, one token at a time, in float64 with numpy."""
    kl, same, apart = [], [], []
    for window in windows:
        known, found = (np.asarray(one(window[None]).logits[0].double()) for one in (reference, model))
        for place in range(len(window) - 1):
            p, q = (np.exp(row - row.max()) / np.exp(row - row.max()).sum() for row in (known[place], found[place]))
            kl.append(float(sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True))))
            same.append(known[place].argmax() == found[place].argmax())
            apart.append(q[window[place + 1]] - p[window[place + 1]])
    return np.array(kl), np.array(same), np.array(apart)


@pytest.mark.parametrize("family", ["llama", "opt", "gemma2"])
def test_divergence_equals_the_plain_definition_in_float64(family):
    ids = tiny.tokens(1, 5 * 32 + 3).flatten()
    windows = cut_windows(ids, 32)
    reference, model = tiny.build(family), noisy(tiny.build(family))
    found = divergence(model, ids, build_reference("k", reference, windows), context=32)
    kl, same, apart = by_definition(reference, model, windows)
    assert found.value == pytest.approx(kl.mean(), abs=1e-6)
    assert found.kl_median == pytest.approx(np.median(kl), abs=1e-6)
    assert found.kl_p99 == pytest.approx(np.percentile(kl, 99), abs=1e-6)
    assert found.same_top == same.mean()
    assert found.rms_target == pytest.approx(math.sqrt((apart**2).mean()), abs=1e-6)
    by_window = kl.reshape(5, 31).mean(axis=1)
    assert found.window_kl == pytest.approx(list(by_window), abs=1e-6)
    assert found.stderr == pytest.approx(by_window.std(ddof=1) / math.sqrt(5), abs=1e-6)
    assert found.value > 1e-4
    assert 0 < found.same_top < 1


def test_a_model_is_at_zero_from_itself_in_the_same_dtype():
    ids = tiny.tokens(1, 96).flatten()
    model = tiny.build()
    found = divergence(model, ids, build_reference("k", model, cut_windows(ids, 32)), context=32)
    assert (found.value, found.kl_p99, found.same_top, found.rms_target) == (0.0, 0.0, 1.0, 0.0)


def test_bfloat16_against_float32_is_a_small_floor_above_zero():
    ids = tiny.tokens(1, 96).flatten()
    reference = build_reference("k", tiny.build(), cut_windows(ids, 32))
    floor = divergence(tiny.build().bfloat16(), ids, reference, context=32)
    quantized = divergence(noisy(tiny.build(), size=0.1), ids, reference, context=32)
    assert (floor.dtype, floor.reference_dtype) == ("bfloat16", "float32")
    assert 0 < floor.value < quantized.value / 10


@pytest.mark.parametrize("count", [2, 127, 128, 129, 130, 300])
def test_the_comparison_is_the_same_however_the_rows_are_cut(count):
    torch.manual_seed(0)
    known, found = torch.randn(2, count, 17)
    window = torch.randint(0, 17, (count,))
    compared = compare_logits(known, found, window)
    p, q = (rows[:-1].double().softmax(dim=-1) for rows in (known, found))
    assert compared.kl.tolist() == pytest.approx((p * (p / q).log()).sum(dim=-1).tolist(), rel=1e-9)
    of_target = (q - p)[torch.arange(count - 1), window[1:]]
    assert compared.squares == pytest.approx(float(of_target.square().sum()), rel=1e-9)
    assert compared.same_top == int((p.argmax(dim=-1) == q.argmax(dim=-1)).sum())


def test_kl_is_from_the_reference_to_the_model_and_not_back():
    known = torch.tensor([[0.0, 0.0], [0.0, 0.0]])
    found = torch.tensor([[0.0, 5.0], [0.0, 0.0]])
    window = torch.tensor([0, 1])
    forth, back = (float(compare_logits(*pair, window).kl[0]) for pair in ((known, found), (found, known)))
    assert forth == pytest.approx(math.log(1 + math.exp(5)) - 2.5 - math.log(2))
    assert back < forth / 2


def test_a_limit_takes_the_first_windows_and_is_visible():
    ids = tiny.tokens(1, 320).flatten()
    reference = build_reference("k", tiny.build(), cut_windows(ids, 32, 3))
    found = divergence(noisy(tiny.build()), ids, reference, context=32, limit=3)
    assert (found.windows, found.windows_available, found.tokens, len(found.window_kl)) == (3, 10, 93, 3)


def test_the_error_of_a_single_window_is_not_known():
    ids = tiny.tokens(1, 64).flatten()
    model = noisy(tiny.build())
    found = [
        divergence(
            model, ids, build_reference(f"k{limit}", tiny.build(), cut_windows(ids, 32, limit)), context=32, limit=limit
        )
        for limit in (1, 2)
    ]
    assert found[0].stderr is None
    assert found[1].stderr > 0


def test_a_reference_of_other_windows_is_refused():
    ids = tiny.tokens(1, 96).flatten()
    reference = build_reference("k", tiny.build(), cut_windows(ids, 32, 2))
    with pytest.raises(InputError, match="the reference has 2 windows, the text 3"):
        divergence(tiny.build(), ids, reference, context=32)


def test_logits_that_overflow_are_not_reported_as_a_number():
    ids = tiny.tokens(1, 32).flatten()
    model = tiny.build()
    reference = build_reference("k", model, cut_windows(ids, 32))
    model.lm_head.weight[3] = float("nan")
    with pytest.raises(InputError, match="not finite"):
        divergence(model, ids, reference, context=32)


class Large(nn.Module):
    """An embedding and a head of 150,000 words. At each pass it counts the logits that are still there."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.embedding, self.head = nn.Embedding(150_000, 4), nn.Linear(4, 150_000, bias=False)
        self.config, self.given, self.most_alive = SimpleNamespace(), [], 0

    def get_output_embeddings(self):
        return self.head

    def forward(self, ids, use_cache=False):
        self.most_alive = max(self.most_alive, sum(one() is not None for one in self.given))
        logits = self.head(self.embedding(ids))
        self.given.append(weakref.ref(logits.untyped_storage()))
        return SimpleNamespace(logits=logits)


def test_148_windows_over_150_000_words_pass_one_at_a_time():
    ids = torch.randint(0, 150_000, (148 * 2,), generator=torch.Generator().manual_seed(0))
    unquantized, model = (Large(seed).eval().requires_grad_(False) for seed in (0, 1))
    reference = build_reference("k", unquantized, cut_windows(ids, 2))
    found = divergence(model, ids, reference, context=2)
    assert (found.windows, unquantized.most_alive, model.most_alive) == (148, 0, 0)
    # Head inputs and the head, where whole logits of 148 windows are 178 MB.
    assert sum(file.stat().st_size for file in (cache_folder("reference") / "k").iterdir()) < 3_000_000
    p, q = (one(ids[:1][None]).logits[0, 0].double().softmax(dim=-1) for one in (unquantized, model))
    assert found.window_kl[0] == pytest.approx(float((p * (p / q).log()).sum()), abs=1e-6)


def test_progress_counts_windows():
    seen, ids = [], tiny.tokens(1, 96).flatten()
    reference = build_reference("k", tiny.build(), cut_windows(ids, 32))
    divergence(tiny.build(), ids, reference, context=32, progress=lambda *step: seen.append(step))
    assert seen == [(1, 3), (2, 3), (3, 3)]
