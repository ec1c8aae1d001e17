"""How far a long job has come: a bar on a terminal, else a line every few seconds.

The bar needs tqdm (the ``progress`` extra); without it there are lines on a terminal, too.
"""

from __future__ import annotations

import sys
import time
from typing import Any, Self, TextIO

LINE_SECONDS = 5.0


class Progress:
    """Counts to `total` on standard error (a context manager)::

    with Progress(len(rows), "rows loaded") as progress:
        for batch in batches:
            load(batch)
            progress.advance(len(batch))
    """

    def __init__(self, total: int, what: str, *, stream: TextIO | None = None) -> None:
        self.total = total
        self.what = what
        self.done = 0
        self._stream = stream or sys.stderr
        self._bar: Any = None
        self._begun = self._last_line = time.monotonic()
        self._written: int | None = None

    @property
    def has_bar(self) -> bool:
        """Whether a bar is being drawn, into which nothing else should be written."""
        return self._bar is not None

    def __enter__(self) -> Self:
        if self._stream.isatty():
            try:
                from tqdm import tqdm
            except ImportError:
                pass
            else:
                self._bar = tqdm(total=self.total, desc=self.what, file=self._stream, unit="")
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        elif self._written not in (None, self.done):
            self._write_line()

    def advance(self, count: int = 1) -> None:
        self.done += count
        if self._bar is not None:
            self._bar.update(count)
        elif time.monotonic() - self._last_line >= LINE_SECONDS:
            self._write_line()

    def _write_line(self) -> None:
        self._last_line = time.monotonic()
        self._written = self.done
        seconds = self._last_line - self._begun
        self._stream.write(f"{self.what}: {self.done:,} of {self.total:,} ({seconds:.0f} s)\n")
        self._stream.flush()
