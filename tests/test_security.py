"""What is never done with files from elsewhere, looked up in the source itself."""

import ast
from pathlib import Path

import pytest

_ROOT = Path(__file__).resolve().parents[1]
SOURCES = [path for floor in ("kernels", "methods", "harness", "scripts") for path in (_ROOT / floor).rglob("*.py")]
# Modules that execute what they read, and calls that do.
UNPICKLERS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
FORBIDDEN = {("torch", "load"), ("yaml", "load"), ("yaml", "unsafe_load"), ("numpy", "load"), ("np", "load")}
ARCHIVES = {"extract", "extractall", "unpack_archive"}


def calls(path):
    return [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(_ROOT)))
def test_nothing_is_unpickled_extracted_by_name_or_evaluated(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        assert not {name.split(".")[0] for name in names} & UNPICKLERS
    for call in calls(path):
        function = call.func
        if isinstance(function, ast.Attribute):
            assert function.attr not in ARCHIVES
            if isinstance(function.value, ast.Name):
                assert (function.value.id, function.attr) not in FORBIDDEN
        elif isinstance(function, ast.Name):
            assert function.id not in {"eval", "exec"}


def test_code_of_a_model_is_never_executed():
    given = [
        keyword.value
        for path in SOURCES
        for call in calls(path)
        for keyword in call.keywords
        if keyword.arg == "trust_remote_code"
    ]
    assert given
    assert all(isinstance(value, ast.Constant) and value.value is False for value in given)


def test_a_shell_is_never_asked():
    keywords = [(path, k) for path in SOURCES for call in calls(path) for k in call.keywords if k.arg == "shell"]
    assert not keywords
