"""Make an existing table partitioned while it is in use."""

from __future__ import annotations

from typing import Any

from django.core.management.base import CommandError, CommandParser
from django.db import DEFAULT_DB_ALIAS, DatabaseError, InterfaceError

from django_scaledb.exceptions import ScaleDBError
from django_scaledb.management._command import PartitionCommand, moment, positive, terminating
from django_scaledb.management._conversion import ConversionListener, script, status_text
from django_scaledb.partitions.conversion.runner import Options, Runner
from django_scaledb.partitions.conversion.state import Strategy
from django_scaledb.partitions.conversion.status import look


class Command(PartitionCommand):
    help = (
        "Makes the table of a model that is a PartitionedModel now partitioned, while it is read and "
        "written. "
        "Running it again goes on where it stopped; exits with 1 when something is in the way."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("model", metavar="MODEL", help="app_label.ModelName")
        parser.add_argument("--strategy", choices=["attach", "copy"], help="default: attach")
        what = parser.add_mutually_exclusive_group()
        what.add_argument(
            "--dry-run", action="store_true", help="print the SQL that is left and its locks; do nothing"
        )
        what.add_argument("--status", action="store_true", help="show where the conversion stands")
        what.add_argument("--abort", action="store_true", help="go back to the plain table")
        what.add_argument(
            "--finish", action="store_true", help="give up the way back and drop the old table (copy)"
        )
        parser.add_argument("--using", default=DEFAULT_DB_ALIAS, metavar="ALIAS", help="database to work on")
        parser.add_argument(
            "--until",
            metavar="DATE",
            help="where the first partition is to end (attach; default: a period ahead)",
        )
        parser.add_argument(
            "--throttle", type=positive(float), metavar="ROWS", help="copy no more than so many rows a second"
        )
        parser.add_argument(
            "--lock-timeout", type=positive(int), metavar="MS", help="milliseconds to wait for one lock"
        )
        parser.add_argument(
            "--deadline",
            type=positive(float),
            metavar="SECONDS",
            help="seconds after which a blocked step is given up",
        )

    def handle(self, *args: Any, **options: Any) -> None:
        if "." not in options["model"]:
            raise CommandError(f"{options['model']!r} is no model; write app_label.ModelName")
        [model] = self.find_models([options["model"]], options["using"])
        until = moment("--until", options["until"])
        runner_options = Options(
            using=options["using"],
            lock_timeout=options["lock_timeout"],
            deadline=options["deadline"],
            throttle=options["throttle"],
        )
        strategy = Strategy(options["strategy"]) if options["strategy"] else None
        listener = ConversionListener(self.stderr if options["verbosity"] else None)
        try:
            runner = Runner(model, runner_options, listener)
            with terminating():
                if options["status"]:
                    text = status_text(look(runner))
                elif options["dry_run"]:
                    text = "\n".join(script(runner, strategy, until))
                elif options["abort"]:
                    text = runner.abort()
                elif options["finish"]:
                    text = runner.finish()
                else:
                    text = runner.convert(strategy, until)
        except (ScaleDBError, DatabaseError, InterfaceError) as error:
            self.stderr.write(self.style.ERROR(f"{model._meta.label}: {error}"))
            raise SystemExit(1) from error
        finally:
            listener.close()
        self.stdout.write(text)
