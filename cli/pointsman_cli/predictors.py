"""`pointsman predictor train` and `pointsman predictor evaluate`."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pointsman_cli.extras import needs_extra
from pointsman_common.files import new_file, readable_file, told
from pointsman_common.wording import counted

if TYPE_CHECKING:
    from rich.console import Console

    from pointsman_learning.evaluation.statistics import Interval
    from pointsman_learning.predictors.judge import Judgement, LengthJudgement
    from pointsman_learning.workloads import Corpus
    from pointsman_learning.workloads.corpus import Split

app = typer.Typer(help="Predictors of each expert's quality from the prompt.", no_args_is_help=True)

QualityData = Annotated[
    Path | None,
    typer.Option(
        help="Scores of your own: CSV prompt,expert,score,output_tokens, or LLMRouter's JSON."
        " [default: the training split of LLMRouter's]",
        callback=readable_file,
    ),
]


@app.command()
def train(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="File to write, ONNX.", callback=new_file)
    ],
    quality_data: QualityData = None,
    kind: Annotated[
        str,
        typer.Option(
            help="ngram (microseconds; the kind that the policy server serves), embedding or"
            " combined (milliseconds; need the sentence encoder)."
        ),
    ] = "ngram",
    seed: Annotated[int, typer.Option(help="Seed of folds and clusters.")] = 0,
) -> None:
    """Train a predictor; the same data, seed and versions give equal weights, to rounding.

    Its metadata tells how it does out of fold, on prompts that it was not trained on.
    """
    with _learning():
        import numpy as np

        from pointsman_learning.predictors import out_of_fold, training
        from pointsman_learning.predictors.judge import judge
        from pointsman_learning.predictors.minilm import embed

        if kind not in training.KINDS:
            raise ValueError(f"--kind must be one of {', '.join(training.KINDS)} (got {kind!r})")
        known = next(one for one in training.KINDS if one == kind)
        corpus = _corpus(quality_data)
        said = out_of_fold(corpus, kind=known, embed=embed, seed=seed)
        rows = np.isfinite(corpus.scores).all(axis=1)
        metrics: dict[str, Any] = {}
        if rows.any():
            best = int(np.nanmean(corpus.scores, axis=0).argmax())
            found = judge(kind, said[rows], corpus.scores[rows], best_single=best)
            metrics = {"out_of_fold": _as_dict(found)}
        content = training.train(corpus, kind=known, embed=embed, seed=seed, metrics=metrics)
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_bytes(content)
        experts = counted(len(corpus.experts), "expert")
        typer.echo(f"{output}: {len(content):,} bytes, {experts}", err=True)


@app.command()
def evaluate(
    split: Annotated[str, typer.Option(help="Prompts to judge by: test or validation.")] = "test",
    *,
    predictor: Annotated[
        Path | None,
        typer.Option(
            help="Judge this trained predictor, instead of fitting all kinds.",
            callback=readable_file,
        ),
    ] = None,
    quality_data: Annotated[
        Path | None,
        typer.Option(
            help="Judge by scores of your own, on prompts that the predictor was not trained on."
            " Without --predictor: the built-in one.",
            callback=readable_file,
        ),
    ] = None,
    embeddings: Annotated[
        bool, typer.Option(help="Also judge predictors on sentence embeddings.")
    ] = True,
    unseen_tasks: Annotated[
        bool, typer.Option("--unseen-tasks", help="Also leave out one task after the other.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the result as JSON on standard output.")
    ] = False,
) -> None:
    """Compare predictors on held-out prompts, from random choice to the oracle."""
    with _learning():
        from rich.console import Console

        from pointsman_learning.predictors import comparison
        from pointsman_learning.workloads import DataFolder, load_corpus
        from pointsman_learning.workloads.corpus import check_split

        console = Console(stderr=True)
        if predictor or quality_data:
            _evaluate_one(predictor, quality_data, split=check_split(split), as_json=as_json)
            return
        held_out = load_corpus(check_split(split))
        known = load_corpus("train")
        with console.status("fitting") as status:
            tables = comparison.compare(
                known, held_out, embeddings=embeddings, on_step=status.update
            )
            if unseen_tasks:
                status.update("leaving tasks out")
                for name, rows in comparison.unseen_tasks(known).items():
                    tables[f"{name}, unseen tasks of the training split"] = rows
            lengths = comparison.measured_lengths(DataFolder.require())
    _print(tables, lengths, split=split, prompts=len(held_out), as_json=as_json)


def _evaluate_one(
    predictor: Path | None, quality_data: Path | None, *, split: "Split", as_json: bool
) -> None:
    from pointsman_core.predictors import Artefact, builtin_artefact
    from pointsman_learning.predictors import comparison
    from pointsman_learning.workloads import load_corpus, user_corpus

    artefact = builtin_artefact()
    if predictor is not None:
        artefact = Artefact(predictor.read_bytes(), source=predictor.name)
    held_out = load_corpus(split) if quality_data is None else user_corpus(quality_data)
    where = f"{split} split" if quality_data is None else quality_data.name
    tables = {
        f"{name}, {where}": rows
        for name, rows in comparison.compare_one(artefact, held_out).items()
    }
    _print(tables, None, split=where, prompts=len(held_out), as_json=as_json)


@contextlib.contextmanager
def _learning() -> Iterator[None]:
    """Tell what is missing or wrong in one line."""
    try:
        with needs_extra():
            yield
    except (ValueError, OSError) as error:
        typer.echo(f"error: {told(error)}", err=True)
        raise typer.Exit(1) from None


def _corpus(quality_data: Path | None) -> "Corpus":
    from pointsman_learning.workloads import load_corpus, user_corpus

    return load_corpus("train") if quality_data is None else user_corpus(quality_data)


def _as_dict(value: object) -> dict[str, Any]:
    import dataclasses

    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        raise TypeError(type(value).__name__)
    found = dataclasses.asdict(value)
    speeds = found.pop("microseconds", None)
    if speeds:
        found["microseconds"] = {str(length): one for length, one in speeds.items()}
    return found


def _print(
    tables: "dict[str, list[Judgement]]",
    lengths: "LengthJudgement | None",
    *,
    split: str,
    prompts: int,
    as_json: bool,
) -> None:
    from rich.console import Console

    if as_json:
        import orjson

        report = {
            "split": split,
            "prompts": prompts,
            "experts": {name: [_as_dict(one) for one in rows] for name, rows in tables.items()},
        }
        if lengths is not None:
            report["output_tokens"] = _as_dict(lengths)
        typer.echo(orjson.dumps(report, option=orjson.OPT_INDENT_2).decode())
        return
    console = Console()
    for name, rows in tables.items():
        _print_table(console, _title(name, split), rows)
    if lengths is None:
        return
    console.print(
        f"Output length, {lengths.answers} real answers to Natural Questions, five-fold: mean"
        f" absolute error of the logarithm {_interval(lengths.error)}, with the expert's median"
        f" alone {_interval(lengths.constant_error)}; gain {_interval(lengths.gain)}"
    )


def _title(name: str, split: str) -> str:
    experts, _, where = name.partition(", ")
    return f"{experts} experts, {where or f'{split} split'}"


def _print_table(console: "Console", title: str, rows: "Sequence[Judgement]") -> None:
    from rich.table import Table

    table = Table(title=title)
    table.add_column("method")
    for heading in ("chosen", "over best single", "regret", "Brier", "ECE", "rank", "µs"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            row.method,
            _interval(row.chosen),
            _interval(row.gain),
            f"{row.regret:.3f}",
            *(_number(one) for one in (row.brier, row.calibration_error, row.rank_correlation)),
            " / ".join(f"{one:,.0f}" for one in row.microseconds.values()),
        )
    console.print(table)


def _interval(value: "Interval") -> str:
    return f"{value.mean:.3f} ({value.low:.3f} to {value.high:.3f})"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
