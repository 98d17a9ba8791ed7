"""What can be known to be wrong before anything long begins: shapes, calibration size, disk, memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryFile

from harness.cache import cache_folder, cache_limit, require_space
from harness.calibration import check_sample_size
from harness.estimate import estimate
from harness.memory import available_memory
from harness.models.source import block_matrices, resolve_model, tensor_shapes
from harness.planning import Plan
from harness.records import RecordStore
from harness.spec import STORED, RunSpec
from kernels.atomic import remove_stale_parts
from kernels.errors import InputError
from methods import create_method

_RECORD_BYTES = 20_000_000


def check_output(out: Path, store: RecordStore) -> None:
    """Raise InputError if records cannot be written below `out`, there can be no cache, or the disk is full."""
    try:
        store.folder.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=store.folder).close()  # a folder that is there may still be read-only
    except OSError as error:
        raise InputError(f"--out {out} cannot be written ({error.strerror})") from error
    remove_stale_parts(store.folder)
    require_space(store.folder, _RECORD_BYTES, "records")
    cache_limit(0)
    cache_folder()


def check_file(file: Path) -> None:
    """Raise InputError now if `file` could not be written in an hour."""
    if file.is_dir():
        raise InputError(f"{file} cannot be written (it is a folder)")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=file.parent).close()
    except OSError as error:
        raise InputError(f"{file} cannot be written ({error.strerror})") from error


def check_methods(plan: Plan, store: RecordStore, *, fresh: bool = False) -> None:
    """Raise InputError if a planned method does not suit a layer of its model, or calibrates on too few tokens.

    fresh: finished runs are repeated.
    """
    for spec in plan.runs:
        synthetic = any(getattr(part, "synthetic", False) for part in spec.evaluations)
        wanted = fresh or store.load(spec.key) is None
        if wanted and spec.method.name != STORED and not synthetic:
            check_method(spec)


def check_method(spec: RunSpec) -> None:
    """As `check_methods`, for one run.

    Shapes come from the headers of local files; a model that is still on the hub is checked when it is loaded.
    """
    shapes = block_matrices(tensor_shapes(resolve_model(spec.model.name)))
    method = create_method(spec.method.name, **spec.method.options)
    for name, (out_features, in_features) in shapes.items():
        try:
            method.check_shape(out_features, in_features)
        except InputError as error:
            raise InputError(f"method {method.name!r}, {name}: {error}") from None
    if spec.calibration is not None and shapes:
        widest = max(in_features for _, in_features in shapes.values())
        check_sample_size(spec.calibration.samples, spec.calibration.context, widest)


def check_memory(
    plan: Plan, store: RecordStore, *, asked_for: bool, force: bool, at_once: int = 1, fresh: bool = False
) -> None:
    """Take runs that cannot fit in memory out of `plan`; their rows say why.

    asked_for: the user named the models; then the first that does not fit raises InputError instead. force: neither.
    at_once: runs that share host memory. fresh: finished runs are repeated.
    """
    if force:
        return
    for spec in list(plan.runs):
        finished = not fresh and store.load(spec.key) is not None
        needs = None if finished else lacking_memory(spec, at_once)
        if needs is None:
            continue
        if asked_for:
            raise InputError(f"{spec.describe()} {needs}; --force runs it all the same")
        plan.runs.remove(spec)
        rows = (
            replace(row, run_key=None, note=f"not run: {needs}") if row.run_key == spec.key else row
            for row in plan.table.rows
        )
        plan.table = replace(plan.table, rows=tuple(rows))
    # Without its reference a quantized run does not count.
    kept = {spec.key for spec in plan.runs}
    plan.runs = [spec for spec in plan.runs if plan.references.get(spec.key, spec.key) in kept]


def lacking_memory(spec: RunSpec, at_once: int = 1) -> str | None:
    """What `spec` needs and what is free, if it cannot fit in the memory of this machine beside at_once - 1 others."""
    cost, free = estimate(spec).memory_bytes, available_memory(spec.model.device)
    if spec.model.device == "cpu":
        free //= at_once
    return None if cost <= free else f"needs about {cost / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free"
