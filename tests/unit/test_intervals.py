"""Periods: anchored, calendar-exact, without gap or overlap in any zone."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta
from itertools import pairwise
from zoneinfo import ZoneInfo

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from django_scaledb.exceptions import ConfigurationError, PlanError
from django_scaledb.partitions.intervals import Interval, Unit

UTC_ZONE = ZoneInfo("UTC")
BERLIN = ZoneInfo("Europe/Berlin")

# Zones that do something odd at midnight: skip it, repeat it, skip a day, shift by half an hour,
# put clocks back over it.
ZONES = [
    ZoneInfo(name)
    for name in (
        "UTC",
        "Europe/Berlin",
        "America/Sao_Paulo",
        "Asia/Beirut",
        "Pacific/Apia",
        "America/Havana",
        "Australia/Lord_Howe",
        "America/St_Johns",
        "Pacific/Kiritimati",
        "Pacific/Kwajalein",
        "Asia/Kathmandu",
    )
]
ODD_MOMENTS = [
    datetime(2026, 12, 31, 23, 59, 59, tzinfo=UTC),
    datetime(2024, 2, 29, 11, 7, tzinfo=UTC),
    datetime(2011, 12, 30, 10, 0, tzinfo=UTC),  # the day that Apia skipped
    datetime(1969, 9, 30, 12, 34, 56, tzinfo=UTC),
    datetime(2010, 11, 7, 2, 45, tzinfo=UTC),  # St Johns, between its two midnights
    datetime(2018, 11, 4, 3, 0, tzinfo=UTC),
]

zones = st.sampled_from(ZONES)
intervals = st.builds(Interval, st.integers(1, 40), st.sampled_from(Unit))
moments = st.one_of(
    st.sampled_from(ODD_MOMENTS),
    st.integers(-120 * 366 * 86400, 180 * 365 * 86400).map(lambda s: datetime.fromtimestamp(s, UTC)),
)


def utc(*parts: int) -> datetime:
    return datetime(*parts, tzinfo=UTC)


def days(text: str, start: datetime, end: datetime, zone: ZoneInfo) -> list[tuple[str, float]]:
    """Each period as its local start and its length in hours."""
    return [
        (a.astimezone(zone).strftime("%Y-%m-%d %H:%M"), (b - a).total_seconds() / 3600)
        for a, b in Interval.parse(text).periods(start, end, zone)
    ]


@pytest.mark.parametrize(
    ("text", "interval"),
    [
        ("1 year", Interval(1, Unit.YEAR)),
        ("2 years", Interval(2, Unit.YEAR)),
        ("3 months", Interval(3, Unit.MONTH)),
        ("18 months", Interval(18, Unit.MONTH)),
        ("1 quarter", Interval(1, Unit.QUARTER)),
        ("1 week", Interval(1, Unit.WEEK)),
        ("5 days", Interval(5, Unit.DAY)),
        ("  6   HOURS ", Interval(6, Unit.HOUR)),
        ("1Day", Interval(1, Unit.DAY)),
        ("02 months", Interval(2, Unit.MONTH)),
    ],
)
def test_parse(text: str, interval: Interval) -> None:
    assert Interval.parse(text) == interval


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("0 days", "must be 1 or more"),
        ("-1 year", "must be 1 or more"),
        ("1.5 years", "not a whole number"),
        ("1_0 years", "not a whole number"),
        ("1 fortnight", "no unit 'fortnight'"),
        ("1 Monat", "no unit 'Monat'"),
        ("year", "not an interval"),
        ("7", "not an interval"),
        ("", "not an interval"),
        ("1 year 2 months", "not an interval"),
        ("١ year", "not an interval"),
        ("1001 years", "at most 1000 years"),
        ("9" * 5000 + " days", "at most"),
        (7, "it is a int"),
        (None, "it is a NoneType"),
        (timedelta(days=7), "it is a timedelta"),
    ],
)
def test_parse_refuses(text: object, reason: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        Interval.parse(text)
    message = str(caught.value)
    assert reason in message
    assert repr(text) in message
    assert '"3 months"' in message  # what is accepted


@pytest.mark.parametrize("count", [0, -3, True, 2.0, 1001])
def test_count_is_checked(count: int) -> None:
    with pytest.raises(ConfigurationError):
        Interval(count, Unit.YEAR)


@given(intervals)
def test_text_round_trip(interval: Interval) -> None:
    assert Interval.parse(str(interval)) == interval


def test_str() -> None:
    assert [str(Interval(n, Unit.MONTH)) for n in (1, 3)] == ["1 month", "3 months"]


@pytest.mark.parametrize(
    ("text", "start"),
    [
        ("1 year", utc(2026, 1, 1)),
        ("2 years", utc(2026, 1, 1)),
        ("5 years", utc(2025, 1, 1)),
        ("1 quarter", utc(2026, 10, 1)),
        ("5 months", utc(2026, 9, 1)),  # 2000-01 + 64 * 5 months
        ("1 month", utc(2026, 12, 1)),
        ("1 week", utc(2026, 12, 28)),
        ("2 weeks", utc(2026, 12, 28)),  # 2000-01-03 + 704 * 14 days
        ("1 day", utc(2026, 12, 31)),
        ("5 days", utc(2026, 12, 30)),  # 2000-01-01 + 1972 * 5 days
        ("6 hours", utc(2026, 12, 31, 18)),
        ("5 hours", utc(2026, 12, 31, 21)),
    ],
)
def test_start_of_is_anchored(text: str, start: datetime) -> None:
    assert Interval.parse(text).start_of(utc(2026, 12, 31, 23, 59, 59), UTC_ZONE) == start


def test_before_the_anchor() -> None:
    assert Interval.parse("3 years").start_of(utc(1999, 6, 1), UTC_ZONE) == utc(1997, 1, 1)
    assert Interval.parse("1 week").start_of(utc(2000, 1, 2), UTC_ZONE) == utc(1999, 12, 27)
    assert Interval.parse("6 hours").start_of(utc(1999, 12, 31, 23), UTC_ZONE) == utc(1999, 12, 31, 18)


@given(intervals, zones, moments)
@example(Interval(1, Unit.DAY), ZoneInfo("Pacific/Apia"), utc(2011, 12, 30, 9, 59, 59))
@example(Interval(1, Unit.DAY), ZoneInfo("America/St_Johns"), utc(2010, 11, 7, 2, 45))
@settings(deadline=None)
def test_a_moment_lies_in_its_period(interval: Interval, zone: ZoneInfo, moment: datetime) -> None:
    start = interval.start_of(moment, zone)
    end = interval.next(start, zone)
    assert start <= moment < end
    assert interval.next(moment, zone) == end
    # ... and so does every other moment of that period, whatever the moment of the run.
    assert interval.start_of(start, zone) == start
    assert interval.start_of(start + (end - start) / 2, zone) == start
    assert interval.start_of(end - timedelta.resolution, zone) == start
    assert interval.start_of(end, zone) == end


@given(intervals, zones, moments, st.integers(1, 30))
@settings(deadline=None, max_examples=60)
def test_periods_tile(interval: Interval, zone: ZoneInfo, moment: datetime, count: int) -> None:
    end = moment
    for _ in range(count):
        end = interval.next(end, zone)
    periods = list(interval.periods(moment, end, zone))
    assert periods[0][0] <= moment
    assert periods[-1][1] == end
    assert len(periods) == count
    assert all(a < b for a, b in periods)
    assert all(one[1] == two[0] for one, two in pairwise(periods))
    assert 0 <= interval.estimate(moment, end, zone) - count <= 1  # a day may have been skipped


@given(st.sampled_from([u for u in Unit if u is not Unit.HOUR]), zones, moments)
@settings(deadline=None)
def test_calendar_periods_begin_when_their_day_begins(unit: Unit, zone: ZoneInfo, moment: datetime) -> None:
    start = Interval(1, unit).start_of(moment, zone)
    day = start.astimezone(zone).date()
    # Clocks put back over midnight show the day before again; it is never shown for the first time.
    assert (start - timedelta(seconds=1)).astimezone(zone).date() < day
    if unit is Unit.WEEK:
        assert day.isoweekday() == 1 or zone.key.startswith("Pacific/")


def test_empty_span_has_no_periods() -> None:
    assert list(Interval.parse("1 day").periods(utc(2024, 1, 1), utc(2024, 1, 1), UTC_ZONE)) == []
    assert Interval.parse("1 day").estimate(utc(2024, 1, 2), utc(2024, 1, 1), UTC_ZONE) == 0


def test_days_of_23_and_25_hours() -> None:
    assert days("1 day", utc(2024, 3, 30, 12), utc(2024, 4, 1), BERLIN) == [
        ("2024-03-30 00:00", 24),
        ("2024-03-31 00:00", 23),
        ("2024-04-01 00:00", 24),
    ]
    assert [h for _, h in days("1 day", utc(2024, 10, 26), utc(2024, 10, 28), BERLIN)] == [24, 25, 24]


def test_midnight_that_does_not_exist() -> None:
    for name, when in (("America/Sao_Paulo", utc(2018, 11, 3, 12)), ("Asia/Beirut", utc(2024, 3, 30, 12))):
        zone = ZoneInfo(name)
        first, second = days("1 day", when, when + timedelta(days=1), zone)
        assert first[1] == 24
        assert second[0].endswith("01:00")
        assert second[1] == 23


def test_gap_that_midnight_lies_inside_of() -> None:
    # Toronto, 1919: clocks went from 23:30 to 00:30.
    zone = ZoneInfo("America/Toronto")
    assert Interval.parse("1 day").start_of(utc(1919, 3, 31, 12), zone) == utc(1919, 3, 31, 4, 30)


def test_midnight_that_comes_twice() -> None:
    havana = ZoneInfo("America/Havana")  # 2024-11-03 01:00 -> 00:00
    (day,) = days("1 day", utc(2024, 11, 3, 12), utc(2024, 11, 3, 13), havana)
    assert day == ("2024-11-03 00:00", 25)
    assert Interval.parse("1 day").start_of(utc(2024, 11, 3, 5, 30), havana) == utc(2024, 11, 3, 4)


def test_clocks_put_back_over_midnight() -> None:
    # St Johns, 2010-11-07 00:01 -> 23:01 the day before: Sunday begins with its first minute.
    zone = ZoneInfo("America/St_Johns")
    assert Interval.parse("1 day").start_of(utc(2010, 11, 7, 2, 45), zone) == utc(2010, 11, 7, 2, 30)
    assert Interval.parse("1 day").start_of(utc(2010, 11, 7, 2, 29), zone) == utc(2010, 11, 6, 2, 30)


def test_skipped_day_is_no_period() -> None:
    apia = ZoneInfo("Pacific/Apia")
    assert days("1 day", utc(2011, 12, 29, 12), utc(2011, 12, 31), apia) == [
        ("2011-12-29 00:00", 24),
        ("2011-12-31 00:00", 24),
    ]


def test_hours_are_elapsed_hours() -> None:
    assert {h for _, h in days("6 hours", utc(2024, 3, 30), utc(2024, 4, 2), BERLIN)} == {6}
    # Counted from local midnight of 2000-01-01, which was 23:00 UTC.
    assert Interval.parse("24 hours").start_of(utc(2024, 7, 1, 22, 30), BERLIN) == utc(2024, 6, 30, 23)


@pytest.mark.parametrize(
    ("text", "moment", "expected"),
    [
        ("1 month", date(2023, 3, 31), date(2023, 2, 28)),
        ("1 month", date(2024, 3, 31), date(2024, 2, 29)),
        ("1 year", date(2024, 2, 29), date(2023, 2, 28)),
        ("4 years", date(2024, 2, 29), date(2020, 2, 29)),
        ("1 quarter", date(2024, 5, 31), date(2024, 2, 29)),
        ("18 months", date(2024, 2, 29), date(2022, 8, 29)),
        ("1 month", date(2024, 1, 15), date(2023, 12, 15)),
        ("2 weeks", date(2024, 3, 7), date(2024, 2, 22)),
        ("48 hours", date(2024, 3, 1), date(2024, 2, 28)),
    ],
)
def test_subtract(text: str, moment: date, expected: date) -> None:
    at = timedelta(hours=13, minutes=7, seconds=5)
    found = Interval.parse(text).subtract(utc(*moment.timetuple()[:3]) + at, UTC_ZONE)
    assert found == utc(*expected.timetuple()[:3]) + at


def test_subtract_keeps_the_wall_clock() -> None:
    noon = datetime(2024, 3, 31, 12, tzinfo=BERLIN)
    assert Interval.parse("1 day").subtract(noon, BERLIN) == datetime(2024, 3, 30, 12, tzinfo=BERLIN)
    assert Interval.parse("24 hours").subtract(noon, BERLIN) == datetime(2024, 3, 30, 11, tzinfo=BERLIN)


def test_subtract_from_either_of_two_equal_hours() -> None:
    # 210 days before the hour that comes twice in Berlin is the one that was skipped.
    for fold in (0, 1):
        twice = datetime(2024, 10, 27, 2, 30, tzinfo=BERLIN, fold=fold)
        assert Interval.parse("210 days").subtract(twice, BERLIN) == utc(2024, 3, 31, 1, 30)


def test_add() -> None:
    assert Interval.parse("1 month").add(utc(2024, 1, 31), UTC_ZONE) == utc(2024, 2, 29)
    assert Interval.parse("7 days").add(utc(2024, 2, 25, 1), UTC_ZONE) == utc(2024, 3, 3, 1)


@given(intervals, zones, moments)
@settings(deadline=None)
def test_subtract_moves_back_and_add_forward(interval: Interval, zone: ZoneInfo, moment: datetime) -> None:
    # Within a zone's largest jump: a day, over the date line.
    slack = timedelta(hours=25)
    assert interval.subtract(moment, zone) < moment + slack
    assert interval.add(moment, zone) > moment - slack


def test_the_calendar_ends() -> None:
    year, two = Interval.parse("1 year"), Interval.parse("2 years")
    assert year.start_of(utc(9999, 7, 1), UTC_ZONE) == utc(9999, 1, 1)
    assert Interval.parse("1 day").start_of(utc(1, 1, 1), UTC_ZONE) == utc(1, 1, 1)
    for impossible in (
        lambda: year.next(utc(9999, 7, 1), UTC_ZONE),
        lambda: list(year.periods(utc(9998, 1, 1), utc(9999, 2, 1), UTC_ZONE)),
        lambda: two.start_of(utc(1, 7, 1), UTC_ZONE),
        lambda: year.subtract(utc(1, 7, 1), UTC_ZONE),
        lambda: year.add(utc(9999, 7, 1), UTC_ZONE),
        lambda: Interval.parse("1000 hours").add(utc(9999, 12, 30), UTC_ZONE),
        lambda: Interval.parse("1000 hours").next(utc(9999, 12, 30), UTC_ZONE),
        lambda: year.start_of(utc(9999, 12, 31, 23), ZoneInfo("Pacific/Apia")),
        lambda: year.start_of(utc(1, 1, 1), ZoneInfo("America/Havana")),
    ):
        with pytest.raises(PlanError, match="years 1 to 9999"):
            impossible()


def test_naive_moments_are_refused() -> None:
    naive = datetime(2024, 1, 1)  # noqa: DTZ001
    for text in ("1 day", "1 hour"):
        with pytest.raises(ValueError, match="no time zone"):
            Interval.parse(text).start_of(naive, UTC_ZONE)
        with pytest.raises(ValueError, match="no time zone"):
            Interval.parse(text).subtract(naive, UTC_ZONE)
