"""One arm of a comparison: greedy decoding, token by token, with or without a CUDA graph."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from harness.runtime.bandwidth import wait
from harness.runtime.decoder import Decoder

_WARM_UP_STEPS = 3


@dataclass(frozen=True)
class Round:
    """prefill: seconds to the first token. steps: seconds of each decode step. tokens: [batch, steps + 1], the first of
    them from the prefill."""

    prefill: float
    steps: list[float]
    tokens: Tensor


class Stepper:
    """Generates `steps` tokens after the first one, all buffers allocated beforehand.

    graph: capture the step once and replay it (CUDA); a replay allocates nothing and asks the host nothing.
    """

    def __init__(self, decoder: Decoder, prompt: Tensor, steps: int, *, graph: bool = False) -> None:
        self.decoder = decoder
        self._prompt = prompt
        self._steps = steps
        self._device = prompt.device
        self._token = torch.zeros(prompt.shape[0], 1, dtype=torch.int64, device=self._device)
        self._graph: torch.cuda.CUDAGraph | None = None
        if graph:
            self._capture()

    def captured(self) -> Stepper:
        """The same on the same decoder with the step in a graph (CUDA): of the two only one may run at a time. Raises
        RuntimeError if the step cannot be captured."""
        return Stepper(self.decoder, self._prompt, self._steps, graph=True)

    def run(self) -> Round:
        """One round: prefill, then the steps, each timed."""
        prefill = self.prefill()
        first = self._token.clone()
        seconds, tokens = self.decode()
        return Round(prefill, seconds, torch.cat([first, tokens], dim=1).cpu())

    def prefill(self) -> float:
        """Read the prompt and choose the first token; returns the seconds that it took."""
        start = time.perf_counter()
        self._choose(self.decoder.prefill(self._prompt))
        wait(self._device)
        return time.perf_counter() - start

    def decode(self) -> tuple[list[float], Tensor]:
        """The steps after `prefill`: the seconds of each, and the tokens that they chose, [batch, steps]."""
        tokens = torch.zeros(self._token.shape[0], self._steps, dtype=torch.int64, device=self._device)
        if self._device.type == "cuda":
            return self._timed_by_events(tokens), tokens
        seconds = []
        for number in range(self._steps):
            start = time.perf_counter()
            self._step()
            seconds.append(time.perf_counter() - start)
            tokens[:, number : number + 1] = self._token
        return seconds, tokens

    def _timed_by_events(self, tokens: Tensor) -> list[float]:
        """Events between the steps, read at the end: the host runs ahead and waits for nothing."""
        events = [torch.cuda.Event(enable_timing=True) for _ in range(self._steps + 1)]
        events[0].record()
        for number in range(self._steps):
            self._step()
            tokens[:, number : number + 1].copy_(self._token)
            events[number + 1].record()
        wait(self._device)
        return [events[i].elapsed_time(events[i + 1]) / 1e3 for i in range(self._steps)]

    def _step(self) -> None:
        if self._graph is None:
            self._choose(self.decoder.step(self._token))
        else:
            self._graph.replay()

    def _choose(self, logits: Tensor) -> None:
        self._token.copy_(logits.argmax(dim=-1, keepdim=True))

    def _capture(self) -> None:
        """Warm up on a side stream (kernels are compiled, workspaces allocated), then record one step."""
        self.decoder.prefill(self._prompt)
        side = torch.cuda.Stream(self._device)
        side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(side):
            self._warm_up()
        torch.cuda.current_stream(self._device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._choose(self.decoder.step(self._token))
        self._graph = graph

    def _warm_up(self) -> None:
        """Steps at the position after the prompt: the cache may have room for no more than the steps of a round."""
        for _ in range(_WARM_UP_STEPS):
            self._choose(self.decoder.step(self._token))
            self.decoder.cache.restart(self._prompt.shape[1])
