"""``pointsman model-card``: what a trained model is and how it does, as Markdown."""

from pathlib import Path
from typing import Annotated

import typer

from pointsman_cli.extras import needs_extra
from pointsman_common.files import readable_file, told, writable_file


def model_card(
    model: Annotated[
        Path,
        typer.Argument(
            metavar="MODEL",
            help="The ONNX file that `pointsman train` made.",
            callback=readable_file,
        ),
    ],
    evaluation: Annotated[
        list[Path],
        typer.Option(
            help="An evaluation.json of `pointsman evaluate --model FILE`; may be repeated.",
            callback=readable_file,
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(help="File for the card; default: standard output.", callback=writable_file),
    ] = None,
) -> None:
    """Write a model's card from its own metadata and its evaluations."""
    with needs_extra():
        from pointsman_learning.evaluation.card import CardError, Evaluation
        from pointsman_learning.evaluation.card import model_card as card

    from pointsman_core.deciders.han_drl import HanModel, ModelError

    try:
        content = model.read_bytes()
        loaded = HanModel(content, source=model.name)
    except (ModelError, OSError) as error:
        raise typer.BadParameter(told(error), param_hint="MODEL") from None
    try:
        found = [Evaluation.load(file, sha256=loaded.sha256) for file in evaluation]
        text = card(loaded, file=model.name, size=len(content), evaluations=found)
    except CardError as error:
        raise typer.BadParameter(str(error), param_hint="--evaluation") from None
    if output is None:
        typer.echo(text, nl=False)
        return
    try:
        output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise typer.BadParameter(told(error), param_hint="--output") from None
