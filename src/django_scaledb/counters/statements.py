"""The SQL that counts, compares and applies (pure): text out of a `Definition`, never run here.

A *relation* is SQL that can stand behind FROM. Rows of the source become *raw groups* (columns
``k0..``, ``t0..``; a span's key is still the row's own foreign key), following the spans makes
them *groups*, and groups are added to the counter's rows in the order of their keys.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache

from django_scaledb.counters.definition import Definition, Hop, Key, literal, quote
from django_scaledb.counters.deltas import HopName, Number, RawKey

OWN_SNAPSHOT = "current_setting('transaction_isolation') NOT IN ('read committed', 'read uncommitted')"
"""Whether what others commit stays unseen until this transaction ends."""

Former = Mapping[HopName, str]
"""Relations ``(pk, v)`` with what changed parents said before this transaction."""


def raw_groups(definition: Definition, relation: str, condition: str | None = None) -> str:
    """``SELECT k0.., t0..`` of the rows in `relation`, grouped; `condition` narrows them further."""
    keys = [f"{key.raw} AS k{i}" for i, key in enumerate(definition.keys)]
    totals = [f"{total.aggregate} AS t{i}" for i, total in enumerate(definition.totals)]
    conditions = [f"({c})" for c in (definition.where, condition) if c]
    text = f"SELECT {', '.join(keys + totals)} FROM {relation} {definition.alias}"
    if conditions:
        text += f" WHERE {' AND '.join(conditions)}"
    if keys:
        text += f" GROUP BY {', '.join(str(i + 1) for i in range(len(keys)))}"
    return text


def _hop_relation(hop: Hop, former: Former | None) -> str:
    """The step's table as ``(pk, v)``: as it is now, or with `former` values put back."""
    now = f"SELECT n.{quote(hop.pk)} AS pk, n.{quote(hop.value)} AS v FROM {quote(hop.table)} n"
    changed = (former or {}).get((hop.table, hop.value))
    if changed is None:
        return f"({now})"
    return (
        f"({now} WHERE NOT EXISTS (SELECT FROM {changed} f WHERE f.pk = n.{quote(hop.pk)}) "
        f"UNION ALL SELECT f.pk, f.v FROM {changed} f)"
    )


def _followed(definition: Definition, relation: str, former: Former | None, sign: str = "") -> str:
    """``SELECT k0.., t0..`` with each span followed to its end (NULL where a parent is missing)."""
    joins: list[str] = []
    keys: list[str] = []
    for i, key in enumerate(definition.keys):
        at = f"g.k{i}"
        for j, hop in enumerate(key.hops):
            name = f"h{i}_{j}"
            joins.append(f"LEFT JOIN {_hop_relation(hop, former)} {name} ON {name}.pk = {at}")
            at = f"{name}.v"
        keys.append(f"{at} AS k{i}")
    totals = [f"{sign}g.t{i} AS t{i}" for i in range(len(definition.totals))]
    return f"SELECT {', '.join(keys + totals)} FROM {relation} g {' '.join(joins)}".rstrip()


def groups(definition: Definition, relation: str, condition: str | None = None) -> str:
    """``SELECT k0.., t0..`` of the rows in `relation`, grouped by the counter's real keys."""
    raw = raw_groups(definition, relation, condition)
    if not definition.hops:
        return raw
    keys = [f"k{i}" for i in range(len(definition.keys))]
    totals = [f"SUM(t{i}) AS t{i}" for i in range(len(definition.totals))]
    return (
        f"SELECT {', '.join(keys + totals)} FROM ({_followed(definition, f'({raw})', None)}) s "
        f"GROUP BY {', '.join(keys)}"
    )


def changes(definition: Definition, number: int, sign: int, relation: str) -> str:
    """Raw groups in one shape for all counters: ``(number, sign, keys text[], totals numeric[])``."""
    keys = ", ".join(f"k{i}::text" for i in range(len(definition.keys)))
    totals = ", ".join(f"t{i}::numeric" for i in range(len(definition.totals)))
    return (
        f"SELECT {number}, {sign}, ARRAY[{keys}]::text[], ARRAY[{totals}] "
        f"FROM ({raw_groups(definition, relation)}) c"
    )


def pending_relation(definition: Definition, source: str) -> str:
    """Typed raw groups from `source`, which gives text columns ``k0..`` and numeric ``t0..``."""
    keys = [f"p.k{i}::{key.raw_type} AS k{i}" for i, key in enumerate(definition.keys)]
    totals = [f"p.t{i}" for i in range(len(definition.totals))]
    return f"(SELECT {', '.join(keys + totals)} FROM {source})"


def unnested(definition: Definition) -> str:
    """A source for `pending_relation` out of one array parameter per key and total."""
    names = [f"k{i}" for i in range(len(definition.keys))] + [f"t{i}" for i in range(len(definition.totals))]
    arrays = ["%s::text[]"] * len(definition.keys) + ["%s::numeric[]"] * len(definition.totals)
    return f"unnest({', '.join(arrays)}) p({', '.join(names)})"


def former_relation(hop: Hop) -> str:
    """Former values of a step out of two array parameters: primary keys and values."""
    return (
        f"SELECT f.pk::{hop.pk_type} AS pk, f.v::{hop.value_type} AS v "
        "FROM unnest(%s::text[], %s::text[]) f(pk, v)"
    )


def unchanged(definition: Definition, pending: str) -> list[str]:
    """Queries that fail with 40001 where the snapshot is older than a parent's last change.

    Only with snapshots that last for a transaction: READ COMMITTED looks parents up in a newer one
    than any change it has waited for. `pending` is a relation of raw groups. Run it behind the
    advisory lock: whoever is changing a parent now, and is passed over, comes after us.
    """
    queries = []
    for i, key in enumerate(definition.keys):
        values = f"SELECT g.k{i} FROM {pending} g"
        for hop in key.hops:
            pk, table = quote(hop.pk), quote(hop.table)
            queries.append(
                f"SELECT 1 FROM {table} n WHERE {OWN_SNAPSHOT} AND n.{pk} IN ({values}) "
                "FOR SHARE OF n SKIP LOCKED"
            )
            values = f"SELECT b.{quote(hop.value)} FROM {table} b WHERE b.{pk} IN ({values})"
    return list(dict.fromkeys(queries))


def _affected(key: Key, former: Former) -> list[str]:
    """Conditions under which a source row's span leads through a changed parent."""
    found = []
    for j, hop in enumerate(key.hops):
        if (hop.table, hop.value) not in former:
            continue
        condition = f"IN (SELECT pk FROM {former[hop.table, hop.value]})"
        for before in reversed(key.hops[:j]):
            condition = (
                f"IN (SELECT {quote(before.pk)} FROM {quote(before.table)} "
                f"WHERE {quote(before.value)} {condition})"
            )
        found.append(f"{key.raw} {condition}")
    return found


def _deltas(definition: Definition, pending: str, former: Former | None) -> tuple[list[str], list[str]]:
    """CTEs, and the SELECTs of ``k0.., t0..`` that together are what a transaction changes.

    Own deltas are booked where the others still see changed parents; then all rows below such a
    parent move from its former key to the present one.
    """
    ctes, names = [f"pending AS MATERIALIZED {pending}"], {}
    for i, (hop, query) in enumerate((former or {}).items()):
        ctes.append(f"former{i} AS MATERIALIZED ({query})")
        names[hop] = f"former{i}"
    parts = [_followed(definition, "pending", names)]
    if names:
        affected = [c for key in definition.keys for c in _affected(key, names)]
        moved = raw_groups(definition, quote(definition.source_table), " OR ".join(affected))
        ctes.append(f"moved AS MATERIALIZED ({moved})")
        parts.append(_followed(definition, "moved", names, sign="-"))
        parts.append(_followed(definition, "moved", None))
    return ctes, parts


def fold(definition: Definition, pending: str, former: Former | None = None) -> str:
    """Add `pending` (a relation of raw groups) to the counter, one row per key, in key order.

    `former` holds, for each step of a span that this transaction changed, a SELECT of ``(pk, v)``
    as it was before. Locks rows in the order of their keys, so that two folds never wait for each
    other.
    """
    n, m = len(definition.keys), len(definition.totals)
    ctes, parts = _deltas(definition, pending, former)
    columns = [quote(key.column) for key in definition.keys] + [quote(t.column) for t in definition.totals]
    values = [f"d.k{i}::{key.type}" for i, key in enumerate(definition.keys)]
    values += [f"SUM(d.t{i})::{total.type}" for i, total in enumerate(definition.totals)]
    target = ", ".join(quote(key.column) for key in definition.keys)
    order = ", ".join(f"d.k{i}" for i in range(n))
    if not n:
        columns, values, target = ['"id"', *columns], ["1", *values], '"id"'
    changed = " OR ".join(f"SUM(d.t{i}) <> 0" for i in range(m))
    table = quote(definition.table)
    sets = ", ".join(
        f"{quote(t.column)} = {table}.{quote(t.column)} + EXCLUDED.{quote(t.column)}"
        for t in definition.totals
    )
    return (
        f"WITH {', '.join(ctes)} INSERT INTO {table} ({', '.join(columns)}) "
        f"SELECT {', '.join(values)} FROM ({' UNION ALL '.join(parts)}) d "
        f"{f'GROUP BY {order} ' if n else ''}HAVING {changed}{f' ORDER BY {order}' if n else ''} "
        f"ON CONFLICT ({target}) DO UPDATE SET {sets}"
    )


@lru_cache(maxsize=1024)
def _around_one(definition: Definition) -> tuple[str, str, tuple[str, ...], tuple[str, ...]]:
    """What stands before and behind the values in `fold_one`, the key's casts and the totals' types."""
    keys, totals = definition.keys, definition.totals
    columns = [quote(key.column) for key in keys] or ['"id"']
    table = quote(definition.table)
    sets = ", ".join(
        f"{quote(t.column)} = {table}.{quote(t.column)} + EXCLUDED.{quote(t.column)}" for t in totals
    )
    casts = (f"::{k.raw_type}" if k.raw_type == k.type else f"::{k.raw_type}::{k.type}" for k in keys)
    return (
        f"INSERT INTO {table} ({', '.join([*columns, *(quote(t.column) for t in totals)])}) VALUES (",
        f") ON CONFLICT ({', '.join(columns)}) DO UPDATE SET {sets}",
        tuple(casts),
        tuple(total.type for total in totals),
    )


def fold_one(definition: Definition, key: RawKey, amounts: Sequence[Number]) -> str:
    """`fold` for a single key without spans, its values written into it.

    What most transactions write. Planning this takes a fraction of what planning the other takes,
    and every transaction plans anew.
    """
    return fold_values(
        definition,
        ["NULL" if value is None else literal(value) for value in key],
        [str(amount) if type(amount) is int else f"'{amount}'::numeric" for amount in amounts],
    )


def fold_values(definition: Definition, key: Sequence[str], amounts: Sequence[str]) -> str:
    """The same, with SQL for each of the key's values (as text) and for each amount."""
    before, behind, casts, types = _around_one(definition)
    values = [f"({value}){cast}" for value, cast in zip(key, casts, strict=True)] or ["1"]
    values += [f"({amount})::{kind}" for amount, kind in zip(amounts, types, strict=True)]
    return f"{before}{', '.join(values)}{behind}"


def pending_for_key(definition: Definition, pending: str, former: Former | None = None) -> str:
    """What is pending for one key: one column per total; the last parameters are the key's values."""
    ctes, parts = _deltas(definition, pending, former)
    sums = ", ".join(f"SUM(t{i})" for i in range(len(definition.totals)))
    text = f"WITH {', '.join(ctes)} SELECT {sums} FROM ({' UNION ALL '.join(parts)}) s"
    if definition.keys:
        text += " WHERE " + " AND ".join(
            f"k{i} IS NOT DISTINCT FROM %s::{key.type}" for i, key in enumerate(definition.keys)
        )
    return text


def drift(definition: Definition, expected: Sequence[str], stored_condition: str | None = None) -> str:
    """Keys whose stored totals are not what the relations in `expected` come to, both side by side.

    Columns: ``k0..``, then expected ``e0..``, then stored ``s0..``; every group that differs is a
    row. One statement, hence one snapshot: writers commit a row and its delta together, so none of
    them is ever seen halfway.
    """
    n, m = len(definition.keys), len(definition.totals)
    keys = [f"k{i}" for i in range(n)]
    counted = ", ".join([*keys, *(f"t{i} AS e{i}" for i in range(m)), *(f"0 AS s{i}" for i in range(m))])
    parts = [f"SELECT {counted} FROM ({query}) x" for query in expected]
    stored = ", ".join(
        [
            *(f"{quote(key.column)}::{key.type}" for key in definition.keys),
            *("0" for _ in range(m)),
            *(quote(total.column) for total in definition.totals),
        ]
    )
    own = f"SELECT {stored} FROM {quote(definition.table)}"
    if stored_condition:
        own += f" WHERE {stored_condition}"
    sums = [f"SUM(e{i})" for i in range(m)] + [f"SUM(s{i})" for i in range(m)]
    differs = " OR ".join(f"SUM(e{i}) <> SUM(s{i})" for i in range(m))
    names = [f"e{i}" for i in range(m)] + [f"s{i}" for i in range(m)]
    outer = ", ".join([*keys, *(f"{s} AS {name}" for s, name in zip(sums, names, strict=True))])
    text = f"SELECT {outer} FROM ({' UNION ALL '.join([*parts, own])}) u"
    if keys:
        text += f" GROUP BY {', '.join(keys)}"
    text += f" HAVING {differs}"
    if keys:
        text += f" ORDER BY {', '.join(keys)}"
    return text
