"""`pointsman validate`, `generate-crds` and `generate-docs`."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pointsman_common.files import new_file, writable_folder

if TYPE_CHECKING:
    from rich.table import Table

    from pointsman_core.manifests import CompiledManifests, ManifestError, ManifestErrors
    from pointsman_core.snapshot import Candidate, Snapshot

TYPICAL_CONTEXT_TOKENS = 1000
"""Context of the one sequence for which the table shows a speed; ours."""


def validate(
    paths: Annotated[
        list[Path], typer.Argument(metavar="PATH...", help="Manifest files, or folders of them.")
    ],
    *,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the result as JSON on standard output.")
    ] = False,
) -> None:
    """Check manifests as the policy server would, and show what they compile to.

    All errors of all files go to standard error, one per line; the exit status is 1 then.
    """
    from pointsman_core.manifests import ManifestErrors, compile_manifests
    from pointsman_policy.manifest_files import read_manifest_files

    try:
        texts = read_manifest_files(paths)
        compiled = compile_manifests(texts)
    except ManifestErrors as errors:
        _show_errors(errors, as_json=as_json)
        raise typer.Exit(1) from None
    warnings = [*compiled.warnings, *_hopeless(compiled, texts)]
    for warning in warnings:
        typer.echo(f"warning: {warning}", err=True)
    if as_json:
        _echo_json(_as_dict(compiled, warnings))
    else:
        from rich.console import Console

        Console().print(*map(_table, compiled.snapshots), sep="\n")


def generate_crds(
    folder: Annotated[
        Path,
        typer.Argument(metavar="DIR", help="Folder for the CRD files.", callback=writable_folder),
    ],
) -> None:
    """Write the CustomResourceDefinitions, generated from the models."""
    from pointsman_core.crd import generate_crds as generate

    folder.mkdir(parents=True, exist_ok=True)
    for name, text in generate().items():
        _write(folder / name, text)


def generate_docs(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="Markdown file to write.", callback=new_file)
    ] = Path("docs/crds.md"),
) -> None:
    """Write the reference of all custom resource fields."""
    from pointsman_core.crd_reference import generate_reference

    file.parent.mkdir(parents=True, exist_ok=True)
    _write(file, generate_reference())


def _write(file: Path, text: str) -> None:
    file.write_text(text, encoding="utf-8")
    typer.echo(str(file), err=True)


def _show_errors(errors: "ManifestErrors", *, as_json: bool) -> None:
    typer.echo(str(errors), err=True)
    if as_json:
        _echo_json({"valid": False, "errors": [error.as_dict() for error in errors.errors]})


def _echo_json(value: dict[str, Any]) -> None:
    import json

    typer.echo(json.dumps(value, indent=2))


def _hopeless(compiled: "CompiledManifests", texts: Mapping[str, str]) -> "Iterator[ManifestError]":
    """A warning for each policy whose limit no endpoint keeps, not even one that is idle."""
    from pointsman_core.manifests import parse_manifests

    snapshots = {(each.namespace, each.policy): each for each in compiled.snapshots}
    for source, text in texts.items():
        for policy in parse_manifests(text, source=source).located_policies:
            meta = policy.resource.metadata
            snapshot = snapshots[meta.namespace, meta.name]
            fastest = min(snapshot.candidates, key=_alone_ms)
            limit = snapshot.qos.latency_per_token_ms
            if _alone_ms(fastest) > limit:
                yield policy.error(
                    ("spec", "qos", "latencyPerTokenMs"),
                    f"no expert can keep {limit:g} ms per token, not even idle: the fastest,"
                    f" {fastest.expert}, takes {_alone_ms(fastest):.1f} ms by its profile",
                )


def _as_dict(compiled: "CompiledManifests", warnings: list["ManifestError"]) -> dict[str, Any]:
    return {
        "valid": True,
        "warnings": [warning.as_dict() for warning in warnings],
        "policies": [
            {
                "namespace": snapshot.namespace,
                "name": snapshot.policy,
                "models": list(snapshot.models),
                "algorithm": snapshot.algorithm,
                "snapshot_version": snapshot.version,
                "endpoints": [
                    {
                        "expert": candidate.expert,
                        "address": candidate.address,
                        "model": candidate.model,
                        "engine": candidate.engine.type,
                        "ms_per_token_alone": round(_alone_ms(candidate), 3),
                    }
                    for candidate in snapshot.candidates
                ],
            }
            for snapshot in compiled.snapshots
        ],
    }


def _table(snapshot: "Snapshot") -> "Table":
    """One policy, a row per endpoint."""
    from rich.table import Table

    limit = snapshot.qos.latency_per_token_ms
    table = Table(
        title=f"{snapshot.namespace}/{snapshot.policy} answers {', '.join(snapshot.models)}",
        caption=f"{snapshot.algorithm}, limit {limit:g} ms per token, snapshot {snapshot.version}",
    )
    table.add_column("Expert", overflow="fold")
    table.add_column("Endpoint", no_wrap=True)
    table.add_column("ms/token", justify="right")
    table.add_column("Quality", justify="right")
    table.add_column("Best in")
    for candidate in snapshot.candidates:
        speed = _alone_ms(candidate)
        best = [rule.name for rule in snapshot.domains if _is_best(snapshot, candidate, rule.name)]
        table.add_row(
            " as ".join(dict.fromkeys((candidate.expert, candidate.model))),
            candidate.address,
            f"[red]{speed:.1f}[/red]" if speed > limit else f"{speed:.1f}",
            f"{candidate.quality.default:.2f}",
            ", ".join(best),
        )
    return table


def _is_best(snapshot: "Snapshot", candidate: "Candidate", domain: str) -> bool:
    scores = [_score(other, domain) for other in snapshot.candidates]
    return _score(candidate, domain) == max(scores)


def _score(candidate: "Candidate", domain: str) -> float:
    quality = candidate.quality
    return next((prior.score for prior in quality.domains if prior.name == domain), quality.default)


def _alone_ms(candidate: "Candidate") -> float:
    """Decode time per token of a single sequence, by the cost model."""
    from pointsman_core.cost import CostModel

    cost = CostModel.from_profile(candidate.profile, candidate.limits)
    return 1e3 * cost.iteration_seconds(
        prefill_tokens=0, decode_sequences=1, context_tokens=TYPICAL_CONTEXT_TOKENS
    )
