"""One table takes another one's place, in one short transaction (pure).

``ALTER TABLE .. RENAME`` is all that clients notice: PostgreSQL looks a name up again after it has
waited for a lock, so whoever stood in the queue finds the new table. What knows the table by its
OID (views, publications, sequences) is moved in the same transaction.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from psycopg import sql

from django_scaledb.partitions.bounds import Range
from django_scaledb.partitions.config import PartitionConfig
from django_scaledb.partitions.conversion import carry
from django_scaledb.partitions.conversion.inventory import Inventory
from django_scaledb.partitions.conversion.names import Names
from django_scaledb.partitions.marker import Marker, MarkState
from django_scaledb.postgres.locks import Lock, LockMode
from django_scaledb.postgres.statements import Statement, Step

BOUNDS_CHECK = "django_scaledb_bounds"
"""The check that proves the bounds of a table that is to be attached."""


def by_attaching(
    inventory: Inventory,
    names: Names,
    config: PartitionConfig,
    bounds: Range,
    pk_columns: Sequence[str],
    *,
    beside: Iterable[Statement],
    after: Iterable[Statement],
) -> Step:
    """The old table steps aside and becomes the first partition of a new one with its name.

    `beside` is what other features want on every partition.
    """
    table, aside = inventory.table, names.aside_table
    primary = inventory.primary_key
    assert primary is not None
    exclusive = Lock(table, LockMode.ACCESS_EXCLUSIVE)
    keep = {
        name: new
        for name, new in names.indexes.items()
        if name != primary.name or _is_kept(inventory, pk_columns)
    }
    statements = [
        *step_aside(inventory, names, keep),
        *_replace_primary_key(inventory, names, pk_columns),
        *carry.create_parent(inventory, aside, table, config.column, helpers=[BOUNDS_CHECK]),
        *carry.create_indexes(inventory, table, pk_columns, {}),
        *carry.belongings(inventory, table),
        *carry.move_sequences(inventory, aside, table, names.sequences),
        *carry.views(inventory),
        *beside,
        Statement(
            sql.SQL("ALTER TABLE {} ATTACH PARTITION {} {}").format(
                table.sql, aside.sql, bounds.for_values(config.key_kind)
            )
        ),
        Statement(carry.drop_constraint(aside, BOUNDS_CHECK)),
        Statement(carry.comment_on_table(aside, str(Marker(MarkState.ATTACHED, table, bounds)))),
        *carry.publish(inventory, table),
        *after,
    ]
    statements[0] = Statement(statements[0].query, (exclusive,))
    return Step(
        f"put a partitioned table in the place of {table}",
        tuple(statements),
        nowait=(exclusive,),
        ahead=tuple(carry.claim_views(inventory)),
        together=True,
    )


def by_renaming(
    inventory: Inventory,
    names: Names,
    target_locks: Sequence[Lock],
    before: Iterable[Statement],
    after: Iterable[Statement],
) -> Step:
    """The filled table takes the name; the old one stays beside it."""
    table, aside = inventory.table, names.aside_table
    exclusive = Lock(table, LockMode.ACCESS_EXCLUSIVE)
    statements = [
        *before,
        *step_aside(inventory, names, names.indexes),
        Statement(carry.rename_table(names.staging_table, table.name)),
        *(Statement(carry.rename_index(table.schema, staged, name)) for name, staged in names.staged.items()),
        *carry.belongings(inventory, table),
        *carry.move_sequences(inventory, aside, table, names.sequences),
        *carry.views(inventory),
        *carry.publish(inventory, table),
        *after,
    ]
    return Step(
        f"put the partitioned table in the place of {table}",
        tuple(statements),
        nowait=(exclusive, *target_locks),
        ahead=tuple(carry.claim_views(inventory)),
        together=True,
    )


def back(
    inventory: Inventory,
    names: Names,
    *,
    locks: Sequence[Lock],
    free: Iterable[Statement],
    primary_key: Iterable[Statement],
    after: Iterable[Statement],
) -> Step:
    """The old table takes its name again, and the partitioned one is dropped.

    `free` takes the old table out of the set, or ends the writing back to it, and brings rows that
    it lacks; `primary_key` gives it its own one again.
    """
    table, aside = inventory.table, names.aside_table
    gone = names.staging_table
    primary = inventory.primary_key
    assert primary is not None
    statements = [
        *free,
        *(carry.unpublish(inventory, table)),
        *carry.set_aside_sequences(inventory, names.sequences),
        Statement(carry.rename_table(table, gone.name)),
        *(Statement(carry.rename_index(table.schema, name, names.staged[name])) for name in names.indexes),
        *(
            # Those of the partitioned table are not wanted any more: they have no data of their own.
            Statement(sql.SQL("DROP STATISTICS {}").format(sql.Identifier(s.schema, s.name)))
            for s in inventory.statistics
        ),
        Statement(carry.rename_table(aside, table.name)),
        *primary_key,
        *(
            Statement(carry.rename_index(table.schema, new, name))
            for name, new in names.indexes.items()
            if name != primary.name
        ),
        *(
            Statement(carry.rename_statistics(s.schema, names.statistics[s.name], s.name))
            for s in inventory.statistics
        ),
        *carry.move_sequences(inventory, gone, table, names.sequences),
        *carry.drop_triggers(inventory, table),
        *carry.triggers(inventory, table),
        *carry.replica_identity(inventory, table, {}),
        Statement(carry.comment_on_table(table, inventory.comment)),
        *carry.views(inventory),
        *carry.publish(inventory, table),
        Statement(sql.SQL("DROP TABLE {}").format(gone.sql)),
        *after,
    ]
    return Step(
        f"put {table} back in its place",
        tuple(statements),
        nowait=tuple(locks),
        ahead=tuple(carry.claim_views(inventory)),
    )


def step_aside(inventory: Inventory, names: Names, indexes: dict[str, str]) -> Iterator[Statement]:
    """Rename the table and what shares its names; take off what must be on the new one alone."""
    table, aside = inventory.table, names.aside_table
    yield Statement(carry.rename_table(table, aside.name), (Lock(table, LockMode.ACCESS_EXCLUSIVE),))
    for old, new in indexes.items():
        yield Statement(carry.rename_index(table.schema, old, new))
    for statistics in inventory.statistics:
        new = names.statistics[statistics.name]
        yield Statement(carry.rename_statistics(statistics.schema, statistics.name, new))
    yield from carry.set_aside_sequences(inventory, names.sequences)
    # A row trigger of the new table comes back as a clone when this one is attached.
    yield from carry.drop_triggers(inventory, aside)
    yield from carry.unpublish(inventory, aside)


def _is_kept(inventory: Inventory, pk_columns: Sequence[str]) -> bool:
    primary = inventory.primary_key
    return primary is not None and primary.columns == tuple(pk_columns)


def _replace_primary_key(
    inventory: Inventory, names: Names, pk_columns: Sequence[str]
) -> Iterator[Statement]:
    """(id) becomes (id, key), on an index that is there already."""
    primary = inventory.primary_key
    if primary is None or _is_kept(inventory, pk_columns):
        return
    aside = names.aside_table
    yield Statement(
        sql.SQL("ALTER TABLE {} DROP CONSTRAINT {}, ADD CONSTRAINT {} PRIMARY KEY USING INDEX {}").format(
            aside.sql,
            sql.Identifier(primary.name),
            sql.Identifier(names.indexes[primary.name]),
            sql.Identifier(names.key_index),
        )
    )
    if primary.is_replica_identity:
        yield from carry.replica_identity(inventory, aside, names.indexes)
