"""Seconds of a call, with a warm file cache or a cold one."""

import os
import time
from collections.abc import Callable
from pathlib import Path

DROP = Path("/proc/sys/vm/drop_caches")


def timed(call: Callable[[], object]) -> float:
    """Seconds of a call."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def can_drop() -> bool:
    """Whether this process may empty the system's file cache: on Linux, as root."""
    return os.access(DROP, os.W_OK)


def drop() -> None:
    """Empties the system's file cache, but for what a process has mapped in memory."""
    os.sync()
    DROP.write_text("3")


def cold(call: Callable[[], object]) -> float:
    """Seconds of a call with nothing in the file cache, where `can_drop`."""
    if can_drop():
        drop()
    return timed(call)
