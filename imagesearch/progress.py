"""What a run of create.py shows on stderr: the bar, a line for each unreadable file, the summary."""

import collections
import contextlib
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from typing import Self

from tqdm import tqdm

from imagesearch.console import say
from imagesearch.locations import quote_path
from imagesearch.records import Document, ListingReport

UNREADABLE_SHOWN = 20  # on a terminal
KINDS_SHOWN = 10  # kinds of skipped files
LINE_INTERVAL_SECONDS = 30  # between progress lines, if stderr is not a terminal
BAR_AFTER_SECONDS = 2  # so that its first rate is not that of one image

# Its own has a semaphore as well, which macOS and Python 3.14 report as leaked, since the scripts end by os._exit.
tqdm.set_lock(threading.RLock())


def open_bar(images: Iterable[object]) -> tqdm:
    """Returns a bar on stderr. How many `images` there are is counted on a thread of its own."""
    bar = tqdm(unit=" images", delay=BAR_AFTER_SECONDS, dynamic_ncols=True, smoothing=0, miniters=1)

    def count() -> None:
        with contextlib.suppress(Exception):  # the run meets it, too
            bar.total = sum(1 for _ in images)

    threading.Thread(target=count, daemon=True).start()
    return bar


class NoReport(ListingReport):
    """For a listing that is only counted."""


class Progress:
    """Counts what happens to the images of a run, and shows it; a `ListingReport`.

    `advance` and `count_stored` are safe to use from several threads.
    """

    def __init__(self) -> None:
        self.new = self.updated = self.unchanged = self.deleted = self.unreadable = 0
        self.copied = 0  # how many of the new and updated ones
        self._is_terminal = sys.stderr.isatty()
        self._skipped = collections.Counter[str]()
        self._index = ""
        self._started = time.monotonic()
        self._next_line = self._started + LINE_INTERVAL_SECONDS
        self._bar = tqdm(disable=True)
        self._lock = threading.Lock()  # guards the counts and the bar
        self._done = 0

    def start(self, index: str, images: Iterable[object]) -> None:
        """Shows a bar if stderr is a terminal; `images` are counted for it. `index` ends the summary."""
        self._index = index
        if self._is_terminal:
            self._bar = open_bar(images)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None and self._bar.n:
            self._bar.total = self._bar.n  # also if files have come or gone since they were counted
            self._bar.refresh()
        self._bar.close()
        say(self.summary())

    def advance(self, number: int) -> None:
        """Moves the bar: so many images are embedded, known or unreadable by now."""
        with self._lock:
            self._done += number
            self._bar.update(number)
            if not self._is_terminal and time.monotonic() >= self._next_line:
                self._next_line = time.monotonic() + LINE_INTERVAL_SECONDS
                say(f"{self._done:,} images done")

    def count_skipped(self, kind: str) -> None:
        """Counts a file that is not an image."""
        self._skipped[kind] += 1

    def count_unreadable(self, name: str, reason: str) -> None:
        """Counts an image or a folder that cannot be read, and says why."""
        self.unreadable += 1
        if self.unreadable <= UNREADABLE_SHOWN or not self._is_terminal:
            say(f"Cannot read {quote_path(name)}: {reason}")
        elif self.unreadable == UNREADABLE_SHOWN + 1:
            say("More files cannot be read; to see all their names, use 2>log.txt.")

    def count_unchanged(self) -> None:
        """Counts an image whose size and time are unchanged."""
        with self._lock:
            self.unchanged += 1
        if self._is_terminal:
            self._bar.initial += 1  # no part of the rate, from which the time left is told
        self.advance(1)

    def count_stored(self, documents: Sequence[Document]) -> None:
        """Counts documents that are now in the index."""
        with self._lock:
            for document in documents:
                if document.embedding is None:
                    self.unchanged += 1
                elif document.image.indexed:
                    self.updated += 1
                else:
                    self.new += 1
                self.copied += document.is_copy

    @property
    def stored(self) -> int:
        """How many of the images that were read have a document now."""
        return self.new + self.updated + self.unchanged

    def summary(self) -> str:
        """Returns the counts of the whole run; those that are 0 are left out, but for the new ones."""
        known = f" ({self.copied:,} with a known embedding)" if self.copied else ""
        counts = [f"{self.new:,} new" + ("" if self.updated else known)]
        if self.updated:
            counts.append(f"{self.updated:,} updated{known}")
        for name in ("unchanged", "deleted", "unreadable"):
            if number := getattr(self, name):
                counts.append(f"{number:,} {name}")
        seconds = time.monotonic() - self._started
        return f"{', '.join(counts)} in {seconds:.1f} s{self._index}{self._skipped_kinds()}"

    def _skipped_kinds(self) -> str:
        """Returns what was skipped, the most frequent kinds first; nothing if there is nothing."""
        skipped = self._skipped.copy()  # the signal handler may be here while another thread counts
        shown = skipped.most_common(KINDS_SHOWN)
        kinds = [f"{number:,} {kind}" for kind, number in shown]
        if others := skipped.total() - sum(number for _, number in shown):
            kinds.append(f"{others:,} other")
        return f"; skipped: {', '.join(kinds)}" if kinds else ""

    def say_interrupted(self) -> None:
        """Says how far the run has come; in a signal handler."""
        say(f"Interrupted: at least {self.summary()}. Run the command again to continue: what is stored is kept.")
