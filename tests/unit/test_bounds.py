"""Bounds: PostgreSQL's text to values and back."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st
from psycopg import sql

from django_scaledb.exceptions import PlanError
from django_scaledb.partitions.bounds import (
    MAXVALUE,
    MINVALUE,
    Bound,
    Range,
    label,
    literal,
    merge,
    parse,
    show,
    sort_key,
)
from django_scaledb.partitions.config import KeyKind
from django_scaledb.partitions.intervals import Interval

FIRST = datetime.min.replace(tzinfo=UTC)
LAST = datetime.max.replace(tzinfo=UTC)


def utc(*parts: int) -> datetime:
    return datetime(*parts, tzinfo=UTC)


def years(lower: int, upper: int) -> Range:
    return Range(utc(lower, 1, 1), utc(upper, 1, 1))


def text(query: sql.Composable) -> str:
    return query.as_string(None)


def bounds_of(kind: KeyKind) -> st.SearchStrategy[Bound]:
    """Whatever the planner may hand out for a key of this kind."""
    first = utc(1970, 1, 1) if kind is KeyKind.UUID7 else FIRST
    moments = st.datetimes(first.replace(tzinfo=None)).map(lambda d: d.replace(tzinfo=UTC))
    if kind is KeyKind.DATE:
        moments = moments.map(lambda d: d.replace(hour=0, minute=0, second=0, microsecond=0))
    if kind is KeyKind.UUID7:
        moments = moments.map(lambda d: d.replace(microsecond=d.microsecond // 1000 * 1000))
    return st.one_of(st.just(MINVALUE), st.just(MAXVALUE), moments)


ranges = (
    st.tuples(bounds_of(KeyKind.TIMESTAMP), bounds_of(KeyKind.TIMESTAMP))
    .map(lambda pair: sorted(pair, key=sort_key))
    .filter(lambda pair: pair[0] < pair[1])
    .map(lambda pair: Range(*pair))
)


def test_sentinels_enclose_every_datetime() -> None:
    for moment in (FIRST, utc(2024, 1, 1), LAST):
        assert MINVALUE < moment < MAXVALUE
        assert MAXVALUE > moment > MINVALUE
        assert MINVALUE <= moment <= MAXVALUE
        assert not moment < MINVALUE
        assert not moment >= MAXVALUE
        assert moment != MAXVALUE
    assert MINVALUE < MAXVALUE
    assert MINVALUE <= MINVALUE
    assert not MINVALUE < MINVALUE
    assert not MAXVALUE > MAXVALUE
    assert sorted([MAXVALUE, LAST, MINVALUE, FIRST], key=sort_key) == [MINVALUE, FIRST, LAST, MAXVALUE]


@pytest.mark.parametrize(
    ("lower", "upper"),
    [
        (utc(2024, 1, 1), utc(2024, 1, 1)),
        (utc(2025, 1, 1), utc(2024, 1, 1)),
        (MAXVALUE, utc(2024, 1, 1)),
        (utc(2024, 1, 1), MINVALUE),
        (MINVALUE, MINVALUE),
        (MAXVALUE, MINVALUE),
    ],
)
def test_empty_and_inverted_ranges_are_refused(lower: Bound, upper: Bound) -> None:
    with pytest.raises(ValueError, match="must end after it begins"):
        Range(lower, upper)


def test_ranges_are_kept_in_utc() -> None:
    plus_two = timezone(timedelta(hours=2))
    found = Range(datetime(2024, 1, 1, 2, tzinfo=plus_two), utc(2025, 1, 1))
    assert str(found) == "2024-01-01..2025-01-01"
    assert found == years(2024, 2025)
    with pytest.raises(ValueError, match="no time zone"):
        Range(datetime(2024, 1, 1), MAXVALUE)  # noqa: DTZ001


def test_overlap_is_half_open() -> None:
    assert years(2020, 2022).overlaps(years(2021, 2023))
    assert not years(2020, 2022).overlaps(years(2022, 2023))
    assert Range(MINVALUE, MAXVALUE).overlaps(years(2020, 2021))
    assert years(2020, 2022).contains(utc(2020, 1, 1))
    assert not years(2020, 2022).contains(utc(2022, 1, 1))
    assert Range(MINVALUE, MAXVALUE).covers(years(1, 9999))
    assert not years(2020, 2022).covers(years(2021, 2023))
    assert years(2020, 2022).intersection(years(2021, 2023)) == years(2021, 2022)
    assert years(2020, 2022).intersection(years(2022, 2023)) is None


def test_subtract() -> None:
    assert years(2020, 2030).subtract([]) == [years(2020, 2030)]
    assert years(2020, 2030).subtract([years(2025, 2026), years(2010, 2021)]) == [
        years(2021, 2025),
        years(2026, 2030),
    ]
    assert years(2020, 2030).subtract([Range(MINVALUE, utc(2025, 1, 1))]) == [years(2025, 2030)]
    assert years(2020, 2030).subtract([Range(utc(2025, 1, 1), MAXVALUE), years(2040, 2041)]) == [
        years(2020, 2025)
    ]
    assert years(2020, 2030).subtract([years(2000, 2001), years(2040, 2041)]) == [years(2020, 2030)]
    assert years(2020, 2030).subtract([Range(MINVALUE, MAXVALUE)]) == []


@given(ranges, st.lists(ranges, max_size=6), st.datetimes())
def test_subtract_leaves_what_the_others_do_not_have(
    whole: Range, others: list[Range], naive: datetime
) -> None:
    free = whole.subtract(others)
    assert merge(free) == free
    for moment in [naive.replace(tzinfo=UTC), *(b for r in others for b in (r.lower, r.upper))]:
        if isinstance(moment, datetime):
            wanted = whole.contains(moment) and not any(r.contains(moment) for r in others)
            assert any(r.contains(moment) for r in free) is wanted


def test_merge() -> None:
    assert merge([years(2022, 2023), years(2020, 2021), years(2021, 2022), years(2030, 2031)]) == [
        years(2020, 2023),
        years(2030, 2031),
    ]
    assert merge([Range(MINVALUE, MAXVALUE), years(2020, 2021)]) == [Range(MINVALUE, MAXVALUE)]


def test_literals() -> None:
    assert text(literal(utc(2024, 1, 1), KeyKind.TIMESTAMP)) == "'2024-01-01 00:00:00+00'"
    assert (
        text(literal(utc(24, 1, 1, 1, 2, 3, 500000), KeyKind.TIMESTAMP)) == "'0024-01-01 01:02:03.500000+00'"
    )
    assert text(literal(utc(2024, 1, 1), KeyKind.DATE)) == "'2024-01-01'"
    assert text(literal(utc(2024, 1, 1), KeyKind.UUID7)) == "'018cc251-f400-0000-0000-000000000000'"
    assert text(literal(MINVALUE, KeyKind.UUID7)) == "MINVALUE"
    assert text(literal(MAXVALUE, KeyKind.DATE)) == "MAXVALUE"
    berlin = datetime(2024, 1, 1, tzinfo=ZoneInfo("Europe/Berlin"))
    assert text(literal(berlin, KeyKind.TIMESTAMP)) == "'2023-12-31 23:00:00+00'"


def test_literals_are_never_rounded() -> None:
    with pytest.raises(ValueError, match="whole days"):
        literal(utc(2024, 1, 1, 1), KeyKind.DATE)
    with pytest.raises(ValueError, match="whole millisecond"):
        literal(utc(2024, 1, 1, 0, 0, 0, 1), KeyKind.UUID7)
    with pytest.raises(PlanError, match="before 1970"):
        literal(utc(1969, 12, 31), KeyKind.UUID7)


@pytest.mark.parametrize("kind", KeyKind)
@given(data=st.data())
def test_literal_round_trip(kind: KeyKind, data: st.DataObject) -> None:
    lower, upper = data.draw(
        st.tuples(bounds_of(kind), bounds_of(kind))
        .map(lambda pair: sorted(pair, key=sort_key))
        .filter(lambda pair: pair[0] < pair[1])
    )
    range_ = Range(lower, upper)
    assert parse(text(range_.for_values(kind)), kind) == range_


@pytest.mark.parametrize(
    ("kind", "lower", "upper", "expected"),
    [
        (KeyKind.TIMESTAMP, "'2024-01-01 00:00:00+00'", "'2025-01-01 00:00:00+00'", years(2024, 2025)),
        (KeyKind.TIMESTAMP, "MINVALUE", "MAXVALUE", Range(MINVALUE, MAXVALUE)),
        (
            KeyKind.TIMESTAMP,
            "'2024-01-01 00:00:00.25+00'",
            "'2025-01-01 00:00:00+00'",
            Range(utc(2024, 1, 1, 0, 0, 0, 250000), utc(2025, 1, 1)),
        ),
        # Another TimeZone; a historical offset with seconds.
        (KeyKind.TIMESTAMP, "'2024-01-01 05:30:00+05:30'", "'2024-12-31 14:00:00-10'", years(2024, 2025)),
        (
            KeyKind.TIMESTAMP,
            "'1890-01-01 00:53:28+00:53:28'",
            "'1891-01-01 00:00:00+00'",
            years(1890, 1891),
        ),
        # Beyond the datetimes, on either side.
        (KeyKind.TIMESTAMP, "'-infinity'", "'infinity'", Range(MINVALUE, MAXVALUE)),
        (
            KeyKind.TIMESTAMP,
            "'0044-03-15 12:00:00.5+00 BC'",
            "'12000-01-01 00:00:00+00'",
            Range(MINVALUE, MAXVALUE),
        ),
        (KeyKind.TIMESTAMP, "'infinity'", "MAXVALUE", Range(LAST, MAXVALUE)),
        (KeyKind.TIMESTAMP, "'12000-01-01 00:00:00+00'", "'13000-01-01 00:00:00+00'", Range(LAST, MAXVALUE)),
        (
            KeyKind.TIMESTAMP,
            "'4713-01-01 00:00:00+00 BC'",
            "'0001-12-31 00:00:00+00 BC'",
            Range(MINVALUE, FIRST),
        ),
        (
            KeyKind.TIMESTAMP,
            "'0001-01-01 00:00:00+14'",
            "'9999-12-31 23:00:00-10'",
            Range(MINVALUE, MAXVALUE),
        ),
        (KeyKind.DATE, "'2024-01-01'", "'2025-01-01'", years(2024, 2025)),
        (KeyKind.DATE, "'0044-03-15 BC'", "'2025-01-01'", Range(MINVALUE, utc(2025, 1, 1))),
        (KeyKind.DATE, "'2024-01-01'", "'10000-01-01'", Range(utc(2024, 1, 1), MAXVALUE)),
        (KeyKind.DATE, "'2024-01-01'", "'infinity'", Range(utc(2024, 1, 1), MAXVALUE)),
        (
            KeyKind.UUID7,
            "'018cc251-f400-0000-0000-000000000000'",
            "'01941f29-7c00-0000-0000-000000000000'",
            years(2024, 2025),
        ),
        # Inside a millisecond: outward.
        (
            KeyKind.UUID7,
            "'018cc251-f400-7000-8000-000000000000'",
            "'01941f29-7c00-7000-8000-000000000000'",
            Range(utc(2024, 1, 1), utc(2025, 1, 1, 0, 0, 0, 1000)),
        ),
        (
            KeyKind.UUID7,
            "'00000000-0000-0000-0000-000000000000'",
            "'ffffffff-ffff-ffff-ffff-ffffffffffff'",
            Range(utc(1970, 1, 1), MAXVALUE),
        ),
    ],
)
def test_parse(kind: KeyKind, lower: str, upper: str, expected: Range) -> None:
    assert parse(f"FOR VALUES FROM ({lower}) TO ({upper})", kind) == expected


def test_parse_default() -> None:
    assert parse("DEFAULT", KeyKind.TIMESTAMP) is None


@pytest.mark.parametrize(
    "expr",
    [
        "FOR VALUES IN ('2024-01-01 00:00:00+00')",
        "FOR VALUES WITH (modulus 4, remainder 0)",
        "FOR VALUES FROM ('2024-01-01 00:00:00+00', 1) TO ('2025-01-01 00:00:00+00', 1)",
        "FOR VALUES FROM ('a') TO ('b')",
        "FOR VALUES FROM (1) TO (10)",
        "FOR VALUES FROM ('1') TO ('10')",
        "FOR VALUES FROM ('2024-01-01 00:00:00') TO ('2025-01-01 00:00:00')",  # timestamp without time zone
        "FOR VALUES FROM ('2024-01-01') TO ('2025-01-01')",
        "FOR VALUES FROM ('2024-13-01 00:00:00+00') TO (MAXVALUE)",
        "",
    ],
)
def test_parse_refuses_what_is_not_one_time_range(expr: str) -> None:
    with pytest.raises(ValueError, match="not a range partition by one timestamptz column"):
        parse(expr, KeyKind.TIMESTAMP)
    if expr != "FOR VALUES FROM ('2024-01-01') TO ('2025-01-01')":
        with pytest.raises(ValueError, match="not a range partition by one date column"):
            parse(expr, KeyKind.DATE)
    with pytest.raises(ValueError, match="not a range partition by one uuid column"):
        parse(expr, KeyKind.UUID7)


def test_check_expression() -> None:
    assert text(years(2024, 2025).check('odd"Key', KeyKind.TIMESTAMP)) == (
        '"odd""Key" IS NOT NULL AND "odd""Key" >= \'2024-01-01 00:00:00+00\'::timestamptz '
        'AND "odd""Key" < \'2025-01-01 00:00:00+00\'::timestamptz'
    )
    assert text(Range(MINVALUE, utc(2025, 1, 1)).check("day", KeyKind.DATE)) == (
        '"day" IS NOT NULL AND "day" < \'2025-01-01\'::date'
    )
    assert text(Range(utc(2024, 1, 1), MAXVALUE).check("id", KeyKind.UUID7)) == (
        '"id" IS NOT NULL AND "id" >= \'018cc251-f400-0000-0000-000000000000\'::uuid'
    )
    assert text(Range(MINVALUE, MAXVALUE).check("id", KeyKind.UUID7)) == '"id" IS NOT NULL'


def test_show() -> None:
    assert show(utc(2024, 1, 1)) == "2024-01-01"
    assert show(utc(2024, 1, 1, 10, 30)) == "2024-01-01 10:30:00+00"
    assert show(MAXVALUE) == "MAXVALUE"


@pytest.mark.parametrize(
    ("interval", "moment", "expected"),
    [
        ("1 year", utc(2024, 1, 1), "y2024"),
        ("2 years", utc(2024, 1, 1), "y2024"),
        ("1 quarter", utc(2024, 7, 1), "y2024q3"),
        ("1 month", utc(2024, 5, 1), "y2024m05"),
        ("3 months", utc(2024, 7, 1), "y2024m07"),
        ("1 week", utc(2024, 2, 12), "y2024w07"),
        ("1 week", utc(2024, 12, 30), "y2025w01"),
        ("1 day", utc(2024, 5, 7), "y2024m05d07"),
        ("1 hour", utc(2024, 5, 7, 13), "y2024m05d07h13"),
        ("6 hours", utc(2024, 5, 7), "y2024m05d07h00"),
        # Fragments: as many digits as they need.
        ("2 years", utc(2025, 1, 1), "y2025"),
        ("1 year", utc(2024, 7, 1), "y2024m07"),
        ("1 year", utc(2024, 7, 14), "y2024m07d14"),
        ("1 week", utc(2024, 2, 14), "y2024m02d14"),
        ("1 year", utc(2024, 7, 14, 5), "y2024m07d14h05"),
        ("1 year", utc(2024, 7, 14, 5, 30), "y2024m07d14h0530"),
        ("1 hour", utc(2024, 7, 14, 5, 0, 1), "y2024m07d14h050001"),
        ("1 hour", utc(2024, 7, 14, 5, 0, 0, 1), "y2024m07d14h050000_000001"),
        ("1 year", utc(24, 1, 1), "y0024"),
    ],
)
def test_label(interval: str, moment: datetime, expected: str) -> None:
    assert label(moment, Interval.parse(interval), ZoneInfo("UTC")) == expected


def test_label_of_the_open_ends() -> None:
    year = Interval.parse("1 year")
    assert label(MINVALUE, year, ZoneInfo("UTC")) == "start"
    assert label(LAST, year, ZoneInfo("UTC")).startswith("y9999")


def test_labels_are_in_the_zone() -> None:
    berlin, beirut = ZoneInfo("Europe/Berlin"), ZoneInfo("Asia/Beirut")
    assert label(utc(2023, 12, 31, 23), Interval.parse("1 year"), berlin) == "y2024"
    # A day without a midnight is a day nevertheless.
    assert label(utc(2024, 3, 30, 22), Interval.parse("1 day"), beirut) == "y2024m03d31"


@pytest.mark.parametrize("zone", ["Europe/Berlin", "Australia/Lord_Howe", "America/Havana"])
def test_labels_of_hours_differ_when_clocks_change(zone: str) -> None:
    hour = Interval.parse("1 hour")
    periods = list(hour.periods(utc(2024, 1, 1), utc(2025, 1, 1), ZoneInfo(zone)))
    assert len({label(start, hour, ZoneInfo(zone)) for start, _ in periods}) == len(periods)
