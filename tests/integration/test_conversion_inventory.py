"""Nothing that a table has is forgotten: before and after, property by property."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from django.db import connections

from django_scaledb.partitions import catalog
from django_scaledb.partitions.conversion import inventory
from django_scaledb.partitions.conversion.job import differences
from django_scaledb.postgres.identifiers import TableName
from django_scaledb.testing import Cluster
from tests.project import Project

NUMBERS = itertools.count()

PLAIN = """
    class Customer(models.Model):
        name = models.CharField(max_length=50)

    class Order(models.Model):
        customer = models.ForeignKey(Customer, on_delete=models.CASCADE)
        total = models.IntegerField(default=0)
        note = models.TextField(db_default="")
        placed_at = models.DateTimeField()
"""
PARTITIONED = (
    PLAIN.replace("class Order(models.Model)", "class Order(PartitionedModel)")
    + """
        class PartitioningMeta:
            key = ["placed_at"]
            interval = "1 month"
"""
)
# Everything that PostgreSQL lets one hang on a table and that a partitioned one can have.
RICH = """
CREATE SCHEMA elsewhere AUTHORIZATION app;
ALTER TABLE shop_order ADD COLUMN "Odd %{} name" text COLLATE "C";
ALTER TABLE shop_order ADD COLUMN doubled int GENERATED ALWAYS AS (total * 2) STORED;
ALTER TABLE shop_order ADD COLUMN number serial;
ALTER TABLE shop_order ALTER note SET STORAGE EXTERNAL, ALTER note SET STATISTICS 77,
    ALTER total SET (n_distinct = 42), ALTER note SET COMPRESSION pglz;
ALTER TABLE shop_order SET (fillfactor = 70, autovacuum_vacuum_scale_factor = 0.05,
    toast.autovacuum_enabled = false);
ALTER TABLE shop_order ADD CONSTRAINT total_positive CHECK (total >= 0);
ALTER TABLE shop_order ADD CONSTRAINT once UNIQUE (customer_id, placed_at) INCLUDE (total) WITH (fillfactor
    = 80)
    DEFERRABLE INITIALLY DEFERRED;
CREATE INDEX partly ON shop_order (total) WHERE total > 5;
CREATE INDEX lowered ON shop_order (lower(note) text_pattern_ops DESC, "Odd %{} name") INCLUDE (total)
    WITH (fillfactor = 60);
CREATE INDEX brinned ON shop_order USING brin (placed_at) WITH (pages_per_range = 16);
CREATE UNIQUE INDEX unique_expression ON shop_order (lower(note), id, placed_at);
ALTER INDEX lowered ALTER COLUMN 1 SET STATISTICS 55;
CREATE STATISTICS shop_order_stats (ndistinct, dependencies) ON customer_id, total FROM shop_order;
ALTER STATISTICS shop_order_stats SET STATISTICS 33;
COMMENT ON TABLE shop_order IS 'what''s ordered';
COMMENT ON COLUMN shop_order.total IS 'cents';
COMMENT ON CONSTRAINT total_positive ON shop_order IS 'no refunds';
COMMENT ON CONSTRAINT once ON shop_order IS 'once a moment';
COMMENT ON INDEX partly IS 'the big ones';
COMMENT ON STATISTICS shop_order_stats IS 'they go together';
GRANT SELECT, INSERT ON shop_order TO reader WITH GRANT OPTION;
GRANT SELECT ON shop_order TO PUBLIC;
GRANT UPDATE (note, total) ON shop_order TO writer;
ALTER DEFAULT PRIVILEGES GRANT DELETE ON TABLES TO reader;
GRANT USAGE ON SEQUENCE shop_order_id_seq TO reader;
COMMENT ON SEQUENCE shop_order_id_seq IS 'numbers of orders';
ALTER SEQUENCE shop_order_id_seq INCREMENT 2 CACHE 3;
CREATE POLICY own ON shop_order AS RESTRICTIVE FOR UPDATE TO reader, writer USING (total < 100) WITH CHECK
    (total < 50);
CREATE POLICY everyone ON shop_order USING (true);
COMMENT ON POLICY own ON shop_order IS 'only small ones';
ALTER TABLE shop_order ENABLE ROW LEVEL SECURITY;
CREATE FUNCTION touched() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END';
CREATE TRIGGER touch BEFORE UPDATE OF note ON shop_order FOR EACH ROW WHEN (OLD.note <> NEW.note) EXECUTE
    FUNCTION touched();
CREATE TRIGGER told AFTER INSERT ON shop_order REFERENCING NEW TABLE AS fresh FOR EACH STATEMENT EXECUTE
    FUNCTION touched();
CREATE TRIGGER asleep AFTER DELETE ON shop_order FOR EACH ROW EXECUTE FUNCTION touched();
ALTER TABLE shop_order DISABLE TRIGGER asleep;
COMMENT ON TRIGGER touch ON shop_order IS 'touches';
CREATE VIEW elsewhere.big WITH (security_barrier = true) AS SELECT o.*, o.total * 2 AS twice FROM
    shop_order o WHERE total > 10;
CREATE VIEW bigger AS SELECT * FROM elsewhere.big WHERE total > 20;
GRANT SELECT ON elsewhere.big TO reader;
COMMENT ON VIEW elsewhere.big IS 'big orders';
ALTER TABLE shop_order REPLICA IDENTITY FULL;
ALTER TABLE shop_order SET TABLESPACE roomy;
ALTER INDEX partly SET TABLESPACE roomy;
INSERT INTO shop_customer (name) VALUES ('c');
INSERT INTO shop_order (customer_id, total, note, placed_at) SELECT 1, i, i, now() - i * interval '6 h'
    FROM generate_series(1, 500) i;
"""
# One property after the other, taken away on purpose: the comparison must tell.
DROPPED = {
    "grants": "REVOKE SELECT ON shop_order FROM PUBLIC",
    "grants: of columns": "REVOKE UPDATE (note) ON shop_order FROM writer",
    "row_security": "ALTER TABLE shop_order DISABLE ROW LEVEL SECURITY",
    "policies": "DROP POLICY own ON shop_order",
    "comment": "COMMENT ON TABLE shop_order IS NULL",
    "columns: comment": "COMMENT ON COLUMN shop_order.total IS NULL",
    "columns: default": "ALTER TABLE shop_order ALTER note DROP DEFAULT",
    "columns: statistics": "ALTER TABLE shop_order ALTER note SET STATISTICS -1",
    "columns: options": "ALTER TABLE shop_order ALTER total RESET (n_distinct)",
    "columns: storage": "ALTER TABLE shop_order ALTER note SET STORAGE EXTENDED",
    "columns: compression": "ALTER TABLE shop_order ALTER note SET COMPRESSION default",
    "columns: identity": "ALTER TABLE shop_order ALTER id DROP IDENTITY",
    "columns: sequence": "COMMENT ON SEQUENCE shop_order_id_seq IS NULL",
    "indexes: partial": "DROP INDEX partly",
    "indexes: expression": "DROP INDEX lowered",
    "indexes: comment": "COMMENT ON INDEX partly IS NULL",
    "indexes: unique constraint": "ALTER TABLE shop_order DROP CONSTRAINT once",
    "constraints: check": "ALTER TABLE shop_order DROP CONSTRAINT total_positive",
    "constraints: comment": "COMMENT ON CONSTRAINT total_positive ON shop_order IS NULL",
    "triggers": "DROP TRIGGER touch ON shop_order",
    "triggers: enabled": "ALTER TABLE shop_order ENABLE TRIGGER asleep",
    "statistics": "DROP STATISTICS shop_order_stats",
    "views": "DROP VIEW bigger, elsewhere.big",
    "publications": "ALTER PUBLICATION changes DROP TABLE shop_order",
    "replica_identity": "ALTER TABLE shop_order REPLICA IDENTITY DEFAULT",
    "constraints: foreign key": "DO $$ BEGIN EXECUTE (SELECT format('ALTER TABLE shop_order DROP "
    "CONSTRAINT %I', "
    "conname) FROM pg_constraint WHERE contype = 'f' AND conrelid = 'shop_order'::regclass); END $$",
    "primary key": "ALTER TABLE shop_order DROP CONSTRAINT shop_order_pkey",
    "owner": "ALTER TABLE shop_order OWNER TO keeper",
    "columns: generated": "ALTER TABLE shop_order ALTER doubled DROP EXPRESSION",
    "columns: not null": "ALTER TABLE shop_order ALTER note DROP NOT NULL",
    "columns: grants of the sequence": "REVOKE ALL ON SEQUENCE shop_order_id_seq FROM reader",
    "columns: the sequence of a serial": "ALTER SEQUENCE shop_order_number_seq OWNED BY NONE",
    "indexes: statistics target": "ALTER INDEX lowered ALTER COLUMN 1 SET STATISTICS -1",
    "force_row_security": "ALTER TABLE shop_order NO FORCE ROW LEVEL SECURITY",
    "tablespace": "ALTER TABLE shop_order SET TABLESPACE pg_default",
    "indexes: tablespace": "ALTER INDEX partly SET TABLESPACE pg_default",
    "statistics: target": "ALTER STATISTICS shop_order_stats SET STATISTICS -1",
    "policies: comment": "COMMENT ON POLICY own ON shop_order IS NULL",
    "triggers: comment": "COMMENT ON TRIGGER touch ON shop_order IS NULL",
    "views: options": "ALTER VIEW elsewhere.big RESET (security_barrier)",
}
# Of these there is no more than one kind in a table that can be converted: the preflight refuses the others.
REFUSED_OTHERWISE = {
    *("schema", "name", "persistence", "version", "of_type", "is_partition"),
    *("rules", "incoming", "labels", "subscriptions", "others"),
}


@pytest.fixture(scope="module")
def roles(server: Cluster) -> None:
    with server.primary.connect(user="postgres") as connection:
        for role in ("reader", "writer", "keeper"):
            connection.execute(f"CREATE ROLE {role}")
        connection.execute("GRANT keeper TO app")
        connection.execute("SET allow_in_place_tablespaces = on")
        connection.execute("CREATE TABLESPACE roomy LOCATION ''")
        connection.execute("GRANT CREATE ON TABLESPACE roomy TO app")


@pytest.fixture
def project(tmp_path: Path, server: Cluster, roles: None) -> Project:
    project = Project(tmp_path, server, f"inventory_{next(NUMBERS)}")
    project.models(PLAIN)
    project.manage("makemigrations", "shop")
    project.manage("migrate", "-v", "0")
    project.execute(RICH)
    with server.primary.connect(user="postgres", dbname=project.database) as connection:
        connection.execute("ALTER DATABASE " + project.database + " OWNER TO app")
        connection.execute("GRANT CREATE ON SCHEMA public TO keeper")
        columns = (
            " (id, placed_at, total) WHERE (total > 3)" if connection.info.server_version >= 150000 else ""
        )
        connection.execute(
            f"CREATE PUBLICATION changes FOR TABLE shop_order{columns} "
            "WITH (publish = 'insert', publish_via_partition_root = true)"
        )
        connection.execute("ALTER PUBLICATION changes OWNER TO app")
    project.models(PARTITIONED)
    project.manage("makemigrations", "shop")
    return project


@pytest.fixture
def read(project: Project, django_db_blocker: Any) -> Iterator[Callable[..., inventory.Inventory]]:
    """Reads the inventory of a table in the project's database."""
    entry = {**connections.databases["default"], **project.node.django_settings(), "NAME": project.database}
    connections.databases["project"] = entry

    def read(table: str = "shop_order", *, after: str = "SELECT") -> inventory.Inventory:
        """`after` is run before the reading, and rolled back."""
        with catalog.pinned(connections["project"]) as cursor:
            cursor.execute(after)
            return inventory.read(cursor, TableName("public", table))

    with django_db_blocker.unblock():
        yield read
        connections["project"].close()
    del connections["project"], connections.databases["project"]


def described(found: inventory.Inventory) -> dict[str, Any]:
    """What must be the same before and after, by property.

    The primary key is another one on purpose. Storage parameters and the mark of CLUSTER are those
    of the table that has the rows: the first partition.
    """
    values = found.shape()
    for name in ("oid", "kind", "options", "has_acl", "default_grantees", "inherits", "access_method"):
        del values[name]
    values["indexes"] = [
        {k: v for k, v in index.items() if k != "is_clustered"}
        for index in values["indexes"]
        if not index["is_primary"]
    ]
    values["primary key"] = [index["name"] for index in found.as_json()["indexes"] if index["is_primary"]]
    return values


def test_everything_is_there_afterwards_and_the_comparison_sees_what_is_not(project, read):
    project.execute("ALTER TABLE shop_order FORCE ROW LEVEL SECURITY")
    before = read()
    dry = project.manage("convert_to_partitioned", "shop.Order", "--dry-run")
    assert described(read()) == described(before)
    assert "ACCESS EXCLUSIVE on public.shop_order" in dry
    project.manage("convert_to_partitioned", "shop.Order")
    after = read()
    assert described(after) == described(before)
    leaf = read("shop_order_start")
    assert leaf.options == before.options
    assert after.primary_key.columns == ("id", "placed_at")
    assert not [c for c in leaf.constraints if "scaledb" in c.name]
    # So is a partition that is made later, also in what PostgreSQL does not hand down.
    project.manage("create_partitions", "shop.Order", "--from", "2040-05-01", "--to", "2040-05-02")
    late = read("shop_order_y2040m05")
    for what in ("options", "replica_identity", "tablespace", "owner"):
        assert getattr(late, what) == getattr(before, what), what
    assert [(c.name, c.statistics, c.options, c.storage, c.compression) for c in late.columns] == [
        (c.name, c.statistics, c.options, c.storage, c.compression) for c in before.columns
    ]
    project.execute("SET ROLE app; UPDATE bigger SET note = 'seen' WHERE total = 30")
    assert project.query("SELECT nextval('shop_order_id_seq') > 499") == [(True,)]

    expected = described(before)
    assert {what.split(":")[0] for what in DROPPED} | REFUSED_OTHERWISE == expected.keys()
    for what, statement in DROPPED.items():
        damaged = described(read(after=statement))
        missing = {name for name in expected if damaged[name] != expected[name]}
        assert what.split(":")[0] in missing, f"the comparison does not see that {what} is gone: {missing}"
    assert described(read()) == expected


def test_abort_gives_everything_back_whatever_was_reached(project, read):
    before = read()
    project.execute("UPDATE shop_order SET note = note || '!'")
    rows = project.query("SELECT * FROM shop_order ORDER BY id")
    # Each of these is in the way of another step, the last one behind the swap.
    for blocking, phase in (("shop_order", "preparing"), ("shop_customer", "swapped")):
        with psycopg.connect(project.node.conninfo(dbname=project.database)) as blocker:
            blocker.execute(f"LOCK TABLE {blocking} IN ROW EXCLUSIVE MODE")
            out = project.manage("convert_to_partitioned", "shop.Order", "--deadline", "0.3", fails=True)
            assert f"pid {blocker.info.backend_pid}" in out
        assert f"phase: {phase}" in project.manage("convert_to_partitioned", "shop.Order", "--status")
        project.manage("convert_to_partitioned", "shop.Order", "--abort")
        after = read()
        assert after.shape() == before.shape(), list(differences(before, after))
        assert after.oid == before.oid
        assert project.query("SELECT * FROM shop_order ORDER BY id") == rows
        assert project.query(
            "SELECT count(*) FROM pg_class WHERE relname ~ 'shop_order_(start|new|scaledb)'"
        ) == [(0,)]
    project.manage("convert_to_partitioned", "shop.Order")
    assert described(read()) == described(before)


def test_the_copy_strategy_forgets_nothing_either_and_goes_back(project, read):
    convert = ("convert_to_partitioned", "shop.Order", "--strategy", "copy")
    before = read()
    assert "INSERT INTO" in project.manage(*convert, "--dry-run")
    with psycopg.connect(project.node.conninfo(dbname=project.database)) as blocker:
        blocker.execute("LOCK TABLE shop_customer IN ROW EXCLUSIVE MODE")
        project.manage(*convert, "--deadline", "0.3", fails=True)
    assert "phase: copying" in project.manage(*convert[:2], "--status")
    project.execute(
        "UPDATE shop_order SET note = note || '?' WHERE total < 10; DELETE FROM shop_order WHERE total = 11"
    )
    project.manage(*convert[:2], "--abort")
    assert read().shape() == before.shape(), list(differences(before, read()))

    assert "--finish" in project.manage(*convert)
    after = described(read())
    assert [t["name"] for t in after["triggers"]] != [t["name"] for t in described(before)["triggers"]]
    project.execute(
        "INSERT INTO shop_order (customer_id, total, note, placed_at) VALUES (1, 7, 'new', now());"
        "UPDATE shop_order SET placed_at = placed_at - interval '40 days 1 minute' WHERE total = 12;"
        "DELETE FROM shop_order WHERE total = 13"
    )
    rows = project.query("SELECT * FROM shop_order ORDER BY id")
    assert len(rows) == 499
    project.manage(*convert[:2], "--abort")
    assert read().shape() == before.shape(), list(differences(before, read()))
    assert read().oid == before.oid
    assert project.query("SELECT * FROM shop_order ORDER BY id") == rows

    project.manage(*convert)
    assert "the old table is gone" in project.manage(*convert[:2], "--finish")
    assert described(read()) == described(before)
    assert project.query("SELECT * FROM shop_order ORDER BY id") == rows
    assert project.query("SELECT count(*) FROM pg_class WHERE relname ~ 'shop_order_(old|new|scaledb)'") == [
        (0,)
    ]
    assert project.query("SELECT count(*) FROM pg_proc WHERE proname ~ 'scaledb'") == [(0,)]
    project.manage("show_partitions", "--check")
