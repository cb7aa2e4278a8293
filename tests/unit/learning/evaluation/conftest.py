"""Made-up scenarios, outcomes and runs, so that nothing is simulated here."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pointsman_core.manifests import compile_manifests
from pointsman_core.resources import Admission
from pointsman_core.snapshot import Snapshot
from pointsman_learning.evaluation import Plan, Run, Task
from pointsman_learning.evaluation.metrics import Metrics, Prompts, Routing, Timeline
from pointsman_learning.simulator import Outcome, Scenario

MANIFESTS = """
apiVersion: pointsman.dev/v1alpha1
kind: LLMExpert
metadata: {name: chat}
spec:
  model: chat
  backend: {addresses: ["127.0.0.1:18001", "127.0.0.1:18002"]}
  profile: {memoryBandwidthGBps: 500, peakTflops: 50, kvCacheGiB: 6}
---
apiVersion: pointsman.dev/v1alpha1
kind: LLMExpert
metadata: {name: coder}
spec:
  model: coder
  backend: {addresses: ["127.0.0.1:18003"]}
  profile: {memoryBandwidthGBps: 300, peakTflops: 30, kvCacheGiB: 6}
---
apiVersion: pointsman.dev/v1alpha1
kind: RoutingPolicy
metadata: {name: auto}
spec: {models: [auto]}
"""


@pytest.fixture(scope="session")
def snapshot() -> Snapshot:
    """Endpoints chat, chat, coder."""
    return compile_manifests({"site.yaml": MANIFESTS}).snapshots[0]


def make_scenario(snapshot: Snapshot, requests: int = 5) -> Scenario:
    shape = (requests, 3)
    return Scenario(
        snapshot=snapshot,
        arrival_s=np.arange(requests, dtype=np.float64),
        prompt_tokens=np.full(requests, 10),
        limit_s=np.full(requests, 0.1),
        score=np.tile([0.5, 0.5, 0.9], (requests, 1)),
        output_tokens=np.full(shape, 10),
        predicted_quality=np.full(shape, 0.5),
        predicted_output_tokens=np.full(shape, 10.0),
        domain=np.arange(requests) % 2,
        domains=("code", "math"),
        description="made up",
    )


@pytest.fixture
def outcome(snapshot: Snapshot) -> Outcome:
    """Five requests: in time, in time, late, rejected, lost with its endpoint."""
    scenario = make_scenario(snapshot)
    return Outcome(
        scenario=scenario,
        endpoint=np.array([0, 2, 1, -1, 2]),
        first_token_s=scenario.arrival_s + np.array([0.1, 0.2, 0.3, np.inf, np.inf]),
        finish_s=scenario.arrival_s + np.array([0.5, 1.0, 2.0, np.inf, np.inf]),
        preemptions=np.array([0, 0, 2, 0, 0]),
        busy_s=np.array([0.5, 1.0, 0.5]),
    )


Fake = Callable[[Plan], list[Run]]

QOS = {"Random": 0.2, "RoundRobin": 0.3, "ImpactGreedy": 0.5, "bound:lookahead-true-quality": 0.6}


def _prompts(qos: float, *, requests: int) -> Prompts:
    """Each of 50 prompts asked twice; half of them are answered far better, whoever answers."""
    share = np.tile([0.5, 1.5], 25)
    return Prompts(np.arange(50), np.full(50, requests // 50), share * qos * requests / 50)


def fake_run(task: Task) -> Run:
    """A run whose QoS is that of its decider less the load's, plus what its window brings."""
    window = task.window
    own = np.random.default_rng([window.seed, list(QOS).index(task.decider)])
    shared = 0.1 * np.random.default_rng(window.seed).standard_normal()
    qos = QOS[task.decider] - 0.1 * window.load + shared + 0.01 * own.standard_normal()
    requests = np.array([[40, 10, 0], [0, 40, 10]])
    return Run(
        task=task,
        metrics=Metrics(
            requests=100,
            average_qos=qos,
            quality=0.6,
            violation_rate=0.3,
            rejected=0.1,
            failed=0.0,
            latency_p50_ms=40.0,
            latency_p95_ms=90.0,
            latency_p99_ms=12_345.0,
            first_token_p50_ms=200.0,
            first_token_p99_ms=900.0,
            resource_efficiency=float("nan"),
            busy=0.5,
            preemptions=0,
        ),
        routing=Routing(("code", "math"), ("chat", "coder"), requests, requests * 0.5),
        timeline=Timeline(1.0, np.arange(60), np.arange(60) * 0.5),
        prompts=_prompts(qos, requests=100),
        load=window.load,
        description=f"made up, window {window.seed}",
        wall_s=0.1,
    )


@pytest.fixture
def fakes() -> Fake:
    return lambda plan: [fake_run(task) for task in plan.tasks()]


@pytest.fixture
def plan() -> Plan:
    return Plan(
        workloads=["poisson", "azure-code"],
        loads=[0.5, 0.9],
        limits=["x1", "x2.5"],
        admissions=[Admission.REJECT],
        deciders=list(QOS),
        seeds=range(6),
    )


@pytest.fixture
def own_files(tmp_path: Path) -> dict[str, Path]:
    """A user's own data: manifests, scores, arrivals."""
    rng = np.random.default_rng(0)
    files = {name: tmp_path / name for name in ("site.yaml", "scores.csv", "trace.csv")}
    files["site.yaml"].write_text(MANIFESTS)
    rows = [
        f"Question {topic} number {n},{expert},{rng.random():.3f},{rng.integers(5, 60)}"
        for n in range(40)
        for topic in ("code", "sum")
        for expert in ("chat", "coder")
    ]
    files["scores.csv"].write_text("\n".join(["prompt,expert,score,output_tokens", *rows]))
    arrivals = [f"{i * 0.5},{rng.integers(10, 400)},{rng.integers(5, 60)}" for i in range(200)]
    files["trace.csv"].write_text(
        "\n".join(["arrival_seconds,input_tokens,output_tokens", *arrivals])
    )
    return files
