"""Experiments, models, corpora, running, records and reports.

Importing this package makes transformers read and write packed checkpoints. Reports import it too and need neither
torch nor transformers, so the quantizer is registered as soon as transformers' own registry is imported, or now if it
is there.
"""

from importlib import import_module
from types import ModuleType

from wrapt import when_imported


@when_imported("transformers.quantizers.auto")
def _register_quantizer(_: ModuleType) -> None:
    import_module("harness.checkpoint.quantizer")
