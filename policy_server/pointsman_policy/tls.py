"""Mutual TLS of the control port, with certificates that change while it is served.

The files are looked at whenever a client connects, so that rotated certificates need no
restart and no watch. Connections that stand go on with what they were made with.
"""

import ssl
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import grpc
import structlog

from pointsman_policy.settings import TlsFiles

log = structlog.get_logger(__name__)

_ATTEMPTS = 3


@dataclass(frozen=True, slots=True)
class TlsContent:
    """What is in the files, in PEM."""

    certificate: bytes
    key: bytes
    client_ca: bytes


def read_tls(files: TlsFiles) -> TlsContent:
    """Read the files and check that they can be served with.

    Raises:
        ValueError: one cannot be read, is no PEM, or the key is another certificate's.

    """
    content = _read(files)
    for _ in range(_ATTEMPTS):
        _check(files)
        # The check reads the files again, and they may be rotated at any moment.
        again = _read(files)
        if again == content:
            return content
        content = again
    raise ValueError(f"{files.certificate} and {files.key} keep changing")


def _read(files: TlsFiles) -> TlsContent:
    try:
        return TlsContent(*(path.read_bytes() for path in files.paths))
    except OSError as error:
        raise ValueError(f"{error.filename} cannot be read: {error.strerror}") from None


def _check(files: TlsFiles) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        # A password is asked for at the terminal unless one is given.
        context.load_cert_chain(files.certificate, files.key, password="-")  # noqa: S106
    except OSError as error:
        raise ValueError(
            f"{files.certificate} and {files.key} are not a certificate and its unencrypted"
            f" key in PEM: {_reason(error)}"
        ) from None
    try:
        context.load_verify_locations(files.client_ca)
    except OSError as error:
        raise ValueError(
            f"{files.client_ca} holds no certificate in PEM: {_reason(error)}"
        ) from None


def _reason(error: OSError) -> str:
    reason = error.reason if isinstance(error, ssl.SSLError) else error.strerror
    return str(reason or error).replace("_", " ").lower()


class ServerTls:
    """Credentials of a gRPC server that follow the files.

    ``on_reload(ok)`` is called, in gRPC's thread, whenever changed files were read. Files
    that cannot be served with are logged once, and the last good ones stay in use.
    """

    def __init__(self, files: TlsFiles, *, on_reload: Callable[[bool], None]) -> None:
        self._files = files
        self._on_reload = on_reload
        self._marks = _marks(files)
        self._content = read_tls(files)

    def credentials(self) -> grpc.ServerCredentials:
        """Credentials that require a client certificate."""
        return grpc.dynamic_ssl_server_credentials(
            _configuration(self._content),
            self._changed,  # type: ignore[arg-type]  # the stubs forget that it may be None
            require_client_authentication=True,
        )

    def _changed(self) -> grpc.ServerCertificateConfiguration | None:
        """What gRPC asks before each handshake: the new configuration, None if unchanged."""
        content = self.refresh()
        return None if content is None else _configuration(content)

    def refresh(self) -> TlsContent | None:
        """What the files hold now if that is good and has changed."""
        marks = _marks(self._files)
        if marks == self._marks:
            return None
        self._marks = marks
        try:
            content = read_tls(self._files)
        except ValueError as error:
            log.warning("certificates not reloaded, the former stay", reason=str(error))
            self._on_reload(False)
            return None
        if content == self._content:
            return None
        self._content = content
        log.info("certificates reloaded", certificate=str(self._files.certificate))
        self._on_reload(True)
        return content


def _configuration(content: TlsContent) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration(
        [(content.key, content.certificate)], root_certificates=content.client_ca
    )


_Mark = tuple[int, int, int] | None
"""What tells cheaply that a file has changed: its inode, size and time; None: it is gone."""


def _marks(files: TlsFiles) -> list[_Mark]:
    return [_mark(path) for path in files.paths]


def _mark(path: Path) -> _Mark:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns
