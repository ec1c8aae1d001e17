"""Everything a table has, read from the catalog into values that can be kept and compared.

Texts that PostgreSQL writes (``pg_get_*def``) are read with an empty search_path, so that every
name in them is whole: they mean the same whoever runs them later.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields, is_dataclass
from typing import Any, Self, get_args, get_type_hints

from django_scaledb.exceptions import DDLError
from django_scaledb.postgres.identifiers import TableName


@dataclass(frozen=True)
class Grant:
    """A privilege; `grantee` None is PUBLIC, `column` None the whole table."""

    grantee: str | None
    privilege: str
    grantable: bool
    column: str | None = None


@dataclass(frozen=True)
class Sequence:
    """A sequence that belongs to a column: of an identity, or of a serial's default."""

    schema: str
    name: str
    identity: bool
    start: int
    increment: int
    minimum: int
    maximum: int
    cache: int
    cycle: bool
    comment: str | None
    grants: tuple[Grant, ...]


@dataclass(frozen=True)
class Column:
    name: str
    type: str
    collation: str | None
    not_null: bool
    default: str | None
    generated: str
    identity: str
    """``a`` (ALWAYS), ``d`` (BY DEFAULT) or nothing."""
    storage: str
    compression: str
    statistics: int | None
    options: tuple[str, ...]
    comment: str | None
    sequence: Sequence | None


@dataclass(frozen=True)
class Index:
    """An index; `definition` begins behind the table's name (`` USING btree (..)``).

    `constraint` is pg_get_constraintdef of the one it stands for, if any; `columns` are the key
    columns, None for an expression, and `included` counts those behind INCLUDE.
    """

    name: str
    definition: str
    columns: tuple[str | None, ...]
    included: int
    is_unique: bool
    is_primary: bool
    is_valid: bool
    is_replica_identity: bool
    is_clustered: bool
    constraint: str | None
    constraint_type: str | None
    constraint_comment: str | None
    options: tuple[str, ...]
    tablespace: str | None
    comment: str | None
    statistics: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Constraint:
    """A CHECK (``c``), a foreign key (``f``) or a NOT NULL (``n``, PostgreSQL 18)."""

    name: str
    type: str
    definition: str
    is_validated: bool
    is_enforced: bool
    no_inherit: bool
    comment: str | None
    target: tuple[str, str] | None = None


@dataclass(frozen=True)
class Trigger:
    """`enabled` is pg_trigger.tgenabled: O, D, R or A."""

    name: str
    definition: str
    enabled: str
    is_row: bool
    is_before: bool
    has_transition_tables: bool
    source: str
    comment: str | None


@dataclass(frozen=True)
class Policy:
    name: str
    permissive: bool
    command: str
    roles: tuple[str | None, ...]
    using: str | None
    check: str | None
    comment: str | None


@dataclass(frozen=True)
class View:
    schema: str
    name: str
    definition: str
    options: tuple[str, ...]
    is_materialized: bool
    may_alter: bool


@dataclass(frozen=True)
class Publication:
    """`columns` None means all of them, also future ones."""

    name: str
    columns: tuple[str, ...] | None
    where: str | None
    via_root: bool
    explicit: bool
    may_alter: bool


@dataclass(frozen=True)
class Statistics:
    schema: str
    name: str
    definition: str
    target: int | None
    comment: str | None


@dataclass(frozen=True)
class Inventory:
    """All that a table has and all that hangs on it; `asdict` and `from_json` keep it as JSON.

    `others` names what depends on the table in a way that no other attribute knows, in the words
    of pg_describe_object.
    """

    schema: str
    name: str
    oid: int
    kind: str
    persistence: str
    owner: str
    role: str
    may_alter: bool
    version: int
    tablespace: str | None
    access_method: str | None
    options: tuple[str, ...]
    row_security: bool
    force_row_security: bool
    replica_identity: str
    comment: str | None
    of_type: bool
    is_partition: bool
    inherits: bool
    rows: int
    pages: int
    bytes: int
    has_acl: bool
    grants: tuple[Grant, ...]
    default_grantees: tuple[str | None, ...]
    columns: tuple[Column, ...]
    indexes: tuple[Index, ...]
    constraints: tuple[Constraint, ...]
    triggers: tuple[Trigger, ...]
    policies: tuple[Policy, ...]
    views: tuple[View, ...]
    publications: tuple[Publication, ...]
    statistics: tuple[Statistics, ...]
    rules: tuple[str, ...]
    incoming: tuple[tuple[str, str, str], ...]
    """Foreign keys to the table: name of the constraint, schema and name of the table it is on."""
    labels: int
    subscriptions: int
    others: tuple[str, ...]

    @property
    def table(self) -> TableName:
        return TableName(self.schema, self.name)

    @property
    def primary_key(self) -> Index | None:
        return next((index for index in self.indexes if index.is_primary), None)

    @property
    def checks(self) -> tuple[Constraint, ...]:
        return tuple(c for c in self.constraints if c.type == "c")

    @property
    def foreign_keys(self) -> tuple[Constraint, ...]:
        return tuple(c for c in self.constraints if c.type == "f")

    def column(self, name: str) -> Column:
        return next(column for column in self.columns if column.name == name)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        return _build(cls, values)  # type: ignore[no-any-return]

    def shape(self) -> dict[str, Any]:
        """What must not change between looking and acting: everything but sizes and who looks."""
        values = self.as_json()
        for name in ("rows", "pages", "bytes", "role", "may_alter"):
            del values[name]
        return values


def _build(kind: Any, value: Any) -> Any:
    """`value`, as JSON has it, with the dataclass that `kind` names put in the place of objects."""
    if isinstance(value, list | tuple):
        return tuple(_build(kind, item) for item in value)
    if not isinstance(value, dict):
        return value
    dataclass_ = _dataclass_in(kind)
    hints = get_type_hints(dataclass_)
    return dataclass_(**{name: _build(hint, value[name]) for name, hint in hints.items() if name in value})


def _dataclass_in(kind: Any) -> Any:
    """The dataclass in a hint such as ``tuple[Grant, ...]`` or ``Sequence | None``."""
    if is_dataclass(kind):
        return kind
    return next((found for inner in get_args(kind) if (found := _dataclass_in(inner))), None)


def read(cursor: Any, table: TableName) -> Inventory:
    """The inventory of `table`; raises `DDLError` when there is no such table.

    Three settings are changed for the reading and set back, so that it can be done in the midst of
    a transaction.
    """
    version: int = cursor.db.pg_version
    cursor.execute(
        "SELECT current_setting('search_path'), current_setting('TimeZone'), current_setting('DateStyle')"
    )
    before = cursor.fetchone()
    _settle(cursor, "", "UTC", "ISO, YMD")
    cursor.execute(_query(version), {"schema": table.schema, "name": table.name})
    row = cursor.fetchone()
    _settle(cursor, *before)
    if row is None:
        raise DDLError(f"there is no table {table}")
    values = json.loads(row[0])
    values["version"] = version
    return Inventory.from_json({k: [] if v is None and k in _LISTS else v for k, v in values.items()})


_LISTS = {f.name for f in fields(Inventory) if str(f.type).startswith("tuple")}


def _settle(cursor: Any, search_path: str, zone: str, style: str) -> None:
    cursor.execute(
        "SELECT set_config('search_path', %s, true), set_config('TimeZone', %s, true), "
        "set_config('DateStyle', %s, true)",
        [search_path, zone, style],
    )


# An ACL as rows; PUBLIC is grantee 0, which has no name. Privileges that the owner has anyway
# (a NULL acl) are written out, so that both spellings compare as equal.
_ACL = """
    SELECT json_agg(json_build_object(
        'grantee', (SELECT rolname FROM pg_roles WHERE oid = e.grantee),
        'privilege', e.privilege_type, 'grantable', e.is_grantable{extra}
    ) ORDER BY {order} (SELECT rolname FROM pg_roles WHERE oid = e.grantee), e.privilege_type)
    FROM {source}
"""


def _query(version: int) -> str:
    table_acl = _ACL.format(
        extra=", 'column', e.attname",
        order="e.attname NULLS FIRST,",
        source="(SELECT NULL::name AS attname, x.* FROM aclexplode(coalesce(c.relacl, acldefault('r', "
        "c.relowner))) x "
        "UNION ALL SELECT a.attname, x.* FROM pg_attribute a, aclexplode(a.attacl) x "
        "WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped) e",
    )
    sequence_acl = _ACL.format(
        extra="",
        order="",
        source="aclexplode(coalesce(s.relacl, acldefault('s', s.relowner))) e",
    )
    return _QUERY.format(
        table_acl=table_acl,
        sequence_acl=sequence_acl,
        enforced="k.conenforced" if version >= 180000 else "true",
        not_null="'n'" if version >= 180000 else "'c'",
        columns=_PUBLISHED_COLUMNS if version >= 150000 else "NULL::json",
        where="pg_get_expr(r.prqual, r.prrelid)" if version >= 150000 else "NULL::text",
        schemas=_PUBLISHED_SCHEMAS if version >= 150000 else "",
    )


_PUBLISHED_COLUMNS = (
    "(SELECT json_agg(a.attname ORDER BY a.attnum) FROM pg_attribute a "
    "WHERE a.attrelid = r.prrelid AND a.attnum = ANY (r.prattrs::int2[]) AND r.prattrs IS NOT NULL)"
)
_PUBLISHED_SCHEMAS = (
    " OR EXISTS (SELECT FROM pg_publication_namespace pn WHERE pn.pnpubid = p.oid "
    "AND pn.pnnspid = c.relnamespace)"
)

_QUERY = """
SELECT json_build_object(
'schema', n.nspname, 'name', c.relname, 'oid', c.oid::int8, 'kind', c.relkind,
'persistence', c.relpersistence, 'owner', pg_get_userbyid(c.relowner), 'role', current_user,
'may_alter', pg_has_role(c.relowner, 'USAGE'),
'tablespace', (SELECT spcname FROM pg_tablespace WHERE oid = c.reltablespace),
'access_method', (SELECT amname FROM pg_am WHERE oid = c.relam),
'options', (
    SELECT json_agg(option ORDER BY option) FROM (
        SELECT unnest(c.reloptions) AS option
        UNION ALL SELECT 'toast.' || unnest(t.reloptions) FROM pg_class t WHERE t.oid = c.reltoastrelid
    ) AS o),
'row_security', c.relrowsecurity, 'force_row_security', c.relforcerowsecurity,
'replica_identity', c.relreplident,
'comment', obj_description(c.oid, 'pg_class'),
'of_type', c.reloftype <> 0, 'is_partition', c.relispartition,
'inherits', EXISTS (SELECT FROM pg_inherits h WHERE h.inhrelid = c.oid)
    OR (c.relkind = 'r' AND EXISTS (SELECT FROM pg_inherits h WHERE h.inhparent = c.oid)),
'rows', greatest(c.reltuples, 0)::int8, 'pages', c.relpages,
'bytes', pg_total_relation_size(c.oid),
'has_acl', c.relacl IS NOT NULL,
'grants', ({table_acl}),
'default_grantees', (
    SELECT json_agg(DISTINCT (SELECT rolname FROM pg_roles WHERE oid = e.grantee))
    FROM pg_default_acl d, aclexplode(d.defaclacl) e
    WHERE d.defaclobjtype = 'r' AND d.defaclnamespace IN (0, c.relnamespace)
        AND d.defaclrole = (SELECT oid FROM pg_roles WHERE rolname = current_user)),
'columns', (
    SELECT json_agg(json_build_object(
        'name', a.attname, 'type', format_type(a.atttypid, a.atttypmod),
        'collation', (SELECT quote_ident(cn.nspname) || '.' || quote_ident(co.collname) FROM pg_collation co
            JOIN pg_namespace cn ON cn.oid = co.collnamespace
            JOIN pg_type ty ON ty.oid = a.atttypid
            WHERE co.oid = a.attcollation AND a.attcollation <> ty.typcollation),
        'not_null', a.attnotnull, 'default', pg_get_expr(d.adbin, d.adrelid),
        'generated', a.attgenerated, 'identity', a.attidentity,
        'storage', a.attstorage, 'compression', a.attcompression,
        'statistics', nullif(a.attstattarget, -1),
        'options', coalesce((SELECT json_agg(o ORDER BY o) FROM unnest(a.attoptions) o), '[]'),
        'comment', col_description(c.oid, a.attnum),
        'sequence', (
            SELECT json_build_object(
                'schema', sn.nspname, 'name', s.relname, 'identity', dep.deptype = 'i',
                'start', q.seqstart, 'increment', q.seqincrement, 'minimum', q.seqmin,
                'maximum', q.seqmax, 'cache', q.seqcache, 'cycle', q.seqcycle,
                'comment', obj_description(s.oid, 'pg_class'),
                'grants', ({sequence_acl}))
            FROM pg_depend dep
            JOIN pg_class s ON s.oid = dep.objid AND s.relkind = 'S'
            JOIN pg_sequence q ON q.seqrelid = s.oid
            JOIN pg_namespace sn ON sn.oid = s.relnamespace
            WHERE dep.classid = 'pg_class'::regclass AND dep.refclassid = 'pg_class'::regclass
                AND dep.refobjid = c.oid AND dep.refobjsubid = a.attnum AND dep.deptype IN ('i', 'a')
            LIMIT 1)
    ) ORDER BY a.attnum)
    FROM pg_attribute a LEFT JOIN pg_attrdef d ON d.adrelid = c.oid AND d.adnum = a.attnum
    WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped),
'indexes', (
    SELECT json_agg(json_build_object(
        'name', i.relname, 'definition', substr(pg_get_indexdef(i.oid), 1 + length(format(
            'CREATE %%sINDEX %%I ON %%s%%I.%%I', CASE WHEN x.indisunique THEN 'UNIQUE ' END, i.relname,
            CASE WHEN c.relkind = 'p' THEN 'ONLY ' END, n.nspname, c.relname))),
        'included', x.indnatts - x.indnkeyatts,
        'columns', (
            SELECT json_agg(a.attname ORDER BY u.ord)
            FROM unnest(x.indkey::int2[]) WITH ORDINALITY AS u (attnum, ord)
            LEFT JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum = u.attnum AND u.attnum <> 0
            WHERE u.ord <= x.indnkeyatts),
        'is_unique', x.indisunique, 'is_primary', x.indisprimary, 'is_valid', x.indisvalid,
        'is_replica_identity', x.indisreplident, 'is_clustered', x.indisclustered,
        'constraint', pg_get_constraintdef(k.oid), 'constraint_type', k.contype,
        'constraint_comment', obj_description(k.oid, 'pg_constraint'),
        'options', coalesce((SELECT json_agg(o ORDER BY o) FROM unnest(i.reloptions) o), '[]'),
        'tablespace', (SELECT spcname FROM pg_tablespace WHERE oid = i.reltablespace),
        'comment', obj_description(i.oid, 'pg_class'),
        'statistics', coalesce((
            SELECT json_agg(json_build_array(a.attnum, a.attstattarget) ORDER BY a.attnum)
            FROM pg_attribute a WHERE a.attrelid = i.oid AND a.attstattarget >= 0), '[]')
    ) ORDER BY i.relname)
    FROM pg_index x JOIN pg_class i ON i.oid = x.indexrelid
    LEFT JOIN pg_constraint k ON k.conindid = i.oid AND k.conrelid = c.oid AND k.contype IN ('p', 'u', 'x')
    WHERE x.indrelid = c.oid),
'constraints', (
    SELECT json_agg(json_build_object(
        'name', k.conname, 'type', k.contype, 'definition', pg_get_constraintdef(k.oid),
        'is_validated', k.convalidated, 'is_enforced', {enforced},
        'no_inherit', k.connoinherit AND k.contype <> 'f',
        'comment', obj_description(k.oid, 'pg_constraint'),
        'target', (SELECT json_build_array(tn.nspname, t.relname) FROM pg_class t
            JOIN pg_namespace tn ON tn.oid = t.relnamespace WHERE t.oid = k.confrelid)
    ) ORDER BY k.contype, k.conname)
    FROM pg_constraint k
    LEFT JOIN pg_constraint parent ON parent.oid = k.conparentid AND parent.conrelid = k.conrelid
    WHERE k.conrelid = c.oid AND k.contype IN ('c', 'f', {not_null}) AND parent.oid IS NULL),
'triggers', (
    SELECT json_agg(json_build_object(
        'name', t.tgname, 'definition', pg_get_triggerdef(t.oid), 'enabled', t.tgenabled,
        'is_row', t.tgtype & 1 <> 0, 'is_before', t.tgtype & 2 <> 0,
        'has_transition_tables', t.tgoldtable IS NOT NULL OR t.tgnewtable IS NOT NULL,
        'source', f.prosrc, 'comment', obj_description(t.oid, 'pg_trigger')
    ) ORDER BY t.tgname)
    FROM pg_trigger t JOIN pg_proc f ON f.oid = t.tgfoid
    WHERE t.tgrelid = c.oid AND NOT t.tgisinternal),
'policies', (
    SELECT json_agg(json_build_object(
        'name', p.polname, 'permissive', p.polpermissive,
        'command', CASE p.polcmd WHEN 'r' THEN 'SELECT' WHEN 'a' THEN 'INSERT' WHEN 'w' THEN 'UPDATE'
            WHEN 'd' THEN 'DELETE' ELSE 'ALL' END,
        'roles', (SELECT json_agg((SELECT rolname FROM pg_roles r WHERE r.oid = u) ORDER BY u)
            FROM unnest(p.polroles) u),
        'using', pg_get_expr(p.polqual, p.polrelid), 'check', pg_get_expr(p.polwithcheck, p.polrelid),
        'comment', obj_description(p.oid, 'pg_policy')
    ) ORDER BY p.polname)
    FROM pg_policy p WHERE p.polrelid = c.oid),
'views', (
    SELECT json_agg(json_build_object(
        'schema', vn.nspname, 'name', v.relname, 'definition', pg_get_viewdef(v.oid),
        'options', coalesce((SELECT json_agg(o ORDER BY o) FROM unnest(v.reloptions) o), '[]'),
        'is_materialized', v.relkind = 'm', 'may_alter', pg_has_role(v.relowner, 'USAGE')
    ) ORDER BY vn.nspname, v.relname)
    FROM pg_class v JOIN pg_namespace vn ON vn.oid = v.relnamespace
    WHERE v.oid IN (
        SELECT w.ev_class FROM pg_depend d JOIN pg_rewrite w ON w.oid = d.objid
        WHERE d.classid = 'pg_rewrite'::regclass AND d.refclassid = 'pg_class'::regclass
            AND d.refobjid = c.oid AND w.rulename = '_RETURN' AND w.ev_class <> c.oid)),
'publications', (
    SELECT json_agg(json_build_object(
        'name', p.pubname, 'columns', {columns}, 'where', {where}, 'via_root', p.pubviaroot,
        'explicit', r.prrelid IS NOT NULL, 'may_alter', pg_has_role(p.pubowner, 'USAGE')
    ) ORDER BY p.pubname)
    FROM pg_publication p LEFT JOIN pg_publication_rel r ON r.prpubid = p.oid AND r.prrelid = c.oid
    WHERE r.prrelid IS NOT NULL OR p.puballtables{schemas}),
'statistics', (
    SELECT json_agg(json_build_object(
        'schema', sn.nspname, 'name', s.stxname, 'definition', pg_get_statisticsobjdef(s.oid),
        'target', nullif(s.stxstattarget, -1), 'comment', obj_description(s.oid, 'pg_statistic_ext')
    ) ORDER BY s.stxname)
    FROM pg_statistic_ext s JOIN pg_namespace sn ON sn.oid = s.stxnamespace WHERE s.stxrelid = c.oid),
'rules', (
    SELECT json_agg(format('%%I on %%s', w.rulename, w.ev_class::regclass) ORDER BY w.rulename)
    FROM pg_rewrite w
    WHERE w.rulename <> '_RETURN' AND (w.ev_class = c.oid OR EXISTS (
        SELECT FROM pg_depend d WHERE d.classid = 'pg_rewrite'::regclass AND d.objid = w.oid
            AND d.refclassid = 'pg_class'::regclass AND d.refobjid = c.oid))),
'incoming', (
    SELECT json_agg(json_build_array(k.conname, fn.nspname, f.relname)
        ORDER BY fn.nspname, f.relname, k.conname)
    FROM pg_constraint k JOIN pg_class f ON f.oid = k.conrelid JOIN pg_namespace fn ON fn.oid = f.relnamespace
    WHERE k.confrelid = c.oid AND k.contype = 'f' AND k.conparentid = 0),
'labels', (SELECT count(*) FROM pg_seclabel WHERE classoid = 'pg_class'::regclass AND objoid = c.oid),
'subscriptions', (SELECT count(*) FROM pg_subscription_rel WHERE srrelid = c.oid),
'others', (
    SELECT json_agg(DISTINCT CASE
        WHEN d.refclassid = 'pg_constraint'::regclass
        THEN 'the primary key, which is needed by ' || pg_describe_object(d.classid, d.objid, d.objsubid)
        ELSE pg_describe_object(d.classid, d.objid, d.objsubid) || ', which depends on the table' END)
    FROM pg_depend d
    WHERE d.refclassid = 'pg_constraint'::regclass AND d.classid = 'pg_rewrite'::regclass
        AND d.refobjid IN (SELECT oid FROM pg_constraint WHERE conrelid = c.oid)
    OR (((d.refclassid = 'pg_class'::regclass AND d.refobjid = c.oid)
            OR (d.refclassid = 'pg_type'::regclass AND d.refobjid IN (
                c.reltype, (SELECT typarray FROM pg_type WHERE oid = c.reltype))))
        AND d.classid NOT IN (
            'pg_rewrite'::regclass, 'pg_constraint'::regclass, 'pg_trigger'::regclass, 'pg_attrdef'::regclass,
            'pg_policy'::regclass, 'pg_publication_rel'::regclass, 'pg_statistic_ext'::regclass)
        AND NOT (d.classid = 'pg_type'::regclass AND d.objid IN (
            c.reltype, (SELECT typarray FROM pg_type WHERE oid = c.reltype)))
        AND NOT (d.classid = 'pg_class'::regclass AND (
            d.objid = c.oid
            OR (SELECT relkind FROM pg_class WHERE oid = d.objid) IN ('i', 'I', 't', 'S')
            OR EXISTS (SELECT FROM pg_inherits h WHERE h.inhrelid = d.objid AND h.inhparent = c.oid)))))
)::text
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE n.nspname = %(schema)s AND c.relname = %(name)s AND c.relkind IN ('r', 'p')
"""
