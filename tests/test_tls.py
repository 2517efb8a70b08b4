"""Certificates as IBM Cloud has them are accepted; what makes others fail is named."""

import contextlib
import http.server
import re
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from imagesearch.connection import Connection
from imagesearch.elasticsearch_index import ElasticsearchIndex
from imagesearch.errors import UsageError
from imagesearch.retry import NO_RETRY
from tests.certificates import CA
from tests.pictures import Picture
from tests.running import Scripts, counts
from tests.server import Server


def test_the_ca_of_the_tests_is_like_that_of_ibm_cloud(server: Server) -> None:
    """Its certificate is one that Python 3.13 and newer refuse by default."""
    authority = ssl.PEM_cert_to_DER_cert(Path(server.ca).read_text())
    from cryptography import x509

    extensions = x509.load_der_x509_certificate(authority).extensions
    assert not extensions.get_extension_for_class(x509.BasicConstraints).critical
    with pytest.raises(x509.ExtensionNotFound):
        extensions.get_extension_for_class(x509.KeyUsage)


def test_both_scripts_work_with_it(elastic: Scripts, picture: Picture) -> None:
    path = picture("images/a.png")
    assert counts(elastic.create()) == {"new": 1}
    assert elastic.search(path)[0]["hits"]["max_score"] == pytest.approx(1, abs=1e-6)


def test_only_the_strictness_is_turned_off(tmp_path: Path) -> None:
    connection = Connection.from_env({"ES_URL": "https://host", "ES_CA_CERT": str(CA().write(tmp_path / "ca.pem"))})
    assert connection
    context = connection.ssl_context()
    assert context
    assert not context.verify_flags & ssl.VERIFY_X509_STRICT
    assert context.verify_mode is ssl.CERT_REQUIRED and context.check_hostname
    assert len(context.get_ca_certs()) == 1  # no other CA is trusted
    strict = Connection.from_env({"ES_URL": "https://host"})
    assert strict and strict.ssl_context() is None  # the clients' own default


@contextlib.contextmanager
def tls_server(folder: Path, authority: CA, *hosts: str, expired: bool = False) -> Iterator[int]:
    """A server on this machine with a certificate for `hosts`; its port."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*authority.issue(folder, *hosts, expired=expired))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        server.handle_error = lambda *_: None  # type: ignore[method-assign]  # the handshakes that fail
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


@pytest.mark.parametrize(
    ("hosts", "expired", "trusted", "message"),
    [
        (
            ("other.example.com",),
            False,
            True,
            r"[Hh]ostname mismatch.*: use a host name in ES_URL that the certificate",
        ),
        (("127.0.0.2",), False, True, r"[Hh]ostname mismatch.*: use a host name in ES_URL that the certificate"),
        (("localhost",), True, True, r"certificate has expired\): renew the server's certificate, or set this machine"),
        (("localhost",), False, False, r"ES_CA_CERT is \S+, which is not the CA that signed it"),
    ],
)
def test_a_certificate_that_is_refused_is_reported_with_its_reason(
    hosts: tuple[str, ...], expired: bool, trusted: bool, message: str, local: Scripts, picture: Picture
) -> None:
    path = picture("images/a.png")
    authority = CA()
    ca = (authority if trusted else CA()).write(local.folder / "ca.pem")
    with tls_server(local.folder, authority, *hosts, expired=expired) as port:
        environment = {"ES_URL": f"https://admin:hunter2@localhost:{port}", "ES_CA_CERT": str(ca)}
        for arguments in (("create.py", "--model", "thumbnail"), ("search.py", path)):
            done = local.run(*arguments, **environment)
            assert done.returncode == 2 and done.stdout == ""
            assert done.stderr.count("\n") == 1 and "hunter2" not in done.stderr
            assert f"The certificate of https://localhost:{port} cannot be verified (" in done.stderr
            assert re.search(message, done.stderr), done.stderr
            assert "set ES_CA_CERT" not in done.stderr  # it is set
            assert done.stderr.count("(") == done.stderr.count(")")
        connection = Connection.from_env(environment)
        assert connection
        index = ElasticsearchIndex(connection, "images", NO_RETRY)
        with index, pytest.raises(UsageError, match=message):
            index.refresh()  # with the other client, which verifies too


def test_a_port_without_tls_is_reported_as_such(local: Scripts, picture: Picture) -> None:
    path = picture("images/a.png")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as server:
        server.handle_error = lambda *_: None  # type: ignore[method-assign]
        threading.Thread(target=server.serve_forever, daemon=True).start()
        done = local.run("search.py", path, ES_URL=f"https://127.0.0.1:{server.server_port}")
        server.shutdown()
    assert done.returncode == 1
    assert "If that port does not use TLS, ES_URL must begin with http://" in done.stderr
