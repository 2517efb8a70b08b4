"""Errors of Elasticsearch and of the network, translated into messages that say what to do."""

import ssl
import textwrap
from http.client import RemoteDisconnected
from typing import Any
from urllib.parse import urlsplit

import orjson
import requests

from imagesearch.connection import Connection
from imagesearch.errors import LostIndexError, UsageError, describe_error, root_cause
from imagesearch.paths import quote_path
from imagesearch.retry import RetryableError

PRIVILEGES_HINT = (
    "On the index, create.py needs the privileges create_index, read, write, maintenance and view_index_metadata;"
    " search.py needs read and view_index_metadata."
)

CONNECTION_HINT = "Check ES_URL and that the server is running."

SIZE_HINT = "raise the limit of the proxy in front of Elasticsearch"

# OpenSSL's codes, of X509_verify_cert(3)
_HOST_MISMATCH, _IP_MISMATCH = 62, 64
_NOT_YET_VALID, _EXPIRED = 9, 10
_UNKNOWN_CA = (2, 18, 19, 20, 21)


def is_retryable(status: int, error: object) -> bool:
    """Returns True if a request that failed with this HTTP status and error may succeed later.

    A block on the index (because the disk is full, for example) does not go away by itself.
    """
    error_type = error.get("type") if isinstance(error, dict) else None
    return status in (502, 503, 504) or (status == 429 and error_type != "cluster_block_exception")


def is_missing_index(body: dict[str, Any]) -> bool:
    """Returns True if an error response says that there is no such index."""
    error = body.get("error")
    return isinstance(error, dict) and error.get("type") == "index_not_found_exception"


def deleted_index_error(index: str) -> LostIndexError:
    """Returns the error for an index that existed when the run began."""
    return LostIndexError(
        f"The index {index} was deleted during the run, with all that was written to it. Run the command again to"
        " create a new one."
    )


def moved_index_error(index: str) -> LostIndexError:
    """Returns the error for a name that pointed to another index when the run began."""
    return LostIndexError(
        f"{index} no longer points to the index that it pointed to before; what was written since may be in either."
        " Run the command again."
    )


def error_reason(body: dict[str, Any]) -> str:
    """Returns Elasticsearch's own reason in an error response, on one line."""
    error = body.get("error")
    while isinstance(error, dict) and isinstance(error.get("caused_by"), dict):
        error = error["caused_by"]
    text = f"{error.get('type')}: {error.get('reason')}" if isinstance(error, dict) else str(error)
    return textwrap.shorten(text, 200, placeholder="…").rstrip(".")


def hint(body: dict[str, Any]) -> str:
    """Returns what the user can do about an error response, with a space before it; empty if that is not known."""
    if "cluster_block_exception" in str(body.get("error")):
        return " Free disk space on the server or remove the index's block, then run the command again."
    if "security_exception" in str(body.get("error")):
        return f" {PRIVILEGES_HINT}"
    return ""


def authentication_error(connection: Connection) -> UsageError:
    """Returns the error for HTTP 401."""
    if connection.api_key:
        return UsageError(f"{connection} rejected the API key in ES_API_KEY (HTTP 401).")
    if connection.username:
        return UsageError(f"{connection} rejected the user or password in ES_URL (HTTP 401).")
    return UsageError(
        f"{connection} requires authentication (HTTP 401), and none was given:"
        " set ES_URL to https://user:password@host:port, or set ES_API_KEY."
    )


def parse_response(response: requests.Response, host: str, connection: Connection) -> dict[str, Any]:
    """Returns the body of a response from Elasticsearch, whatever its status.

    Raises RetryableError if waiting may help, UsageError if it denies access or is not from Elasticsearch.
    """
    if 300 <= response.status_code < 400:
        location = urlsplit(response.headers.get("Location", ""))
        if not location.netloc:
            raise _not_elasticsearch(host, f"redirects to another path (HTTP {response.status_code})")
        target = f"{location.scheme}://{location.netloc.rpartition('@')[2]}"
        raise UsageError(f"{host} redirects to {target} (HTTP {response.status_code}): set ES_URL to that address.")
    if response.status_code == 401:
        raise authentication_error(connection)
    if response.status_code == 413:
        raise UsageError(f"{host} refused the request because it is too large (HTTP 413): {SIZE_HINT}.")
    try:
        body = orjson.loads(response.content)
    except ValueError:
        body = None
    if response.status_code == 403 and isinstance(body, dict) and "error" in body:  # without the product header
        raise UsageError(f"{host} denied access (HTTP 403): {error_reason(body)}.{hint(body)}")
    if response.headers.get("X-Elastic-Product") != "Elasticsearch" or not isinstance(body, dict):
        behavior = (
            f"answered HTTP {response.status_code} with {response.headers.get('Content-Type', 'no content type')}"
        )
        if is_retryable(response.status_code, None):  # of a proxy that does not reach it
            raise RetryableError(f"no answer from Elasticsearch ({host} {behavior})", CONNECTION_HINT)
        raise _not_elasticsearch(host, behavior)
    if is_retryable(response.status_code, body.get("error")):
        raise RetryableError(error_reason(body))
    return body


def _not_elasticsearch(host: str, behavior: str) -> UsageError:
    return UsageError(f"{host} is not Elasticsearch, or a proxy answers for it: it {behavior}. Check ES_URL.")


def connection_error(error: Exception, connection: Connection, host: str = "") -> RetryableError | UsageError:
    """Returns the error for a connection that failed, with the hint that fits its cause.

    A certificate that cannot be verified is a UsageError: no other host is tried.
    """
    host = host or str(connection)
    cause = root_cause(error)
    if isinstance(cause, ssl.SSLCertVerificationError):
        return UsageError(
            f"The certificate of {host} cannot be verified ({cause.verify_message.rstrip('.')}):"
            f" {_certificate_hint(cause, connection)}"
        )
    advice = CONNECTION_HINT
    if isinstance(cause, ssl.SSLError):
        advice = "If that port does not use TLS, ES_URL must begin with http://."
    elif host.startswith("http:") and isinstance(cause, RemoteDisconnected | ConnectionResetError):
        advice = "If that port uses TLS, ES_URL must begin with https://."
    return RetryableError(f"no answer from {host} ({_one_line(cause)})", advice)


def _certificate_hint(error: ssl.SSLCertVerificationError, connection: Connection) -> str:
    if error.verify_code in (_HOST_MISMATCH, _IP_MISMATCH):
        return "use a host name in ES_URL that the certificate was issued for."
    if error.verify_code in (_EXPIRED, _NOT_YET_VALID):
        return "renew the server's certificate, or set this machine's clock."
    if error.verify_code not in _UNKNOWN_CA:
        return "replace the server's certificate or that of its CA."
    if connection.ca_certs is None:
        return "set ES_CA_CERT to the file of the CA that signed it."
    return (
        f"ES_CA_CERT is {quote_path(connection.ca_certs)}, which is not the CA that signed it."
        " Get this server's CA certificate again."
    )


def _one_line(error: BaseException) -> str:
    """Returns the reason of a network exception without the repr of the connection that urllib3 puts before it."""
    if isinstance(error, ssl.SSLError) and error.reason:
        return error.reason.lower().replace("_", " ")
    text = describe_error(error)
    return text.split(": ", 1)[-1].rstrip(".")
