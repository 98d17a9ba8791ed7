"""Progress that is worth a message: when something new begins, and at intervals."""

from __future__ import annotations

import time
from collections.abc import Callable


class Throttle:
    """Passes on the first call of a kind and, after that, one in `seconds`."""

    def __init__(self, seconds: float, report: Callable[[int, int, str], None]) -> None:
        self._seconds = seconds
        self._report = report
        self._last = 0.0

    def __call__(self, done: int, total: int, what: str) -> None:
        now = time.monotonic()
        if done == 0 or done == total or now - self._last > self._seconds:
            self._last = now
            self._report(done, total, what)
