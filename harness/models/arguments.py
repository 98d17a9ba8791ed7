"""What a model hands to its decoder blocks besides the hidden state: masks, rotary embeddings.

Learned from the model's own forward pass, so that no family needs a driver. Where a block is handed what an earlier
block made, or what the text gives, blocks cannot be run one at a time on what is known in front of the first: such a
model is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from harness.models.blocks import Blocks
from kernels.errors import InputError

# Positional arguments behind the hidden state, and named ones.
BlockArguments = tuple[tuple[Any, ...], dict[str, Any]]


class _Seen(Exception):
    """Leaves a forward pass: the last block is reached, and the head's logits would be the largest tensor of all."""


def hidden_state(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """The hidden state among a block's arguments: it comes first or by name."""
    found: Tensor = args[0] if args else kwargs["hidden_states"]
    return found


@torch.no_grad()
def block_arguments(model: nn.Module, blocks: Blocks, window: Tensor) -> list[BlockArguments]:
    """The arguments of each block; some families alternate masks and rotary embeddings between them.

    window: [1, context], token ids. Raises InputError if they are others for another text, or if the model does not run
    its blocks one after the other.
    """
    found, of_other = (_arguments_for(model, blocks, text) for text in (window, window.flip(1)))
    for index, pair in enumerate(zip(found, of_other, strict=True)):
        name = _difference(*pair)
        if name is not None:
            raise InputError(
                f"{type(model).__name__} hands block {index} {name}, which depends on the text or on earlier blocks; "
                "such a model cannot be calibrated block by block, only quantized by methods without calibration"
            )
    return found


def _arguments_for(model: nn.Module, blocks: Blocks, window: Tensor) -> list[BlockArguments]:
    """From one forward pass, in which the first block alone computes: the others pass the hidden state on, in the form
    (a tensor, or a tuple with more) that the first one gives."""
    noted: list[BlockArguments] = []
    given: list[Any] = []
    count = len(blocks.blocks)

    def note(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        noted.append((args[1:], {key: value for key, value in kwargs.items() if key != "hidden_states"}))
        if len(noted) == count:
            raise _Seen

    def pass_on(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        note(args, kwargs)
        hidden = hidden_state(args, kwargs)
        return hidden if isinstance(given[0], Tensor) else (hidden, *given[0][1:])

    first, places = blocks.blocks[0], model.get_submodule(blocks.prefix)
    assert isinstance(places, nn.ModuleList)
    handles = [
        first.register_forward_pre_hook(lambda block, args, kwargs: note(args, kwargs), with_kwargs=True),
        first.register_forward_hook(lambda block, args, output: given.append(output)),
    ]
    try:
        for index in range(1, count):
            places[index] = _StandIn(blocks.blocks[index], pass_on)
        with suppress(_Seen):
            model(window, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
        for index in range(1, count):
            places[index] = blocks.blocks[index]
    if len(noted) != count:
        raise InputError(f"{type(model).__name__} ran {len(noted)} decoder blocks of {count} in one forward pass")
    return noted


class _StandIn(nn.Module):
    """In the place of a block, and computes nothing. What else the model asks of it (the kind of its attention, say)
    the block answers. The block's weights need not be there."""

    def __init__(self, block: nn.Module, pass_on: Any) -> None:
        super().__init__()
        self.__dict__.update(_block=block, _pass_on=pass_on)  # not as a submodule: the block stays where it was

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_block"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._pass_on(args, kwargs)


def _tensors(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    """The tensors in an argument. Objects of other kinds than collections are not looked into."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, (Mapping, tuple, list)):
        for key, part in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from _tensors(part, f"{name}.{key}" if name else str(key))


def _difference(one: BlockArguments, other: BlockArguments) -> str | None:
    """The name of a tensor that is not the same in two blocks' arguments; None if all are."""
    (found, of_other) = (dict([*_tensors(part[0], "argument"), *_tensors(part[1], "")]) for part in (one, other))
    for name in {**found, **of_other}:
        if name not in found or name not in of_other or not torch.equal(found[name], of_other[name]):
            return name
    return None
