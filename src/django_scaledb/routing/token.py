"""Positions in a cluster's write-ahead log, and the token that carries them between processes. Pure.

A position is what a context needs a replica to have replayed. It names its cluster (the system
identifier that `initdb` made) and its timeline, because log positions of two clusters, or of two
timelines of one, have nothing to say about each other.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

_P = TypeVar("_P", bound=tuple[int, int, int])

#: Stands for a position that is not known: no replica ever reaches it.
UNREACHABLE = 0xFFFF_FFFF_FFFF_FFFF

_SHORT_PAGE_HEADER = 24
_LONG_PAGE_HEADER = 40
_VERSION = "1"
_ENTRY = re.compile(r"([0-9a-f]{1,16})\.([0-9a-f]{1,8})\.([0-9a-f]{1,16})")
#: Far more than any token of ours has: longer ones are not looked at.
_LONGEST = 1024


class Layout(NamedTuple):
    """How a server's log is divided, in bytes (`wal_block_size`, `wal_segment_size`)."""

    page: int = 8192
    segment: int = 16 * 1024 * 1024


USUAL_LAYOUT = Layout()


class Position(NamedTuple):
    """A place in the log of one timeline of one cluster."""

    system: int
    timeline: int
    lsn: int

    def __str__(self) -> str:
        return f"{format_lsn(self.lsn)} (timeline {self.timeline})"


def parse_lsn(text: str | bytes) -> int:
    """The number behind PostgreSQL's ``pg_lsn`` text, as in ``16/B374D848``, also as it was received.

    Raises `ValueError` for anything else.
    """
    high, separator, low = text.partition("/") if isinstance(text, str) else text.partition(b"/")
    if not separator:
        raise ValueError(f"{text!r} is not a log position such as 16/B374D848")
    return (int(high, 16) << 32) + int(low, 16)


def format_lsn(lsn: int) -> str:
    return f"{lsn >> 32:X}/{lsn & 0xFFFF_FFFF:X}"


def reachable(lsn: int, layout: Layout = USUAL_LAYOUT) -> int:
    """The insert position `lsn` as the end of a record, where a replay can stop.

    When the last record filled its page, PostgreSQL's insert position stands behind the NEXT page's
    header (24 bytes, 40 at the start of a segment), while a replica that has replayed everything
    reports the page's start. No record ends there, so rounding down loses nothing.
    """
    offset = lsn % layout.page
    if offset > _LONG_PAGE_HEADER:
        return lsn
    if offset == _LONG_PAGE_HEADER and lsn % layout.segment == _LONG_PAGE_HEADER:
        return lsn - _LONG_PAGE_HEADER
    if offset == _SHORT_PAGE_HEADER and lsn % layout.segment != _SHORT_PAGE_HEADER:
        return lsn - _SHORT_PAGE_HEADER
    return lsn


@dataclass(frozen=True)
class Identity:
    """Of a primary's log: whose it is, and how positions in it are read."""

    system: int = 0
    timeline: int = 0
    layout: Layout = USUAL_LAYOUT

    def position(self, text: bytes | None) -> Position:
        """Where a write ended whose insert position PostgreSQL gave as `text`; None: nobody could ask."""
        lsn = UNREACHABLE if text is None else reachable(parse_lsn(text), self.layout)
        return Position(self.system, self.timeline, lsn)


def later(one: _P | None, other: _P) -> _P:
    """Of two positions of one cluster the one that is further on; a newer timeline is further on."""
    return other if one is None or other[1:] > one[1:] else one


def encode(positions: Iterable[Position]) -> str:
    """A token: ASCII letters, digits, dots and hyphens; ``""`` for no position."""
    entries = [f"{p.system:x}.{p.timeline:x}.{p.lsn:x}" for p in sorted(positions)]
    return "-".join([_VERSION, *entries]) if entries else ""


def decode(token: object) -> list[Position]:
    """The positions in a token. What is no token of ours has none: it is ignored, never an error."""
    if not isinstance(token, str) or len(token) > _LONGEST:
        return []
    version, *entries = token.split("-")
    if version != _VERSION:
        return []
    matches = [_ENTRY.fullmatch(entry) for entry in entries]
    return [Position(*(int(part, 16) for part in match.groups())) for match in matches if match]
