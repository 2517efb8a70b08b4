"""Seconds of a call, and an empty file cache."""

import os
import time
from collections.abc import Callable
from pathlib import Path

DROP = Path("/proc/sys/vm/drop_caches")


def timed(call: Callable[[], object]) -> float:
    """Returns the seconds of a call."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def can_drop() -> bool:
    """Returns True if this process may empty the system's file cache: on Linux, as root."""
    return os.access(DROP, os.W_OK)


def drop() -> None:
    """Empties the system's file cache, except what a process has mapped in memory."""
    os.sync()
    DROP.write_text("3")
