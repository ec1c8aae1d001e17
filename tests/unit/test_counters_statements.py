"""What the SQL of a fold promises, whatever plan PostgreSQL takes for it."""

from dataclasses import replace

from django_scaledb.counters.definition import Definition, Key, Total, identity_of, literal, quote
from django_scaledb.counters.statements import fold
from django_scaledb.counters.triggers import fingerprint
from django_scaledb.counters.writes import WriteSet

KEYS = (Key("a", "bigint", '"s"."a"', "bigint"), Key("b", "text", '"s"."b"', "text"))
TOTALS = (Total("n", "bigint", "1", "COUNT(*)"),)
COUNTER = Definition("app.Counter", "c", "app.source", "s", ("a", "b"), KEYS, TOTALS)


def test_rows_are_locked_in_the_order_of_their_keys():
    assert "GROUP BY d.k0, d.k1 HAVING SUM(d.t0) <> 0 ORDER BY d.k0, d.k1 ON CONFLICT" in fold(COUNTER, "p")


def test_a_counter_without_groups_has_one_row():
    text = fold(replace(COUNTER, keys=(), columns=()), "p")
    assert 'INSERT INTO "c" ("id", "n") SELECT 1, ' in text
    assert 'ON CONFLICT ("id")' in text


def test_counters_of_one_statement_are_written_in_the_order_of_their_tables():
    other = replace(COUNTER, label="app.Other", table="a_first")
    text = WriteSet((COUNTER, other)).folding("DELETE ..", "o")
    assert text.index('INSERT INTO "a_first"') < text.index('INSERT INTO "c"')
    assert "(SELECT COUNT(*) FROM scaledb_c0) IS NOT NULL" in text


def test_names_and_texts_are_quoted():
    assert quote('a"b') == '"a""b"'
    assert literal("it's") == "'it''s'"
    assert literal("a\\b") == " E'a\\\\b'"
    assert replace(COUNTER, where="x LIKE '%'").escaped.where == "x LIKE '%%'"


def test_a_fingerprint_follows_the_definition():
    assert fingerprint(COUNTER) == fingerprint(replace(COUNTER))
    assert fingerprint(COUNTER) != fingerprint(replace(COUNTER, where="true"))
    assert identity_of("App.Counter") == identity_of("app.counter")
