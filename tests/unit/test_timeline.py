"""The drawing of a partition set: states, places, sizes, and what has neither beginning nor end."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from django_scaledb.overview import timeline
from django_scaledb.overview.timeline import (
    DRAWN,
    HEIGHT,
    TOP,
    Bar,
    Look,
    Piece,
    Table,
    calendar,
    draw,
    dropped_at,
    pieces,
)
from django_scaledb.partitions.bounds import MAXVALUE, MINVALUE, Range
from django_scaledb.partitions.config import KeyKind, PartitionConfig, make_config
from django_scaledb.partitions.plan import Partition, State
from django_scaledb.postgres.identifiers import TableName

NOW = datetime(2026, 5, 17, 13, 7, 5, tzinfo=UTC)


def day(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


def config_of(**attrs: object) -> PartitionConfig:
    attrs = {"interval": "1 month", "premake": 1, **attrs}
    return make_config("pypi.Upload", "uploaded_at", KeyKind.TIMESTAMP, attrs)


def table(name: str, lower: Any, upper: Any, size: int | None = 0, **more: Any) -> Table:
    ends = [day(end) if isinstance(end, str) else end for end in (lower, upper)]
    bounds = Range(*ends) if lower is not None else None
    values = {"state": State.ATTACHED, "managed": True, **more}
    return Table(Partition(TableName("public", name), bounds, **values), None, size)


def looks(config: PartitionConfig, *tables: Table) -> dict[str, Look]:
    return {
        str(piece.table.name if piece.table else piece.range): piece.look
        for piece in pieces(config, tables, NOW)
    }


# -- states


def test_every_state_has_its_look() -> None:
    off = {"state": State.DETACHED, "detached_at": day("2026-05-10")}
    assert looks(
        config_of(),
        table("gone", "2026-01-01", "2026-02-01", **off),
        table("pending", "2026-02-01", "2026-03-01", state=State.DETACH_PENDING, retiring=True),
        table("theirs", "2026-03-01", "2026-04-01", managed=False),
        table("now", "2026-05-01", "2026-06-01"),
        table("next", "2026-06-01", "2026-07-01"),
        table("rest", None, None),
    ) == {
        "gone": Look.DETACHED,
        "pending": Look.PENDING,
        "theirs": Look.HAND_MADE,
        "2026-04-01..2026-05-01": Look.GAP,
        "now": Look.ATTACHED,
        "next": Look.PREMADE,
        "rest": Look.DEFAULT,
    }


def test_states_are_looks_of_the_same_name() -> None:
    """Every state that a table can have is drawn as itself, attached ones by what else there is to say."""
    for state in set(State) - {State.ATTACHED}:
        found = table("t", "2026-01-01", "2026-02-01", state=state).partition
        assert timeline.look_of(found, NOW).value == state.value


def test_a_partition_that_begins_now_is_not_premade() -> None:
    begun = table("now", NOW, "2026-06-01")
    assert looks(config_of(premake=0), begun)["now"] is Look.ATTACHED


def test_a_short_runway_is_a_gap_ahead() -> None:
    found = looks(config_of(premake=2), table("now", "2026-05-01", "2026-06-01"))
    assert found == {"now": Look.ATTACHED, "2026-06-01..2026-08-01": Look.GAP}


def test_every_look_has_a_pattern_and_colours_of_its_own() -> None:
    from pathlib import Path

    package = Path(timeline.__file__).parents[1]
    patterns = (package / "templates/django_scaledb/overview_patterns.html").read_text()
    style = (package / "static/django_scaledb/overview.css").read_text()
    for look in Look:
        assert f'<pattern id="scaledb-{look.slug}"' in patterns
        assert f"scaledb-ground-{look.slug}" in patterns
        assert f".scaledb-ground-{look.slug}" in style


# -- when a table will be dropped


@pytest.mark.parametrize(
    ("attrs", "expected"),
    [
        ({}, None),
        ({"retention": "2 months"}, None),
        ({"retention": "2 months", "retention_action": "drop"}, "2026-05-17"),
        ({"retention": "2 months", "retention_action": "drop", "detached_for": "1 day"}, "2026-05-11"),
        ({"retention": "4 months", "retention_action": "drop"}, "2026-06-01"),  # lengthened since
    ],
)
def test_when_a_detached_table_is_dropped(attrs: dict[str, Any], expected: str | None) -> None:
    gone = table("gone", "2026-01-01", "2026-02-01", state=State.DETACHED, detached_at=day("2026-05-10"))
    found = dropped_at(config_of(**attrs), gone.partition)
    assert found == (day(expected) if expected else None)


def test_what_is_said_of_a_detached_table() -> None:
    config = config_of(retention="2 months", retention_action="drop")

    def note(**more: Any) -> str:
        return timeline.note_of(
            config, table("t", "2026-01-01", "2026-02-01", **{"state": State.DETACHED, **more}).partition, NOW
        )

    assert note(detached_at=day("2026-05-12")) == "detached 2026-05-12, will be dropped after 2026-05-19"
    assert note(detached_at=day("2026-05-01")) == "detached 2026-05-01, dropped by the next rotation"
    assert note(detached_at=day("2026-05-01"), held_since=day("2026-05-02")) == (
        "detached 2026-05-01, kept until somebody drops it"
    )
    config = config_of(retention="2 months", retention_action="archive")
    assert note(detached_at=day("2026-05-01")) == "detached 2026-05-01, not archived yet"
    assert note(detached_at=day("2026-05-01"), archived_at=day("2026-05-02")) == (
        "detached 2026-05-01, archived 2026-05-02, dropped by the next rotation"
    )
    assert note(retiring=True) == "detached, not settled; the next rotation goes on"
    assert note(managed=False) == "detached by hand, never dropped"
    assert note(state=State.ATTACHED) == ""
    assert note(state=State.ATTACHED, held_since=day("2026-05-02")) == (
        "restored 2026-05-02; retention leaves it alone"
    )
    assert note(state=State.ARCHIVED, archived_at=day("2026-05-03")) == "archived 2026-05-03"
    assert note(detached_at=day("2026-05-12"), archived_at=day("2026-05-13")) == (
        "detached 2026-05-12, archived 2026-05-13, will be dropped after 2026-05-20"
    )


# -- places and sizes


def bars(*tables: Table, **options: Any) -> dict[str, Bar]:
    found = [
        Piece(t.partition.table, t.partition.range, timeline.look_of(t.partition, NOW), t.rows, t.bytes)
        for t in tables
    ]
    return {bar.piece.table.name: bar for bar in draw(found, **options).bars if bar.piece.table}


def test_width_is_time_and_height_is_bytes() -> None:
    found = bars(table("a", "2026-01-01", "2026-01-11", 50), table("b", "2026-01-11", "2026-01-31", 200))
    assert (found["a"].left, found["b"].left) == (0.0, pytest.approx(100 / 3))
    assert found["b"].width == pytest.approx(2 * found["a"].width)
    assert (found["a"].height, found["b"].height) == (HEIGHT / 4, HEIGHT)
    assert found["b"].top == TOP


@given(
    st.lists(st.tuples(st.integers(1, 400), st.integers(0, 10**13)), min_size=1, max_size=60),
)
def test_bars_are_as_long_and_as_high_as_what_they_stand_for(tables: list[tuple[int, int]]) -> None:
    start = day("2020-01-01")
    made = []
    for number, (days, size) in enumerate(tables):
        made.append(table(f"t{number}", start, start + timedelta(days=days), size))
        start += timedelta(days=days)
    found = bars(*made)
    in_scale = [bar for bar in found.values() if not bar.is_cut]
    assert in_scale
    peak = max(size for _, size in tables)
    for bar in found.values():
        assert bar.height == pytest.approx(HEIGHT * (bar.piece.bytes or 0) / peak if peak else 0)
        assert 0 <= bar.left <= bar.left + bar.width <= 100 + 1e-6

    def length(bar: Bar) -> float:
        assert bar.piece.range is not None
        return (bar.piece.range.upper - bar.piece.range.lower) / timedelta(days=1)  # type: ignore[operator]

    for bar in in_scale:
        assert bar.width / in_scale[0].width == pytest.approx(length(bar) / length(in_scale[0]))
    ends = sorted((bar.left, bar.left + bar.width) for bar in found.values())
    assert all(ended == pytest.approx(began) for (_, ended), (began, _) in pairwise(ends))


def test_open_ends_are_drawn_short_and_say_so() -> None:
    found = bars(
        table("first", MINVALUE, "2026-01-01"),
        table("middle", "2026-01-01", "2026-02-01"),
        table("last", "2026-02-01", MAXVALUE),
    )
    assert [bar.is_cut for bar in found.values()] == [True, False, True]
    assert found["first"].left == 0
    assert found["last"].left + found["last"].width == pytest.approx(100)
    assert found["middle"].width > 80


def test_one_partition_of_thirty_years_does_not_make_lines_of_the_others() -> None:
    found = bars(
        table("since 1996", "1996-01-01", "2026-01-01"),
        table("january", "2026-01-01", "2026-02-01"),
        table("february", "2026-02-01", "2026-03-01"),
        table("for ever", "2026-03-01", "9999-01-01"),
    )
    assert [name for name, bar in found.items() if bar.is_cut] == ["since 1996", "for ever"]
    assert found["january"].width > 40


def test_what_has_no_place_in_time_stands_beside() -> None:
    found = bars(table("a", "2026-01-01", "2026-02-01", 10), table("rest", None, None, 5))
    assert found["a"].left + found["a"].width < found["rest"].left
    assert found["rest"].left + found["rest"].width == pytest.approx(100)
    assert found["rest"].height == HEIGHT / 2


def test_what_is_off_the_set_has_a_strip_of_its_own() -> None:
    attached, off = bars(
        table("on", "2026-01-01", "2026-02-01"),
        table("off", "2026-01-01", "2026-02-01", state=State.DETACHED),
    ).values()
    assert attached.strip < off.strip


def test_nothing_known_nothing_drawn() -> None:
    assert draw([], now=NOW).bars == ()
    (bar,) = bars(table("a", "2026-01-01", "2026-02-01", None), now=NOW).values()
    assert (bar.height, bar.width) == (0.0, 100.0)
    (bar,) = bars(table("all", MINVALUE, MAXVALUE, 1), now=NOW).values()
    assert (bar.left, bar.width, bar.is_cut) == (0.0, 100.0, True)


def test_the_newest_tables_are_drawn_when_there_are_too_many() -> None:
    start = day("2020-01-01")
    days = [start + timedelta(n) for n in range(DRAWN + 8)]
    many = [
        Piece(TableName("public", f"{one:%j}"), Range(one, next_), Look.ATTACHED)
        for one, next_ in pairwise(days)
    ]
    drawing = draw(many)
    assert drawing.omitted == 7
    assert len(drawing.bars) == DRAWN
    assert drawing.bars[-1].piece is many[-1]


def test_lines_at_now_and_where_retention_begins() -> None:
    one = table("a", "2026-05-01", "2026-06-01")
    found = [Piece(one.partition.table, one.partition.range, Look.ATTACHED)]
    drawing = draw(found, now=day("2026-05-16") + timedelta(hours=12), cutoff=day("2019-01-01"))
    assert drawing.now is not None
    assert drawing.now.left == pytest.approx(50)
    assert drawing.cutoff is None, "it lies outside of what is drawn"


def test_levels_are_round_and_below_the_greatest() -> None:
    one = table("a", "2026-05-01", "2026-06-01", 9_800_000)
    drawing = draw([Piece(one.partition.table, one.partition.range, Look.ATTACHED, None, one.bytes)])
    assert [level.bytes for level in drawing.levels] == [5 << 20, 5 << 19]
    assert [level.top for level in drawing.levels] == [
        pytest.approx(TOP + HEIGHT * (1 - (5 << 20) / 9_800_000)),
        pytest.approx(TOP + HEIGHT * (1 - (5 << 19) / 9_800_000)),
    ]


@given(
    st.datetimes(timezones=st.just(UTC)).filter(lambda moment: 2 < moment.year < 9990),
    st.timedeltas(timedelta(hours=2), timedelta(3000 * 365)),
)
def test_the_calendar_has_few_round_moments_in_order(first: datetime, length: timedelta) -> None:
    last = min(first, datetime.max.replace(tzinfo=UTC) - length) + length
    found = [moment for moment, _ in calendar(first, last)]
    assert found == sorted(set(found))
    assert all(first <= moment <= last and not moment.minute for moment in found)
    assert len(found) <= 10


def test_the_calendar_writes_what_tells_its_moments_apart() -> None:
    def labels(first: str, last: str) -> list[str]:
        return [label for _, label in calendar(day(first), day(last))]

    assert labels("2005-01-01", "2029-01-01") == ["2005", "2010", "2015", "2020", "2025"]
    assert labels("2026-03-05", "2026-08-01") == ["2026-04", "2026-05", "2026-06", "2026-07", "2026-08"]
    assert labels("2026-03-05", "2026-03-10")[::2] == ["2026-03-05", "2026-03-07", "2026-03-09"]
    assert labels("2026-03-05", "2026-03-06")[1] == "03-05 03:00"
