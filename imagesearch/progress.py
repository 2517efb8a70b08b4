"""What a run of create.py shows on stderr: the progress, a line for each unreadable file, the summary."""

import collections
import contextlib
import os
import sys
import threading
import time
from typing import Self

from tqdm import tqdm

from imagesearch.documents import Document, MetadataUpdate
from imagesearch.paths import quote_path

UNREADABLE_SHOWN = 20
KINDS_SHOWN = 10  # of skipped files
LINE_INTERVAL_SECONDS = 30  # between progress lines, if stderr is not a terminal
ESTIMATE_AFTER_SECONDS = 3  # of embedding, before a rate is shown
WIDE_COLUMNS = 80  # a terminal at least this wide shows a bar


class Progress:
    """Counts what happens to the images of a run and tells the user, on stderr."""

    def __init__(self) -> None:
        self.new = self.updated = self.copied = self.unchanged = self.deleted = self.unreadable = 0
        self._skipped: collections.Counter[str] = collections.Counter()
        self._total: int | None = None
        self._started = time.monotonic()
        self._embedding_started: float | None = None
        self._next_line = self._started + LINE_INTERVAL_SECONDS
        self._last_retry = ("", 0.0)
        self._lock = threading.Lock()
        self._bar = tqdm(disable=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
        self.say(self.summary())

    @property
    def is_terminal(self) -> bool:
        """True if stderr is a terminal, which shows a bar."""
        return sys.stderr.isatty()

    def start_bar(self, total: int) -> None:
        """Shows a bar for `total` images; only a count on a narrow terminal, where a bar would be cut."""
        self._total = total
        columns = os.get_terminal_size(sys.stderr.fileno()).columns or WIDE_COLUMNS
        layout = "{percentage:3.0f}%|{bar}| {desc}" if columns >= WIDE_COLUMNS else "{desc}"
        self._bar = tqdm(total=total, desc=self._status(), bar_format=layout, ncols=columns - 1, mininterval=0.2)

    def say(self, text: str) -> None:
        """Prints a line above the bar; nothing if the reader of stderr has closed it."""
        with contextlib.suppress(BrokenPipeError):
            tqdm.write(text, file=sys.stderr)

    def on_retry(self, reason: str, delay: float) -> None:
        """Says what is retried; once if several threads retry the same."""
        with self._lock:
            last_reason, until = self._last_retry
            if reason == last_reason and time.monotonic() < until:
                return
            self._last_retry = (reason, time.monotonic() + delay / 2)
        self.say(f"Retrying in {delay:.0f} s: {reason}." if delay >= 1 else f"Retrying: {reason}.")

    def count_skipped(self, kind: str) -> None:
        """Counts a file that is not an image; `kind` is its extension, or "hidden" and the like."""
        self._skipped[kind] += 1

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
    def _done(self) -> int:
        return self.new + self.updated + self.unchanged + self.unreadable

    def _update(self) -> None:
        """Brings the bar up to date, or prints a line from time to time if there is no terminal."""
        if self._total is not None:
            self._bar.set_description_str(self._status(), refresh=False)
            self._bar.update(self._done - self._bar.n)
        elif time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + LINE_INTERVAL_SECONDS
            self.say(self._status())

    def _status(self) -> str:
        """Returns the count, and the rate and time left of what is embedded; short enough for 39 columns."""
        status = f"{self._done:,}" + (f"/{self._total:,}" if self._total is not None else " images")
        seconds = 0.0 if self._embedding_started is None else time.monotonic() - self._embedding_started
        embedded = self.new + self.updated - self.copied
        if seconds >= ESTIMATE_AFTER_SECONDS and embedded:
            rate = embedded / seconds
            status += f", {rate:.0f}/s"
            if self._total is not None:
                # Images that are not looked at yet may turn out to be unchanged: this is an upper bound.
                status += f", {_duration((self._total - self._done) / rate)} left"
        return status + (f", {self.unreadable} bad" if self.unreadable else "")

    def summary(self) -> str:
        """Returns the counts of the whole run."""
        seconds = time.monotonic() - self._started
        embedded = self.new + self.updated - self.copied
        rate = f" ({embedded / seconds:.1f} images/s embedded)" if embedded else ""
        copied = f" ({self.copied:,} of them copied from images with the same content)" if self.copied else ""
        shown = self._skipped.most_common(KINDS_SHOWN)
        kinds = [f"{number:,} {kind if ' ' in kind else quote_path(kind)}" for kind, number in shown]
        if others := self._skipped.total() - sum(number for _, number in shown):
            kinds.append(f"{others:,} others")
        skipped = ", ".join(kinds)
        return (
            f"{self.new:,} new, {self.updated:,} updated{copied}, {self.unchanged:,} unchanged,"
            f" {self.deleted:,} deleted, {self.unreadable:,} unreadable in {seconds:.1f} s{rate}"
            + (f"; skipped: {skipped}" if skipped else "")
        )


def _duration(seconds: float) -> str:
    """Returns 59s, 59m or 23h59m."""
    if seconds < 60:
        return f"{seconds:.0f}s"
    minutes = round(seconds / 60)
    return f"{minutes}m" if minutes < 60 else f"{minutes // 60}h{minutes % 60:02}m"
