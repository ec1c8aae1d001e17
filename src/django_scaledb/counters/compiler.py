"""Compilers that make each write of a counted model report what it did.

Every write of the ORM ends in one of these three compilers: ``save``, ``delete`` with its cascades
and fast deletes, ``bulk_create``, ``bulk_update``, ``QuerySet.update`` and ``delete``, related
managers and the async ORM. The deltas are what the statement returned, in the same transaction;
no instance is asked what it remembers. Models that no counter concerns pay one look-up.
"""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from django.apps import apps as global_apps
from django.core.exceptions import EmptyResultSet
from django.db import NotSupportedError, OperationalError, transaction
from django.db.models.constants import OnConflict
from django.db.models.sql.constants import ROW_COUNT

from django_scaledb.counters import registry
from django_scaledb.counters.definition import Hop, quote
from django_scaledb.counters.deltas import Number
from django_scaledb.counters.signals import counters_changed
from django_scaledb.counters.writes import AFTER, BEFORE, OLD, WriteSet
from django_scaledb.exceptions import ScaleDBError

if TYPE_CHECKING:
    from django.db.backends.base.base import BaseDatabaseWrapper
    from django.db.models import Model
    from django.db.models.sql.compiler import SQLCompiler as _Compiler
    from django.db.models.sql.compiler import SQLDeleteCompiler as _DeleteCompiler
    from django.db.models.sql.compiler import SQLInsertCompiler as _InsertCompiler
    from django.db.models.sql.compiler import SQLUpdateCompiler as _UpdateCompiler
else:
    _Compiler = _DeleteCompiler = _InsertCompiler = _UpdateCompiler = object

T = TypeVar("T")
RETURNING_OLD = 180000
"""PostgreSQL 18 returns OLD and NEW; before it, old values come from rows locked beforehand."""
RETRIED = ("40001", "40P01")
ATTEMPTS = 20
LONGEST_STEP_BACK = 0.2
"""Seconds."""


def refuse_uncounted_upsert(model: type[Model], connection: BaseDatabaseWrapper, *, updates: bool) -> None:
    """Raise `NotSupportedError` where an upsert that reports nothing would leave a counter wrong.

    A new row of a span's parent changes no counter; one that is replaced may.
    """
    if not getattr(connection, "keeps_counters", False):
        return
    watch = registry.watch(model)
    affected = () if watch is None else (*watch.counted, *(watch.spanned if updates else ()))
    if affected:
        concerned = sorted({counter._meta.label for counter in affected})
        raise NotSupportedError(
            f"on_conflict() and upsert() of {model._meta.label} are not seen by {', '.join(concerned)}; use "
            'bulk_create(update_conflicts=True) or ignore_conflicts=True, or declare mechanism = "trigger"'
        )


class _RowAppeared(Exception):
    """An upsert met a row that was committed after old values were read."""


def _together(connection: Any, writes: WriteSet, write: Callable[[], T]) -> T:
    """`write()` in a transaction that its deltas share; in autocommit, one of its own.

    That one holds a single statement, so a serialization failure on the counter's row is answered
    by running it again, and the application never sees it.
    """
    if not connection.is_on_its_own:
        return write()

    def run() -> T:
        own = not connection.in_atomic_block
        with transaction.atomic(using=connection.alias):
            if own and writes.hops:
                # Whoever moves a parent has to see all rows below it (see `_remember`).
                with connection.cursor() as cursor:
                    cursor.execute("SET TRANSACTION ISOLATION LEVEL READ COMMITTED")
            return write()

    return _again(connection, run)


def _again(connection: Any, run: Callable[[], T]) -> T:
    """`run()`, a statement that is its own transaction; again when its counters' rows were in the way.

    Where REPEATABLE READ is the default it then waits for its turn with READ COMMITTED, which for a single
    statement only means that a row is read as it is when it is locked. SERIALIZABLE stays; there it
    steps back for longer each time, by chance, because writers that start at once would meet again.
    """
    for attempt in itertools.count(1):
        try:
            if attempt == 1 or connection.in_atomic_block:
                return run()
            with transaction.atomic(using=connection.alias):
                with connection.cursor() as cursor:
                    cursor.execute("SHOW transaction_isolation")
                    if cursor.fetchone()[0] == "repeatable read":
                        cursor.execute("SET TRANSACTION ISOLATION LEVEL READ COMMITTED")
                return run()
        except OperationalError as error:
            conflict = getattr(error.__cause__, "sqlstate", None) in RETRIED
            if not conflict or attempt == ATTEMPTS or connection.in_atomic_block:
                raise
            time.sleep(random.uniform(0, min(LONGEST_STEP_BACK, 0.001 * 2**attempt)))  # noqa: S311
    raise AssertionError("unreachable")


_write_sets: dict[tuple[type[Model], str], WriteSet] = {}
registry.on_forget(_write_sets.clear)


class _CountedCompiler(_Compiler):
    """What the three have in common."""

    def _folds_at_once(self, writes: WriteSet) -> bool:
        """Whether this statement is a transaction by itself and can write its counters, too."""
        connection: Any = self.connection
        return (
            not connection.in_atomic_block
            and connection.is_on_its_own
            and writes.folds_at_once
            and not counters_changed.has_listeners()
        )

    def _folded_count(self, text: str, params: Sequence[Any]) -> int:
        def run() -> int:
            with self.connection.cursor() as cursor:
                cursor.execute(text, params)
                return int(cursor.fetchone()[0])

        return _again(self.connection, run)

    def _run(self, text: str, params: Sequence[Any]) -> list[tuple[Any, ...]]:
        with self.connection.cursor() as cursor:
            cursor.execute(text, params)
            return [tuple(row) for row in cursor.fetchall()]

    def _converted(self, rows: list[Any], fields: Sequence[Any]) -> Any:
        """`rows` as Python has the values of `fields`."""
        cols = [field.get_col(self.query.get_meta().db_table) for field in fields]
        converters = self.get_converters(cols)
        return self.apply_converters(rows, converters) if converters else rows

    def _write_set(self) -> WriteSet | None:
        if not getattr(self.connection, "keeps_counters", False):
            return None
        model = self.query.model
        assert model is not None
        watch = registry.watch(model)
        if watch is None:
            return None
        at = (model, self.connection.alias)
        found = _write_sets.get(at)
        if found is None:
            label = (model._meta.concrete_model or model)._meta.label_lower
            found = WriteSet(
                tuple(registry.definition(counter, self.connection) for counter in watch.counted),
                tuple(registry.hops_of(watch.spanned, label, self.connection)),
            )
            if model._meta.apps is global_apps:  # those of a migration come and go
                _write_sets[at] = found
        return found

    def _both_sides(
        self, writes: WriteSet, write: str, params: Sequence[Any], wanted: int, before: str = ""
    ) -> list[Any]:
        """Run `write`, book its deltas row by row, and give the first `wanted` columns of its rows.

        It returns these, whether there was a row before, and the old and new values of each column
        that is counted; the server makes keys and amounts of both.
        """
        safe = writes.escaped
        table = quote(self.query.get_meta().db_table)
        names = [f"r{i}" for i in range(wanted)] + ["replaced"]
        names += [f"{s}{i}" for s in (BEFORE, AFTER) for i in range(len(safe.columns))]
        beside = safe.beside
        width = len(beside)
        sides = []
        for side in (AFTER, BEFORE):
            relation = ", ".join(f"w.{side}{i} AS {quote(c)}" for i, c in enumerate(safe.columns))
            named = ", ".join(f"{column} AS c{i}" for i, column in enumerate(beside)) or "NULL"
            sides.append(f"CROSS JOIN LATERAL (SELECT {named} FROM (SELECT {relation}) {table}) {side}")
        out = [f"w.r{i}" for i in range(wanted)] + [f"n.c{i}" for i in range(width)] + ["w.replaced"]
        out += [f"o.c{i}" for i in range(width)]
        at = {column: i for i, column in enumerate(safe.columns)}
        for hop in safe.hops:
            out += [f"w.o{at[hop.pk]}::text", f"w.o{at[hop.value]}::text", f"w.n{at[hop.value]}::text"]
        written = f"WITH {before}w({', '.join(names)}) AS ({write})"
        rows = self._run(f"{written} SELECT {', '.join(out)} FROM w {' '.join(sides)}", params)
        end = self._book(writes, rows, wanted, 1)
        replaced = [row for row in rows if row[end]]
        end = self._book(writes, replaced, end + 1, -1)
        for hop in writes.hops:
            for row in replaced:
                if row[end + 1] != row[end + 2]:
                    self._remember(hop, row[end], row[end + 1])
            end += 3
        return [row[:wanted] for row in rows]

    def _book(self, writes: WriteSet, rows: Sequence[tuple[Any, ...]], start: int, sign: int) -> int:
        """Book the amounts that stand beside each row from column `start` on; returns where they end."""
        log = self.connection.counter_deltas  # type: ignore[attr-defined]
        for counter in writes.counters:
            middle = start + len(counter.keys)
            end = middle + len(counter.totals)
            sums: dict[tuple[Any, ...], list[Number]] = {}
            for row in rows:
                amounts = row[middle:end]
                if amounts[0] is None:
                    continue
                held = sums.get(row[start:middle])
                if held is None:
                    sums[row[start:middle]] = list(amounts)
                else:
                    for i, amount in enumerate(amounts):
                        held[i] += amount
            for key, summed in sums.items():
                texts = tuple([None if value is None else str(value) for value in key])
                log.add(counter.label, texts, summed if sign > 0 else [-amount for amount in summed])
            start = end
        return start

    def _report(self, writes: WriteSet, text: str, params: Sequence[Any]) -> int:
        """Run a reporting statement, book its deltas, return how many rows it wrote."""
        log = self.connection.counter_deltas  # type: ignore[attr-defined]
        with self.connection.cursor() as cursor:
            cursor.execute(text, params)
            reported = cursor.fetchall()
        count = 0
        for number, sign, keys, amounts in reported:
            if number == 0:
                count = int(amounts[0])
            elif number > 0:
                log.add(writes.counters[number - 1].label, tuple(keys), [sign * amount for amount in amounts])
            else:
                self._remember(writes.hops[-1 - number], keys[0], keys[1])
        return count

    removes = False

    def _remember(self, hop: Hop, pk: str, value: str | None) -> None:
        """`hop`'s row `pk` said `value` before this statement changed or removed it.

        The rows below are moved at COMMIT, all that are there by then; a snapshot that is older would
        leave out some of them. Raises `NotSupportedError` there, for a wrong number is worse.
        """
        self.connection.counter_deltas.remember((hop.table, hop.value), pk, value)  # type: ignore[attr-defined]
        if self.removes and hop.is_constrained:
            return  # nothing is below
        if self._isolation is None:
            ((self._isolation,),) = self._run("SHOW transaction_isolation", ())
        if self._isolation not in ("read committed", "read uncommitted"):
            raise NotSupportedError(
                f"cannot change {hop.table}.{hop.value} in a transaction with isolation level "
                f"{self._isolation.upper()}: counters follow it, and rows that others have added below since "
                "the transaction began would be left out; begin it with SET TRANSACTION ISOLATION LEVEL "
                "READ COMMITTED"
            )

    _isolation: str | None = None


class CountedDeleteMixin(_CountedCompiler, _DeleteCompiler):
    """DELETE .. RETURNING, aggregated: each row is subtracted by whoever really deleted it."""

    removes = True

    def execute_sql(self, result_type: Any = ROW_COUNT, *args: Any, **kwargs: Any) -> Any:
        writes = self._write_set()
        if not writes:
            return super().execute_sql(result_type, *args, **kwargs)
        try:
            text, params = self.as_sql()
        except EmptyResultSet:
            return 0 if result_type == ROW_COUNT else None
        table = quote(self.query.get_meta().db_table)
        safe = writes.escaped
        write = f"{text} {safe.returning({BEFORE: table})}"
        if self._folds_at_once(writes):
            return self._folded_count(safe.folding(write, BEFORE), params)
        statement = safe.report(write, BEFORE)
        return _together(self.connection, writes, lambda: self._report(writes, statement, params))


class CountedUpdateMixin(_CountedCompiler, _UpdateCompiler):
    """UPDATE that returns old and new values, when it writes a column that a counter reads."""

    def _touched(self) -> WriteSet | None:
        """What this statement must report on, given the columns that it writes."""
        writes = self._write_set()
        if not writes:
            return None
        return writes.touched_by({str(field.column) for field, _, _ in self.query.values})  # type: ignore[attr-defined]

    def execute_sql(self, result_type: Any) -> Any:  # type: ignore[override]
        writes = self._touched()
        if not writes:
            return super().execute_sql(result_type)
        rows: int | None = None
        try:
            text, params = self.as_sql()
        except EmptyResultSet:
            text = ""
        if text:
            reporting = writes
            at_once = self._folds_at_once(writes)
            statement, values = self._reporting(writes.escaped, text, tuple(params), at_once=at_once)
            if at_once:
                rows = self._folded_count(statement, values)
            else:
                rows = _together(self.connection, writes, lambda: self._report(reporting, statement, values))
        # As Django does: the parents' tables of a multi-table model come behind.
        for query in self.query.get_related_updates():
            more = query.get_compiler(self.using).execute_sql(result_type)
            if rows is None and more:
                rows = more
        return rows or 0

    def execute_returning_sql(self, returning_fields: Any) -> Any:
        """Django 6.0 and later: `save()` asks for what the server made of an expression."""
        writes = self._touched()
        if not writes or not returning_fields or self.query.get_related_updates():
            return super().execute_returning_sql(returning_fields)
        text, params = self.as_sql()
        safe, table = writes.escaped, quote(self.query.get_meta().db_table)
        before, after, old = "old", "new", ""
        if self.connection.pg_version < RETURNING_OLD:  # type: ignore[attr-defined]
            text, params, old = self._with_old_rows_locked(safe, text, tuple(params), returning="")
            before, after = OLD, table
        wanted = [f"{table}.{quote(field.column)}" for field in returning_fields]
        sides = safe.returning({BEFORE: before, AFTER: after}).removeprefix("RETURNING ")
        write = f"{text} RETURNING {', '.join([*wanted, 'TRUE', sides])}"
        rows = _together(
            self.connection, writes, lambda: self._both_sides(writes, write, params, len(wanted), before=old)
        )
        return list(self._converted(rows, returning_fields))

    def _reporting(
        self, writes: WriteSet, text: str, params: tuple[Any, ...], *, at_once: bool
    ) -> tuple[str, tuple[Any, ...]]:
        if self.connection.pg_version >= RETURNING_OLD:  # type: ignore[attr-defined]
            returning = writes.returning({BEFORE: "old", AFTER: "new"})
            write, old = f"{text} {returning}", ""
        else:
            write, params, old = self._with_old_rows_locked(writes, text, params)
        if at_once:
            return writes.folding(write, (BEFORE, AFTER), before=old), params
        return writes.report(write, (BEFORE, AFTER), before=old), params

    def _with_old_rows_locked(
        self, writes: WriteSet, text: str, params: tuple[Any, ...], returning: str | None = None
    ) -> tuple[str, tuple[Any, ...], str]:
        """Old values on PostgreSQL 14-17: lock the rows, then update what was locked.

        ``FOR NO KEY UPDATE`` waits for whoever holds a row and reads its newest version, and
        PostgreSQL hands that very version to the UPDATE's re-check (EvalPlanQual); a plain
        self-join would report the values of the statement's snapshot instead.
        """
        meta: Any = self.query.get_meta()
        table, pk = quote(meta.db_table), quote(meta.pk.column)
        where, where_params = self._where()
        head, head_params = text, params
        if where:
            at = text.rindex(f" WHERE {where}")
            head, head_params = text[:at], params[: len(params) - len(where_params)]
        condition = f" WHERE {where}" if where else ""
        columns = "".join(f", {table}.{quote(c)} AS {BEFORE}{i}" for i, c in enumerate(writes.columns))
        strength = "UPDATE" if meta.pk in [v[0] for v in self.query.values] else "NO KEY UPDATE"  # type: ignore[attr-defined]
        old = (
            f"{OLD} AS MATERIALIZED (SELECT {table}.{pk} AS scaledb_pk{columns} FROM {table}{condition} "
            f"FOR {strength} OF {table}), "
        )
        # The same condition again lets PostgreSQL prune partitions; both versions of a row meet it.
        again = bool(where) and "SELECT" not in where.upper()
        update = f"{head} FROM {OLD} WHERE {table}.{pk} = {OLD}.scaledb_pk"
        if again:
            update += f" AND ({where})"
        update += f" {writes.returning({BEFORE: OLD, AFTER: table})}" if returning is None else returning
        values = (*where_params, *head_params, *(where_params if again else ()))
        return update, values, old

    def _where(self) -> tuple[str, tuple[Any, ...]]:
        from django.core.exceptions import FullResultSet

        try:
            where, params = self.compile(self.query.where)  # type: ignore[arg-type]  # a WhereNode compiles
        except FullResultSet:
            return "", ()
        return where, tuple(params)


class CountedInsertMixin(_CountedCompiler, _InsertCompiler):
    """INSERT that returns keys and amounts beside each row; upserts report what they replaced."""

    def execute_sql(self, returning_fields: Any = None) -> Any:  # type: ignore[override]
        writes = self._write_set()
        upserts = self.query.on_conflict == OnConflict.UPDATE  # type: ignore[attr-defined]
        if not writes or not (writes.counters or upserts):
            return super().execute_sql(returning_fields)
        wanted = len(returning_fields or ())
        run = self._inserted
        if upserts:
            run = self._upserted if self.connection.pg_version >= RETURNING_OLD else self._upserted_before_18  # type: ignore[attr-defined]
        # Before PostgreSQL 18 a WHERE comes between the statement and its RETURNING.
        self.returning_fields = returning_fields if run != self._upserted_before_18 else None
        try:
            ((text, params),) = self.as_sql()
        except EmptyResultSet:
            return []
        self.returning_fields = returning_fields
        if not upserts and self._folds_at_once(writes):
            table = quote(str(self.query.get_meta().db_table))
            columns = [f"{table}.{quote(column)}" for column in writes.escaped.columns]
            write = self._and_returning(text, wanted, columns or ["NULL"])
            folding = writes.escaped.folding(write, AFTER, wanted=wanted)
            rows = _again(self.connection, lambda: self._run(folding, params))
        else:
            rows = _together(self.connection, writes, lambda: run(writes, text, params, wanted))
        return list(self._converted(rows, returning_fields)) if returning_fields else []

    @staticmethod
    def _and_returning(text: str, wanted: int, columns: Sequence[str]) -> str:
        return f"{text}{', ' if wanted else ' RETURNING '}{', '.join(columns)}"

    def _inserted(self, writes: WriteSet, text: str, params: Sequence[Any], wanted: int) -> list[Any]:
        rows = self._run(self._and_returning(text, wanted, writes.escaped.beside), params)
        self._book(writes, rows, wanted, 1)
        return [row[:wanted] for row in rows]

    def _upserted(self, writes: WriteSet, text: str, params: Sequence[Any], wanted: int) -> list[Any]:
        """INSERT .. ON CONFLICT DO UPDATE on PostgreSQL 18: OLD is NULL for a row that is new."""
        safe = writes.escaped
        meta: Any = self.query.get_meta()
        pk = quote(meta.pk.column)
        columns = [f"old.{pk} IS NOT NULL"]
        columns += [
            f"{v}.{quote(c)} AS {s}{i}"
            for s, v in ((BEFORE, "old"), (AFTER, "new"))
            for i, c in enumerate(safe.columns)
        ]
        write = self._and_returning(text, wanted, columns)
        return self._both_sides(writes, write, params, wanted)

    def _upserted_before_18(
        self, writes: WriteSet, text: str, params: Sequence[Any], wanted: int
    ) -> list[Any]:
        """The same on PostgreSQL 14-17: lock and read the rows that will be replaced, replace only those.

        A row that somebody commits in between is then neither replaced nor returned; that is
        noticed, and the pair is run again with the next snapshot, which has the row.
        """
        safe = writes.escaped
        meta: Any = self.query.get_meta()
        table, pk = quote(meta.db_table), f"{quote(meta.db_table)}.{quote(meta.pk.column)}::text"
        hops = [f"{table}.{quote(column)}::text" for hop in safe.hops for column in (hop.pk, hop.value)]
        reported = [pk, *safe.beside, *hops]
        old_text, old_params = self._old_rows(meta, reported)
        returned = [f"{table}.{quote(field.column)}" for field in self.returning_fields or ()]
        write = f"{text} WHERE {pk} = ANY(%s) RETURNING {', '.join([*returned, *reported])}"
        expected = len(self.query.objs)
        for _ in range(ATTEMPTS):
            try:
                with transaction.atomic(using=self.using):
                    old = {row[0]: row for row in self._run(old_text, old_params)}
                    rows = self._run(write, [*params, list(old)])
                    if len(rows) < expected:
                        raise _RowAppeared  # noqa: TRY301  # leaves the savepoint
                    self._book(writes, rows, wanted + 1, 1)
                    replaced = [(old[row[wanted]], row[wanted:]) for row in rows if row[wanted] in old]
                    end = self._book(writes, [before for before, _ in replaced], 1, -1)
                    for at, hop in zip(range(end, end + 2 * len(writes.hops), 2), writes.hops, strict=True):
                        for before, after in replaced:
                            if before[at + 1] != after[at + 1]:
                                self._remember(hop, before[at], before[at + 1])
                    return [row[:wanted] for row in rows]
            except _RowAppeared:
                continue
        raise ScaleDBError(
            f"cannot count an upsert into {meta.db_table}: {ATTEMPTS} times it met rows "
            f"that were committed while "
            'it ran; run it again, or declare the counters of this model with mechanism = "trigger"'
        )

    def _old_rows(self, meta: Any, columns: Sequence[str]) -> tuple[str, list[Any]]:
        """The rows that the INSERT's values will conflict with, locked."""
        unique = list(self.query.unique_fields)  # type: ignore[attr-defined]
        rows: list[str] = []
        params: list[Any] = []
        for obj in self.query.objs:
            placeholders = []
            for field in unique:
                value = self.prepare_value(field, self.pre_save_val(field, obj))
                special: Any = getattr(field, "get_placeholder", None)
                placeholder, values = self.field_as_sql(field, special, value)
                placeholders.append(
                    f"({placeholder})::{field.db_type(self.connection) or field.rel_db_type(self.connection)}"
                )
                params += values
            rows.append(f"({', '.join(placeholders)})")
        table = quote(meta.db_table)
        names = ", ".join(f"u{i}" for i in range(len(unique)))
        match = " AND ".join(f"{table}.{quote(f.column)} = v.u{i}" for i, f in enumerate(unique))
        return (
            f"SELECT {', '.join(columns)} FROM {table} JOIN (VALUES {', '.join(rows)}) v({names}) ON {match} "
            f"ORDER BY {table}.{quote(meta.pk.column)} FOR NO KEY UPDATE OF {table}",
            params,
        )
