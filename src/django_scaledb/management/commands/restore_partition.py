"""Bring back a partition that a rotation took off: from the detached table, or from the archive.

The JSON of ``--format json`` is described in `django_scaledb.partitions.report`.
"""

from __future__ import annotations

from typing import Any

from django.core.management.base import CommandError, CommandParser

from django_scaledb.management._command import MaintenanceCommand, moment
from django_scaledb.partitions.archive.restore import Wish, restore


class Command(MaintenanceCommand):
    help = (
        "Brings back a partition: attaches the detached table again, or loads and verifies what was "
        "archived. Retention leaves it alone from then on, until --release. Exits with 1 when it could not "
        "be done; running again goes on."
    )
    drains = False

    def add_models(self, parser: CommandParser) -> None:
        parser.add_argument("model", metavar="MODEL", help="app_label.ModelName")
        parser.add_argument("partition", metavar="PARTITION", help="the name that the partition had")

    def add_arguments(self, parser: CommandParser) -> None:
        super().add_arguments(parser)
        parser.add_argument(
            "--release",
            action="store_true",
            help="restore nothing: let retention take a restored partition off again",
        )
        parser.add_argument(
            "--leave-out",
            action="append",
            default=[],
            metavar="COLUMN",
            help="restore without a column that the table does not have any more (may be repeated)",
        )
        parser.add_argument(
            "--manifest",
            metavar="NAME",
            help="a manifest in the archive's storage, of which this database does not know",
        )

    def handle(self, *args: Any, **options: Any) -> None:
        if options["release"] and (options["leave_out"] or options["manifest"]):
            raise CommandError("--release goes without --leave-out and --manifest: it restores nothing")
        if "." not in options["model"]:
            raise CommandError(f"{options['model']!r} is an app; name one model: app_label.ModelName")
        [model] = self.find_models([options["model"]], options["using"])
        with self.listener(options) as listener:
            report = restore(
                model,
                Wish(options["partition"], options["manifest"], tuple(options["leave_out"])),
                using=options["using"],
                now=moment("--now", options["now"]),
                release=options["release"],
                dry_run=options["dry_run"],
                lock_timeout=options["lock_timeout"],
                deadline=options["deadline"],
                listener=listener,
            )
        self.finish(report, options)
