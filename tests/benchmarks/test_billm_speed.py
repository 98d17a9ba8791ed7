"""BiLLM's searches against the slow reference, and PB-LLM against GPTQ, over all matrices of a block of SmolLM2.

Each pair runs in turns. The bars are on the time of the whole block; each shape is printed and saved beside it.
"""

import sys
from pathlib import Path

import pytest
import smollm2_block
from turns import Turns

from methods import create_method

sys.path.insert(0, str(Path(__file__).parent.parent / "methods"))
import billm_reference as reference


@pytest.fixture(scope="module")
def block():
    return smollm2_block.first_block()


def block_ratio(benchmark, block, functions, rounds):
    """How many times as long as the first of two functions of a matrix the second takes for the whole block.

    functions: by what they are called.
    """
    turns = {
        matrix.name: Turns({name: lambda run=run, of=matrix: run(of) for name, run in functions.items()})
        for matrix in block
    }

    def every_matrix():
        for matrix in turns.values():
            matrix.once()

    benchmark.pedantic(every_matrix, rounds=rounds)
    shapes = {kind: dict.fromkeys(functions, 0.0) for kind in (*(matrix.kind for matrix in block), "block")}
    for matrix in block:
        for name, taken in turns[matrix.name].fastest().items():
            shapes[matrix.kind][name] += taken
            shapes["block"][name] += taken
    print()
    for kind, seconds in shapes.items():
        first, second = seconds.values()
        listed = ", ".join(f"{name} {taken:.3f} s" for name, taken in seconds.items())
        print(f"{kind:11} {listed}, ratio {second / first:.2f}")
    benchmark.extra_info["seconds"] = shapes
    first, second = shapes["block"].values()
    return second / first


@pytest.mark.model
def test_billm_is_at_least_five_times_faster_than_the_slow_reference(benchmark, block):
    method = create_method("billm")

    def slow(matrix):
        reference.quantize(matrix.weight, matrix.statistics.inverse_factor(smollm2_block.DAMPING).upper)

    functions = {"BiLLM": lambda matrix: method.quantize_linear(matrix.weight, matrix.statistics), "reference": slow}
    assert block_ratio(benchmark, block, functions, rounds=2) >= 5


@pytest.mark.model
def test_pb_llm_runs_at_the_speed_of_gptq(benchmark, block):
    gptq, partial = create_method("gptq", bits=2, group_size=128), create_method("pb-llm", group_size=128)
    functions = {
        "GPTQ": lambda matrix: gptq.quantize_linear(matrix.weight, matrix.statistics),
        "PB-LLM": lambda matrix: partial.quantize_linear(matrix.weight, matrix.statistics),
    }
    # The column loop takes as long; the bitmap, a second plane to pack and the search of the mask come on top.
    assert block_ratio(benchmark, block, functions, rounds=5) < 1.4
