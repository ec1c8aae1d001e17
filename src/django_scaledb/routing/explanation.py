"""Why a read goes where it goes, for people; how many went where, for a metrics exporter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from django.db.models import Model
from django.db.models.query import QuerySet

from django_scaledb.routing import registry as registries
from django_scaledb.routing import state
from django_scaledb.routing.policy import Reason
from django_scaledb.routing.router import ReplicaRouter
from django_scaledb.routing.token import Position, format_lsn


@dataclass(frozen=True)
class Explanation:
    """Where a query would run now. `aliases` are equally right; `reason` is one of `Reason`, or None for
    ``.using()``."""

    aliases: tuple[str, ...]
    reason: Reason | None
    text: str

    def __str__(self) -> str:
        return self.text


def explain(query: QuerySet[Model] | type[Model]) -> Explanation:
    """Which server a queryset, or a read of a model, would go to now, and why; nothing is queried.

    Speaks for `ReplicaRouter`, not for routers that stand before it in ``DATABASE_ROUTERS``.
    """
    model: type[Model] = query.model if isinstance(query, QuerySet) else query
    if isinstance(query, QuerySet):
        queryset: Any = query
        if queryset._db is not None:
            text = f"{queryset._db}, because using({queryset._db!r}) names it"
            return Explanation((queryset._db,), None, text)
        if queryset._for_write:
            primary = ReplicaRouter().db_for_write(model) or ""
            return Explanation((primary,), None, f"{primary}, because the query locks or writes rows")
    members, decision = ReplicaRouter().decide(model)
    aliases = tuple(c.alias for c in decision.candidates) or (members.primary,)
    lines = [f"{' or '.join(aliases)}, because {decision.reason}"]
    position = state.frame().scope.positions.get(members.identity.system)
    if position is not None:
        lines.append(f"this context needs {position}")
    for replica in members.replicas.values():
        health = replica.why_out or f"has replayed {format_lsn(replica.floor)}"
        lines.append(f"{replica.alias}: {health}" + _missing(replica.floor, position, replica.why_out))
    return Explanation(aliases, decision.reason, "\n".join(lines))


def _missing(floor: int, position: Position | None, why_out: str) -> str:
    if why_out or position is None or floor >= position.lsn:
        return ""
    return f", {position.lsn - floor} bytes less"


def decisions() -> dict[str, dict[str, int]]:
    """For each primary how many reads were routed in this process so far, by reason (``replica``,
    ``transaction``, ...).

    The numbers only grow (a fork begins again at 0): counters for a metrics exporter.
    """
    return {primary: members.decisions() for primary, members in registries.registry().sets.items()}
