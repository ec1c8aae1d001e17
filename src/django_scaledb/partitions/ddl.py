"""From an action to the SQL that does it (pure): steps with the locks that PostgreSQL takes.

The locks are those measured in pg_locks on PostgreSQL 15 and 18; a test measures them again.
Locks on a table that a step itself makes are left out: nobody else can see it.
"""

from __future__ import annotations

from collections.abc import Sequence
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
    "INCLUDING STORAGE INCLUDING COMPRESSION INCLUDING COMMENTS INCLUDING STATISTICS){}"
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


def drop(partition: Member) -> Step:
    """Drop a table that was taken off; never CASCADE: what somebody built on it since is respected."""
    lock = Lock(partition.table, LockMode.ACCESS_EXCLUSIVE)
    return Step(
        f"drop detached table {partition.table}",
        (Statement(sql.SQL("DROP TABLE {}").format(partition.table.sql), (lock,)),),
        nowait=(lock,),
    )


# -- pieces

_DETACH = sql.SQL("ALTER TABLE {} DETACH PARTITION {}{}")


def _make(parent: PartitionSet, table: TableName) -> list[Statement]:
    """The new table, where and whose the parent's partitions are."""
    where = sql.Composed([])
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
    query = sql.SQL("ALTER TABLE {} ATTACH PARTITION {} {}").format(parent.table.sql, table.sql, values)
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
