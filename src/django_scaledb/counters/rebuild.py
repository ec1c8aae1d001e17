"""Finding drift, and repairing it while writers go on.

A writer commits a row together with its delta, so the difference between a count and what is
stored is the same in every snapshot: it is measured in one, and added later as one more delta.
Writing the counted number itself would undo whatever was committed in between.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from django.db import connections, transaction
from django.db.backends.base.base import BaseDatabaseWrapper

from django_scaledb.counters import registry, triggers
from django_scaledb.counters.definition import Definition, quote
from django_scaledb.counters.detach import kept_groups
from django_scaledb.counters.statements import drift, fold, groups, pending_relation, unnested
from django_scaledb.exceptions import ScaleDBError
from django_scaledb.postgres.pooling import require_session

if TYPE_CHECKING:
    from django_scaledb.counters.models import CounterModel

logger = logging.getLogger("django_scaledb.counters")
# The commands print what they find: where nobody has asked for logs, nothing is said twice.
logger.addHandler(logging.NullHandler())

BATCH_KEYS = 500
RawKey = tuple[str | None, ...]


class AnotherRepairInProgress(ScaleDBError):
    """Another rebuild of this counter is running."""


@dataclass(frozen=True)
class Drift:
    """One key whose stored totals are not what its rows come to; values are numbers by total."""

    key: dict[str, str | None]
    expected: dict[str, Any]
    stored: dict[str, Any]

    def __str__(self) -> str:
        key = ", ".join(f"{name}={'NULL' if value is None else value}" for name, value in self.key.items())
        wrong = [
            f"{name} is {self.stored[name]} and should be {self.expected[name]}"
            for name in self.expected
            if self.expected[name] != self.stored[name]
        ]
        return f"{key or 'all rows'}: {', '.join(wrong)}"


@dataclass
class Finding:
    """What a check found about one counter."""

    label: str
    drifts: list[Drift] = field(default_factory=list)
    detach_pending: list[str] = field(default_factory=list)
    trigger_problems: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.drifts and not self.trigger_problems

    def as_json(self) -> dict[str, Any]:
        """The stable form of ``check_counters --format json``; numbers that are not whole are strings."""
        return {
            "counter": self.label,
            "ok": self.ok,
            "drift": [
                {"key": d.key, "expected": _plain(d.expected), "stored": _plain(d.stored)}
                for d in self.drifts
            ],
            "detach_pending": self.detach_pending,
            "trigger_problems": self.trigger_problems,
        }


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    return {name: str(value) if isinstance(value, Decimal) else value for name, value in values.items()}


def _number(value: Any) -> Any:
    value = value or 0
    return int(value) if value == int(value) else value


def check(counter: type[CounterModel], using: str, leaving: Sequence[str] = ()) -> Finding:
    """Compare `counter` with its source in one snapshot of the database `using`.

    `leaving` are tables (SQL) that are being detached from the source and have not been accounted
    for: their rows are still counted, and that is no drift.
    """
    connection = connections[using]
    definition = registry.definition(counter, connection)
    found = Finding(counter._meta.label, detach_pending=list(leaving))
    expected = [groups(definition, quote(definition.source_table)), *_besides(counter, definition, leaving)]
    with connection.cursor() as cursor:
        cursor.execute(drift(definition, expected))
        found.drifts = [_drift(definition, row) for row in cursor.fetchall()]
    if counter._counter_meta.mechanism == "trigger":
        found.trigger_problems = trigger_problems(definition, connection)
    level = logging.DEBUG if found.ok else logging.WARNING
    extra = {"counter": found.label, "database": using, "drifted_keys": len(found.drifts)}
    logger.log(level, "%s: %s keys differ from the source", found.label, len(found.drifts), extra=extra)
    return found


def _besides(counter: type[CounterModel], definition: Definition, leaving: Sequence[str]) -> list[str]:
    """What a counter holds besides the rows of its source."""
    besides = [groups(definition, table) for table in leaving]
    if counter._counter_meta.on_detach == "keep":
        besides.append(kept_groups(definition))
    return besides


def _drift(definition: Definition, row: Sequence[Any]) -> Drift:
    n, m = len(definition.keys), len(definition.totals)
    names = [total.column for total in definition.totals]
    return Drift(
        {
            key.column: None if value is None else str(value)
            for key, value in zip(definition.keys, row, strict=False)
        },
        dict(zip(names, map(_number, row[n : n + m]), strict=True)),
        dict(zip(names, map(_number, row[n + m :]), strict=True)),
    )


def trigger_problems(definition: Definition, connection: BaseDatabaseWrapper) -> list[str]:
    """Why the triggers in the database do not do what the counter says, one sentence each."""
    found = []
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT obj_description(to_regprocedure(%s), 'pg_proc')",
            [f"{triggers.prefix(definition)}_fold()"],
        )
        (comment,) = cursor.fetchone()
        if comment is None:
            found.append(f"{definition.label} has no triggers in the database; run manage.py migrate")
        elif comment != triggers.comment(definition):
            found.append(
                f"the triggers of {definition.label} are not what its CounterMeta says; run manage.py "
                "makemigrations and migrate"
            )
        if comment is not None:
            cursor.execute(triggers.unarmed(definition))
            found += [
                f"{table} lacks triggers of {definition.label}, so writes that name it do not count; run "
                "manage.py rebuild_counters"
                for (table,) in cursor.fetchall()
            ]
    return found


# -- repairing


def rebuild(
    counter: type[CounterModel],
    using: str,
    *,
    leaving: Callable[[str], Sequence[str]] = lambda using: (),
    read_from: str | None = None,
    batch_keys: int = BATCH_KEYS,
    on_progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> int:
    """Repair `counter`, or fill it for the first time; returns how many keys were wrong.

    Counts in one snapshot (of `read_from`, a replica that has caught up, if it is given), table by
    table where the source is partitioned; then adds what is missing in batches of `batch_keys`, each
    a transaction of its own. Killed at any moment it has repaired some keys and spoilt none, and
    running it again does the rest. `on_progress` is told ``(what, done, total)``. `leaving` gives, for
    the alias that is counted on, what `check` takes by that name; it is asked inside the snapshot.

    Raises `AnotherRepairInProgress` when one is running, `ScaleDBError` when the replica lags.
    """
    connection = connections[using]
    definition = registry.definition(counter, connection)
    with _only_repairer(connection, definition):
        if counter._counter_meta.mechanism == "trigger":
            _arm_what_is_not(connection, definition)
        source = connections[read_from] if read_from else connection
        if read_from:
            _wait_for_replay(connection, source)
        wrong = sorted(
            _measure(counter, source, leaving, on_progress).items(),
            key=lambda item: [(part is None, part or "") for part in item[0]],
        )
        # Repairs are in the counter's own keys already: no span is to be followed again.
        direct = definition.direct.escaped
        statement = fold(direct, pending_relation(direct, unnested(direct)))
        for start in range(0, len(wrong), batch_keys):
            batch = wrong[start : start + batch_keys]
            arrays = [[key[i] for key, _ in batch] for i in range(len(direct.keys))]
            arrays += [[str(amounts[i]) for _, amounts in batch] for i in range(len(direct.totals))]
            own = not connection.in_atomic_block
            with transaction.atomic(using=using), connection.cursor() as cursor:
                if own:
                    # Whatever the application's level is: adding needs no snapshot, and waits for its turn.
                    cursor.execute("SET TRANSACTION ISOLATION LEVEL READ COMMITTED")
                cursor.execute(statement, arrays)
            on_progress("keys repaired", min(start + batch_keys, len(wrong)), len(wrong))
    return len(wrong)


@contextmanager
def _only_repairer(connection: BaseDatabaseWrapper, definition: Definition) -> Iterator[None]:
    key = definition.lock_id ^ 1
    with connection.cursor() as cursor:
        if not connection.in_atomic_block:
            require_session(connection)
        cursor.execute("SELECT pg_try_advisory_lock(%s)", [key])
        if not cursor.fetchone()[0]:
            raise AnotherRepairInProgress(
                f"cannot repair {definition.label}: another rebuild_counters of it is "
                f"running; wait for it, its "
                "repairs are not lost"
            )
    try:
        yield
    finally:
        with connection.cursor() as cursor:
            cursor.execute("SELECT pg_advisory_unlock(%s)", [key])


def _arm_what_is_not(connection: BaseDatabaseWrapper, definition: Definition) -> None:
    """Partitions made by hand carry no triggers yet; what was written to them is drift, repaired below."""
    with connection.cursor() as cursor:
        cursor.execute(triggers.unarmed(definition))
        for (table,) in cursor.fetchall():
            for statement in triggers.arm(definition, table):
                cursor.execute(statement)


def _wait_for_replay(primary: BaseDatabaseWrapper, replica: BaseDatabaseWrapper) -> None:
    """An earlier repair must be in what is counted, or it would be done twice."""
    with primary.cursor() as cursor, replica.cursor() as there:
        cursor.execute("SELECT pg_logical_emit_message(true, 'django_scaledb', 'rebuild')::text")
        (position,) = cursor.fetchone()
        for _ in range(300):
            there.execute(
                "SELECT NOT pg_is_in_recovery() OR pg_last_wal_replay_lsn() >= %s::pg_lsn, pg_sleep(0.1)",
                [position],
            )
            if there.fetchone()[0]:
                return
    raise ScaleDBError(
        f"{replica.alias!r} has not replayed within 30 s what was committed on "
        f"{primary.alias!r}; count on the "
        "primary instead (without --read-from)"
    )


def _measure(
    counter: type[CounterModel],
    connection: BaseDatabaseWrapper,
    leaving: Callable[[str], Sequence[str]],
    on_progress: Callable[[str, int, int], None],
) -> dict[RawKey, list[Any]]:
    """What has to be added to each wrong key, as one snapshot has it."""
    definition = registry.definition(counter, connection)
    n, m = len(definition.keys), len(definition.totals)
    as_text = ", ".join([*(f"k{i}::text" for i in range(n)), *(f"t{i}" for i in range(m))])
    if connection.in_atomic_block or not _is_partitioned(connection, definition):
        source = groups(definition, quote(definition.source_table))
        besides = _besides(counter, definition, leaving(connection.alias))
        keys = ", ".join([*(f"k{i}::text" for i in range(n)), *(f"e{i} - s{i}" for i in range(m))])
        with connection.cursor() as cursor:
            cursor.execute(f"SELECT {keys} FROM ({drift(definition, [source, *besides])}) d")
            wrong = {tuple(row[:n]): list(row[n:]) for row in cursor.fetchall()}
        on_progress("tables counted", 1, 1)
        return wrong
    sums: dict[RawKey, list[Any]] = {}
    stored = ", ".join(
        [*(f"{quote(key.column)}::{key.type} AS k{i}" for i, key in enumerate(definition.keys))]
        + [f"-{quote(total.column)} AS t{i}" for i, total in enumerate(definition.totals)]
    )
    with transaction.atomic(using=connection.alias), connection.cursor() as cursor:
        cursor.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
        # Partitions may come and go meanwhile: which there are belongs to the snapshot. The lock has no
        # snapshot yet; a DETACH that has begun is not over before we are, and nobody else waits for it.
        cursor.execute(f"LOCK TABLE {quote(definition.source_table)} IN ACCESS SHARE MODE")
        besides = _besides(counter, definition, leaving(connection.alias))
        queries = [groups(definition, table) for table in _leaves(cursor, definition)] + besides
        queries.append(f"SELECT {stored} FROM {quote(definition.table)}")
        for done, query in enumerate(queries, 1):
            cursor.execute(f"SELECT {as_text} FROM ({query}) g")
            for row in cursor.fetchall():
                held = sums.setdefault(tuple(row[:n]), [0] * m)
                for i, amount in enumerate(row[n:]):
                    held[i] += amount or 0
            on_progress("tables counted", done, len(queries))
    return {key: amounts for key, amounts in sums.items() if any(amounts)}


def _is_partitioned(connection: BaseDatabaseWrapper, definition: Definition) -> bool:
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT c.relkind = 'p' FROM pg_class c WHERE c.oid = %s::regclass",
            [quote(definition.source_table)],
        )
        return bool(cursor.fetchone()[0])


def _leaves(cursor: Any, definition: Definition) -> list[str]:
    """The source's leaf partitions as SQL, as the transaction's snapshot has them.

    Unlike pg_partition_tree(), which looks at what there is now. One that is being detached is not
    among them (see `leaving`).
    """
    cursor.execute(
        "WITH RECURSIVE tree(oid) AS (SELECT %s::regclass::oid UNION ALL SELECT i.inhrelid "
        "FROM pg_inherits i JOIN tree ON i.inhparent = tree.oid WHERE NOT i.inhdetachpending) "
        "SELECT c.oid::regclass::text FROM tree JOIN pg_class c USING (oid) "
        "WHERE c.relkind <> 'p' ORDER BY 1",
        [quote(definition.source_table)],
    )
    return [table for (table,) in cursor.fetchall()]
