"""The benchmarks' options, sites and reports; not their numbers."""

import json

import pytest
from typer.testing import CliRunner

from pointsman_cli.bench import ext_proc, site
from pointsman_cli.bench.cli import app
from pointsman_cli.bench.decide import build_service
from pointsman_cli.bench.report import Timing, row
from pointsman_core.manifests import compile_manifests
from pointsman_core.resources import Algorithm
from pointsman_policy.decide_stream import DecideStream
from pointsman_policy.observe_stream import ObserveStream

A, B = "10.0.0.1:8000", "10.0.0.2:8000"
LEAST, RANDOM = Algorithm.LEAST_LOAD, Algorithm.RANDOM
SMALL = ["decide", "--endpoints", "3", "--in-flight", "5", "--requests", "4"]


def invoke(*arguments):
    return CliRunner().invoke(app, list(arguments))


class TestDecide:
    def test_reports_every_decider_as_json_on_standard_output(self):
        done = invoke(*SMALL, "--json")
        assert done.exit_code == 0
        assert done.stderr == ""
        document = json.loads(done.stdout)
        assert [run["decider"] for run in document["runs"]] == list(Algorithm)
        for run in document["runs"]:
            assert (run["endpoints"], run["in_flight"], run["count"]) == (3, 5, 4)
            assert 0 < run["p50_ms"] <= run["p99_ms"] <= run["max_ms"]
            assert run["per_second"] > 0
        assert document["setting"]["requests_per_run"] == 4

    def test_reports_a_table_on_standard_error(self):
        done = invoke(*SMALL, "--deciders", "leastload, RANDOM")
        assert done.exit_code == 0
        assert done.stdout == ""
        assert "LeastLoad" in done.stderr
        assert "Random" in done.stderr
        assert "QualityGreedy" not in done.stderr

    def test_more_endpoints_than_one_subnet_holds_have_addresses_of_their_own(self):
        service = build_service(endpoints=600, in_flight=0, algorithms=[RANDOM])
        assert len(service.state.addresses) == 600

    @pytest.mark.parametrize("in_flight", [0, 7])
    def test_measures_on_the_load_that_was_asked_for(self, in_flight):
        service = build_service(endpoints=4, in_flight=in_flight, algorithms=[LEAST, RANDOM])
        assert len(service.state) == in_flight
        assert len(service.state.addresses) == 4
        assert service.models == ["bench/LeastLoad", "bench/Random"]


@pytest.mark.parametrize(
    ("arguments", "want"),
    [
        (["decide", "--deciders", "Best,Random"], "best: choose from Random,"),
        (["decide", "--deciders", ""], "nothing: choose from"),
        (["decide", "--deciders", "none"], "none: choose from"),
        (["decide", "--endpoints", "0"], "--endpoints"),
        (["decide", "--requests", "0"], "--requests"),
        (["decide", "--in-flight", "-1"], "--in-flight"),
        (["ext-proc", "--concurrency", "1,x"], "'1,x' is not a list of numbers from 1 to"),
        (["ext-proc", "--concurrency", "²"], "'²' is not a list of numbers from 1 to"),
        (["ext-proc", "--concurrency", "0"], "'0' is not a list of numbers from 1 to"),
        (["ext-proc", "--concurrency", "1,4097"], "'1,4097' is not a list of numbers from 1 to"),
        (["ext-proc", "--concurrency", ""], "'' is not a list of numbers from 1 to"),
    ],
)
def test_a_wrong_option_is_told_in_words(arguments, want):
    done = invoke(*arguments)
    assert done.exit_code == 2
    assert want in " ".join(done.stderr.replace("│", " ").split())


class TestSite:
    def test_its_manifests_compile_to_the_same_snapshots(self):
        text = site.manifests([A, B], [LEAST, RANDOM])
        snapshots = compile_manifests({"site.yaml": text}).snapshots
        service = build_service(endpoints=2, in_flight=0, algorithms=[LEAST, RANDOM])
        assert [s.models for s in snapshots] == [s.models for s in service.snapshots]
        assert [s.algorithm for s in snapshots] == [LEAST, RANDOM]
        for compiled, built in zip(snapshots, service.snapshots, strict=True):
            assert [c.expert for c in compiled.candidates] == ["expert-0", "expert-1"]
            assert [c.profile for c in compiled.candidates] == [c.profile for c in built.candidates]

    def test_the_same_seed_gives_the_same_site_and_prompts(self):
        assert site.experts([A, B]) == site.experts([A, B])
        assert site.experts([A, B]) != site.experts([A, B], seed=1)
        assert list(site.prompts(3)) == list(site.prompts(3))

    def test_prompts_are_of_about_2_kb_and_of_some_domain(self):
        prompts = list(site.prompts(8))
        assert all(1500 < len(prompt) < 3500 for prompt in prompts)
        assert all(any(domain in prompt for domain in site.DOMAINS) for prompt in prompts)


class TestExtProc:
    @pytest.mark.parametrize("request_id", ["r1", None])
    def test_its_messages_are_what_the_server_expects(self, request_id):
        service = build_service(endpoints=2, in_flight=0, algorithms=[LEAST])
        body = ext_proc._body(LEAST, next(site.prompts(1)))
        stream = DecideStream(service, body_limit_bytes=10_000)
        headers = stream.handle(ext_proc._headers(len(body), request_id))
        assert headers.WhichOneof("response") == "request_headers"
        message = ext_proc.ProcessingRequest()
        message.request_body.body = body
        assert stream.handle(message).WhichOneof("response") == "request_body"
        assert len(service.state) == (request_id is not None)

    def test_a_followed_request_leaves_nothing_behind(self):
        service = build_service(endpoints=2, in_flight=0, algorithms=[LEAST])
        body = ext_proc._body(LEAST, next(site.prompts(1)))
        decide = DecideStream(service, body_limit_bytes=10_000)
        observe = ObserveStream(service)
        headers = ext_proc._headers(len(body), "r1")
        observe.handle(headers)
        decide.handle(headers)
        message = ext_proc.ProcessingRequest()
        message.request_body.body = body
        decide.handle(message)
        assert len(service.state) == 1
        for told in ext_proc._answer():
            observe.handle(told)
        assert observe.done
        assert len(service.state) == len(service.tracker) == 0
        counted = service.metrics.completions.collect()[0].samples
        assert [s.labels["outcome"] for s in counted if s.name.endswith("_total")] == ["ok"]


class TestTiming:
    def test_is_in_milliseconds(self):
        got = Timing.of([0.001, 0.002, 0.003], wall_s=0.006)
        assert (got.p50_ms, got.mean_ms, got.max_ms, got.count) == (2.0, 2.0, 3.0, 3)
        assert got.p99_ms == pytest.approx(2.98)
        assert got.per_second == 500.0

    def test_is_a_row_behind_its_labels(self):
        got = row({"decider": "Random"}, Timing.of([0.001], wall_s=0.002))
        assert list(got)[:3] == ["decider", "p50_ms", "p99_ms"]
        assert got["per_second"] == 500.0
