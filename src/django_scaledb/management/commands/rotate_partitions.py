"""Bring each model's partition set to what its PartitioningMeta says; meant for cron.

The JSON of ``--format json`` is described in `django_scaledb.partitions.report`.
"""

from __future__ import annotations

from typing import Any

from django.core.management.base import CommandParser

from django_scaledb import runs
from django_scaledb.management._command import MaintenanceCommand, moment
from django_scaledb.management._runs import home, rotation_outcomes
from django_scaledb.partitions import maintenance


class Command(MaintenanceCommand):
    help = (
        "Creates partitions ahead, fills gaps, finishes interrupted detaches and applies retention. "
        "Exits with 0 when all is done and with 1 when something is not; running again goes on."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        super().add_arguments(parser)
        parser.add_argument("--no-create", action="store_true", help="create nothing")
        parser.add_argument("--no-retention", action="store_true", help="detach and drop nothing")

    def handle(self, *args: Any, **options: Any) -> None:
        now = moment("--now", options["now"])
        models = self.find_models(options["models"], options["using"])
        with self.listener(options) as listener:
            report = maintenance.rotate(
                models,
                using=options["using"],
                now=now,
                create=not options["no_create"],
                retire=not options["no_retention"],
                dry_run=options["dry_run"],
                lock_timeout=options["lock_timeout"],
                deadline=options["deadline"],
                drain_default=options["drain_default"],
                command="rotate_partitions",
                listener=listener,
            )
        if not report.dry_run:
            labels = [model._meta.label for model in models]
            runs.write_down(home(options["using"]), runs.ROTATE, rotation_outcomes(report, labels))
        self.finish(report, options)
