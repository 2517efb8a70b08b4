"""Where Elasticsearch is and how to authenticate, from the environment."""

import base64
import os
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Self
from urllib.parse import SplitResult, unquote, urlsplit

from imagesearch.console import say
from imagesearch.errors import UsageError
from imagesearch.paths import quote_path

URL_FORMAT = "https://user:password@host:port, with special characters percent-encoded"


@dataclass(frozen=True)
class Connection:
    """How to connect and authenticate to one Elasticsearch cluster.

    `hosts` are its nodes' URLs without credentials. `ca_certs` is the path of a PEM file, None for
    the CAs that the client libraries bring. Secrets are not in the repr.
    """

    hosts: tuple[str, ...]
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    api_key: str | None = field(default=None, repr=False)
    ca_certs: str | None = None
    verify_certs: bool = True

    @classmethod
    def from_env(cls, environ: Mapping[str, str], verify_certs: bool = True) -> Self | None:
        """Returns what ES_URL, ES_API_KEY and ES_CA_CERT say; None if ES_URL is not set or empty.

        ES_URL may name several nodes of one cluster, separated by commas. Raises UsageError, which
        shows no secret, for values that cannot work.
        """
        if not uses_elasticsearch(environ):
            return None
        urls = [parse_url(text) for text in environ["ES_URL"].split(",")]
        if len({url.scheme for url in urls}) > 1:
            raise UsageError("ES_URL mixes http and https for the nodes of one cluster: use one for all.")
        credentials = {(url.username, url.password) for url in urls if url.username or url.password}
        if len(credentials) > 1:
            raise UsageError("ES_URL has different users or passwords for the nodes of one cluster: use one for all.")
        username, password = credentials.pop() if credentials else (None, None)
        api_key = environ.get("ES_API_KEY") or None
        if api_key and username:
            raise UsageError("ES_API_KEY is set, and ES_URL has a user and password too: use one of the two.")
        if password is not None and not username:
            raise UsageError(f"ES_URL has a password but no user. It must look like {URL_FORMAT}.")
        if username and password is None:
            raise UsageError(f"ES_URL has a user but no password. It must look like {URL_FORMAT}.")
        if api_key and not (api_key.isascii() and api_key.isprintable() and " " not in api_key):
            raise UsageError("ES_API_KEY has characters that an API key cannot have: use the key's `encoded` value.")
        ca_certs = environ.get("ES_CA_CERT") or None
        connection = cls(
            hosts=tuple(f"{url.scheme}://{_host_and_port(url)}{url.path.rstrip('/')}" for url in urls),
            username=None if username is None else unquote(username),
            password=None if password is None else unquote(password),
            api_key=api_key,
            ca_certs=None if ca_certs is None else os.path.expanduser(ca_certs),
            verify_certs=verify_certs,
        )
        connection.ssl_context()  # a file that is not a certificate is reported before anything else
        return connection

    def ssl_context(self) -> ssl.SSLContext | None:
        """Returns the context in which both clients verify with `ca_certs`; None without it.

        Python 3.13 and newer also check that every certificate follows RFC 5280 to the letter, which
        the CA certificates of IBM Cloud Databases do not (basicConstraints is not critical, keyUsage
        is missing). If the user names the CA, that adds nothing: only that check is turned off;
        the chain and the host name are verified as always.
        """
        if self.ca_certs is None or not (self.verify_certs and self.uses_tls):
            return None
        try:
            context = ssl.create_default_context(cafile=self.ca_certs)
        except ssl.SSLError:
            raise UsageError(
                f"ES_CA_CERT must name a file of PEM certificates: {quote_path(self.ca_certs)[:200]} is not one."
            ) from None
        except OSError as error:
            raise UsageError(
                f"ES_CA_CERT must name a file of PEM certificates: {quote_path(self.ca_certs)[:200]}"
                f" cannot be read ({error.strerror})."
            ) from None
        context.verify_flags &= ~ssl.VERIFY_X509_STRICT
        return context

    @property
    def uses_tls(self) -> bool:
        """True if the hosts are https URLs; they are all of one scheme."""
        return self.hosts[0].startswith("https:")

    @property
    def headers(self) -> dict[str, str]:
        """The headers that authenticate a request."""
        if self.api_key:
            return {"Authorization": f"ApiKey {self.api_key}"}
        if self.username:
            credentials = os.fsencode(f"{self.username}:{self.password}")
            return {"Authorization": "Basic " + base64.b64encode(credentials).decode()}
        return {}

    def __str__(self) -> str:
        """The hosts, as messages name them."""
        return ", ".join(self.hosts)


def uses_elasticsearch(environ: Mapping[str, str]) -> bool:
    """Returns True if ES_URL is set and not empty."""
    return bool(environ.get("ES_URL", "").strip())


def connect(insecure: bool) -> Connection | None:
    """Returns the connection that the environment names, None for the local index file.

    If `insecure`, the server's certificate is not verified, and the user is warned.
    """
    connection = Connection.from_env(os.environ, verify_certs=not insecure)
    if connection and insecure:
        say(
            "Warning: --insecure does not verify the server's certificate: an attacker on the network could intercept"
            " the credentials."
        )
    return connection


def parse_url(text: str) -> SplitResult:
    """Returns the parts of one node's URL. Raises UsageError if it cannot be one."""
    text = text.strip()
    try:
        url = urlsplit(text)
        valid = url.scheme in ("http", "https") and url.hostname and url.port != 0
    except ValueError:  # the port is not a number, or brackets do not match
        valid = False
    # An @ after the host belongs to a password with a slash in it, which would otherwise show as a path.
    if not valid or any(character.isspace() for character in text) or url.query or url.fragment or "@" in url.path:
        raise UsageError(f"ES_URL is not a valid Elasticsearch URL. It must look like {URL_FORMAT}.")
    return url


def _host_and_port(url: SplitResult) -> str:
    """Returns host:port, with the scheme's default port if none is given."""
    host = url.hostname or ""
    return f"{f'[{host}]' if ':' in host else host}:{url.port or {'http': 80, 'https': 443}[url.scheme]}"
