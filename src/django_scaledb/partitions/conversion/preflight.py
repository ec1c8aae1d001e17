"""What stands in the way of a conversion, found before anything is touched (pure)."""

from __future__ import annotations

import re
from collections.abc import Iterator

from django_scaledb.exceptions import DDLError
from django_scaledb.partitions.config import KeyKind, PartitionConfig
from django_scaledb.partitions.conversion.errors import Obstacle
from django_scaledb.partitions.conversion.inventory import Inventory
from django_scaledb.partitions.conversion.state import Strategy

_TYPES = {
    KeyKind.TIMESTAMP: "timestamp with time zone",
    KeyKind.DATE: "date",
    KeyKind.UUID7: "uuid",
}


def obstacles(
    inventory: Inventory, config: PartitionConfig, pk_column: str, strategy: Strategy = Strategy.ATTACH
) -> list[Obstacle]:
    """Everything that keeps this table from being converted; empty when nothing does."""
    return [
        *(_about_copying(inventory) if strategy == Strategy.COPY else ()),
        *_about_table(inventory),
        *_about_key(inventory, config, pk_column),
        *_about_uniqueness(inventory, config.column),
        *_about_constraints(inventory),
        *_about_dependents(inventory),
        *_about_triggers(inventory, config.column),
    ]


def refuse_altered(
    inventory: Inventory, config: PartitionConfig, pk_column: str, strategy: Strategy = Strategy.ATTACH
) -> None:
    """Raises `DDLError` when somebody has given the table what is in the way since it was looked at first."""
    found = obstacles(inventory, config, pk_column, strategy)
    if found:
        raise DDLError(
            f"{inventory.table} was altered since its conversion was begun, and cannot be swapped as it is: "
            f"{'; '.join(map(str, found))}. Then run again, or take it back with --abort"
        )


def for_split(inventory: Inventory) -> list[Obstacle]:
    """What keeps a partition from being split."""
    return list(_about_copying(inventory))


def _about_copying(found: Inventory) -> Iterator[Obstacle]:
    if found.force_row_security:
        yield Obstacle(
            "row level security is forced on its owner, as whom the rows are copied",
            f"use --strategy attach, or ALTER TABLE {found.table} NO FORCE ROW LEVEL SECURITY until it "
            "is done",
        )


def _about_table(found: Inventory) -> Iterator[Obstacle]:
    if not found.may_alter:
        yield Obstacle(
            f"it belongs to the role {found.owner!r}, and {found.role!r} may not change it",
            f"connect as {found.owner!r}, or GRANT that role to {found.role!r}",
        )
    if found.persistence != "p":
        yield Obstacle(
            "it is unlogged or temporary, which a partitioned table cannot be",
            f"ALTER TABLE {found.table} SET LOGGED",
        )
    if found.is_partition or found.inherits:
        yield Obstacle(
            "it inherits from a table, or another one inherits from it",
            "ALTER TABLE .. NO INHERIT, or convert the topmost table by hand",
        )
    if found.of_type:
        yield Obstacle("it is a typed table (CREATE TABLE .. OF)", f"ALTER TABLE {found.table} NOT OF")
    if found.access_method != "heap" and found.version < 170000:
        yield Obstacle(
            f"its access method is {found.access_method}, and partitions could not get it before "
            "PostgreSQL 17",
            f"ALTER TABLE {found.table} SET ACCESS METHOD heap",
        )
    for count, what in ((found.labels, "a security label"), (found.subscriptions, "a subscription")):
        if count:
            yield Obstacle(
                f"it has {what}, which would stay with the old table",
                "remove it, and add it again after the conversion",
            )


def _about_key(found: Inventory, config: PartitionConfig, pk_column: str) -> Iterator[Obstacle]:
    key = next((column for column in found.columns if column.name == config.column), None)
    if key is None:
        yield Obstacle(f"it has no column {config.column!r}, the partition key", "run migrate first")
        return
    if key.type.replace("(6)", "") != _TYPES[config.key_kind]:
        yield Obstacle(
            f"the partition key {key.name!r} is of type {key.type}, and the model's field is "
            f"{_TYPES[config.key_kind]}",
            "bring the column to the field's type by a migration of its own first",
        )
    if not key.not_null:
        yield Obstacle(
            f"the partition key {key.name!r} allows NULL, and a row without it belongs to no period",
            f"fill the rows, then ADD CHECK ({key.name} IS NOT NULL) NOT VALID, VALIDATE it and SET NOT NULL",
        )
    if key.generated:
        yield Obstacle(
            f"the partition key {key.name!r} is a generated column, by which PostgreSQL cannot partition",
            "make it an ordinary column with a default",
        )
    primary = found.primary_key
    if primary is None:
        yield Obstacle("it has no primary key", f"add one on ({pk_column}) first")
        return
    if primary.columns not in ((pk_column,), (pk_column, config.column)):
        yield Obstacle(
            f"its primary key {primary.name!r} is on ({', '.join(map(str, primary.columns))}), not on "
            f"({pk_column})",
            "give the table the primary key that the model has",
        )
    if primary.included or "DEFERRABLE" in (primary.constraint or ""):
        yield Obstacle(
            f"its primary key {primary.name!r} is deferrable or INCLUDEs columns",
            "make it a plain one; an index of its own can include columns",
        )


def _about_uniqueness(found: Inventory, key: str) -> Iterator[Obstacle]:
    for index in found.indexes:
        if not index.is_valid:
            yield Obstacle(
                f"the index {index.name!r} is not valid",
                f"REINDEX INDEX CONCURRENTLY or DROP INDEX {index.name}",
            )
        if index.constraint_type == "x":
            yield Obstacle(
                f"the exclusion constraint {index.name!r} cannot be kept across partitions",
                "drop it, or check it in a trigger",
            )
        elif index.is_unique and not index.is_primary and key not in index.columns:
            what = "constraint" if index.constraint else "index"
            columns = ", ".join(column or "an expression" for column in index.columns)
            yield Obstacle(
                f"the unique {what} {index.name!r} on ({columns}) is without the partition key {key!r}, and "
                "PostgreSQL keeps values unique within a partition only",
                f"add {key!r} to it, or drop it, in a migration of its own before the conversion",
            )


def _about_constraints(found: Inventory) -> Iterator[Obstacle]:
    for constraint in found.constraints:
        what = {"c": "check", "f": "foreign key", "n": "NOT NULL"}[constraint.type]
        if not constraint.is_validated or not constraint.is_enforced:
            yield Obstacle(
                f"the {what} constraint {constraint.name!r} is not validated",
                f"ALTER TABLE {found.table} VALIDATE CONSTRAINT {constraint.name}",
            )
        if constraint.no_inherit:
            yield Obstacle(
                f"the {what} constraint {constraint.name!r} is NO INHERIT, and partitions inherit",
                "replace it by one without NO INHERIT",
            )
    for name, schema, table in found.incoming:
        yield Obstacle(
            f"the foreign key {name!r} of {schema}.{table} points at it",
            "set db_constraint=False on that ForeignKey and migrate that first: its key alone is not "
            "unique in "
            "a partitioned table",
        )


def _about_dependents(found: Inventory) -> Iterator[Obstacle]:
    for view in found.views:
        if view.is_materialized:
            yield Obstacle(
                f"the materialized view {view.schema}.{view.name} reads it and would stay on the old table",
                "drop it and create it again after the conversion, or let it read an ordinary view",
            )
        elif not view.may_alter:
            yield Obstacle(
                f"the view {view.schema}.{view.name} has to be replaced, and {found.role!r} does not own it",
                f"connect as a role that owns both, or GRANT its owner to {found.role!r}",
            )
    for rule in found.rules:
        yield Obstacle(f"the rule {rule} would stay on the old table", "replace it by a trigger")
    for publication in found.publications:
        name = publication.name
        if not publication.via_root:
            yield Obstacle(
                f"the publication {name!r} would publish each partition under its own name",
                f"ALTER PUBLICATION {name} SET (publish_via_partition_root = true)",
            )
        if publication.explicit and not publication.may_alter:
            yield Obstacle(
                f"the publication {name!r} has to be altered, and {found.role!r} does not own it",
                f"GRANT its owner to {found.role!r}",
            )
    for other in found.others:
        yield Obstacle(
            f"it has {other}, and that would stay with the old one",
            "drop it and create it again after the conversion",
        )


def _about_triggers(found: Inventory, key: str) -> Iterator[Obstacle]:
    sets_key = re.compile(rf'\bnew\s*\.\s*"?{re.escape(key)}"?\s*:?=', re.IGNORECASE)
    for trigger in found.triggers:
        if trigger.is_row and trigger.has_transition_tables:
            yield Obstacle(
                f"the trigger {trigger.name!r} is FOR EACH ROW with transition tables, which partitions "
                "cannot have",
                "make it FOR EACH STATEMENT",
            )
        if trigger.is_row and trigger.is_before and sets_key.search(trigger.source):
            yield Obstacle(
                f"the trigger {trigger.name!r} sets the partition key before each row, when PostgreSQL has "
                "chosen the partition already",
                f"give the column {key!r} a default, or set it in the application",
            )
