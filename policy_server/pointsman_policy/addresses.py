"""Where something listens."""

import re
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

_HOST_AND_PORT = re.compile(r"(?P<host>\[[0-9a-fA-F:.]+\]|[0-9.]+):(?P<port>[0-9]{1,5})")


class SocketAddress(BaseModel):
    """Where Envoy listens or connects: either `host` and `port`, or `pipe`."""

    model_config = ConfigDict(frozen=True)

    host: str = ""
    port: Annotated[int, Field(ge=0, le=65535)] = 0
    pipe: str = ""

    @classmethod
    def parse(cls, text: str) -> "SocketAddress":
        """Read `ip:port`, `[ipv6]:port` or `unix:///path`.

        Raises ValueError for anything else: Envoy's static clusters take no host names.
        """
        if text.startswith("unix:"):
            path = text.removeprefix("unix:").removeprefix("//")
            if not path.startswith("/"):
                raise ValueError(f"{text!r}: a unix address needs an absolute path")
            return cls(pipe=path)
        if not (found := _HOST_AND_PORT.fullmatch(text)):
            raise ValueError(f"{text!r} is neither ip:port nor unix:///path")
        return cls(host=found["host"].strip("[]"), port=int(found["port"]))
