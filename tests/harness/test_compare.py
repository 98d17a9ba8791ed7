import copy
import io
import itertools
import math
import random

import pytest
from rich.console import Console

from harness.cli import main
from harness.compare import compare_records, mcnemar, not_shared, paired_bootstrap, show_comparison
from harness.records import RecordStore
from kernels.errors import InputError


def exact(discordant, fewer):
    """The two-sided binomial p by counting every outcome of `discordant` fair coins."""
    outcomes = [sum(coins) for coins in itertools.product((0, 1), repeat=discordant)]
    return min(1.0, 2 * sum(count <= fewer for count in outcomes) / len(outcomes))


@pytest.mark.parametrize(("only_first", "only_second"), [(0, 0), (1, 0), (0, 5), (3, 3), (2, 9), (7, 4), (12, 1)])
def test_mcnemar_is_the_exact_binomial_test_on_the_discordant_examples(only_first, only_second):
    first = "1" * only_first + "0" * only_second + "1100" * 7
    second = "0" * only_first + "1" * only_second + "1100" * 7
    found = mcnemar(first, second)
    assert found == (
        only_first,
        only_second,
        pytest.approx(exact(only_first + only_second, min(only_first, only_second))),
    )


def test_mcnemar_of_thousands_of_examples_neither_overflows_nor_underflows():
    assert mcnemar("1" * 3000 + "0" * 3000, "0" * 3000 + "1" * 3000)[2] == 1.0
    assert 0 <= mcnemar("1" * 3000, "0" * 3000)[2] < 1e-300


def test_examples_that_differ_in_number_cannot_be_paired():
    with pytest.raises(InputError, match="3 and 2 examples cannot be paired"):
        mcnemar("101", "10")


def test_the_bootstrap_finds_a_shift_and_calls_noise_noise():
    draw = random.Random(0)
    noise = [draw.gauss(0, 1) for _ in range(100)]
    centred = [value - sum(noise) / 100 for value in noise]
    low, high, p = paired_bootstrap(centred)
    assert low < 0 < high
    assert p > 0.5
    # The mean of 100 has a standard error of 0.1: the interval is 1.96 of them to either side.
    assert high - low == pytest.approx(2 * 1.96 * 0.1, rel=0.15)
    low, high, p = paired_bootstrap([value + 0.5 for value in centred])
    assert 0 < low < 0.5 < high
    assert p < 0.001


def test_the_bootstrap_is_decided_by_its_seed():
    values = [0.1, -0.2, 0.4, 0.3]
    assert paired_bootstrap(values, 3) == paired_bootstrap(values, 3)
    assert paired_bootstrap(values, 3) != paired_bootstrap(values, 4)


def test_the_sign_of_the_difference_turns_with_the_order():
    low, high, p = paired_bootstrap([0.2, 0.1, 0.4, -0.05, 0.3])
    back_low, back_high, back_p = paired_bootstrap([-0.2, -0.1, -0.4, 0.05, -0.3])
    assert (back_low, back_high, back_p) == pytest.approx((-high, -low, p), abs=0.01)


@pytest.mark.parametrize("windows", [2, 3, 5, 6, 9])
def test_few_windows_show_no_more_than_differences_of_one_sign_can(windows):
    # All larger, and clearly: by chance alone that happens in 2 of 2^windows draws.
    p = paired_bootstrap([1.0 + 0.01 * place for place in range(windows)])[2]
    assert p == 2.0 ** (1 - windows)
    assert (p < 0.05) == (windows >= 6)


def test_one_window_is_not_enough():
    with pytest.raises(InputError, match="one window cannot be resampled"):
        paired_bootstrap([0.3])


def record(key, method, correct, nll):
    score = {"value": 100 * correct.count("1") / len(correct), "stderr": 1.0, "correct": correct}
    mean = sum(nll) / len(nll)
    return {
        "spec": {
            "model": {"name": "toy"}, "method": {"name": method, "options": {}},
            "evaluations": [{"metric": "zeroshot", "task": "piqa"}, {"metric": "perplexity", "corpus": "c"},
                            {"metric": "divergence", "corpus": "c"}],
        },
        "data": {"evaluations": [{"sha256": "a"}, *({"sha256": "b", "tokens_sha256": "t"} for _ in range(2))]},
        "environment": {}, "ledger": {"payload_bits": 3.5}, "key": key,
        "metrics": [
            {"metric": "zeroshot", "dataset": "piqa", "prompts_sha256": "p", "value": score["value"],
             "scores": {"acc": score, "acc_norm": score}},
            {"metric": "perplexity", "dataset": "c", "value": math.exp(mean), "window_nll": nll},
            {"metric": "divergence", "dataset": "c", "value": mean, "window_kl": nll},
        ],
    }  # fmt: skip


@pytest.fixture
def runs():
    return (
        record("k-one", "fp16", "1110110111" * 4, [3.0, 3.1, 2.9, 3.2] * 2),
        record("k-two", "rtn", "1010110101" * 4, [3.5, 3.4, 3.6, 3.7] * 2),
    )


def test_every_metric_of_two_runs_is_compared(runs):
    found = compare_records(*runs)
    assert [(one.metric, one.dataset) for one in found] == [
        ("acc", "piqa"), ("acc_norm", "piqa"), ("perplexity", "c"), ("KL", "c"),
    ]  # fmt: skip
    accuracy, perplexity = found[0], found[2]
    assert (accuracy.first, accuracy.second, accuracy.difference) == (80.0, 60.0, pytest.approx(-20.0))
    assert accuracy.p == pytest.approx(2 / 2**8)
    assert accuracy.low < -20 < accuracy.high < 0
    assert perplexity.difference == pytest.approx(0.5)
    assert perplexity.low > 0
    assert not any(one.is_noise for one in (accuracy, perplexity))


def test_a_run_does_not_differ_from_itself(runs):
    assert all(one.is_noise and one.difference == 0 for one in compare_records(runs[0], copy.deepcopy(runs[0])))


def test_records_from_before_tokens_were_noted_are_compared_too(runs):
    del runs[1]["data"]["evaluations"][1]["tokens_sha256"]
    assert len(compare_records(*runs)) == 4


@pytest.mark.parametrize(
    ("path", "value", "problem"),
    [
        (("data", "evaluations", 1, "sha256"), "x", "read different texts"),
        (("metrics", 0, "prompts_sha256"), "x", "different prompts of piqa"),
        (("metrics", 1, "window_nll"), [1.0, 2.0], "8 and 2 windows of as many that were asked for"),
        (("metrics", 1, "window_nll"), None, "the record has no window_nll, an earlier version wrote it"),
        (("data", "evaluations", 1, "tokens_sha256"), "x", "into different tokens, so their windows cannot be paired"),
    ],
)
def test_runs_that_are_not_alike_are_refused(runs, path, value, problem):
    place = runs[1]
    for part in path[:-1]:
        place = place[part]
    place[path[-1]] = value
    with pytest.raises(InputError, match=problem):
        compare_records(*runs)


def test_windows_that_one_run_alone_read_do_not_count(runs):
    shorter = copy.deepcopy(runs[1])
    shorter["spec"]["evaluations"][1]["windows"] = 6
    shorter["metrics"][1] = {"metric": "perplexity", "dataset": "c", "value": 0.0, "window_nll": [3.5, 3.4] * 3}
    found = compare_records(runs[0], shorter)[2]
    assert (found.pairs, found.second) == (6, pytest.approx(math.exp(3.45)))
    assert found.first == pytest.approx(math.exp((3.0 + 3.1 + 2.9 + 3.2 + 3.0 + 3.1) / 6))
    assert found.difference == pytest.approx(0.4)
    assert "the first 6 of 8" in found.detail


def test_what_one_run_alone_measured_is_left_out(runs):
    for name in ("spec", "data"):
        del runs[1][name]["evaluations"][0]
    del runs[1]["metrics"][0]
    assert [one.metric for one in compare_records(*runs)] == ["perplexity", "KL"]
    assert [one.metric for one in compare_records(runs[1], runs[0])] == ["perplexity", "KL"]
    assert not_shared(*runs) == ["zeroshot on piqa (first alone)"]


def test_runs_that_measured_nothing_alike_are_refused(runs):
    for entry in runs[1]["spec"]["evaluations"]:
        entry["split" if entry["metric"] != "zeroshot" else "limit"] = 3
    with pytest.raises(InputError, match=r"k-one and k-two measured different things.*: zeroshot on piqa, .*limit 3"):
        compare_records(*runs)
    assert not_shared(*runs)[:2] == ["zeroshot on piqa (first alone)", "perplexity on c (first alone)"]


def test_a_broken_model_has_a_finite_perplexity_here_too(runs):
    runs[1]["metrics"][1]["window_nll"] = [1000.0] * 8
    assert compare_records(*runs)[2].second == math.exp(700)


def test_the_command_shows_a_verdict_for_each_metric(runs, tmp_path):
    store = RecordStore(tmp_path / "runs")
    for run in runs:
        store.save(run["key"], run)
    text = io.StringIO()
    show_comparison("k-one", "k-two", tmp_path, console=Console(file=text))
    assert text.getvalue().count("differs") == 4
    assert "right in one only: 8 / 0" in text.getvalue()
    assert "first: fp16() on toy  (k-one)" in text.getvalue()
    assert main(["compare", "k-one", "k-two", "--out", str(tmp_path)]) == 0


def test_an_unknown_key_is_one_line_and_exit_code_2(runs, tmp_path, capsys):
    RecordStore(tmp_path / "runs").save("k-one", runs[0])
    assert main(["compare", "k-one", "k-onf", "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "no finished run 'k-onf'" in error
    assert "did you mean 'k-one'?" in error
    assert error.count("\n") == 1
