"""The command line: refusals are messages, not tracebacks."""

import json
import logging

import kopf
import pytest
import structlog
import typer
from typer.testing import CliRunner

from pointsman_operator import supervise
from pointsman_operator.cli import operator
from pointsman_operator.logs import configure_logs
from pointsman_operator.observed import Key
from pointsman_operator.supervise import StartError


@pytest.fixture(autouse=True)
def _logging_as_before():
    root, kopf = logging.getLogger(), logging.getLogger("kopf")
    before = (root.handlers[:], root.level, kopf.level)
    yield
    root.handlers[:], level, kopf_level = before
    root.setLevel(level)
    kopf.setLevel(kopf_level)
    structlog.reset_defaults()


@pytest.fixture
def invoke(monkeypatch):
    started = []
    monkeypatch.setattr(supervise, "run", started.append)
    app = typer.Typer()
    app.command()(operator)

    def call(*arguments, **environment):
        result = CliRunner().invoke(app, arguments, env=environment)
        return result, started

    return call


def test_flags_become_settings(invoke):
    result, started = invoke(
        "--namespace", "a", "--namespace", "b",
        "--policy-servers", "a/policy:9003",
        "--tls-cert", "c", "--tls-key", "k", "--tls-ca", "ca",
        "--resync-interval", "30",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    (settings,) = started
    assert settings.namespaces == ("a", "b")
    assert settings.policy_servers.service == Key("a", "policy")
    assert settings.tls.server_name == "policy.a.svc"
    assert settings.resync_interval_s == 30.0


def test_so_does_the_environment(invoke):
    _, started = invoke(POINTSMAN_NAMESPACE="a b", POINTSMAN_HTTP_ADDRESS="0.0.0.0:8081")
    assert started[0].namespaces == ("a", "b")
    assert started[0].http_address == "0.0.0.0:8081"


WRONG = {
    "plaintext": (("--policy-server-address", "10.0.0.1:9003"), "plaintext is only for loopback"),
    "half of TLS": (("--tls-cert", "c"), "go together"),
    "log level": (("--log-level", "loud"), "use debug, info, warning or error"),
    "log format": (("--log-format", "xml"), "use json or console"),
}


@pytest.mark.parametrize(("arguments", "message"), WRONG.values(), ids=WRONG)
def test_wrong_flags(invoke, arguments, message):
    result, started = invoke(*arguments)
    assert result.exit_code == 1
    assert message in result.output
    assert started == []


def test_a_refused_start(invoke, monkeypatch):
    def refuse(_):
        raise StartError("no access")

    call = invoke
    monkeypatch.setattr(supervise, "run", refuse)
    result, _ = call()
    assert (result.exit_code, result.output.strip()) == (1, "no access")


def test_logs_of_others_are_structured_too(capsys):
    configure_logs(level="info", style="json")
    structlog.get_logger().info("ours", policy="auto")
    logging.getLogger("kopf.reactor").warning("kopf's %s", "own")
    logging.getLogger("kopf.reactor").info("not this")
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [(line["event"], line["level"]) for line in lines] == [
        ("ours", "info"),
        ("kopf's own", "warning"),
    ]
    assert lines[0]["policy"] == "auto"


class AnswerError(Exception):
    """As kopf raises them."""

    def __init__(self, status):
        super().__init__("the server says no")
        self.status = status


@pytest.mark.parametrize(
    ("logger", "status", "level"),
    [
        ("kopf._core.reactor.orchestration", 404, "warning"),
        ("kopf._core.reactor.orchestration", 410, "warning"),
        ("asyncio", 410, "warning"),
        ("kopf._core.reactor.orchestration", 400, "error"),
        ("pointsman_operator.runtime", 404, "error"),
    ],
)
def test_a_watch_of_what_is_gone_is_no_error(capsys, logger, status, level):
    configure_logs(level="info", style="json")
    logging.getLogger(logger).error("Watcher has failed", exc_info=AnswerError(status))
    line = json.loads(capsys.readouterr().err)
    assert (line["event"], line["level"]) == ("Watcher has failed", level)
    assert ("exception" in line) is (level == "error")


@pytest.mark.parametrize("logger", ["kopf._core.reactor.observation", "asyncio"])
def test_refused_credentials_are_not_told_by_every_task_of_kopf(capsys, logger):
    configure_logs(level="info", style="json")
    logging.getLogger(logger).error("failed", exc_info=kopf.LoginError("Ran out."))
    logging.getLogger("kopf.api").error("TCP closed; will re-authenticate: GET /api")
    logging.getLogger("kopf.api").error("will retry: GET -> ConnectionError('Connector is closed')")
    logging.getLogger("kopf.api").error("will retry: GET -> ConnectionError('refused')")
    (line,) = capsys.readouterr().err.splitlines()
    assert "refused" in line
