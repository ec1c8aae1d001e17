"""Show the partition sets as the catalog has them.

The JSON of ``--format json`` is described in `django_scaledb.partitions.overview`.
"""

from __future__ import annotations

from typing import Any

from django.core.management.base import CommandParser
from django.template.defaultfilters import filesizeformat
from django.utils import timezone

from django_scaledb.management._command import PartitionCommand, moment, one_line
from django_scaledb.partitions.bounds import Unbounded, show
from django_scaledb.partitions.overview import ModelOverview, Overview, Row, survey
from django_scaledb.partitions.plan import State

_HEADINGS = ("partition", "from", "to", "rows", "size", "state")
_RIGHT = {3, 4}


class Command(PartitionCommand):
    help = (
        "Shows each model's partitions: bounds, rows (an estimate), size, state. Exits with 1 when a model "
        "cannot be shown, and with --check also when something is wrong with a set."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        super().add_arguments(parser)
        parser.add_argument("--format", choices=("text", "json"), default="text")
        parser.add_argument(
            "--check",
            action="store_true",
            help="exit with 1 when the runway is short, there is a gap, rows lie in a default partition or a "
            "detach is not finished",
        )

    def handle(self, *args: Any, **options: Any) -> None:
        now = moment("--now", options["now"]) or timezone.now()
        models = self.find_models(options["models"], options["using"])
        overview = survey(models, using=options["using"], now=now)
        if options["format"] == "json":
            self.write_json(overview.as_json())
        else:
            self._write(overview)
        if not (overview.ok if options["check"] else overview.is_readable):
            raise SystemExit(1)

    def _write(self, overview: Overview) -> None:
        for model in overview.models:
            if model.error is None:
                self._write_model(model)
        if not overview.models and overview.error is None:
            self.stdout.write("no model is partitioned")
        if overview.error is not None:
            self.stderr.write(self.style.ERROR(one_line(overview.error)))
        for model in overview.models:
            if model.error is not None:
                text = str(model.error)
                label = "" if text.startswith(model.label) else f"{model.label}: "
                self.stderr.write(self.style.ERROR(label + text))

    def _write_model(self, model: ModelOverview) -> None:
        config = model.config
        assert config is not None
        keeps = f", keeps {config.retention}" if config.retention else ""
        self.stdout.write(
            self.style.MIGRATE_HEADING(
                f"{model.label}: {model.table} by {config.column}, {config.interval}{keeps}"
            )
        )
        for line in table([_cells(row) for row in model.rows]):
            self.stdout.write(f"  {line}")
        if model.runway is not None:
            periods, until = model.runway
            open_end = isinstance(until, Unbounded)
            ahead = (
                "takes any date to come"
                if open_end
                else f"{periods} whole period{'' if periods == 1 else 's'} ahead, to {show(until)}"
            )
            self.stdout.write(f"  runway: {ahead} (premake {config.premake})")
        for problem in model.problems:
            self.stdout.write(self.style.WARNING(f"  ! {problem.message}; mend it with: {problem.command}"))
        self.stdout.write("")


def table(rows: list[tuple[str, ...]]) -> list[str]:
    """`rows` under headings, in columns; numbers to the right."""
    lines = [_HEADINGS, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(_HEADINGS))]
    return [
        "  ".join(
            cell.rjust(width) if column in _RIGHT else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]


def _cells(row: Row) -> tuple[str, ...]:
    partition, size = row.partition, row.size
    bounds = partition.range
    lower, upper = (show(bounds.lower), show(bounds.upper)) if bounds else ("", "")
    about = "" if partition.state is State.ARCHIVED else "~"
    rows = "?" if size.rows is None else f"{about}{size.rows:,}"
    # Django's filesizeformat writes a no-break space, which terminals in C locale cannot show.
    total = "?" if size.bytes is None else filesizeformat(size.bytes).replace("\N{NO-BREAK SPACE}", " ")
    return str(partition.table), lower, upper, rows, total, ", ".join(_marks(row))


def _marks(row: Row) -> list[str]:
    partition = row.partition
    archived = [f"archived {show(partition.archived_at)}"] if partition.archived_at else []
    if partition.state is State.ARCHIVED:
        return archived
    if partition.state is State.DETACHED:
        if not partition.managed:
            return ["detached by hand"]
        since = partition.detached_at
        return [f"detached {show(since)}" if since else "detached, not settled", *archived]
    marks = [partition.state.value]
    if partition.held_since is not None:
        marks.append(f"held since {show(partition.held_since)}")
    if partition.is_default:
        marks.append("default")
    if not partition.managed:
        marks.append("hand-made")
    return marks
