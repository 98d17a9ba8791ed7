"""What the unquantized model says about a text, kept so that divergence needs one model in memory, not two.

Kept are the inputs of the output head, window by window, and the head: logits are one product away, exactly those of
the model. Whole logits of 148 windows of 2048 tokens and a vocabulary of 150,000 are 180 GB in float32; top-k with
log-sum-exp drops the tail, so that KL is only bounded from below, and float16 rounds log-probabilities by up to 0.004
nats. Head inputs of width 4096 are 5 GB for the same text, and lose nothing: no method here touches the head. A model
that does more behind its head than soft-capping is found out on the first window, and its logits are kept whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from harness.cache import cache_folder, cache_limit, folder_bytes, prune, require_space
from kernels.atomic import atomic_folder, write_text
from kernels.errors import InputError
from kernels.tensor_files import save_tensors

# Part of every key: raise it when what is kept changes.
_FORMAT = 1
# Bytes kept in all; the entries used longest ago go first. SAGEBENCH_CACHE_GB overrides it.
_DEFAULT_GB = 16.0
# Written last: an entry without it does not count.
_MARKER = "reference.json"


@dataclass(frozen=True)
class Reference:
    """The unquantized model's logits on `windows` windows. kind: "hidden" (inputs of the head) or "logits".

    files: of the windows, mapped into memory: another process that takes them from the cache does not take them from
    here.
    """

    kind: str
    dtype: str
    files: tuple[Any, ...]
    softcap: float | None
    head: dict[str, Tensor]

    @property
    def windows(self) -> int:
        return len(self.files)

    def logits(self, index: int, device: torch.device | str = "cpu") -> Tensor:
        """Logits of window `index`: [context, vocabulary], in the reference's dtype."""
        kept = self.files[index].get_tensor("window").to(device)
        return kept if self.kind == "logits" else _apply_head(kept, self._head_on(device), self.softcap)

    def _head_on(self, device: torch.device | str) -> dict[str, Tensor]:
        # Moved and widened once: a head of 150,000 x 4096 takes longer to copy than to use.
        if self.head and next(iter(self.head.values())).device != torch.device(device):
            moved = {name: tensor.to(device) for name, tensor in self.head.items()}
            self.head.clear()
            self.head.update(moved)
        return self.head


def reference_key(**facts: Any) -> str:
    """16 hex digits over all that decides the logits: model, text, dtype, device, context, windows, versions."""
    text = json.dumps({"format": _FORMAT, "torch": torch.__version__, **facts}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def load_reference(key: str) -> Reference | None:
    """The kept reference, or None. A damaged one is dropped."""
    folder = cache_folder("reference") / key
    try:
        facts = json.loads((folder / _MARKER).read_text(encoding="utf-8"))
        dtype = getattr(torch, facts["dtype"])
        head = load_file(folder / "head.safetensors") if facts["kind"] == "hidden" else {}
        windows = [_window_file(folder, index) for index in range(facts["windows"])]
        if not all(file.is_file() for file in windows):
            raise ValueError("a window is missing")
        files = tuple(safe_open(file, framework="pt") for file in windows)
    except FileNotFoundError:
        return None
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError):
        shutil.rmtree(folder, ignore_errors=True)
        return None
    os.utime(folder / _MARKER)  # used now: pruning goes by it
    head = {name: tensor.to(dtype) for name, tensor in head.items()}
    return Reference(facts["kind"], facts["dtype"], files, facts["softcap"], head)


@torch.inference_mode()
def build_reference(
    key: str,
    model: nn.Module,
    windows: Tensor,
    progress: Callable[[int, int], None] = lambda done, total: None,
    beside: Sequence[str] = (),
) -> Reference:
    """Run the unquantized `model` over `windows` [windows, context] and keep what it says under `key`.

    One that is there already is left as it is. beside: keys of other references that are still needed. Raises
    InputError if it would be larger, together with them, than the cache may be.
    """
    folder = cache_folder("reference") / key
    others = [folder.parent / other for other in dict.fromkeys(beside)]
    taken = sum(folder_bytes(other) for other in others)
    if not (folder / _MARKER).exists():
        shutil.rmtree(folder, ignore_errors=True)  # what a killed process has left
    try:
        with atomic_folder(folder) as scratch:
            _write(scratch, model, windows, taken, progress)
    except OSError:
        if load_reference(key) is None:  # else another process was faster
            raise
    prune([folder, *others], _MARKER, cache_limit(_DEFAULT_GB))
    found = load_reference(key)
    assert found is not None
    return found


def _write(folder: Path, model: nn.Module, windows: Tensor, taken: int, progress: Callable[[int, int], None]) -> None:
    """The files of a reference. taken: bytes of the cache that are spoken for."""
    device = next(model.parameters()).device
    softcap = getattr(model.config, "final_logit_softcapping", None)
    head = _head(model)
    kind, dtype = "hidden", ""
    for index, window in enumerate(windows):
        hidden, logits = _forward(model, window.to(device))
        dtype = str(logits.dtype).removeprefix("torch.")
        if index == 0 and not _is_whole(hidden, logits, head, softcap):
            kind = "logits"
        kept = logits if kind == "logits" or hidden is None else hidden
        if index == 0:
            size = len(windows) * kept.numel() * kept.element_size()
            _check_size(folder, size + sum(t.numel() * t.element_size() for t in head.values()), taken)
            if kind == "hidden":
                save_tensors(folder / "head.safetensors", {name: _narrow(tensor) for name, tensor in head.items()})
        save_tensors(_window_file(folder, index), {"window": kept})
        del hidden, logits, kept  # before the next window's are made
        progress(index + 1, len(windows))
    facts = {"kind": kind, "dtype": dtype, "windows": len(windows), "softcap": softcap}
    write_text(folder / _MARKER, json.dumps(facts))


def _forward(model: nn.Module, window: Tensor) -> tuple[Tensor | None, Tensor]:
    """What goes into the head, [context, hidden], and the model's logits, [context, vocabulary]."""
    seen: list[Tensor] = []
    module = _output_module(model)
    hook = None if module is None else module.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    try:
        logits = model(window[None], use_cache=False).logits[0]
    finally:
        if hook is not None:
            hook.remove()
    return (seen[0][0] if seen else None), logits


def _output_module(model: nn.Module) -> nn.Module | None:
    getter: Any = getattr(model, "get_output_embeddings", lambda: None)
    return getter()


def _head(model: nn.Module) -> dict[str, Tensor]:
    module = _output_module(model)
    parts = {} if module is None else {"weight": module.weight, "bias": getattr(module, "bias", None)}
    return {name: tensor for name, tensor in parts.items() if isinstance(tensor, Tensor)}


def _apply_head(hidden: Tensor, head: dict[str, Tensor], softcap: float | None) -> Tensor:
    # The whole window at once and with a leading axis, as the model does it: the same product to the last bit.
    logits = nn.functional.linear(hidden[None], head["weight"], head.get("bias"))[0]
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap


def _is_whole(hidden: Tensor | None, logits: Tensor, head: dict[str, Tensor], softcap: float | None) -> bool:
    """True if the head and the soft cap are all that stands between `hidden` and `logits`."""
    if hidden is None or "weight" not in head or hidden.shape[-1] != head["weight"].shape[-1]:
        return False
    again = _apply_head(hidden, head, softcap)
    return again.shape == logits.shape and torch.allclose(again, logits, rtol=1e-5, atol=1e-5)


def _narrow(tensor: Tensor) -> Tensor:
    """`tensor` in 16 bits if that loses nothing: unquantized parameters are kept rounded to 16 bits."""
    for dtype in (torch.float16, torch.bfloat16):
        if torch.equal(tensor.to(dtype).to(tensor.dtype), tensor):
            return tensor.to(dtype)
    return tensor


def _check_size(folder: Path, size: int, taken: int) -> None:
    limit = cache_limit(_DEFAULT_GB)
    if size + taken > limit:
        others = f", and the run's others {taken / 1e9:.1f} GB" if taken else ""
        raise InputError(
            f"the reference for divergence takes {size / 1e9:.1f} GB{others}; the cache may hold {limit / 1e9:.1f} GB: "
            "use fewer --windows, or set SAGEBENCH_CACHE_GB"
        )
    require_space(folder, size + 1_000_000, "the reference for divergence")


def _window_file(folder: Path, index: int) -> Path:
    return folder / f"window-{index:05d}.safetensors"
