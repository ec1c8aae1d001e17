"""Refuses, and says how it is done by hand: the command itself comes with the archive."""

from __future__ import annotations

from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser


class Command(BaseCommand):
    help = "Not available yet; tells how a detached partition is attached again by hand."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("model", metavar="MODEL", help="app_label.ModelName")
        parser.add_argument("partition", metavar="PARTITION", help="the name that the partition had")

    def handle(self, *args: Any, **options: Any) -> None:
        raise CommandError(
            "restore_partition is not available yet. A detached partition is an ordinary table with all its "
            "rows; show_partitions names its bounds, and ALTER TABLE .. ATTACH PARTITION .. FOR VALUES FROM "
            '(..) TO (..) brings it back (see "retention" in the documentation).'
        )
