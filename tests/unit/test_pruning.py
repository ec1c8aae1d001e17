"""What PostgreSQL's plans say about the partition key."""

from __future__ import annotations

import pytest

from django_scaledb.partitions.pruning import Scan, is_restricted, mentions, scans


def scan(*conditions: str, alias: str = "e_1") -> Scan:
    return Scan("public", "e_jan", alias, 0, conditions, True)


@pytest.mark.parametrize(
    "condition",
    [
        "(e_1.at >= '2026-01-01 00:00:00+00'::timestamp with time zone)",
        "((e_1.at >= '2026-01-01'::date) AND (e_1.size = 5))",
        "((e_1.size = 5) AND (e_1.at < (now() - '7 days'::interval)))",
        '(e_1.at = ANY (\'{"2026-01-01 00:00:00+00","2026-02-01 00:00:00+00"}\'::timestamptz[]))',
        "((e_1.at = '2026-01-01'::date) OR (e_1.at > '2026-03-01'::date))",
        "((e_1.at = '2026-01-01'::date) OR ((e_1.size = 1) AND (e_1.at > '2026-03-01'::date)))",
        "('2026-01-01'::date <= e_1.at)",
        "(e_1.at = (InitPlan 1).col1)",
        "(e_1.at = o.at)",
        "((e_1.name = 'it''s ) AND ('::text) AND (e_1.at = '2026-01-01'::date))",
    ],
)
def test_conditions_that_prune(condition: str) -> None:
    assert is_restricted(scan(condition), "at")
    assert is_restricted(scan("(e_1.size = 5)", condition), "at")


@pytest.mark.parametrize(
    "condition",
    [
        "(e_1.id = 5)",
        "(((e_1.at AT TIME ZONE 'UTC'::text))::date = '2026-02-01'::date)",
        "(date_trunc('month'::text, e_1.at) = '2026-02-01'::date)",
        "((e_1.at >= '2026-01-01'::date) OR (e_1.id = 4))",
        "(ROW(e_1.at, e_1.id) < ROW('2026-02-01'::date, 100))",
        "(e_1.at <> '2026-02-01'::date)",
        "(e_1.at IS NOT NULL)",
        "(e_1.at >= (e_1.made - '1 day'::interval))",
        "(e_1.at_home = '2026-02-01'::date)",
        "(e_2.at = '2026-02-01'::date)",
        "(e_1.name = '(e_1.at = 5)'::text)",
        "((e_1.name = ' AND e_1.at = '::text) OR (e_1.id = 3))",
    ],
)
def test_conditions_that_do_not(condition: str) -> None:
    assert not is_restricted(scan(condition), "at")


def test_names_that_must_be_quoted() -> None:
    quoted = scan('("Odd Table_1"."Made At" >= \'2026-01-01\'::date)', alias="Odd Table_1")
    assert is_restricted(quoted, "Made At")
    assert not is_restricted(quoted, "Made")
    assert mentions(quoted, "Made At") == '"Odd Table_1"."Made At" >= \'2026-01-01\'::date'


def test_what_else_is_said_about_the_key() -> None:
    found = scan("((e_1.size = 5) AND ((e_1.at)::date = '2026-02-01'::date))")
    assert mentions(found, "at") == "((e_1.at)::date = '2026-02-01'::date)"
    assert mentions(scan("(e_1.attic = 5)"), "at") is None


def test_a_plan_is_walked_with_one_reference_for_each_mention() -> None:
    def leaf(name: str, **more: object) -> dict[str, object]:
        return {"Node Type": "Seq Scan", "Relation Name": name, "Schema": "public", "Alias": name, **more}

    def append(*names: str) -> dict[str, object]:
        members = [leaf(name, **{"Parent Relationship": "Member"}) for name in names]
        return {"Node Type": "Append", "Plans": members}

    plan = {
        "Node Type": "ModifyTable",
        "Relation Name": "e",
        "Plans": [{"Node Type": "Hash Join", "Plans": [append("e_1", "e_2"), append("e_1"), leaf("o")]}],
    }
    found = scans(plan)
    assert [(s.table, s.was_run) for s in found] == [(n, True) for n in ("e_1", "e_2", "e_1", "o")]
    assert found[0].reference == found[1].reference
    assert len({s.reference for s in found}) == 3
    assert not scans(leaf("e_1", **{"Actual Loops": 0}))[0].was_run
