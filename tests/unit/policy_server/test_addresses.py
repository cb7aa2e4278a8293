"""Addresses as people write them, and what they are told when one is wrong."""

import pytest

from pointsman_policy.addresses import SocketAddress, split_address


@pytest.mark.parametrize(
    ("address", "parts"),
    [
        ("10.0.0.1:8000", ("10.0.0.1", 8000)),
        ("10.0.0.1:0", ("10.0.0.1", 0)),
        ("[fd00::1]:65535", ("fd00::1", 65535)),
        ("[0:0::1]:1", ("::1", 1)),
    ],
)
def test_addresses(address: str, parts: tuple[str, int]):
    assert split_address(address) == parts
    assert SocketAddress.parse(address) == SocketAddress(host=parts[0], port=parts[1])


@pytest.mark.parametrize("address", ["unix:///run/p.sock", "unix:/run/p.sock"])
def test_unix_addresses(address: str):
    assert SocketAddress.parse(address) == SocketAddress(pipe="/run/p.sock")


@pytest.mark.parametrize(
    "address",
    [
        "10.0.0.1:",
        "10.0.0.1:80a",
        "10.0.0.1:-1",
        "10.0.0.1:²",
        "10.0.0:1",
        "999.0.0.1:1",
        "[10.0.0.1]:80",
        "fd00::1:80",
        "[fd00::1%eth0]:80",
        "10.0.0.1:80\n",
    ],
)
def test_no_addresses(address: str):
    with pytest.raises(ValueError, match=r"is no ip:port$"):
        SocketAddress.parse(address)


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("", "'' is neither ip:port nor unix:///path"),
        ("10.0.0.1", "'10.0.0.1' is neither ip:port nor unix:///path"),
        ("10.0.0.1:99999", "'10.0.0.1:99999' is no ip:port: ports end at 65535"),
        ("10.0.0.1:65536", "'10.0.0.1:65536' is no ip:port: ports end at 65535"),
        ("localhost:9002", "'localhost:9002' is no ip:port: host names are not resolved"),
        ("unix://p.sock", "'unix://p.sock': a unix address needs an absolute path"),
        ("10.0.0.1:1,10.0.0.1:2", "'10.0.0.1:1,10.0.0.1:2': exactly one address is taken here"),
        ("unix:///a,unix:///b", "'unix:///a,unix:///b': exactly one address is taken here"),
    ],
)
def test_messages_are_plain(address: str, message: str):
    with pytest.raises(ValueError, match=r"address|port") as caught:
        SocketAddress.parse(address)
    assert str(caught.value) == message  # nothing of pydantic's
