"""Names to methods: suggestions, refusals, methods of other packages, and nothing imported before it is asked for."""

import subprocess
import sys
import textwrap

import pytest
import torch

from kernels.errors import InputError
from methods import (
    MethodConfig,
    MethodInfo,
    NominalBits,
    Provenance,
    QuantizationMethod,
    create_method,
    list_methods,
    method_class,
    register_method,
    registry,
)
from methods.registry import method_names

PLUGIN = '''
"""A method in one file of another package: every weight becomes the mean of its row."""

from pydantic import Field

from kernels.layouts import UniformWeight
from methods import MethodConfig, NominalBits, Provenance, QuantizationMethod


class RowMeanConfig(MethodConfig):
    factor: float = Field(1.0, gt=0, description="what the mean is multiplied by")


class RowMean(QuantizationMethod):
    Config = RowMeanConfig
    provenance = Provenance(paper="a paper of theirs", code="their package", parity="not tested")

    def quantize_linear(self, weight, statistics=None, context=None):
        weight, context = self._prepare(weight, context)
        means = (weight.mean(dim=1, keepdim=True) * self.config.factor).to(self.scale_dtype)
        ones = weight.new_ones(weight.shape).int()
        zeros = ones[:, :1] - 1
        return UniformWeight.pack(ones, means, zeros, bits=1, group_size=weight.shape[1])

    def nominal_bits(self, packed):
        return NominalBits(weight=0.0, scale=16 / packed.shape[1])
'''


@pytest.fixture(autouse=True)
def untouched_registry(monkeypatch):
    """What a test registers is forgotten after it."""
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Install a one-file package with entry points, as pip would leave it: `installed(module, source, **points)`."""

    def install(module, source, **points):
        (tmp_path / f"{module}.py").write_text(source)
        info = tmp_path / f"{module}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
        lines = [f"{name.replace('_', '-')} = {target}" for name, target in points.items()]
        (info / "entry_points.txt").write_text("\n".join(["[sagebench.methods]", *lines, ""]))

    monkeypatch.syspath_prepend(tmp_path)
    yield install
    for path in tmp_path.glob("*.py"):
        sys.modules.pop(path.stem, None)


def a_method(**members):
    """A class that is a method in every respect, and different each time."""
    provenance = Provenance(paper="-", code="-", parity="-")
    body = {
        "provenance": provenance,
        "quantize_linear": lambda self, weight, statistics=None, context=None: None,
        "nominal_bits": lambda self, packed: NominalBits(1.0, 0.0),
    }
    return type("AMethod", (QuantizationMethod,), {**body, **members})


# Names and options


def test_the_methods_of_this_project_are_registered():
    assert {"fp16", "rtn", "gptq", "sage-ptq"} <= set(method_names())


@pytest.mark.parametrize("name", method_names())
def test_every_method_is_listed_with_provenance_and_described_options(name):
    (info,) = [info for info in list_methods() if info.name == name]
    assert isinstance(info, MethodInfo)
    assert info.provenance.paper and info.provenance.code and info.provenance.parity
    assert {"scale_dtype", "seed"} <= set(info.config.model_fields)
    for option, field in info.config.model_fields.items():
        assert field.description, f"option {option!r} of {name!r} has no description"
        assert not field.is_required(), f"option {option!r} of {name!r} has no default"


@pytest.mark.parametrize("name", method_names())
def test_a_method_created_without_options_has_its_name_and_defaults(name):
    method = create_method(name)
    assert method.name == name
    assert isinstance(method, method_class(name))
    assert (method.config.scale_dtype, method.config.seed) == ("float16", 0)


def test_the_documented_defaults():
    assert dict(create_method("rtn").config) == {
        "bits": 4, "group_size": 128, "symmetric": False, "scale_dtype": "float16", "seed": 0,
    }  # fmt: skip
    gptq = dict(create_method("gptq").config)
    documented = {"act_order": False, "static_groups": False, "damping": 0.01, "block_size": 128, "faithful": False}
    assert gptq == {**dict(create_method("rtn").config), **documented}


@pytest.mark.parametrize(
    ("typed", "meant"), [("gtpq", "gptq"), ("SAGE_PTQ", "sage-ptq"), ("rtn4", "rtn"), ("fp-16", "fp16")]
)
def test_an_unknown_method_is_refused_with_a_suggestion(typed, meant):
    with pytest.raises(InputError, match=f"unknown method '{typed}'; did you mean .*'{meant}'"):
        create_method(typed)


def test_a_method_name_like_no_other_is_refused_with_all_names():
    with pytest.raises(InputError, match=r"known: .*gptq.*rtn.*sage-ptq"):
        create_method("xyzzy")


def test_an_unknown_option_is_refused_with_a_suggestion():
    with pytest.raises(InputError, match="method 'gptq': unknown option 'group_sise'; did you mean 'group_size'"):
        create_method("gptq", group_sise=64)


@pytest.mark.parametrize("option", ["name", "self", "cls", "bits.bits"])
def test_an_option_of_an_awkward_name_is_refused_like_any_other(option):
    with pytest.raises(InputError, match=f"method 'rtn': unknown option '{option}'"):
        create_method("rtn", **{option: 1})


@pytest.mark.parametrize(
    ("method", "options", "said"),
    [
        ("rtn", {"bits": 0}, "bits=0: .*greater than or equal to 1"),
        ("rtn", {"bits": 9}, "bits=9: .*less than or equal to 8"),
        ("rtn", {"bits": "4"}, "bits='4': .*integer"),
        ("rtn", {"bits": 4.0}, "bits=4.0: .*integer"),
        ("rtn", {"bits": True}, "bits=True: .*integer"),
        ("rtn", {"bits": None}, "bits=None: .*integer"),
        ("rtn", {"group_size": -2}, "group_size=-2"),
        ("rtn", {"symmetric": 1}, "symmetric=1: .*boolean"),
        ("rtn", {"scale_dtype": "float8"}, "scale_dtype='float8': .*'float16', 'bfloat16' or 'float32'"),
        ("rtn", {"seed": -1}, "seed=-1"),
        ("gptq", {"damping": 0.0}, "damping=0.0: .*greater than 0"),
        ("gptq", {"damping": float("nan")}, "damping=nan"),
        ("gptq", {"block_size": 0}, "block_size=0"),
        ("sage-ptq", {"n_lut": 7}, "n_lut=7"),
        ("sage-ptq", {"max_salient": 0.6}, "max_salient=0.6"),
        ("sage-ptq", {"preset": "lama"}, "preset='lama': .*'opt', 'llama', 'qwen', 'deepseek-2bit' or 'deepseek-4bit'"),
        ("sage-ptq", {"preset": ["llama"]}, r"preset=\['llama'\]"),
        ("sage-ptq", {"preset": {}}, "preset={}"),
    ],
)
def test_a_value_out_of_range_is_refused_with_option_and_value(method, options, said):
    with pytest.raises(InputError, match=f"method '{method}': {said}") as refused:
        create_method(method, **options)
    assert "\n" not in str(refused.value)


def test_options_cannot_be_changed_afterwards():
    config = create_method("rtn").config
    with pytest.raises(ValueError, match="frozen"):
        config.bits = 3


# Registering


def test_a_registered_class_can_be_created_by_name():
    cls = register_method("mine")(a_method())
    assert cls.name == "mine"
    assert type(create_method("mine")) is cls
    assert "mine" in method_names()
    assert "mine" in [info.name for info in list_methods()]


def test_the_same_class_can_be_registered_again():
    cls = a_method()
    assert register_method("mine")(register_method("mine")(cls)) is cls


def test_a_name_that_is_taken_is_refused():
    for name in ("gptq", "mine"):
        if name == "mine":
            register_method(name)(a_method())
        with pytest.raises(InputError, match=f"method name '{name}' is taken"):
            register_method(name)(type("Another", (a_method(),), {}))


def test_a_class_of_the_same_name_in_another_module_is_another_class():
    first, second = a_method(__module__="package_one"), a_method(__module__="package_two")
    register_method("mine")(first)
    with pytest.raises(InputError, match="method name 'mine' is taken"):
        register_method("mine")(second)
    assert method_class("mine") is first


@pytest.mark.parametrize(
    "thing",
    [object, dict, MethodConfig, print, a_method().__init__],
    ids=["object", "dict", "config", "function", "method"],
)
def test_what_is_not_a_method_class_is_refused(thing):
    with pytest.raises(InputError, match=r"method 'mine' .*must be a subclass of methods\.QuantizationMethod"):
        register_method("mine")(thing)
    assert "mine" not in method_names()


@pytest.mark.parametrize("provenance", [None, "a paper", {"paper": "x"}])
def test_a_class_without_provenance_is_refused(provenance):
    with pytest.raises(InputError, match="method 'mine': class AMethod has no `provenance`"):
        register_method("mine")(a_method(provenance=provenance))


# Methods of other packages


def test_a_one_file_package_adds_a_method(installed):
    installed("row_mean", PLUGIN, row_mean="row_mean:RowMean")
    assert "row-mean" in method_names()
    assert "row_mean" not in sys.modules  # asking for names imports nothing
    (info,) = [info for info in list_methods() if info.name == "row-mean"]
    assert info.provenance.paper == "a paper of theirs"
    assert "factor" in info.config.model_fields
    method = create_method("row-mean", factor=2.0)
    weight = torch.tensor([[1.0, 3.0], [-1.0, 0.0]])
    assert method.quantize_linear(weight).decode().tolist() == [[4.0, 4.0], [-1.0, -1.0]]
    with pytest.raises(InputError, match="did you mean 'row-mean'"):
        create_method("row-meen")
    with pytest.raises(InputError, match="method 'row-mean': unknown option 'facter'; did you mean 'factor'"):
        create_method("row-mean", facter=2.0)


def test_a_plugin_may_also_use_the_decorator(installed):
    source = PLUGIN.replace("class RowMean(", '@register_method("row-mean")\nclass RowMean(')
    source = source.replace("import MethodConfig,", "import register_method, MethodConfig,")
    installed("row_mean", source, row_mean="row_mean:RowMean")
    assert create_method("row-mean").name == "row-mean"


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("raise RuntimeError('no CUDA here')", "no CUDA here"),
        ("import a_package_that_is_not_there", "a_package_that_is_not_there"),
        ("Broken = = 3", "invalid syntax"),
        ("", "Broken"),
    ],
)
def test_a_plugin_that_cannot_be_imported_is_refused_by_name(installed, source, said):
    installed("broken_plugin", source, broken="broken_plugin:Broken")
    with pytest.raises(InputError, match=f"method 'broken' of 'broken_plugin:Broken' cannot be imported .*{said}"):
        create_method("broken")
    create_method("rtn")  # and the others are not held up


def test_a_plugin_that_is_not_a_method_is_refused_by_name(installed):
    installed("odd_plugin", "Odd = dict", odd="odd_plugin:Odd")
    with pytest.raises(InputError, match=r"method 'odd' .*must be a subclass of methods\.QuantizationMethod"):
        create_method("odd")


def test_a_plugin_cannot_replace_a_method_of_this_project(installed):
    installed("row_mean", PLUGIN, rtn="row_mean:RowMean")
    assert type(create_method("rtn")).__module__ == "methods.rtn"


# Laziness


def test_importing_the_registry_imports_no_method():
    script = """
        import sys
        import methods
        from methods.registry import method_names
        names = method_names()
        heavy = {"gptq", "rtn", "fp16", "sage_ptq", "pb_llm", "billm", "binary", "awq"}
        found = [m for m in sys.modules if m.split(".")[0] == "methods" and heavy & set(m.split("."))]
        found += [m for m in ("sklearn", "transformers", "datasets", "harness") if m in sys.modules]
        assert "gptq" in names
        print(found)
        methods.create_method("gptq")
        assert "methods.gptq" in sys.modules and "methods.sage_ptq" not in sys.modules
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
