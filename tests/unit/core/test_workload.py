import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pointsman_core.workload import (
    DOMAINS,
    Arrivals,
    QualityTable,
    WorkloadError,
    compose,
    parse_arrivals,
    parse_quality,
    synthetic,
)

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,109
2023-11-16 18:15:51.2224670,879,55
"""
GENERAL = "arrival_seconds,input_tokens,output_tokens\n0,10,5\n1,20,6\n3,30,7\n"
QUALITY = """prompt,expert,score,output_tokens
"Why, oh why?
",small,0.25,12
2 + 2,small,1,
2 + 2,large,0.5,30
"""
MEANS = {"small": dict.fromkeys(DOMAINS, 0.3), "large": dict.fromkeys(DOMAINS, 0.7)}


@pytest.fixture
def arrivals() -> Arrivals:
    return parse_arrivals(GENERAL, source="trace.csv")


@pytest.fixture
def table() -> QualityTable:
    return parse_quality(QUALITY, source="quality.csv")


class TestParseArrivals:
    def test_general_format(self, arrivals):
        assert arrivals.seconds.tolist() == [0.0, 1.0, 3.0]
        assert arrivals.input_tokens.tolist() == [10, 20, 30]
        assert arrivals.output_tokens.tolist() == [5, 6, 7]
        assert len(arrivals) == 3

    def test_azure_trace_counts_from_its_first_arrival(self):
        arrivals = parse_arrivals(AZURE, source="azure.csv")
        assert arrivals.seconds == pytest.approx([0.0, 4.314579, 4.541877])
        assert arrivals.input_tokens.tolist() == [374, 396, 879]

    def test_time_zone_in_time_stamps(self):
        text = AZURE.replace("18:15:50.9951690", "19:15:50.9951690+01:00")
        assert parse_arrivals(text, source="azure.csv").seconds[1] == pytest.approx(4.314579)

    def test_rows_in_any_order_byte_order_mark_crlf_empty_lines_and_further_columns(self):
        text = (
            "\ufeffuser, output_tokens,arrival_seconds,input_tokens\r\n"
            "a,2,7.5,1\r\n\r\nb,4.0,0.5,3\r\n"
        )
        arrivals = parse_arrivals(text, source="trace.csv")
        assert arrivals.seconds.tolist() == [0.5, 7.5]
        assert arrivals.output_tokens.tolist() == [4, 2]

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("", "trace.csv, row 1: the header must be arrival_seconds,input_tokens"),
            ("a,b\n1,2\n", "row 1: the header must be .* or TIMESTAMP.*got a,b"),
            (GENERAL.splitlines()[0], "trace.csv: has no rows"),
            (GENERAL + "x,1,1\n", r"row 5, column arrival_seconds: .* at least 0 \(got 'x'\)"),
            (GENERAL + "-1,1,1\n", "row 5, column arrival_seconds"),
            (GENERAL + "inf,1,1\n", "row 5, column arrival_seconds"),
            (GENERAL + "nan,1,1\n", "row 5, column arrival_seconds"),
            (GENERAL + "4,1.5,1\n", "row 5, column input_tokens: must be a whole number"),
            (GENERAL + "4,1,-2\n", "row 5, column output_tokens"),
            (GENERAL + "4,1,1e30\n", "row 5, column output_tokens: .* from 0 to 1e"),
            (GENERAL + "4,1\n", "row 5: has 2 cells, the header has 3"),
            (GENERAL + '4,"1,1\n', "row 5: is not CSV"),
            (AZURE + "yesterday,1,1\n", "row 5, column TIMESTAMP: must be a time like"),
        ],
    )
    def test_bad_files_name_row_and_column(self, text, message):
        with pytest.raises(WorkloadError, match=message) as caught:
            parse_arrivals(text, source="trace.csv")
        assert caught.value.source == "trace.csv"


class TestWindow:
    def test_scales_all_gaps_alike_to_the_rate(self, arrivals):
        # Gaps 1, 2 and the mean 1.5: 4.5 s for 3 requests become 0.5 s at 6 per second.
        window = arrivals.window(start=0, requests=3, rate=6.0)
        assert window.seconds == pytest.approx([0.0, 1 / 9, 3 / 9])
        assert window.rate == pytest.approx(3 / (2 / 9 + 2 / 9 + 1 / 9 - 1 / 18))

    def test_starts_again_when_the_trace_is_too_short(self, arrivals):
        window = arrivals.window(start=2, requests=5, rate=1.0)
        assert window.input_tokens.tolist() == [30, 10, 20, 30, 10]
        assert np.all(np.diff(window.seconds) > 0)

    @given(
        start=st.integers(0, 50),
        requests=st.integers(1, 40),
        rate=st.floats(0.01, 1000),
        gaps=st.lists(st.floats(0.001, 100), min_size=1, max_size=30),
    )
    def test_last_gap_closes_the_window_at_the_wished_rate(self, start, requests, rate, gaps):
        seconds = np.concatenate(([0.0], np.cumsum(gaps)))
        tokens = np.ones(len(seconds), dtype=np.int64)
        trace = Arrivals(seconds, tokens, tokens, "drawn")
        window = trace.window(start=start, requests=requests, rate=rate)
        assert len(window) == requests
        assert window.seconds[0] == 0
        assert np.all(np.diff(window.seconds) >= 0)
        assert window.seconds[-1] <= requests / rate

    @pytest.mark.parametrize(("requests", "rate"), [(0, 1.0), (3, 0.0), (3, -1.0), (3, math.nan)])
    def test_refuses_nothing_to_do(self, arrivals, requests, rate):
        with pytest.raises(WorkloadError, match="at least 1 request"):
            arrivals.window(start=0, requests=requests, rate=rate)

    def test_refuses_arrivals_of_one_moment(self):
        tokens = np.ones(3, dtype=np.int64)
        trace = Arrivals(np.zeros(3), tokens, tokens, "burst.csv")
        assert math.isinf(trace.rate)
        with pytest.raises(WorkloadError, match=r"burst.csv: 2 arrivals .* one moment"):
            trace.window(start=0, requests=2, rate=1.0)


class TestParseQuality:
    def test_general_format(self, table):
        assert table.prompts == ("Why, oh why?\n", "2 + 2")
        assert table.experts == ("small", "large")
        np.testing.assert_array_equal(table.scores, [[0.25, np.nan], [1.0, 0.5]])
        np.testing.assert_array_equal(table.output_tokens, [[12, np.nan], [np.nan, 30]])
        assert table.domains is None

    def test_llmrouter_json(self):
        text = '[{"question": "a", "scores": {"x": 1, "y": 0.5}, "cluster_id": 3}]'
        table = parse_quality(text, source="test.json")
        assert table.prompts == ("a",)
        assert table.scores.tolist() == [[1.0, 0.5]]
        assert np.isnan(table.output_tokens).all()

    def test_first_of_repeated_json_questions_counts(self):
        entry = '{{"question": "a", "scores": {{"x": {}}}}}'
        text = f"[{entry.format(1)}, {entry.format(0)}]"
        assert parse_quality(text, source="test.json").scores.tolist() == [[1.0]]

    def test_without_leaves_out_prompts(self, table):
        rest = table.without({"2 + 2"})
        assert rest.prompts == ("Why, oh why?\n",)
        assert rest.scores.shape == (1, 2)

    def test_without_keeps_domains_in_step(self):
        workload = synthetic(requests=20, rate=1.0, seed=3, means=MEANS)
        rest = workload.table.without({workload.table.prompts[0]})
        assert rest.domains == workload.table.domains[1:]

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("", "row 1: the header must be prompt,expert,score,output_tokens"),
            ("prompt,expert,score,output_tokens\n", "quality: has no rows"),
            (QUALITY + "p,e,1.5,\n", r"row 6, column score: must be a number from 0 to 1"),
            (QUALITY + "p,,1,\n", "row 6, column expert: is empty"),
            (QUALITY + "2 + 2,large,1,\n", "row 6, column expert: large was already scored"),
            ("[", "quality, row 1, column 2: is not JSON"),
            ("{}", "must be a list of questions"),
            ("[]", "quality: has no rows"),
            ("[1]", "row 1: must be an object"),
            ('[{"question": "", "scores": {"x": 1}}]', "row 1, column question"),
            ('[{"question": "a", "scores": {}}]', "row 1, column scores"),
            ('[{"question": "a", "scores": {"x": true}}]', r"column scores.x: .*got True"),
            ('[{"question": "a", "scores": {"x": 2}}]', "row 1, column scores.x"),
            ('[{"question": "a", "scores": {"x": "1"}}]', "row 1, column scores.x"),
        ],
    )
    def test_bad_files_name_row_and_column(self, text, message):
        with pytest.raises(WorkloadError, match=message):
            parse_quality(text, source="quality")


class TestCompose:
    def test_is_labelled_with_both_sources(self, arrivals, table):
        workload = compose(arrivals, table, requests=3, rate=2.0, seed=1)
        assert workload.description.startswith("composed: ")
        assert "trace.csv" in workload.description
        assert "quality.csv" in workload.description

    def test_equal_seeds_give_equal_workloads(self, arrivals, table):
        first, again, other = (
            compose(arrivals, table, requests=40, rate=2.0, seed=seed) for seed in (1, 1, 2)
        )
        np.testing.assert_array_equal(first.arrivals.seconds, again.arrivals.seconds)
        assert first.prompts == again.prompts
        assert first.prompts != other.prompts

    def test_no_prompt_repeats_before_all_were_used(self, arrivals, table):
        workload = compose(arrivals, table, requests=5, rate=2.0, seed=1)
        assert len(workload) == 5
        assert set(workload.prompts[:2]) == set(workload.prompts[2:4]) == set(table.prompts)

    def test_scores_follow_the_prompts(self, arrivals, table):
        workload = compose(arrivals, table, requests=7, rate=2.0, seed=5)
        for prompt, scores, lengths in zip(
            workload.prompts, workload.scores, workload.output_tokens, strict=True
        ):
            row = table.prompts.index(prompt)
            np.testing.assert_array_equal(scores, table.scores[row])
            np.testing.assert_array_equal(lengths, table.output_tokens[row])

    def test_refuses_an_empty_table(self, arrivals, table):
        with pytest.raises(WorkloadError, match=r"quality.csv: has no rows"):
            compose(arrivals, table.without(table.prompts), requests=1, rate=1.0, seed=0)


class TestSynthetic:
    def test_equal_seeds_give_equal_workloads(self):
        first, again, other = (
            synthetic(requests=50, rate=4.0, seed=seed, means=MEANS) for seed in (7, 7, 8)
        )
        assert first.prompts == again.prompts
        np.testing.assert_array_equal(first.scores, again.scores)
        np.testing.assert_array_equal(first.arrivals.seconds, again.arrivals.seconds)
        assert first.prompts != other.prompts

    def test_means_and_rate_are_kept(self):
        means = {"math-only": dict.fromkeys(DOMAINS, 0.0) | {"math": 1.0}, **MEANS}
        workload = synthetic(requests=20_000, rate=4.0, seed=0, means=means)
        is_math = np.array([domain == "math" for domain in workload.table.domains])
        np.testing.assert_array_equal(workload.scores[:, 0], is_math)
        assert workload.scores.mean(axis=0)[1:] == pytest.approx([0.3, 0.7], abs=0.02)
        assert workload.arrivals.rate == pytest.approx(4.0, rel=0.03)
        assert workload.arrivals.seconds[0] == 0
        # Hard prompts are hard for both: their scores go together.
        assert np.corrcoef(workload.scores[:, 1:].T)[0, 1] > 0.1

    def test_says_that_it_is_synthetic(self):
        assert synthetic(requests=1, rate=1, seed=0, means=MEANS).description.startswith("synth")

    @pytest.mark.parametrize(
        "change", [{"requests": 0}, {"rate": 0.0}, {"means": {}}], ids=["requests", "rate", "means"]
    )
    def test_refuses_nothing_to_do(self, change):
        arguments = {"requests": 1, "rate": 1.0, "seed": 0, "means": MEANS} | change
        with pytest.raises(WorkloadError, match="needs at least one request"):
            synthetic(**arguments)
