"""What the partition commands share: their arguments, their models, their way to report."""

from __future__ import annotations

import json
import signal
import threading
from argparse import ArgumentTypeError
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from difflib import get_close_matches
from types import FrameType
from typing import TYPE_CHECKING, Any, TextIO, cast

from django.apps import apps
from django.core.management.base import BaseCommand, CommandError, CommandParser, OutputWrapper
from django.db import DEFAULT_DB_ALIAS, connections, router

from django_scaledb.exceptions import ConfigurationError
from django_scaledb.partitions import registry
from django_scaledb.partitions.maintenance import Listener
from django_scaledb.partitions.report import ModelReport, Report, Result, Sent, Status
from django_scaledb.postgres.blockers import describe
from django_scaledb.postgres.executor import Waiting
from django_scaledb.progress import Progress

if TYPE_CHECKING:
    from django_scaledb.partitions.models import PartitionedModel

BAR_FROM = 10
"""As many partitions make a progress bar worth its place."""

_WAITING_LINE_SECONDS = 2.0
_DONE = {
    "create": "created",
    "create default": "created default partition",
    "finalize": "finished the detach of",
    "detach": "detached",
    "settle": "settled",
    "archive": "archived",
    "drop": "dropped",
    "restore": "restored",
    "release": "released",
}


class PartitionCommand(BaseCommand):
    """Takes ``[MODEL ..] --using``; a model that is misdeclared fails by itself, not the command."""

    requires_system_checks: list[str] = []

    def add_models(self, parser: CommandParser) -> None:
        parser.add_argument(
            "models",
            nargs="*",
            metavar="MODEL",
            help="app_label.ModelName, or app_label for all of an app (default: all partitioned models)",
        )

    def add_arguments(self, parser: CommandParser) -> None:
        self.add_models(parser)
        parser.add_argument(
            "--using",
            default=DEFAULT_DB_ALIAS,
            metavar="ALIAS",
            help="database to work on (default: default)",
        )
        parser.add_argument(
            "--now",
            metavar="ISO",
            help="work as if it were this time; without an offset it is UTC (default: the clock)",
        )

    def execute(self, *args: Any, **options: Any) -> str | None:
        try:
            return super().execute(*args, **options)
        except ConfigurationError as error:  # of settings.SCALEDB; a model's stays with the model
            raise CommandError(str(error)) from error

    def find_models(self, labels: list[str], using: str) -> list[type[PartitionedModel]]:
        """The models that the arguments name; raises `CommandError`."""
        if using not in connections:
            raise CommandError(
                f"there is no database {using!r} in DATABASES; there is {', '.join(connections)}"
            )
        partitioned = registry.partitioned_models()
        if labels:
            found = [model for label in labels for model in _named(label, partitioned)]
            return list(dict.fromkeys(found))
        return [model for model in partitioned if router.allow_migrate_model(using, model)]

    def write_json(self, content: dict[str, Any]) -> None:
        self.stdout.write(json.dumps(content, indent=2, ensure_ascii=False))


class MaintenanceCommand(PartitionCommand):
    """A `PartitionCommand` that changes partition sets, and reports what it did."""

    drains = True
    """Whether it makes partitions, for which a default one may have to be emptied."""

    def add_arguments(self, parser: CommandParser) -> None:
        super().add_arguments(parser)
        parser.add_argument(
            "--dry-run",
            action="store_true",
            help="print the SQL and its locks on standard output; do nothing",
        )
        parser.add_argument("--format", choices=("text", "json"), default="text")
        parser.add_argument(
            "--lock-timeout",
            type=positive(int),
            metavar="MS",
            help='milliseconds to wait for one lock (default: SCALEDB["LOCK_TIMEOUT"], else 1000)',
        )
        parser.add_argument(
            "--deadline",
            type=positive(float),
            metavar="SECONDS",
            help='seconds after which blocked work is given up (default: SCALEDB["DDL_DEADLINE"], else 30)',
        )
        if self.drains:
            parser.add_argument(
                "--drain-default",
                action="store_true",
                help="move any number of rows out of a default partition that is in a new one's way",
            )

    @contextmanager
    def listener(self, options: dict[str, Any]) -> Iterator[Listener]:
        """Follows a run on standard output and error."""
        quiet = options["verbosity"] == 0
        talk = CommandListener(
            self.stdout if options["format"] == "text" and not quiet else None,
            None if quiet else self.stderr,
        )
        with terminating():
            try:
                yield talk
            finally:
                talk.close()

    def finish(self, report: Report, options: dict[str, Any]) -> None:
        """Print the report; exit with 1 when something in it is not done."""
        if options["format"] == "json":
            self.write_json(report.as_json())
        else:
            if report.dry_run:
                self._write_script(report)
            if report.is_empty and options["verbosity"] > 0:
                self.stdout.write("nothing to do")
            self._write_failures(report)
        if not report.ok:
            raise SystemExit(1)

    def _write_script(self, report: Report) -> None:
        for model in report.models:
            for result in model.results:
                if result.status is Status.PLANNED:
                    self.stdout.write(f"-- {model.label}: {result.action} {subject(result)}")
                    for sent in result.sent:
                        self.stdout.write(script_text(sent))
                    self.stdout.write("")

    def _write_failures(self, report: Report) -> None:
        if report.error is not None:
            self.stderr.write(self.style.ERROR(one_line(report.error)))
        for label, reason in report.failures():
            text = reason if reason.startswith(label) else f"{label}: {reason}"
            self.stderr.write(self.style.ERROR(text))


class CommandListener(Listener):
    """Prints results as they come, and who is in the way; a long run on a terminal gets a bar instead."""

    def __init__(self, out: OutputWrapper | None, err: OutputWrapper | None) -> None:
        self._out = out
        self._err = err
        self._progress: Progress | None = None
        self._rows: Progress | None = None
        self._waited: dict[str, float] = {}

    def on_start(self, actions: int) -> None:
        if self._err is not None and actions >= BAR_FROM:
            self._progress = Progress(actions, "partitions", stream=cast(TextIO, self._err))
            self._progress.__enter__()

    def on_result(self, model: ModelReport, result: Result) -> None:
        self._end_rows()
        if self._progress is not None:
            self._progress.advance()
        # Where both go to the terminal the bar stands for the lines; a file gets them all.
        has_bar = self._progress is not None and self._progress.has_bar and self._out_is_terminal()
        if self._out is not None and result.status is Status.DONE and not has_bar:
            self._out.write(f"{model.label}: {_DONE[result.action]} {subject(result)}")

    def on_progress(self, what: str, done: int, total: int) -> None:
        if self._err is None:
            return
        if self._rows is None or self._rows.what != what:
            self._end_rows()
            self._rows = Progress(total, what, stream=cast(TextIO, self._err))
            self._rows.__enter__()
        self._rows.total = total
        self._rows.advance(max(done - self._rows.done, 0))

    def _end_rows(self) -> None:
        if self._rows is not None:
            self._rows.__exit__()
            self._rows = None

    def _out_is_terminal(self) -> bool:
        return self._out is not None and self._out.isatty()

    def on_wait(self, waiting: Waiting) -> None:
        # The first pause is not worth a word.
        since = self._waited.setdefault(waiting.summary, 0.0)
        if self._err is not None and waiting.seconds - since >= _WAITING_LINE_SECONDS:
            self._waited[waiting.summary] = waiting.seconds
            self._err.write(
                f"waiting for {waiting.seconds:.0f} s to {waiting.summary}: {describe(waiting.blockers)}"
            )

    def close(self) -> None:
        self._end_rows()
        if self._progress is not None:
            self._progress.__exit__()


# -- words


def subject(result: Result) -> str:
    """What an action is about: ``public.upload_y2027 (2027-01-01..2028-01-01)``."""
    bounds = f" ({result.range})" if result.range is not None else ""
    return f"{result.partition}{bounds}"


def script_text(sent: Sent) -> str:
    """The statement as psql takes it, behind a line with its locks."""
    locks = "; ".join(str(lock) for lock in sent.locks)
    return (f"-- locks: {locks}\n" if locks else "") + f"{sent.sql};"


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


# -- arguments


def moment(option: str, value: str | datetime | None) -> datetime | None:
    """An ISO date or time, in UTC; a date is its midnight, a time without an offset is UTC."""
    if value is None:
        return None
    try:
        parsed = datetime.fromisoformat(value) if isinstance(value, str) else value
        return parsed.replace(tzinfo=UTC) if parsed.tzinfo is None else parsed.astimezone(UTC)
    except (ValueError, OverflowError):
        raise CommandError(
            f"{option}: {value!r} is no date or time; write 2026-12-31, 2026-12-31T23:59:59Z or "
            "2026-12-31T23:59:59+02:00"
        ) from None


def end_moment(option: str, value: str | datetime | None) -> datetime | None:
    """As `moment`, for an end that is still meant: behind the whole day, or behind that time."""
    parsed = moment(option, value)
    if parsed is None:
        return None
    is_day = isinstance(value, str) and "T" not in value.upper() and ":" not in value
    try:
        return parsed + (timedelta(days=1) if is_day else timedelta.resolution)
    except OverflowError:
        raise CommandError(f"{option}: {value!r} is too far in the future") from None


def positive(kind: type[int] | type[float]) -> Callable[[str], float]:
    """An argparse type: a number above 0."""

    def convert(text: str) -> float:
        try:
            value = kind(text)
        except ValueError as error:
            raise ArgumentTypeError(f"{text!r} is not a number") from error
        if not 0 < value < 86_400_000:
            raise ArgumentTypeError(f"{text!r} is not above 0")
        return value

    return convert


def _named(label: str, partitioned: list[type[PartitionedModel]]) -> list[type[PartitionedModel]]:
    """The partitioned models that one argument names."""
    app_label, _, model_name = label.partition(".")
    if not model_name:
        found = [model for model in partitioned if model._meta.app_label == app_label]
        if not found:
            raise CommandError(f"{label!r} is no app with partitioned models; {_near(label, partitioned)}")
        return found
    try:
        model = apps.get_model(app_label, model_name)
    except LookupError:
        raise CommandError(f"there is no model {label!r}; {_near(label, partitioned)}") from None
    if model not in partitioned:
        raise CommandError(f"{model._meta.label} is not a PartitionedModel; {_near(label, partitioned)}")
    return [model]


def _near(label: str, partitioned: list[type[PartitionedModel]]) -> str:
    by_name = {model._meta.label.lower(): model._meta.label for model in partitioned}
    close = get_close_matches(label.lower(), by_name, n=3, cutoff=0.5)
    if close:
        return f"did you mean {' or '.join(by_name[name] for name in close)}?"
    return f"there is {', '.join(by_name.values())}" if by_name else "no model is partitioned"


# -- the end


class Terminated(KeyboardInterrupt):
    """SIGTERM: the driver cancels the statement under way, as it does for Ctrl-C."""


@contextmanager
def terminating() -> Iterator[None]:
    """Let SIGTERM end the run in order: statement cancelled, transaction rolled back, settings set back."""

    def terminate(number: int, frame: FrameType | None) -> None:
        raise Terminated

    if threading.current_thread() is not threading.main_thread():
        yield  # signals belong to the main thread
        return
    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    except Terminated:
        raise SystemExit(128 + signal.SIGTERM) from None
    finally:
        signal.signal(signal.SIGTERM, before)
