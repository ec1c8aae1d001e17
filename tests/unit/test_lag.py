"""A replica's lag in the last minutes."""

from django_scaledb.routing.lag import SLOT_SECONDS, SLOTS, LagHistory, Slot


def test_each_slot_has_the_worst_that_was_seen() -> None:
    history = LagHistory()
    for second, lag in ((100, 0.2), (101, 3.0), (102, 0.1), (105, 0.0)):
        history.add(second, lag, out=False)
    assert history.slots(105)[-2:] == [Slot(20, 3.0), Slot(21, 0.0)]


def test_out_and_unknown() -> None:
    history = LagHistory()
    history.add(100, 1.0, out=False)
    history.add(101, None, out=True)
    history.add(102, 0.5, out=False)
    history.add(110, None, out=True)
    assert history.slots(110)[-3:] == [Slot(20, 1.0, out=True), None, Slot(22, None, out=True)]


def test_what_is_older_is_forgotten_and_the_present_is_last() -> None:
    history = LagHistory()
    for second in range(3600):
        history.add(second, float(second), out=False)
    slots = history.slots(3599)
    assert len(slots) == SLOTS == len(history._slots)
    assert slots[-1].lag == 3599.0
    assert slots[0].number == (3599 // SLOT_SECONDS) - SLOTS + 1
    assert history.slots(3599 + 1000 * SLOT_SECONDS) == [None] * SLOTS
