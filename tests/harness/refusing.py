"""Bad input: a folder to damage, and what a refusal must look like."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import tiny
import torch
from safetensors.torch import load_file, save_file


@dataclass
class Place:
    """A folder with a good model, text and experiment, for a case to damage."""

    folder: Path
    model: Path
    text: Path
    gguf: Path

    @property
    def out(self) -> Path:
        return self.folder / "results"

    def experiment(self, **options) -> str:
        """An experiment whose one quantized row is GPTQ with `options`."""
        row = {"method": "gptq", "setting": "s", "label": "GPTQ", "options": {"bits": 3, "group_size": 32, **options}}
        return str(tiny.write_experiment(self.folder / "small.yaml", rows=[row]))

    def arguments(self, *more: str, **replaced: str | None) -> list[str]:
        """A good command line, with options replaced (None: left out) and more of them at the end."""
        options = {
            "experiment": None if "experiment" in replaced else self.experiment(), "model": self.model,
            "corpus": self.text, "calibration_corpus": self.text,
            "context": "32", "calibration_samples": "8", "windows": "2", "device": "cpu", "out": self.out, **replaced,
        }  # fmt: skip
        given = [(f"--{name.replace('_', '-')}", str(value)) for name, value in options.items() if value is not None]
        return [part for pair in given for part in pair] + list(more)

    def edit(self, name: str, change: Callable[[torch.Tensor], object]) -> None:
        """Change a tensor of the model's file in place."""
        file = self.model / "model.safetensors"
        tensors = load_file(file)
        change(tensors[name])
        save_file(tensors, file, {"format": "pt"})


def refuse(capsys, command, arguments, *told, out=None, finished=()):
    """The command ends with code 2 and one line that holds every text of `told`; `finished` runs alone have records,
    besides one of an earlier day, which stays as it is."""
    capsys.readouterr()
    earlier = None if out is None else _earlier_record(out)
    code = command([str(argument) for argument in arguments])
    error = capsys.readouterr().err
    assert code == 2, error
    assert error.startswith("error: ")
    assert error.endswith("\n")
    assert error.count("\n") == 1, error
    assert len(error) < 700, error
    for text in told:
        assert text in error, error
    if earlier is not None:
        assert earlier.read_text(encoding="utf-8") == _EARLIER
    # Every file there counts, half-written ones too.
    files = [] if out is None else [path for path in out.glob("runs/*") if path != earlier]
    found = [json.loads(path.read_text(encoding="utf-8")) for path in files]
    assert sorted(record["method"]["name"] for record in found) == sorted(finished)


_EARLIER = json.dumps({
    "format": 1, "key": "0" * 16, "spec": {}, "metrics": [], "ledger": {"payload_bits": 3.0}, "environment": {},
    "method": {"name": "earlier"},
})  # fmt: skip


def _earlier_record(out: Path) -> Path | None:
    """A record in the store before anything goes wrong; None where a case leaves no room for a store."""
    path = out / "runs" / f"{'0' * 16}.json"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(_EARLIER, encoding="utf-8")
    except OSError:
        return None
    return path


def cut(path: Path, share: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
