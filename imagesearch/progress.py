"""What a run of create.py shows on stderr: the progress, a line for each unreadable file, the summary."""

import collections
import contextlib
import math
import os
import sys
import threading
import time
from collections.abc import Iterable
from typing import Self

from tqdm import tqdm

from imagesearch import console
from imagesearch.paths import quote_path
from imagesearch.records import Document, MetadataUpdate, ModelInfo

UNREADABLE_SHOWN = 20
KINDS_SHOWN = 10  # of skipped files
MAX_KINDS = 1000  # that are counted apart: a million serial numbers may look like extensions
OTHER = "other"  # all kinds beyond these
LINE_INTERVAL_SECONDS = 30  # between progress lines, if stderr is not a terminal
ESTIMATE_AFTER_SECONDS = 3  # of embedding, before a rate is shown
WIDE_COLUMNS = 80  # a terminal at least this wide shows a bar


class Progress:
    """Counts what happens to the images of a run and tells the user, on stderr. A `Report`."""

    def __init__(self) -> None:
        self.new = self.updated = self.copied = self.unchanged = self.deleted = self.unreadable = 0
        self._skipped: collections.Counter[str] = collections.Counter()
        self._index = ""
        self._total: int | None = None
        self._started = time.monotonic()
        self._embedding_started: float | None = None
        self._next_line = self._started + LINE_INTERVAL_SECONDS
        self._bar = tqdm(disable=True)
        self._is_closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._is_closed = True
        self._bar.close()
        self.say(self.summary())

    @property
    def left(self) -> int | None:
        """How many images have not been dealt with, None if that is not known."""
        return None if self._total is None else max(0, self._total - self.done)

    def start(self, index: str, model: ModelInfo, images: Iterable[object]) -> None:
        """Shows a bar if stderr is a terminal. `images` are counted on a thread, while the work goes on.

        The summary names the index and its model.
        """
        self._index = f"; index {index}, {model.description}"
        if sys.stderr.isatty():
            self._bar = tqdm(bar_format="{desc}", desc=self._status(), dynamic_ncols=True, mininterval=0.2)
            threading.Thread(target=self._count, args=[images], daemon=True).start()

    def _count(self, images: Iterable[object]) -> None:
        total = 0
        with contextlib.suppress(Exception):  # the run meets it, too
            for _ in images:
                total += 1
                if self._is_closed:
                    return
            self._total = self._bar.total = total

    def say(self, text: str) -> None:
        """Prints a line above the bar; nothing if it cannot be written."""
        with tqdm.external_write_mode(sys.stderr):
            console.say(text)

    def count_skipped(self, kind: str) -> None:
        """Counts a file that is not an image; `kind` is its extension, or "hidden" and the like."""
        is_new = kind not in self._skipped
        self._skipped[OTHER if is_new and len(self._skipped) >= MAX_KINDS else kind] += 1

    def count_unreadable(self, path: str, reason: str) -> None:
        """Counts an image that cannot be read, and says why."""
        self.unreadable += 1
        if self.unreadable <= UNREADABLE_SHOWN:
            self.say(f"Cannot read {quote_path(path)}: {reason}")
        elif self.unreadable == UNREADABLE_SHOWN + 1:
            self.say("More files cannot be read; they are only counted.")
        self._update()

    def start_embedding(self) -> None:
        """Starts the clock of the embedding rate, the first time it is called."""
        if self._embedding_started is None:
            self._embedding_started = time.monotonic()

    def count_unchanged(self) -> None:
        """Counts an unchanged image."""
        self.unchanged += 1
        self._update()

    def count_written(self, item: Document | MetadataUpdate) -> None:
        """Counts a document that is now in the index."""
        if isinstance(item, MetadataUpdate):
            self.unchanged += 1
        else:
            self.updated += item.is_update
            self.new += not item.is_update
            self.copied += item.is_copy
        self._update()

    @property
    def done(self) -> int:
        """How many images have been dealt with."""
        return self.new + self.updated + self.unchanged + self.unreadable

    def _update(self) -> None:
        """Brings the bar up to date, or prints a line from time to time if there is no terminal."""
        if not self._bar.disable:
            columns = os.get_terminal_size(sys.stderr.fileno()).columns or WIDE_COLUMNS
            has_bar = self._total is not None and columns >= WIDE_COLUMNS
            self._bar.bar_format = "{percentage:3.0f}%|{bar}| {desc}" if has_bar else "{desc}"
            self._bar.set_description_str(self._status(), refresh=False)
            self._bar.update(self.done - self._bar.n)
        elif time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + LINE_INTERVAL_SECONDS
            self.say(self._status())

    @property
    def _embedded(self) -> int:
        return self.new + self.updated - self.copied

    def _embedding_seconds(self) -> float:
        return 0.0 if self._embedding_started is None else time.monotonic() - self._embedding_started

    def _status(self) -> str:
        """Returns the count, and the rate and time left of what is embedded; short enough for 39 columns."""
        status = f"{self.done:,}" + (f"/{self._total:,}" if self._total is not None else " images")
        seconds = self._embedding_seconds()
        if seconds >= ESTIMATE_AFTER_SECONDS and self._embedded:
            rate = self._embedded / seconds
            status += f", {rate:.0f}/s"
            if self._total is not None and self._total > self.done:
                # Images that are not looked at yet may turn out to be unchanged: this is an upper bound.
                status += f", {_duration((self._total - self.done) / rate)} left"
        return status + (f", {self.unreadable} unreadable" if self.unreadable else "")

    def summary(self) -> str:
        """Returns the counts of the whole run; those that are 0 are left out, but for the new ones."""
        seconds = time.monotonic() - self._started
        rate = f" ({self._embedded / self._embedding_seconds():.1f} images/s embedded)" if self._embedded else ""
        known = f" ({self.copied:,} with a known embedding)" if self.copied else ""
        counts = [f"{self.new:,} new" + ("" if self.updated else known)]
        if self.updated:
            counts.append(f"{self.updated:,} updated{known}")
        for name in ("unchanged", "deleted", "unreadable"):
            if number := getattr(self, name):
                counts.append(f"{number:,} {name}")
        return f"{', '.join(counts)} in {seconds:.1f} s{rate}{self._index}{self._skipped_kinds()}"

    def _skipped_kinds(self) -> str:
        """Returns what was skipped, the most frequent kinds first; nothing if there is nothing."""
        shown = [pair for pair in self._skipped.most_common(KINDS_SHOWN + 1) if pair[0] != OTHER][:KINDS_SHOWN]
        kinds = [f"{number:,} {quote_path(kind) if kind.startswith('.') else kind}" for kind, number in shown]
        if others := self._skipped.total() - sum(number for _, number in shown):
            kinds.append(f"{others:,} {OTHER}")
        return f"; skipped: {', '.join(kinds)}" if kinds else ""


def _duration(seconds: float) -> str:
    """Returns 59s, 59m or 23h59m."""
    if seconds < 60:
        return f"{math.ceil(seconds)}s"
    minutes = round(seconds / 60)
    return f"{minutes}m" if minutes < 60 else f"{minutes // 60}h{minutes % 60:02}m"
