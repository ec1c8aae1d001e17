"""A table that somebody alters while it is being converted: carried along, or told, but never lost."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from django_scaledb.testing import Cluster
from tests.integration.test_conversion_traffic import prepare
from tests.project import Project
from tests.traffic import PARTITIONED_ORDERS

NUMBERS = itertools.count()
COMMAND = ("convert_to_partitioned", "shop.Order")
# Each is done when the swap has been worked out already and is about to take its lock.
CHANGES = (
    "CREATE INDEX later ON shop_order (note)",
    "ALTER TABLE shop_order ADD COLUMN extra int DEFAULT 7",
    "COMMENT ON COLUMN shop_order.total IS 'in cents'",
    "CREATE VIEW late AS SELECT count(*) AS n FROM shop_order",
)
CONVERT = """
    import psycopg
    from django.db import connection
    from django_scaledb.partitions.conversion.runner import Listener, Options, Runner
    from django_scaledb.partitions.conversion.state import Strategy

    changes = {changes!r}

    class Late(Listener):
        def on_stage(self, stage):
            if stage.name == {stage!r} and changes:
                parameters = {{**connection.get_connection_params(), "cursor_factory": None}}
                with psycopg.connect(**parameters) as other:
                    other.execute(changes.pop(0))

    print(Runner(Order, Options("default"), Late()).convert(Strategy({strategy!r})))
    print("left", changes)
"""


@pytest.fixture
def project(tmp_path: Path, server: Cluster) -> Project:
    project = prepare(tmp_path, server, 200, ())
    project.models(PARTITIONED_ORDERS)
    project.manage("makemigrations", "shop")
    return project


def convert(project: Project, strategy: str, *changes: str, stage: str = "swap", fails: bool = False) -> str:
    code = CONVERT.format(changes=list(changes), strategy=strategy, stage=stage)
    return project.run(code, fails=fails)


def kind(project: Project) -> str:
    return project.query("SELECT relkind::text FROM pg_class WHERE oid = 'shop_order'::regclass")[0][0]


def test_what_is_altered_before_the_swap_is_carried_along(project):
    assert "left []" in convert(project, "attach", *CHANGES)
    assert kind(project) == "p"
    assert project.query("SELECT count(*) FROM pg_inherits WHERE inhparent = 'later'::regclass")[0][0] > 1
    assert project.query("SELECT DISTINCT extra FROM shop_order") == [(7,)]
    assert project.query("SELECT n FROM late") == [(200,)]
    assert project.query("SELECT col_description('shop_order'::regclass, attnum) FROM pg_attribute "
        "WHERE attrelid = 'shop_order'::regclass AND attname = 'total'") == [("in cents",)]  # fmt: skip


def test_what_cannot_be_carried_along_is_told_and_can_be_undone(project):
    out = convert(
        project, "attach", "CREATE TABLE payment (order_id bigint REFERENCES shop_order)", fails=True
    )
    assert "was altered since its conversion was begun" in out
    assert "points at it" in out
    assert kind(project) == "r"
    project.execute("DROP TABLE payment")
    project.manage(*COMMAND)
    assert kind(project) == "p"


@pytest.mark.parametrize("stage", ["sync", "swap"])
def test_a_copy_is_not_swapped_for_a_table_with_another_shape(project, stage):
    out = convert(project, "copy", "ALTER TABLE shop_order ADD COLUMN extra int", stage=stage, fails=True)
    assert "was altered since its conversion was begun (columns)" in out
    assert kind(project) == "r"
    project.manage(*COMMAND, "--abort")
    assert project.query("SELECT count(*) FROM pg_class WHERE relname ~ 'shop_order_(new|scaledb)'") == [(0,)]
    convert(project, "copy", "GRANT DELETE ON shop_order TO PUBLIC")
    assert kind(project) == "p"
    assert project.query(
        "SELECT relacl::text ~ '[{,]=[a-z]*d' FROM pg_class WHERE oid = 'shop_order'::regclass"
    ) == [(True,)]
