import builtins
import json

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from pointsman_cli import calibrate
from pointsman_cli.calibrate import app
from pointsman_learning.calibration import history as histories
from pointsman_learning.calibration.check import Comparison, held_out_load
from pointsman_learning.calibration.design import EngineLimits
from pointsman_learning.calibration.fit import fit
from pointsman_learning.calibration.measurements import read_csv
from pointsman_learning.calibration.probe import Probed
from pointsman_learning.calibration.profile import profile_fields

HEADER = "batch,context_tokens,prefill_tokens,iteration_seconds\n"
# 10 ms + max(0.1 ms x tokens, 10 ms + 1 us x context)
ROWS = [
    f"{batch},{context},{prefill},{0.01 + max(1e-4 * (batch + prefill), 0.01 + 1e-6 * context)}\n"
    for batch in (1, 8)
    for context in (100, 5000, 20_000)
    for prefill in (0, 200, 500)
]


def invoke(*arguments):
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200"})


@pytest.fixture
def csv_file(tmp_path):
    path = tmp_path / "measured.csv"
    path.write_text(HEADER + "".join(ROWS))
    return path


def test_a_file_gives_the_fields_of_an_expert(csv_file):
    done = invoke("file", str(csv_file), "--kv-tokens", "30000", "--concurrency", "8")
    assert done.exit_code == 0, done.stderr
    fields = yaml.safe_load(done.stdout)
    measured = fields["profile"]["measured"]
    assert measured["overheadMs"] + measured["weightsMs"] == pytest.approx(20, rel=0.01)
    assert measured["perTokenUs"] == pytest.approx(100, rel=0.02)
    assert fields["limits"] == {"contextTokens": 8192, "concurrency": 8}
    assert "Fit to 18 measurements" in done.stderr


def test_the_report_is_json_on_standard_output(csv_file):
    done = invoke("file", str(csv_file), "--json")
    document = json.loads(done.stdout)
    assert document["fit"]["measurements"] == 18
    assert document["fit"]["held_out"]["r2"] > 0.99
    assert document["fit"]["warnings"] == []
    assert document["check"] is None
    assert "measured" in document["profile"]


def test_wrong_input_is_a_message(tmp_path):
    wrong = tmp_path / "wrong.csv"
    wrong.write_text("a,b\n1,2\n")
    done = invoke("file", str(wrong))
    assert done.exit_code == 1
    assert "row 1: the header lacks batch" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_engine_that_is_not_there_is_a_message(unused_tcp_port):
    done = invoke("engine", f"http://127.0.0.1:{unused_tcp_port}", "--model", "m")
    assert done.exit_code == 1
    assert done.stderr.startswith("calibrate: http://127.0.0.1")


def test_without_the_extra_it_is_named(monkeypatch, csv_file):
    real = builtins.__import__

    def without(name, *arguments, **options):
        if name.startswith("pointsman_learning"):
            raise ModuleNotFoundError("No module named 'scipy'", name="scipy")
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    done = invoke("file", str(csv_file))
    assert done.exit_code == 2
    assert "error: needs the learning extra: pip install 'pointsman[learning]'" in done.stderr


class TestEngine:
    @pytest.fixture
    def asked(self, monkeypatch):
        """What the command asked of an engine that answers at once."""
        rows = read_csv(HEADER + "".join(ROWS), source="rows")
        found = fit(rows)
        limits = EngineLimits(
            context_tokens=4096, concurrency=8, kv_capacity_tokens=9999, max_batched_tokens=512
        )
        seen = []

        async def measure(url, model, options, *, check, check_load):
            seen.append((url, model, options, check, check_load))
            if not check:
                return Probed(limits, rows), found, None
            load = held_out_load(
                profile_fields(found.times, limits), requests=check, load=check_load, seed=1
            )
            measured = np.linspace(0.02, 0.04, check)
            compared = Comparison(load, measured, 1.1 * measured, 5 * measured, 4 * measured)
            return Probed(limits, rows), found, compared

        monkeypatch.setattr(calibrate, "_engine", measure)
        return seen

    def test_shows_fit_and_check_and_keeps_the_measurements(self, asked, tmp_path):
        kept = tmp_path / "points.csv"
        done = invoke(
            *("engine", "http://e:1", "--model", "m", "--check", "11", "--csv", str(kept)),
            *("--max-batched-tokens", "64", "--concurrency", "8"),
        )
        assert done.exit_code == 0, done.stderr
        (url, model, options, check, check_load) = asked[0]
        assert (url, model, check, check_load) == ("http://e:1", "m", 11, 0.5)
        assert (options.max_batched_tokens, options.concurrency) == (64, 8)
        assert len(read_csv(kept.read_text(), source="kept")) == 18
        assert yaml.safe_load(done.stdout)["limits"]["contextTokens"] == 4096
        assert "11 held-out requests" in done.stderr
        assert "+10.0%" in done.stderr
        assert "-20.0%" in done.stderr

    def test_reports_the_check_as_json(self, asked):
        done = invoke("engine", "http://e:1", "--model", "m", "--check", "11", "--json")
        document = json.loads(done.stdout)
        assert document["check"]["latency_per_token"]["median_ape"] == pytest.approx(0.1)
        assert document["check"]["in_time"][1]["measured"] == pytest.approx(6 / 11)
        assert len(asked) == 1

    def test_the_check_can_be_left_out(self, asked):
        done = invoke("engine", "http://e:1", "--model", "m", "--check", "0")
        assert done.exit_code == 0
        assert "held-out requests" not in done.stderr
        assert asked[0][3] == 0


def test_a_history_gives_the_fields_too(monkeypatch):
    rows = read_csv(HEADER + "".join(ROWS), source="rows")

    def read(url, *, model, instance, period):
        assert (url, model, instance) == ("http://p:9090", "m", "a:1")
        assert (period.hours, period.step_s) == (2, 30)
        return histories.History(rows, 30_000, 99)

    monkeypatch.setattr(histories, "read_history", read)
    done = invoke(
        *("prometheus", "http://p:9090", "--model", "m", "--instance", "a:1"),
        *("--hours", "2", "--step", "30"),
    )
    assert done.exit_code == 0, done.stderr
    assert "18 of 99 time steps were busy throughout" in done.stderr
    assert yaml.safe_load(done.stdout)["profile"]["maxBatchedTokens"] == 2048
