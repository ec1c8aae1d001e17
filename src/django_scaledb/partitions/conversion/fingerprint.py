"""Whether a table, or anything that hangs on it, was altered between two moments.

An inventory says what is different, but reading one takes tens of milliseconds: too long while
everybody waits for the table. Whatever DDL changes leaves a new version of a row in the catalog,
and its `xmin` tells; VACUUM, ANALYZE and nextval() do not.
"""

from __future__ import annotations

from typing import Any

from django_scaledb.postgres.identifiers import TableName

# A publication of all tables, or of a schema, names no table.
_PUBLISHED_SCHEMAS = "UNION ALL SELECT n.tableoid, n.oid, n.xmin FROM pg_publication_namespace n"

_QUERY = """
WITH relation AS MATERIALIZED (
    SELECT c.oid FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
    WHERE n.nspname = %(schema)s AND c.relname = %(name)s AND c.relkind IN ('r', 'p')
), dependent AS MATERIALIZED (
    SELECT d.tableoid AS classid, d.classid AS kind, d.objid, d.xmin
    FROM pg_depend d JOIN relation r ON d.refobjid = r.oid AND d.refclassid = 'pg_class'::regclass
), part AS MATERIALIZED (
    SELECT oid FROM relation
    UNION SELECT objid FROM dependent WHERE kind = 'pg_class'::regclass
    UNION SELECT indexrelid FROM pg_index x JOIN relation r ON x.indrelid = r.oid
    UNION SELECT w.ev_class FROM dependent d JOIN pg_rewrite w ON w.oid = d.objid
        WHERE d.kind = 'pg_rewrite'::regclass
    UNION SELECT c.reltoastrelid FROM pg_class c JOIN relation r USING (oid) WHERE c.reltoastrelid <> 0
), version AS (
    SELECT classid AS class, objid AS object, xmin AS at FROM dependent
    UNION ALL SELECT t.tableoid, t.oid, t.xmin FROM pg_class t JOIN part p USING (oid)
    UNION ALL SELECT t.tableoid, attnum::int::oid, t.xmin FROM pg_attribute t JOIN part p ON p.oid = attrelid
    UNION ALL SELECT t.tableoid, t.oid, t.xmin FROM pg_attrdef t JOIN relation r ON adrelid = r.oid
    UNION ALL SELECT t.tableoid, indexrelid, t.xmin FROM pg_index t JOIN relation r ON indrelid = r.oid
    UNION ALL SELECT t.tableoid, t.oid, t.xmin FROM pg_constraint t JOIN relation r ON conrelid = r.oid
    UNION ALL SELECT t.tableoid, t.oid, t.xmin FROM pg_trigger t JOIN relation r ON tgrelid = r.oid
    UNION ALL SELECT f.tableoid, f.oid, f.xmin FROM pg_trigger t JOIN relation r ON tgrelid = r.oid
        JOIN pg_proc f ON f.oid = tgfoid WHERE NOT tgisinternal
    UNION ALL SELECT t.tableoid, t.oid, t.xmin FROM pg_policy t JOIN relation r ON polrelid = r.oid
    UNION ALL SELECT t.tableoid, t.oid, t.xmin FROM pg_statistic_ext t JOIN relation r ON stxrelid = r.oid
    UNION ALL SELECT t.tableoid, t.oid, t.xmin FROM pg_publication_rel t JOIN relation r ON prrelid = r.oid
    UNION ALL SELECT t.tableoid, t.oid, t.xmin FROM pg_publication t
    UNION ALL SELECT t.tableoid, t.oid, t.xmin FROM pg_rewrite t JOIN part p ON p.oid = ev_class
    UNION ALL SELECT t.tableoid, seqrelid, t.xmin FROM pg_sequence t JOIN part p ON p.oid = seqrelid
    UNION ALL SELECT t.tableoid, inhrelid, t.xmin FROM pg_inherits t
        JOIN relation r ON r.oid IN (inhrelid, inhparent)
    UNION ALL SELECT t.tableoid, srsubid, t.xmin FROM pg_subscription_rel t JOIN relation r ON srrelid = r.oid
    {schemas}
), spoken AS (
    SELECT * FROM version
    UNION ALL SELECT s.tableoid, s.objoid, s.xmin FROM pg_description s JOIN (
        SELECT DISTINCT class, object FROM version) v ON s.classoid = v.class AND s.objoid = v.object
    UNION ALL SELECT s.tableoid, s.objoid, s.xmin FROM pg_seclabel s JOIN relation r ON s.objoid = r.oid
)
SELECT count(*) || ' ' || md5(string_agg(
    concat_ws(' ', class::oid, object, at), ',' ORDER BY class, object, at::text))
FROM spoken
"""


def read(cursor: Any, table: TableName) -> str:
    """The versions of all rows of the catalog that describe `table`, as one short text."""
    schemas = _PUBLISHED_SCHEMAS if cursor.db.pg_version >= 150000 else ""
    cursor.execute(_QUERY.format(schemas=schemas), {"schema": table.schema, "name": table.name})
    return str(cursor.fetchone()[0])
