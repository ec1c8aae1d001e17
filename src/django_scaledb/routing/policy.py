"""Where a read goes, and why; how far a replica is behind. Pure: facts in, a decision out.

The router has a short cut for the ordinary case; what the short cut answers is what `decide` answers.
"""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from django_scaledb.routing.token import Position

#: So many picks are drawn at a time; a power of two.
DECK_SIZE = 64
#: A replica must answer in this fraction of another's time to be preferred: equals share the load.
CLEARLY_FASTER = 0.7


class Mode(StrEnum):
    """What the innermost `use_primary()` or `use_replica()` asked for."""

    PRIMARY = "primary"
    REPLICA = "replica"
    STALE_REPLICA = "stale replica"


class Reason(StrEnum):
    """Why a read went where it went; the value is a sentence's end: "the primary, because ..."."""

    REPLICA = "a healthy replica has all that this context wrote or saw"
    STALE_REPLICA = "use_replica(stale_ok=True) asked for a replica, whatever it has replayed"
    USE_PRIMARY = "use_primary() asked for the primary"
    MODEL = "SCALEDB['READ_FROM_PRIMARY'] names the model or its app"
    MIGRATION = "the model belongs to a migration"
    TRANSACTION = "a transaction is open on the primary"
    NOT_REPLAYED = "no healthy replica has replayed what this context wrote or saw"
    NO_REPLICA = "no replica is healthy"
    STARTING = "the health of the replicas is not known yet"
    NONE_CONFIGURED = "no replica is configured"
    TEST_MIRROR = "the replicas are test mirrors of the primary"


@dataclass(frozen=True)
class Candidate:
    """A healthy replica: `floor` is a position that it is known to have replayed."""

    alias: str
    floor: int
    weight: float = 1.0
    latency: float = 0.0


class Transaction(StrEnum):
    NONE = "none"
    CLEAN = "nothing written in it so far"
    WRITTEN = "it may have written"


@dataclass(frozen=True)
class Facts:
    """All that a decision rests on.

    `primary_only` is the reason why the model is read from the primary, if there is one; `required`
    the position of this context in the log that the candidates replay, or None.
    """

    mode: Mode | None = None
    primary_only: Reason | None = None
    transaction: Transaction = Transaction.NONE
    required: int | None = None
    candidates: Sequence[Candidate] = ()
    no_candidates: Reason = Reason.NO_REPLICA


@dataclass(frozen=True)
class Decision:
    """`candidates` may serve the read; if there are none the primary does."""

    reason: Reason
    candidates: Sequence[Candidate] = field(default=())


def decide(facts: Facts) -> Decision:
    """Which replicas may serve a read; when none, the primary does."""
    if facts.mode is Mode.PRIMARY:
        return Decision(Reason.USE_PRIMARY)
    if facts.mode is Mode.STALE_REPLICA:
        if facts.candidates:
            return Decision(Reason.STALE_REPLICA, facts.candidates)
        return Decision(facts.no_candidates)
    if facts.mode is None:
        if facts.primary_only is not None:
            return Decision(facts.primary_only)
        if facts.transaction is not Transaction.NONE:
            return Decision(Reason.TRANSACTION)
    elif facts.transaction is Transaction.WRITTEN:
        # use_replica() still honours what this context wrote, and that is in the open transaction.
        return Decision(Reason.TRANSACTION)
    if not facts.candidates:
        return Decision(facts.no_candidates)
    if facts.required is None:
        return Decision(Reason.REPLICA, facts.candidates)
    fresh = [c for c in facts.candidates if c.floor >= facts.required]
    return Decision(Reason.REPLICA, fresh) if fresh else Decision(Reason.NOT_REPLAYED)


def choose(candidates: Sequence[Candidate], rng: random.Random) -> str:
    """One of them: two choices at random by weight, and of these the clearly faster one."""
    if len(candidates) == 1:
        return candidates[0].alias
    first, second = rng.choices(candidates, [c.weight for c in candidates], k=2)
    return second.alias if second.latency < first.latency * CLEARLY_FASTER else first.alias


def deck(candidates: Sequence[Candidate], rng: random.Random) -> tuple[str, ...]:
    """`DECK_SIZE` choices drawn in advance, so that a decision only takes the next one."""
    if not candidates:
        return ()
    if len(candidates) == 1:
        return (candidates[0].alias,) * DECK_SIZE
    return tuple(choose(candidates, rng) for _ in range(DECK_SIZE))


class Verdict(StrEnum):
    """What a context's position means for a set whose log is on `timeline`."""

    NOTHING = "it belongs to another cluster or to a timeline that is over"
    COMPARE = "compare it with the replicas' positions"
    AHEAD = "it belongs to a timeline that is not known here yet"


def verdict(position: Position | None, system: int, timeline: int) -> Verdict:
    if position is None or position.system != system or position.timeline < timeline:
        return Verdict.NOTHING
    return Verdict.COMPARE if position.timeline == timeline else Verdict.AHEAD


class PrimaryHistory:
    """What the primary's log position was, when: from this follows how old a replica's data are.

    Times are seconds of one steady clock of this process, so that no server's clock matters; an idle
    primary gives no new positions, and a replica that has the newest one is not behind.
    """

    def __init__(self, window: float) -> None:
        self.window = window
        self._times: list[float] = []
        self._lsns: list[int] = []

    def add(self, time: float, lsn: int) -> None:
        """At `time` the primary's position was `lsn`."""
        if self._lsns and lsn < self._lsns[-1]:  # another server, or another life of this one
            self.clear()
        if self._lsns and lsn == self._lsns[-1]:
            self._times[-1] = time
        else:
            self._times.append(time)
            self._lsns.append(lsn)
        # One sample from before the window stays: it says what is at least as old as the window.
        outdated = bisect_right(self._times, time - self.window) - 1
        if outdated > 0:
            del self._times[:outdated]
            del self._lsns[:outdated]

    def clear(self) -> None:
        self._times.clear()
        self._lsns.clear()

    @property
    def newest(self) -> int | None:
        return self._lsns[-1] if self._lsns else None

    @property
    def since(self) -> float | None:
        """When the oldest position that is known was the primary's."""
        return self._times[0] if self._times else None

    def lag(self, replayed: int, now: float) -> float | None:
        """At most so many seconds ago everything was replayed that is in `replayed`; 0: nothing is missing.

        None when the primary was past `replayed` before it was first looked at.
        """
        if not self._lsns:
            return None
        index = bisect_right(self._lsns, replayed) - 1
        if index < 0:
            return None
        if index == len(self._lsns) - 1:
            return 0.0
        return max(0.0, now - self._times[index])
