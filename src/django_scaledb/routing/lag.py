"""How far a replica was behind in the last minutes, as one process saw it (pure)."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

SLOT_SECONDS = 5.0
SLOTS = 60


@dataclass
class Slot:
    """Some seconds of a replica: `lag` is the greatest one seen, `out` says that it was out meanwhile."""

    number: int
    lag: float | None = None
    out: bool = False


class LagHistory:
    """The last five minutes in slots of five seconds; times are those of one monotonic clock.

    As many slots are kept however often a replica is looked at, and each has the worst that was seen.
    """

    def __init__(self) -> None:
        self._slots: deque[Slot] = deque(maxlen=SLOTS)

    def add(self, now: float, lag: float | None, *, out: bool) -> None:
        """At `now` the replica was `lag` seconds behind (None: not known), and `out` or in use."""
        number = int(now // SLOT_SECONDS)
        if not self._slots or self._slots[-1].number < number:
            self._slots.append(Slot(number))
        slot = self._slots[-1]
        if lag is not None:
            slot.lag = lag if slot.lag is None else max(slot.lag, lag)
        slot.out = slot.out or out

    def slots(self, now: float) -> list[Slot | None]:
        """`SLOTS` of them, the one of `now` last; None where nobody looked."""
        last = int(now // SLOT_SECONDS)
        known = {slot.number: slot for slot in self._slots.copy()}
        return [known.get(number) for number in range(last - SLOTS + 1, last + 1)]
