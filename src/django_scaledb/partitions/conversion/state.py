"""What a conversion has to remember, in a table that `migrate` made.

One row for each conversion, also those that ended. Where a conversion stands is changed in the
transaction that gets it there, so that after a kill the row and the tables agree.
"""

from __future__ import annotations

from django.db import models
from django.db.backends.base.base import BaseDatabaseWrapper
from psycopg import sql

from django_scaledb.postgres.identifiers import TableName
from django_scaledb.postgres.statements import Statement


class Strategy(models.TextChoices):
    ATTACH = "attach"
    COPY = "copy"
    SPLIT = "split"


class Phase(models.TextChoices):
    """Where a conversion stands; within a phase the catalog says what is done."""

    PREPARING = "preparing"
    COPYING = "copying"
    """The new table is there, and a trigger writes into it whatever happens to the old one."""
    COPIED = "copied"
    SWAPPED = "swapped"
    """The partitioned table has the name."""
    DONE = "done"
    ABORTED = "aborted"


class Conversion(models.Model):
    """One conversion of one table.

    `step` says in words what was done last or is being done; `details` keeps the names that were
    chosen, the bounds and the inventory of the table as it was.
    """

    id = models.BigAutoField(primary_key=True)
    model = models.TextField()
    table_schema = models.TextField()
    table_name = models.TextField()
    strategy = models.TextField()
    phase = models.TextField(default=Phase.PREPARING)
    step = models.TextField(default="")
    rows_done = models.BigIntegerField(default=0)
    rows_total = models.BigIntegerField(default=0)
    details = models.JSONField(default=dict)
    begun_at = models.DateTimeField(auto_now_add=True)
    changed_at = models.DateTimeField(auto_now=True)
    ended_at = models.DateTimeField(null=True)

    class Meta:
        app_label = "django_scaledb"
        db_table = "django_scaledb_conversion"
        constraints = [
            models.UniqueConstraint(
                fields=["table_schema", "table_name"],
                condition=models.Q(ended_at=None),
                name="django_scaledb_one_conversion",
            )
        ]

    def __str__(self) -> str:
        return f"{self.strategy} conversion of {self.table}: {self.phase}"

    @property
    def table(self) -> TableName:
        return TableName(self.table_schema, self.table_name)

    @property
    def is_swapped(self) -> bool:
        return self.phase == Phase.SWAPPED

    def reach(self, phase: Phase, *, over: bool = False) -> Statement:
        """The statement that writes down that `phase` is reached, for the step that reaches it."""
        return Statement(
            sql.SQL("UPDATE {} SET phase = {}, changed_at = now(){} WHERE id = {}").format(
                sql.Identifier(self._meta.db_table),
                sql.Literal(str(phase)),
                sql.SQL(", ended_at = now()" if over else ""),
                sql.Literal(self.pk or 0),
            )
        )


def is_installed(connection: BaseDatabaseWrapper) -> bool:
    """Whether `migrate` has made the table of conversions in this database."""
    with connection.cursor() as cursor:
        cursor.execute("SELECT to_regclass(%s) IS NOT NULL", [Conversion._meta.db_table])
        return bool(cursor.fetchone()[0])


def current(connection: BaseDatabaseWrapper, table: TableName) -> Conversion | None:
    """The conversion of `table` that is under way."""
    if not is_installed(connection):
        return None
    return _of(connection, table).filter(ended_at=None).first()


def latest(connection: BaseDatabaseWrapper, table: TableName) -> Conversion | None:
    """The conversion of `table` that was begun last, whatever became of it."""
    if not is_installed(connection):
        return None
    return _of(connection, table).order_by("-id").first()


def _of(connection: BaseDatabaseWrapper, table: TableName) -> models.QuerySet[Conversion]:
    return Conversion.objects.using(connection.alias).filter(table_schema=table.schema, table_name=table.name)
