"""Version 7 UUIDs: in order, whatever the clock, the threads and the forks do."""

from __future__ import annotations

import multiprocessing
import threading
import time
import uuid
from datetime import UTC, datetime, timedelta, timezone
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from django_scaledb.exceptions import PlanError
from django_scaledb.partitions import uuid7 as module
from django_scaledb.partitions.uuid7 import timestamp_of, uuid7, uuid7_floor

moments = st.timedeltas(timedelta(0), timedelta(days=2_932_896)).map(
    lambda since: datetime(1970, 1, 1, tzinfo=UTC) + since
)


def test_version_and_variant() -> None:
    value = uuid7()
    assert value.version == 7
    assert value.variant == uuid.RFC_4122


def test_carries_the_time() -> None:
    before = datetime.now(UTC)
    made = timestamp_of(uuid7())
    assert before - timedelta(milliseconds=1) <= made <= datetime.now(UTC) + timedelta(milliseconds=50)


def test_strictly_increasing() -> None:
    values = [uuid7() for _ in range(20_000)]
    assert all(a < b for a, b in pairwise(values))


def test_the_random_bits_differ() -> None:
    assert len({uuid7().int & (1 << 62) - 1 for _ in range(1000)}) == 1000


def test_increasing_in_every_thread() -> None:
    made: list[list[uuid.UUID]] = [[] for _ in range(4)]

    def make(into: list[uuid.UUID]) -> None:
        into += [uuid7() for _ in range(3000)]

    threads = [threading.Thread(target=make, args=(into,)) for into in made]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(a < b for values in made for a, b in pairwise(values))
    # No two share even the time and the fraction: the order holds over all threads.
    assert len({value.int >> 64 for values in made for value in values}) == 12_000


def test_threads_take_turns() -> None:
    other = threading.Thread(target=uuid7)
    with module._lock:
        other.start()
        other.join(timeout=0.1)
        assert other.is_alive()
    other.join()


def test_increasing_when_the_clock_stands_or_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    first = uuid7()
    clock = iter([time.time_ns()] * 5000 + [time.time_ns() - 3600 * 10**9] * 5000 + [-1] * 10)
    monkeypatch.setattr(module.time, "time_ns", lambda: next(clock))
    values = [first, *(uuid7() for _ in range(10_010))]
    assert all(a < b for a, b in pairwise(values))
    assert all(value.version == 7 and value.variant == uuid.RFC_4122 for value in values)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # that is what is tested
def test_a_fork_does_not_inherit_a_held_lock() -> None:
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    before = uuid7()
    with module._lock:  # as another thread of the parent would
        child = context.Process(target=lambda: queue.put(uuid7()), daemon=True)
        child.start()
    child.join(timeout=10)
    assert child.exitcode == 0
    assert queue.get() > before


def test_floor() -> None:
    assert str(uuid7_floor(datetime(2024, 1, 1, tzinfo=UTC))) == "018cc251-f400-0000-0000-000000000000"
    assert uuid7_floor(datetime(1970, 1, 1, tzinfo=UTC)).int == 0
    plus_two = timezone(timedelta(hours=2))
    assert uuid7_floor(datetime(2024, 1, 1, 2, tzinfo=plus_two)) == uuid7_floor(
        datetime(2024, 1, 1, tzinfo=UTC)
    )


@given(moments)
def test_floor_is_the_lowest_of_its_millisecond(moment: datetime) -> None:
    floor = uuid7_floor(moment)
    millisecond = moment.replace(microsecond=moment.microsecond // 1000 * 1000)
    assert timestamp_of(floor) == millisecond
    assert timestamp_of(uuid.UUID(int=floor.int + (1 << 80) - 1)) == millisecond
    assert floor.int & (1 << 80) - 1 == 0


def test_a_new_value_is_not_below_the_floor_of_now() -> None:
    assert uuid7_floor(datetime.now(UTC) - timedelta(milliseconds=1)) <= uuid7()


def test_what_has_no_floor() -> None:
    with pytest.raises(PlanError, match="before 1970"):
        uuid7_floor(datetime(1969, 12, 31, 23, 59, 59, 999999, tzinfo=UTC))
    with pytest.raises(ValueError, match="no time zone"):
        uuid7_floor(datetime(2024, 1, 1))  # noqa: DTZ001


def test_a_time_after_9999_is_refused() -> None:
    with pytest.raises(ValueError, match="after the year 9999"):
        timestamp_of(uuid.UUID(int=(1 << 128) - 1))
