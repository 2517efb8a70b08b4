"""Images to search for, from the web."""

import contextlib
import time
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from typing import Any, TypeVar

import requests
import urllib3

from imagesearch.content import MAX_CONTENT_BYTES, check_size, content_memory, opened_from_memory
from imagesearch.errors import describe_error, root_cause
from imagesearch.parallel import start_thread
from imagesearch.paths import query_name
from imagesearch.records import OpenedImage

T = TypeVar("T")

DOWNLOAD_TIMEOUT_SECONDS = 30  # for all of it
CONNECT_TIMEOUT_SECONDS, READ_TIMEOUT_SECONDS = 5, 10
MAX_REDIRECTS = 5


@contextlib.contextmanager
def open_url(url: str) -> Iterator[OpenedImage]:
    """Yields the content at an http or https URL. Raises ValueError, which shows no URL, if it cannot be downloaded."""
    deadline = time.monotonic() + DOWNLOAD_TIMEOUT_SECONDS
    with requests.Session() as session:
        session.max_redirects = MAX_REDIRECTS
        session.headers["Accept-Encoding"] = "identity"  # what is compressed has no limit to its size
        session.hooks["response"].append(_drop_redirect_body)
        response = _until(deadline, lambda: _get(session, url))
        with response:
            length = response.headers.get("Content-Length", "")
            size = int(length) if length.isascii() and length.isdigit() else MAX_CONTENT_BYTES
            check_size(size)
            left = deadline - time.monotonic()
            with content_memory.reserve(size):
                deadline = time.monotonic() + left  # waiting for room does not count
                try:
                    content = _until(deadline, lambda: _read(response, deadline))
                except ValueError:
                    with contextlib.suppress(RuntimeError, OSError):  # it has ended
                        response.raw.shutdown()  # for the thread that may still read; closing would wait for it
                    raise
                yield opened_from_memory(query_name(url), content)


def _until(deadline: float, function: Callable[[], T]) -> T:
    """Returns ``function()``, with a limit to all of its time: those of sockets begin again with each byte."""
    future = start_thread(function)
    if not wait([future], timeout=deadline - time.monotonic()).done:
        raise ValueError(f"not complete after {DOWNLOAD_TIMEOUT_SECONDS} seconds")
    try:
        return future.result()
    except requests.TooManyRedirects:
        raise ValueError(f"more than {MAX_REDIRECTS} redirects") from None
    except (requests.exceptions.InvalidURL, requests.exceptions.InvalidSchema):
        raise ValueError("it, or where it redirects to, is not a valid http or https URL") from None
    except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
        raise ValueError(describe_error(root_cause(error)).split(": ")[-1]) from None


def _get(session: requests.Session, url: str) -> requests.Response:
    """Sends a GET request and follows redirects, but not from https to http."""
    response = session.get(url, stream=True, timeout=(CONNECT_TIMEOUT_SECONDS, READ_TIMEOUT_SECONDS))
    schemes = [each.url.partition(":")[0].lower() for each in (*response.history, response)]
    if "https" in schemes and "http" in schemes[schemes.index("https") :]:
        raise ValueError("it redirects from https to http")
    if response.status_code != 200:
        raise ValueError(f"the server answered HTTP {response.status_code}")
    if response.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise ValueError("the server sends it compressed")
    return response


def _drop_redirect_body(response: requests.Response, **_: Any) -> None:
    """Closes a response that redirects: requests would read its body, whatever its size."""
    if response.is_redirect:
        response.close()


def _read(response: requests.Response, deadline: float) -> bytes:
    """Returns the body of a response."""
    content = bytearray()
    while chunk := response.raw.read1(1 << 16):
        content += chunk
        check_size(len(content))
        if time.monotonic() > deadline:
            raise ValueError(f"not complete after {DOWNLOAD_TIMEOUT_SECONDS} seconds")
    if response.raw.length_remaining:
        raise ValueError("the connection ended before the image was complete")
    return bytes(content)
