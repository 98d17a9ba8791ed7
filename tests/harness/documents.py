"""Documents of the zero-shot tasks in the words of the tiny tokenizer, with the fields that the hub's have."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

TASKS = ("piqa", "boolq", "openbookqa", "winogrande", "arc_easy", "arc_challenge", "hellaswag")


def documents(task: str, count: int = 12, seed: int = 0) -> list[dict[str, Any]]:
    """`count` documents of `task`; answers differ in length, so that acc and acc_norm differ."""
    draw = random.Random(f"{task} {seed}")
    return [_one(task, draw, number) for number in range(count)]


def write(folder: Path, *tasks: str, count: int = 12) -> Path:
    """A folder for SAGEBENCH_DATA with the documents of `tasks`."""
    (folder / "zeroshot").mkdir(parents=True, exist_ok=True)
    for task in tasks:
        lines = [json.dumps(document) + "\n" for document in documents(task, count)]
        (folder / "zeroshot" / f"{task}.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


def _one(task: str, draw: random.Random, number: int) -> dict[str, Any]:
    def words(most: int) -> str:
        return " ".join(f"w{draw.randrange(62)}" for _ in range(draw.randint(1, most)))

    answers = [words(5) for _ in range(4)]
    choices = {"text": answers, "label": ["A", "B", "C", "D"]}
    if task == "piqa":
        return {"goal": words(8), "sol1": answers[0], "sol2": answers[1], "label": draw.randrange(2)}
    if task == "boolq":
        return {"passage": words(12), "question": words(5), "idx": number, "label": draw.randrange(2)}
    if task == "openbookqa":
        key = draw.choice("ABCD")
        return {"id": str(number), "question_stem": words(8), "choices": choices, "answerKey": key}
    if task == "winogrande":
        sentence = f"{words(4)} _ {words(4)}"
        return {"sentence": sentence, "option1": "w1", "option2": "w2 w3", "answer": draw.choice("12")}
    if task == "hellaswag":
        return {
            "activity_label": words(2), "ctx_a": words(6), "ctx_b": words(2), "endings": answers,
            "label": str(draw.randrange(4)),
        }  # fmt: skip
    return {"id": str(number), "question": words(8), "choices": choices, "answerKey": draw.choice("ABCD")}
