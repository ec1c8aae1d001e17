"""CounterModel: a table of totals of another model's rows, one row per key."""

from __future__ import annotations

from typing import Any, TypeVar

from django.db import connections, models
from django.db.models.base import ModelBase

from django_scaledb.counters.fields import check_total, key_field, total_fields
from django_scaledb.counters.options import CounterOptions, NotLoaded, resolve_groups
from django_scaledb.exceptions import ConfigurationError
from django_scaledb.postgres.identifiers import fit

T = TypeVar("T", bound=models.Model)


class CounterModelBase(ModelBase):
    """Reads CounterMeta, and adds the columns as soon as the source's class is known."""

    def __new__(cls, name: str, bases: tuple[type, ...], attrs: dict[str, Any], **kwargs: Any) -> Any:
        new_class: Any = super().__new__(cls, name, bases, attrs, **kwargs)
        declared: dict[str, Any] = {}
        for base in reversed(new_class.__mro__):
            meta = vars(base).get("CounterMeta")
            if meta is not None:
                declared |= {n: getattr(meta, n) for n in dir(meta) if not n.startswith("_")}
        if new_class._meta.abstract or new_class._meta.proxy or not declared:
            return new_class
        new_class._counter_meta = CounterOptions(new_class._meta.label, new_class._meta.app_label, declared)
        _build(new_class)
        return new_class


def _build(model: Any) -> None:
    """Add the columns of `model`; when a class is missing, once it has been imported."""
    options: CounterOptions = model._counter_meta
    apps = model._meta.apps
    try:
        source = options.source_model(apps)
        options.groups = resolve_groups(options, source, apps)
        for name, total in options.totals.items():
            check_total(options, name, total)
        totals = total_fields(options, source)
        keys = []
        pointed_at: set[Any] = set()
        for i, group in enumerate(options.groups):
            target = group.path[-1].remote_field if group.path and group.path[-1].is_relation else None
            reverse = target is not None and target.model not in pointed_at
            pointed_at.add(target and target.model)
            keys.append((group.name, key_field(group, leads=i == 0, reverse=reverse, apps=apps)))
    except NotLoaded as missing:
        apps.lazy_model_operation(lambda _: _build(model), missing.args)
        return
    except ConfigurationError as error:
        options.problem = error
        return
    for name, field in [*keys, *totals]:
        model.add_to_class(name, field)
    if keys:
        nullable = any(field.null for _, field in keys)
        unique = models.UniqueConstraint(
            fields=[name for name, _ in keys],
            name=fit(model._meta.db_table, "_key"),
            nulls_distinct=False if nullable else None,
        )
        model._meta.constraints = [*model._meta.constraints, unique]
        model._meta.original_attrs["constraints"] = model._meta.constraints
    options.is_built = True


class CounterQuerySet(models.QuerySet[T]):
    """Rows of a counter, and the totals of one key."""

    def for_key(self, **key: Any) -> T:
        """The row of `key`, with zeros where there is none yet, and with this transaction's own writes.

        Takes one argument per column of ``group_by`` (a model instance or its primary key for a
        foreign key, None for the group of NULL) and none where the counter has no groups. Raises
        `TypeError` when a column is missing or unknown. What is returned may be an unsaved
        instance.
        """
        model: Any = self.model
        values = _key_values(model, key)
        found = self.filter(**_lookups(values)).first() if values else self.filter(pk=1).first()
        row: Any = found if found is not None else model(**values)
        connection = connections[self.db]
        pending = getattr(connection, "pending_for_key", None)
        if pending is not None:
            columns = [model._meta.get_field(group.name) for group in model._counter_meta.groups]
            for name, amount in pending(model, [values[field.attname] for field in columns]).items():
                setattr(row, name, getattr(row, name) + amount)
        return row  # type: ignore[no-any-return]

    async def afor_key(self, **key: Any) -> T:
        """`for_key`, for async code."""
        from asgiref.sync import sync_to_async

        return await sync_to_async(self.for_key)(**key)


def _key_values(model: Any, key: dict[str, Any]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    given = dict(key)
    for group in model._counter_meta.groups:
        field = model._meta.get_field(group.name)
        names = [name for name in (field.name, field.attname) if name in given]
        if not names:
            raise TypeError(
                f"{model._meta.label}.objects.for_key() needs {field.name}=..; its groups are "
                f"{', '.join(g.name for g in model._counter_meta.groups)}"
            )
        value = given.pop(names[0])
        if isinstance(value, models.Model):
            value = getattr(value, field.target_field.attname)
        values[field.attname] = value
    if given:
        raise TypeError(
            f"{model._meta.label}.objects.for_key() got {', '.join(sorted(given))}; its groups are "
            f"{', '.join(g.name for g in model._counter_meta.groups) or 'none'}"
        )
    return values


def _lookups(values: dict[str, Any]) -> dict[str, Any]:
    return {
        f"{name}__isnull" if value is None else name: value is None or value for name, value in values.items()
    }


class CounterManager(models.Manager.from_queryset(CounterQuerySet)):  # type: ignore[misc]
    """The manager of counters: ``for_key`` beside the ordinary queries."""


class CounterModel(models.Model, metaclass=CounterModelBase):
    """Base class of counters: an ordinary model and table, kept exact by what writes its source.

    Declare it with an inner ``CounterMeta``; the columns come from ``group_by`` and ``totals``::

        class ProjectUploads(CounterModel):
            class CounterMeta:
                source = "pypi.Upload"
                group_by = ["project"]
                totals = {"total": Count("*"), "bytes": Sum("size")}

    ``source`` is a model or its label; ``group_by`` a list of fields, of spans over foreign keys
    (``"project__owner"`` gives the column ``owner``) and of time buckets (``TruncMonth("at")``
    gives ``month``), or a dictionary where you name them; ``where`` a Q over the source's own
    columns; ``totals`` a dictionary of Count, Sum and Avg; ``mechanism`` is ``"signals"`` (every
    write of the ORM counts) or ``"trigger"`` (every write counts); ``on_detach`` says what becomes of the
    rows of a partition that leaves the source: ``"subtract"`` them or ``"keep"`` them counted.

    One row per key; NULL is a key of its own (PostgreSQL 15, NULLS NOT DISTINCT). A counter without
    groups has one row, whose primary key is 1.
    """

    _counter_meta: CounterOptions

    id = models.BigAutoField(primary_key=True)

    objects = CounterManager()

    class Meta:
        abstract = True

    def __str__(self) -> str:
        names = [g.name for g in self._counter_meta.groups]
        key = {name: self.serializable_value(name) for name in names}
        return (
            ", ".join(f"{name}={value}" for name, value in key.items()) or self._meta.verbose_name.__str__()
        )

    @classmethod
    def source(cls) -> type[models.Model]:
        """The model whose rows are counted."""
        return cls._counter_meta.source_model(cls._meta.apps)


__all__ = ["CounterManager", "CounterModel", "CounterQuerySet"]
