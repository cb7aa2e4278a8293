"""The command ``pointsman engine-sim``; what is heavy is imported when it runs."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pointsman_common.files import readable, reason, told

if TYPE_CHECKING:
    from pointsman_core.resources import LLMExpertSpec
    from pointsman_engine_sim.settings import EngineSettings


def _profile(text: str) -> Any:  # noqa: ANN401 - typer's own type for an option
    panel = "Speed and size, with --model (defaults: those of the LLMExpert resource)"
    return typer.Option(help=text, rich_help_panel=panel, show_default=False)


def _fault(*names: str, text: str, **bounds: Any) -> Any:  # noqa: ANN401
    return typer.Option(*names, help=text, rich_help_panel="Faults on purpose", **bounds)


def engine_sim(
    *,
    manifests: Annotated[
        Path | None,
        typer.Option(help="YAML file or folder with the LLMExpert to simulate.", callback=readable),
    ] = None,
    expert: Annotated[str | None, typer.Option(help="Its name, or namespace/name.")] = None,
    model: Annotated[
        str | None, typer.Option(help="Served name, in place of --manifests and --expert.")
    ] = None,
    alias: Annotated[list[str] | None, typer.Option(help="Further served name.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(help="Port to listen on; 0: a free one.", min=0, max=65535)
    ] = 0,
    seed: Annotated[int, typer.Option(help="Start of all that is drawn.")] = 0,
    peak_tflops: Annotated[float | None, _profile("Dense compute, in TFLOP/s.")] = None,
    memory_bandwidth_gbps: Annotated[float | None, _profile("In GB/s.")] = None,
    parameters_billions: Annotated[float | None, _profile("Active parameters.")] = None,
    bytes_per_parameter: Annotated[float | None, _profile("2: 16 bit, 1: 8 bit.")] = None,
    kv_bytes_per_token: Annotated[int | None, _profile("KV cache of one token.")] = None,
    kv_cache_gib: Annotated[float | None, _profile("Size of the KV cache.")] = None,
    compute_efficiency: Annotated[float | None, _profile("Share of the peak.")] = None,
    bandwidth_efficiency: Annotated[float | None, _profile("Share of the peak.")] = None,
    iteration_overhead_ms: Annotated[float | None, _profile("Fixed time.")] = None,
    max_batched_tokens: Annotated[int | None, _profile("Budget of an iteration.")] = None,
    context_tokens: Annotated[int | None, _profile("Prompt and answer together.")] = None,
    concurrency: Annotated[int | None, _profile("Requests in one batch.")] = None,
    expected_output_tokens: Annotated[int | None, _profile("Mean answer length.")] = None,
    fail_after_tokens: Annotated[
        int | None, _fault(text="Drop the connection after N tokens.", min=0)
    ] = None,
    error_rate: Annotated[
        float, _fault(text="Share of requests answered by status 500.", min=0, max=1)
    ] = 0.0,
    stall: Annotated[bool, _fault("--stall", text="Accept requests, never answer.")] = False,
) -> None:
    """Simulate an LLM engine: the OpenAI API in real time, without any model.

    Prints one line of JSON once it listens: {"url", "model", "simulated": true}.
    """
    from pydantic import ValidationError

    from pointsman_engine_sim.protocol import describe
    from pointsman_engine_sim.settings import EngineSettings, Faults

    spec_flags = _given(
        model=model,
        aliases=alias or None,
        expected_output_tokens=expected_output_tokens,
        limits=_given(context_tokens=context_tokens, concurrency=concurrency),
        profile=_given(
            peak_tflops=peak_tflops,
            memory_bandwidth_gbps=memory_bandwidth_gbps,
            parameters_billions=parameters_billions,
            bytes_per_parameter=bytes_per_parameter,
            kv_bytes_per_token=kv_bytes_per_token,
            kv_cache_gib=kv_cache_gib,
            compute_efficiency=compute_efficiency,
            bandwidth_efficiency=bandwidth_efficiency,
            iteration_overhead_ms=iteration_overhead_ms,
            max_batched_tokens=max_batched_tokens,
        ),
    )
    faults = Faults(fail_after_tokens=fail_after_tokens, error_rate=error_rate, stall=stall)
    try:
        spec = _read_spec(manifests, expert, spec_flags)
        settings = EngineSettings.from_spec(spec, host=host, port=port, seed=seed, faults=faults)
    except ValidationError as error:
        raise typer.BadParameter(describe(error)) from error
    except (ValueError, OSError) as error:  # errors in manifests are ValueErrors
        raise typer.BadParameter(told(error)) from error
    _run(settings)


def _run(settings: "EngineSettings") -> None:
    import asyncio

    import uvloop

    from pointsman_engine_sim.server import serve

    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(serve(settings, on_ready=lambda url: _announce(url, settings.model)))
    except OSError as error:  # most often: the port is taken
        typer.echo(f"engine-sim: {told(error)}", err=True)
        raise typer.Exit(1) from error


def _given(**options: object) -> dict[str, object]:
    """Leave out what was not given, so that the resource's defaults apply."""
    return {name: value for name, value in options.items() if value not in (None, {})}


def _read_spec(
    manifests: Path | None, expert: str | None, flags: dict[str, object]
) -> "LLMExpertSpec":
    from pointsman_core.resources import Backend, LLMExpertSpec

    if manifests is None:
        if "model" not in flags or expert is not None:
            raise ValueError("give either --manifests and --expert, or --model")
        nowhere = Backend(addresses=["127.0.0.1:1"])  # a spec needs one; it is not used
        return LLMExpertSpec.model_validate({"backend": nowhere, **flags})
    if flags or expert is None:
        raise ValueError("--manifests goes with --expert, which settles model and profile")
    return _find_expert(manifests, expert)


def _find_expert(path: Path, name: str) -> "LLMExpertSpec":
    """The expert of that name, or ``namespace/name``, in a file or below a folder.

    Raises ValueError when there is none, or more than one.
    """
    from pointsman_core.manifests import parse_manifests

    found = [
        located
        for file in _manifest_files(path)
        for located in parse_manifests(_text(file), source=str(file)).located_experts
        if name in (located.resource.metadata.name, located.name.partition("/")[2])
    ]
    if not found:
        raise ValueError(f"no LLMExpert named {name!r} in {path}")
    if len(found) > 1:
        places = ", ".join(f"{located.name} in {located.place}" for located in found)
        raise ValueError(f"{name!r} names {len(found)} experts, give namespace/name: {places}")
    return found[0].resource.spec


def _manifest_files(path: Path) -> list[Path]:
    """The file itself, or all YAML files below a folder except hidden ones.

    A mounted ConfigMap keeps its files a second time in ``..data``.
    """
    if not path.is_dir():
        return [path]
    return sorted(
        file
        for file in path.rglob("*")
        if file.suffix in (".yaml", ".yml")
        and file.is_file()
        and not any(part.startswith(".") for part in file.relative_to(path).parts)
    )


def _text(file: Path) -> str:
    try:
        return file.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: {reason(error)}") from error


def _announce(url: str, model: str) -> None:
    import orjson

    line = orjson.dumps({"url": url, "model": model, "simulated": True})
    typer.echo(line)  # flushes, so that whoever started the engine can wait for it
