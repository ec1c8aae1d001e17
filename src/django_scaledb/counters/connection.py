"""The connection's part: deltas live as long as their transaction and are applied right before COMMIT."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from psycopg import generators
from psycopg.errors import error_from_result
from psycopg.pq import ExecStatus

from django_scaledb.counters import registry, triggers
from django_scaledb.counters.definition import Definition
from django_scaledb.counters.deltas import DeltaLog, HopName, RawKey
from django_scaledb.counters.signals import counters_changed
from django_scaledb.counters.statements import (
    fold,
    fold_one,
    former_relation,
    pending_for_key,
    pending_relation,
    unchanged,
    unnested,
)

if TYPE_CHECKING:
    from django.db.backends.postgresql.base import DatabaseWrapper as _Wrapper

    from django_scaledb.counters.models import CounterModel
else:
    _Wrapper = object


class CounterConnectionMixin(_Wrapper):
    """Folds a transaction's deltas into the counters, one sorted statement per counter, at its end.

    A hot row is locked from there to COMMIT and no longer. Locks are always taken in the same order
    (advisory ones, then counters by name, then rows by key), so that no two transactions wait for
    each other because of a counter.

    Savepoints are followed where Django makes them (`atomic`, `transaction.savepoint`); a SAVEPOINT
    that an application runs through a cursor of its own is not seen.
    """

    keeps_counters = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.counter_deltas = DeltaLog()

    @property
    def is_on_its_own(self) -> bool:
        """Whether a statement would be a transaction by itself (a TestCase's blocks do not count)."""
        blocks: Any = self.atomic_blocks
        if blocks:
            return all(block._from_testcase for block in blocks) and not self.needs_rollback
        return not self.in_atomic_block and self.get_autocommit()

    # -- the transaction's course

    def savepoint(self) -> Any:
        sid = super().savepoint()
        if sid is not None:
            self.counter_deltas.savepoint(sid)
        return sid

    def savepoint_rollback(self, sid: Any) -> None:
        super().savepoint_rollback(sid)
        self.counter_deltas.rollback_to(sid)

    def savepoint_commit(self, sid: Any) -> None:
        # Inside a TestCase no COMMIT ever comes: what would be one without it is its stand-in.
        blocks: Any = self.atomic_blocks
        if self.counter_deltas and blocks and all(block._from_testcase for block in blocks):
            self.apply_counters()
        super().savepoint_commit(sid)
        self.counter_deltas.release(sid)

    def commit(self) -> None:
        if self.counter_deltas:
            try:
                self.validate_no_atomic_block()
                # The driver finds nothing left to commit, and sends nothing.
                self._apply("COMMIT")
            except BaseException:
                # Whatever stops us here, the rows must not be committed without their deltas.
                self.rollback()
                raise
        super().commit()
        self.counter_deltas.clear()

    def rollback(self) -> None:
        self.counter_deltas.clear()
        super().rollback()

    def close(self) -> None:
        self.counter_deltas.clear()
        super().close()

    # -- applying

    def apply_counters(self) -> None:
        """Write this transaction's deltas into the counters now.

        COMMIT does it by itself; call it earlier only to read a counter's table with plain queries
        in the same transaction, at the price of holding its rows' locks until the end.
        """
        self._apply()

    def _apply(self, *last: str) -> None:
        """All locks, all folds and what is to come `last`, in one message to the server.

        From the first row's lock to the end of COMMIT nothing waits for this process, which may
        be slow to get its turn: a hot row is free again as soon as the server can make it so.
        """
        log = self.counter_deltas
        told: list[tuple[type[CounterModel], Any]] = []
        locks: list[str] = []
        folds: list[str] = []
        params: list[Any] = []
        self.ensure_connection()
        for counter, definition, former in self._changed_counters():
            pending = log.pending(definition.label)
            if not pending and not former:
                continue
            if definition.hops:
                # A parent's move must see every row below it, and a row its parent's move.
                function = "pg_advisory_xact_lock" if former else "pg_advisory_xact_lock_shared"
                locks.append(f"SELECT {function}({definition.lock_id})")
            if len(pending) == 1 and not definition.hops:
                ((key, amounts),) = pending.items()
                folds.append(fold_one(definition, key, amounts).replace("%", "%%"))
            else:
                safe = definition.escaped
                relation = pending_relation(safe, unnested(safe))
                arrays = _arrays(definition, pending)
                for check in unchanged(safe, relation):
                    folds.append(check)
                    params += arrays
                folds.append(fold(safe, relation, self._former_relations(safe, former)))
                params += [*arrays, *self._former_arrays(former)]
            if pending and counters_changed.has_listeners(counter):
                told.append((counter, _told(definition, pending)))
        if folds:
            text = ";\n".join([*locks, *folds, *last])
            if not params:
                self._send(text.replace("%%", "%"))
            else:
                if self.settings_dict["OPTIONS"].get("server_side_binding"):
                    # Parameters that travel by themselves allow for one statement a message.
                    text, params = self.ops.compose_sql(text, params), []
                with self.cursor() as cursor:
                    cursor.execute(text, params or None)
        log.spend()
        if told:
            # Not on_commit(): before COMMIT no atomic block is left for it to see.
            hooks: list[Any] = self.run_on_commit
            hooks.append((set(self.savepoint_ids), partial(_tell, self.alias, told), True))

    def _send(self, text: str) -> None:
        """Run `text`; past the cursors, which cost as much as the rest, where nobody follows them."""
        connection: Any = self.connection
        if self.is_followed or connection._pipeline is not None:
            with self.cursor() as cursor:
                cursor.execute(text)
            return
        with self.wrap_database_errors, connection.lock:
            connection.pgconn.send_query(text.encode())
            for result in connection.wait(generators.execute(connection.pgconn)):
                if result.status == ExecStatus.FATAL_ERROR:
                    raise error_from_result(result)

    @property
    def is_followed(self) -> bool:
        """Whether somebody wants to know of each statement: a log, a wrapper, a driver of its own."""
        return bool(self.queries_logged or self.execute_wrappers)

    def _changed_counters(
        self,
    ) -> list[tuple[type[CounterModel], Definition, list[HopName]]]:
        """The counters to write, in the order of their tables, with the steps that were changed."""
        labels = set(self.counter_deltas.labels())
        hops = set(self.counter_deltas.former_hops())
        found = []
        for counter in registry.by_signals():
            if counter._meta.label not in labels and not hops:
                continue
            definition = registry.definition(counter, self)
            former = [name for hop in definition.hops if (name := (hop.table, hop.value)) in hops]
            if counter._meta.label in labels or former:
                found.append((counter, definition, list(dict.fromkeys(former))))
        return sorted(found, key=lambda item: item[1].table)

    def _former_relations(self, definition: Definition, former: Sequence[HopName]) -> dict[HopName, str]:
        return {
            (hop.table, hop.value): former_relation(hop)
            for name in former
            for hop in [h for h in definition.hops if _unescaped(h.table, h.value) == name][:1]
        }

    def _former_arrays(self, former: Sequence[HopName]) -> list[list[Any]]:
        arrays: list[list[Any]] = []
        for name in former:
            values = self.counter_deltas.former(name)
            arrays += [list(values), list(values.values())]
        return arrays

    def pending_for_key(self, counter: type[CounterModel], key: Sequence[Any]) -> dict[str, Any]:
        """What this transaction has added to one key of `counter` and not applied yet, by total."""
        if counter._counter_meta.mechanism == "trigger":
            return self._booked_for_key(counter, key)
        if not self.counter_deltas:
            return {}
        for changed, definition, former in self._changed_counters():
            if changed is counter:
                safe = definition.escaped
                text = pending_for_key(
                    safe, pending_relation(safe, unnested(safe)), self._former_relations(safe, former)
                )
                pending = self.counter_deltas.pending(definition.label)
                params = [*_arrays(definition, pending), *self._former_arrays(former), *key]
                return self._amounts(counter, definition, text, params)
        return {}

    def _booked_for_key(self, counter: type[CounterModel], key: Sequence[Any]) -> dict[str, Any]:
        """The same where triggers have booked it in the transaction's settings."""
        if not self.in_atomic_block and self.get_autocommit():
            return {}
        definition = registry.definition(counter, self)
        names = triggers.settings(definition)
        with self.cursor() as cursor:
            cursor.execute(f"SELECT {', '.join(['current_setting(%s, true)'] * len(names))}", names)
            pending, *former = (text or "" for text in cursor.fetchone())
        if not pending and not any(former):
            return {}
        safe = definition.escaped
        relations = {}
        if any(former):
            relations = {(hop.table, hop.value): triggers.formerly(hop, "%s::text") for hop in safe.hops}
        text = pending_for_key(safe, triggers.booked(safe, "%s::text"), relations)
        params = [pending, *(former if relations else ()), *key]
        return self._amounts(counter, definition, text, params)

    def _amounts(
        self, counter: type[CounterModel], definition: Definition, text: str, params: Sequence[Any]
    ) -> dict[str, Any]:
        with self.cursor() as cursor:
            cursor.execute(text, params)
            amounts = cursor.fetchone()
        return {
            name: counter._meta.get_field(name).to_python(amount or 0)  # type: ignore[union-attr]
            for name, amount in zip((t.column for t in definition.totals), amounts, strict=True)
        }


def _unescaped(table: str, column: str) -> HopName:
    return table.replace("%%", "%"), column.replace("%%", "%")


def _arrays(definition: Definition, pending: dict[RawKey, list[Any]]) -> list[list[Any]]:
    """One array per key column and per total, as `statements.unnested` takes them."""
    keys = [[key[i] for key in pending] for i in range(len(definition.keys))]
    totals = [[str(amounts[i]) for amounts in pending.values()] for i in range(len(definition.totals))]
    return keys + totals


def _told(definition: Definition, pending: dict[RawKey, list[Any]]) -> Any:
    columns = [key.column for key in definition.keys]
    totals = [total.column for total in definition.totals]
    return [
        (
            dict(zip(columns, key, strict=True)),
            {name: amount for name, amount in zip(totals, amounts, strict=True) if amount},
        )
        for key, amounts in pending.items()
    ]


def _tell(alias: str, told: list[tuple[type[CounterModel], Any]]) -> None:
    for counter, changes in told:
        counters_changed.send_robust(sender=counter, using=alias, changes=changes)
