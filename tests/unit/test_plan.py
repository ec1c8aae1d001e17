"""Plans: what is created, retired and dropped, in which order, and that they come to an end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from django_scaledb.exceptions import ConfigurationError, PlanError
from django_scaledb.partitions.bounds import MAXVALUE, MINVALUE, Bound, Range, merge, parse
from django_scaledb.partitions.config import (
    KeyKind,
    PartitionConfig,
    RetentionAction,
    make_config,
    problems,
)
from django_scaledb.partitions.intervals import Interval
from django_scaledb.partitions.plan import (
    MAX_CREATES,
    Archive,
    Create,
    CreateDefault,
    Detach,
    Drop,
    Finalize,
    Partition,
    Plan,
    Settle,
    State,
    missing,
    plan,
    plan_span,
    runway,
)
from django_scaledb.postgres.identifiers import TableName

NOW = datetime(2026, 5, 17, 13, 7, 5, tzinfo=UTC)


def utc(*parts: int) -> datetime:
    return datetime(*parts, tzinfo=UTC)


def day(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


def span(lower: str, upper: str) -> Range:
    return Range(day(lower), day(upper))


def config_of(key_kind: KeyKind = KeyKind.TIMESTAMP, **attrs: object) -> PartitionConfig:
    return make_config("pypi.Upload", "uploaded_at", key_kind, attrs)


def part(lower: Bound | str, upper: Bound | str, **attributes: Any) -> Partition:
    lower = day(lower) if isinstance(lower, str) else lower
    upper = day(upper) if isinstance(upper, str) else upper
    values = {"state": State.ATTACHED, "managed": True, **attributes}
    return Partition(TableName("public", f"p_{lower}_{upper}"), Range(lower, upper), **values)


def year(number: int, **attributes: Any) -> Partition:
    return part(utc(number, 1, 1), utc(number + 1, 1, 1), **attributes)


DEFAULT = Partition(TableName("public", "p_default"), None, State.ATTACHED, managed=True)


def created(plan_: Plan) -> list[str]:
    return [str(action.range) for action in plan_.actions if isinstance(action, Create)]


def kinds(plan_: Plan) -> list[str]:
    return [type(action).__name__ for action in plan_.actions]


def after(partitions: Sequence[Partition], plan_: Plan, now: datetime) -> list[Partition]:
    """The set once the plan is applied, refusing what PostgreSQL would refuse."""
    result = list(partitions)

    def change(partition: Partition, **attributes: Any) -> None:
        result[result.index(partition)] = replace(partition, **attributes)

    for action in plan_.actions:
        match action:
            case Create(range_):
                for p in result:
                    if p.range is not None and p.state is not State.DETACHED:
                        assert not p.range.overlaps(range_), f"{range_} overlaps {p}"
                name = TableName("public", f"made_{range_}_{len(result)}")
                result.append(Partition(name, range_, State.ATTACHED, managed=True))
            case CreateDefault():
                assert not any(p.is_default and p.state is State.ATTACHED for p in result)
                result.append(DEFAULT)
            case Finalize(p):
                assert p.state is State.DETACH_PENDING
                change(p, state=State.DETACHED)
            case Detach(p):
                assert p.state is State.ATTACHED
                change(p, state=State.DETACHED, retiring=True, detached_at=now)
            case Settle(p):
                finalized = replace(p, state=State.DETACHED)
                assert finalized in result
                assert p.detached_at is None
                change(finalized, detached_at=now)
            case Archive(p):
                # By then it was detached, or settled. (Here several may have one name.)
                found = next(o for o in result if o.table == p.table and _lacks_archive(o))
                change(found, archived_at=now)
            case Drop(p):
                assert p.state is State.DETACHED
                result.remove(p)
    return result


def _lacks_archive(partition: Partition) -> bool:
    detached = partition.state is State.DETACHED and partition.detached_at is not None
    return detached and partition.archived_at is None


def coverage(partitions: Sequence[Partition]) -> list[Range]:
    return merge(p.range for p in partitions if p.range is not None and p.state is State.ATTACHED)


# --- creation


def test_empty_set_gets_the_current_period_and_the_premade_ones() -> None:
    assert created(plan(config_of(), [], NOW)) == [
        "2026-01-01..2027-01-01",
        "2027-01-01..2028-01-01",
        "2028-01-01..2029-01-01",
    ]
    assert created(plan(config_of(interval="3 months", premake=0), [], NOW)) == ["2026-04-01..2026-07-01"]


def test_the_hour_of_the_run_does_not_matter() -> None:
    config = config_of(interval="1 month")
    expected = created(plan(config, [], utc(2026, 12, 1)))
    assert expected == ["2026-12-01..2027-01-01", "2027-01-01..2027-02-01", "2027-02-01..2027-03-01"]
    assert created(plan(config, [], utc(2026, 12, 31, 23, 59, 59))) == expected


def test_nothing_to_do() -> None:
    found = plan(config_of(), [year(2026), year(2027), year(2028)], NOW)
    assert not found
    assert found.actions == ()


def test_holes_inside_the_set_are_filled() -> None:
    partitions = [year(n) for n in (2020, 2022, 2026, 2027, 2028, 2031)]
    assert created(plan(config_of(), partitions, NOW)) == [
        f"{n}-01-01..{n + 1}-01-01" for n in (2021, 2023, 2024, 2025, 2029, 2030)
    ]


def test_a_run_years_later_fills_up_to_now() -> None:
    assert created(plan(config_of(premake=0), [year(2023)], NOW)) == [
        f"{n}-01-01..{n + 1}-01-01" for n in (2024, 2025, 2026)
    ]


def test_a_set_in_the_future_is_joined_to_now() -> None:
    assert created(plan(config_of(premake=0), [year(2028)], NOW)) == [
        "2026-01-01..2027-01-01",
        "2027-01-01..2028-01-01",
    ]


def test_holes_beyond_retention_stay_open() -> None:
    config = config_of(premake=0, retention="2 years")  # 2024-05-17 and later
    partitions = [year(2015, managed=False), year(2026)]
    assert created(plan(config, partitions, NOW)) == ["2024-01-01..2025-01-01", "2025-01-01..2026-01-01"]


def test_a_hole_that_ends_where_retention_begins_stays_open() -> None:
    config = config_of(premake=0, retention="2 years")
    partitions = [year(2022, managed=False), year(2024), year(2025), year(2026)]
    assert not plan(config, partitions, utc(2026, 1, 1))


def test_a_fragment_beyond_retention_stays_open() -> None:
    # The period 2024 is within retention, but what of it is free is not: made now, it would be
    # retired by the next run, and made again.
    config = config_of(premake=0, retention="2 years")
    partitions = [year(2023, managed=False), part("2024-04-01", "2025-01-01"), year(2025), year(2026)]
    assert created(plan(config, partitions, NOW)) == []


def test_only_the_free_fragments_of_a_period_are_created() -> None:
    partitions = [part("2026-03-01", "2026-04-01", managed=False), part("2027-06-01", "2028-01-01")]
    found = plan(config_of(premake=1), partitions, NOW)
    assert created(found) == [
        "2026-01-01..2026-03-01",
        "2026-04-01..2027-01-01",
        "2027-01-01..2027-06-01",
    ]
    assert coverage(after(partitions, found, NOW)) == [span("2026-01-01", "2028-01-01")]


def test_interval_change_to_larger_and_to_smaller() -> None:
    months = [part("2026-05-01", "2026-06-01"), part("2026-06-01", "2026-07-01")]
    assert created(plan(config_of(premake=1), months, NOW)) == [
        "2026-01-01..2026-05-01",
        "2026-07-01..2027-01-01",
        "2027-01-01..2028-01-01",
    ]
    monthly = config_of(interval="1 month")
    assert created(plan(monthly, [year(2026)], NOW)) == []
    assert created(plan(monthly, [year(2026)], utc(2026, 11, 30))) == ["2027-01-01..2027-02-01"]


def test_open_ends_cover() -> None:
    assert not plan(config_of(), [part(MINVALUE, MAXVALUE)], NOW)
    assert not plan(config_of(), [part("2020-01-01", MAXVALUE)], NOW)
    partitions = [part(MINVALUE, "2025-01-01"), part("2027-01-01", MAXVALUE)]
    assert created(plan(config_of(), partitions, NOW)) == ["2025-01-01..2026-01-01", "2026-01-01..2027-01-01"]


def test_a_catch_all_for_forever_dates_does_not_stop_the_run() -> None:
    forever = part("9999-01-01", MAXVALUE, managed=False)
    for interval in ("1 hour", "1 day", "1 year", "2 years"):
        config = config_of(interval=interval, premake=1)
        found = plan(config, [forever], NOW)
        assert len(created(found)) == 2
        assert not plan(config, after([forever], found, NOW), NOW)
        assert not missing(config, after([forever], found, NOW), NOW)


def test_detached_partitions_do_not_cover() -> None:
    partitions = [year(2026, state=State.DETACHED, managed=True), year(2025), year(2027)]
    assert created(plan(config_of(premake=1), partitions, NOW)) == ["2026-01-01..2027-01-01"]


def test_default_partition_only_when_asked_for() -> None:
    assert "CreateDefault" not in kinds(plan(config_of(), [], NOW))
    wanted = config_of(default_partition=True)
    assert kinds(plan(wanted, [], NOW)) == ["Create"] * 3 + ["CreateDefault"]
    assert kinds(plan(wanted, [DEFAULT], NOW)) == ["Create"] * 3
    assert (
        kinds(plan(wanted, [replace(DEFAULT, state=State.DETACHED)], NOW, retire=False))[-1]
        == "CreateDefault"
    )
    assert kinds(plan(wanted, [], NOW, create=False)) == []


def test_no_create() -> None:
    assert not plan(config_of(), [year(2020)], NOW, create=False)


def test_periods_are_in_the_zone() -> None:
    config = config_of(time_zone="Europe/Berlin", premake=0, interval="1 month")
    found = plan(config, [], utc(2026, 5, 31, 22, 30))
    assert [a.range for a in found.actions if isinstance(a, Create)] == [
        Range(utc(2026, 5, 31, 22), utc(2026, 6, 30, 22))
    ]


def test_date_keys_have_calendar_dates_and_the_zones_today() -> None:
    config = config_of(KeyKind.DATE, time_zone="Pacific/Auckland", premake=0, interval="1 day")
    assert created(plan(config, [], utc(2026, 5, 31, 13))) == ["2026-06-01..2026-06-02"]
    retained = replace(config, retention=Interval.parse("1 day"))
    days = [
        part("2026-05-30", "2026-05-31"),
        part("2026-05-31", "2026-06-01"),
        part("2026-06-01", "2026-06-02"),
    ]
    (retired,) = plan(retained, days, utc(2026, 5, 31, 13)).actions
    assert retired == Detach(days[0])


def test_uuid_keys_do_not_begin_before_1970() -> None:
    config = config_of(KeyKind.UUID7)
    assert created(plan_span(config, [], day("1970-01-01"), day("1970-06-01"))) == ["1970-01-01..1971-01-01"]
    with pytest.raises(PlanError, match="before 1970"):
        plan_span(config, [], day("1969-06-01"), day("1970-06-01"))
    with pytest.raises(PlanError, match="before 1970"):
        plan(config, [], utc(1969, 1, 1))


def test_uuid_bounds_inside_a_millisecond_never_collide() -> None:
    expr = (
        "FOR VALUES FROM ('019b76da-a800-7000-8000-000000000000') "
        "TO ('019b76da-a800-7fff-8000-000000000000')"  # 2026-01-01 00:00:00.000
    )
    handmade = Partition(TableName("public", "h"), parse(expr, KeyKind.UUID7), State.ATTACHED, managed=False)
    found = plan(config_of(KeyKind.UUID7, premake=0), [handmade], NOW)
    assert created(found) == ["2026-01-01 00:00:00.001000+00..2027-01-01"]


def test_too_many_partitions() -> None:
    config = config_of(interval="1 day")
    with pytest.raises(PlanError) as caught:
        plan(config, [part("1990-01-01", "1990-01-02")], NOW)
    message = str(caught.value)
    # 1990-01-02 to 2026-05-19 inclusive
    assert "pypi.Upload: 13287 partitions of 1 day are missing" in message
    assert "PartitioningMeta.interval" in message
    assert "manage.py create_partitions pypi.Upload --from" in message
    with pytest.raises(PlanError, match="17531640 partitions"):
        plan_span(config_of(interval="1 hour"), [], day("0001-01-01"), day("2001-01-01"))
    hours = timedelta(hours=1) * MAX_CREATES
    assert (
        len(plan_span(config_of(interval="1 hour"), [], NOW, utc(2026, 5, 17, 13) + hours).actions)
        == MAX_CREATES
    )
    with pytest.raises(PlanError):
        plan_span(config_of(interval="1 hour"), [], NOW, NOW + hours)


def test_the_calendar_ends() -> None:
    with pytest.raises(PlanError, match="years 1 to 9999"):
        plan(config_of(), [], utc(9998, 1, 1))
    with pytest.raises(PlanError, match="years 1 to 9999"):
        plan_span(config_of(), [], utc(9998, 1, 1), utc(9999, 12, 31))
    with pytest.raises(PlanError, match="years 1 to 9999"):
        plan(config_of(KeyKind.DATE, time_zone="Pacific/Auckland"), [], utc(9999, 12, 31, 23))


def test_naive_now_is_refused() -> None:
    with pytest.raises(ValueError, match="no time zone"):
        plan(config_of(), [], datetime(2026, 1, 1))  # noqa: DTZ001


# --- retention


def test_retention_compares_the_end() -> None:
    config = config_of(retention="1 year", interval="1 month", premake=0)
    partitions = [part(f"2025-0{n}-01", f"2025-0{n + 1}-01") for n in range(3, 7)] + [
        part("2026-05-01", MAXVALUE)
    ]

    def retired(now: datetime) -> list[Partition]:
        return [
            a.partition for a in plan(config, partitions, now, create=False).actions if isinstance(a, Detach)
        ]

    assert retired(utc(2026, 4, 30, 23, 59, 59)) == partitions[:1]
    assert retired(utc(2026, 5, 1)) == partitions[:2]
    assert retired(utc(2026, 5, 31, 23, 59, 59)) == partitions[:2]
    assert retired(utc(2026, 6, 1)) == partitions[:3]


def test_retention_is_calendar_exact() -> None:
    partitions = [
        part("2024-02-28", "2024-02-29"),
        part("2024-02-29", "2024-03-01"),
        part("2024-03-01", MAXVALUE),
    ]
    config = config_of(retention="1 month")
    # 2024-03-31 minus a month is 2024-02-29.
    assert plan(config, partitions, utc(2024, 3, 31), create=False).actions == (Detach(partitions[0]),)


def test_retired_oldest_first_and_after_creation() -> None:
    config = config_of(retention="2 years", premake=0)
    partitions = [year(2021), year(2019), year(2020), year(2025), year(2023)]
    assert plan(config, partitions, NOW).actions == (
        Create(span("2024-01-01", "2025-01-01")),
        Create(span("2026-01-01", "2027-01-01")),
        Detach(partitions[1]),
        Detach(partitions[2]),
        Detach(partitions[0]),
        Detach(partitions[4]),
    )


def test_no_retention_retires_nothing() -> None:
    assert not plan(config_of(premake=0), [part("1990-01-01", "2027-01-01"), year(1980)], NOW, create=False)
    config = config_of(retention="1 year", premake=0)
    assert not plan(config, [year(2001), year(2026)], NOW, create=False, retire=False)


def test_unmanaged_default_and_open_ended_partitions_stay() -> None:
    config = config_of(retention="1 year", premake=0)
    partitions = [year(2001, managed=False), DEFAULT, part("2002-01-01", MAXVALUE)]
    assert not plan(config, partitions, NOW)
    assert not plan(config, [replace(partitions[0], retiring=True), *partitions[1:]], NOW)


def test_a_first_partition_from_minvalue_is_retired_by_its_end() -> None:
    config = config_of(retention="1 year", premake=0)
    partitions = [part(MINVALUE, "2025-01-01"), part("2025-01-01", "2027-01-01")]
    assert plan(config, partitions, NOW).actions == (Detach(partitions[0]),)


def test_the_last_partition_stays() -> None:
    config = config_of(retention="1 year")
    old = [year(2001), year(2002, retiring=True)]
    assert plan(config, old, NOW, create=False).actions == (Detach(old[0]),)
    assert not plan(config, [old[1], DEFAULT], NOW, create=False)
    assert not plan(config, [old[1], year(2030, state=State.DETACHED)], NOW, create=False)
    # It is not the last one any more once the same run has made newer ones.
    assert kinds(plan(config, old, NOW))[-2:] == ["Detach", "Detach"]


def test_retirement_that_had_begun_goes_on_only_while_it_is_due() -> None:
    begun = year(2023, retiring=True)
    partitions = [begun, part("2024-01-01", MAXVALUE)]
    assert plan(config_of(retention="1 year"), partitions, NOW).actions == (Detach(begun),)
    assert not plan(config_of(retention="10 years"), partitions, NOW)
    assert not plan(config_of(), partitions, NOW)


def test_interrupted_detach_of_ours_is_finished_and_settled() -> None:
    pending = year(2023, state=State.DETACH_PENDING, retiring=True)
    partitions = [pending, year(2024), part("2025-01-01", MAXVALUE)]
    config = config_of(retention="2 years")
    assert plan(config, partitions, NOW).actions == (Finalize(pending), Settle(pending))
    assert plan(config, partitions, NOW, retire=False).actions == (Finalize(pending), Settle(pending))
    assert plan(config, partitions, NOW, create=False).actions == (Finalize(pending), Settle(pending))
    assert not plan(config, partitions, NOW, create=False, retire=False)


def test_interrupted_detach_of_somebody_else_is_finished_and_its_range_refilled() -> None:
    pending = year(2025, state=State.DETACH_PENDING)
    found = plan(config_of(premake=0, default_partition=True), [year(2024), pending, year(2027)], NOW)
    assert found.actions == (
        Create(span("2026-01-01", "2027-01-01")),
        CreateDefault(),
        Finalize(pending),
        Create(span("2025-01-01", "2026-01-01")),
    )


def test_interrupted_detach_outside_the_set_is_not_refilled() -> None:
    pending = year(2020, state=State.DETACH_PENDING)
    assert plan(config_of(premake=0), [pending, year(2026)], NOW).actions == (Finalize(pending),)


def test_order_of_everything() -> None:
    config = config_of(retention="3 years", retention_action="drop", premake=0, default_partition=True)
    old, settled = year(2021), year(2019, state=State.DETACHED, retiring=True, detached_at=utc(2026, 1, 1))
    left = year(2020, state=State.DETACHED, retiring=True)
    ours = year(2022, state=State.DETACH_PENDING, retiring=True)
    other = year(2025, state=State.DETACH_PENDING)
    partitions = [settled, left, old, ours, year(2023), year(2024), other]
    found = plan(config, partitions, NOW)
    assert found.actions == (
        Create(span("2026-01-01", "2027-01-01")),
        CreateDefault(),
        Finalize(ours),
        Settle(ours),
        Finalize(other),
        Create(span("2025-01-01", "2026-01-01")),
        Settle(left),
        Detach(old),
        Drop(settled),
    )
    assert not plan(config, after(partitions, found, NOW), NOW)


def test_a_detached_partition_is_settled_once() -> None:
    detached = year(2020, state=State.DETACHED, retiring=True)
    partitions = [detached, part("2024-01-01", MAXVALUE)]
    assert plan(config_of(), partitions, NOW).actions == (Settle(detached),)
    assert not plan(config_of(), after(partitions, plan(config_of(), partitions, NOW), NOW), NOW)
    assert not plan(config_of(), [year(2020, state=State.DETACHED), partitions[1]], NOW)


def test_drop_waits_for_the_grace_period() -> None:
    config = config_of(retention="1 year", retention_action="drop", detached_for="1 month")
    gone = year(2020, state=State.DETACHED, retiring=True, detached_at=utc(2026, 1, 31, 12))
    partitions = [gone, part("2024-01-01", MAXVALUE)]
    assert not plan(config, partitions, utc(2026, 2, 28, 11, 59))
    assert plan(config, partitions, utc(2026, 2, 28, 12)).actions == (Drop(gone),)
    assert not plan(config, partitions, utc(2026, 2, 28, 12), retire=False)


@pytest.mark.parametrize(
    ("attrs", "changes"),
    [
        ({"retention_action": "detach"}, {}),
        ({}, {"detached_at": None, "retiring": False}),
        ({}, {"managed": False}),
        ({}, {"range": span("2025-01-01", "2026-01-01")}),  # within retention, in part
        # Retention was lengthened, or taken away, after the detach: the data is wanted again.
        ({"retention": "30 years"}, {}),
        ({"retention": None}, {}),
    ],
)
def test_what_is_never_dropped(attrs: dict[str, object], changes: dict[str, Any]) -> None:
    config = config_of(**{"retention": "1 year", "retention_action": "drop", **attrs})
    gone = replace(year(2020, state=State.DETACHED, retiring=True, detached_at=utc(2021, 1, 1)), **changes)
    assert not plan(config, [gone, part("2026-01-01", MAXVALUE)], NOW)


# --- spans


def test_span_makes_each_period_it_touches_and_nothing_outside() -> None:
    config = config_of(interval="1 month", retention="1 year")
    assert created(plan_span(config, [], day("2001-01-31"), day("2001-03-02"))) == [
        "2001-01-01..2001-02-01",
        "2001-02-01..2001-03-01",
        "2001-03-01..2001-04-01",
    ]
    assert created(plan_span(config, [], day("2001-01-31"), day("2001-03-01"))) == [
        "2001-01-01..2001-02-01",
        "2001-02-01..2001-03-01",
    ]
    assert created(plan_span(config, [], day("2001-02-01"), day("2001-02-01"))) == ["2001-02-01..2001-03-01"]


def test_span_leaves_out_what_is_there() -> None:
    partitions = [year(2001), part("2003-04-01", "2003-07-01"), year(2010)]
    config = config_of()
    found = plan_span(config, partitions, day("2001-06-01"), day("2003-12-01"))
    assert created(found) == ["2002-01-01..2003-01-01", "2003-01-01..2003-04-01", "2003-07-01..2004-01-01"]
    assert not plan_span(config, after(partitions, found, NOW), day("2001-06-01"), day("2003-12-01"))


def test_span_finishes_the_detach_that_stands_in_its_way() -> None:
    near, far = year(2002, state=State.DETACH_PENDING), year(2008, state=State.DETACH_PENDING)
    assert plan_span(config_of(), [near, far], day("2001-06-01"), day("2002-06-01")).actions == (
        Create(span("2001-01-01", "2002-01-01")),
        Finalize(near),
        Create(span("2002-01-01", "2003-01-01")),
    )


def test_span_that_ends_before_it_begins() -> None:
    with pytest.raises(PlanError, match="begins at 2002-01-01, after its end at 2001-01-01"):
        plan_span(config_of(), [], day("2002-01-01"), day("2001-01-01"))


# --- what the commands show


def test_missing_tells_gaps_from_a_short_runway() -> None:
    config = config_of(interval="1 month")
    partitions = [part("2026-01-01", "2026-02-01"), part("2026-04-01", "2026-06-01")]
    found = missing(config, partitions, NOW)
    assert [str(r) for r in found.gaps] == ["2026-02-01..2026-04-01"]
    assert [str(r) for r in found.runway] == ["2026-06-01..2026-08-01"]
    complete = after(partitions, plan(config, partitions, NOW), NOW)
    assert not missing(config, complete, NOW)
    assert [str(r) for r in missing(config, [], NOW).runway] == ["2026-05-01..2026-08-01"]


def test_missing_does_not_mind_how_many() -> None:
    config = config_of(interval="1 hour")
    found = missing(config, [part("1990-01-01", "1990-01-02"), part("2026-01-01", "2027-01-01")], NOW)
    assert [str(r) for r in found.gaps] == ["1990-01-02..2026-01-01"]
    assert not found.runway


def test_runway() -> None:
    config = config_of(interval="1 month")
    assert runway(config, [], NOW) == (0, NOW)
    assert runway(config, [part("2026-05-01", "2026-06-01")], NOW) == (0, day("2026-06-01"))
    assert runway(config, [year(2026)], NOW) == (7, day("2027-01-01"))
    assert runway(config, [part("2026-05-01", "2026-06-20")], NOW) == (0, day("2026-06-20"))
    assert runway(config, [part("2026-05-01", "2026-05-20")], NOW) == (0, day("2026-05-20"))
    with_hole = [part("2026-05-01", "2026-07-01"), part("2026-08-01", "2026-09-01")]
    assert runway(config, with_hole, NOW) == (1, day("2026-07-01"))
    assert runway(config, [part("2020-01-01", MAXVALUE)], NOW) == (2, MAXVALUE)
    assert runway(config_of(interval="2 years"), [part("2026-01-01", "9999-01-01")], NOW) == (
        3985,
        day("9999-01-01"),
    )


# --- properties

ZONES = [
    "UTC",
    "Europe/Berlin",
    "America/Sao_Paulo",
    "Asia/Beirut",
    "Pacific/Apia",
    "America/Havana",
    "Australia/Lord_Howe",
]
INTERVALS = [
    "1 hour",
    "7 hours",
    "1 day",
    "5 days",
    "1 week",
    "1 month",
    "3 months",
    "1 quarter",
    "1 year",
    "2 years",
]
RUNS = [
    utc(2026, 12, 31, 23, 59, 59),
    utc(2024, 2, 29, 11, 7),
    utc(2011, 12, 29, 22, 13),
    utc(2018, 11, 4, 2, 59, 59, 999999),
]

PLANNED_FOR = (State.ATTACHED, State.DETACH_PENDING, State.DETACHED)

configs = st.builds(
    PartitionConfig,
    label=st.just("pypi.Upload"),
    column=st.just("uploaded_at"),
    key_kind=st.sampled_from(KeyKind),
    interval=st.sampled_from([Interval.parse(text) for text in INTERVALS]),
    premake=st.integers(0, 4),
    retention=st.none() | st.sampled_from([Interval.parse(text) for text in INTERVALS]),
    retention_action=st.sampled_from(RetentionAction),
    detached_for=st.sampled_from([Interval.parse(text) for text in ("1 hour", "7 days", "1 month")]),
    zone=st.sampled_from([ZoneInfo(name) for name in ZONES]),
    default_partition=st.booleans(),
).filter(lambda c: not (c.key_kind is KeyKind.DATE and c.interval.unit.value == "hour"))
runs = st.sampled_from(RUNS) | st.integers(0, 30 * 365 * 86400).map(
    lambda s: utc(2000, 1, 1) + timedelta(seconds=s)
)


@st.composite
def partition_sets(draw: st.DrawFn, config: PartitionConfig, now: datetime) -> list[Partition]:
    """Any set PostgreSQL would accept: periods and hand-made ranges, with holes, in any state."""
    zone = config.period_zone
    cuts = {config.interval.start_of(config.on_key_axis(now), zone)}
    for _ in range(draw(st.integers(0, 12))):
        if draw(st.booleans()):
            cuts.add(config.interval.next(draw(st.sampled_from(sorted(cuts))), zone))
        elif draw(st.booleans()):
            cuts.add(config.interval.start_of(min(cuts) - timedelta(seconds=1), zone))
        else:
            cuts.add(
                (min(cuts) + timedelta(hours=draw(st.integers(-40, 400)))).replace(
                    hour=0, minute=0, second=0, microsecond=0
                )
            )
    ends: list[Bound] = sorted(cuts)
    if draw(st.booleans()):
        ends.insert(0, MINVALUE)
    if draw(st.integers(0, 5)) == 0:
        ends.append(MAXVALUE)
    result = []
    for lower, upper in pairwise(ends):
        state = draw(st.sampled_from([None, *[State.ATTACHED] * 3, *PLANNED_FOR]))
        if state is None:
            continue
        detached_at = (
            now - timedelta(days=draw(st.integers(0, 40)))
            if state is State.DETACHED and draw(st.booleans())
            else None
        )
        result.append(
            part(
                lower,
                upper,
                state=state,
                managed=draw(st.booleans()),
                retiring=draw(st.booleans()),
                detached_at=detached_at,
                archived_at=now if detached_at and draw(st.booleans()) else None,
                held_since=now if draw(st.integers(0, 4)) == 0 else None,
            )
        )
    if draw(st.integers(0, 3)) == 0:
        result.append(DEFAULT)
    return draw(st.permutations(result))


@given(st.data(), configs, runs, st.booleans(), st.booleans())
@settings(deadline=None, max_examples=400)
def test_a_plan_applied_leaves_an_empty_plan(
    data: st.DataObject, config: PartitionConfig, now: datetime, create: bool, retire: bool
) -> None:
    partitions = data.draw(partition_sets(config, now))
    found = plan(config, partitions, now, create=create, retire=retire)
    done = after(partitions, found, now)  # refuses overlaps
    assert not plan(config, done, now, create=create, retire=retire)
    if create:
        assert not missing(config, done, now)
        assert runway(config, done, now)[0] >= config.premake
    # The one that reaches farthest was not taken away, and no set was emptied.
    if coverage(partitions) and retire:
        assert coverage(done)
        assert coverage(done)[-1].upper >= coverage(partitions)[-1].upper
    for action in found.actions:
        if isinstance(action, Detach | Drop):
            assert action.partition.managed
            assert not action.partition.is_default
            assert action.partition.held_since is None
            assert config.retention is not None
        if isinstance(action, Drop) and config.retention_action is RetentionAction.ARCHIVE:
            assert action.partition.archived_at is not None
    # Nothing that rows may still go into was lost, but for what is past retention.
    retired = {a.partition.range for a in found.actions if isinstance(a, Detach)}
    for range_ in (p.range for p in partitions if p.state is State.ATTACHED and p.range is not None):
        assert range_ in retired or not range_.subtract(coverage(done))


@given(st.data(), configs, runs)
@settings(deadline=None, max_examples=150)
def test_a_plan_leaves_no_gap(data: st.DataObject, config: PartitionConfig, now: datetime) -> None:
    partitions = data.draw(partition_sets(config, now))
    config = replace(config, retention=None)
    done = after(partitions, plan(config, partitions, now), now)
    assert len(coverage(done)) == 1
    assert coverage(done)[0].contains(config.on_key_axis(now))


@given(configs, runs, st.lists(st.integers(0, 900), min_size=1, max_size=5))
@settings(deadline=None, max_examples=100)
def test_runs_far_apart_keep_tiling(config: PartitionConfig, now: datetime, pauses: list[int]) -> None:
    partitions: list[Partition] = []
    for pause in pauses:
        # Counted in periods, so that an hourly set is not left for years.
        for _ in range(min(pause, 40)):
            now = config.interval.add(now, ZoneInfo("UTC")) + timedelta(seconds=61)
        partitions = after(partitions, plan(config, partitions, now), now)
        assert len(coverage(partitions)) == 1
        ranges = sorted((p.range for p in partitions if p.range is not None), key=str)
        for p in partitions:
            if p.range is not None and p.state is State.ATTACHED:
                assert isinstance(p.range.lower, datetime)
                start = config.interval.start_of(p.range.lower, config.period_zone)
                assert p.range == Range(start, config.interval.next(start, config.period_zone))
        assert len(set(ranges)) == len(ranges)


@given(st.data(), configs, runs, st.integers(0, 60 * 24 * 3600))
@settings(deadline=None, max_examples=150)
def test_a_span_applied_leaves_an_empty_span(
    data: st.DataObject, config: PartitionConfig, start: datetime, seconds: int
) -> None:
    end = start + timedelta(seconds=seconds)
    partitions = data.draw(partition_sets(config, start))
    found = plan_span(config, partitions, start, end)
    done = after(partitions, found, start)
    assert not plan_span(config, done, start, end)
    wanted = Range(start, max(end, start + timedelta.resolution))
    assert not wanted.subtract(coverage(done))
    for action in found.actions:
        if isinstance(action, Create):
            assert isinstance(action.range.lower, datetime)
            period_start = config.interval.start_of(action.range.lower, config.period_zone)
            period_end = config.interval.next(period_start, config.period_zone)
            assert Range(period_start, period_end).overlaps(wanted)


# --- the configuration


def test_defaults() -> None:
    assert config_of() == PartitionConfig(
        label="pypi.Upload",
        column="uploaded_at",
        key_kind=KeyKind.TIMESTAMP,
        interval=Interval.parse("1 year"),
        premake=2,
        retention=None,
        retention_action=RetentionAction.DETACH,
        detached_for=Interval.parse("7 days"),
        zone=ZoneInfo("UTC"),
        default_partition=False,
    )


def test_what_is_archived_is_dropped_and_nothing_else() -> None:
    config = config_of(retention="1 year", retention_action="archive", detached_for="7 days")
    here = [year(2025), year(2026), year(2027), year(2028)]
    long_ago = {"state": State.DETACHED, "detached_at": utc(2026, 1, 1)}
    archived = replace(year(2020, **long_ago), archived_at=utc(2026, 1, 1))
    lacking, held = year(2021, **long_ago), replace(year(2022, **long_ago), held_since=NOW)
    found = plan(config, [archived, lacking, held, *here], NOW)
    assert found.actions == (Archive(lacking), Drop(archived))
    restored = year(2019, held_since=NOW)
    assert not plan(config, [restored, *here], NOW)
    released = replace(restored, held_since=None)
    assert plan(config, [released, *here], NOW).actions == (Detach(released), Archive(released))


def test_everything_said() -> None:
    config = config_of(
        KeyKind.DATE,
        __module__="pypi.models",
        method="range",
        key=["uploaded_at"],
        interval="3 months",
        premake=0,
        retention="7 years",
        retention_action="drop",
        detached_for="1 day",
        time_zone="Europe/Berlin",
        default_partition=True,
    )
    assert (str(config.interval), config.premake, str(config.retention)) == ("3 months", 0, "7 years")
    assert config.retention_action is RetentionAction.DROP
    assert str(config.detached_for) == "1 day"
    assert config.zone.key == "Europe/Berlin"
    assert config.period_zone.key == "UTC"
    assert config.default_partition


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("interval", "0 days", "must be 1 or more"),
        ("interval", None, "NoneType"),
        ("premake", -1, "not a whole number from 0"),
        ("premake", True, "not a whole number from 0"),
        ("premake", "2", "not a whole number from 0"),
        ("premake", 100_000, "not a whole number from 0 to 1000"),
        ("retention", "forever", "not an interval"),
        ("retention_action", "delete", "not a retention action"),
        ("retention_action", [], "not a retention action"),
        ("detached_for", None, "NoneType"),
        ("time_zone", "Europe/Berlim", "Did you mean 'Europe/Berlin'"),
        ("time_zone", "Europe", "no time zone"),
        ("time_zone", "../etc/passwd", "no time zone"),
        ("time_zone", "", "no time zone"),
        ("time_zone", None, "not the name of a time zone"),
        ("default_partition", 1, "neither True nor False"),
        ("method", "list", "not supported"),
        ("intervall", "1 day", "Did you mean 'interval'"),
        ("xyzzy", 1, "Known are key, interval"),
    ],
)
def test_problems(name: str, value: object, says: str) -> None:
    (problem,) = problems("pypi.Upload", KeyKind.TIMESTAMP, {name: value})
    assert problem.attribute == name
    assert says in f"{problem.message} {problem.hint}"
    assert problem.hint
    with pytest.raises(ConfigurationError, match=f"pypi.Upload: PartitioningMeta.{name}: "):
        config_of(**{name: value})


def test_all_problems_are_listed() -> None:
    attrs = {"interval": "1 fortnight", "premake": -1, "retentoin": "1 year"}
    found = problems("pypi.Upload", KeyKind.DATE, attrs)
    assert [p.attribute for p in found] == ["interval", "premake", "retentoin"]


def test_a_date_key_knows_no_hours() -> None:
    (problem,) = problems("pypi.Upload", KeyKind.DATE, {"interval": "48 hours"})
    assert "finer than pypi.Upload's partition key, which is a date" in problem.message
