"""The facts in the words and numbers of the page's template."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from django.core.paginator import Page, Paginator
from django.template.defaultfilters import filesizeformat

from django_scaledb.overview import facts as collect
from django_scaledb.overview import timeline
from django_scaledb.overview.facts import ConversionFacts, CounterFacts, Part, Replica, SetFacts
from django_scaledb.overview.timeline import Bar, Drawing, Look, Piece
from django_scaledb.partitions import registry
from django_scaledb.partitions.bounds import Unbounded, show
from django_scaledb.partitions.config import PartitionConfig, RetentionAction
from django_scaledb.partitions.report import Result, Status
from django_scaledb.runs import LastRun

SETS_ON_A_PAGE = 10
"""Drawing fifty sets of two hundred tables makes a page of some megabytes, which no phone likes."""
TABLES_LISTED = timeline.DRAWN
_SPARK = (180, 20)
"""Width and height of a replica's last minutes, in pixels."""
_DONE = {
    "create": "create a partition",
    "create default": "create the default partition",
    "finalize": "finish the interrupted detach of",
    "detach": "detach",
    "settle": "settle",
    "archive": "archive",
    "drop": "drop",
}
_AFTERWARDS = {
    RetentionAction.DETACH: "then detached",
    RetentionAction.ARCHIVE: "then archived",
    RetentionAction.DROP: "then dropped",
}


@dataclass(frozen=True)
class Rect:
    """A rectangle with its numbers as SVG takes them, whatever the reader's language."""

    x: str
    y: str
    width: str
    height: str
    slug: str
    title: str = ""


@dataclass(frozen=True)
class Line:
    at: str
    label: str


@dataclass(frozen=True)
class Picture:
    """A drawing as the template writes it."""

    bars: list[Rect]
    strips: list[Rect]
    ticks: list[Line]
    levels: list[Line]
    lines: list[tuple[str, Line]]
    legend: list[Look]
    height: str
    base: str
    top: str
    summary: str
    omitted: int

    @property
    def room(self) -> str:
        """How narrow it may become before it scrolls: ``roomy``, ``ordinary`` or ``crowded``."""
        if len(self.strips) > 60:
            return "crowded"
        short = all(len(tick.label) <= 4 for tick in self.ticks)
        return "roomy" if short and len(self.strips) <= 30 else "ordinary"


@dataclass(frozen=True)
class Row:
    """One line of the table of a set."""

    name: str
    lower: str
    upper: str
    rows: int | None
    bytes: int | None
    state: str


@dataclass(frozen=True)
class Step:
    """One action of the next rotation."""

    text: str
    sql: str
    problem: str


@dataclass
class Set:
    """One partition set."""

    label: str
    anchor: str
    using: str
    page: int
    ok: bool
    error: str = ""
    table: str = ""
    settings: str = ""
    runway: str = ""
    bytes: int = 0
    count: int = 0
    problems: list[Any] = field(default_factory=list)
    picture: Picture | None = None
    rows: list[Row] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    unseen: int = 0
    next_problem: str = ""
    last: LastRun | None = None

    @property
    def next(self) -> str:
        """What the next rotation would do, in a few words."""
        count = len(self.steps) + self.unseen
        return "nothing to do" if not count else f"{count} action{'' if count == 1 else 's'}"


@dataclass(frozen=True)
class ServerRow:
    facts: Replica
    spark: list[Rect]
    minute: float | None
    minutes: float | None


@dataclass
class Overview:
    """All of the page."""

    now: datetime
    summary: list[Set]
    shown: list[Set]
    pages: Page[str]
    notes: list[str]
    replicas: Part[list[ServerRow]]
    counters: Part[list[CounterFacts]]
    conversions: Part[list[ConversionFacts]]
    spark: tuple[int, int] = _SPARK


def build(now: datetime, number: str | None = None) -> Overview:
    """The page at `now`; `number` is the one of the page of partition sets that was asked for."""
    labels = [model._meta.label for model in registry.partitioned_models()]
    pages = Paginator(labels, SETS_ON_A_PAGE).get_page(number)
    in_full = set(pages.object_list)
    databases = collect.attempt("the partition sets", lambda: collect.partition_sets(now, in_full=in_full))
    groups = databases.content or []
    found = {facts.found.label: facts for group in groups for facts in group.sets}
    summary = [
        _set(found[label], place // SETS_ON_A_PAGE + 1, in_full=label in in_full)
        for place, label in enumerate(labels)
        if label in found
    ]
    notes = [databases.problem]
    for group in groups:
        notes += [group.problem, group.rotation_problem, group.runs_problem]
    return Overview(
        now,
        summary,
        [each for each in summary if each.label in in_full],
        pages,
        list(dict.fromkeys(filter(None, notes))),
        collect.attempt("the replicas", _servers),
        collect.attempt("the counters", collect.counters),
        collect.attempt("the conversions", collect.conversions),
    )


# -- partition sets


def _set(facts: SetFacts, page: int, *, in_full: bool) -> Set:
    found, config = facts.found, facts.found.config
    shown = Set(
        label=found.label,
        anchor="set-" + found.label.lower().replace(".", "-"),
        using=facts.using,
        page=page,
        ok=found.ok,
        error=facts.error,
        table=found.table or "",
        bytes=facts.bytes,
        count=len(found.rows),
        problems=list(found.problems),
        last=facts.last_rotation,
    )
    if facts.next is not None:
        shown.next_problem = str(facts.next.error or "")
        with_sql = [result for result in facts.next.results if result.sent or result.reason]
        shown.unseen = len(facts.next.results) - len(with_sql)
        shown.steps = [_step(result) for result in with_sql]
    if config is None:
        return shown
    shown.settings = _settings(config)
    shown.runway = _runway(facts)
    if in_full:
        shown.rows = [_row(piece) for piece in facts.pieces[-TABLES_LISTED:]]
        if facts.drawing is not None and facts.drawing.bars:
            shown.picture = _picture(facts.drawing, shown)
    return shown


def _settings(config: PartitionConfig) -> str:
    kept = "kept for ever"
    if config.retention is not None:
        kept = f"kept for {config.retention}, {_AFTERWARDS[config.retention_action]}"
    return f"by {config.column}, {config.interval} each, {kept}"


def _runway(facts: SetFacts) -> str:
    config, runway = facts.found.config, facts.found.runway
    if config is None or runway is None:
        return ""
    periods, until = runway
    if isinstance(until, Unbounded):
        return "any date to come"
    return f"{periods} of {config.premake} periods ahead, to {show(until)}"


def _step(result: Result) -> Step:
    bounds = f" ({result.range})" if result.range is not None else ""
    script = []
    for sent in result.sent:
        locks = "; ".join(map(str, sent.locks))
        script.append((f"-- locks: {locks}\n" if locks else "") + f"{sent.sql};")
    problem = str(result.reason) if result.status is Status.FAILED else ""
    return Step(
        f"{_DONE[result.action]} {result.partition or ''}{bounds}",
        "\n".join(script),
        problem,
    )


def _row(piece: Piece) -> Row:
    bounds = piece.range
    return Row(
        str(piece.table) if piece.table else "",
        show(bounds.lower) if bounds else "",
        show(bounds.upper) if bounds else "",
        piece.rows,
        piece.bytes,
        _state(piece),
    )


def _state(piece: Piece) -> str:
    """The look in words, and what there is to know besides."""
    if not piece.note or piece.note.startswith(piece.look.value):
        return piece.note or piece.look.value
    return f"{piece.look.value}: {piece.note}"


def _picture(drawing: Drawing, shown: Set) -> Picture:
    base = timeline.TOP + timeline.HEIGHT
    bars = [bar for bar in drawing.bars if bar.piece.look is not Look.GAP]
    lines = [("now", drawing.now), ("cutoff", drawing.cutoff)]
    largest = max(bars, key=lambda bar: bar.piece.bytes or 0, default=None)
    summary = f"{len(bars)} tables over time, their height is their size"
    if largest is not None and largest.piece.bytes:
        summary += f"; the largest is {largest.piece.table} with {filesizeformat(largest.piece.bytes)}"
    return Picture(
        bars=[_bar(bar) for bar in bars],
        strips=[_strip(bar) for bar in drawing.bars],
        ticks=[Line(_percent(tick.left), tick.label) for tick in drawing.ticks],
        levels=[Line(_number(level.top), filesizeformat(level.bytes)) for level in drawing.levels],
        lines=[(name, Line(_percent(tick.left), tick.label)) for name, tick in lines if tick is not None],
        legend=drawing.looks,
        height=_number(drawing.height),
        base=_number(base),
        top=_number(timeline.TOP),
        summary=summary,
        omitted=drawing.omitted,
    )


def _bar(bar: Bar) -> Rect:
    return Rect(
        _percent(bar.left),
        _number(bar.top),
        _percent(bar.width),
        _number(bar.height),
        bar.piece.look.slug,
        _title(bar),
    )


def _strip(bar: Bar) -> Rect:
    return Rect(
        _percent(bar.left),
        _number(bar.strip),
        _percent(bar.width),
        _number(timeline.LANE),
        bar.piece.look.slug,
        _title(bar),
    )


def _title(bar: Bar) -> str:
    piece = bar.piece
    words = [str(piece.table) if piece.table else "no partition"]
    if piece.range is not None:
        words.append(str(piece.range))
    words.append(_state(piece))
    if piece.bytes is not None:
        words.append(filesizeformat(piece.bytes))
    if piece.rows is not None:
        words.append(f"about {piece.rows:,} rows")
    if bar.is_cut:
        words.append("reaches farther than it is drawn")
    return "\n".join(words)


def _percent(value: float) -> str:
    return f"{value:.3f}%"


def _number(value: float) -> str:
    return f"{value:.2f}"


# -- replicas


def _servers() -> list[ServerRow]:
    limit = collect.max_lag()
    return [
        ServerRow(replica, list(_spark(replica, limit)), replica.worst(60), replica.worst(300))
        for replica in collect.replicas()
    ]


def _spark(replica: Replica, limit: float) -> Iterator[Rect]:
    """One column for each five seconds; as high as the drawing is what ``MAX_LAG`` allows."""
    if not replica.is_watched:
        return
    width, height = _SPARK
    step = width / len(replica.past)
    for place, slot in enumerate(replica.past):
        if slot is None:
            continue
        share = 1.0 if slot.out else min((slot.lag or 0.0) / limit, 1.0)
        tall = max(1.5, share * height)
        yield Rect(
            _number(place * step),
            _number(height - tall),
            _number(step - 0.6),
            _number(tall),
            "out" if slot.out else "lag",
        )
