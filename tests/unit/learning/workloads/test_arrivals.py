from itertools import pairwise

import numpy as np
import pytest

from pointsman_common.data_folder import TRACES
from pointsman_core.workload import Arrivals, WorkloadError
from pointsman_learning.workloads import (
    SPLITS,
    DataFolder,
    OnOff,
    Process,
    arrival_process,
    user_arrivals,
)
from pointsman_learning.workloads.arrivals import trace_part, window_start


def draw(process, *, requests=400, rate=4.0, seed=0):
    return process.window(
        requests=requests,
        rate=rate,
        seed=seed,
        rng=np.random.default_rng([seed, 1]),
        sizes_rng=np.random.default_rng([seed, 2]),
    )


@pytest.fixture
def arrivals_file(tmp_path):
    """One request every 2 s, each with its number as its input length."""
    file = tmp_path / "own.csv"
    rows = "".join(f"{2 * i},{i + 1},{i % 7}\n" for i in range(2000))
    file.write_text("arrival_seconds,input_tokens,output_tokens\n" + rows)
    return file


def test_poisson():
    window = draw(arrival_process("poisson", split="test"), requests=20_000)
    gaps = np.diff(window.seconds)
    assert window.seconds[0] == 0.0
    assert gaps.mean() == pytest.approx(0.25, rel=0.03)
    assert gaps.std() / gaps.mean() == pytest.approx(1.0, abs=0.03)
    assert window.input_tokens.min() >= 1
    assert "sizes drawn from a synthetic generator" in window.note


def test_on_off_has_the_rate_and_bursts():
    window = draw(arrival_process("on-off", split="test"), requests=20_000)
    gaps = np.diff(window.seconds)
    assert gaps.mean() == pytest.approx(0.25, rel=0.001)
    assert gaps.std() / gaps.mean() > 1.3
    # In the mean over seconds: a quarter of the time at 2.5 times the rate, else at half of it.
    counts = np.bincount((window.seconds // 10).astype(int))
    assert counts.var() / counts.mean() > 5


def test_on_off_of_equal_rates_is_poisson():
    process = arrival_process("on-off", split="test", on_off=OnOff(ratio=1.0))
    gaps = np.diff(draw(process, requests=20_000).seconds)
    assert gaps.std() / gaps.mean() == pytest.approx(1.0, abs=0.03)


def test_on_off_rates():
    on, off = OnOff().rates(4.0)
    assert (on, off) == pytest.approx((10.0, 2.0))
    with pytest.raises(WorkloadError, match="ratio of rates at least 1"):
        OnOff(ratio=0.5)


@pytest.mark.parametrize("name", ["poisson", "on-off"])
def test_another_rate_only_scales_time(name):
    process = arrival_process(name, split="train")
    one, other = draw(process, rate=1.0), draw(process, rate=3.0)
    np.testing.assert_array_equal(one.input_tokens, other.input_tokens)
    if name == "poisson":
        np.testing.assert_allclose(one.seconds, 3.0 * other.seconds)


@pytest.mark.parametrize("name", ["poisson", "on-off"])
def test_same_streams_same_window(name):
    process = arrival_process(name, split="test")
    one, same, other = draw(process), draw(process), draw(process, seed=1)
    assert one.seconds.tobytes() == same.seconds.tobytes()
    assert one.seconds.tobytes() != other.seconds.tobytes()


def test_parts_of_a_trace_are_apart():
    seconds = np.arange(4000.0)
    tokens = np.arange(4000)
    whole = Arrivals(seconds, tokens, tokens, "trace")
    parts = [trace_part(whole, split).seconds for split in SPLITS]
    assert [len(part) for part in parts] == [1600, 560, 1760]
    for before, after in pairwise(parts):
        assert after[0] - before[-1] >= 39.99


def test_windows_of_a_trace_stay_in_their_part(arrivals_file):
    inputs = {}
    for split in SPLITS:
        process = user_arrivals(arrivals_file, split)
        windows = [draw(process, requests=50, seed=seed).input_tokens for seed in range(40)]
        inputs[split] = (min(w.min() for w in windows), max(w.max() for w in windows))
        assert "disjoint ones exist" in draw(process, requests=50).note
    assert inputs["train"][1] < inputs["validation"][0]
    assert inputs["validation"][1] < inputs["test"][0]


def test_held_out_windows_are_disjoint_as_far_as_there_are_any(arrivals_file):
    process = user_arrivals(arrivals_file, "test")
    count = process.disjoint_windows(100)
    assert count == len(process.trace) // 100 >= 8
    inputs = [draw(process, requests=100, seed=s).input_tokens for s in range(count)]
    assert len(np.unique(np.concatenate(inputs))) == 100 * count
    assert "disjoint from others" in draw(process, requests=100, seed=count - 1).note
    assert "overlapping others" in draw(process, requests=100, seed=count).note


def test_windows_beyond_spread_over_all_starts():
    starts = [window_start(250, requests=100, seed=seed) for seed in range(40)]
    assert starts[:3] == [(0, False), (100, False), (starts[2][0], True)]
    beyond = np.sort([start for start, _ in starts[2:]])
    assert beyond.max() <= 150
    assert np.diff(beyond).max() < 15


def test_window_of_a_trace_has_the_rate_and_its_own_sizes(arrivals_file):
    window = draw(user_arrivals(arrivals_file), requests=101, rate=4.0)
    np.testing.assert_allclose(np.diff(window.seconds), 0.25)
    np.testing.assert_array_equal(window.input_tokens, np.arange(1, 102))
    # An answer has at least one token, whatever the file says.
    assert window.output_tokens[:3].tolist() == [1, 1, 2]


def test_azure_traces_are_read_from_the_folder(tmp_path):
    for path in TRACES.values():
        file = tmp_path / path
        file.parent.mkdir(exist_ok=True)
        rows = [f"2023-11-16 18:{i // 60:02}:{i % 60:02}.5,{i + 1},7" for i in range(2400)]
        file.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *rows]))
    folder = DataFolder(tmp_path)
    conv = arrival_process("azure-conv", split="test", folder=folder)
    assert conv.trace.source == "azure-conv (test part)"
    poisson = arrival_process(Process.POISSON, split="test", folder=folder)
    assert poisson.sizes.source == "azure-conv (test part)"
    assert set(draw(poisson).input_tokens) <= set(conv.trace.input_tokens)


def test_trace_without_data():
    with pytest.raises(WorkloadError, match="is not there: run `pointsman data fetch"):
        arrival_process("azure-conv", split="test")


def test_bad_arguments(arrivals_file):
    with pytest.raises(WorkloadError, match="one of poisson, on-off, azure-conv, azure-code"):
        arrival_process("weekly", split="test")
    with pytest.raises(WorkloadError, match="only 2000 requests, 2001 are wanted"):
        draw(user_arrivals(arrivals_file), requests=2001)
    with pytest.raises(WorkloadError, match="at a rate above 0"):
        draw(arrival_process("poisson", split="test"), rate=0.0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "arrival_seconds,input_tokens,output_tokens\n0,1,1\n1,x,1\n",
            r"own\.csv, row 3, column input",
        ),
        ("seconds,tokens\n0,1\n", r"own\.csv, row 1: the header must be arrival_seconds"),
        ("arrival_seconds,input_tokens,output_tokens\n0,1,1\n", "at least two arrivals"),
    ],
)
def test_wrong_arrivals_file(tmp_path, content, message):
    file = tmp_path / "own.csv"
    file.write_text(content)
    with pytest.raises(WorkloadError, match=message):
        user_arrivals(file)


def test_part_with_too_few_arrivals(tmp_path):
    file = tmp_path / "own.csv"
    file.write_text("arrival_seconds,input_tokens,output_tokens\n0,1,1\n1,1,1\n90,1,1\n")
    with pytest.raises(WorkloadError, match="too few arrivals for a validation part: 3 in all"):
        user_arrivals(file, "validation")
