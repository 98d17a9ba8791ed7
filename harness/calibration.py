"""Block-by-block calibration: the activations of all samples in front of one decoder block, and what its layers see.

As in the GPTQ family (section 3.3 of arXiv 2210.17323 and its released driver): the linear layers of block i see
activations that come through the quantized blocks before it and the unquantized weights of the block itself. One block
runs at a time; besides the model only the activations of all samples are held.

What blocks are handed besides the hidden state is learned from the model's own forward pass and replayed, so no model
family needs a driver of its own (harness/models/arguments.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from harness.models.arguments import block_arguments, hidden_state
from harness.models.blocks import Blocks, block_linears
from kernels.errors import InputError, NumericalError
from kernels.finite import all_finite
from methods import BlockView, LayerStatistics
from methods.base import Needs
from methods.hessian import accumulate

Progress = Callable[[int], None]


class _Stop(Exception):
    """Leaves a forward pass as soon as everything wanted has been seen."""


class BlockStream:
    """Activations [samples, tokens, hidden] on their way through the decoder blocks."""

    def __init__(self, model: nn.Module, blocks: Blocks, windows: Tensor, *, beside: bool = False) -> None:
        """windows: [samples, context], token ids. beside: also keep the activations of the unquantized model."""
        self._blocks = blocks.blocks
        self._device = next(model.parameters()).device
        self._arguments = block_arguments(model, blocks, windows[:1].to(self._device))
        self.hidden = _embed(model, self._blocks[0], windows, self._device)
        self.unquantized = self.hidden.clone() if beside else None

    @property
    def samples(self) -> int:
        return self.hidden.shape[0]

    def state(self) -> dict[str, Tensor]:
        """All that a checkpoint must keep for the blocks that are left."""
        beside = {} if self.unquantized is None else {"unquantized": self.unquantized}
        return {"hidden": self.hidden, **beside}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state` gave."""
        self.hidden = state["hidden"].to(self.hidden)
        if self.unquantized is not None:
            self.unquantized = state["unquantized"].to(self.hidden)

    def view(self, index: int) -> BlockView:
        """Block `index` with the activations in front of it."""
        block = self._blocks[index]
        plain = BlockView(block, self.hidden, *self._arguments[index], block_linears(block))
        return replace(plain, collect=lambda needs: self.collect(index, needs))

    @torch.no_grad()
    def collect(self, index: int, needs: Needs, progress: Progress = lambda done: None) -> dict[str, LayerStatistics]:
        """Statistics of the inputs of each linear layer of block `index`, as its weights are now.

        Layers that read the same tensor share one object. Runs every sample once, up to the last layer's input.
        """
        collector = _Collector(block_linears(self._blocks[index]), keep_inputs=needs == "inputs")
        with collector:
            for sample in range(self.samples):
                collector.start_sample()
                with suppress(_Stop):
                    self.view(index).run(sample)
                progress(sample + 1)
        return collector.statistics(self.samples)

    @torch.no_grad()
    def advance(self, index: int, progress: Progress = lambda done: None) -> None:
        """Replace the activations by the outputs of block `index`, as its weights are now."""
        for sample in range(self.samples):
            self.hidden[sample] = self.view(index).run(sample)[0].to(self.hidden.device)
            progress(sample + 1)

    @torch.no_grad()
    def outputs(self, index: int, progress: Progress = lambda done: None) -> Tensor:
        """The outputs of block `index`, as its weights are now, beside the activations: [samples, tokens, hidden].

        On the unquantized model's activations where those are kept, else on the only ones there are.
        """
        inputs = self.hidden if self.unquantized is None else self.unquantized
        outputs = torch.empty_like(inputs)
        view = replace(self.view(index), hidden=inputs)
        for sample in range(self.samples):
            outputs[sample] = view.run(sample)[0].to(outputs.device)
            progress(sample + 1)
        return outputs


class _Collector:
    """Forward pre-hooks on the linear layers of one block. Layers that are handed the same tensor form one group."""

    def __init__(self, linears: dict[str, nn.Linear], keep_inputs: bool) -> None:
        self._linears = linears
        self._keep_inputs = keep_inputs
        self._leader: dict[str, str] = {}
        self._hessians: dict[str, Tensor] = {}
        self._tokens: dict[str, int] = {}
        self._inputs: dict[str, list[Tensor]] = {}
        self._seen: dict[str, Tensor] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> _Collector:
        for name, linear in self._linears.items():
            hook = lambda _, args, name=name: self._see(name, args[0])  # noqa: E731
            self._handles.append(linear.register_forward_pre_hook(hook))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._seen.clear()

    def start_sample(self) -> None:
        self._seen.clear()

    def _see(self, name: str, x: Tensor) -> None:
        leader = self._leader.get(name)
        if leader is None:
            # First sample: who else was handed this very tensor?
            leader = next((other for other, seen in self._seen.items() if seen is x), name)
            self._leader[name] = leader
        elif leader != name and self._seen.get(leader) is not x:
            raise RuntimeError(f"{name} shared its input with {leader} in the first sample and does not any more")
        self._seen[name] = x
        if leader == name:
            self._add(name, x)
        if len(self._seen) == len(self._linears) == len(self._leader):
            raise _Stop

    def _add(self, name: str, x: Tensor) -> None:
        if name not in self._hessians:
            self._hessians[name] = torch.zeros(x.shape[-1], x.shape[-1], dtype=torch.float32, device=x.device)
        accumulate(self._hessians[name], x)
        self._tokens[name] = self._tokens.get(name, 0) + x.numel() // x.shape[-1]
        if self._keep_inputs:
            self._inputs.setdefault(name, []).append(x.reshape(-1, x.shape[-1]).clone())

    def statistics(self, samples: int) -> dict[str, LayerStatistics]:
        groups: dict[str, LayerStatistics] = {}
        for name, hessian in self._hessians.items():
            if not all_finite(hessian):
                raise NumericalError(f"layer {name}: calibration activations overflow; try --dtype float32 or bfloat16")
            inputs = self._inputs.pop(name, None)
            groups[name] = LayerStatistics(
                hessian.mul_(2 / samples), samples, self._tokens[name], torch.stack(inputs) if inputs else None
            )
        unseen = sorted(set(self._linears) - set(self._leader))
        if unseen:
            raise InputError(f"layer {unseen[0]} received no calibration tokens; use more --calibration-samples")
        return {name: groups[self._leader[name]] for name in self._linears}


def check_sample_size(samples: int, context: int, widest: int) -> None:
    """Raise InputError if the calibration tokens cannot span the inputs of the widest layer (a singular Hessian)."""
    if samples * context < widest:
        raise InputError(
            f"calibration set too small: {samples} x {context} = {samples * context} tokens for a Hessian of "
            f"{widest} inputs; use --calibration-samples {-(-widest // context)} or more"
        )


@torch.no_grad()
def _embed(model: nn.Module, first: nn.Module, windows: Tensor, device: torch.device) -> Tensor:
    """The input of the first block for every sample: [samples, context, hidden], in the model's dtype, on its device.

    The forward pass is left as soon as the first block is reached.
    """
    stream: list[Tensor] = []

    def catch(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        stream.append(hidden_state(args, kwargs)[0].clone())
        raise _Stop

    handle = first.register_forward_pre_hook(catch, with_kwargs=True)
    try:
        for window in windows:
            with suppress(_Stop):
                model(window[None].to(device), use_cache=False)
    finally:
        handle.remove()
    return torch.stack(stream)
