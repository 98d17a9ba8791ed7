"""Methods of other packages that misbehave: the run fails by name, in one line, and nothing else is touched."""

import json
import sys

import pytest
import tiny
import torch

from harness.cli import main, reproduce
from kernels.layouts import DenseWeight
from methods import LayerStatistics, NominalBits, Provenance, QuantizationMethod, list_methods, registry
from methods.block import BlockResult
from methods.registry import broken_methods


class Theirs(QuantizationMethod):
    """A method that works, for the cases to spoil."""

    provenance = Provenance(paper="-", code="-", parity="-")

    def quantize_linear(self, weight, statistics=None, context=None):
        return DenseWeight((weight * 1.01).half())

    def nominal_bits(self, packed):
        return NominalBits(weight=16.0, scale=0.0)


class NeedsHessian(Theirs):
    needs = "hessian"


def returning(make, base=Theirs):
    """A class whose `quantize_linear` returns what `make` makes of (weight, statistics)."""
    body = {"quantize_linear": lambda self, weight, statistics=None, context=None: make(weight, statistics)}
    return type("Spoilt", (base,), body)


def in_place(weight, statistics):
    weight.mul_(1.01)
    return DenseWeight(weight.half())


def through_data(weight, statistics):
    weight.data.mul_(1.01)
    return DenseWeight(weight.half())


def hessian_in_place(weight, statistics):
    statistics.hessian.diagonal().add_(1.0)
    return DenseWeight((weight * 1.01).half())


def raising(weight, statistics):
    raise ValueError("no\nluck")


SPOILT = {
    "wrong shape": (returning(lambda w, _: DenseWeight(w[:, :-1].half())), "returned (64, 63) for", "q_proj (64, 64)"),
    "transposed": (
        returning(lambda w, _: DenseWeight(w.T.contiguous().half())),
        "returned",
        "(64, 32) for",
        "k_proj (32, 64)",
    ),
    "nan": (returning(lambda w, _: DenseWeight(w.half() * float("nan"))), "returned NaN or infinity for", "q_proj"),
    "a tensor": (returning(lambda w, _: w.half()), "returned Tensor for", "no PackedWeight"),
    "nothing": (returning(lambda w, _: None), "returned NoneType for", "no PackedWeight"),
    "in place": (returning(in_place), "changed the weight of", "in place; it must take a copy"),
    "in place through data": (returning(through_data), "changed the weight of", "in place; it must take a copy"),
    "statistics in place": (returning(hessian_in_place, NeedsHessian), "changed the statistics of", "must take a copy"),
    "raises": (returning(raising), "ValueError: no luck"),
    "does nothing": (returning(lambda w, _: DenseWeight(w.clone())), "every decoded weight equals the original"),
}


class InTheStream(Theirs):
    """Writes into the activations that it is handed, which are those of every later block."""

    needs = "block"

    def quantize_block(self, view, contexts):
        view.hidden.mul_(1.01)
        return BlockResult({name: self.quantize_linear(linear.weight) for name, linear in view.linears.items()})


class InTheNorms(InTheStream):
    def quantize_block(self, view, contexts):
        dict(view.block.named_parameters())["input_layernorm.weight"].data.mul_(1.01)
        return BlockResult({name: self.quantize_linear(linear.weight) for name, linear in view.linears.items()})


class InTheWeights(InTheStream):
    def quantize_block(self, view, contexts):
        packed = {name: self.quantize_linear(linear.weight) for name, linear in view.linears.items()}
        for name, linear in view.linears.items():
            linear.weight.data.copy_(packed[name].decode())
        return BlockResult(packed)


SPOILT |= {
    "activations in place": (InTheStream, "changed the activations of model.layers.0", "it must take a copy"),
    "norms in place": (InTheNorms, "changed model.layers.0.input_layernorm.weight in place and does not say so"),
    "a block's weights in place": (InTheWeights, "changed model.layers.0.", "in place and does not say so"),
}


@pytest.fixture
def registered(monkeypatch):
    """Register a class as "theirs", for one test."""
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))
    return registry.register_method("theirs")


@pytest.fixture
def arguments(place):
    row = {"method": "theirs", "setting": "s", "label": "THEIRS"}
    path = tiny.write_experiment(place.folder / "theirs.yaml", rows=[row, tiny.ROW])
    return place.arguments(experiment=path)


def records(place):
    found = {path.name: json.loads(path.read_text(encoding="utf-8")) for path in place.out.glob("runs/*")}
    return {(r["spec"]["method"]["name"], name.endswith(".failed.json")) for name, r in found.items()}


@pytest.mark.parametrize("case", SPOILT)
def test_a_misbehaving_method_fails_alone(place, arguments, registered, capsys, case):
    cls, *told = SPOILT[case]
    registered(cls)
    assert reproduce(arguments) == 1
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("failed: ")]
    assert "theirs" in line
    for text in told:
        assert text in line, line
    # No record of a number that means nothing; the other method's run is there.
    assert records(place) == {("fp16", False), ("rtn", False), ("theirs", True)}


def test_the_method_that_the_cases_spoil_works(place, arguments, registered):
    registered(type("Works", (Theirs,), {}))
    assert reproduce(arguments) == 0
    assert records(place) == {("fp16", False), ("rtn", False), ("theirs", False)}


def test_statistics_that_a_method_only_reads_may_be_shared():
    statistics = LayerStatistics.from_inputs(torch.randn(2, 8, 4))
    before = statistics.hessian._version
    statistics.inverse_factor(0.01)
    assert statistics.hessian._version == before


BROKEN = {
    "raises": ("raise RuntimeError('no CUDA\\nhere')", "RuntimeError: no CUDA here"),
    "exits": ("import sys; sys.exit('goodbye')", "SystemExit: goodbye"),
    "is no Python": ("Broken = = 3", "SyntaxError"),
    "is empty": ("", "AttributeError"),
    "is no method": ("Broken = dict", "must be a subclass of methods.QuantizationMethod"),
    "has no provenance": (
        "from methods import QuantizationMethod\nclass Broken(QuantizationMethod): pass", "has no `provenance`",
    ),
}  # fmt: skip


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A package whose entry point "broken" is a module with the given source."""
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))
    monkeypatch.syspath_prepend(tmp_path)

    def install(source):
        (tmp_path / "broken_plugin.py").write_text(source, encoding="utf-8")
        info = tmp_path / "broken_plugin-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken_plugin\nVersion: 1.0\n", encoding="utf-8")
        (info / "entry_points.txt").write_text("[sagebench.methods]\nbroken = broken_plugin:Broken\n", encoding="utf-8")

    yield install
    sys.modules.pop("broken_plugin", None)


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_plugin_is_named_and_holds_nothing_up(place, installed, capsys, case):
    source, told = BROKEN[case]
    installed(source)
    assert "gptq" in [method.name for method in list_methods()]
    assert "broken" not in [method.name for method in list_methods()]
    assert broken_methods().keys() == {"broken"}
    assert main(["list", "methods"]) == 0
    said = capsys.readouterr().out
    (line,) = [line for line in said.splitlines() if line.startswith("not usable: ")]
    assert "'broken'" in line
    assert told in line
    # Used all the same, it is bad input, and found before any run.
    path = tiny.write_experiment(place.folder / "b.yaml", rows=[{"method": "broken", "setting": "s", "label": "B"}])
    assert reproduce(place.arguments(experiment=path)) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert told in error
    assert not list(place.out.glob("runs/*"))
    assert reproduce(place.arguments()) == 0
