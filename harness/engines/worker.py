"""One run in a process of its own: what `pool` starts.

Lines of JSON go through the channel: progress and, at the end, the result; whatever is printed goes to standard error.
When nobody reads any more, the process ends.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from multiprocessing.connection import Connection

from harness.engines.base import attempt
from harness.engines.messages import result_to_text, task_from_text
from harness.engines.processes import take_environment, use_threads
from harness.engines.throttle import Throttle

# Seconds between two lines of progress.
_EVERY = 0.2


def work(channel: Connection, text: str, variables: Mapping[str, str]) -> None:
    """Carry out the task in `text`. variables: the environment to do it in."""
    take_environment(variables)
    os.dup2(2, 1)
    task, settings = task_from_text(text)
    if settings["cores"] and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, settings["cores"])  # before torch starts its threads
    use_threads(settings["threads"])

    def say(name: str, content: object) -> None:
        try:
            channel.send_bytes(json.dumps({name: content}).encode())
        except BrokenPipeError:  # whoever asked has been killed
            os._exit(1)

    progress = Throttle(_EVERY, lambda done, total, what: say("progress", [done, total, what]))
    try:
        say("result", result_to_text(attempt(task, progress)))
    except KeyboardInterrupt:  # the whole group was told; who asked says so
        os._exit(1)
