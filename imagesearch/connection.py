"""Where Elasticsearch is and how to get in, from the environment."""

import base64
import os
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import SplitResult, unquote, urlsplit

from imagesearch.errors import Misuse
from imagesearch.files import shown

SHAPE = "https://user:password@host:port, with special characters percent-encoded"


@dataclass(frozen=True)
class Connection:
    """One Elasticsearch: the addresses of its nodes without credentials, and how to get in.

    `ca` is a PEM file's path, None for the CAs that the client brings. What is secret is not in the repr.
    """

    urls: tuple[str, ...]
    user: str | None
    password: str | None = field(repr=False)
    api_key: str | None = field(repr=False)
    ca: str | None
    insecure: bool

    @property
    def headers(self) -> dict[str, str]:
        """What a request carries to be let in."""
        if self.api_key:
            return {"Authorization": f"ApiKey {self.api_key}"}
        if self.user:
            return {"Authorization": "Basic " + base64.b64encode(os.fsencode(f"{self.user}:{self.password}")).decode()}
        return {}

    @property
    def place(self) -> str:
        """The addresses as messages name them."""
        return ", ".join(self.urls)


def connection(environment: Mapping[str, str], insecure: bool) -> Connection | None:
    """What `ES_URL`, `ES_API_KEY` and `ES_CA_CERT` say; None where `ES_URL` is not set or empty.

    `ES_URL` may name several nodes of one cluster, separated by commas.
    Raises Misuse, which shows no secret, for values that cannot work.
    """
    if not environment.get("ES_URL", "").strip():
        return None
    addresses = [address(text) for text in environment["ES_URL"].split(",")]
    users = {(part.username, part.password) for part in addresses if part.username or part.password}
    if len(users) > 1:
        raise Misuse("ES_URL names different users or passwords for the nodes of one cluster: give one.")
    user, password = users.pop() if users else (None, None)
    api_key = environment.get("ES_API_KEY") or None
    if api_key and user:
        raise Misuse("ES_API_KEY is set and ES_URL has a user and password too: give one of the two.")
    if user and password is None:
        raise Misuse(f"ES_URL has a user but no password. It must look like {SHAPE}.")
    if api_key and not (api_key.isascii() and api_key.isprintable() and " " not in api_key):
        raise Misuse("ES_API_KEY has characters that no key has: give the `encoded` value of the key.")
    return Connection(
        urls=tuple(f"{part.scheme}://{host(part)}{part.path.rstrip('/')}" for part in addresses),
        user=None if user is None else unquote(user),
        password=None if password is None else unquote(password),
        api_key=api_key,
        ca=certificate(environment.get("ES_CA_CERT") or None),
        insecure=insecure,
    )


def address(text: str) -> SplitResult:
    """One node's URL, checked. Raises Misuse."""
    text = text.strip()
    try:
        part = urlsplit(text)
        valid = part.scheme in ("http", "https") and part.hostname and part.port != 0
    except ValueError:  # a port that is no number, brackets that do not match
        valid = False
    # An @ behind the host belongs to a password with a slash in it, which would otherwise show as a path.
    if not valid or any(character.isspace() for character in text) or part.query or part.fragment or "@" in part.path:
        raise Misuse(f"ES_URL is not an address of Elasticsearch. It must look like {SHAPE}.")
    return part


def host(part: SplitResult) -> str:
    """host:port, with the scheme's own port where none is given."""
    name = part.hostname or ""
    return f"{f'[{name}]' if ':' in name else name}:{part.port or {'http': 80, 'https': 443}[part.scheme]}"


def certificate(path: str | None) -> str | None:
    """`path`, when it is None or a file of PEM certificates. Raises Misuse."""
    if path is None:
        return None
    try:
        ssl.create_default_context(cafile=os.path.expanduser(path))
    except ssl.SSLError:
        raise Misuse(f"ES_CA_CERT must name a file of PEM certificates: {shown(path)[:200]} is none.") from None
    except OSError as error:
        why = f"{shown(path)[:200]} cannot be read ({error.strerror})"
        raise Misuse(f"ES_CA_CERT must name a file of PEM certificates: {why}.") from None
    return os.path.expanduser(path)
