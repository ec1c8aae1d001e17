"""What the counter commands share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.db import DEFAULT_DB_ALIAS, Error, connections, models, router

from django_scaledb.counters import registry
from django_scaledb.exceptions import ConfigurationError, ScaleDBError
from django_scaledb.partitions import catalog
from django_scaledb.partitions import registry as partition_registry
from django_scaledb.partitions.options import is_partitioned
from django_scaledb.partitions.plan import State

if TYPE_CHECKING:
    from django_scaledb.counters.models import CounterModel


class CounterCommand(BaseCommand):
    """Takes ``[COUNTER ..] --using``; one counter's failure does not stop the others."""

    requires_system_checks: list[str] = []
    failures: tuple[type[Exception], ...] = (ScaleDBError, Error)

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument(
            "counters", nargs="*", metavar="COUNTER", help="app_label.ModelName (default: all counters)"
        )
        parser.add_argument(
            "--using",
            default=DEFAULT_DB_ALIAS,
            metavar="ALIAS",
            help="database to work on (default: default)",
        )

    def find_counters(self, labels: list[str], using: str) -> list[type[CounterModel]]:
        """The counters that the arguments name; raises `CommandError`."""
        if using not in connections:
            raise CommandError(
                f"there is no database {using!r} in DATABASES; there is {', '.join(connections)}"
            )
        try:
            if labels:
                return list(dict.fromkeys(registry.counter_by_label(label) for label in labels))
        except ConfigurationError as error:
            raise CommandError(str(error)) from None
        return [counter for counter in registry.counters() if self._lives_in(counter, using)]

    @staticmethod
    def _lives_in(counter: type[CounterModel], using: str) -> bool:
        return router.allow_migrate_model(using, counter) or bool(
            connections[using].settings_dict["TEST"]["MIRROR"]
        )

    @staticmethod
    def leaving(counter: type[CounterModel], using: str) -> list[str]:
        """Tables that are being detached from the counter's source and are not accounted for yet."""
        if counter._counter_meta.problem is not None:
            return []
        source: type[models.Model] = counter.source()
        if not is_partitioned(source):
            return []
        (found,) = catalog.read(connections[using], [source._meta.db_table])
        if found is None or not found.is_partitioned:  # plain still, and waiting for its conversion
            return []
        return [
            partition.table.sql.as_string(None)
            for partition in found.partitions(partition_registry.config_for(source))
            if partition.state is not State.ATTACHED and partition.detached_at is None
        ]

    @staticmethod
    def one_line(error: Any) -> str:
        return " ".join(str(error).split())
