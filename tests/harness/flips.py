"""One rule of each method, and what it becomes when it is flipped in a copy of the module that holds it."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest

from methods import method_class, registry

# Method: module, the rule as the source has it (once), and the flipped one.
RULES: dict[str, tuple[str, str, str]] = {
    "fp16": ("methods.fp16", "weight.detach().clone()", "weight.detach().abs()"),
    "rtn": ("methods.grids", "torch.round(values / self.scale.float())", "torch.floor(values / self.scale.float())"),
    "gptq": ("methods.gptq", "return (codes - self._zero).mul_(self._scale)", "return values"),
    "awq": ("methods.awq.method", "part.clamp(-bound, bound)", "part.abs().clamp(-bound, bound)"),
    "binary": ("methods.binary", "group.abs().mean(dim=1", "group.abs().amax(dim=1"),
    "pb-llm": ("methods.pb_llm", "(weight / factor.diagonal())", "(weight * factor.diagonal())"),
    "billm": ("methods.billm.method", "weight.square() / self._pivots", "weight.square() * self._pivots"),
    "sage-ptq": ("methods.sage_ptq.method", "group_means(bounds)", "group_means(bounds)[::-1].copy()"),
    "aptq": ("methods.aptq", "context.plan is None else context.plan", "context.plan is None else _LOW"),
    "cmpq": ("methods.cmpq", "members > 0, means, centers.double()", "members > 0, centers.double(), means"),
    "mg-ptq": ("methods.mg_ptq.allocation", "errors / pivots.square()", "errors * pivots.square()"),
    "micromix": ("methods.micromix", "pack(weight, torch", "pack(weight[:, torch.argsort(score)], torch"),
    "slim-llm": (
        "methods.slim_llm.allocation",
        "widths[low], widths[high] = bits - 1, bits + 1", "widths[low], widths[high] = bits + 1, bits - 1",
    ),
    "sage-x": ("methods.sage_x.columns", "round(-SCALE_STEPS * math.log2(", "round(SCALE_STEPS * math.log2("),
    "slim-llm-plus": ("methods.slim_llm.plus", "yield loss\n", "yield -loss\n"),
}  # fmt: skip


def flip(patch: pytest.MonkeyPatch, method: str) -> None:
    """Put a copy of a module, with one rule flipped, in the place of the original, everywhere below `methods`."""
    name, rule, flipped = RULES[method]
    method_class(method)  # imports all of its modules
    original = importlib.import_module(name)
    source = Path(str(original.__file__)).read_text(encoding="utf-8")
    assert source.count(rule) == 1, f"{name} has {rule!r} {source.count(rule)} times"
    copy = ModuleType(name)
    copy.__file__ = original.__file__
    patch.setitem(sys.modules, name, copy)  # dataclasses look their module up
    exec(compile(source.replace(rule, flipped), str(original.__file__), "exec"), copy.__dict__)
    replaced = {id(value): getattr(copy, key) for key, value in vars(original).items() if _is_own(value, name)}
    for module in [module for key, module in sys.modules.items() if key.split(".")[0] == "methods"]:
        for key, value in list(vars(module).items()):
            if module is not copy and id(value) in replaced:
                patch.setattr(module, key, replaced[id(value)])
    for key, cls in list(registry._registered.items()):
        if id(cls) in replaced:
            replaced[id(cls)].name = key
            patch.setitem(registry._registered, key, replaced[id(cls)])


def _is_own(value: object, module: str) -> bool:
    """True for functions and classes that `module` defines."""
    return callable(value) and getattr(value, "__module__", None) == module
