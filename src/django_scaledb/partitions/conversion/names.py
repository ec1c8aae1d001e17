"""Names for what a conversion puts aside or builds beside the table."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

from django.db.backends.base.base import BaseDatabaseWrapper

from django_scaledb.exceptions import DDLError
from django_scaledb.partitions import inspection
from django_scaledb.partitions.conversion.inventory import Inventory
from django_scaledb.postgres.identifiers import TableName, fit

_TRIED = 20


@dataclass(frozen=True)
class Names:
    """What is called how while a table is converted; kept with the conversion, so that a resumed one agrees.

    `aside` is the table that steps aside, `staging` the one that is
    being filled, `catch_all` its default partition. `indexes`,
    `sequences` and `statistics` say what those of the old table are called once it has stepped
    aside, `staged` what those of the new one are called until then. `key_index` is the unique index
    on (id, key), `function` the trigger function that keeps two tables the same, and also the name
    of its triggers.
    """

    schema: str
    aside: str
    staging: str
    catch_all: str
    key_index: str
    back_index: str
    function: str
    indexes: dict[str, str]
    staged: dict[str, str]
    sequences: dict[str, str]
    statistics: dict[str, str]

    @property
    def aside_table(self) -> TableName:
        return TableName(self.schema, self.aside)

    @property
    def staging_table(self) -> TableName:
        return TableName(self.schema, self.staging)

    @property
    def catch_all_table(self) -> TableName:
        return TableName(self.schema, self.catch_all)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        return cls(**values)


def choose(connection: BaseDatabaseWrapper, inventory: Inventory, *, aside: str) -> Names:
    """Free names for everything; `aside` is the suffix of the table that steps aside.

    Raises `DDLError` when none is free.
    """
    schema = inventory.schema
    taken: set[str] = set()

    def free(stem: str, suffix: str) -> str:
        candidates = [fit(stem, suffix + number) for number in ("", *(f"_{n}" for n in range(2, _TRIED)))]
        used = taken | inspection.taken_names(connection, schema, candidates)
        name = next((candidate for candidate in candidates if candidate not in used), None)
        if name is None:
            raise DDLError(
                f"cannot name what the conversion of {inventory.table} makes: {candidates} are taken"
            )
        taken.add(name)
        return name

    def each(stems: Iterable[str], suffix: str) -> dict[str, str]:
        return {stem: free(stem, suffix) for stem in stems}

    table = inventory.name
    return Names(
        schema=schema,
        aside=free(table, aside),
        staging=free(table, "_new"),
        catch_all=free(table, "_new_rest"),
        key_index=free(table, "_scaledb_key"),
        back_index=free(table, "_scaledb_back"),
        function=free(table, "_scaledb_sync"),
        indexes=each((index.name for index in inventory.indexes), aside),
        staged=each((index.name for index in inventory.indexes), "_new"),
        sequences=each((c.sequence.name for c in inventory.columns if c.sequence), aside),
        statistics=each((s.name for s in inventory.statistics), aside),
    )


def renewed(connection: BaseDatabaseWrapper, inventory: Inventory, chosen: Names) -> Names:
    """`chosen`, with names for those indexes, sequences and statistics that the table has by now."""
    have = {index.name for index in inventory.indexes}
    have |= {c.sequence.name for c in inventory.columns if c.sequence} | {
        s.name for s in inventory.statistics
    }
    if have == chosen.indexes.keys() | chosen.sequences.keys() | chosen.statistics.keys():
        return chosen
    new = choose(connection, inventory, aside=chosen.aside[len(inventory.name) :])
    return replace(
        chosen, indexes=new.indexes, staged=new.staged, sequences=new.sequences, statistics=new.statistics
    )
