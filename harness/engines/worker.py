"""One run in a process of its own, started by `pool`.

The task comes as a line of JSON on standard input. Standard output carries lines of progress and, at the end, the
result; whatever else is printed goes to standard error. When nobody reads any more, the process ends.
"""

from __future__ import annotations

import json
import os
import sys

# Seconds between two lines of progress.
_EVERY = 0.2
# Exit code where nobody reads any more.
UNHEARD = 3


def main() -> None:
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)
    text = sys.stdin.readline()
    settings = json.loads(text)
    cores, threads = settings.get("cores"), settings.get("threads")
    if cores and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)  # before torch starts its threads
    import torch

    from harness.engines.base import attempt
    from harness.engines.messages import result_to_text, task_from_text
    from harness.engines.throttle import Throttle

    if threads:
        torch.set_num_threads(threads)

    def say(name: str, content: object) -> None:
        try:
            channel.write(json.dumps({name: content}) + "\n")
        except BrokenPipeError:  # whoever asked has been killed
            os._exit(UNHEARD)

    progress = Throttle(_EVERY, lambda done, total, what: say("progress", [done, total, what]))
    task, _ = task_from_text(text)
    say("result", result_to_text(attempt(task, progress)))
