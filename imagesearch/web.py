"""Images to search for, from the web."""

import contextlib
import io
import time
from collections.abc import Iterator
from typing import BinaryIO
from urllib.parse import urljoin, urlsplit

import requests
import urllib3

from imagesearch.errors import describe_error, root_cause
from imagesearch.images import MAX_CONTENT_BYTES, check_size, content_memory
from imagesearch.paths import query_name

DOWNLOAD_TIMEOUT_SECONDS = 30
CONNECT_TIMEOUT_SECONDS, READ_TIMEOUT_SECONDS = 5, 10
MAX_REDIRECTS = 5


@contextlib.contextmanager
def open_url(url: str) -> Iterator[BinaryIO]:
    """Yields the content at an http or https URL. Raises ValueError if it cannot be downloaded."""
    try:
        with requests.Session() as session, _get(session, url) as response:
            if response.status_code != 200:
                raise ValueError(f"the server answered HTTP {response.status_code}")
            length = response.headers.get("Content-Length", "")
            check_size(int(length) if length.isdigit() else 0)
            with content_memory.reserve(int(length) if length.isdigit() else MAX_CONTENT_BYTES):
                yield _download(response)
    except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
        raise ValueError(describe_error(root_cause(error)).split(": ")[-1]) from None


def _get(session: requests.Session, url: str) -> requests.Response:
    """Sends a GET request; follows redirects within the URL's scheme."""
    for _ in range(MAX_REDIRECTS + 1):
        response = session.get(
            url, stream=True, allow_redirects=False, timeout=(CONNECT_TIMEOUT_SECONDS, READ_TIMEOUT_SECONDS)
        )
        following = session.get_redirect_target(response)
        if following is None:
            return response
        response.close()
        following = urljoin(url, following)
        if urlsplit(following).scheme != urlsplit(url).scheme:
            raise ValueError(f"it redirects to another scheme, {query_name(following)}")
        url = following
    raise ValueError(f"more than {MAX_REDIRECTS} redirects")


def _download(response: requests.Response) -> BinaryIO:
    """Reads the body of a response, for at most DOWNLOAD_TIMEOUT_SECONDS."""
    deadline = time.monotonic() + DOWNLOAD_TIMEOUT_SECONDS
    content = io.BytesIO()
    while chunk := response.raw.read1(1 << 16, decode_content=True):
        content.write(chunk)
        check_size(content.tell())
        if time.monotonic() > deadline:
            raise ValueError(f"not complete after {DOWNLOAD_TIMEOUT_SECONDS} seconds")
    if response.raw.length_remaining:
        raise ValueError("the connection ended before the image was complete")
    content.seek(0)
    return content
