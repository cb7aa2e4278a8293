"""TLS files: what is wrong with them is told, and changed ones are taken when they are good."""

import os
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from control_plane.certificates import Authority, write_key
from pointsman_policy.settings import TlsFiles
from pointsman_policy.tls import ServerTls, read_tls


@pytest.fixture
def authority(tmp_path):
    return Authority(tmp_path)


@pytest.fixture
def files(authority):
    pair = authority.server("server", hosts=("127.0.0.1",))
    return TlsFiles(certificate=pair.certificate, key=pair.key, client_ca=authority.path)


class Reloads(list):
    def __call__(self, ok):
        self.append(ok)


@pytest.fixture
def reloads():
    return Reloads()


def rotate(authority, files):
    """A new certificate in the place of the old one."""
    pair = authority.server("server", hosts=("127.0.0.1",))
    assert pair.certificate == files.certificate
    return files.certificate.read_bytes()


class TestReading:
    def test_good_files(self, files):
        content = read_tls(files)
        assert content.certificate == files.certificate.read_bytes()
        assert content.key == files.key.read_bytes()
        assert content.client_ca == files.client_ca.read_bytes()

    @pytest.mark.parametrize("name", ["certificate", "key", "client_ca"])
    def test_one_is_missing(self, name, files):
        path = getattr(files, name)
        path.unlink()
        with pytest.raises(ValueError, match=f"^{path} cannot be read: No such file"):
            read_tls(files)

    @pytest.mark.parametrize("name", ["certificate", "key"])
    def test_one_is_no_pem(self, name, files):
        getattr(files, name).write_text("nonsense")
        with pytest.raises(ValueError, match="are not a certificate and its unencrypted key"):
            read_tls(files)

    @pytest.mark.parametrize("content", ["nonsense", ""])
    def test_the_authority_is_no_pem(self, content, files):
        files.client_ca.write_text(content)
        with pytest.raises(ValueError, match=rf"^{files.client_ca} holds no certificate in PEM"):
            read_tls(files)

    def test_the_key_is_anothers(self, files):
        write_key(files.key)
        with pytest.raises(ValueError, match="key values mismatch"):
            read_tls(files)

    def test_an_encrypted_key_asks_nobody(self, files):
        files.key.write_bytes(
            ec.generate_private_key(ec.SECP256R1()).private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.BestAvailableEncryption(b"secret"),
            )
        )
        with pytest.raises(ValueError, match="unencrypted key in PEM"):
            read_tls(files)


class TestChanges:
    def test_without_one_nothing_is_read(self, files, reloads):
        tls = ServerTls(files, on_reload=reloads)
        assert tls.refresh() is None
        assert reloads == []

    def test_are_taken_once(self, authority, files, reloads):
        tls = ServerTls(files, on_reload=reloads)
        certificate = rotate(authority, files)
        assert tls.refresh().certificate == certificate
        assert tls.refresh() is None
        assert reloads == [True]

    def test_of_times_only_are_none(self, files, reloads):
        tls = ServerTls(files, on_reload=reloads)
        os.utime(files.key, (1, 1))
        assert tls.refresh() is None
        assert reloads == []

    @pytest.mark.parametrize("breakage", [Path.unlink, lambda path: path.write_text("x")])
    def test_for_the_worse_are_told_once_and_not_taken(self, breakage, authority, files, reloads):
        tls = ServerTls(files, on_reload=reloads)
        breakage(files.key)
        for _ in range(2):
            assert tls.refresh() is None
        assert reloads == [False]
        certificate = rotate(authority, files)
        assert tls.refresh().certificate == certificate
        assert reloads == [False, True]

    def test_half_way_are_not_taken(self, authority, files, reloads):
        """The certificate is new and the key still the old one."""
        tls = ServerTls(files, on_reload=reloads)
        old_key = files.key.read_bytes()
        rotate(authority, files)
        new_key = files.key.read_bytes()
        files.key.write_bytes(old_key)
        assert tls.refresh() is None
        files.key.write_bytes(new_key)
        assert tls.refresh().key == new_key
        assert reloads == [False, True]

    def test_credentials_need_good_files(self, files, reloads):
        write_key(files.key)
        with pytest.raises(ValueError, match="mismatch"):
            ServerTls(files, on_reload=reloads)


def test_files_that_keep_changing_are_given_up(files, monkeypatch):
    def check(files):
        write_key(files.key)

    monkeypatch.setattr("pointsman_policy.tls._check", check)
    with pytest.raises(ValueError, match="keep changing"):
        read_tls(files)
