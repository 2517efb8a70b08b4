"""Paths and URLs as text and back, quoted for people, normalized."""

import os
import re
import shlex
from urllib.parse import unquote_to_bytes

BUCKET_URL = re.compile(r"(s3|gs|az)://", re.IGNORECASE)
HTTP_URL = re.compile(r"https?://", re.IGNORECASE)

_ESCAPED_BYTE = re.compile(rb"\\x([89a-f][0-9a-f])")  # as path_to_text writes one


def path_to_text(path: str) -> str:
    r"""Returns an operating system path as text; a byte that is not UTF-8 becomes ``\xff``."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def path_from_text(text: str) -> str:
    """Returns the operating system path for text from `path_to_text`."""
    if os.path.lexists(text):
        return text
    return os.fsdecode(_ESCAPED_BYTE.sub(lambda byte: bytes.fromhex(byte[1].decode()), text.encode()))


def quote_path(path: str) -> str:
    """Returns `path` on one line, quoted if need be, so that it can be pasted into a shell."""
    if not path.isprintable():
        return "$'" + os.fsencode(path).decode("latin-1").encode("unicode_escape").decode().replace("'", "\\'") + "'"
    if "'" in path and not set('"$`\\!') & set(path):
        return f'"{path}"'
    return shlex.quote(path)


def local_path(text: str) -> str:
    """Returns a path as the user means it: of a ``file://`` URL, or with a ``~`` that was quoted and not expanded."""
    if text.lower().startswith("file://"):
        return os.fsdecode(unquote_to_bytes(text[len("file://") :].removeprefix("localhost")))
    return text if os.path.lexists(text) else os.path.expanduser(text)


def normalize_path(path: str, base: str) -> str:
    """Returns the one name of a file or folder in an index: ``./…`` if it is below `base`, absolute otherwise.

    `base` is an absolute path without symbolic links. Symbolic links in the folder of `path` are resolved, so that
    ``link/..`` is what it is for the shell's commands; those of a folder itself, too.
    """
    if os.path.isdir(path):
        path = os.path.realpath(path)
    else:
        path = os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))
    if path == base:
        return "."
    below = path.removeprefix(base.rstrip(os.sep) + os.sep)
    return path if below == path else os.path.join(".", below)


def file_path_to_local(file_path: str, folder: str) -> str:
    """Returns the operating system path for a `file_path` of the index.

    `folder` is the folder that the index's relative paths belong to.
    """
    return path_from_text(os.path.normpath(os.path.join(path_to_text(folder), file_path)))


def index_folder(recorded: str | None) -> str:
    """Returns the folder, absolute, that an index's relative paths are relative to.

    It is the one that the index has recorded, as text. Without one, or if it does not exist (it was moved, or the index
    was created on another machine), it is the working directory.
    """
    folder = path_from_text(recorded) if recorded else ""
    return folder if os.path.isdir(folder) else os.path.realpath(os.curdir)


def without_credentials(query: str) -> str:
    """Returns a path or URL as messages name it: without a user, a password or a signature."""
    scheme, separator, rest = query.partition("://")
    if not separator or not re.fullmatch(r"[\w+.-]+", scheme):
        return query
    credentials, at, host_and_path = rest.rpartition("@")
    if at and (re.search("[/?#]", credentials) or not HTTP_URL.match(query)):  # where such a password ends is unknown
        return query if BUCKET_URL.match(query) and "/" in credentials else f"{scheme}://…"
    return query if BUCKET_URL.match(query) else f"{scheme}://{re.split('[?#]', host_and_path)[0]}"
