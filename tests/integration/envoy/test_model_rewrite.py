"""The Lua filter that makes each attempt name a model of its endpoint, driven through Envoy."""

import json

import pytest

pytestmark = pytest.mark.integration

NAME = 'served "x"\\é/1'
WIRE = rb'"served \u0022x\u0022\u005c' + "é".encode() + b'/1"'

# Body sent, body that the engine must get (None: the same).
BODIES: dict[str, tuple[bytes, bytes | None]] = {
    "simple": (b'{"model":"auto"}', b'{"model":' + WIRE + b"}"),
    "last": (b'{"a":1,"model":"auto"}', b'{"a":1,"model":' + WIRE + b"}"),
    "whitespace": (
        b' \r\n\t{ \n"model"\t:\r "auto" \n , "a" : [ ] } \n',
        b' \r\n\t{ \n"model"\t:\r ' + WIRE + b' \n , "a" : [ ] } \n',
    ),
    "nested only": (b'{"a":{"model":"auto"},"b":[{"model":"auto"}]}', None),
    "nested before": (
        b'{"a":{"model":"auto"},"b":[{"model":"auto","c":["]"]}],"model":"auto"}',
        b'{"a":{"model":"auto"},"b":[{"model":"auto","c":["]"]}],"model":' + WIRE + b"}",
    ),
    "in a string": (
        rb'{"a":"\"model\":\"auto\"","b":"\\","model":"auto"}',
        rb'{"a":"\"model\":\"auto\"","b":"\\","model":' + WIRE + b"}",
    ),
    "brackets in a string": (
        rb'{"a":["}{][\\\"}]",{}],"model":"auto"}',
        rb'{"a":["}{][\\\"}]",{}],"model":' + WIRE + b"}",
    ),
    "value called model": (b'{"a":"model","b":"auto"}', None),
    "escaped key": (rb'{"mod\u0065l":"auto"}', rb'{"mod\u0065l":' + WIRE + b"}"),
    "key with an escaped slash before": (rb'{"\\u006dodel":"auto"}', None),
    "twice": (
        b'{"model":"auto","model":"other"}',
        b'{"model":' + WIRE + b',"model":' + WIRE + b"}",
    ),
    "unicode": (
        '{"ключ":"знач💡","model":"авто","z":"ü"}'.encode(),
        '{"ключ":"знач💡","model":'.encode() + WIRE + ',"z":"ü"}'.encode(),
    ),
    "NUL and newline in a model": (b'{"model":"a\\u0000\\n"}', b'{"model":' + WIRE + b"}"),
    "empty model": (b'{"model":""}', b'{"model":' + WIRE + b"}"),
    "scalars around": (
        b'{"a":-1.5e3,"b":true,"c":null,"model":"auto","d":false}',
        b'{"a":-1.5e3,"b":true,"c":null,"model":' + WIRE + b',"d":false}',
    ),
    "many quotes": (
        b'{"a":"' + b'\\"' * 5000 + b'","model":"auto"}',
        b'{"a":"' + b'\\"' * 5000 + b'","model":' + WIRE + b"}",
    ),
    "deep": (
        b'{"a":' + b"[" * 20000 + b"]" * 20000 + b',"model":"auto"}',
        b'{"a":' + b"[" * 20000 + b"]" * 20000 + b',"model":' + WIRE + b"}",
    ),
    "already served": (b'{"model":' + WIRE + b"}", None),
    "already served, plain slash escapes": (rb'{"model":"served \"x\"\\\u00e9\/1"}', None),
    "already served, second name": (b'{"model":"alias-\xf0\x9f\x92\xa1"}', None),
    "already served, surrogates": (rb'{"model":"alias-\ud83d\udca1"}', None),
    "no model": (b'{"messages":[]}', None),
    "empty object": (b" {} ", None),
    "model is a number": (b'{"model":1}', None),
    "model is null": (b'{"model":null}', None),
    "model is a list": (b'{"model":["auto"]}', None),
    "a list": (b'[{"model":"auto"}]', None),
    "a string": (b'"model"', None),
    "not JSON": (b"model=auto", None),
    "cut off": (b'{"model":"auto"', None),
    "cut off in a string": (b'{"model":"auto', None),
    "cut off in a list": (b'{"model":"auto","a":["', None),
    "no colon": (b'{"model" "auto"}', None),
    "no comma": (b'{"model":"auto" "a":1}', None),
    "key without quotes": (b'{model:"auto"}', None),
    "rubbish behind": (b'{"model":"auto"} x', None),
    "trailing comma": (b'{"model":"auto",}', None),
    "only spaces": (b"   ", None),
    "binary": (bytes(range(256)), None),
}


@pytest.fixture
async def served(site):
    """The site with one engine, whose names need escapes, and no policy server."""
    site.maths.models = (NAME, "alias-💡")
    await site.policy.announce([site.maths.target])
    await site.healthy(1)
    await site.policy.stop()
    await site.policy_gone()
    return site


async def test_every_form_of_body(served):
    wrong = {}
    for name, (sent, expected) in BODIES.items():
        status, _, _ = await served.chat(sent)
        got = served.maths.received[-1]
        assert status == 200
        assert got.headers["content-length"] == str(len(got.body)), name
        if got.body != (sent if expected is None else expected):
            wrong[name] = got.body
    assert wrong == {}
    assert json.loads(WIRE) == NAME
    stats = await served.envoy.stats()
    assert stats["cluster.experts.lua.model.executions"] >= len(BODIES)
    assert stats["cluster.experts.lua.model.errors"] == 0


async def test_an_empty_body_passes(served):
    status, _, _ = await served.chat(b"")
    assert status == 200
    assert served.maths.received[-1].body == b""


async def test_an_endpoint_without_names_gets_the_body_as_it_is(site):
    site.maths.models = ()
    await site.policy.announce([site.maths.target])
    await site.healthy(1)
    await site.policy.stop()
    await site.chat({"model": "auto"})
    assert site.maths.received[-1].model == "auto"
    assert "x-pointsman-served-models" not in site.maths.received[-1].headers
