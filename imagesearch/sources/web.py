"""Images to search for, from the web."""

import contextlib
import ssl
from collections.abc import Iterator

import requests
from urllib3.exceptions import HTTPError

from imagesearch.errors import describe_error, root_cause
from imagesearch.parallel import call_on_thread
from imagesearch.records import ImageFile, OpenedImage
from imagesearch.sources.memory import MAX_CONTENT_BYTES, check_size, content_memory

CONNECT_TIMEOUT_SECONDS, READ_TIMEOUT_SECONDS = 5, 10
DOWNLOAD_TIMEOUT_SECONDS = 120  # in all
CHUNK_BYTES = 1 << 16


@contextlib.contextmanager
def open_url(image: ImageFile) -> Iterator[OpenedImage]:
    """Yields the content at the http or https URL that is the image's location.

    Raises ValueError, which shows no URL, if it cannot be downloaded.
    """
    with contextlib.ExitStack() as stack:
        try:
            # A server that sends a byte now and then, of whatever part of its response, never runs into a time limit.
            content = call_on_thread(lambda: _download(image.location, stack), DOWNLOAD_TIMEOUT_SECONDS)
        except TimeoutError:
            raise ValueError(f"it takes more than {DOWNLOAD_TIMEOUT_SECONDS} seconds") from None
        except (requests.exceptions.InvalidURL, requests.exceptions.InvalidSchema):  # their message has the URL
            raise ValueError("it, or where it redirects to, is not a valid http or https URL") from None
        except (requests.RequestException, HTTPError) as error:
            cause = root_cause(error)
            if isinstance(cause, ssl.SSLError) and cause.reason in ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE"):
                raise ValueError("that port does not use TLS: the URL must begin with http://") from None
            raise ValueError(describe_error(cause).split(": ")[-1]) from None
        yield OpenedImage.from_memory(image, content)


def _download(url: str, stack: contextlib.ExitStack) -> bytes:
    """Returns the content at a URL; the memory that it takes is reserved on `stack`."""
    with requests.get(url, stream=True, timeout=(CONNECT_TIMEOUT_SECONDS, READ_TIMEOUT_SECONDS)) as response:
        if response.status_code != 200:
            raise ValueError(f"the server answered HTTP {response.status_code}")
        is_encoded = "Content-Encoding" in response.headers  # and may become larger
        size = MAX_CONTENT_BYTES if is_encoded else int(response.headers.get("Content-Length", MAX_CONTENT_BYTES))
        stack.enter_context(content_memory.reserve(min(size, MAX_CONTENT_BYTES)))
        content = bytearray()
        for chunk in response.iter_content(CHUNK_BYTES):
            content += chunk
            check_size(len(content))
        return bytes(content)
