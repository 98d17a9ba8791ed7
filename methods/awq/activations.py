"""What the modules of a decoder block see and give during calibration, for AWQ's searches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from methods.awq.pairs import PAIRS
from methods.block import BlockView
from methods.hessian import accumulate


class Activations:
    """What the modules of a block see on the samples of the search, recorded in one pass of the unquantized block."""

    def __init__(self, view: BlockView, samples: int) -> None:
        inputs: dict[str, list[Tensor]] = {}
        # Layers that are handed the same tensor (q, k, v) share one recording, under the name of the first.
        self._leader: dict[str, str] = {}
        seen: dict[str, Tensor] = {}

        def record(name: str, x: Tensor) -> None:
            leader = next((other for other, tensor in seen.items() if tensor is x), name)
            self._leader.setdefault(name, leader)
            seen[name] = x
            if self._leader[name] == name:
                inputs.setdefault(name, []).append(x.detach().reshape(-1, x.shape[-1]).clone())

        self._calls: dict[str, list[tuple[tuple[Any, ...], dict[str, Any], Tensor]]] = {}
        handles = [
            linear.register_forward_pre_hook(lambda _, args, name=name: record(name, args[0]))
            for name, linear in view.linears.items()
        ]
        inspected = {pair.inspected for pair in PAIRS} - view.linears.keys()
        for name, module in view.block.named_modules():
            if name in inspected:
                handles.append(
                    module.register_forward_hook(
                        lambda _, args, kwargs, out, name=name: self._calls.setdefault(name, []).append(
                            (args, kwargs, _first(out).clone())
                        ),
                        with_kwargs=True,
                    )
                )
        for sample in range(samples):
            seen.clear()
            view.run(sample)
        for handle in handles:
            handle.remove()
        self._joined = {name: torch.cat(inputs.pop(name)) for name in list(inputs)}

    def inputs(self, name: str) -> Tensor:
        """Inputs [tokens, in_features] of a linear layer, as folding has left them."""
        return self._joined[self._leader[name]].float()

    def gram(self, name: str) -> Tensor:
        """X^T X [n, n] of a linear layer's inputs, as folding has left them."""
        inputs = self.inputs(name)
        gram = torch.zeros(inputs.shape[1], inputs.shape[1], device=inputs.device)
        accumulate(gram, inputs)
        return gram

    def grams(self) -> dict[str, Tensor]:
        """`gram` of every linear layer by name; layers that share their input share the tensor."""
        leaders = {leader: self.gram(leader) for leader in self._joined}
        return {name: leaders[leader] for name, leader in self._leader.items()}

    def divide(self, readers: tuple[str, ...], scales: Tensor) -> None:
        """Account for scales that were folded into the operation before `readers`, which share their input."""
        leader = self._leader[readers[0]]
        self._joined[leader] = (self._joined[leader].float() / scales).to(self._joined[leader].dtype)

    def loss(self, name: str, module: Any) -> Callable[[], float]:
        """A function that gives the mean squared change of the module's output since this call's recording."""
        if isinstance(module, nn.Linear):
            # For a single layer the mean squared change is exactly tr(D X^T X D^T) / size: no forward pass needed.
            gram, tokens = self.gram(name), len(self.inputs(name))
            before = module.weight.detach().float().clone()

            def from_gram() -> float:
                change = module.weight.float() - before
                return float(((change @ gram) * change).sum(dtype=torch.float64)) / (tokens * len(change))

            return from_gram

        def from_calls() -> float:
            total = 0.0
            for args, kwargs, before in self._calls[name]:
                change = _first(module(*args, **kwargs)).float() - before.float()
                total += float(change.square().mean(dtype=torch.float64))
            return total

        return from_calls


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output
