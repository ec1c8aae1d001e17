"""What a counter counts, as SQL over one row of its source (pure).

A `Definition` is what `counters.resolve` makes of a CounterMeta: finished SQL fragments in which
the source's columns are written ``"source_table"."column"``. Whatever relation stands in for the
source (the table, a transition table, the RETURNING of a statement) only has to carry that alias.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cached_property
from typing import Any


def quote(name: str) -> str:
    """`name` as an SQL identifier, case and all."""
    return '"' + name.replace('"', '""') + '"'


def literal(text: str) -> str:
    """`text` as an SQL string, whatever standard_conforming_strings says."""
    doubled = text.replace("'", "''")
    return " E'" + doubled.replace("\\", "\\\\") + "'" if "\\" in doubled else f"'{doubled}'"


@dataclass(frozen=True)
class Hop:
    """One step of a span: from a row's primary key in `table` to the value of one of its columns.

    `label` is the model's ``app_label.model_name``; names are unquoted, types are PostgreSQL's.
    `is_constrained` says that no row below can outlive it: the way to it is a real foreign key.
    """

    label: str
    table: str
    pk: str
    pk_type: str
    value: str
    value_type: str
    is_constrained: bool = True


@dataclass(frozen=True)
class Key:
    """One column of a counter's key.

    `raw` is SQL over the source's row; following `hops` from there gives the key's value.
    """

    column: str
    type: str
    raw: str
    raw_type: str
    hops: tuple[Hop, ...] = ()


@dataclass(frozen=True)
class Total:
    """One total: `amount` is what a row adds to it (never NULL), `aggregate` the same for a group."""

    column: str
    type: str
    amount: str
    aggregate: str


@dataclass(frozen=True)
class Definition:
    """One counter, ready for making statements.

    `table` and `source_table` are unquoted names; `where` is SQL over a row or None; `columns` are
    the source's columns that any fragment reads. `nullable` says that a key can hold NULL, which
    is a group of its own.
    """

    label: str
    table: str
    source_label: str
    source_table: str
    columns: tuple[str, ...]
    keys: tuple[Key, ...]
    totals: tuple[Total, ...]
    where: str | None = None

    def __hash__(self) -> int:
        # What is made of a definition is looked up for each write: not all fragments again.
        return hash(self.label)

    @property
    def alias(self) -> str:
        return quote(self.source_table)

    @cached_property
    def hops(self) -> tuple[Hop, ...]:
        """Every step of every span, once."""
        return tuple(dict.fromkeys(hop for key in self.keys for hop in key.hops))

    @cached_property
    def plain_columns(self) -> frozenset[str]:
        """The source's columns that are read, as fragments write them."""
        return frozenset(f"{self.alias}.{quote(column)}" for column in self.columns)

    @property
    def key_columns(self) -> tuple[str, ...]:
        return tuple(key.column for key in self.keys)

    @cached_property
    def identity(self) -> str:
        """Twelve hex digits that name this counter in settings and functions."""
        return identity_of(self.label)

    @cached_property
    def lock_id(self) -> int:
        """The key of this counter's advisory locks, a signed 64-bit number."""
        digest = hashlib.sha256(f"django_scaledb.counters:{self.label.lower()}".encode()).digest()
        return int.from_bytes(digest[:8], "big", signed=True)

    @cached_property
    def direct(self) -> Definition:
        """The same for amounts that stand beside the counter's own keys: no span is followed."""
        keys = tuple(replace(key, hops=(), raw_type=key.type) for key in self.keys)
        return replace(self, keys=keys)

    def with_suffix(self, suffix: str) -> Definition:
        """The same over the columns whose names end in `suffix`."""
        return replace(self, totals=tuple(replace(t, column=t.column + suffix) for t in self.totals))

    @cached_property
    def escaped(self) -> Definition:
        """The same with each ``%`` doubled, for statements that are run with parameters."""
        escaped: Definition = _escape(self)
        return escaped


def identity_of(label: str) -> str:
    """The identity of the counter called `label` (``app_label.ModelName``, in any case)."""
    return hashlib.sha256(label.lower().encode()).hexdigest()[:12]


def _escape(value: Any) -> Any:
    if isinstance(value, str):
        return value.replace("%", "%%")
    if isinstance(value, tuple):
        return tuple(_escape(item) for item in value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: _escape(getattr(value, f.name)) for f in fields(value)})
    return value
