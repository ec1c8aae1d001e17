"""The database router: ``DATABASE_ROUTERS = ["django_scaledb.routing.ReplicaRouter"]``."""

from __future__ import annotations

from operator import length_hint
from typing import Any

from django.apps import apps
from django.db.models import Model

from django_scaledb.routing import policy
from django_scaledb.routing import registry as registries
from django_scaledb.routing.policy import Decision, Facts, Mode, Reason, Transaction, Verdict
from django_scaledb.routing.replicas import ReplicaSet
from django_scaledb.routing.state import Frame, current, open_anywhere, outermost, thread

_current_frame = current.get
_by_model = registries.by_model


class _Route:
    """What is known of a model: its set, and why it is only read from the primary, if it is."""

    __slots__ = ("always", "members")

    def __init__(self, members: ReplicaSet, primary_only: Reason | None) -> None:
        self.members = members
        self.always = primary_only


class ReplicaRouter:
    """Sends reads to replicas that are healthy and fresh enough for this context, all else to the primary.

    The primary serves inside `atomic()` (and whenever a transaction is open on it), for
    ``select_for_update``, writes and migrations, for sessions and what ``SCALEDB["READ_FROM_PRIMARY"]``
    names, and whenever no replica is healthy or has replayed what this context wrote or saw.

    A decision does no I/O. The first read of a process starts the monitor, and waits for its first look
    a quarter of a second at most.
    """

    # -- Django's questions

    def db_for_read(self, model: type[Model], **hints: Any) -> str | None:
        # The short cut: `policy.decide` would say the same.
        if not (open_anywhere and thread.open) and (frame := _current_frame()) is not None:
            try:
                members = _by_model[model]
                if not (unless := frame.unless):
                    for alias in members.picks:
                        return alias
                elif not frame.scope.unread:
                    picks, floor, system, timeline = members.choices
                    _, line, lsn = unless[system]
                    if lsn <= floor and line == timeline:
                        for alias in picks:
                            return alias
            except KeyError:
                pass  # a model that was never met, or a log that is not this set's
        return self._read(model)

    def db_for_write(self, model: type[Model], **hints: Any) -> str | None:
        return self._route(model).members.primary

    def allow_relation(self, obj1: Model, obj2: Model, **hints: Any) -> bool | None:
        """Instances of one set may refer to one another, wherever each was read."""
        registry = registries.registry()
        one, other = (registry.set_with(o._state.db) if o._state.db else None for o in (obj1, obj2))
        return True if one is not None and one is other else None

    def allow_migrate(
        self, db: str, app_label: str, model_name: str | None = None, **hints: Any
    ) -> bool | None:
        """A replica gets its tables by replication; a primary, those of its own models."""
        registry = registries.registry()
        if db in registry.replicas:
            return False
        if db in registry.sets and len(registry.sets) > 1:
            return registry.set_of(app_label, model_name).primary == db
        return None

    # -- the long way

    def _route(self, model: type[Model]) -> _Route:
        registry = registries.registry()
        meta = model._meta
        name = meta.model_name or ""
        members = registry.set_of(meta.app_label, name)
        if meta.apps is not apps:  # lives as long as its migration
            return _Route(members, Reason.MIGRATION)
        if registry.config.is_from_primary(meta.app_label, name):
            return _Route(members, Reason.MODEL)
        _by_model[model] = members
        return _Route(members, None)

    def _read(self, model: type[Model]) -> str:
        members, decision = self.decide(model)
        members.reasons[decision.reason] += 1
        if decision.reason is Reason.NOT_REPLAYED:
            required, _ = requirement(members, _current_frame() or outermost())
            if required is None:
                members.nudge()
            else:
                members.wait_for(required)
        if decision.candidates:
            if length_hint(members.picks) == 0:
                members.publish()
            return members.next_replica(decision.candidates)
        return members.primary

    def decide(self, model: type[Model]) -> tuple[ReplicaSet, Decision]:
        """Where a read of `model` would go now, and why."""
        route = self._route(model)
        frame = _current_frame() or outermost()
        members = route.members
        facts = _facts(route, frame)
        decision = policy.decide(facts)
        if decision.reason is Reason.STARTING and not members.started:
            members.start()
            decision = policy.decide(_facts(route, frame))
        return members, decision


def _facts(route: _Route, frame: Frame) -> Facts:
    members = route.members
    required, timeline_unknown = requirement(members, frame)
    return Facts(
        mode=frame.mode,
        primary_only=route.always,
        transaction=_transaction(members.primary),
        required=required,
        candidates=() if timeline_unknown and frame.mode is not Mode.STALE_REPLICA else members.candidates,
        no_candidates=(
            Reason.NOT_REPLAYED if timeline_unknown and members.ready.is_set() else members.no_candidates
        ),
    )


def requirement(members: ReplicaSet, frame: Frame) -> tuple[int | None, bool]:
    """What a replica must have replayed for this context; and whether that is on a timeline unknown so
    far."""
    identity, scope = members.identity, frame.scope
    position = scope.positions.get(identity.system)
    if not identity.timeline:
        return None, bool(scope.positions)
    meaning = policy.verdict(position, identity.system, identity.timeline)
    if meaning is Verdict.COMPARE and position is not None:
        return position.lsn, False
    # A timeline that the primary, looked at since, is not on is none of this cluster's.
    return None, meaning is Verdict.AHEAD and members.primary_seen_at <= scope.since


def _transaction(primary: str) -> Transaction:
    connection = thread.open.get(primary)
    if connection is None:
        return Transaction.NONE
    return Transaction.WRITTEN if connection.routing_writes.in_doubt else Transaction.CLEAN
