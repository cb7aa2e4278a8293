"""The rule that turns findings into health, and the pauses between looks."""

import asyncio

import pytest

from pointsman_core.resources import EngineMetrics, EngineType
from pointsman_policy.engines.probe import Answer, Finding
from pointsman_policy.scrape import Health, HealthRule, Scraper, Target

ALIVE = Finding(Answer.ALIVE)
FAILED = Finding(Answer.FAILED, "timed out")
GONE = Finding(Answer.GONE, "refused")
TARGET = Target("127.0.0.1:1", EngineType.VLLM, EngineMetrics(interval_ms=250))


def judged(*findings: Finding) -> list[Health | None]:
    rule = HealthRule(failures=3)
    return [rule.judge(finding) for finding in findings]


def test_nothing_is_known_at_first():
    assert HealthRule(failures=3).ready is None


def test_gone_is_unready_at_once_and_told_once():
    assert judged(ALIVE, GONE, GONE) == [Health(True, ""), Health(False, "refused"), None]


def test_failures_count_only_in_a_row():
    assert judged(ALIVE, FAILED, FAILED, ALIVE, FAILED, FAILED) == [Health(True, "")] + [None] * 5


def test_the_third_failure_in_a_row_makes_unready():
    assert judged(ALIVE, FAILED, FAILED, FAILED)[-1] == Health(False, "timed out")


def test_one_good_answer_makes_ready_again():
    assert judged(GONE, ALIVE) == [Health(False, "refused"), Health(True, "")]


def test_a_new_reason_is_news():
    missing = Finding(Answer.ALIVE, "no metrics")
    assert judged(ALIVE, missing, missing, ALIVE) == [
        Health(True, ""),
        Health(True, "no metrics"),
        None,
        Health(True, ""),
    ]


def test_pauses_grow_up_to_the_cap_while_away_and_are_the_interval_else():
    scraper = Scraper(on_load=lambda *_: None)
    rule = HealthRule(failures=3)
    rule.judge(ALIVE)
    pauses = [scraper._pause(TARGET, rule)]
    for _ in range(2000):
        rule.judge(GONE)
        pauses.append(scraper._pause(TARGET, rule))
    assert pauses[:7] == pytest.approx([0.25, 0.1, 0.2, 0.4, 0.8, 1.0, 1.0])
    assert pauses[-1] == 1.0
    rule.judge(ALIVE)
    assert scraper._pause(TARGET, rule) == 0.25


class FakeProber:
    """Finds what it is told to, then nothing more."""

    def __init__(self, *findings: Finding):
        self.findings = list(findings)
        self.looks = 0
        self.idle = asyncio.Event()

    async def look(self) -> Finding:
        if not self.findings:
            self.idle.set()
            await asyncio.Event().wait()
        self.looks += 1
        return self.findings.pop(0)


async def watched(monkeypatch, *findings: Finding) -> tuple[list[bool], FakeProber]:
    """What the scraper tells of these findings, until it looks once more."""
    prober, told = FakeProber(*findings), []
    async with Scraper(
        on_load=lambda *_: None, on_health=lambda _, ready, __: told.append(ready)
    ) as scraper:
        monkeypatch.setattr(scraper, "_prober", lambda *_: prober)
        monkeypatch.setattr(scraper, "_pause", lambda *_: 0.0)
        scraper.update({TARGET.address: TARGET})
        await prober.idle.wait()
    return told, prober


async def test_a_refused_connection_is_looked_at_twice_at_once_and_makes_unready(monkeypatch):
    told, prober = await watched(monkeypatch, ALIVE, GONE, GONE)
    assert told == [True, False]
    assert prober.looks == 3


async def test_one_refused_connection_is_forgiven(monkeypatch):
    told, _ = await watched(monkeypatch, ALIVE, GONE, ALIVE, GONE, ALIVE)
    assert told == [True]


async def test_no_pause_lies_between_the_two_looks(monkeypatch):
    prober = FakeProber(GONE, GONE)
    told = asyncio.Event()
    async with Scraper(on_load=lambda *_: None, on_health=lambda *_: told.set()) as scraper:
        monkeypatch.setattr(scraper, "_prober", lambda *_: prober)
        monkeypatch.setattr(scraper, "_pause", lambda *_: 3600.0)
        scraper.update({TARGET.address: TARGET})
        await told.wait()
    assert prober.looks == 2


async def test_targets_need_the_context():
    with pytest.raises(RuntimeError, match="enter the scraper"):
        Scraper(on_load=lambda *_: None).update({TARGET.address: TARGET})
