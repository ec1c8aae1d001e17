"""How a conversion is shown: its script, its status, its progress."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from datetime import datetime
from typing import TextIO, cast

from django.core.management.base import OutputWrapper
from django.template.defaultfilters import filesizeformat

from django_scaledb.conf import settings
from django_scaledb.management._command import script_text
from django_scaledb.partitions.bounds import show
from django_scaledb.partitions.conversion.runner import Listener, Runner
from django_scaledb.partitions.conversion.stages import Stage
from django_scaledb.partitions.conversion.state import Strategy
from django_scaledb.partitions.conversion.status import Status
from django_scaledb.partitions.report import Sent
from django_scaledb.postgres.blockers import describe
from django_scaledb.postgres.executor import Waiting
from django_scaledb.postgres.executor import script as script_of_step
from django_scaledb.progress import Progress

_WAITING_LINE_SECONDS = 2.0


class ConversionListener(Listener):
    """Says on standard error what is being done, with a bar where rows are copied."""

    def __init__(self, err: OutputWrapper | None) -> None:
        self._err = err
        self._last = ""
        self._progress: Progress | None = None
        self._waited = 0.0

    def on_note(self, text: str) -> None:
        if self._err is not None:
            self._err.write(text)

    def on_stage(self, stage: Stage) -> None:
        self._waited = 0.0
        text = stage.step.summary if stage.step is not None else stage.name
        if self._err is not None and text != self._last:
            self.close()
            seconds = stage.cost.seconds
            guess = f" (may take {duration(seconds)})" if seconds > 5 else ""
            self._err.write(f"{text}{guess}")
            self._last = text

    def on_wait(self, waiting: Waiting) -> None:
        if self._err is not None and waiting.seconds - self._waited >= _WAITING_LINE_SECONDS:
            self._waited = waiting.seconds
            self._err.write(
                f"waiting for {waiting.seconds:.0f} s to {waiting.summary}: {describe(waiting.blockers)}"
            )

    def on_rows(self, done: int, total: int) -> None:
        if self._err is None:
            return
        if self._progress is None:
            self._progress = Progress(total, "rows copied", stream=cast(TextIO, self._err))
            self._progress.__enter__()
        self._progress.advance(max(done - self._progress.done, 0))

    def close(self) -> None:
        if self._progress is not None:
            self._progress.__exit__()
            self._progress = None


def script(runner: Runner, strategy: Strategy | None, until: datetime | None) -> Iterator[str]:
    """The statements of a conversion that are left, each with its locks, in psql's syntax."""
    lines = list(_script(runner, runner.plan(strategy, until)))
    yield from lines or ["-- nothing to do: the table is partitioned"]


def split_script(runner: Runner) -> Iterator[str]:
    """The statements of a split that are left."""
    lines = list(_script(runner, runner.plan_split()))
    yield from lines or ["-- nothing to split: each partition is one period"]


def _script(runner: Runner, stages: Iterable[Stage]) -> Iterator[str]:
    timeout = runner.options.lock_timeout or settings.LOCK_TIMEOUT
    for stage in stages:
        cost = stage.cost
        title = stage.step.summary if stage.step is not None else stage.name
        disk = str(filesizeformat(cost.disk)).replace("\N{NO-BREAK SPACE}", " ") if cost.disk else "nothing"
        yield f"-- {title}"
        yield f"-- reads {cost.scans}; takes about {duration(cost.seconds)}; more disk: {disk}"
        statements = stage.sample if stage.step is None else tuple(script_of_step(stage.step, timeout))
        for statement in statements:
            text = statement.query.as_string(runner.connection.connection)
            yield script_text(Sent(text, statement.locks))
        yield ""


def status_text(status: Status) -> str:
    """What ``--status`` prints."""
    lines = [
        f"{status.model}: {status.table} is {'partitioned' if status.is_partitioned else 'a plain table'}"
    ]
    conversion = status.conversion
    if conversion is None:
        return "\n".join([*lines, "  no conversion was ever begun"])
    lines.append(
        f"  conversion by {conversion.strategy}, begun {show(conversion.begun_at.replace(microsecond=0))}"
    )
    if conversion.ended_at is not None:
        lines.append(f"  {conversion.phase} {show(conversion.ended_at.replace(microsecond=0))}")
        return "\n".join(lines)
    lines.append(f"  phase: {conversion.phase}; last step: {conversion.step or 'none yet'}")
    lines.append(f"  progress: {status.progress}")
    eta = duration(status.eta) if status.eta is not None else "not known"
    lines.append(f"  time left: {eta}")
    lines.append(
        f"  at work: {status.session or 'nobody; run the command again to go on, or with --abort to go back'}"
    )
    lines.append(f"  held up by: {status.blockers or 'nobody'}")
    return "\n".join(lines)


def duration(seconds: float) -> str:
    """``40 s``, ``12 min``, ``3.5 h``."""
    if seconds < 1:
        return "less than a second"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
