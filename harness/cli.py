"""The command line `sagebench`, and the scripts: `scripts/reproduce.py`, which is `sagebench run`, and
`scripts/export_figures.py`.

Exit codes: 0 done; 1 a run failed; 2 bad input, said in one line on stderr; 130 interrupted.
"""

from __future__ import annotations

import argparse
import errno
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from harness.checkpoint import commands as checkpoint
from harness.paper_items import experiment_of, experiments_of_paper
from kernels.errors import InputError, is_disk_full

# A file or folder that the user named, and that cannot be what it should be.
_UNUSABLE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG}


def main(argv: Sequence[str] | None = None) -> int:
    """The console script `sagebench`."""
    parser = _Parser(prog="sagebench", description="Measure low-bit quantization of language models.")
    parser.add_argument("--version", action="version", version=f"sagebench {_version()}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="run|quantize|list|report|...")
    _add_run_arguments(verbs.add_parser("run", help="reproduce tables and figures of the paper"))
    _add_runtime_arguments(verbs.add_parser("decode", help="tokens per second of packed models, beside dense ones"))
    _add_runtime_arguments(verbs.add_parser("memory", help="memory of decoding with packed models"))
    checkpoint.add_commands(verbs, _add_shared_arguments)
    listing = verbs.add_parser("list", help="show what is there")
    listing.add_argument("what", choices=["methods", "models", "corpora", "tasks", "experiments"])
    report = verbs.add_parser("report", help="tables, figures and report.html again from records, running nothing")
    item = report.add_mutually_exclusive_group()
    item.add_argument("--table", type=int, metavar="N", help="one table; everything that was run if not given")
    item.add_argument("--figure", type=int, metavar="N", help="one figure")
    report.add_argument("--out", type=Path, default=Path("results"), help="folder of results (default: results)")
    compare = verbs.add_parser("compare", help="which differences between two runs are more than noise")
    compare.add_argument("keys", nargs=2, metavar="KEY", help="keys of two finished runs")
    compare.add_argument("--out", type=Path, default=Path("results"), help="folder of results (default: results)")
    compare.add_argument("--seed", type=int, default=0, help="seed of the bootstrap (0)")
    return _guarded(lambda: _dispatch(parser.parse_args(argv)))


def reproduce(argv: Sequence[str] | None = None) -> int:
    """The script `reproduce.py`."""
    parser = _Parser(prog="reproduce.py", description="Reproduce tables and figures of the SAGE-PTQ paper.")
    _add_run_arguments(parser)
    return _guarded(lambda: _run(parser.parse_args(argv)))


def check_regression(argv: Sequence[str] | None = None) -> int:
    """The script `check_regression.py`."""
    parser = _Parser(prog="check_regression.py", description="Compare every method with its baseline.")
    parser.add_argument(
        "--baseline", type=Path, default=Path("results/baselines/smollm2.json"), help="(results/baselines/smollm2.json)"
    )
    parser.add_argument("--methods", nargs="+", action="extend", default=[], metavar="X", help="only these methods")
    parser.add_argument("--junit", type=Path, metavar="FILE", help="write the result as JUnit XML too")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="measure N methods at the same time (1)")
    renew = parser.add_mutually_exclusive_group()
    renew.add_argument("--update", action="store_true", help="measure the baseline anew instead of comparing with it")
    renew.add_argument("--widen", action="store_true", help="keep its numbers, widen its tolerances to this machine")
    return _guarded(lambda: _check_regression(parser.parse_args(argv)))


def _check_regression(arguments: argparse.Namespace) -> int:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from rich.console import Console

    from harness import regression
    from harness.preflight import check_file
    from harness.report.regression import show_checks, write_junit

    console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    baseline = regression.load_baseline(arguments.baseline)

    if arguments.workers < 1:
        raise InputError(f"--workers {arguments.workers}: must be at least 1")
    if arguments.workers > 1 and (arguments.update or arguments.widen):
        raise InputError("--workers is for comparing; a baseline is measured by one process")

    if arguments.junit is not None:
        check_file(arguments.junit)
    if arguments.update or arguments.widen:
        check_file(arguments.baseline)

    def watch(name: str) -> None:
        console.print(f"{'measuring' if arguments.workers == 1 else 'measured'} {name}", markup=False)

    if arguments.update or arguments.widen:
        renew = regression.update if arguments.update else regression.widen
        regression.save_baseline(arguments.baseline, renew(baseline, arguments.methods, watch))
        console.print(f"written: {arguments.baseline}", markup=False)
        return 0
    checks = regression.check(baseline, arguments.methods, watch, arguments.workers)
    show_checks(checks, console)
    if arguments.junit is not None:
        write_junit(arguments.junit, checks, arguments.baseline.stem)
    return 1 if any(check.problem for check in checks) else 0


def export_figures(argv: Sequence[str] | None = None) -> int:
    """The script `export_figures.py`."""
    from harness.report.figures.style import VENUES, WIDTHS

    parser = _Parser(prog="export_figures.py", description="Figures from records, in the size and type of a venue.")
    parser.add_argument("--format", default="pdf", help="pdf, svg, png, or several with commas between (default: pdf)")
    parser.add_argument("--style", default="neurips", help=f"{', '.join(VENUES)} (default: neurips)")
    parser.add_argument("--width", default="page", help=f"{' or '.join(WIDTHS)} (default: page)")
    item = parser.add_mutually_exclusive_group()
    item.add_argument("--table", type=int, metavar="N", help="only the figures drawn from this table's runs")
    item.add_argument("--figure", type=int, metavar="N", help="only this figure of the paper")
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder of results (default: results)")
    parser.add_argument("--to", type=Path, help="where to write (default: figures/STYLE-WIDTH below --out)")
    return _guarded(lambda: _export(parser.parse_args(argv)))


def _export(arguments: argparse.Namespace) -> int:
    from harness.report.saved import export_saved

    only = experiment_of(arguments.table, arguments.figure)
    formats = [part for part in arguments.format.split(",") if part]
    for path in export_saved(arguments.out, only, formats, arguments.style, arguments.width, arguments.to):
        print(f"written: {path}")
    return 0


def _add_run_arguments(parser: argparse.ArgumentParser) -> None:
    _add_shared_arguments(parser)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--table", type=int, metavar="N", help="a table of the paper")
    what.add_argument("--figure", type=int, metavar="N", help="a figure of the paper")
    what.add_argument("--all", action="store_true", help="every table and figure of the paper")
    what.add_argument("--experiment", metavar="NAME|FILE", help="an experiment by name, or a YAML file")
    parser.add_argument("--model", action="append", default=[], metavar="M", help="model to run; may be repeated")
    parser.add_argument(
        "--methods", nargs="+", action="extend", default=[], metavar="X",
        help='only rows of these methods; "sage-ptq n_lut 3" is the row of that setting alone',
    )  # fmt: skip
    parser.add_argument(
        "--budgets",
        default="",
        metavar="B,B",
        help="stored bits per weight, for experiments with a row for each (front)",
    )
    parser.add_argument(
        "--corpus", nargs="+", action="extend", default=[], metavar="C", help="evaluate on these corpora or text files"
    )
    parser.add_argument("--windows", type=int, metavar="N", help="evaluate on the first N windows")
    parser.add_argument(
        "--tasks", nargs="+", action="extend", default=[], metavar="T", help="only these zero-shot tasks"
    )
    parser.add_argument(
        "--limit", type=int, metavar="N", help="score the first N examples of each zero-shot task; 0 for all"
    )
    parser.add_argument(
        "--divergence", action="store_true", help="measure KL from the unquantized model beside perplexity"
    )
    parser.add_argument(
        "--synthetic", action="store_true", help="table 5: random weights of the model's shapes, nothing is downloaded"
    )
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder of results (default: results)")
    parser.add_argument("--fresh", action="store_true", help="repeat finished runs")
    parser.add_argument("--save", action="store_true", help="keep packed checkpoints in checkpoints/ below --out")
    parser.add_argument("--dry-run", action="store_true", help="list the runs with their cost, run nothing")
    _add_engine_arguments(parser.add_argument_group("many runs at once"))


def _add_shared_arguments(parser: argparse.ArgumentParser) -> None:
    """What decides the quantized weights, whether they are measured or kept."""
    parser.add_argument(
        "--profile", default="auto", help="embedded, paper or auto (default): where models and texts come from"
    )
    parser.add_argument(
        "--context", type=int, metavar="T", help="tokens of a window and of a calibration sample (2048)"
    )
    parser.add_argument("--calibration-samples", type=int, metavar="N", help="calibration samples")
    parser.add_argument("--calibration-corpus", metavar="C", help="calibrate on this corpus or text file")
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], help="dtype the model is evaluated in")
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda if there is one)")
    parser.add_argument("--seed", type=int, default=0, help="seed of calibration sampling and of methods (0)")
    parser.add_argument(
        "--reparameterize", action="store_true", help="take the weights off the grid of an already quantized source"
    )
    parser.add_argument("--force", action="store_true", help="run even if memory looks too small")


def _add_engine_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--workers", type=int, default=1, metavar="N", help="N runs at a time, each in its own process")
    group.add_argument("--threads", type=int, metavar="T", help="threads of a run (default: its share of the cores)")
    group.add_argument("--shard", metavar="I/N", help="only the I-th of N shares of the runs (array jobs)")
    group.add_argument("--engine", choices=["local", "ray"], default="local", help="this machine, or a Ray cluster")
    group.add_argument("--address", metavar="A", help="of the Ray cluster: auto, host:port or ray://host:port")
    group.add_argument("--gpus-per-run", type=float, metavar="G", help="GPUs that Ray gives a run (1 on CUDA)")
    group.add_argument("--memory-per-run", type=float, metavar="GB", help="memory that Ray reserves for a run")
    group.add_argument("--retries", type=int, metavar="N", help="tries after a run's process died (1; with Ray 3)")


def _add_runtime_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--model", metavar="M", default="smollm2-135m", help="a model, as of `run` (smollm2-135m)")
    what.add_argument(
        "--synthetic", metavar="M", help="a model's shapes with random packed weights, such as llama-2-7b"
    )
    parser.add_argument(
        "--methods", nargs="+", action="extend", default=[], metavar="X", help="only these methods or rows"
    )
    parser.add_argument(
        "--runtime", choices=["resident", "banded", "dense"], default="resident",
        help="all packed weights on the device (default), codes in host memory, or weights decoded once",
    )  # fmt: skip
    parser.add_argument("--band", type=int, metavar="N", help="layers a band of the banded runtime (1)")
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="sequences decoded at once (1)")
    parser.add_argument("--prompt", type=int, default=128, metavar="N", help="tokens of the prompt (128)")
    parser.add_argument("--tokens", type=int, default=64, metavar="N", help="tokens generated a round (64)")
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="timed rounds of each arm (7)")
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], help="dtype of activations")
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda if there is one)")
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder of results (default: results)")
    parser.add_argument("--fresh", action="store_true", help="repeat finished runs")


def _dispatch(arguments: argparse.Namespace) -> int:
    if arguments.verb == "run":
        return _run(arguments)
    if arguments.verb in checkpoint.VERBS:
        if arguments.verb == "quantize":
            _check_seed(arguments.seed)
        return checkpoint.run_command(arguments)
    if arguments.verb in ("decode", "memory"):
        from harness.preflight import check_output
        from harness.records import RecordStore
        from harness.runtime.command import run_command

        check_output(arguments.out, RecordStore(arguments.out / "runs"))
        return run_command(arguments.verb, arguments)
    if arguments.verb == "list":
        from harness.listing import show

        show(arguments.what)
        return 0
    if arguments.verb == "compare":
        from harness.compare import show_comparison

        _check_seed(arguments.seed)
        show_comparison(arguments.keys[0], arguments.keys[1], arguments.out, arguments.seed)
        return 0
    from harness.report.saved import render_saved

    for path in render_saved(arguments.out, experiment_of(arguments.table, arguments.figure)):
        print(f"written: {path}")
    return 0


def _run(arguments: argparse.Namespace) -> int:
    name = experiment_of(arguments.table, arguments.figure)
    _check_seed(arguments.seed)
    if arguments.limit is not None and arguments.limit < 0:
        raise InputError(f"--limit {arguments.limit}: must be 1 or more, or 0 for all examples")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from harness.reproduce import run_experiments  # imports torch; the checks above answer at once

    if arguments.all:
        return run_experiments(list(dict.fromkeys(experiments_of_paper().values())), arguments)
    return run_experiments([name or arguments.experiment], arguments)


def _check_seed(seed: int) -> None:
    largest = 2**32 - 1  # methods.base.MAX_SEED, without importing torch
    if not 0 <= seed <= largest:
        raise InputError(f"--seed {seed}: must be 0 or more, up to {largest}")


class _Parser(argparse.ArgumentParser):
    """Errors in one line, exit code 2."""

    def error(self, message: str) -> None:  # type: ignore[override]
        raise InputError(f"{message} (see {self.prog} --help)")


def _guarded(command) -> int:  # type: ignore[no-untyped-def]
    try:
        return command()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; finished runs are kept, the same command goes on from there", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 1
    except OSError as error:
        if is_disk_full(error):
            said = f"no disk space left ({error.filename or 'unknown file'}); finished runs are kept"
        elif error.filename is not None and error.errno in _UNUSABLE:
            said = f"{error.filename}: {error.strerror}; it cannot be used here"
        else:
            raise
        print(f"error: {said}", file=sys.stderr)
        return 2


def _version() -> str:
    from kernels import __version__

    return __version__
