"""Settings, and what to write instead of wrong ones."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from control_plane.certificates import Authority
from pointsman_operator.observed import Key
from pointsman_operator.settings import (
    ServiceRef,
    TlsFiles,
    is_loopback,
    log_settings_from_environment,
    make_settings,
    settings_from_environment,
)

TLS = {"tls_cert": "c", "tls_key": "k", "tls_ca": "a"}

WRONG = {
    "service": ({"policy_servers": "policy:9003"}, "--policy-servers: 'policy:9003' is not"),
    "service path": ({"policy_servers": "a/b/c:9003"}, "is not namespace/name:port"),
    "half of TLS": ({"tls_cert": "c"}, "go together"),
    "plaintext": (
        {"policy_server_addresses": ("127.0.0.1:9003", "10.0.0.1:9003")},
        "--policy-server-address: plaintext is only for loopback, not for 10.0.0.1:9003: "
        "give --tls-cert, --tls-key and --tls-ca",
    ),
    "plaintext to a Service": (
        {"policy_servers": "pointsman/policy:9003"},
        "--policy-servers: plaintext is only for loopback: give --tls-cert, --tls-key and --tls-ca",
    ),
    "host name": ({"policy_server_addresses": ("localhost:9003",)}, "plaintext is only for"),
    "namespace": ({"namespaces": ("Team_A",)}, "is not the name of a namespace"),
    "servers elsewhere": (
        {"namespaces": ("team-a",), "policy_servers": "pointsman/policy:9003", **TLS},
        "add --namespace pointsman",
    ),
    "url": ({"prometheus_url": "prometheus:9090"}, "is not an http:// or https:// URL"),
    "interval": ({"resync_interval_s": 0.0}, "resync_interval_s must be positive"),
    "no interval": ({"resync_interval_s": float("nan")}, "resync_interval_s must be positive"),
    "http": ({"http_address": "foo"}, "--http-address: 'foo' is not ip:port"),
    "http port": ({"http_address": "0.0.0.0:x"}, "--http-address: '0.0.0.0:x' is not ip:port"),
    "http IPv6": ({"http_address": "::1:80"}, "--http-address: '::1:80' is not ip:port"),
    "port": ({"http_address": ":65536"}, "--http-address: ':65536' is not ip:port"),
    "server without port": (
        {"policy_server_addresses": ("127.0.0.1",)},
        "--policy-server-address: '127.0.0.1' is neither ip:port nor unix:///path",
    ),
    "server without host": ({"policy_server_addresses": (":9003",)}, "':9003' is neither"),
}


@pytest.mark.parametrize(("given", "message"), WRONG.values(), ids=WRONG)
def test_wrong_settings(given, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make_settings(**given)


@pytest.mark.parametrize("text", ["abc", "nan", "inf", "0.001", "-5"])
def test_an_interval_of_the_environment_that_is_none(text):
    with pytest.raises(ValueError, match=f"POINTSMAN_PROBE_INTERVAL: '{text}' is not a number of"):
        settings_from_environment({"POINTSMAN_PROBE_INTERVAL": text})


@pytest.mark.parametrize("address", [":8080", "0.0.0.0:8080", "[::]:8080", "localhost:0"])
def test_addresses_of_the_probes(address):
    assert make_settings(http_address=address).http_address == address


def test_certificates_must_be_readable(tmp_path):
    files = [tmp_path / name for name in "cka"]
    tls = TlsFiles(cert=files[0], key=files[1], ca=files[2])
    for path, what in zip(files, ("certificate", "key", "CA"), strict=True):
        text = f"the {what} for policy servers cannot be read: {path}: No such file"
        with pytest.raises(ValueError, match=re.escape(text)):
            tls.check()
        path.touch()


def test_certificates_that_cannot_be_used(tmp_path):
    authority = Authority(tmp_path)
    pair, other = authority.client("operator"), authority.client("other")
    good = TlsFiles(cert=pair.certificate, key=pair.key, ca=authority.path)
    good.check()
    with pytest.raises(ValueError, match="not a certificate and its private key in PEM"):
        replace(good, key=other.key).check()
    with pytest.raises(ValueError, match="not a certificate and its private key in PEM"):
        replace(good, cert=pair.key, key=pair.certificate).check()
    empty = tmp_path / "empty"
    empty.touch()
    with pytest.raises(ValueError, match=f"--tls-ca: {empty} holds no certificate in PEM"):
        replace(good, ca=empty).check()


def test_logs_of_kopf_run():
    assert log_settings_from_environment({}) == ("info", "json")
    given = {"POINTSMAN_LOG_LEVEL": "debug", "POINTSMAN_LOG_FORMAT": "console"}
    assert log_settings_from_environment(given) == ("debug", "console")


def test_the_certificate_is_expected_to_name_the_service():
    settings = make_settings(policy_servers="pointsman/policy-server:control", **TLS)
    assert settings.policy_servers == ServiceRef(Key("pointsman", "policy-server"), "control")
    assert settings.tls.server_name == "policy-server.pointsman.svc"
    settings = make_settings(policy_servers="a/b:1", tls_server_name="x", **TLS)
    assert settings.tls.server_name == "x"


def test_loopback_may_be_plaintext():
    addresses = ("127.0.0.1:1", "[::1]:1", "unix:///run/policy.sock")
    assert make_settings(policy_server_addresses=addresses).tls is None
    assert all(map(is_loopback, addresses))
    assert not is_loopback("10.0.0.1:1")


def test_every_process_has_a_name_of_its_own():
    assert make_settings().identity != make_settings().identity


def test_settings_from_the_environment():
    settings = settings_from_environment(
        {
            "POINTSMAN_NAMESPACE": "a b",
            "POINTSMAN_POLICY_SERVERS": "a/policy:9003",
            "POINTSMAN_POLICY_SERVER_ADDRESS": "10.0.0.1:1 10.0.0.2:1",
            "POINTSMAN_TLS_CERT": "/c",
            "POINTSMAN_TLS_KEY": "/k",
            "POINTSMAN_TLS_CA": "/a",
            "POINTSMAN_HTTP_ADDRESS": "0.0.0.0:8081",
            "POINTSMAN_RESYNC_INTERVAL": "30",
            "POINTSMAN_PROMETHEUS_URL": "http://prometheus:9090",
        }
    )
    assert settings.namespaces == ("a", "b")
    assert settings.policy_server_addresses == ("10.0.0.1:1", "10.0.0.2:1")
    assert settings.tls.ca == Path("/a")
    assert settings.http_address == "0.0.0.0:8081"
    assert settings.resync_interval_s == 30.0
    assert settings.prometheus_url == "http://prometheus:9090"
    assert settings_from_environment({}).http_address == "127.0.0.1:8080"
