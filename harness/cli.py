"""The command line: `sagebench run | decode | memory | list | report | compare`, and `scripts/reproduce.py`, which is
`sagebench run`.

Exit codes: 0 done; 1 a run failed; 2 bad input, said in one line on stderr; 130 interrupted.
"""

from __future__ import annotations

import argparse
import errno
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from kernels.errors import InputError

_TABLES = (1, 2, 4)


def main(argv: Sequence[str] | None = None) -> int:
    """The console script `sagebench`."""
    parser = _Parser(prog="sagebench", description="Measure low-bit quantization of language models.")
    parser.add_argument("--version", action="version", version=f"sagebench {_version()}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="run|decode|memory|list|report|compare")
    _add_run_arguments(verbs.add_parser("run", help="reproduce a table of the paper"))
    _add_runtime_arguments(verbs.add_parser("decode", help="tokens per second of packed models, beside dense ones"))
    _add_runtime_arguments(verbs.add_parser("memory", help="memory of decoding with packed models"))
    listing = verbs.add_parser("list", help="show what is there")
    listing.add_argument("what", choices=["methods", "models", "corpora", "tasks", "experiments"])
    report = verbs.add_parser("report", help="render tables again from their records, without running anything")
    report.add_argument("--table", type=int, metavar="N", help="one table; all that were run if not given")
    report.add_argument("--out", type=Path, default=Path("results"), help="folder of results (default: results)")
    compare = verbs.add_parser("compare", help="which differences between two runs are more than noise")
    compare.add_argument("keys", nargs=2, metavar="KEY", help="keys of two finished runs")
    compare.add_argument("--out", type=Path, default=Path("results"), help="folder of results (default: results)")
    compare.add_argument("--seed", type=int, default=0, help="seed of the bootstrap (0)")
    return _guarded(lambda: _dispatch(parser.parse_args(argv)))


def reproduce(argv: Sequence[str] | None = None) -> int:
    """The script `reproduce.py`."""
    parser = _Parser(prog="reproduce.py", description="Reproduce a table of the SAGE-PTQ paper.")
    _add_run_arguments(parser)
    return _guarded(lambda: _run(parser.parse_args(argv)))


def _add_run_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--table", type=int, metavar="N", help=f"table of the paper: {', '.join(map(str, _TABLES))}")
    what.add_argument("--experiment", metavar="NAME|FILE", help="an experiment by name, or a YAML file")
    parser.add_argument(
        "--profile", default="auto", help="embedded, paper or auto (default): where models and texts come from"
    )
    parser.add_argument("--model", action="append", default=[], metavar="M", help="model to run; may be repeated")
    parser.add_argument("--methods", nargs="+", default=[], metavar="X", help="only rows of these methods")
    parser.add_argument("--corpus", nargs="+", default=[], metavar="C", help="evaluate on these corpora or text files")
    parser.add_argument("--windows", type=int, metavar="N", help="evaluate on the first N windows")
    parser.add_argument("--tasks", nargs="+", default=[], metavar="T", help="only these zero-shot tasks")
    parser.add_argument(
        "--limit", type=int, metavar="N", help="score the first N examples of each zero-shot task; 0 for all"
    )
    parser.add_argument(
        "--divergence", action="store_true", help="measure KL from the unquantized model beside perplexity"
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
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder of results (default: results)")
    parser.add_argument("--fresh", action="store_true", help="repeat finished runs")
    parser.add_argument("--force", action="store_true", help="run even if memory looks too small")
    parser.add_argument("--dry-run", action="store_true", help="list the runs with their cost, run nothing")


def _add_runtime_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--model", metavar="M", default="smollm2-135m", help="a model, as of `run` (smollm2-135m)")
    what.add_argument(
        "--synthetic", metavar="M", help="a model's shapes with random packed weights, such as llama-2-7b"
    )
    parser.add_argument("--methods", nargs="+", default=[], metavar="X", help="only these methods or rows")
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
    if arguments.verb in ("decode", "memory"):
        from harness.runtime.command import run_command

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

    render_saved(arguments.out, None if arguments.table is None else f"table{arguments.table}")
    return 0


def _run(arguments: argparse.Namespace) -> int:
    if arguments.table is not None and arguments.table not in _TABLES:
        raise InputError(f"table {arguments.table} is unknown; known: {', '.join(map(str, _TABLES))}")
    _check_seed(arguments.seed)
    if arguments.limit is not None and arguments.limit < 0:
        raise InputError(f"--limit {arguments.limit}: must be 1 or more, or 0 for all examples")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from harness.reproduce import run_experiment  # imports torch; the checks above answer at once

    name = arguments.experiment if arguments.table is None else f"table{arguments.table}"
    return run_experiment(name, arguments)


def _check_seed(seed: int) -> None:
    if seed < 0:
        raise InputError(f"--seed {seed}: must be 0 or more")


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
        if error.errno != errno.ENOSPC:
            raise
        print(
            f"error: no disk space left ({error.filename or 'unknown file'}); finished runs are kept", file=sys.stderr
        )
        return 2


def _version() -> str:
    from kernels import __version__

    return __version__
