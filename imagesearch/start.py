"""The first import of both scripts: what must be settled before the imports that take long, and `run`."""

import signal

if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # it is ignored in a background job
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends a script without a traceback, from here on

import contextlib
import importlib.util
import os
import sys
from collections.abc import Callable
from typing import NoReturn

from imagesearch.console import say
from imagesearch.errors import ImageSearchError, OutputError, UsageError, describe_error
from imagesearch.locations import quote_path
from imagesearch.parallel import exit_lock

MAX_EXIT_WAIT_SECONDS = 1


def _open_standard_streams() -> None:
    """Opens /dev/null for each standard stream that was closed (``2>&-``), so that no other file takes its number.

    For stdout it is opened for reading, so that results that cannot be written are an error, as they are for `cat`.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            os.dup2(os.open(os.devnull, os.O_WRONLY if name == "stderr" else os.O_RDONLY), number)
            setattr(sys, name, os.fdopen(number, "r" if number == 0 else "w"))


def run(main: Callable[[], int]) -> NoReturn:
    """Runs a script's `main` and exits with its code, or with one line in place of a traceback."""
    program = os.path.basename(sys.argv[0])
    try:
        code = main()
    except ImageSearchError as error:
        say(f"{program}: {error}")
        code = error.exit_code
    except OSError as error:  # the system refused something
        place = f": {quote_path(str(error.filename))}" if error.filename else ""
        say(f"{program}: {describe_error(error)}{place}.")
        code = ImageSearchError.exit_code
    except OutputError as error:
        code = 141  # as for a program that SIGPIPE ends: the reader has gone, as `| head -1` does
        cause = error.__cause__
        if cause and not isinstance(cause, BrokenPipeError):
            say(f"{program}: the results cannot be written: {describe_error(cause)}.")
            code = ImageSearchError.exit_code
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    os._exit(code)  # without waiting for threads, which may wait for a server that is away


def exit_on_signals(say_goodbye: Callable[[], None]) -> None:
    """Lets Ctrl-C (SIGINT) and SIGTERM end the process at once, with 128 and the signal's number.

    Called on the main thread, which then has to wait with `parallel.call_on_thread`: Python runs a handler only there,
    and not while the thread is inside a library that is not Python.
    """

    def stop(number: int, _frame: object) -> None:
        say_goodbye()
        exit_lock.acquire(timeout=MAX_EXIT_WAIT_SECONDS)  # or SQLite's journal would stay, for a later file to meet
        os._exit(128 + number)  # without waiting for threads; what is stored is stored

    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, stop)


if sys.getfilesystemencoding() != "utf-8":  # paths are bytes or UTF-8, whatever the locale
    os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # ONNX Runtime 1.32 would keep, and send, usage data
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # no thread of numpy's is needed; they take 0.1 s to start
_open_standard_streams()
sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")  # type: ignore[union-attr]  # JSON is UTF-8
if importlib.util.find_spec("imgbeddings") is None:
    say("The dependencies are not installed: source .venv/bin/activate, or pip install --no-deps -r requirements.txt.")
    sys.exit(UsageError.exit_code)
