"""Errors of Elasticsearch and of the network, translated into messages that say what to do."""

import ssl
import textwrap
from collections.abc import Mapping, Sequence
from http.client import RemoteDisconnected
from typing import Any
from urllib.parse import urlsplit

from imagesearch.errors import ImageSearchError, UsageError, describe_error, root_cause
from imagesearch.index.connection import Connection
from imagesearch.locations import quote_path

PRIVILEGES_HINT = (
    " On the index, create.py needs the privileges create_index, read, write, maintenance and view_index_metadata;"
    " search.py needs read and view_index_metadata."
)
AGAIN_HINT = "Run the command again later."

UNKNOWN_CA = (2, 18, 19, 20, 21)  # OpenSSL's codes, of X509_verify_cert(3)


def error_reason(body: Any) -> str:
    """Returns Elasticsearch's own reason in an error response, on one line."""
    error = body.get("error") if isinstance(body, dict) else body
    while isinstance(error, dict) and isinstance(error.get("caused_by"), dict):
        error = error["caused_by"]
    text = f"{error.get('type')}: {error.get('reason')}" if isinstance(error, dict) else str(error)
    return textwrap.shorten(text, 200, placeholder="…").rstrip(".")


def is_missing_index(body: Any) -> bool:
    """Returns True if an error response says that there is no such index."""
    return "index_not_found_exception" in str(body.get("error") if isinstance(body, dict) else "")


def is_blocked(body: Any) -> bool:
    """Returns True if an error response says that the index is blocked, as on a full disk."""
    return "cluster_block_exception" in str(body.get("error") if isinstance(body, dict) else "")


def missing_shards_error(index: str, shards: Sequence[str]) -> ImageSearchError:
    """Returns the error for an index with shards that are on no node."""
    shard = f"shard {shards[0]}" if len(shards) == 1 else f"shards {', '.join(shards)}"
    return ImageSearchError(
        f"The index {index} has no active {shard}: its node is away, or no node may hold it, as when the disks are"
        " nearly full. GET _cluster/allocation/explain says why. Run the command again when the index is not red."
    )


def response_error(
    status: int, headers: Mapping[str, str], body: Any, connection: Connection, index: str
) -> ImageSearchError:
    """Returns the error for a response that is not a success, with the hint that fits its cause."""
    url = connection.url
    if status == 401:
        return _authentication_error(connection)
    if status == 413:
        return UsageError(
            f"{url} refused a request because it is too large (HTTP 413): raise the limit of the proxy in front of"
            " Elasticsearch."
        )
    is_error = isinstance(body, dict) and "error" in body
    if status in (429, 502, 503, 504) and not (is_error and headers.get("X-Elastic-Product")):
        return ImageSearchError(f"No answer from Elasticsearch ({url} answered HTTP {status}). {AGAIN_HINT}")
    if not is_error:
        kind = headers.get("Content-Type", "no content type")
        return UsageError(
            f"{url} is not Elasticsearch, or a proxy answers for it: it answered HTTP {status} with {kind}. Check"
            " ES_URL."
        )
    if is_missing_index(body):
        return deleted_index_error(index)
    reason = error_reason(body)
    if is_blocked(body):
        return ImageSearchError(
            f"Elasticsearch refused a request: {reason}. Free disk space on the server or remove the index's block,"
            " then run the command again."
        )
    if status == 403:
        hint = PRIVILEGES_HINT if "security_exception" in str(body["error"]) else ""
        return UsageError(f"{url} denied access (HTTP 403): {reason}.{hint}")
    if status in (429, 503):
        return ImageSearchError(f"Elasticsearch did not recover: {reason}. {AGAIN_HINT}")
    hint = " If ES_URL ends with the name of an index, leave that out." if urlsplit(url).path else ""
    return ImageSearchError(f"Elasticsearch refused a request: {reason}.{hint}")


def deleted_index_error(index: str) -> ImageSearchError:
    """Returns the error for an index that existed when the run began."""
    return ImageSearchError(
        f"The index {index} was deleted during the run. If Elasticsearch has created it again by itself, delete that"
        " one. Then run create.py again."
    )


def _authentication_error(connection: Connection) -> UsageError:
    if connection.api_key:
        return UsageError(f"{connection.url} rejected the API key in ES_API_KEY (HTTP 401).")
    if connection.username:
        return UsageError(f"{connection.url} rejected the user or password in ES_URL (HTTP 401).")
    return UsageError(
        f"{connection.url} requires authentication (HTTP 401), and none was given:"
        " set ES_URL to https://user:password@host:port, or set ES_API_KEY."
    )


def connection_error(error: BaseException, connection: Connection) -> ImageSearchError:
    """Returns the error for a request that got no response, with the hint that fits its cause."""
    cause, url = root_cause(error), connection.url
    if isinstance(cause, ssl.SSLCertVerificationError):
        return UsageError(
            f"The certificate of {url} cannot be verified ({cause.verify_message.rstrip('.')}):"
            f" {_certificate_hint(cause, connection)}"
        )
    if "redirect" in str(cause):
        return UsageError(f"{url} redirects to another address: set ES_URL to that address.")
    hint = "Check ES_URL and that the server is running."
    if isinstance(cause, ssl.SSLError):
        hint = "If that port does not use TLS, ES_URL must begin with http://."
    elif url.startswith("http:") and isinstance(cause, RemoteDisconnected | ConnectionResetError):
        hint = "If that port uses TLS, ES_URL must begin with https://."
    return ImageSearchError(f"No answer from {url} ({network_reason(cause)}). {hint}")


def _certificate_hint(error: ssl.SSLCertVerificationError, connection: Connection) -> str:
    if error.verify_code not in UNKNOWN_CA:
        return "check the host name in ES_URL, and the server's certificate."
    if connection.ca_certs is None:
        return "set ES_CA_CERT to the file of the CA that signed it."
    return (
        f"ES_CA_CERT is {quote_path(connection.ca_certs)}, which is not the CA that signed it."
        " Get this server's CA certificate again."
    )


def network_reason(error: BaseException | None) -> str:
    """Returns the reason of a network exception, without the repr of the connection that urllib3 puts before it."""
    cause = root_cause(error) if error else OSError("unknown")
    if isinstance(cause, ssl.SSLError) and cause.reason:
        return cause.reason.lower().replace("_", " ")
    return describe_error(cause).split(": ", 1)[-1].rstrip(".")
