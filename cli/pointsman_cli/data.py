"""`pointsman data fetch` and `pointsman data show`: the public data of the laboratory."""

import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pointsman_cli.extras import needs_extra
from pointsman_common.data_folder import DATA_VARIABLE, TRACES, user_folder
from pointsman_common.files import writable_folder

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

    from pointsman_learning.workloads.folder import DataFile, DataFolder

ATTRIBUTION = (
    "Azure LLM inference trace 2023: cite Splitwise, ISCA 2024. Scores: LLMRouter, U Lab @UIUC."
)

app = typer.Typer(
    help="Public data for training and evaluation: arrival traces, and prompts with scores.",
    no_args_is_help=True,
)


@app.command()
def fetch(
    to: Annotated[
        Path | None,
        typer.Option(
            "--to",
            metavar="DIR",
            help="Data folder. [default: $POINTSMAN_DATA, else ~/.local/share/pointsman]",
            callback=writable_folder,
        ),
    ] = None,
) -> None:
    """Download the public data, about 11 MB, from its homes on GitHub.

    Files that are there are kept, broken downloads go on where they broke, and every file is
    checked against a pinned SHA-256. The exit status is 1 when a file could not be had.
    """
    with needs_extra():
        import httpx  # noqa: F401 - the extra's part that is needed here

        from pointsman_learning.workloads.fetch import FetchError, fetch_file, http_client
    from rich.console import Console

    from pointsman_learning.workloads.folder import FILES

    folder = (to or _default_folder()).expanduser()
    console = Console(stderr=True)
    failed = False
    with _progress(console) as progress, http_client() as client:
        for file in FILES:
            task = progress.add_task(Path(file.path).name, total=file.size, how="")
            show_bytes = partial(_show_bytes, progress, task)
            try:
                how = fetch_file(file, folder, client, on_progress=show_bytes)
            except FetchError as error:
                failed = True
                progress.update(task, how="[red]failed[/red]")
                console.print(f"error: {error}", markup=False, highlight=False, soft_wrap=True)
            else:
                progress.update(task, how=how.value)
    if failed:
        raise typer.Exit(1)
    typer.echo(f"All {len(FILES)} files are in {folder}.", err=True)
    if not _is_found(folder):
        typer.echo(f"To use them: export POINTSMAN_DATA={folder.resolve()}", err=True)


def _show_bytes(progress: "Progress", task: "TaskID", done: int) -> None:
    progress.update(task, completed=done)


def _default_folder() -> Path:
    named = os.environ.get(DATA_VARIABLE)
    return Path(named) if named else user_folder()


def _is_found(folder: Path) -> bool:
    """Whether the laboratory will look there by itself."""
    from pointsman_learning.workloads.folder import DataFolder

    found = DataFolder.find()
    return found is not None and found.path.resolve() == folder.resolve()


def _progress(console: "Console") -> "Progress":
    """A bar for each file, on standard error."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        DownloadColumn(),
        TextColumn("{task.fields[how]}"),
        console=console,
    )


@app.command()
def show(
    folder: Annotated[
        Path | None,
        typer.Argument(metavar="DIR", help="Data folder. [default: where it is found]"),
    ] = None,
    *,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the result as JSON on standard output.")
    ] = False,
) -> None:
    """Tell which data is there, how much of it, whose it is, and how it is split.

    The exit status is 1 when there is none, or a file is not the pinned one.
    """
    from pointsman_core.workload import WorkloadError

    with needs_extra():
        import pointsman_learning.workloads  # noqa: F401 - the simulator beside it needs numba

    try:
        found = _data_folder(folder)
        report = _report(found)
    except WorkloadError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None
    if as_json:
        import orjson

        typer.echo(orjson.dumps(report, option=orjson.OPT_INDENT_2).decode())
    else:
        _show(report)
    if any(file["state"] == "differs" for file in report["files"]):
        raise typer.Exit(1)


def _data_folder(named: Path | None) -> "DataFolder":
    from pointsman_core.workload import WorkloadError
    from pointsman_learning.workloads.folder import DataFolder

    if named is None:
        return DataFolder.require()
    if not named.is_dir():
        raise WorkloadError("is not a folder", source=str(named))
    return DataFolder(named)


def _report(folder: "DataFolder") -> dict[str, Any]:
    from pointsman_learning.workloads.folder import FILES

    files = [_file(file, folder) for file in FILES]
    return {"folder": str(folder.path), "files": files, "splits": _splits(folder, files)}


def _file(file: "DataFile", folder: "DataFolder") -> dict[str, Any]:
    from pointsman_learning.workloads.folder import digest

    path = folder.path / file.path
    state = "missing"
    if path.is_file():
        state = "pinned" if digest(path) == file.sha256 else "differs"
    return {
        "path": file.path,
        "state": state,
        "rows": _rows(path) if state != "missing" else None,
        "what": file.what,
        "licence": file.licence,
        "url": file.url,
    }


def _rows(path: Path) -> int | None:
    """Rows of a CSV or JSON file; None when it cannot be read."""
    import orjson

    content = path.read_bytes()
    if path.suffix == ".json":
        try:
            entries = orjson.loads(content)
        except orjson.JSONDecodeError:
            return None
        return len(entries) if isinstance(entries, list) else None
    lines = sum(1 for line in content.split(b"\n") if line.strip())
    return lines - 1 if path.suffix == ".csv" else lines


def _splits(folder: "DataFolder", files: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Requests or prompts in each split of what is there."""
    from pointsman_learning.workloads.arrivals import arrival_process
    from pointsman_learning.workloads.corpus import SPLITS, load_corpus

    there = {file["path"] for file in files if file["state"] == "pinned"}
    found: list[dict[str, Any]] = []
    for name, path in TRACES.items():
        if path in there:
            parts = [(s, arrival_process(name, split=s, folder=folder).trace) for s in SPLITS]
            sizes = {str(split): len(part) for split, part in parts if part is not None}
            found.append({"what": f"{name} (requests, by time)", **sizes})
    if {file["path"] for file in files} - set(TRACES.values()) <= there:
        counts = {str(split): len(load_corpus(split, folder)) for split in SPLITS}
        found.append({"what": "LLMRouter scores (prompts, de-duplicated)", **counts})
    return found


def _show(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    files = Table(title=f"Data in {report['folder']}", title_justify="left", caption=ATTRIBUTION)
    files.add_column("File", no_wrap=True)
    files.add_column("State", no_wrap=True)
    files.add_column("Rows", justify="right", no_wrap=True)
    files.add_column("What", overflow="fold")
    files.add_column("Licence", no_wrap=True)
    for file in report["files"]:
        colour = {"pinned": "green", "missing": "yellow", "differs": "red"}[file["state"]]
        rows = "" if file["rows"] is None else f"{file['rows']:,}"
        state = f"[{colour}]{file['state']}[/{colour}]"
        files.add_row(Path(file["path"]).name, state, rows, file["what"], file["licence"])
    splits = Table(title="Splits", title_justify="left")
    for column in ("What", "train", "validation", "test"):
        splits.add_column(column, justify="left" if column == "What" else "right")
    for split in report["splits"]:
        cells = [f"{split[name]:,}" for name in ("train", "validation", "test")]
        splits.add_row(split["what"], *cells)
    console = Console()
    console.print(files)
    if report["splits"]:
        console.print(splits)
