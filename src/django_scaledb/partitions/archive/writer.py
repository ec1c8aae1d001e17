"""A partition that has left its set, written to the archive, read back, and only then called archived."""

from __future__ import annotations

import secrets
import tempfile
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

from django.core.files.storage import Storage
from django.db.backends.base.base import BaseDatabaseWrapper

from django_scaledb.conf import settings
from django_scaledb.exceptions import ArchiveError, ArchiveOutdated
from django_scaledb.partitions import ddl, inspection
from django_scaledb.partitions.archive import parquet, rows, state, storage
from django_scaledb.partitions.archive.columns import Column, copy_out, stored
from django_scaledb.partitions.archive.manifest import Manifest
from django_scaledb.partitions.archive.session import Session
from django_scaledb.partitions.archive.state import Archive
from django_scaledb.partitions.bounds import Range
from django_scaledb.partitions.catalog import Member
from django_scaledb.partitions.marker import MarkState, iso
from django_scaledb.postgres.identifiers import TableName
from django_scaledb.postgres.locks import Lock, LockMode
from django_scaledb.postgres.statements import Statement


def require(connection: BaseDatabaseWrapper, table: TableName) -> tuple[Column, ...]:
    """The columns of a `table` that can be archived; raises `ScaleDBError` with the reason when it cannot.

    Asked before a partition is taken off its set: what cannot be archived stays where it is.
    """
    parquet.require()
    storage.find()
    state.require(connection)
    return rows.describe(connection, table)


def statement(connection: BaseDatabaseWrapper, table: TableName) -> Statement:
    """What reads the rows, for ``--dry-run``."""
    lock = Lock(table, LockMode.ACCESS_SHARE)
    return Statement(copy_out(rows.describe(connection, table), table), (lock,))


class Archiver(Session):
    """Writes partitions of one model to the archive."""

    def archive(self, table: TableName) -> Archive:
        """Archive the detached `table`, which a rotation has settled.

        Raises `ScaleDBError` with the reason where it cannot be; the table is what it was.
        """
        member = self._member(table)
        columns = require(self.connection, table)
        if inspection.kind(self.connection, member.oid) != "r":
            raise ArchiveError(
                f"{table} is partitioned itself, and comes back as one table; it is not archived"
            )
        keeper = storage.find()
        with self.alone():
            self._clear(table)
            archive = self._begin(table)
            try:
                manifest = self._verified(keeper, self._write(keeper, archive, member, columns))
                archive.manifest = storage.save(keeper, archive.manifest, manifest.dump())
                archive.rows, archive.bytes = manifest.rows, manifest.size
                archive.archived_at = manifest.archived_at
            except Exception:
                with suppress(Exception):  # the next run does it, too
                    self._clear(table)
                raise
            assert member.marker is not None
            marker = replace(member.marker, archive=archive.pk, archived_at=archive.archived_at)
            self.run(
                ddl.mark(table, marker, beside=[state.archived(archive)]),
                guard=partial(_still, member),
            )
        return archive

    def _member(self, table: TableName) -> Member:
        member = next((m for m in self.parent.detached if m.table == table), None)
        if member is None or member.marker is None or member.marker.state is not MarkState.DETACHED:
            raise ArchiveError(f"{table} is not detached, or not settled, and is not archived")
        return member

    def _begin(self, table: TableName) -> Archive:
        bounds = self._range(table)
        stamp = f"{self.options.now:%Y%m%dT%H%M%SZ}-{secrets.token_hex(4)}"
        folder = f"{self.connection.alias}/{self.parent.table}/{table.name}"
        return Archive._base_manager.using(self.connection.alias).create(
            model=self.model._meta.label,
            table_schema=self.parent.table.schema,
            table_name=self.parent.table.name,
            partition_schema=table.schema,
            partition_name=table.name,
            lower=iso(bounds.lower),
            upper=iso(bounds.upper),
            storage=settings.ARCHIVE_STORAGE,
            manifest=f"{folder}/{stamp}.json",
            file=f"{folder}/{stamp}.parquet",
        )

    def _range(self, table: TableName) -> Range:
        marker = self._member(table).marker
        if marker is None or marker.range is None:
            raise ArchiveError(f"the mark of {table} does not say what its bounds were; it is not archived")
        return marker.range

    def _clear(self, table: TableName) -> None:
        """Remove what runs have left in the storage that did not come to the end."""
        for archive in state.unfinished(self.connection, self.parent.table, table):
            keeper = storage.find(archive.storage)
            for name in (archive.manifest, archive.file):
                storage.remove(keeper, name)
            archive.delete()

    def _write(
        self, keeper: Storage, archive: Archive, member: Member, columns: tuple[Column, ...]
    ) -> Manifest:
        table = member.table
        estimate = inspection.sizes(self.connection, [member.oid]).get(member.oid)
        expected = (estimate.rows if estimate else None) or 0
        notes = {
            "model": archive.model,
            "table": str(self.parent.table),
            "partition": str(table),
            "from": archive.lower,
            "to": archive.upper,
        }
        with tempfile.TemporaryFile() as file:
            written, count, checksum = rows.export(
                self.connection,
                table,
                columns,
                file,
                notes,
                lambda done: self.options.on_progress(f"rows of {table} written", done, max(done, expected)),
            )
            size = file.tell()
            file.seek(0)
            archive.file = storage.save(keeper, archive.file, file)
        return Manifest(
            model=archive.model,
            table=self.parent.table,
            partition=table,
            key=self.config.column,
            range=archive.range,
            columns=written,
            rows=count,
            checksum=checksum,
            file=archive.file,
            size=size,
            sha256="",
            archived_at=self.options.now,
            postgresql=_version(self.connection),
        )

    def _verified(self, keeper: Storage, manifest: Manifest) -> Manifest:
        """The manifest with the file's hash; raises when PostgreSQL does not read the rows that it wrote."""
        columns = stored(manifest.columns)
        self.run(rows.scratch(columns))
        what = f"rows of {manifest.partition} verified"
        with storage.fetched(keeper, manifest.file) as (file, size, sha256):
            found = rows.sums_of_file(
                self.connection,
                file,
                columns,
                columns,
                lambda done: self.options.on_progress(what, done, manifest.rows),
            )
        self.run(rows.without_scratch())
        if (size, *found) != (manifest.size, manifest.rows, manifest.checksum):
            raise ArchiveError(
                f"what was written of {manifest.partition} is not what is read back: {found[0]} rows "
                f"(checksum {found[1]}) against {manifest.rows} ({manifest.checksum}); nothing is archived"
            )
        return replace(manifest, sha256=sha256)


def _version(connection: Any) -> str:
    version: int = connection.pg_version
    return f"{version // 10000}.{version % 10000}"


def _still(member: Member, cursor: Any) -> None:
    """A guard: the table is what it was when it was archived."""
    found = inspection.current_marker(cursor, member.oid)
    if found is None or found[0] != member.table or found[1] or found[2] != member.marker:
        raise ArchiveError(f"{member.table} was attached, dropped or marked anew meanwhile")


# -- before a table that is archived may be dropped


def require_copy(connection: BaseDatabaseWrapper, member: Member, cursor: Any) -> None:
    """A guard, under the lock of the drop: raises `ScaleDBError` unless all rows are in the archive.

    That is `ArchiveOutdated` when both files are there, and the table was written to since.
    """
    archive = state.find(connection, member.marker.archive if member.marker else None)
    if archive is None:
        raise ArchiveError(
            f"{member.table} is marked as archived, and no archive is known; it is not dropped"
        )
    keeper = storage.find(archive.storage)
    storage.require(keeper, archive.manifest)
    manifest = Manifest.load(storage.read(keeper, archive.manifest), archive.manifest)
    storage.require(keeper, manifest.file, manifest.size)
    found = rows.sums_within(cursor, stored(manifest.columns), member.table)
    if found != (manifest.rows, manifest.checksum):
        raise ArchiveOutdated(
            f"{member.table} was written to since it was archived; it stays, and is archived again"
        )
