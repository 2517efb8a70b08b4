"""What Elasticsearch and the network say when something fails, in words for a user."""

import textwrap
from typing import Any


def passing(status: int, error: object) -> bool:
    """Whether a refusal is one that passes by itself; a block on the index (a full disk, say) does not."""
    kind = error.get("type") if isinstance(error, dict) else None
    return status in (502, 503, 504) or (status == 429 and kind != "cluster_block_exception")


def explained(answer: dict[str, Any]) -> str:
    """Elasticsearch's own reason in `answer`, on one line."""
    error = answer.get("error")
    while isinstance(error, dict) and isinstance(error.get("caused_by"), dict):
        error = error["caused_by"]
    text = f"{error.get('type')}: {error.get('reason')}" if isinstance(error, dict) else str(error)
    return textwrap.shorten(text, 200, placeholder="…").rstrip(".")


def remedy(answer: dict[str, Any]) -> str:
    """What a user does about a refusal."""
    if "cluster_block_exception" in str(answer.get("error")):
        return "Free disk space on the server or lift the index's block, then run this again."
    if "security_exception" in str(answer.get("error")):
        return (
            "Give the user the privileges create_index, read, write and maintenance on the index, then run this again."
        )
    return "Run this again when that is mended."


def locked_out(place: str) -> str:
    """What HTTP 401 means."""
    return f"{place} refuses the user or password in ES_URL, or the key in ES_API_KEY (HTTP 401)."


def distrusts(error: Exception) -> bool:
    """Whether a network error is about the certificate, and not about a connection that broke."""
    return "certificate verify failed" in str(error).lower()


def untrusted(place: str, error: Exception) -> str:
    """What is wrong with the certificate of `place`, and what to do."""
    return (
        f"The certificate of {place} is not trusted ({innermost(error)}):"
        " set ES_CA_CERT to the file of its CA's certificate."
    )


def innermost(error: BaseException) -> str:
    """The reason at the bottom of nested network errors, without the objects around it."""
    while True:
        inner = getattr(error, "reason", None) or next(iter(getattr(error, "errors", ()) or ()), None)
        inner = inner or next((value for value in error.args if isinstance(value, BaseException)), None)
        if not isinstance(inner, BaseException):
            break
        error = inner
    text = str(error.args[-1] if error.args else error)
    return " ".join(text.split(": ", 1)[-1].split()).rstrip(".")
