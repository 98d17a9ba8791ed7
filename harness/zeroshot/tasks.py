"""The stock tasks of lm-evaluation-harness, on the hub's data or on local JSON lines.

A local task is a task file that includes the stock one and replaces its data set, nothing else: prompts, answers and
metrics stay the harness's own. The same file serves `lm_eval --include_path`.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from harness.catalog import TaskEntry, find_task
from harness.hub import hub_allowed, require_hub
from harness.local_data import data_folder
from kernels.errors import InputError


@dataclass(frozen=True)
class TaskData:
    """Where a task's documents come from. path, sha256: of the local file; None for the hub."""

    task: str
    source: str
    path: Path | None
    sha256: str | None
    documents: int | None


def task_source(name: str, profile: str) -> str | None:
    """ "local" or "hub", or None if the documents of task `name` can be had from neither under this profile."""
    if _local_file(find_task(name)) is not None:
        return "local"
    return "hub" if hub_allowed(profile) else None


def task_data(name: str, source: str) -> TaskData:
    """The documents of a task, checked. Raises InputError if they are missing or lack a field."""
    entry = find_task(name)
    if source == "hub":
        require_hub(f"task {name!r}", "data set of the stock task", f"a file {entry.local} below SAGEBENCH_DATA")
        return TaskData(name, source, None, None, None)
    path = _local_file(entry)
    if path is None:
        raise InputError(f"task {name!r}: no file {entry.local} below SAGEBENCH_DATA={data_folder() or ''}")
    content = path.read_bytes()
    return TaskData(name, source, path, hashlib.sha256(content).hexdigest(), _count_documents(content, path, entry))


def load_task(data: TaskData) -> Any:
    """The task as lm-evaluation-harness builds it from its files, 0-shot.

    Raises InputError if the installed harness lacks it.
    """
    from lm_eval.tasks import TaskManager

    stock = stock_file(data.task)
    try:
        if data.path is None:
            loaded = TaskManager(include_defaults=False).load([str(stock)])
        else:
            with tempfile.TemporaryDirectory(prefix="sagebench-task-") as folder:
                write_task_file(data, Path(folder))
                loaded = TaskManager(include_defaults=False, include_path=folder).load([data.task])
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"task {data.task!r} cannot be loaded: {' '.join(str(error).split())[:300]}") from error
    task = loaded["tasks"][data.task]
    # What `simple_evaluate` does: no examples in the prompt, and a fixed seed for drawing them all the same.
    task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=1234)
    return task


def stock_file(name: str) -> Path:
    """The task's own file inside the installed lm-evaluation-harness."""
    import lm_eval.tasks

    path = Path(lm_eval.tasks.__file__).parent / find_task(name).stock
    if not path.is_file():
        raise InputError(f"lm-evaluation-harness has no {find_task(name).stock}; install lm_eval>=0.4.13")
    return path


def stock_sha256(name: str) -> str:
    """A checksum over the stock task's folder: its own file, what it includes, and its functions."""
    folder = stock_file(name).parent
    files = sorted(path for path in folder.iterdir() if path.suffix in (".yaml", ".py"))
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in files)).hexdigest()


def write_task_file(data: TaskData, folder: Path) -> Path:
    """A task file in `folder` that includes the stock task of `data` and reads its local documents instead."""
    entry = find_task(data.task)
    splits = {f"{split}_split": split if split == entry.split else None for split in ("training", "validation", "test")}
    content = {
        "include": str(stock_file(data.task)),
        "task": data.task,
        "dataset_path": "json",
        "dataset_name": None,
        # Converted beside the task file and held in memory: nothing stays in the user's own cache.
        "dataset_kwargs": {
            "data_files": {entry.split: str(data.path)},
            "cache_dir": str(folder / "converted"),
            "keep_in_memory": True,
        },
        **splits,
    }
    path = folder / f"{data.task}.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return path


def _local_file(entry: TaskEntry) -> Path | None:
    folder = data_folder()
    if folder is None:
        return None
    path = folder.resolve() / entry.local
    return path if path.is_file() else None


def _count_documents(content: bytes, path: Path, entry: TaskEntry) -> int:
    """How many documents a JSON lines file has. Raises InputError naming the first line that is not one."""
    count = 0
    for number, line in enumerate(content.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            document = json.loads(line)
        except ValueError as error:
            raise InputError(f"{path} line {number}: not JSON ({error})") from None
        missing = [name for name in entry.fields if not isinstance(document, dict) or name not in document]
        if missing:
            raise InputError(f"{path} line {number}: no field {missing[0]!r}; it must have {', '.join(entry.fields)}")
        count += 1
    if not count:
        raise InputError(f"{path} has no documents; it must hold one JSON object a line")
    return count
