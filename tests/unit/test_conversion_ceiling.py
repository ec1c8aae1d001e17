"""Where the first partition ends."""

# ruff: noqa: DTZ001  # made aware where they are used
from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from django_scaledb.exceptions import PlanError
from django_scaledb.partitions.bounds import MAXVALUE
from django_scaledb.partitions.config import KeyKind, make_config
from django_scaledb.partitions.conversion.ceiling import ROOM, chosen_end, first_end, moment_of

NOW = datetime(2026, 11, 23, 17, 31, 5, tzinfo=UTC)


def config(interval: str = "1 month", kind: KeyKind = KeyKind.TIMESTAMP):
    return make_config("shop.Order", "at", kind, {"interval": interval})


@pytest.mark.parametrize(
    ("interval", "end"),
    [
        ("1 year", datetime(2028, 1, 1)),
        ("1 month", datetime(2027, 1, 1)),
        ("1 day", datetime(2026, 12, 1)),
        ("1 hour", datetime(2026, 11, 30, 18)),
    ],
)
def test_a_whole_period_and_a_week_ahead(interval, end):
    assert first_end(config(interval), NOW, None) == end.replace(tzinfo=UTC)


@given(
    now=st.datetimes(datetime(1990, 1, 1), datetime(2200, 1, 1), timezones=st.just(UTC)),
    greatest=st.none() | st.datetimes(datetime(1990, 1, 1), datetime(2300, 1, 1), timezones=st.just(UTC)),
    interval=st.sampled_from(["1 hour", "1 day", "1 week", "1 month", "3 months", "2 years"]),
    kind=st.sampled_from([KeyKind.TIMESTAMP, KeyKind.DATE, KeyKind.UUID7]),
)
def test_it_lies_above_every_row_and_is_the_end_of_a_period(now, greatest, interval, kind):
    if kind is KeyKind.DATE and interval == "1 hour":
        return
    settings = config(interval, kind)
    end = first_end(settings, now, greatest)
    assert end >= now + ROOM - timedelta(days=1)
    assert greatest is None or greatest < end
    assert settings.interval.start_of(end, settings.period_zone) == end


def test_a_key_without_a_period_is_refused():
    with pytest.raises(PlanError, match="infinity"):
        first_end(config(), NOW, MAXVALUE)
    assert moment_of("infinity", KeyKind.TIMESTAMP) is MAXVALUE
    assert moment_of("2026-11-23 17:31:05.5+00", KeyKind.TIMESTAMP) == NOW + timedelta(seconds=0.5)


def test_an_end_that_somebody_chose_must_lie_above_the_rows_and_now():
    wanted = datetime(2026, 12, 1, tzinfo=UTC)
    assert chosen_end(config(), NOW, None, wanted) == wanted
    with pytest.raises(PlanError, match="rows lie above"):
        chosen_end(config(), NOW, wanted, wanted)
    with pytest.raises(PlanError, match="rows lie above"):
        chosen_end(config(), NOW, None, NOW)
