"""Suggestions for misspelled names."""

import pytest

from kernels.errors import InputError, NumericalError, did_you_mean

KNOWN = ["gptq", "rtn", "sage-ptq", "pb-llm"]


def test_bad_input_and_failed_computations_are_told_apart():
    assert issubclass(InputError, ValueError)
    assert not issubclass(NumericalError, InputError)
    assert not issubclass(InputError, NumericalError)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("gtpq", "gptq"),
        ("gptqq", "gptq"),
        ("SAGE_PTQ", "sage-ptq"),
        ("sage_ptq", "sage-ptq"),
        ("RTN", "rtn"),
        ("pbllm", "pb-llm"),
    ],
)
def test_a_misspelling_is_answered_with_the_known_name(typed, meant):
    tail = did_you_mean(typed, KNOWN)
    assert tail.startswith("; did you mean ")
    assert tail.endswith("?")
    assert repr(meant) in tail


def test_the_closest_name_comes_first():
    assert did_you_mean("group_sise", ["group_size", "group_count", "seed"]).startswith("; did you mean 'group_size'")


def test_suggestions_keep_the_spelling_that_works():
    assert did_you_mean("llama_2", ["LLaMA-2"]) == "; did you mean 'LLaMA-2'?"


def test_a_name_like_no_other_is_answered_with_all_of_them_in_order():
    assert did_you_mean("xyz", KNOWN) == "; known: gptq, pb-llm, rtn, sage-ptq"


def test_nothing_known_is_said_plainly():
    assert did_you_mean("gptq", []) == "; none is known"
