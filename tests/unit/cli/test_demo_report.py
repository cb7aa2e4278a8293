import io
import json

import pytest
from rich.console import Console

from pointsman_cli.demo.host import host_meter, host_warning
from pointsman_cli.demo.load import Ending, Outcome
from pointsman_cli.demo.plot import LINES, MAX_TICKS, draw, latency_ticks
from pointsman_cli.demo.report import (
    model_line,
    print_report,
    results_table,
    write_json,
)
from pointsman_cli.demo.results import (
    DemoReport,
    HostLoad,
    ModelReport,
    WorkloadReport,
    compare,
    summarise,
)
from pointsman_cli.demo.runner import warnings
from pointsman_core.resources import Algorithm

IDLE = HostLoad(loop_lag_p99_ms=1.0, cpu_busy=0.2)


class HalfRight:
    def score(self, index: int, expert: str) -> tuple[float, bool]:
        return index % 2, expert == "small"


def result(decider: str, *, endings=(Ending.ANSWERED,) * 4, host=IDLE, left=0):
    outcomes = [
        Outcome(
            index=index,
            arrival_s=0.0,
            ending=ending,
            expert="small" if index % 3 else "large",
            decided=True,
            first_token_s=0.1,
            last_token_s=0.4 * (index + 1),
            output_tokens=10,
            reason="" if ending is Ending.ANSWERED else "lost",
        )
        for index, ending in enumerate(endings)
    ]
    return summarise(
        decider, outcomes, HalfRight(), limit_ms=100.0, in_flight_at_end=left, host=host
    )


@pytest.fixture
def report() -> DemoReport:
    return DemoReport(
        runs=[
            result("Random"),
            result("LeastLoad", endings=[Ending.ANSWERED, Ending.FAILED, Ending.REJECTED]),
            result("RoundRobin", endings=[Ending.FAILED]),
        ],
        workload=WorkloadReport(
            description="composed: a and b",
            requests=4,
            seconds=2.0,
            rate=2.0,
            estimated_load=0.8,
            mean_input_tokens=100.0,
            max_output_tokens=400,
            limit_ms_per_token=100.0,
            seed=0,
        ),
        simulated=True,
        simulated_experts=["small", "large"],
        warnings=["[watch] this"],
    )


def test_table_has_a_line_per_decider_and_says_what_it_is(report):
    console = Console(file=io.StringIO(), width=140)
    print_report(console, report)
    text = console.file.getvalue()
    for run in report.runs:
        assert f"{run.average_qos:.3f}" in text
    assert "composed: a and b" in text
    assert "Engines are simulated" in text
    assert "warning: [watch] this" in text


def test_what_too_few_requests_cannot_tell_from_the_best_is_named(report):
    level_with_best = ["RoundRobin", "LeastLoad"]
    console = Console(file=io.StringIO(), width=300)
    console.print(results_table(report.model_copy(update={"level_with_best": level_with_best})))
    wanted = "Too few requests to tell Random from RoundRobin, LeastLoad (95 %, paired by request)."
    assert wanted in " ".join(console.file.getvalue().split())
    console = Console(file=io.StringIO(), width=300)
    console.print(results_table(report))
    assert "Too few" not in console.file.getvalue()


def test_headings_are_whole_words_in_80_columns(report):
    slowest = {"p50_ms_per_token": 12_345.6, "p99_ms_per_token": 120_000.0}
    longest = result("LatencyQualityGreedy").model_copy(update=slowest)
    report = report.model_copy(update={"runs": [*report.runs, longest]})
    console = Console(file=io.StringIO(), width=80)
    console.print(results_table(report))
    assert "…" not in console.file.getvalue()
    _, *head = console.file.getvalue().partition("─")[0].splitlines()
    words = " ".join(head).split()
    wanted = "decider average QoS late p50 p99 ms /token mean score failed rejected token /s"
    assert set(words) == set(wanted.split())


@pytest.mark.parametrize(
    ("model", "line"),
    [
        (
            ModelReport(source="a.onnx", sha256="0123456789abcdef", trained=True),
            "HanDrl decides by a.onnx, SHA-256 0123456789ab…, trained",
        ),
        (
            ModelReport(source="the shipped model", sha256="f" * 64),
            "HanDrl decides by the shipped model, SHA-256 ffffffffffff…,"
            " untrained (it decides as ImpactGreedy does)",
        ),
        (
            ModelReport(error="a.onnx cannot be read"),
            "HanDrl has no model, its fallback decides: a.onnx cannot be read",
        ),
    ],
    ids=["trained", "untrained", "none"],
)
def test_the_model_is_told_under_the_table(report, model, line):
    assert model_line(model) == line
    caption = results_table(report.model_copy(update={"model": model})).caption
    assert f"Engines are simulated. {line}." in caption
    assert "HanDrl" not in results_table(report).caption


def test_comparison_stands_beside_the_runs_in_80_columns(report):
    run = result("LatencyQualityGreedy")
    alike = result("LatencyQualityGreedy", endings=(Ending.ANSWERED,) * 2 + (Ending.FAILED,) * 2)
    report = report.model_copy(update={"runs": [run], "comparison": [compare(run, alike)]})
    console = Console(file=io.StringIO(), width=80)
    print_report(console, report)
    text = console.file.getvalue().partition("the same requests")[2]
    assert "…" not in text
    row = next(line for line in text.splitlines() if line.startswith("LatencyQualityGreedy"))
    # Of four requests the second alone is in time with a score of 1, here and there.
    assert row.split()[1:4] == ["0.250", "0.250", "+0.000±0.000"]
    assert row.split()[4:] == ["50.0%", "50.0%", "50%"]
    assert "absolute values 0.000" in " ".join(text.split())


@pytest.mark.parametrize(
    ("low", "high"), [(20, 400), (1, 1000), (0.5, 90_000), (40, 60), (3, 3.5), (1e-3, 1e9)]
)
def test_latency_axis_has_enough_round_numbers(low, high):
    ticks = latency_ticks(low, high)
    assert all(low <= tick <= high for tick in ticks)
    assert ticks == sorted(ticks)
    assert 1 <= len(ticks) <= MAX_TICKS + 1
    if high / low >= 10:
        assert len(ticks) >= 5


def test_lines_of_the_plot_differ_in_colour_dashes_and_marker():
    assert len(LINES) >= len(Algorithm)
    for parts in zip(*LINES, strict=True):
        assert len(set(parts)) == len(LINES)


@pytest.mark.parametrize("runs", [slice(None), slice(2, 3)], ids=["all", "nothing answered"])
def test_plot_is_a_png(report, tmp_path, runs):
    draw(report.model_copy(update={"runs": report.runs[runs]}), tmp_path / "demo.png")
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")


def test_json_file_can_be_read_back(report, tmp_path):
    write_json(report, tmp_path / "demo.json")
    data = json.loads((tmp_path / "demo.json").read_text())
    assert [run["decider"] for run in data["runs"]] == ["Random", "LeastLoad", "RoundRobin"]


def test_warnings_name_what_spoils_the_numbers():
    busy = HostLoad(loop_lag_p99_ms=80.0, cpu_busy=0.99)
    lines = warnings([result("Random", host=busy, left=2), result("LeastLoad")], ["large"])
    assert len(lines) == 3
    assert (
        "Random: this machine was too slow (timers were 80 ms late (p99), CPUs were 99% busy)"
        in (lines[0])
    )
    assert "no scores in the workload for large" in lines[1]
    assert "2 requests stayed" in lines[2]
    assert warnings([result("LeastLoad")], []) == []


def test_answers_without_a_decision_are_warned_of():
    run = result("Random").model_copy(update={"without_decision": 3})
    assert "3 answers were routed by Envoy alone" in warnings([run], [])[0]


def test_a_run_that_its_fallback_decided_is_warned_of():
    run = result("HanDrl").model_copy(update={"by_fallback": 4})
    wanted = "HanDrl failed: 4 of its answers were chosen by the policy's fallback"
    assert warnings([run], []) == [wanted]


async def test_host_meter_measures_while_it_is_open():
    async with host_meter() as meter:
        pass
    load = meter.load()
    assert load.loop_lag_p99_ms >= 0
    assert load.cpu_busy is None or 0 <= load.cpu_busy <= 1
    assert host_warning("Random", IDLE) is None
    assert host_warning("Random", HostLoad(loop_lag_p99_ms=0.0, cpu_busy=None)) is None
