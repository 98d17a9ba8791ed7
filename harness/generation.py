"""Calibration text from the model itself: the corpus "self".

As good as real text for calibration (Williams et al. 2024, arXiv 2410.17170), and no data is needed. Pieces of PIECE
tokens are sampled at temperature 1 from a random first token, and joined to windows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from harness.cache import cache_folder
from harness.corpora import SELF, Text
from harness.models.load import LoadedModel
from kernels.atomic import atomic_path

# Long enough for text to find its subject; without it the attention cache of a whole window would rule the time.
PIECE = 512
_BATCH = 32

Progress = Callable[[int, int], None]


def self_calibration(
    loaded: LoadedModel, samples: int, context: int, seed: int, progress: Progress = lambda done, total: None
) -> tuple[Text, Tensor]:
    """The text and its windows [samples, context], sampled once for a model and kept in the cache."""
    parts = (loaded.sha256, str(loaded.model.dtype), str(samples), str(context), str(seed), str(PIECE))
    path = cache_folder("generated") / f"{hashlib.sha256(' '.join(parts).encode()).hexdigest()[:16]}.safetensors"
    try:
        windows = load_file(path)["windows"]
    except (SafetensorError, OSError, KeyError):
        windows = sample_windows(loaded.model, samples, context, seed, progress)
        with atomic_path(path) as part:
            save_file({"windows": windows}, part)
    documents = tuple(loaded.tokenizer.decode(window) for window in windows)
    return Text(SELF, SELF, "train", "sampled from the model", documents, "\n", True, None), windows


@torch.no_grad()
def sample_windows(
    model: Any, samples: int, context: int, seed: int, progress: Progress = lambda done, total: None
) -> Tensor:
    """[samples, context], int64, on the CPU."""
    length = min(PIECE, context)
    pieces = -(-context // length) * samples
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(0, model.config.get_text_config().vocab_size, (pieces, 1), generator=generator)
    parts, done = [], 0
    for batch in first.split(_BATCH):
        parts.append(_continued(model, batch, length, generator))
        done += len(batch)
        progress(done, pieces)
    return torch.cat(parts).view(samples, -1)[:, :context].contiguous()


def _continued(model: Any, ids: Tensor, length: int, generator: torch.Generator) -> Tensor:
    """ids [batch, 1] -> [batch, length], drawn from the model's own distribution."""
    device = next(model.parameters()).device
    cache = None
    while ids.shape[1] < length:
        output = model(ids[:, -1:].to(device), past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        chances = output.logits[:, -1].float().softmax(-1).cpu()
        ids = torch.cat([ids, torch.multinomial(chances, 1, generator=generator)], dim=1)
    return ids
