"""A method of another package whose process dies in the middle of a run, as when the system kills a worker: at a layer
and not at a time, so that it comes at the same place on a busy machine."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from methods import registry

# Method "dying": RTN, but every file in the folder that SAGEBENCH_TEST_DEATHS names is one death to die. It comes at
# the tenth layer, seven being a block: when the first block is finished and the second is not.
_SOURCE = """
import os, signal
from pathlib import Path
from methods import Provenance
from methods.rtn import Rtn

class Dying(Rtn):
    provenance = Provenance(paper="-", code="-", parity="-")
    layers = 0

    def quantize_linear(self, weight, statistics=None, context=None):
        self.layers += 1
        if self.layers == 10 and "SAGEBENCH_TEST_DEATHS" in os.environ:
            for death in Path(os.environ["SAGEBENCH_TEST_DEATHS"]).iterdir():
                death.unlink()
                os.kill(os.getpid(), signal.SIGKILL)
        return super().quantize_linear(weight, statistics, context)
"""
_ROOT = Path(__file__).resolve().parents[2]


def install(folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Make the method known to this process and to those that it starts, for one test."""
    info = folder / "dying_plugin-1.0.dist-info"
    info.mkdir(parents=True)
    (folder / "dying_plugin.py").write_text(_SOURCE, encoding="utf-8")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: dying_plugin\nVersion: 1.0\n", encoding="utf-8")
    (info / "entry_points.txt").write_text("[sagebench.methods]\ndying = dying_plugin:Dying\n", encoding="utf-8")
    patch.setattr(registry, "_registered", dict(registry._registered))
    patch.syspath_prepend(folder)
    patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(folder), str(_ROOT), os.environ.get("PYTHONPATH")])))


def deaths(folder: Path, count: int, patch: pytest.MonkeyPatch) -> Path:
    """From now on processes that use the method die `count` times in all; the folder holds a file for each to come."""
    folder.mkdir()
    for number in range(count):
        (folder / str(number)).touch()
    patch.setenv("SAGEBENCH_TEST_DEATHS", str(folder))
    return folder
