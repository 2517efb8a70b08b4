"""Images to search for, from the web."""

import contextlib
import ssl
from collections.abc import Iterator

import requests

from imagesearch.errors import describe_error, root_cause
from imagesearch.paths import without_credentials
from imagesearch.records import OpenedImage
from imagesearch.sources import MAX_CONTENT_BYTES, check_size, content_memory

CONNECT_TIMEOUT_SECONDS, READ_TIMEOUT_SECONDS = 5, 10
CHUNK_BYTES = 1 << 16


@contextlib.contextmanager
def open_url(url: str) -> Iterator[OpenedImage]:
    """Yields the content at an http or https URL. Raises ValueError, which shows no URL, if it cannot be downloaded."""
    try:
        with contextlib.ExitStack() as stack:
            timeout = (CONNECT_TIMEOUT_SECONDS, READ_TIMEOUT_SECONDS)
            response = stack.enter_context(requests.get(url, stream=True, timeout=timeout))
            if response.status_code != 200:
                raise ValueError(f"the server answered HTTP {response.status_code}")
            size = int(response.headers.get("Content-Length", MAX_CONTENT_BYTES))
            stack.enter_context(content_memory.reserve(min(size, MAX_CONTENT_BYTES)))
            content = bytearray()
            for chunk in response.iter_content(CHUNK_BYTES):
                content += chunk
                check_size(len(content))
            yield OpenedImage.from_memory(without_credentials(url), bytes(content))
    except (requests.exceptions.InvalidURL, requests.exceptions.InvalidSchema):  # which would be in the message
        raise ValueError("it, or where it redirects to, is not a valid http or https URL") from None
    except requests.RequestException as error:
        cause = root_cause(error)
        if isinstance(cause, ssl.SSLError) and cause.reason in ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE"):
            raise ValueError("that port does not use TLS: the URL must begin with http://") from None
        raise ValueError(describe_error(cause).split(": ")[-1]) from None
