"""The SQL of counted writes (pure): a statement that also says what it did, per counter.

A write becomes a CTE that returns the columns counters need; behind it the deltas are aggregated
by the server, so that moving ten thousand rows sends back a handful of sums. INSERT returns its
rows anyway and has the amounts beside them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from django_scaledb.counters.definition import Definition, Hop, quote
from django_scaledb.counters.statements import changes, fold, raw_groups

ROWS = "scaledb_rows"
OLD = "scaledb_old"
BEFORE, AFTER = "o", "n"
INTEGERS = ("smallint", "integer", "bigint")


@dataclass(frozen=True)
class WriteSet:
    """What one statement must report on: counters of its table's rows, steps of spans through it."""

    counters: tuple[Definition, ...]
    hops: tuple[Hop, ...] = ()

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns whose values the statement has to return."""
        needed = [column for counter in self.counters for column in counter.columns]
        needed += [column for hop in self.hops for column in (hop.pk, hop.value)]
        return tuple(dict.fromkeys(needed))

    def touched_by(self, columns: set[str]) -> WriteSet:
        """What remains to be reported when only `columns` are written."""
        return WriteSet(
            tuple(c for c in self.counters if columns.intersection(c.columns)),
            tuple(h for h in self.hops if columns.intersection((h.pk, h.value))),
        )

    def __bool__(self) -> bool:
        return bool(self.counters or self.hops)

    # -- the whole statement's deltas, aggregated

    def _relation(self, side: str, counter: Definition) -> str:
        at = {column: i for i, column in enumerate(self.columns)}
        # A counter without any column still needs a row per row.
        columns = ", ".join(f"{side}{at[c]} AS {quote(c)}" for c in counter.columns)
        return f"(SELECT {columns} FROM {ROWS})"

    def report(self, write: str, sides: Sequence[str], before: str = "") -> str:
        """`write` (an INSERT, UPDATE or DELETE ending in its RETURNING) with its deltas behind it.

        Rows: ``(number, sign, keys text[], amounts numeric[])``; number 0 is the count of rows
        written, 1.. the counters, -1.. former values of the hops.
        """
        parts = [f"SELECT 0, 0, NULL::text[], ARRAY[COUNT(*)]::numeric[] FROM {ROWS}"]
        for i, counter in enumerate(self.counters):
            if BEFORE in sides:
                parts.append(changes(counter, i + 1, -1, self._relation(BEFORE, counter)))
            if AFTER in sides:
                parts.append(changes(counter, i + 1, 1, self._relation(AFTER, counter)))
        at = {column: i for i, column in enumerate(self.columns)}
        for i, hop in enumerate(self.hops):
            pk, value = at[hop.pk], at[hop.value]
            changed = (
                f" WHERE o{value} IS DISTINCT FROM n{value} OR o{pk} IS DISTINCT FROM n{pk}"
                if AFTER in sides
                else ""
            )
            parts.append(
                f"SELECT {-1 - i}, 0, ARRAY[o{pk}::text, o{value}::text], NULL::numeric[] "
                f"FROM {ROWS}{changed}"
            )
        return f"WITH {before}{ROWS} AS ({write}) {' UNION ALL '.join(parts)}"

    # -- write and fold in one statement

    @property
    def folds_at_once(self) -> bool:
        """Whether a statement that is a transaction by itself can also write its counters.

        A span's parents are to be looked up in a snapshot that is newer than the statement's.
        """
        return bool(self.counters) and not self.hops and not any(c.hops for c in self.counters)

    def folding(self, write: str, sides: Sequence[str], wanted: int | None = None, before: str = "") -> str:
        """`write` with its counters written behind it, in the order of their tables.

        Gives the first `wanted` columns that `write` returns, or, with None, the count of its rows.
        """
        names = [f"r{i}" for i in range(wanted or 0)]
        names += [f"{side}{i}" for side in sides for i in range(len(self.columns))]
        listed = ", ".join(names)
        ctes = [f"{ROWS}{f'({listed})' if names else ''} AS ({write})"]
        for number, counter in enumerate(sorted(self.counters, key=lambda c: c.table)):
            # Asking for the one before makes PostgreSQL finish it first: the order of all folds.
            after = f"(SELECT COUNT(*) FROM scaledb_c{number - 1}) IS NOT NULL" if number else "TRUE"
            parts = [
                f"SELECT {self._pending(counter, sign)} FROM "
                f"({raw_groups(counter, self._relation(side, counter))}) g "
                f"WHERE {after}"
                for side, sign in ((BEFORE, "-"), (AFTER, ""))
                if side in sides
            ]
            pending = f"({' UNION ALL '.join(parts)})"
            ctes.append(f"scaledb_c{number} AS ({fold(counter, pending)} RETURNING 1)")
        result = ", ".join(f"r{i}" for i in range(wanted)) or "NULL" if wanted is not None else "COUNT(*)"
        return f"WITH {before}{', '.join(ctes)} SELECT {result} FROM {ROWS}"

    @staticmethod
    def _pending(counter: Definition, sign: str) -> str:
        keys = [f"g.k{i}" for i in range(len(counter.keys))]
        return ", ".join([*keys, *(f"{sign}g.t{i} AS t{i}" for i in range(len(counter.totals)))])

    def returning(self, qualifiers: dict[str, str]) -> str:
        """``RETURNING`` for `report`: each side's prefix with what qualifies its columns."""
        columns = [
            f"{qualifier}.{f'{side}{i}' if qualifier == OLD else quote(column)} AS {side}{i}"
            for side, qualifier in qualifiers.items()
            for i, column in enumerate(self.columns)
        ]
        return f"RETURNING {', '.join(columns) or 'NULL'}"

    # -- amounts beside each row

    @cached_property
    def beside(self) -> list[str]:
        """Beside a returned row: per counter the key, then the amounts (NULL: not counted).

        A key comes as text; a column of integers as it is, whose text in Python is PostgreSQL's.
        """
        columns = []
        for counter in self.counters:
            for key in counter.keys:
                is_plain = key.raw_type in INTEGERS and key.raw in counter.plain_columns
                columns.append(key.raw if is_plain else f"({key.raw})::text")
            for total in counter.totals:
                amount = (
                    f"CASE WHEN {counter.where} THEN {total.amount} END" if counter.where else total.amount
                )
                columns.append(amount if total.type in INTEGERS else f"({amount})::numeric")
        return columns

    @cached_property
    def escaped(self) -> WriteSet:
        """The same with each ``%`` doubled, for statements that are run with parameters."""
        return WriteSet(tuple(c.escaped for c in self.counters), self.hops)
