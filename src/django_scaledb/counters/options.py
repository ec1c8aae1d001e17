"""What a CounterMeta says, and the fields of the source that it names."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from django.apps.registry import Apps
from django.core.exceptions import FieldDoesNotExist, FieldError
from django.db import models
from django.db.models.sql import Query

from django_scaledb.exceptions import ConfigurationError

MECHANISMS = ("signals", "trigger")
ON_DETACH = ("subtract", "keep")
KNOWN = ("source", "group_by", "where", "totals", "mechanism", "on_detach")


class NotLoaded(Exception):
    """A model that the declaration needs has not been imported yet; `args` is its registry key."""


class CounterOptions:
    """A CounterMeta as written; `problem` is what makes it unusable, for the system check."""

    def __init__(self, label: str, app_label: str, attrs: dict[str, Any]) -> None:
        self.label = label
        self.app_label = app_label
        self.attrs = attrs
        self.source: Any = attrs.get("source")
        self.where: models.Q | None = attrs.get("where")
        self.totals: dict[str, Any] = dict(attrs.get("totals") or {})
        self.mechanism: str = attrs.get("mechanism", "signals")
        self.on_detach: str = attrs.get("on_detach", "subtract")
        self.group_by: Any = attrs.get("group_by") or ()
        self.problem: ConfigurationError | None = None
        self.groups: list[Group] = []
        self.is_built = False

    @property
    def source_key(self) -> tuple[str, str]:
        """The source's ``(app_label, model_name)``."""
        if isinstance(self.source, type) and issubclass(self.source, models.Model):
            return self.source._meta.app_label, str(self.source._meta.model_name)
        if not isinstance(self.source, str) or not self.source:
            raise ConfigurationError(
                f'{self.label}: CounterMeta.source must be a model or its "app_label.ModelName", '
                f"not {self.source!r}"
            )
        app_label, _, name = self.source.rpartition(".")
        return app_label or self.app_label, name.lower()

    def source_model(self, apps: Apps) -> type[models.Model]:
        """The source's class; raises `NotLoaded` when it is not registered (yet)."""
        if isinstance(self.source, type) and issubclass(self.source, models.Model):
            return self.source
        return _registered(apps, *self.source_key)

    def names(self) -> list[tuple[str, Any]]:
        """The groups' names with what they are made of."""
        if isinstance(self.group_by, str):
            raise ConfigurationError(
                f"{self.label}: CounterMeta.group_by must be a list, such as [{self.group_by!r}]"
            )
        pairs: Iterable[tuple[Any, Any]]
        if isinstance(self.group_by, dict):
            pairs = self.group_by.items()
        else:
            pairs = [
                item if isinstance(item, tuple) else (self._name_of(item), item) for item in self.group_by
            ]
        found: dict[str, Any] = {}
        for name, item in pairs:
            if name in found or name in self.totals or name in ("id", "pk"):
                raise ConfigurationError(
                    f"{self.label}: two columns would be called {name!r}; name the groups yourself: "
                    'group_by = {"owner": "project__owner"}'
                )
            found[name] = item
        return list(found.items())

    def _name_of(self, item: Any) -> str:
        if isinstance(item, str):
            return item.rpartition("__")[2]
        if isinstance(item, models.F):
            return str(vars(item)["name"]).rpartition("__")[2]
        kind = getattr(item, "kind", None)
        if isinstance(kind, str):  # TruncMonth and its like
            return kind
        raise ConfigurationError(
            f"{self.label}: {item!r} in CounterMeta.group_by has no name of its own; "
            'give it one: group_by = {"size_class": ...}'
        )


@dataclass
class Group:
    """One group column: its name and either the fields on the way (`path`) or an `expression`."""

    name: str
    path: list[models.Field[Any, Any]] = field(default_factory=list)
    expression: Any = None


def resolve_groups(options: CounterOptions, source: type[models.Model], apps: Apps) -> list[Group]:
    """The groups with the fields they go over; raises `NotLoaded` or `ConfigurationError`."""
    groups = []
    for name, item in options.names():
        if isinstance(item, models.F):
            item = vars(item)["name"]
        if isinstance(item, str):
            groups.append(Group(name, path=_path(options, source, item, apps)))
        elif hasattr(item, "resolve_expression"):
            groups.append(Group(name, expression=own_columns(options, source, item, f"group_by {name!r}")))
        else:
            raise ConfigurationError(
                f"{options.label}: CounterMeta.group_by holds {item!r}, which is no field"
            )
    return groups


def _path(
    options: CounterOptions, source: type[models.Model], path: str, apps: Apps
) -> list[models.Field[Any, Any]]:
    found: list[models.Field[Any, Any]] = []
    model = source
    names = path.split("__")
    for i, name in enumerate(names):
        try:
            step = model._meta.pk if name == "pk" else model._meta.get_field(name)
        except FieldDoesNotExist:
            raise ConfigurationError(
                f"{options.label}: CounterMeta.group_by names {path!r}, but {model._meta.label} has no field "
                f"{name!r}"
            ) from None
        if not isinstance(step, models.Field) or step.many_to_many or step.column is None:
            raise ConfigurationError(
                f"{options.label}: CounterMeta.group_by names {path!r}; {model._meta.label}.{name} is not a "
                "column, and a row must belong to one group"
            )
        if step not in model._meta.local_concrete_fields:
            raise ConfigurationError(
                f"{options.label}: {model._meta.label}.{name} lies in the table of "
                f"{step.model._meta.label}; count that model instead"
            )
        found.append(step)
        if i < len(names) - 1:
            if not step.is_relation:
                raise ConfigurationError(
                    f"{options.label}: CounterMeta.group_by names {path!r}, but "
                    f"{model._meta.label}.{name} is "
                    "no foreign key"
                )
            model = related_model(step, apps)
    return found


def related_model(foreign_key: models.Field[Any, Any], apps: Apps) -> type[models.Model]:
    """The model that a foreign key points at; raises `NotLoaded`."""
    related: Any = foreign_key.remote_field.model  # type: ignore[union-attr]
    if related == "self":
        return foreign_key.model
    if isinstance(related, str):
        app_label, _, name = related.rpartition(".")
        related = _registered(apps, app_label or foreign_key.model._meta.app_label, name.lower())
    model: type[models.Model] = related
    return model


def _registered(apps: Apps, app_label: str, name: str) -> type[models.Model]:
    try:
        return apps.get_registered_model(app_label, name)
    except LookupError:
        raise NotLoaded(app_label, name.lower()) from None


def own_columns(options: CounterOptions, source: type[models.Model], expression: Any, what: str) -> Any:
    """`expression` resolved over the source's own columns; raises `ConfigurationError`."""
    query = Query(source)
    query.get_initial_alias()
    try:
        if isinstance(expression, models.Q):
            return query.build_where(expression)
        return expression.resolve_expression(query, allow_joins=False, summarize=False)
    except FieldError as error:
        raise ConfigurationError(
            f"{options.label}: CounterMeta.{what} may use columns of {source._meta.label} alone ({error}); "
            "only group_by goes over foreign keys"
        ) from error
