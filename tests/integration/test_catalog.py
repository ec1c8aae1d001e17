"""Partition sets are what the catalog says, in one query, whatever the session's settings are."""

from __future__ import annotations

from datetime import UTC, datetime
from zoneinfo import ZoneInfo

import pytest
from django.db import transaction
from django.test.utils import CaptureQueriesContext

from django_scaledb.exceptions import PlanError
from django_scaledb.partitions import catalog, registry
from django_scaledb.partitions.bounds import MAXVALUE, MINVALUE, Range
from django_scaledb.partitions.catalog import PartitionSet
from django_scaledb.partitions.config import KeyKind, PartitionConfig, make_config
from django_scaledb.partitions.marker import Marker, MarkState
from django_scaledb.partitions.plan import State
from django_scaledb.postgres.identifiers import TableName
from tests.lab import Account, Lab, Plain, Trace, Upload


def config(column: str = "at", kind: KeyKind = KeyKind.TIMESTAMP) -> PartitionConfig:
    return make_config("lab.Model", column, kind, {"key": [column], "interval": "1 year"})


def read(lab: Lab, *names: str) -> list[PartitionSet]:
    found = catalog.read(lab.connection, names)
    assert None not in found
    return [one for one in found if one is not None]


def year(number: int) -> Range:
    return Range(datetime(number, 1, 1, tzinfo=UTC), datetime(number + 1, 1, 1, tzinfo=UTC))


def test_sets_are_read_in_the_order_asked_for(lab: Lab) -> None:
    lab.create(Plain, Trace)
    first, nothing, second = catalog.read(lab.connection, ["lab_trace", "lab_none", "lab_plain"])
    assert first is not None
    assert second is not None
    assert nothing is None
    assert first.table == TableName("public", "lab_trace")
    assert [m.table.name for m in second.members] == ["lab_plain_y2026m05", "lab_plain_y2026m06"]
    assert [p.range for p in first.partitions(registry.config_for(Trace))] == [
        Range(datetime(2026, 5, 1, tzinfo=UTC), datetime(2026, 6, 1, tzinfo=UTC)),
        Range(datetime(2026, 6, 1, tzinfo=UTC), datetime(2026, 7, 1, tzinfo=UTC)),
    ]


def test_bounds_are_exact_in_any_session(lab: Lab) -> None:
    lab.execute(
        "CREATE TABLE t (at timestamptz NOT NULL) PARTITION BY RANGE (at)",
        "CREATE TABLE t1 PARTITION OF t FOR VALUES FROM (MINVALUE) TO ('2024-01-01 00:00:00+00')",
        "CREATE TABLE t2 PARTITION OF t FOR VALUES FROM ('2024-01-01 00:00:00+00') TO "
        "('2025-01-01 00:00:00+00')",
        "CREATE TABLE t3 PARTITION OF t FOR VALUES FROM ('2025-01-01 00:00:00+00') TO (MAXVALUE)",
        "CREATE TABLE t4 PARTITION OF t DEFAULT",
    )
    with lab.connection.cursor() as cursor:
        cursor.execute("SET timezone = 'Asia/Kathmandu'; SET datestyle = 'SQL, DMY'")
        (found,) = read(lab, "t")
        cursor.execute("SHOW timezone")
        assert cursor.fetchone() == ("Asia/Kathmandu",)
        cursor.execute("SHOW datestyle")
        assert cursor.fetchone() == ("SQL, DMY",)
    assert [p.range for p in found.partitions(config())] == [
        Range(MINVALUE, datetime(2024, 1, 1, tzinfo=UTC)),
        year(2024),
        Range(datetime(2025, 1, 1, tzinfo=UTC), MAXVALUE),
        None,
    ]
    assert found.default is not None
    assert found.default.table.name == "t4"


def test_reading_leaves_a_transaction_of_the_caller_alone(lab: Lab) -> None:
    lab.create(Plain)
    with transaction.atomic(using="lab"), lab.connection.cursor() as cursor:
        cursor.execute("SET LOCAL timezone = 'Asia/Kathmandu'; CREATE TABLE mine (n int)")
        read(lab, "lab_plain")
        cursor.execute("SHOW timezone")
        assert cursor.fetchone() == ("Asia/Kathmandu",)
    assert "mine" in lab.tables()


def test_bounds_in_another_zone_are_moments(lab: Lab) -> None:
    lab.execute(
        "CREATE TABLE t (at timestamptz NOT NULL) PARTITION BY RANGE (at)",
        "CREATE TABLE t1 PARTITION OF t FOR VALUES FROM ('2024-03-31 00:00 Europe/Berlin') TO "
        "('2024-04-01 00:00 Europe/Berlin')",
    )
    (found,) = read(lab, "t")
    berlin = ZoneInfo("Europe/Berlin")
    (partition,) = found.partitions(config())
    assert partition.range == Range(
        datetime(2024, 3, 31, tzinfo=berlin).astimezone(UTC),
        datetime(2024, 4, 1, tzinfo=berlin).astimezone(UTC),
    )


def test_odd_names_and_other_schemas_are_found_by_the_search_path(lab: Lab) -> None:
    long = "ä" * 31
    lab.execute(
        'CREATE SCHEMA "Ünder Score"',
        'CREATE TABLE "Ünder Score"."Mixed ""Case""" (at date NOT NULL) PARTITION BY RANGE (at)',
        'CREATE TABLE "Mixed ""Part""" PARTITION OF "Ünder Score"."Mixed ""Case""" '
        "FOR VALUES FROM ('2024-01-01') TO ('2025-01-01')",
        f'CREATE TABLE "{long}" (at date NOT NULL) PARTITION BY RANGE (at)',
        f'CREATE TABLE "{long[:-1]}p" PARTITION OF "{long}" '
        "FOR VALUES FROM ('2024-01-01') TO ('2025-01-01')",
        # Of the same name in another schema, and with the same start of its name.
        "CREATE SCHEMA other",
        f'CREATE TABLE other."{long}" (at date NOT NULL) PARTITION BY RANGE (at)',
    )
    with lab.connection.cursor() as cursor:
        cursor.execute('SET search_path = "Ünder Score", public')
        mixed, plain, other = read(lab, '"Mixed ""Case"""', long, f'other"."{long}')
    assert mixed.table == TableName("Ünder Score", 'Mixed "Case"')
    assert [m.table for m in mixed.members] == [TableName("public", 'Mixed "Part"')]
    assert mixed.partitions(config(kind=KeyKind.DATE))[0].range == year(2024)
    assert (plain.table.schema, len(plain.members)) == ("public", 1)
    assert (other.table.schema, len(other.members)) == ("other", 0)


@pytest.mark.parametrize(
    ("ddl", "complaint"),
    [
        ("CREATE TABLE t (at timestamptz)", "t is an ordinary table in the database"),
        ("CREATE VIEW t AS SELECT 1 AS at", "t is a view in the database"),
        ("CREATE TABLE t (at timestamptz) PARTITION BY LIST (at)", "partitioned by list (at)"),
        ("CREATE TABLE t (at timestamptz) PARTITION BY HASH (at)", "partitioned by hash (at)"),
        ("CREATE TABLE t (at timestamptz, b int) PARTITION BY RANGE (at, b)", "partitioned by range (at, b)"),
        ("CREATE TABLE t (b timestamptz) PARTITION BY RANGE (b)", "partitioned by range (b)"),
        (
            "CREATE TABLE t (at timestamp) PARTITION BY RANGE (date_trunc('day', at))",
            "partitioned by range (an expression)",
        ),
    ],
)
def test_a_table_that_is_partitioned_otherwise_is_refused(lab: Lab, ddl: str, complaint: str) -> None:
    lab.execute(ddl)
    (found,) = read(lab, "t")
    with pytest.raises(PlanError, match=r"^lab\.Model: public\.t ") as caught:
        found.partitions(config())
    assert complaint in str(caught.value)


def test_bounds_of_another_type_are_refused_by_name(lab: Lab) -> None:
    lab.execute(
        "CREATE TABLE t (at bigint NOT NULL) PARTITION BY RANGE (at)",
        "CREATE TABLE t_one PARTITION OF t FOR VALUES FROM (1) TO (2)",
    )
    (found,) = read(lab, "t")
    with pytest.raises(PlanError, match=r"cannot read the bounds of public\.t_one: .*FROM \('1'\)"):
        found.partitions(config())


def test_who_made_a_partition_is_told_by_its_mark(lab: Lab) -> None:
    lab.execute(
        "CREATE TABLE t (at date NOT NULL) PARTITION BY RANGE (at)",
        *(
            f"CREATE TABLE t{n} PARTITION OF t FOR VALUES FROM ('{n}-01-01') TO ('{n + 1}-01-01')"
            for n in range(2020, 2027)
        ),
        f"COMMENT ON TABLE t2020 IS '{Marker(MarkState.ATTACHED)}'",
        "COMMENT ON TABLE t2021 IS 'psqlextra_auto_partitioned'",
        "COMMENT ON TABLE t2022 IS 'django_scaledb is not what made me'",
        'COMMENT ON TABLE t2023 IS \'django_scaledb:{"v":2,"state":"attached"}\'',
        'COMMENT ON COLUMN t2024.at IS \'django_scaledb:{"v":1,"state":"attached"}\'',
        f"COMMENT ON TABLE t2025 IS '{Marker(MarkState.RETIRING, TableName('public', 't'))}'",
        f"COMMENT ON TABLE t2026 IS '{Marker(MarkState.DETACHED, TableName('public', 't'))}'",
    )
    (found,) = read(lab, "t")
    partitions = {p.table.name: p for p in found.partitions(config(kind=KeyKind.DATE))}
    assert {name for name, p in partitions.items() if p.managed} == {"t2020", "t2021", "t2025"}
    assert {name for name, p in partitions.items() if p.retiring} == {"t2025"}
    assert found.detached == ()


def test_detached_tables_belong_to_the_set_their_mark_names(lab: Lab) -> None:
    parent, moment = TableName("public", "t"), datetime(2026, 1, 1, 3, tzinfo=UTC)
    marks = {
        "gone": Marker(MarkState.DETACHED, parent, year(2020), moment),
        "going": Marker(MarkState.RETIRING, parent, year(2021)),
        "by_hand": Marker(MarkState.ATTACHED, parent, year(2022)),
        "others": Marker(MarkState.DETACHED, TableName("other", "t"), year(2020), moment),
    }
    lab.execute(
        "CREATE TABLE t (at date NOT NULL) PARTITION BY RANGE (at)",
        *(f"CREATE TABLE {name} (at date)" for name in marks),
        *(f"COMMENT ON TABLE {name} IS '{mark}'" for name, mark in marks.items()),
    )
    (found,) = read(lab, "t")
    assert [m.table.name for m in found.orphans] == ["by_hand"]
    partitions = {p.table.name: p for p in found.partitions(config(kind=KeyKind.DATE))}
    assert set(partitions) == {"gone", "going"}
    assert {p.state for p in partitions.values()} == {State.DETACHED}
    assert (partitions["gone"].range, partitions["gone"].detached_at) == (year(2020), moment)
    assert (partitions["going"].retiring, partitions["going"].detached_at) == (True, None)


def test_foreign_keys_of_both_directions_are_known_by_their_outermost_tables(lab: Lab) -> None:
    lab.execute(
        "CREATE TABLE target (id int PRIMARY KEY)",
        "CREATE TABLE t (id int PRIMARY KEY, up int REFERENCES t, target_id int REFERENCES target) "
        "PARTITION BY RANGE (id)",
        "CREATE TABLE t1 PARTITION OF t FOR VALUES FROM (1) TO (2)",
        "CREATE TABLE t2 PARTITION OF t FOR VALUES FROM (2) TO (3)",
        "CREATE TABLE child (id int, t_id int REFERENCES t) PARTITION BY RANGE (id)",
        "CREATE TABLE child1 PARTITION OF child FOR VALUES FROM (1) TO (2)",
    )
    (found,) = read(lab, "t")
    assert [t.name for t in found.references] == ["t", "target"]
    assert [t.name for t in found.referenced_by] == ["child", "t"]


def test_a_subpartitioned_partition_is_one(lab: Lab) -> None:
    lab.execute(
        "CREATE TABLE t (at date NOT NULL, n int) PARTITION BY RANGE (at)",
        "CREATE TABLE t1 PARTITION OF t FOR VALUES FROM ('2024-01-01') TO ('2025-01-01') "
        "PARTITION BY LIST (n)",
        "CREATE TABLE t1a PARTITION OF t1 FOR VALUES IN (1)",
    )
    (found,) = read(lab, "t")
    assert [p.table.name for p in found.partitions(config(kind=KeyKind.DATE))] == ["t1"]


def build_sets(lab: Lab, tables: int, partitions: int) -> list[str]:
    """Tables of daily partitions, by a loop in the server."""
    names = [f"t{number}" for number in range(tables)]
    mark = Marker(MarkState.ATTACHED)
    for name in names:
        lab.execute(
            f"CREATE TABLE {name} (id bigint, at date NOT NULL) PARTITION BY RANGE (at)",
            f"""
            DO $$ BEGIN FOR n IN 0..{partitions - 1} LOOP
                EXECUTE format('CREATE TABLE {name}_%s PARTITION OF {name} FOR VALUES FROM (%L) TO (%L)',
                    n, date '2020-01-01' + n, date '2020-01-02' + n);
                EXECUTE format('COMMENT ON TABLE {name}_%s IS %L', n, '{mark}');
            END LOOP; END $$
            """,
        )
    return names


@pytest.mark.parametrize(("tables", "partitions"), [(20, 50), pytest.param(100, 200, marks=pytest.mark.slow)])
def test_the_number_of_queries_does_not_grow(lab: Lab, tables: int, partitions: int) -> None:
    names = build_sets(lab, tables, partitions)
    read(lab, names[0])  # connects
    with CaptureQueriesContext(lab.connection) as for_one:
        read(lab, names[0])
    with CaptureQueriesContext(lab.connection) as for_all:
        found = read(lab, *names)
    assert len(for_all) == len(for_one)
    assert sum("pg_inherits" in query["sql"] for query in for_all.captured_queries) == 1
    assert [len(one.partitions(config(kind=KeyKind.DATE))) for one in found] == [partitions] * tables


def test_the_models_own_set_is_readable(lab: Lab) -> None:
    lab.create(Account, Upload)
    (found,) = read(lab, Upload._meta.db_table)
    assert found.may_alter
    assert found.owner == found.role == "app"
    assert len(found.partitions(registry.config_for(Upload))) == 3
