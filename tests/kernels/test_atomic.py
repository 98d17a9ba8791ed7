"""Files are whole or absent, whatever happens while they are written."""

import os
import signal
import subprocess
import sys
import textwrap

import pytest

from kernels.atomic import atomic_folder, atomic_path, remove_stale_parts, write_text


def names(folder):
    return sorted(entry.name for entry in folder.iterdir())


def test_text_is_written_as_utf8(tmp_path):
    write_text(tmp_path / "note.txt", "perplexity 20.112 ± 0.005\n")
    assert (tmp_path / "note.txt").read_bytes() == "perplexity 20.112 ± 0.005\n".encode()
    assert names(tmp_path) == ["note.txt"]


def test_an_old_file_is_replaced(tmp_path):
    target = tmp_path / "record.json"
    write_text(target, "a long old text")
    write_text(target, "new")
    assert target.read_text() == "new"
    assert names(tmp_path) == ["record.json"]


def test_missing_folders_are_made(tmp_path):
    write_text(tmp_path / "runs" / "1" / "record.json", "{}")
    assert (tmp_path / "runs" / "1" / "record.json").read_text() == "{}"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_an_error_while_writing_leaves_the_old_file_and_nothing_else(tmp_path, error):
    target = tmp_path / "record.json"
    target.write_text("old")
    with pytest.raises(error), atomic_path(target) as part:
        part.write_text("half of the n")
        raise error
    assert target.read_text() == "old"
    assert names(tmp_path) == ["record.json"]


def test_an_error_while_writing_a_new_file_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), atomic_path(tmp_path / "record.json") as part:
        part.write_text("half")
        raise RuntimeError
    assert names(tmp_path) == []


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, call):
    target = tmp_path / "record.json"
    target.write_text("old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, call, full)
    with pytest.raises(OSError, match="No space left"):
        write_text(target, "new")
    monkeypatch.undo()
    assert target.read_text() == "old"
    assert names(tmp_path) == ["record.json"]


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this system")
def test_a_killed_process_leaves_the_old_file_under_its_name(tmp_path):
    target = tmp_path / "record.json"
    target.write_text("old")
    script = f"""
        import os, signal
        from pathlib import Path
        from kernels.atomic import atomic_path
        with atomic_path(Path({str(target)!r})) as part:
            part.write_text("half of the n")
            os.kill(os.getpid(), signal.SIGKILL)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert target.read_text() == "old"
    # What a killed process was writing is hidden and named as unfinished; the next write is not disturbed by it.
    assert all(name.startswith(".record.json.") and name.endswith(".part") for name in names(tmp_path)[:-1])
    write_text(target, "new")
    assert target.read_text() == "new"


def test_the_target_is_not_touched_before_the_end(tmp_path):
    target = tmp_path / "record.json"
    target.write_text("old")
    with atomic_path(target) as part:
        part.write_text("new")
        assert part.parent == target.parent  # a rename across file systems is a copy
        assert target.read_text() == "old"
    assert target.read_text() == "new"


def test_two_writers_do_not_share_a_partial_file(tmp_path):
    target = tmp_path / "record.json"
    with atomic_path(target) as first, atomic_path(target) as second:
        first.write_text("first")
        second.write_text("second")
        assert first != second
    assert target.read_text() == "first"  # left last
    assert names(tmp_path) == ["record.json"]


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX systems")
def test_the_file_gets_the_permissions_that_open_gives(tmp_path):
    old = os.umask(0o027)
    try:
        write_text(tmp_path / "record.json", "{}")
        assert (tmp_path / "record.json").stat().st_mode & 0o777 == 0o640
        assert os.umask(0o027) == 0o027  # and the process keeps its umask
    finally:
        os.umask(old)


def test_what_killed_processes_left_is_removed_and_what_others_write_now_is_not(tmp_path):
    for name in (".record.json.abc.part", ".record.json.def.part", "record.json"):
        (tmp_path / name).write_text("x")
    then = (tmp_path / "record.json").stat().st_mtime - 7200
    for name in (".record.json.abc.part", "record.json"):
        os.utime(tmp_path / name, (then, then))
    remove_stale_parts(tmp_path)
    assert names(tmp_path) == [".record.json.def.part", "record.json"]
    remove_stale_parts(tmp_path / "gone")


def test_a_folder_appears_whole_with_the_permissions_that_mkdir_gives(tmp_path):
    (tmp_path / "model").mkdir()  # an empty one is no hindrance
    old = os.umask(0o027)
    try:
        with atomic_folder(tmp_path / "model") as scratch:
            (scratch / "a").write_text("a")
            (scratch / "more").mkdir()
            (scratch / "more" / "b").write_text("b")
            assert names(tmp_path / "model") == []
    finally:
        os.umask(old)
    assert names(tmp_path) == ["model"]
    found = {path.name: path.stat().st_mode & 0o777 for path in [tmp_path / "model", *tmp_path.rglob("model/*")]}
    assert found == {"model": 0o750, "a": 0o640, "more": 0o750}
    assert (tmp_path / "model" / "more" / "b").read_text() == "b"


def test_an_error_while_a_folder_is_written_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "model") as scratch:
        (scratch / "a").write_text("a")
        raise KeyboardInterrupt
    assert names(tmp_path) == []


def test_a_folder_that_another_process_has_made_meanwhile_stays(tmp_path):
    with pytest.raises(OSError), atomic_folder(tmp_path / "model") as scratch:
        (scratch / "a").write_text("mine")
        (tmp_path / "model").mkdir()
        (tmp_path / "model" / "a").write_text("theirs")
    assert (tmp_path / "model" / "a").read_text() == "theirs"
    assert names(tmp_path) == ["model"]


def test_a_killed_process_leaves_no_folder_under_the_name_and_the_next_one_clears_up(tmp_path):
    script = f"""
        import os, signal
        from pathlib import Path
        from kernels.atomic import atomic_folder
        with atomic_folder(Path({str(tmp_path / "model")!r})) as scratch:
            (scratch / "a").write_text("half of the m")
            os.kill(os.getpid(), signal.SIGKILL)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=False)
    (left,) = names(tmp_path)
    os.utime(tmp_path / left, (0, 0))
    with atomic_folder(tmp_path / "model") as scratch:
        (scratch / "a").write_text("whole")
    assert names(tmp_path) == ["model"]


def test_folders_that_killed_processes_left_are_removed_those_of_one_target_if_asked(tmp_path):
    mine, others, young = (tmp_path / f".{name}.part" for name in ("mine.abc", "others.abc", "mine.def"))
    for folder in (mine, others, young):
        folder.mkdir()
        (folder / "model.safetensors").write_text("x")
    for folder in (mine, others):
        os.utime(folder, (0, 0))
    remove_stale_parts(tmp_path, name="mine")
    assert names(tmp_path) == [young.name, others.name]
    remove_stale_parts(tmp_path)
    assert names(tmp_path) == [young.name]
