"""A partition brought back: from the archive, or from the detached table that it still is.

Nothing of the set is touched until the table stands beside it complete: rows verified, indexes
built, foreign keys validated. One transaction then attaches it, and is the commit point.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from difflib import get_close_matches
from functools import partial
from typing import IO, Any

from django.db import DEFAULT_DB_ALIAS, DatabaseError, InterfaceError, connections, models, transaction
from django.db.backends.base.base import BaseDatabaseWrapper
from django.utils import timezone
from psycopg import sql

from django_scaledb.conf import settings
from django_scaledb.exceptions import ArchiveError, DDLError, PlanError, ScaleDBError
from django_scaledb.partitions import catalog, ddl, hooks, inheritance, inspection, registry
from django_scaledb.partitions.archive import drift as drifts
from django_scaledb.partitions.archive import parquet, rows, state, storage
from django_scaledb.partitions.archive.columns import Column, copy_in, stored
from django_scaledb.partitions.archive.manifest import Manifest
from django_scaledb.partitions.archive.session import Options, Session
from django_scaledb.partitions.bounds import Range
from django_scaledb.partitions.catalog import Member
from django_scaledb.partitions.ddl import Filled
from django_scaledb.partitions.maintenance import Listener
from django_scaledb.partitions.marker import Marker, MarkState
from django_scaledb.partitions.overview import no_table
from django_scaledb.partitions.plan import Detach, Partition, State
from django_scaledb.partitions.report import ModelReport, Report, Result, Sent, Status
from django_scaledb.partitions.work import Worker
from django_scaledb.postgres.executor import Guard, script, sqlstate
from django_scaledb.postgres.identifiers import TableName
from django_scaledb.postgres.locks import Lock, LockMode
from django_scaledb.postgres.statements import Statement, Step

_FOREIGN_KEY_VIOLATION = "23503"
_ONLY_SINCE = 180000


@dataclass(frozen=True)
class Wish:
    """What is to be restored: the partition's name, maybe with its schema.

    `manifest` names a file of the archive's storage, for what this database does not know of;
    `left_out` are columns that are in the archive and not in the table any more.
    """

    name: str
    manifest: str | None = None
    left_out: tuple[str, ...] = ()

    def means(self, table: TableName) -> bool:
        return self.name in (table.name, str(table))


@dataclass
class Restorer(Session):
    """Brings partitions of one model back. With `dry_run` only what would be sent is told to `on_step`."""

    dry_run: bool = False

    def restore(self, wish: Wish) -> Partition | None:
        """The partition that was brought back, or None when it is where it should be.

        Raises `ScaleDBError` with the reason. What was done is kept, and calling it again goes on.
        """
        worker = self._worker()
        worker.require_rights()
        with self._alone():
            self._look_again()
            if (member := self._among(self.parent.members, wish)) is not None and not member.is_pending:
                return self._keep(member)
            if member is None:
                member = self._among(self.parent.detached, wish)
            if member is not None:
                table, bounds = self._from_detached(member, wish)
            elif (member := self._among(self.parent.returning, wish)) is not None and not _is_loading(member):
                table, bounds = member.table, self._bounds(member)
            else:
                table, bounds = self._from_archive(wish, member)
            self._attach(table, bounds)
            self._after(table)
        return Partition(table, bounds, State.ATTACHED, managed=True, held_since=self.options.now)

    def release(self, wish: Wish) -> Partition | None:
        """Give a restored partition back to retention; None when it is retention's already."""
        self._worker().require_rights()
        member = self._among(self.parent.members, wish)
        if member is None:
            raise ArchiveError(f"{wish.name} is not a partition of {self.parent.table}{self._near(wish)}")
        marker = member.marker
        if marker is None or marker.held_since is None:
            return None
        bounds = self._bounds(member)
        step = ddl.mark(member.table, ddl.hold(self.parent, bounds, None))
        self.run(step, guard=partial(_still, member.table, member.oid, marker))
        return Partition(member.table, bounds, State.ATTACHED, managed=True)

    # -- where it is

    def _look_again(self) -> None:
        [found] = catalog.read(self.connection, [self.model._meta.db_table])
        if found is None:
            raise ArchiveError(f"{self.parent.table} is gone")
        found.partitions(self.config)  # raises where it is not what the model says
        self.parent = found

    def _among(self, members: Sequence[Member], wish: Wish) -> Member | None:
        found = [member for member in members if wish.means(member.table)]
        if len(found) > 1:
            names = " and ".join(str(member.table) for member in found)
            raise ArchiveError(f"{wish.name} may be {names}; say it with its schema")
        return found[0] if found else None

    def _bounds(self, member: Member) -> Range:
        if member.marker is None or member.marker.range is None:
            raise ArchiveError(
                f"the mark of {member.table} does not say what its bounds were; attach it by hand: "
                f"{self._by_hand(member.table)}"
            )
        return member.marker.range

    def _by_hand(self, table: object) -> str:
        return f"ALTER TABLE {self.parent.table} ATTACH PARTITION {table} FOR VALUES FROM (..) TO (..)"

    def _near(self, wish: Wish) -> str:
        known = {m.table.name for m in (*self.parent.members, *self.parent.detached, *self.parent.returning)}
        known |= {a.partition_name for a in state.of_tables(self.connection, [self.parent.table])}
        close = get_close_matches(wish.name.rpartition(".")[2], known, n=1)
        return f"; did you mean {close[0]}?" if close else ""

    def _require_room(self, table: TableName, bounds: Range) -> None:
        """Raises when partitions that are attached now take rows of `bounds`."""
        for other in self.parent.partitions(self.config):
            attached = other.state is not State.DETACHED and other.range is not None
            if attached and other.table != table and other.range is not None and other.range.overlaps(bounds):
                raise ArchiveError(
                    f"{table} cannot come back for {bounds}: {other.table} ({other.range}) takes rows of "
                    "that time now; drop it if it is empty, or detach it and merge the rows by hand"
                )

    # -- what is attached already

    def _keep(self, member: Member) -> Partition | None:
        """A partition that is where it should be; a rotation that was about to take it off shall not."""
        marker = member.marker
        if marker is None or marker.state is not MarkState.RETIRING:
            if marker is not None and marker.held_since is not None:
                self._after(member.table)  # a run that died may not have come to it
            elif (marker is None or marker.state is MarkState.ATTACHED) and self._is_archived(member.table):
                raise ArchiveError(
                    f"{member.table} is attached, and is another partition than the archived one of that "
                    "name; drop it if it is empty, or detach and rename it"
                )
            return None
        bounds = self._bounds(member)
        step = ddl.mark(member.table, ddl.hold(self.parent, bounds, self.options.now))
        self.run(step, guard=partial(_still, member.table, member.oid, marker))
        return Partition(member.table, bounds, State.ATTACHED, managed=True, held_since=self.options.now)

    def _is_archived(self, table: TableName) -> bool:
        archives = state.of_tables(self.connection, [self.parent.table])
        return any(archive.partition == table for archive in archives)

    # -- a detached table

    def _from_detached(self, member: Member, wish: Wish) -> tuple[TableName, Range]:
        table, bounds = member.table, self._bounds(member)
        if wish.manifest is not None:
            raise ArchiveError(f"{table} is still there, detached: restore it without --manifest, or drop it")
        self._require_room(table, bounds)
        difference = drifts.compare(
            rows.describe(self.connection, table, archivable=False),
            rows.describe(self.connection, self.parent.table, archivable=False),
        )
        self._require_columns(table, difference, wish)
        for before, now in difference.changed:
            raise ArchiveError(
                f"{table} has a column {before.name!r} of type {before.type}, which is {now.type} in the set "
                f"by now; ALTER TABLE {table} ALTER COLUMN {before.name} TYPE {now.type}, and run again"
            )
        filled = self._filled(table, difference, in_database=True)
        marker = member.marker
        assert marker is not None
        if member.is_pending or marker.state is MarkState.RETIRING:
            self._finish_detach(member, bounds)
            if not self.dry_run:
                self._look_again()
                member = self.parent.member(table)
                marker = member.marker
                assert marker is not None
        step = ddl.return_detached(self.parent, member, bounds, filled, wish.left_out)
        self.run(step, guard=partial(_still, table, member.oid, marker), bounded=False)
        return table, bounds

    def _finish_detach(self, member: Member, bounds: Range) -> None:
        """What the rotation would do next: others have accounted for the table's rows then."""
        action = Detach(Partition(member.table, bounds, State.DETACH_PENDING, managed=True, retiring=True))
        for task in self._worker().tasks(action):
            self.run(task.step, guard=task.guard, resume=task.resume, bounded=task.bounded)

    def _worker(self) -> Worker:
        return Worker(
            self.connection, self.model, self.config, self.parent, self.options.now, drain_default=False
        )

    # -- an archive

    def _from_archive(self, wish: Wish, leftover: Member | None) -> tuple[TableName, Range]:
        manifest, keeper, archive = self._find_archive(wish)
        table, bounds = self.parent.table.sibling(manifest.partition.name), manifest.range
        self._require_room(table, bounds)
        if leftover is not None:
            self._drop(leftover)
        elif inspection.taken_names(self.connection, table.schema, [table.name]):
            raise ArchiveError(f"{table} is the name of another table by now; rename that one and run again")
        columns = stored(manifest.columns)
        now = rows.describe(self.connection, self.parent.table, archivable=False)
        difference = drifts.compare(columns, now)
        self._require_columns(table, difference, wish)
        self._require_casts(table, difference)
        filled = self._filled(table, difference, in_database=False)
        with storage.fetched(keeper, manifest.file) as (file, size, sha256):
            if (size, sha256) != (manifest.size, manifest.sha256):
                raise ArchiveError(
                    f"{manifest.file} is not what was stored: {size} bytes, SHA-256 {sha256}, against "
                    f"{manifest.size} and {manifest.sha256} in its manifest"
                )
            own = tuple(inheritance.settings(self.connection, self.model, table))
            make = ddl.make_standalone(self.parent, self.config, bounds, table, archive, filled, beside=own)
            self.run(make)
            if self.dry_run:
                lock = Lock(table, LockMode.ROW_EXCLUSIVE)
                copy = Statement(copy_in(difference.kept, table.sql), (lock,))
                self.options.on_step(Step(f"load {table}", (copy,)))
            else:
                try:
                    self._load(file, manifest, table, columns, difference)
                except BaseException:
                    with suppress(Exception):
                        self._drop(self._made(table))
                    raise
        guard = None if self.dry_run else partial(_still, table, self._made(table).oid, None)
        self.run(ddl.loaded(self.parent, self.config, bounds, table, filled), guard=guard)
        return table, bounds

    def _find_archive(self, wish: Wish) -> tuple[Manifest, Any, int | None]:
        parquet.require()
        schema, _, name = wish.name.rpartition(".")
        wanted = TableName(schema or self.parent.table.schema, name)
        archive = None if wish.manifest else state.latest(self.connection, self.parent.table, [wanted])
        if archive is None and wish.manifest is None:
            self._refuse(wish)
        keeper = storage.find(archive.storage if archive else None)
        source = archive.manifest if archive else str(wish.manifest)
        storage.require(keeper, source)
        manifest = Manifest.load(storage.read(keeper, source), source)
        if manifest.partition.name != name or manifest.table.name != self.parent.table.name:
            raise ArchiveError(
                f"{source} is of {manifest.partition}, a partition of {manifest.table}, and not of "
                f"{wish.name} of {self.parent.table}"
            )
        storage.require(keeper, manifest.file, manifest.size)
        return manifest, keeper, archive.pk if archive else None

    def _refuse(self, wish: Wish) -> None:
        if self._among(self.parent.orphans, wish) is not None:
            raise ArchiveError(
                f"{wish.name} was detached by hand, and nobody knows what else was done to it; attach it by "
                f"hand: {self._by_hand(wish.name)}"
            )
        raise ArchiveError(
            f"{self.model._meta.label} has no partition {wish.name!r}, neither detached nor archived"
            f"{self._near(wish)}; manage.py show_partitions {self.model._meta.label} lists them"
        )

    def _load(
        self,
        file: IO[bytes],
        manifest: Manifest,
        table: TableName,
        columns: Sequence[Column],
        difference: drifts.Drift,
    ) -> None:
        """Load and compare; the rows are in the table exactly as they were, or an error is raised."""
        kept = difference.kept
        expected = (manifest.rows, manifest.checksum)
        progress = self.options.on_progress
        if kept != tuple(columns):
            # The checksum is of whole rows: that of the rest is worked out from the file.
            self.run(rows.scratch(columns))
            what = f"rows of {table} read"
            expected = rows.sums_of_file(
                self.connection, file, columns, kept, lambda done: progress(what, done, manifest.rows)
            )
            self.run(rows.without_scratch())
            file.seek(0)
        what = f"rows of {table} loaded"
        rows.load(self.connection, file, kept, table, lambda done: progress(what, done, manifest.rows))
        changed = [before.name for before, _ in difference.changed]
        found = rows.sums(self.connection, kept, table, changed)
        if found != expected:
            hint = f" (columns of another type now: {', '.join(changed)})" if changed else ""
            raise ArchiveError(
                f"what was loaded into {table} is not what was archived: {found[0]} rows (checksum "
                f"{found[1]}) against {expected[0]} ({expected[1]}){hint}; nothing was attached"
            )

    def _made(self, table: TableName) -> Member:
        [found] = catalog.read(self.connection, [self.model._meta.db_table])
        member = next((m for m in found.returning if m.table == table), None) if found else None
        if member is None:
            raise ArchiveError(f"{table} was dropped or marked anew meanwhile")
        return member

    def _drop(self, leftover: Member) -> None:
        """Only what a restore was filling: all of it is in the archive."""
        guard = partial(_still, leftover.table, leftover.oid, leftover.marker)
        self.run(ddl.drop(leftover), guard=guard)

    # -- columns

    def _require_columns(self, table: TableName, difference: drifts.Drift, wish: Wish) -> None:
        if (reason := drifts.objection(difference, wish.left_out)) is not None:
            raise ArchiveError(f"{table} cannot come back: {reason}")

    def _require_casts(self, table: TableName, difference: drifts.Drift) -> None:
        """A column of another type is compared as what it was, so there has to be a way back."""
        for before, now in difference.changed:
            query = sql.SQL("SELECT NULL::{}::{}").format(sql.SQL(now.type), sql.SQL(before.type))
            try:
                with transaction.atomic(using=self.connection.alias), self.connection.cursor() as cursor:
                    cursor.execute(query.as_string(self.connection.connection))
            except DatabaseError as error:
                raise ArchiveError(
                    f"{table} cannot come back: its column {before.name!r} was {before.type} and is "
                    f"{now.type} now, and PostgreSQL cannot turn one into the other"
                ) from error

    def _filled(self, table: TableName, difference: drifts.Drift, *, in_database: bool) -> tuple[Filled, ...]:
        """What the rows get in columns that they do not have: what AddField gave to those that were there.

        With `in_database` also the database's own defaults, which a table made like the set has.
        """
        defaults = inspection.defaults(self.connection, self.parent.oid)
        fields = {field.column: field for field in self.model._meta.local_fields}
        editor: Any = self.connection.schema_editor()
        found = []
        for column in difference.added:
            value: sql.Composable | None = None
            default = defaults.get(column.name)
            model_field = fields.get(column.name)
            if default is not None:
                value = sql.SQL(default)
                if not in_database:
                    continue
            elif model_field is not None and (known := editor.effective_default(model_field)) is not None:
                value = sql.Literal(known)
            if value is None and column.not_null:
                raise ArchiveError(
                    f"{table} cannot come back: the set has a column {column.name!r} by now, which is NOT "
                    "NULL and has no default; give the field a default or a db_default, and run again"
                )
            found.append(Filled(column.name, column.type, column.not_null, value))
        return tuple(found)

    # -- onto the set

    def _attach(self, table: TableName, bounds: Range) -> None:
        guard: Guard | None = None
        keys: list[inspection.ForeignKey] = []
        if not self.dry_run:
            member = self._made(table)
            guard = partial(_still, table, member.oid, member.marker)
            keys = inspection.foreign_keys_lacking(self.connection, self.parent.oid, member.oid)
        else:
            keys = inspection.foreign_keys_lacking(self.connection, self.parent.oid, 0)
        for key in keys:
            if key.is_valid is None:
                self.run(ddl.add_foreign_key(table, key.name, key.target, key.definition))
            try:
                self.run(ddl.validate_foreign_key(table, key.name, key.target), bounded=False)
            except DDLError as error:
                if sqlstate(error) != _FOREIGN_KEY_VIOLATION:
                    raise
                raise ArchiveError(
                    f"{error}. {table} stands complete beside its set: add what is missing in {key.target}, "
                    f"or remove the rows of {table} that point there, and restore it again"
                ) from error
        self.run(ddl.analyze(table), bounded=False)
        beside = hooks.on_restore(self.connection, self.model, table)
        after = []
        if state.is_installed(self.connection):
            after.append(state.restored(self.parent.table, table, self.options.now))
        after += hooks.on_restored(self.connection, self.model, table)
        step = ddl.attach(
            self.parent, self.config, bounds, table, self.options.now, beside=beside, after=after
        )
        self.run(step, guard=guard, bounded=False)

    def _after(self, table: TableName) -> None:
        """Sequences and statistics; done again by the next run when one dies before."""
        for column, sequence in inspection.sequences(self.connection, self.parent.table):
            self.run(ddl.catch_up(sequence, table, column), bounded=False)
        version: int = self.connection.pg_version  # type: ignore[attr-defined]
        self.run(ddl.analyze(self.parent.table, only=version >= _ONLY_SINCE), bounded=False)

    # -- dry runs

    def run(self, step: Step, **how: Any) -> None:
        if self.dry_run:
            self.options.on_step(step)
        else:
            super().run(step, **how)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        if self.dry_run:
            yield
        else:
            with self.alone():
                yield


def _is_loading(member: Member) -> bool:
    return member.marker is not None and member.marker.state is MarkState.LOADING


def _still(table: TableName, oid: int, marker: Marker | None, cursor: Any) -> None:
    """A guard: the table is there under its name, with this mark if one is given."""
    found = inspection.current_marker(cursor, oid)
    if found is None or found[0] != table or (marker is not None and found[2] != marker):
        raise ArchiveError(f"{table} was attached, dropped or marked anew meanwhile")


def restore(
    model: type[models.Model],
    wish: Wish,
    *,
    using: str = DEFAULT_DB_ALIAS,
    now: datetime | None = None,
    release: bool = False,
    dry_run: bool = False,
    lock_timeout: int | None = None,
    deadline: float | None = None,
    command: str = "restore_partition",
    listener: Listener | None = None,
) -> Report:
    """Bring a partition of `model` back, or with `release` hand a restored one over to retention again.

    The other arguments are those of `maintenance.rotate`. A failure is in the report.
    """
    moment = (now or timezone.now()).astimezone(UTC)
    listener = listener or Listener()
    connection: BaseDatabaseWrapper = connections[using]
    report = Report(command, using, moment, dry_run)
    model_report = ModelReport(model._meta.label)
    result = Result("release" if release else "restore")
    report.models.append(model_report)
    timeout = settings.LOCK_TIMEOUT if lock_timeout is None else lock_timeout

    def on_step(step: Step) -> None:
        for statement in script(step, timeout):
            text = statement.query.as_string(connection.connection)
            result.sent.append(Sent(text, statement.locks))

    options = Options(
        command,
        moment,
        timeout,
        settings.DDL_DEADLINE if deadline is None else deadline,
        listener.on_wait,
        listener.on_progress,
        on_step,
    )
    try:
        config = registry.config_for(model)
        [found] = catalog.read(connection, [model._meta.db_table])
        if found is None:
            raise PlanError(no_table(model, using))  # noqa: TRY301
        model_report.table = found.table
        restorer = Restorer(connection, model, config, found, options, dry_run)
        partition = restorer.release(wish) if release else restorer.restore(wish)
    except Exception as error:
        known = isinstance(error, ScaleDBError | DatabaseError | InterfaceError)
        # A storage raises whatever it likes.
        reason = error if known else ArchiveError(f"{wish.name}: {type(error).__name__}: {error}")
        result.status, result.reason = Status.FAILED, reason
        model_report.results.append(result)
        return report
    if partition is not None:
        result.partition, result.range = partition.table, partition.range
        result.status = Status.PLANNED if dry_run else Status.DONE
        model_report.results.append(result)
        if not dry_run:
            listener.on_result(model_report, result)
    return report
