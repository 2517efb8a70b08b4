"""What a run of create.py shows: the bar, a line for each unreadable file, the summary; and how it is stopped."""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import Self, TypeVar

from tqdm import tqdm

from imagesearch.cli import say
from imagesearch.embed import Document
from imagesearch.errors import Failure
from imagesearch.files import shown

Item = TypeVar("Item")

UNREADABLE_SHOWN = 20


class Report:
    """Counts what happens to the files of a run and tells the user, on stderr.

    `new`, `updated`, `unchanged`, `deleted`, `unreadable` and `passed_over` are numbers of files or documents.
    """

    def __init__(self) -> None:
        self.new = self.updated = self.unchanged = self.deleted = self.unreadable = self.passed_over = 0
        self.started = time.monotonic()
        self.bar = tqdm(disable=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()
        say(self.summary())

    @property
    def shown(self) -> bool:
        """Whether somebody looks: the bar is for terminals."""
        return sys.stderr.isatty()

    def expect(self, total: int) -> None:
        """Starts the bar, for so many files."""
        self.bar = tqdm(total=total, unit=" images", dynamic_ncols=True, smoothing=0.1)

    def say(self, text: str) -> None:
        """A line above the bar."""
        tqdm.write(text, file=sys.stderr)

    def pass_over(self, _path: str) -> None:
        self.passed_over += 1

    def cannot_read(self, path: str, reason: str) -> None:
        self.unreadable += 1
        self.bar.update()
        self.bar.set_postfix_str(f"{self.unreadable} unreadable", refresh=False)
        if self.unreadable <= UNREADABLE_SHOWN:
            self.say(f"Cannot read {shown(path)}: {reason}")
        elif self.unreadable == UNREADABLE_SHOWN + 1:
            self.say("Further unreadable files are only counted.")

    def leave(self) -> None:
        """A file that the index has as it is."""
        self.unchanged += 1
        self.bar.update()

    def wrote(self, document: Document) -> None:
        """A document that the index now has."""
        if document.embedding is None:
            self.unchanged += 1
        elif document.stored:
            self.updated += 1
        else:
            self.new += 1
        self.bar.update()

    def summary(self) -> str:
        seconds = time.monotonic() - self.started
        embedded = self.new + self.updated
        rate = f" ({embedded / seconds:.1f} images/s embedded)" if embedded else ""
        return (
            f"{self.new:,} new, {self.updated:,} updated, {self.unchanged:,} unchanged, {self.deleted:,} deleted,"
            f" {self.unreadable:,} unreadable, {self.passed_over:,} passed over"
            f" in {seconds:.1f} s{rate}"
        )


class Interrupt:
    """Ends a run in order at the first Ctrl-C (SIGINT) or SIGTERM, at once at the second.

    `signal` is the signal's number, 0 before there was one.
    """

    def __init__(self) -> None:
        self.signal = 0
        self.stopped = threading.Event()

    def __enter__(self) -> Self:
        self.before = {number: signal.signal(number, self.stop) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        if self.signal and isinstance(error, Failure):  # a wait that was cut short
            error.exit_code = 128 + self.signal

    def stop(self, number: int, _frame: FrameType | None) -> None:
        self.signal = number
        self.stopped.set()
        # Not print, which may be what the signal has interrupted.
        os.write(2, b"\nInterrupted: writing what is embedded. Once more ends at once.\n")
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def until(self, items: Iterable[Item]) -> Iterator[Item]:
        """`items`, up to the interruption."""
        for item in items:
            if self.signal:
                return
            yield item

    def wait(self, seconds: float) -> bool:
        """Waits; False where the run was interrupted."""
        return not self.stopped.wait(seconds)
