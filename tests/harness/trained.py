"""A tiny model that has learned a made-up language in seconds: quantizing it badly makes it worse, as a real one.

What random weights predict is worth nothing, so damage to them does harm or good by chance.
"""

from __future__ import annotations

import random
from pathlib import Path

import tiny
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

_STEPS, _BATCH, _WARMUP = 300, 16, 20
_RATE = 1e-2
# Two of the tokenizer's 62 words ask for a follower of the word before, each for another one.
_WORDS, _ASKING = 60, (60, 61)


def sentences(count: int, seed: int = 0) -> str:
    """`count` sentences of eight words, one a line: "w3 w60 w25 w61 w7 w61 w44 w60".

    The first word is drawn, and after each word which of its two followers comes next. So half of the words follow from
    the two before them, together, and the last alone says nothing: it takes the blocks of a model to foretell them.
    """
    shuffled = random.Random(0)
    followers = [shuffled.sample(range(_WORDS), _WORDS) for _ in _ASKING]
    draw = random.Random(seed)
    lines = []
    for _ in range(count):
        word, said = draw.randrange(_WORDS), []
        for _ in range(4):
            asking = draw.randrange(len(_ASKING))
            said += [word, _ASKING[asking]]
            word = followers[asking][word]
        lines.append(" ".join(f"w{word}" for word in said))
    return "\n".join(lines)


def save(folder: Path) -> Path:
    """A model folder with trained weights, the same every time on one machine and with one thread."""
    config = tiny.config("llama")
    config.initializer_range = 0.05
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    text = torch.tensor(tiny.tokenizer()(sentences(4000, seed=1))["input_ids"])
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / _WARMUP, 1 - step / _STEPS))
    for _ in range(_STEPS):
        starts = torch.randint(len(text) - tiny.CONTEXT, (_BATCH, 1), generator=generator)
        batch = text[starts + torch.arange(tiny.CONTEXT)]
        logits = model(batch[:, :-1]).logits
        loss = cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return tiny.save(folder, model=model.eval().requires_grad_(False))
