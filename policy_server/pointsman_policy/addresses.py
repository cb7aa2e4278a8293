"""Where something listens."""

import ipaddress
import re
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

MAX_PORT = 65535

_HOST_AND_PORT = re.compile(
    r"(\[(?P<v6>[0-9A-Fa-f:.]+)\]|(?P<v4>[0-9.]+)|(?P<name>[A-Za-z0-9._-]+)):(?P<port>[0-9]+)"
)


def split_address(text: str) -> tuple[str, int]:
    """``ip:port`` or ``[ipv6]:port`` as IP and port, which may be 0.

    Raises ``ValueError``, its text made for people, for anything else; host names are
    not resolved.
    """
    found = _HOST_AND_PORT.fullmatch(text)
    if found is None:
        raise ValueError(f"{text!r} is no ip:port")
    v4, v6, name, digits = found["v4"], found["v6"], found["name"], found["port"]
    if name is not None:
        raise ValueError(f"{text!r} is no ip:port: host names are not resolved")
    try:
        ip = ipaddress.IPv6Address(v6) if v4 is None else ipaddress.IPv4Address(v4)
    except ipaddress.AddressValueError:
        raise ValueError(f"{text!r} is no ip:port") from None
    # The length first: int() refuses thousands of digits in words of its own.
    if len(digits) > len(str(MAX_PORT)) or int(digits) > MAX_PORT:
        raise ValueError(f"{text!r} is no ip:port: ports end at {MAX_PORT}")
    return str(ip), int(digits)


class SocketAddress(BaseModel):
    """Where Envoy listens or connects: either `host` and `port`, or `pipe`."""

    model_config = ConfigDict(frozen=True)

    host: str = ""
    port: Annotated[int, Field(ge=0, le=MAX_PORT)] = 0
    pipe: str = ""

    @classmethod
    def parse(cls, text: str) -> "SocketAddress":
        """Read `ip:port`, `[ipv6]:port` or `unix:///path`.

        Raises ValueError, its text made for people, for anything else: Envoy's static
        clusters take no host names. Several addresses are refused, too.
        """
        if "," in text:
            raise ValueError(f"{text!r}: exactly one address is taken here")
        if text.startswith("unix:"):
            path = text.removeprefix("unix:").removeprefix("//")
            if not path.startswith("/"):
                raise ValueError(f"{text!r}: a unix address needs an absolute path")
            return cls(pipe=path)
        if ":" not in text:
            raise ValueError(f"{text!r} is neither ip:port nor unix:///path")
        host, port = split_address(text)
        return cls(host=host, port=port)
