"""Functions timed in turns, so that all see the same machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping


class Turns:
    """The seconds that each of `functions` takes, by name, a list that grows by one with each round.

    before, after: run around each call; only `after` is in the time (a GPU's work ends with it).
    """

    def __init__(
        self,
        functions: Mapping[str, Callable[[], object]],
        before: Callable[[], object] = lambda: None,
        after: Callable[[], object] = lambda: None,
    ) -> None:
        self.seconds: dict[str, list[float]] = {name: [] for name in functions}
        self._functions, self._before, self._after = functions, before, after

    def once(self) -> None:
        for name, function in self._functions.items():
            self._before()
            start = time.perf_counter()
            function()
            self._after()
            self.seconds[name].append(time.perf_counter() - start)

    def fastest(self) -> dict[str, float]:
        return {name: min(taken) for name, taken in self.seconds.items()}
