"""Pages by position instead of by number: the rows before or after one, by (key, id).

Page 5,000 costs what the first one does, and nothing is counted. Each page is asked for in steps that
PostgreSQL prunes when it plans them: the period of the row that it begins at, then, until the page is
full, the next 2, 4, 8, .. periods, and at last all that is left. On a table in ordinary use
the first step does, and touches one partition.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime, time
from typing import TYPE_CHECKING, Any
from uuid import UUID

from django.core.exceptions import ValidationError
from django.core.paginator import EmptyPage, InvalidPage, Page
from django.core.signing import BadSignature, Signer
from django.db import models
from django.db.models import F, Func, Q, Value
from django.http import Http404
from django.utils import timezone
from django.views.generic.list import MultipleObjectMixin

from django_scaledb.exceptions import PlanError
from django_scaledb.partitions import registry, why
from django_scaledb.partitions.config import KeyKind
from django_scaledb.partitions.querysets import as_key
from django_scaledb.partitions.uuid7 import timestamp_of

if TYPE_CHECKING:
    _Page = Page[Any]
    _ListMixin = MultipleObjectMixin[Any]
else:
    _Page, _ListMixin = Page, MultipleObjectMixin

STEPS = 5
"""How often the span doubles before all that is left is read at once: 63 periods until then."""

_NEXT, _PREVIOUS = "next", "previous"


@dataclass(frozen=True)
class Position:
    """A row's place: its key and its primary key."""

    key: Any
    pk: Any


class KeysetPage(_Page):
    """A page of `KeysetPaginator`: it has tokens where Django's has numbers, and None for no page."""

    def __init__(
        self, rows: list[Any], paginator: KeysetPaginator, next_token: str | None, previous_token: str | None
    ) -> None:
        self.object_list = rows
        self.paginator: Any = paginator
        self.next_token = next_token
        self.previous_token = previous_token

    def __repr__(self) -> str:
        return f"<KeysetPage of {len(self.object_list)} rows>"

    def has_next(self) -> bool:
        return self.next_token is not None

    def has_previous(self) -> bool:
        return self.previous_token is not None

    def next_page_number(self) -> Any:
        """The token of the next page, under the name that templates know; raises `EmptyPage`."""
        return self._token(self.next_token)

    def previous_page_number(self) -> Any:
        return self._token(self.previous_token)

    def _token(self, token: str | None) -> str:
        if token is None:
            raise EmptyPage("there is no such page")
        return token


class KeysetPaginator:
    """Pages of a partitioned model's rows in the order of (key, id).

    The newest rows come first, unless the queryset is ordered by the key, ascending. Rows that have
    the same key are told apart by their primary key, so none is shown twice or left out, whatever
    is added or deleted meanwhile. Any filter of the queryset is kept.

    An index on (key, id) lets PostgreSQL begin at the row; without one it sorts the partition.

    Raises `ConfigurationError` for a model that is not partitioned, and `ValueError` for a queryset
    that is sliced or ordered by anything else.
    """

    def __init__(self, queryset: models.QuerySet[Any], per_page: int) -> None:
        if per_page < 1:
            raise ValueError(f"a page of {per_page} rows is none")
        self.per_page = per_page
        self.config = registry.config_for(queryset.model)
        self.key = registry.key_field(queryset.model)
        self.object_list = queryset
        self.descending = self._is_descending()
        if queryset.query.is_sliced:
            raise ValueError("a slice has no pages: give the queryset itself")
        self._signer = Signer(salt=f"django_scaledb.keyset:{queryset.model._meta.label}")

    def _is_descending(self) -> bool:
        order = self.object_list.query.order_by
        meta = self.object_list.model._meta
        keys = {self.key.name, self.key.attname, *(("pk",) if self.key.primary_key else ())}
        names = [name.removeprefix("-") if isinstance(name, str) else "" for name in order]
        signs = {isinstance(name, str) and name.startswith("-") for name in order}
        wanted = len(signs) < 2 and (not names or names[0] in keys)
        if not wanted or len(names) > 2 or not set(names[1:]) <= {"pk", meta.pk.name}:
            raise ValueError(
                f"{meta.label} is ordered by {', '.join(map(str, order))}; pages by position are in the "
                f"order of {self.key.name}: order_by({self.key.name!r}) or order_by({'-' + self.key.name!r})"
            )
        return signs != {False}

    def page(self, token: str | None = None) -> KeysetPage:
        """The page that `token` leads to; without one, the first.

        Raises `InvalidPage` for a token that was not made here, or for another model.
        """
        direction, position = self._decode(token) if token else (_NEXT, None)
        forward = direction == _NEXT
        rows = self._rows(position, self.descending is forward, self.per_page + 1)
        more, rows = len(rows) > self.per_page, rows[: self.per_page]
        if not forward:
            rows.reverse()
        # Where there is no row to stand at, the way back leads to the other end.
        first, last = (self._position(row) for row in (rows[0], rows[-1])) if rows else (None, None)
        beyond = position is not None
        return KeysetPage(
            rows,
            self,
            next_token=self._encode(_NEXT, last) if (more if forward else beyond) else None,
            previous_token=self._encode(_PREVIOUS, first) if (beyond if forward else more) else None,
        )

    # -- rows

    def _rows(self, start: Position | None, descending: bool, wanted: int) -> list[Any]:
        """At most `wanted` rows beyond `start`, the nearest one first."""
        sign = "-" if descending else ""
        order = ["pk"] if self.key.primary_key else [self.key.name, "pk"]
        queryset = self.object_list.order_by(*(sign + name for name in order))
        if start is not None:
            queryset = queryset.filter(*self._beyond(start, descending))
        rows: list[Any] = []
        for step in self._steps(start, descending):
            rows += queryset.filter(step)[: wanted - len(rows)]
            if len(rows) == wanted:
                break
        return rows

    def _beyond(self, start: Position, descending: bool) -> Iterator[Any]:
        side = "lt" if descending else "gt"
        if self.key.primary_key:
            yield Q(**{f"pk__{side}": start.pk})
            return
        # The comparison of rows begins at the row, in an index; only the plain one prunes.
        yield Q(**{f"{self.key.name}__{side}e": start.key})
        pk = self.object_list.model._meta.pk
        yield _RowComparison(
            F(self.key.name),
            F("pk"),
            Value(start.key, output_field=self.key),
            Value(start.pk, output_field=pk),
            operator="<" if descending else ">",
        )

    def _steps(self, start: Position | None, descending: bool) -> Iterator[Q]:
        """Spans of the key, the nearest one first, that leave no row out and have none in common."""
        key, interval, zone = self.key.name, self.config.interval, self.config.period_zone
        if start is None and (not descending or why.restricts(self.object_list.query, self.key)):
            yield Q()  # nothing is known about where the rows begin, or they are few
            return
        near: Any = None
        try:
            edge = self._moment(start.key) if start else self.config.on_key_axis(datetime.now(UTC))
            edge = interval.start_of(edge, zone) if descending else interval.next(edge, zone)
            for doubled in range(STEPS + 1):
                for _ in range(2**doubled - 1 if doubled else 0):
                    edge = self._further(edge, descending)
                far = self._bound(edge)
                if descending:
                    yield Q(**{f"{key}__gte": far}) & (Q() if near is None else Q(**{f"{key}__lt": near}))
                else:
                    yield Q(**{f"{key}__lt": far}) & (Q() if near is None else Q(**{f"{key}__gte": near}))
                near = far
                edge = self._further(edge, descending)
        except (PlanError, OverflowError):
            pass  # the calendar ends here
        yield Q() if near is None else Q(**{f"{key}__lt" if descending else f"{key}__gte": near})

    def _further(self, edge: datetime, descending: bool) -> datetime:
        interval, zone = self.config.interval, self.config.period_zone
        return interval.start_of(edge - edge.resolution, zone) if descending else interval.next(edge, zone)

    def _moment(self, key: Any) -> datetime:
        """Where a key stands among the bounds."""
        if isinstance(key, UUID):
            try:
                return timestamp_of(key)
            except ValueError as error:
                raise PlanError(str(error)) from error
        if not isinstance(key, datetime):
            return datetime.combine(key, time(), tzinfo=UTC)
        return key if key.tzinfo is not None else timezone.make_aware(key)

    def _bound(self, edge: datetime) -> Any:
        kind = self.config.key_kind
        return edge.date() if kind is KeyKind.DATE else as_key(edge, kind)

    # -- tokens

    def _position(self, row: Any) -> Position:
        pk = self.object_list.model._meta.pk
        if isinstance(row, dict) and {self.key.name, pk.name} <= row.keys():
            return Position(row[self.key.name], row[pk.name])
        if isinstance(row, models.Model):
            return Position(getattr(row, self.key.attname), row.pk)
        raise TypeError(
            f"rows of a page by position are instances, or values() with {self.key.name} and {pk.name}"
        )

    def _encode(self, direction: str, position: Position | None) -> str:
        parts = [direction]
        if position is not None:
            key = position.key.isoformat() if isinstance(position.key, date) else str(position.key)
            parts += [key, str(position.pk)]
        return self._signer.sign_object(parts)

    def _decode(self, token: str) -> tuple[str, Position | None]:
        pk = self.object_list.model._meta.pk
        try:
            direction, *position = self._signer.unsign_object(token)
            if not position:
                return direction, None
            key, pk_text = position
            return direction, Position(self._parse(key), pk.to_python(pk_text))
        except (BadSignature, ValidationError, ValueError) as error:
            raise InvalidPage(
                f"{token!r} leads to no page of {self.object_list.model._meta.label}"
            ) from error

    def _parse(self, text: str) -> Any:
        if self.config.key_kind is KeyKind.TIMESTAMP:
            return datetime.fromisoformat(text)
        return self.key.to_python(text)


class _RowComparison(Func):
    """``(a, b) < (c, d)``, which PostgreSQL can begin at in an index on (a, b)."""

    output_field = models.BooleanField()

    def __init__(self, *expressions: Any, operator: str, **extra: Any) -> None:
        super().__init__(*expressions, operator=operator, **extra)

    def as_sql(self, compiler: Any, connection: Any, **extra_context: Any) -> tuple[str, list[Any]]:  # type: ignore[override]
        parts = [compiler.compile(expression) for expression in self.get_source_expressions()]
        (a, b, c, d), params = [text for text, _ in parts], [p for _, values in parts for p in values]
        return f"({a}, {b}) {self.extra['operator']} ({c}, {d})", params


class KeysetListMixin(_ListMixin):
    """For a ``ListView`` of a partitioned model: ``?page=`` holds a token, `paginate_by` rows a page.

    ``page_obj.next_page_number`` and ``previous_page_number`` are tokens. A token that leads nowhere is 404.
    """

    def paginate_queryset(self, queryset: Any, page_size: int) -> Any:
        paginator = KeysetPaginator(queryset, page_size)
        view: Any = self
        token = view.kwargs.get(self.page_kwarg) or view.request.GET.get(self.page_kwarg)
        try:
            page = paginator.page(token)
        except InvalidPage as error:
            raise Http404(str(error)) from error
        return paginator, page, page.object_list, page.has_other_pages()
