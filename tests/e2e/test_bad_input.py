"""What a user sees of mistakes: an OpenAI error object, never a hang, and a count."""

import io
import json

import pytest
import yarl

CHAT = "/v1/chat/completions"
GOOD = {"model": "auto", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}

GOOD_BODY = json.dumps(GOOD).encode()


async def send(site, *, method="POST", path=CHAT, data=b"", headers=None):
    async with site.session.request(
        method,
        yarl.URL(f"{site.url}{path}", encoded=True),
        data=data,
        headers={"content-type": "application/json"} | (headers or {}),
    ) as response:
        return response.status, json.loads(await response.read())["error"]


COUNTERS = ("downstream_rq_4xx", "rq_direct_response", "downstream_rq_too_large")


def counted(before, after):
    """What Envoy itself counted of mistakes in between."""
    names = {name: f"http.clients.{name}" for name in COUNTERS}
    grown = {name: after.get(key, 0) - before.get(key, 0) for name, key in names.items()}
    return {name: count for name, count in grown.items() if count}


BAD = [
    ("malformed JSON", b'{"model": "auto",', {}, 400, "invalid_json"),
    ("not an object", b"[1, 2]", {}, 400, "invalid_json"),
    ("empty body", b"", {}, 400, "missing_body"),
    ("no model", b'{"messages": []}', {}, 400, "missing_model"),
    ("model of a wrong type", b'{"model": 7, "messages": []}', {}, 400, "invalid_type"),
    ("unknown model", b'{"model": "gpt-9", "messages": []}', {}, 404, "model_not_found"),
    ("no messages", b'{"model": "auto"}', {}, 400, "missing_prompt"),
    ("messages of a wrong type", b'{"model": "auto", "messages": "hi"}', {}, 400, "invalid_type"),
    ("limit that is no number", GOOD_BODY, {"x-slo-tpot-ms": "fast"}, 400, "invalid_limit"),
    ("negative limit", GOOD_BODY, {"x-slo-ttft-ms": "-5"}, 400, "invalid_limit"),
    ("compressed", b"\x1f\x8b", {"content-encoding": "gzip"}, 415, "unsupported_encoding"),
]  # fmt: skip


async def test_each_mistake_has_its_error_and_its_count(site):
    for what, data, headers, status, code in BAD:
        got_status, error = await send(site, data=data, headers=headers)
        assert (got_status, error["code"]) == (status, code), what
        assert error["message"], what
        assert set(error) == {"message", "type", "param", "code"}, what
    refusals = await site.metric("pointsman_refusals_total")
    for code in {code for *_, code in BAD}:
        wanted = sum(1 for *_, c in BAD if c == code)
        assert refusals[f'code="{code}"'] == wanted, code
    await site.until_empty()


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("POST", "/v1/embeddings", 404),
        ("GET", "/", 404),
        ("GET", CHAT, 405),
        ("POST", "/v1/models", 405),
        ("POST", "/v1%2fchat/completions", 404),
    ],
)
async def test_unsupported_paths_and_methods(site, method, path, status):
    before = await site.envoy.stats()
    got, error = await send(site, method=method, path=path)
    assert got == status
    assert error["type"] == "invalid_request_error"
    assert counted(before, await site.envoy.stats()) == {
        "downstream_rq_4xx": 1,
        "rq_direct_response": 1,
    }


async def test_a_body_over_the_limit_is_413(site):
    body = b'{"model": "' + b"a" * 5_000_000 + b'"}'
    before = await site.envoy.stats()
    status, error = await send(site, data=io.BytesIO(body))
    assert status == 413
    assert error["code"] == "request_too_large"
    assert counted(before, await site.envoy.stats()) == {
        "downstream_rq_4xx": 1,
        "downstream_rq_too_large": 1,
    }
    await site.until_empty()


async def test_bad_http_is_400(site):
    before = await site.envoy.stats()
    status, error = await send(site, path="/v1/%00")
    assert (status, error["code"]) == (400, "bad_request")
    assert set(error) == {"message", "type", "param", "code"}
    assert counted(before, await site.envoy.stats()) == {"downstream_rq_4xx": 1}


async def test_a_models_name_may_have_a_slash(site):
    site.declare_policy("slash", models=["auto/Random"])
    site.write_manifests()
    await site.until(lambda s: "default/slash" in s["snapshots"], "the new policy in force")
    for method, length in (("GET", True), ("HEAD", False)):
        url = yarl.URL(f"{site.url}/v1/models/auto%2FRandom", encoded=True)
        async with site.session.request(method, url) as response:
            assert response.status == 200
            body = await response.read()
        assert bool(body) is length
        assert not body or json.loads(body)["id"] == "auto/Random"
    assert (await site.ask(model="auto/Random"))[0] == 200


async def test_a_large_body_within_the_limit_passes(site):
    body = json.dumps(GOOD | {"user": "u" * 3_000_000}).encode()
    async with site.session.post(f"{site.url}{CHAT}", data=io.BytesIO(body)) as response:
        assert response.status == 200, await response.text()


async def test_forged_headers_change_nothing(site):
    forged = {
        "x-gateway-destination-endpoint": "127.0.0.1:1",
        "x-pointsman-endpoint": "127.0.0.1:1",
        "x-pointsman-expert": "evil",
        "x-pointsman-served-models": "evil",
        "x-pointsman-filter": "observe",
        "x-request-id": "always-the-same",
    }
    for _ in range(5):
        status, headers, _ = await site.ask(headers=forged)
        assert status == 200
        assert headers["x-pointsman-endpoint"] in site.addresses.values()
        assert headers["x-pointsman-expert"] in site.addresses
    assert sum((await site.metric("pointsman_untracked_total")).values()) == 0
    await site.until_empty()
    await site.kill_server()
    status, headers, document = await site.ask(headers=forged)
    assert status == 200
    assert document["model"].endswith("-model")


async def test_a_broken_manifest_leaves_the_snapshot_in_force(site):
    before = (await site.live())["snapshots"]
    site.policies["auto"]["spec"]["qos"] = {"latencyPerTokenMs": -3}
    site.policies["auto"]["spec"]["algorithn"] = "Random"
    site.write_manifests()
    log = site.folder / "policy-server.log"
    await site.until(lambda _: log.read_text().count("manifest refused") == 2, "both errors logged")
    assert "spec.qos.latencyPerTokenMs" in log.read_text()
    assert "algorithn" in log.read_text()
    assert (await site.live())["snapshots"] == before
    assert (await site.metric("pointsman_reloads_total"))['result="failed"'] == 1
    assert (await site.ask())[0] == 200

    site.declare_policy(algorithm="Random")
    site.write_manifests()
    await site.until(lambda s: s["snapshots"] != before, "the mended manifest in force")
    _, headers, _ = await site.ask()
    assert headers["x-pointsman-why"].startswith("Random:")


async def test_requests_over_their_limit_are_rejected_where_the_policy_says_so(site):
    site.declare_policy(algorithm="LatencyQualityGreedy", admission="Reject")
    site.write_manifests()
    await site.until_answered_by(set(site.addresses), why="LatencyQualityGreedy", any_of=True)
    status, headers, document = await site.ask(headers={"x-slo-tpot-ms": "0.001"})
    assert status == 429
    assert headers["retry-after"] == "1"
    assert document["error"]["message"] == (
        "Rejected by policy default/auto: the chosen endpoint cannot keep the latency limit."
    )
    assert (await site.metric("pointsman_rejections_total")) == {
        'policy="default/auto",reason="over_limit"': 1
    }
