"""What is in the archive, in a table that `migrate` made.

A row is written before anything is stored, so that what a killed run leaves in the storage is
known by name; it counts from the transaction on that marks the table as archived.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from django.db import models
from django.db.backends.base.base import BaseDatabaseWrapper
from psycopg import sql

from django_scaledb.exceptions import ConfigurationError
from django_scaledb.partitions.bounds import Range
from django_scaledb.partitions.marker import read_bound
from django_scaledb.postgres.identifiers import TableName
from django_scaledb.postgres.statements import Statement


class Archive(models.Model):
    """One partition in the archive: what was stored, where, and what became of the table.

    `dropped_at` is when the table was dropped; `restored_at` when the partition was brought back.
    `storage` is the alias in ``STORAGES``.
    """

    id = models.BigAutoField(primary_key=True)
    model = models.TextField()
    table_schema = models.TextField()
    table_name = models.TextField()
    partition_schema = models.TextField()
    partition_name = models.TextField()
    lower = models.TextField()
    upper = models.TextField()
    storage = models.TextField()
    manifest = models.TextField()
    file = models.TextField()
    rows = models.BigIntegerField(default=0)
    bytes = models.BigIntegerField(default=0)
    begun_at = models.DateTimeField(auto_now_add=True)
    archived_at = models.DateTimeField(null=True)
    dropped_at = models.DateTimeField(null=True)
    restored_at = models.DateTimeField(null=True)

    class Meta:
        app_label = "django_scaledb"
        db_table = "django_scaledb_archive"
        indexes = [models.Index(fields=["table_schema", "table_name"], name="django_scaledb_archive_table")]

    def __str__(self) -> str:
        return f"{self.partition} in {self.manifest}"

    @property
    def table(self) -> TableName:
        return TableName(self.table_schema, self.table_name)

    @property
    def partition(self) -> TableName:
        return TableName(self.partition_schema, self.partition_name)

    @property
    def range(self) -> Range:
        return Range(read_bound(self.lower), read_bound(self.upper))


def is_installed(connection: BaseDatabaseWrapper) -> bool:
    """Whether `migrate` has made the table of archives in this database."""
    with connection.cursor() as cursor:
        cursor.execute("SELECT to_regclass(%s) IS NOT NULL", [Archive._meta.db_table])
        return bool(cursor.fetchone()[0])


def require(connection: BaseDatabaseWrapper) -> None:
    """Raises `ConfigurationError` without that table."""
    if not is_installed(connection):
        raise ConfigurationError(
            f"the table {Archive._meta.db_table!r} is not there yet; run manage.py migrate django_scaledb "
            f"--database {connection.alias}"
        )


def of_tables(connection: BaseDatabaseWrapper, tables: Sequence[TableName]) -> list[Archive]:
    """The last archive of each partition of the sets `tables` that was not restored since.

    Their tables may still be there. Two queries at most, whatever the number of tables.
    """
    if not is_installed(connection):
        return []
    wanted = set(tables)
    found = _all(connection).filter(
        table_name__in=[table.name for table in tables], archived_at__isnull=False, restored_at=None
    )
    by_partition = {
        (archive.table, archive.partition): archive
        for archive in found.order_by("id")
        if archive.table in wanted
    }
    return list(by_partition.values())


def latest(connection: BaseDatabaseWrapper, table: TableName, names: Sequence[TableName]) -> Archive | None:
    """The last archive that was made of a partition of `table` with one of `names`."""
    if not is_installed(connection):
        return None
    found = _of(connection, table).filter(archived_at__isnull=False).order_by("-id")
    return next((archive for archive in found if archive.partition in names), None)


def find(connection: BaseDatabaseWrapper, pk: int | None) -> Archive | None:
    return None if pk is None else _all(connection).filter(pk=pk, archived_at__isnull=False).first()


def unfinished(
    connection: BaseDatabaseWrapper, table: TableName, partition: TableName
) -> models.QuerySet[Archive]:
    """What runs have begun to archive of a partition and not finished."""
    return _of(connection, table).filter(
        partition_schema=partition.schema, partition_name=partition.name, archived_at=None
    )


def _all(connection: BaseDatabaseWrapper) -> models.QuerySet[Archive]:
    return Archive._base_manager.using(connection.alias)


def _of(connection: BaseDatabaseWrapper, table: TableName) -> models.QuerySet[Archive]:
    return _all(connection).filter(table_schema=table.schema, table_name=table.name)


# -- for the steps that make it so


def archived(archive: Archive) -> Statement:
    return _set(
        sql.SQL("archived_at = {}, manifest = {}, file = {}, rows = {}, bytes = {}").format(
            *map(
                sql.Literal,
                (archive.archived_at, archive.manifest, archive.file, archive.rows, archive.bytes),
            )
        ),
        sql.SQL("id = {}").format(sql.Literal(archive.pk)),
    )


def dropped(archive: int, at: Any) -> Statement:
    return _set(
        sql.SQL("dropped_at = {}").format(sql.Literal(at)), sql.SQL("id = {}").format(sql.Literal(archive))
    )


def restored(table: TableName, partition: TableName, at: Any) -> Statement:
    """Every archive of the partition: from here on the table may differ from it."""
    return _set(
        sql.SQL("restored_at = {}").format(sql.Literal(at)),
        sql.SQL(
            "restored_at IS NULL AND archived_at IS NOT NULL AND table_schema = {} AND table_name = {} "
            "AND partition_schema = {} AND partition_name = {}"
        ).format(*map(sql.Literal, (table.schema, table.name, partition.schema, partition.name))),
    )


def _set(values: sql.Composable, where: sql.Composable) -> Statement:
    return Statement(
        sql.SQL("UPDATE {} SET {} WHERE {}").format(sql.Identifier(Archive._meta.db_table), values, where)
    )
