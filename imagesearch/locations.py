"""What a text of the command line stands for, its one name in an index, and paths as text, quoted, and back.

`base` is always the absolute folder that the relative names of an index, ``./…``, are relative to.
"""

import os
import re
import shlex
from typing import Literal
from urllib.parse import unquote_to_bytes

_ESCAPED_BYTE = re.compile(rb"\\x([89a-f][0-9a-f])")  # as path_to_text writes one

Kind = Literal["standard input", "web", "bucket", "other URL", "folder", "file"]


def kind_of(text: str) -> Kind:
    """Returns what a text of the command line, or a `file_path` of an index, stands for."""
    scheme, separator, _ = text.partition("://")
    match scheme.lower() if separator else text:
        case "-":
            return "standard input"
        case "http" | "https":
            return "web"
        case "s3" | "gs" | "az":
            return "bucket"
        case _ if separator and re.fullmatch(r"[\w+.-]*\w", scheme) and not os.path.lexists(text):
            return "other URL"
        case _:
            return "folder" if os.path.isdir(text) else "file"


def file_path_of(text: str, base: str) -> str:
    """Returns the one name in an index of what `text` stands for; empty if it cannot be indexed.

    It is the way that leads to a file or folder, symbolic links as they are: ``./…`` below `base`, absolute elsewhere.
    """
    match kind_of(text):
        case "standard input" | "web" | "other URL":
            return ""
        case "bucket":
            scheme, _, rest = text.partition("://")
            return f"{scheme.lower()}://{re.sub('/+', '/', rest)}"
    path = _absolute(text)
    folders = ["/", *(path[:end] for end, character in enumerate(path) if character == "/" and end), path]
    for folder in folders:  # the base may be reached through a link
        real = folder if folder == base else os.path.realpath(folder)
        if real == base or real.startswith(base.rstrip("/") + "/"):
            below = (real + path.removeprefix(folder)).removeprefix(base).strip("/")
            return path_to_text(f"./{below}" if below else ".")
    return path_to_text(path)


def bucket_of(url: str) -> str:
    """Returns the bucket of a URL, such as ``s3://birds``."""
    return "/".join(url.split("/")[:3])


def _absolute(path: str) -> str:
    """Returns an absolute path, its links unresolved; ``link/..`` is what it is for the shell's commands."""
    absolute = "/" if path.startswith("/") else os.getcwd()
    for part in path.split("/"):
        if part == "..":
            absolute = os.path.dirname(os.path.realpath(absolute))
        elif part not in ("", "."):
            absolute = os.path.join(absolute, part)
    return absolute


def base_of(recorded: str | None) -> str:
    """Returns the folder that an index on a server has recorded, as text.

    Without one, or if it does not exist (it was moved, or the index was created on another machine), it is the working
    directory.
    """
    base = path_from_text(recorded) if recorded else ""
    return base if os.path.isabs(base) and os.path.isdir(base) else os.path.realpath(os.curdir)


def local_path(file_path: str, base: str) -> str:
    """Returns the operating system path for a `file_path` of an index."""
    return path_from_text(os.path.normpath(os.path.join(path_to_text(base), file_path)))


def path_to_text(path: str) -> str:
    r"""Returns an operating system path as text; a byte that is not UTF-8 becomes ``\xff``."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def path_from_text(text: str) -> str:
    """Returns the operating system path for text from `path_to_text`."""
    if os.path.lexists(text):
        return text
    return os.fsdecode(_ESCAPED_BYTE.sub(lambda byte: bytes.fromhex(byte[1].decode()), text.encode()))


def path_argument(text: str) -> str:
    """Returns a path as the user means it: of a ``file://`` URL, or with a ``~`` that was quoted and not expanded."""
    if text.lower().startswith("file://"):
        return os.fsdecode(unquote_to_bytes(text[len("file://") :].removeprefix("localhost")))
    return text if os.path.lexists(text) else os.path.expanduser(text)


def quote_path(path: str) -> str:
    """Returns `path` on one line, quoted if need be, so that it can be pasted into a shell."""
    if not path.isprintable():
        return "$'" + os.fsencode(path).decode("latin-1").encode("unicode_escape").decode().replace("'", "\\'") + "'"
    if "'" in path and not set('"$`\\!') & set(path):
        return f'"{path}"'
    return shlex.quote(path)
