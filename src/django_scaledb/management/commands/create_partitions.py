"""Create missing partitions: those ahead, or a span of the past or future.

The JSON of ``--format json`` is described in `django_scaledb.partitions.report`.
"""

from __future__ import annotations

from typing import Any

from django.core.management.base import CommandError, CommandParser
from django.db import DatabaseError, InterfaceError

from django_scaledb.exceptions import ScaleDBError
from django_scaledb.management._command import MaintenanceCommand, end_moment, moment, terminating
from django_scaledb.management._conversion import ConversionListener, split_script
from django_scaledb.partitions import maintenance
from django_scaledb.partitions.conversion.runner import Options, Runner


class Command(MaintenanceCommand):
    help = (
        "Creates the current and the premade partitions that are missing, or with --from and --to those of "
        "each period that touches the span. Exits with 1 when something could not be created."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        super().add_arguments(parser)
        parser.add_argument("--from", dest="start", metavar="DATE", help="first day of the span, in UTC")
        parser.add_argument("--to", dest="end", metavar="DATE", help="last day of the span, in UTC, included")

        parser.add_argument(
            "--split",
            action="store_true",
            help="split the first partition of many periods, which a conversion leaves, into one for each",
        )

    def handle(self, *args: Any, **options: Any) -> None:
        if options["split"]:
            self._split(options)
            return
        start, end = moment("--from", options["start"]), end_moment("--to", options["end"])
        if (start is None) is not (end is None):
            raise CommandError("--from and --to go together: say both, or neither")
        if start is not None and end is not None and start >= end:
            raise CommandError("--from is after --to")
        models = self.find_models(options["models"], options["using"])
        common: dict[str, Any] = {
            "using": options["using"],
            "now": moment("--now", options["now"]),
            "dry_run": options["dry_run"],
            "lock_timeout": options["lock_timeout"],
            "deadline": options["deadline"],
            "drain_default": options["drain_default"],
            "command": "create_partitions",
        }
        with self.listener(options) as listener:
            if start is None or end is None:
                report = maintenance.rotate(models, retire=False, listener=listener, **common)
            else:
                report = maintenance.create_span(models, start, end, listener=listener, **common)
        self.finish(report, options)

    def _split(self, options: dict[str, Any]) -> None:
        if not options["models"] or options["start"] or options["end"]:
            raise CommandError("--split goes with MODEL, and without --from and --to")
        listener = ConversionListener(self.stderr if options["verbosity"] else None)
        failed = False
        for model in self.find_models(options["models"], options["using"]):
            runner = Runner(
                model,
                Options(
                    using=options["using"],
                    command="create_partitions",
                    lock_timeout=options["lock_timeout"],
                    deadline=options["deadline"],
                ),
                listener,
            )
            try:
                with terminating():
                    if options["dry_run"]:
                        self.stdout.write("\n".join(split_script(runner)))
                    else:
                        self.stdout.write(runner.split())
            except (ScaleDBError, DatabaseError, InterfaceError) as error:
                failed = True
                self.stderr.write(self.style.ERROR(f"{model._meta.label}: {error}"))
            finally:
                listener.close()
        if failed:
            raise SystemExit(1)
