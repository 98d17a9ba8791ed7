"""Compilation on demand: kept by content, and absent rather than wrong."""

import shutil

import pytest

from kernels.native import native_library

SOURCE = 'extern "C" int answer() { return %d; }\n'

needs_compiler = pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SAGEBENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("SAGEBENCH_NATIVE", raising=False)
    native_library.cache_clear()
    yield
    native_library.cache_clear()


@needs_compiler
def test_an_edited_source_is_compiled_anew_and_an_unchanged_one_is_not(tmp_path):
    source = tmp_path / "answer.cpp"
    source.write_text(SOURCE % 41)
    assert native_library(source).answer() == 41
    (first,) = (tmp_path / "cache" / "native").iterdir()
    written = first.stat().st_mtime_ns
    native_library.cache_clear()
    assert native_library(source).answer() == 41
    assert first.stat().st_mtime_ns == written
    source.write_text(SOURCE % 42)
    native_library.cache_clear()
    assert native_library(source).answer() == 42
    assert len(list((tmp_path / "cache" / "native").iterdir())) == 2


@needs_compiler
def test_a_source_that_does_not_compile_is_a_warning_that_names_it(tmp_path):
    source = tmp_path / "broken.cpp"
    source.write_text("int f( {\n")
    with pytest.warns(UserWarning, match=r"broken\.cpp was not compiled"):
        assert native_library(source) is None


@pytest.mark.parametrize("reason", ["switched off", "no compiler"])
def test_without_a_compiler_there_is_no_library(reason, tmp_path, monkeypatch):
    source = tmp_path / "answer.cpp"
    source.write_text(SOURCE % 41)
    if reason == "switched off":
        monkeypatch.setenv("SAGEBENCH_NATIVE", "0")
    else:
        monkeypatch.setenv("PATH", str(tmp_path))
    assert native_library(source) is None
