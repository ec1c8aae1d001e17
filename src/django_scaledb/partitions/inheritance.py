"""What a new partition gets beside what PostgreSQL hands down.

A partitioned table cannot have storage parameters, so they are taken from the partition that was
made last; statistics targets, column options and REPLICA IDENTITY FULL or NOTHING are those of the
partitioned table, which PostgreSQL (14-18) does not pass on either.
"""

from __future__ import annotations

from collections.abc import Iterator

from django.db import models
from django.db.backends.base.base import BaseDatabaseWrapper
from psycopg import sql

from django_scaledb.postgres.identifiers import TableName
from django_scaledb.postgres.statements import Statement

_QUERY = """
WITH last AS (
    SELECT c.oid, c.reloptions, c.reltoastrelid FROM pg_inherits h JOIN pg_class c ON c.oid = h.inhrelid
    WHERE h.inhparent = to_regclass(%(table)s) AND c.relkind = 'r' AND NOT h.inhdetachpending
        -- for relation 0: pg_get_expr then locks no table and waits for nobody
        AND pg_get_expr(c.relpartbound, 0) <> 'DEFAULT'
    ORDER BY c.oid DESC LIMIT 1)
SELECT p.relreplident,
    ARRAY(SELECT unnest(reloptions) FROM last
        UNION ALL SELECT 'toast.' || unnest(t.reloptions)
            FROM last JOIN pg_class t ON t.oid = last.reltoastrelid),
    ARRAY(SELECT json_build_array(attname, nullif(attstattarget, -1), attoptions) FROM pg_attribute
        WHERE attrelid = p.oid AND attnum > 0 AND NOT attisdropped
            AND (coalesce(attstattarget, -1) >= 0 OR attoptions IS NOT NULL) ORDER BY attnum)
FROM pg_class p WHERE p.oid = to_regclass(%(table)s) AND p.relkind = 'p'
"""
_IDENTITIES = {"f": "FULL", "n": "NOTHING"}


def settings(
    connection: BaseDatabaseWrapper, model: type[models.Model], table: TableName
) -> Iterator[Statement]:
    """The statements for `table`, a new partition of the table of `model`."""
    with connection.cursor() as cursor:
        cursor.execute(_QUERY, {"table": connection.ops.quote_name(model._meta.db_table)})
        row = cursor.fetchone()
    if row is None:
        return
    identity, options, columns = row
    alter = sql.SQL("ALTER TABLE {} ").format(table.sql)
    if options:
        # As the catalog has them: names and numbers, no text of anybody's.
        yield Statement(alter + sql.SQL("SET ({})").format(sql.SQL(", ".join(options))))
    for name, target, own in columns:
        column = alter + sql.SQL("ALTER COLUMN {} ").format(sql.Identifier(name))
        if target is not None:
            yield Statement(column + sql.SQL("SET STATISTICS {}").format(sql.Literal(target)))
        if own:
            yield Statement(column + sql.SQL("SET ({})").format(sql.SQL(", ".join(own))))
    if identity in _IDENTITIES:
        yield Statement(alter + sql.SQL("REPLICA IDENTITY {}").format(sql.SQL(_IDENTITIES[identity])))
