"""Where Elasticsearch is and how to authenticate, from the environment."""

import base64
import os
import re
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Self
from urllib.parse import SplitResult, unquote, urlsplit

from imagesearch.console import say
from imagesearch.errors import UsageError
from imagesearch.locations import quote_path

URL_FORMAT = "https://user:password@host:port, with special characters percent-encoded"


@dataclass(frozen=True)
class Connection:
    """How to connect and authenticate to Elasticsearch.

    `url` is its address without credentials. `ca_certs` is the path of a PEM file, None for the CAs that requests
    brings. Secrets are not in the repr.
    """

    url: str
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    api_key: str | None = field(default=None, repr=False)
    ca_certs: str | None = None
    verify_certs: bool = True

    @classmethod
    def from_env(cls, environ: Mapping[str, str], verify_certs: bool = True) -> Self | None:
        """Returns what ES_URL, ES_API_KEY and ES_CA_CERT say; None if ES_URL is not set or empty.

        Raises UsageError, which shows no secret, for values that cannot work.
        """
        if not uses_elasticsearch(environ):
            return None
        url = _parse_url(environ["ES_URL"].strip())
        api_key = environ.get("ES_API_KEY") or None
        if api_key and url.username:
            raise UsageError("ES_API_KEY is set, and ES_URL has a user and password too: use one of the two.")
        if (url.password is None) != (not url.username):
            raise UsageError(f"ES_URL has a user or a password, but not both. It must look like {URL_FORMAT}.")
        if api_key and not (api_key.isascii() and api_key.isprintable() and " " not in api_key):
            raise UsageError("ES_API_KEY has characters that an API key cannot have: use the key's `encoded` value.")
        ca_certs = environ.get("ES_CA_CERT") or None
        connection = cls(
            url=f"{url.scheme}://{_host_and_port(url)}{url.path.rstrip('/')}",
            username=unquote(url.username) if url.username else None,
            password=unquote(url.password) if url.password is not None else None,
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
        if self.ca_certs is None or not self.verify_certs or self.url.startswith("http:"):
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
    def headers(self) -> dict[str, str]:
        """The headers that authenticate a request."""
        if self.api_key:
            return {"Authorization": f"ApiKey {self.api_key}"}
        if self.username:
            credentials = os.fsencode(f"{self.username}:{self.password}")
            return {"Authorization": "Basic " + base64.b64encode(credentials).decode()}
        return {}


def uses_elasticsearch(environ: Mapping[str, str]) -> bool:
    """Returns True if ES_URL is set and not empty."""
    return bool(environ.get("ES_URL", "").strip())


def get_connection(insecure: bool) -> Connection | None:
    """Returns the connection that the environment names, None for the local index file.

    If `insecure`, the server's certificate is not verified, and the user is warned.
    """
    connection = Connection.from_env(os.environ, verify_certs=not insecure)
    if connection and connection.headers and connection.url.startswith("http:") and not _is_local(connection.url):
        say("Warning: ES_URL begins with http://: anyone on the network can read the password or key.")
    if connection and insecure:
        say(
            "Warning: --insecure does not verify the server's certificate: an attacker on the network could intercept"
            " the credentials."
        )
    return connection


def _is_local(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    return host in ("localhost", "::1") or host.startswith("127.")


def _parse_url(text: str) -> SplitResult:
    """Returns the parts of the address. Raises UsageError if it cannot be one."""
    try:
        url = urlsplit(text)
        valid = url.scheme in ("http", "https") and re.fullmatch(r"[\w.:-]+", url.hostname or "") and url.port != 0
    except ValueError:  # the port is not a number, or brackets do not match
        valid = False
    # An @ after the host belongs to a password with a slash in it, which would otherwise show as a path.
    if not valid or any(c.isspace() or c == "," for c in text) or url.query or url.fragment or "@" in url.path:
        raise UsageError(f"ES_URL is not the address of one Elasticsearch. It must look like {URL_FORMAT}.")
    return url


def _host_and_port(url: SplitResult) -> str:
    """Returns host:port, with the scheme's default port if none is given."""
    host = url.hostname or ""
    return f"{f'[{host}]' if ':' in host else host}:{url.port or {'http': 80, 'https': 443}[url.scheme]}"
