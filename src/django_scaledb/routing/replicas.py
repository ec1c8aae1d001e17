"""What this process knows of its replicas, in memory: health, position, lag, and the next choices.

`ReplicaSet` is a primary with its replicas. The monitor and failing reads tell it what they see; the
router only takes the next choice. Everything here is shared by all threads: one lock guards changes,
and a decision reads without it.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from operator import length_hint
from typing import TYPE_CHECKING

from django_scaledb.routing import policy
from django_scaledb.routing.config import SetConfig
from django_scaledb.routing.lag import LagHistory
from django_scaledb.routing.policy import Candidate, Reason
from django_scaledb.routing.token import UNREACHABLE, Identity, Layout, Position

if TYPE_CHECKING:
    from django_scaledb.routing.simulation import SimulatedLag

logger = logging.getLogger("django_scaledb.routing")

UNKNOWN = "not looked at yet"
_DIVERGED = "it has replayed what its primary never wrote: it follows another timeline"
#: So many decks are laid out at once; when they are used up, the router asks for more.
_DECKS = 64
#: Seconds that a replica stays out after a read failed on it: longer each time, until it was well for a
#: while.
_FIRST_QUARANTINE = 0.25
_LONGEST_QUARANTINE = 8.0
_FORGIVEN_AFTER = 30.0


class Replica:
    """One replica as this process last saw it. `why_out` is empty while it may serve reads."""

    def __init__(self, alias: str, weight: float) -> None:
        self.alias = alias
        self.weight = weight
        self.why_out = UNKNOWN
        self.floor = 0
        self.lag: float | None = None
        self.latency = 0.0
        #: What was seen of it in the last minutes.
        self.past = LagHistory()
        #: The monitor had no answer in time, and has had none since.
        self.is_frozen = False
        #: When the monitor last found it after it was away.
        self.up_since = 0.0
        self.quarantined_until = 0.0
        #: The position at which it was found ahead of its primary, and has stood since.
        self.diverged_at: int | None = None
        self._quarantine = 0.0
        self._last_failure = 0.0

    def quarantine(self, now: float) -> None:
        if now - self._last_failure > _FORGIVEN_AFTER:
            self._quarantine = 0.0
        self._quarantine = min(_LONGEST_QUARANTINE, self._quarantine * 2 or _FIRST_QUARANTINE)
        self._last_failure = now
        self.quarantined_until = now + self._quarantine


class ReplicaSet:
    """A primary and its replicas.

    `picks` are the next choices, drawn in advance (none when no replica is healthy); `choices` the same, a
    position that all in it have replayed, and whose log it is in: one attribute, so that they always belong
    together.
    """

    def __init__(self, config: SetConfig, start: Callable[[ReplicaSet], None]) -> None:
        self.config = config
        self.primary = config.primary
        self.replicas = {alias: Replica(alias, weight) for alias, weight in config.replicas.items()}
        self.identity = Identity()
        self.identity_known_at = float("-inf")
        self.primary_seen_at = float("-inf")
        self.primary_problem = UNKNOWN
        self.history = policy.PrimaryHistory(max(60.0, 3 * config.max_lag))
        #: Has the monitor look at once: at all servers or, when somebody waits for a replay, at replicas.
        self.wake: Callable[[bool], None] | None = None
        #: What somebody waits for, and since when nobody asked again.
        self.wanted = 0
        self.wanted_at = float("-inf")
        self.started = False
        self.ready = threading.Event()
        self.is_test_mirror = False
        #: Its log is another one than before: a replica must show that it has followed.
        self._has_changed = False
        #: Stands in for the servers, in tests.
        self.simulation: SimulatedLag | None = None
        self.picks: Iterator[str] = iter(())
        self.choices: tuple[Iterator[str], int, int, int] = self.picks, 0, 0, 0
        self._drawn = 0
        self._taken = 0
        self.candidates: tuple[Candidate, ...] = ()
        self.reasons: Counter[Reason] = Counter()
        self.lock = threading.RLock()
        self.rng = random.Random()  # noqa: S311  # spreads load
        self._start = start

    # -- what the router takes

    def start(self) -> None:
        """Begin to look after the replicas, once; returns when they are known, or after a short while."""
        if not self.replicas or self.is_test_mirror:
            return
        if not self.started:
            with self.lock:
                if not self.started:
                    self.started = True
                    self._start(self)
            self.ready.wait(self.config.warm_up)

    def next_replica(self, candidates: Sequence[Candidate]) -> str:
        return policy.choose(candidates, self.rng)

    @property
    def no_candidates(self) -> Reason:
        if not self.replicas:
            return Reason.NONE_CONFIGURED
        if self.is_test_mirror:
            return Reason.TEST_MIRROR
        return Reason.NO_REPLICA if self.ready.is_set() else Reason.STARTING

    def decisions(self) -> dict[str, int]:
        """How many reads were sent where, by reason, since this process began."""
        counts = Counter({reason.name.lower(): n for reason, n in self.reasons.items()})
        # Not counted one by one: how many of the choices are gone.
        counts[Reason.REPLICA.name.lower()] += self._taken + self._drawn - length_hint(self.picks)
        return dict(counts)

    # -- what is learnt

    def learn_identity(self, system: int, timeline: int, layout: Layout) -> None:
        """The primary's log, as a connection to the primary told."""
        with self.lock:
            known = self.identity
            if (known.system, known.timeline) != (system, timeline):
                for replica in self.replicas.values():
                    replica.floor = 0  # counted in a log that is over
                self.wanted = 0
                if known.timeline:
                    logger.warning(
                        "%s is on timeline %s of cluster %s now; it was on timeline %s of cluster %s",
                        self.primary, timeline, system, known.timeline, known.system,
                        extra=self._fields(timeline=timeline, system=system),
                    )  # fmt: skip
                    self._has_changed = True
                self.history.clear()
            self.identity = Identity(system, timeline, layout)
            self.identity_known_at = time.monotonic()
            self.publish()

    def primary_at(self, lsn: int, when: float, floors: Mapping[str, int]) -> None:
        """At `when` all of the primary's log before `lsn` was on its disk, and replicas could have it.

        `floors` are the replicas' positions as they were known before: none can be past `lsn`, unless
        it follows another timeline.
        """
        with self.lock:
            self.history.add(when, lsn)
            self.primary_seen_at = when
            self._primary_state("")
            for alias, floor in floors.items():
                replica = self.replicas[alias]
                if floor > lsn and replica.floor == floor:
                    replica.diverged_at = floor
                    self._judge(replica, _DIVERGED)

    def primary_failed(self, why: str) -> None:
        with self.lock:
            self._primary_state(why)

    def _primary_state(self, why: str) -> None:
        if why != self.primary_problem:
            if why:
                fields = self._fields(state="out", reason=why)
                logger.warning(
                    "primary %s cannot be asked for its position: %s", self.primary, why, extra=fields
                )
            elif self.primary_problem != UNKNOWN:
                logger.info("primary %s answers again", self.primary, extra=self._fields(state="ok"))
        self.primary_problem = why

    def _fields(self, replica: Replica | None = None, **fields: object) -> dict[str, object]:
        """What a log record says besides its sentence."""
        server: dict[str, object] = {"alias": self.primary, "role": "primary"}
        if replica is not None:
            server = {"alias": replica.alias, "role": "replica", "lag": replica.lag}
        return {"primary": self.primary, **server, **fields}

    def replica_at(
        self, replica: Replica, lsn: int, *, own_lag: float | None, latency: float, age: float | None = None
    ) -> None:
        """`replica` answered as a standby that has replayed `lsn`.

        `own_lag` is what it says itself, `age` how long ago the last transaction was committed that it has.
        """
        now = time.monotonic()
        with self.lock:
            replica.floor = max(replica.floor, lsn)
            replica.latency = latency if not replica.latency else 0.8 * replica.latency + 0.2 * latency
            replica.lag = self.history.lag(lsn, now)
            if self.history.since is None:
                replica.lag = own_lag
            elif replica.lag is None and age is not None and not self._has_changed:
                # It lacks what the primary had already when it was first looked at.
                replica.lag = max(age, now - self.history.since)
            self._judge(replica, self._fault(replica, now))

    def _fault(self, replica: Replica, now: float) -> str:
        if replica.lag is None:
            return "it has not caught up since it was first looked at"
        if replica.lag > self.config.max_lag:
            return f"it is {replica.lag:.1f} s behind; MAX_LAG is {self.config.max_lag:g} s"
        if replica.diverged_at is not None:
            if replica.floor == replica.diverged_at:
                return _DIVERGED
            replica.diverged_at = None
        if replica.quarantined_until > now:
            return replica.why_out or "a read has just failed on it"
        return ""

    def replica_out(self, replica: Replica, why: str, *, forget: bool = False) -> None:
        """`replica` is not to be read. With `forget` its position is void, because its server may have
        restarted.

        (After a crash a standby opens before it has replayed again what it had shown before.)
        """
        with self.lock:
            if forget:
                replica.floor = 0
                replica.lag = None
            self._judge(replica, why)

    def read_failed(self, alias: str, why: str) -> None:
        """A read on `alias` failed because of the server: others go elsewhere until the monitor has
        looked."""
        replica = self.replicas.get(alias)
        if replica is None:
            return
        with self.lock:
            replica.quarantine(time.monotonic())
            self._judge(replica, why)
        self.nudge()

    def read_at(self, alias: str, lsn: int) -> Position | None:
        """A read on `alias` saw no more than `lsn`; the position, as a context must remember it."""
        replica = self.replicas.get(alias)
        identity = self.identity
        if replica is None or not identity.timeline:
            return None
        if not replica.why_out and lsn > replica.floor:
            replica.floor = lsn
            self._publish_floor()
        return Position(identity.system, identity.timeline, lsn)

    def nudge(self) -> None:
        """Ask the monitor to look at all servers at once."""
        if self.wake is not None:
            self.wake(True)

    def wait_for(self, lsn: int) -> None:
        """A read went to the primary because no replica has replayed `lsn`: have the monitor watch for it."""
        if lsn == UNREACHABLE:
            return
        self.wanted_at = time.monotonic()
        if lsn > self.wanted:
            self.wanted = lsn
        if self.wake is not None:
            self.wake(False)

    # -- what follows from it

    def _judge(self, replica: Replica, why_out: str) -> None:
        before, replica.why_out = replica.why_out, why_out
        replica.past.add(time.monotonic(), replica.lag, out=bool(why_out))
        if bool(before) != bool(why_out) or (before == UNKNOWN and why_out):
            if why_out:
                fields = self._fields(replica, state="out", reason=why_out)
                logger.warning("replica %s is out: %s", replica.alias, why_out, extra=fields)
            else:
                logger.info("replica %s is in use", replica.alias, extra=self._fields(replica, state="ok"))
        self.publish()

    def publish(self) -> None:
        """Draw the choices anew."""
        with self.lock:
            self._refresh_candidates()
            self._taken += self._drawn - length_hint(self.picks)
            drawn = policy.deck(self.candidates, self.rng) * _DECKS
            self._drawn = len(drawn)
            self.picks = iter(drawn)
            self._publish_choices()

    def _publish_floor(self) -> None:
        with self.lock:
            self._refresh_candidates()
            self._publish_choices()

    def _publish_choices(self) -> None:
        identity = self.identity
        self.choices = self.picks, self._lowest_floor(), identity.system, identity.timeline

    def _refresh_candidates(self) -> None:
        self.candidates = tuple(
            Candidate(r.alias, r.floor, r.weight, r.latency) for r in self.replicas.values() if not r.why_out
        )

    def _lowest_floor(self) -> int:
        return min((c.floor for c in self.candidates), default=0)
