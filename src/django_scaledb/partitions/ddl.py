"""From an action to the SQL that does it (pure): steps with the locks that PostgreSQL takes.

The locks are those measured in pg_locks on PostgreSQL 15 and 18; a test measures them again.
Locks on a table that a step itself makes are left out: nobody else can see it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from psycopg import sql

from django_scaledb.partitions.bounds import Range
from django_scaledb.partitions.catalog import Member, PartitionSet
from django_scaledb.partitions.config import PartitionConfig
from django_scaledb.partitions.marker import Marker, MarkState
from django_scaledb.postgres.identifiers import TableName
from django_scaledb.postgres.locks import Lock, LockMode
from django_scaledb.postgres.statements import Statement, Step

_BOUNDS_CHECK = sql.Identifier("django_scaledb_bounds")

# Not IDENTITY: PostgreSQL 17 and later refuse to attach a table that has its own. Not INDEXES: those
# that ATTACH makes belong to the parent's.
_LIKE = sql.SQL(
    "CREATE TABLE {} (LIKE {} INCLUDING DEFAULTS INCLUDING CONSTRAINTS INCLUDING GENERATED "
    "INCLUDING STORAGE INCLUDING COMPRESSION INCLUDING COMMENTS INCLUDING STATISTICS{}"
)


def create(
    parent: PartitionSet,
    config: PartitionConfig,
    wanted: Range,
    table: TableName,
    *,
    moving: Sequence[Statement] = (),
    beside: Sequence[Statement] = (),
) -> Step:
    """Make `table` and attach it for `wanted`, in one transaction.

    The parent stays readable and writable: ``PARTITION OF`` would take ACCESS EXCLUSIVE on it.
    `moving` are the statements of `move_from_default`, which run before the table is attached;
    `beside` are those of other features, which run behind them.
    """
    check = sql.SQL("ALTER TABLE {} ADD CONSTRAINT {} CHECK ({})").format(
        table.sql, _BOUNDS_CHECK, wanted.check(config.column, config.key_kind)
    )
    uncheck = sql.SQL("ALTER TABLE {} DROP CONSTRAINT {}").format(table.sql, _BOUNDS_CHECK)
    marker = Marker(MarkState.ATTACHED, parent.table, wanted)
    return Step(
        f"create partition {table}",
        (
            *_make(parent, table),
            Statement(check),
            *moving,
            *beside,
            _attach(parent, table, wanted.for_values(config.key_kind)),
            Statement(uncheck),
            Statement(marker.comment_on(table.sql)),
        ),
        nowait=_attach_locks(parent),
    )


def create_default(parent: PartitionSet, table: TableName, *, beside: Sequence[Statement] = ()) -> Step:
    """Make `table` and attach it as the default partition."""
    marker = Marker(MarkState.ATTACHED, parent.table)
    return Step(
        f"create default partition {table}",
        (
            *_make(parent, table),
            *beside,
            _attach(parent, table, sql.SQL("DEFAULT")),
            Statement(marker.comment_on(table.sql)),
        ),
        nowait=_attach_locks(parent),
    )


def move_from_default(
    parent: PartitionSet,
    table: TableName,
    wanted: Range,
    config: PartitionConfig,
    columns: Sequence[str],
    triggers: Sequence[str],
) -> tuple[Statement, ...]:
    """Move the rows of `wanted` out of the default partition into `table`, which is not attached yet.

    To the set nothing happens to these rows, so `triggers`, which would see them deleted, are
    switched off meanwhile. A row that a foreign key points at cannot be moved (PostgreSQL looks
    for it in the default partition only): the step fails, and nothing was changed.
    """
    default = parent.default
    assert default is not None
    lock = (Lock(default.table, LockMode.ACCESS_EXCLUSIVE),)
    names = sql.SQL(", ").join(map(sql.Identifier, columns))
    move = sql.SQL(
        "WITH moved AS (DELETE FROM {} WHERE {} RETURNING *) INSERT INTO {} ({}) SELECT {} FROM moved"
    ).format(default.table.sql, wanted.check(config.column, config.key_kind), table.sql, names, names)

    def switch(how: str) -> list[Statement]:
        text = sql.SQL("ALTER TABLE {} {} TRIGGER {}")
        return [
            Statement(text.format(default.table.sql, sql.SQL(how), sql.Identifier(name)), lock)
            for name in triggers
        ]

    # A check that is still deferred would keep the triggers from being switched on again.
    checks = [Statement(sql.SQL("SET CONSTRAINTS ALL IMMEDIATE"))] if parent.referenced_by else []
    return (*switch("DISABLE"), Statement(move, lock), *checks, *switch("ENABLE"))


def mark_retiring(parent: PartitionSet, partition: Member, bounds: Range | None) -> Step:
    """Write down that we are about to take `partition` off: should we die, the next run knows."""
    marker = Marker(MarkState.RETIRING, parent.table, bounds)
    lock = Lock(partition.table, LockMode.SHARE_UPDATE_EXCLUSIVE)
    return Step(
        f"mark partition {partition.table} as retiring",
        (Statement(marker.comment_on(partition.table.sql), (lock,)),),
    )


def detach(parent: PartitionSet, partition: Member, bounds: Range | None) -> Step:
    """Take `partition` off the set, in the way that stands in nobody's way.

    PostgreSQL refuses CONCURRENTLY as long as there is a default partition. Then it is a plain
    DETACH, which has the set for itself for some milliseconds; it takes its mark along.
    """
    statement = _DETACH.format(parent.table.sql, partition.table.sql, sql.SQL(""))
    if parent.default is None:
        statement = _DETACH.format(parent.table.sql, partition.table.sql, sql.SQL(" CONCURRENTLY"))
        return _detaching(f"detach partition {partition.table}", parent, partition, statement)
    whole = LockMode.ACCESS_EXCLUSIVE
    locks = (
        Lock(parent.table, whole),
        Lock(partition.table, whole),
        Lock(parent.default.table, whole),
        *_key_locks(parent),
    )
    marker = Marker(MarkState.RETIRING, parent.table, bounds)
    return Step(
        f"detach partition {partition.table}",
        (
            Statement(statement, locks),
            Statement(marker.comment_on(partition.table.sql), (Lock(partition.table, whole),)),
        ),
        nowait=locks,
    )


def finalize(parent: PartitionSet, partition: Member) -> Step:
    """Finish an interrupted DETACH CONCURRENTLY; it waits for old snapshots, so nothing else is locked."""
    statement = _DETACH.format(parent.table.sql, partition.table.sql, sql.SQL(" FINALIZE"))
    return _detaching(f"finish the detach of partition {partition.table}", parent, partition, statement)


def release(partition: Member, foreign_keys: Sequence[tuple[str, TableName]]) -> Step:
    """Free a table that has left the set of its foreign keys.

    A row that such a key points at could not be deleted, because of a table that nobody sees. This
    locks their targets, and therefore does nothing else.
    """
    own = Lock(partition.table, LockMode.ACCESS_EXCLUSIVE)
    drops = []
    for name, target in foreign_keys:
        query = sql.SQL("ALTER TABLE {} DROP CONSTRAINT {}").format(partition.table.sql, sql.Identifier(name))
        drops.append(Statement(query, (own, Lock(target, LockMode.ACCESS_EXCLUSIVE))))
    strong = dict.fromkeys(lock for statement in drops for lock in statement.locks)
    return Step(
        f"drop the foreign keys of detached table {partition.table}", tuple(drops), nowait=tuple(strong)
    )


def settle(
    parent: PartitionSet,
    partition: Member,
    bounds: Range | None,
    now: datetime,
    *,
    beside: Sequence[Statement] = (),
) -> Step:
    """Mark the detached table as such: its grace period begins.

    `beside` are the statements of other features that account for its rows, once. The CHECK that
    DETACH CONCURRENTLY leaves stays: it spares the scan when the table is attached again.
    """
    marker = Marker(MarkState.DETACHED, parent.table, bounds, now)
    comment = Statement(
        marker.comment_on(partition.table.sql), (Lock(partition.table, LockMode.SHARE_UPDATE_EXCLUSIVE),)
    )
    return Step(f"settle detached table {partition.table}", (*beside, comment))


def drop(partition: Member, *, beside: Sequence[Statement] = ()) -> Step:
    """Drop a table that was taken off; never CASCADE: what somebody built on it since is respected."""
    lock = Lock(partition.table, LockMode.ACCESS_EXCLUSIVE)
    return Step(
        f"drop detached table {partition.table}",
        (Statement(sql.SQL("DROP TABLE {}").format(partition.table.sql), (lock,)), *beside),
        nowait=(lock,),
    )


def mark(table: TableName, marker: Marker, *, beside: Sequence[Statement] = ()) -> Step:
    """Mark a table anew, and run `beside` in the same transaction."""
    lock = Lock(table, LockMode.SHARE_UPDATE_EXCLUSIVE)
    return Step(
        f"mark {table} as {marker.state.value}", (*beside, Statement(marker.comment_on(table.sql), (lock,)))
    )


# -- bringing back


@dataclass(frozen=True)
class Filled:
    """A column that rows from before it are given: `value` is SQL, or None where it is NULL."""

    name: str
    type: str
    not_null: bool
    value: sql.Composable | None


def make_standalone(
    parent: PartitionSet,
    config: PartitionConfig,
    wanted: Range,
    table: TableName,
    archive: int | None,
    filled: Sequence[Filled],
    *,
    beside: Sequence[Statement] = (),
) -> Step:
    """Make `table` as a partition for `wanted` would be, with its indexes, and mark it as being loaded.

    ATTACH adopts the indexes, and the CHECK spares it the scan. `filled` are the columns that the
    rows to be loaded do not have; `beside` the settings that the table is to have of its siblings.
    """
    check = sql.SQL("ALTER TABLE {} ADD CONSTRAINT {} CHECK ({})").format(
        table.sql, _BOUNDS_CHECK, wanted.check(config.column, config.key_kind)
    )
    default = sql.SQL("ALTER TABLE {} ALTER COLUMN {} SET DEFAULT {}")
    marker = Marker(MarkState.LOADING, parent.table, wanted, archive=archive)
    return Step(
        f"make {table}",
        (
            *_make(parent, table, indexes=True),
            *beside,
            Statement(check),
            *(
                Statement(default.format(table.sql, sql.Identifier(column.name), column.value))
                for column in filled
                if column.value is not None
            ),
            Statement(marker.comment_on(table.sql)),
        ),
    )


def loaded(
    parent: PartitionSet, config: PartitionConfig, wanted: Range, table: TableName, filled: Sequence[Filled]
) -> Step:
    """Mark a table whose rows are verified; what it was filled with is no default of the model's."""
    lock = Lock(table, LockMode.ACCESS_EXCLUSIVE)
    drop = sql.SQL("ALTER TABLE {} ALTER COLUMN {} DROP DEFAULT")
    marker = Marker(MarkState.RESTORING, parent.table, wanted)
    return Step(
        f"mark {table} as loaded",
        (
            *(
                Statement(drop.format(table.sql, sql.Identifier(column.name)), (lock,))
                for column in filled
                if column.value is not None
            ),
            Statement(marker.comment_on(table.sql), (lock,)),
        ),
        nowait=(lock,),
    )


def return_detached(
    parent: PartitionSet, member: Member, bounds: Range, filled: Sequence[Filled], dropped: Sequence[str]
) -> Step:
    """Mark a detached table as on its way back, with the columns that its set has got meanwhile."""
    table = member.table
    lock = Lock(table, LockMode.ACCESS_EXCLUSIVE)
    alter = sql.SQL("ALTER TABLE {} ").format(table.sql)
    queries: list[sql.Composable] = [
        alter + sql.SQL("DROP COLUMN {}").format(sql.Identifier(name)) for name in dropped
    ]
    for column in filled:
        name = sql.Identifier(column.name)
        query = alter + sql.SQL("ADD COLUMN {} {}").format(name, sql.SQL(column.type))
        if column.value is not None:
            query += sql.SQL(" DEFAULT {}").format(column.value)
        queries.append(query + sql.SQL(" NOT NULL" if column.not_null else ""))
        if column.value is not None:
            queries.append(alter + sql.SQL("ALTER COLUMN {} DROP DEFAULT").format(name))
    marker = Marker(MarkState.RESTORING, parent.table, bounds)
    return Step(
        f"mark {table} as on its way back",
        tuple(Statement(query, (lock,)) for query in (*queries, marker.comment_on(table.sql))),
        nowait=(lock,),
    )


def add_foreign_key(table: TableName, name: str, target: TableName, definition: str) -> Step:
    """A foreign key whose rows are not looked at yet: milliseconds, whatever is in the table."""
    locks = tuple(Lock(t, LockMode.SHARE_ROW_EXCLUSIVE) for t in dict.fromkeys((table, target)))
    query = sql.SQL("ALTER TABLE {} ADD CONSTRAINT {} {} NOT VALID").format(
        table.sql, sql.Identifier(name), sql.SQL(definition)
    )
    return Step(f"add the foreign key {name} to {table}", (Statement(query, locks),), nowait=locks)


def validate_foreign_key(table: TableName, name: str, target: TableName) -> Step:
    """The scan, while readers and writers of the target go on."""
    locks = (Lock(table, LockMode.SHARE_UPDATE_EXCLUSIVE), Lock(target, LockMode.ROW_SHARE))
    query = sql.SQL("ALTER TABLE {} VALIDATE CONSTRAINT {}").format(table.sql, sql.Identifier(name))
    return Step(f"validate the foreign key {name} of {table}", (Statement(query, locks),))


def analyze(table: TableName, *, only: bool = False) -> Step:
    """Statistics; with `only` of a partitioned table without its partitions (PostgreSQL 18)."""
    lock = Lock(table, LockMode.SHARE_UPDATE_EXCLUSIVE)
    query = sql.SQL("ANALYZE ONLY {}" if only else "ANALYZE {}").format(table.sql)
    return Step(f"analyze {table}", (Statement(query, (lock,)),))


def attach(
    parent: PartitionSet,
    config: PartitionConfig,
    wanted: Range,
    table: TableName,
    now: datetime,
    *,
    beside: Sequence[Statement] = (),
    after: Sequence[Statement] = (),
) -> Step:
    """Put a table that was made or kept for this back onto the set, where retention leaves it alone.

    It has the set's foreign keys already; to adopt one, PostgreSQL takes ACCESS EXCLUSIVE on its
    target, for milliseconds. `beside` are the statements of other features: they may take long, so
    they run first, and the strong locks are then not asked for in advance.
    """
    strongest = {lock.table: lock.mode for lock in _attach_locks(parent)}
    strongest |= dict.fromkeys(parent.references, LockMode.ACCESS_EXCLUSIVE)
    strong = tuple(Lock(other, mode, in_advance=not beside) for other, mode in strongest.items())
    own = Lock(table, LockMode.ACCESS_EXCLUSIVE)
    query = _ATTACH.format(parent.table.sql, table.sql, wanted.for_values(config.key_kind))
    uncheck = sql.SQL("ALTER TABLE {} DROP CONSTRAINT IF EXISTS {}").format(table.sql, _BOUNDS_CHECK)
    return Step(
        f"attach partition {table}",
        (
            *beside,
            Statement(query, (Lock(parent.table, LockMode.SHARE_UPDATE_EXCLUSIVE), own, *strong)),
            Statement(uncheck, (own,)),
            Statement(hold(parent, wanted, now).comment_on(table.sql), (own,)),
            *after,
        ),
        nowait=(own, *strong),
    )


def catch_up(sequence: TableName, partition: TableName, column: str) -> Step:
    """Let a sequence go on behind the greatest value in `partition`, if it is not there yet."""
    query = sql.SQL(
        "SELECT setval({}::regclass, greatest(t.last, nextval({}::regclass))) "
        "FROM (SELECT max({}) AS last FROM {}) AS t WHERE t.last > (SELECT last_value FROM {})"
    ).format(
        sql.Literal(sequence.sql.as_string(None)),
        sql.Literal(sequence.sql.as_string(None)),
        sql.Identifier(column),
        partition.sql,
        sequence.sql,
    )
    return Step(f"let {sequence} go on behind {partition}", (Statement(query),))


def hold(parent: PartitionSet, bounds: Range, now: datetime | None) -> Marker:
    """The mark of a partition that was restored at `now`; retention has it again with None."""
    return Marker(MarkState.ATTACHED, parent.table, bounds, held_since=now)


# -- pieces

_DETACH = sql.SQL("ALTER TABLE {} DETACH PARTITION {}{}")
_ATTACH = sql.SQL("ALTER TABLE {} ATTACH PARTITION {} {}")


def _make(parent: PartitionSet, table: TableName, *, indexes: bool = False) -> list[Statement]:
    """The new table, where and whose the parent's partitions are."""
    where = sql.Composed([sql.SQL(" INCLUDING INDEXES)" if indexes else ")")])
    if parent.access_method is not None:
        where += sql.SQL(" USING {}").format(sql.Identifier(parent.access_method))
    if parent.tablespace is not None:
        where += sql.SQL(" TABLESPACE {}").format(sql.Identifier(parent.tablespace))
    statements = [
        Statement(
            _LIKE.format(table.sql, parent.table.sql, where),
            (Lock(parent.table, LockMode.ACCESS_SHARE),),
        )
    ]
    if parent.owner != parent.role:
        owner = sql.SQL("ALTER TABLE {} OWNER TO {}").format(table.sql, sql.Identifier(parent.owner))
        statements.append(Statement(owner))
    return statements


def _attach(parent: PartitionSet, table: TableName, values: sql.Composable) -> Statement:
    query = _ATTACH.format(parent.table.sql, table.sql, values)
    return Statement(query, (Lock(parent.table, LockMode.SHARE_UPDATE_EXCLUSIVE), *_attach_locks(parent)))


def _attach_locks(parent: PartitionSet) -> tuple[Lock, ...]:
    """ATTACH makes the new partition's foreign keys, and proves that the default has none of its rows."""
    both_ends = dict.fromkeys((*parent.references, *parent.referenced_by))
    locks = [Lock(table, LockMode.SHARE_ROW_EXCLUSIVE) for table in both_ends]
    if parent.default is not None:
        locks.append(Lock(parent.default.table, LockMode.ACCESS_EXCLUSIVE))
    return tuple(locks)


def _key_locks(parent: PartitionSet) -> tuple[Lock, ...]:
    """DETACH remakes the foreign keys out of the partition, and drops those into it."""
    locks = {table: Lock(table, LockMode.SHARE_ROW_EXCLUSIVE) for table in parent.references}
    locks |= {table: Lock(table, LockMode.ACCESS_EXCLUSIVE) for table in parent.referenced_by}
    return tuple(locks.values())


def _detaching(summary: str, parent: PartitionSet, partition: Member, query: sql.Composed) -> Step:
    strong = (Lock(partition.table, LockMode.ACCESS_EXCLUSIVE), *_key_locks(parent))
    statement = Statement(query, (Lock(parent.table, LockMode.SHARE_UPDATE_EXCLUSIVE), *strong))
    return Step(summary, (statement,), transactional=False, nowait=strong)
