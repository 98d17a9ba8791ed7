import math

import documents
import pytest
import tiny
import torch

from harness.metrics.zeroshot import zeroshot
from harness.zeroshot.tasks import task_data
from kernels.errors import InputError


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.setenv(
        "SAGEBENCH_DATA", str(documents.write(tmp_path / "data", "piqa", "winogrande", "arc_easy", count=20))
    )


def by_hand(model, documents_of_arc):
    """acc and acc_norm of ARC documents by definition: the most likely answer, over its tokens and per byte."""
    tokenizer, right = tiny.tokenizer(), {"acc": "", "acc_norm": ""}
    for document in documents_of_arc:
        context = tokenizer(f"Question: {document['question']}\nAnswer:").input_ids
        total, per_byte = [], []
        for answer in document["choices"]["text"]:
            ids = tokenizer(answer).input_ids
            logits = model(torch.tensor([context + ids])).logits[0].double().log_softmax(dim=-1)
            score = sum(float(logits[len(context) - 1 + place, token]) for place, token in enumerate(ids))
            total.append(score)
            per_byte.append(score / len(answer))
        gold = "ABCD".index(document["answerKey"])
        right["acc"] += str(int(total.index(max(total)) == gold))
        right["acc_norm"] += str(int(per_byte.index(max(per_byte)) == gold))
    return right


def test_accuracies_equal_the_definition_example_by_example(data):
    model = tiny.build()
    found = zeroshot(model, tiny.tokenizer(), task_data("arc_easy", "local"))
    expected = by_hand(model, documents.documents("arc_easy", 20))
    assert {name: score.correct for name, score in found.scores.items()} == expected
    assert expected["acc"] != expected["acc_norm"]
    for name, score in found.scores.items():
        share = expected[name].count("1") / 20
        assert score.value == pytest.approx(100 * share)
        assert score.stderr == pytest.approx(100 * math.sqrt(share * (1 - share) / 19))


def test_the_record_says_what_was_asked(data):
    record = zeroshot(tiny.build(), tiny.tokenizer(), task_data("piqa", "local"), limit=7).as_record()
    assert (record["metric"], record["dataset"], record["task_version"], record["fewshot"]) == (
        "zeroshot",
        "piqa",
        "1.0",
        0,
    )
    assert (record["examples"], record["examples_available"]) == (7, 20)
    assert record["value"] == record["scores"]["acc"]["value"]
    assert len(record["scores"]["acc_norm"]["correct"]) == 7
    assert record["lm_eval"].startswith("0.4")
    assert len(record["prompts_sha256"]) == 64


def test_a_task_without_acc_norm_has_none(data):
    assert set(zeroshot(tiny.build(), tiny.tokenizer(), task_data("winogrande", "local")).scores) == {"acc"}


def test_a_limit_takes_the_first_documents_and_one_beyond_the_last_takes_all(data):
    model = tiny.build()
    every, first, beyond = (
        zeroshot(model, tiny.tokenizer(), task_data("piqa", "local"), limit=limit) for limit in (None, 5, 99)
    )
    assert every.scores["acc"].correct[:5] == first.scores["acc"].correct
    assert beyond == every
    assert first.prompts_sha256 != every.prompts_sha256


def test_prompts_do_not_depend_on_the_model_but_likelihoods_do(data):
    one, other = (zeroshot(tiny.build(seed=seed), tiny.tokenizer(), task_data("piqa", "local")) for seed in (0, 1))
    assert one.prompts_sha256 == other.prompts_sha256
    assert one.loglikelihood != other.loglikelihood


def test_progress_reaches_the_end_and_nothing_is_printed(data, capfd):
    seen = []
    zeroshot(
        tiny.build(), tiny.tokenizer(), task_data("piqa", "local"), progress=lambda *step: seen.append(step)
    )  # fmt: skip
    assert seen[-1] == (40, 40)
    assert capfd.readouterr() == ("", "")


def test_likelihoods_that_overflow_are_not_reported_as_accuracy(data):
    model = tiny.build()
    model.lm_head.weight[3] = float("nan")
    with pytest.raises(InputError, match="not finite"):
        zeroshot(model, tiny.tokenizer(), task_data("piqa", "local"))
