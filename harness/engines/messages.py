"""Tasks and results as JSON text, the form in which they travel between processes. Nothing is pickled."""

from __future__ import annotations

import json
from typing import Any

from harness.engines.base import Result, Task
from harness.spec import RunSpec


def task_to_text(task: Task, **settings: Any) -> str:
    """One line. settings: what the worker must know besides the task (threads, cores)."""
    content = {"spec": task.spec.model_dump(mode="json"), "reference": task.reference, "fresh": task.fresh, **settings}
    return json.dumps(content)


def task_from_text(text: str) -> tuple[Task, dict[str, Any]]:
    """The task, and the settings that came with it."""
    content = json.loads(text)
    spec = RunSpec.model_validate_json(json.dumps(content.pop("spec")))
    return Task(spec, content.pop("reference"), content.pop("fresh")), content


def result_to_text(result: Result) -> str:
    """One line, without the spec: whoever asked knows it."""
    names = ("record", "error", "details", "bad_input")
    return json.dumps({name: getattr(result, name) for name in names}, allow_nan=False)


def result_from_text(spec: RunSpec, text: str) -> Result:
    return Result(spec, **json.loads(text))
