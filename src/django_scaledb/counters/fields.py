"""The columns of a counter's table, made from the source's fields."""

from __future__ import annotations

from typing import Any

from django.apps.registry import Apps
from django.db import models
from django.db.models.functions import Cast, NullIf

from django_scaledb.counters.options import CounterOptions, Group, own_columns, related_model
from django_scaledb.exceptions import ConfigurationError

#: What a copy of the source's field must not bring along.
DROPPED = (
    "primary_key", "unique", "db_index", "default", "db_default", "auto_now", "auto_now_add", "db_column",
    "unique_for_date", "unique_for_month", "unique_for_year", "null", "blank", "editable", "related_name",
    "limit_choices_to", "on_delete", "db_comment", "db_constraint", "help_text", "validators",
)  # fmt: skip
SUMMED = (models.IntegerField, models.DecimalField)


def key_field(group: Group, *, leads: bool, reverse: bool, apps: Apps) -> models.Field[Any, Any]:
    """The column for one group.

    A foreign key is one without a constraint and without a cascade: the row of a deleted parent
    goes to zero with its last source row, and no delete of the application ever fails because of a
    counter. `leads` says that the unique index begins with this column and serves its look-ups.
    """
    if group.expression is not None:
        return _copied(group.expression.output_field, null=True)
    last = group.path[-1]
    null = last.null or len(group.path) > 1
    if last.is_relation:
        return models.ForeignKey(
            related_model(last, apps),
            on_delete=models.DO_NOTHING,
            to_field=None if last.target_field.primary_key else last.target_field.name,  # type: ignore[attr-defined]
            null=null,
            blank=null,
            db_constraint=False,
            db_index=not leads,
            related_name=None if reverse else "+",
        )
    return _copied(last, null=null)


def _copied(field: models.Field[Any, Any], *, null: bool) -> models.Field[Any, Any]:
    plain: type[models.Field[Any, Any]] | None = None
    if isinstance(field, models.BigAutoField):
        plain = models.BigIntegerField
    elif isinstance(field, models.AutoField):
        plain = models.IntegerField
    if plain is not None:
        return plain(null=null, blank=null)
    _, _, args, kwargs = field.deconstruct()
    kept = {name: value for name, value in kwargs.items() if name not in DROPPED}
    kept |= {"null": null, "blank": null or field.empty_strings_allowed}
    return type(field)(*args, **kept)


def total_fields(
    options: CounterOptions, source: type[models.Model]
) -> list[tuple[str, models.Field[Any, Any]]]:
    """The columns for the totals, in order; an Avg is kept as a sum and a count, and computed from them."""
    if not options.totals:
        raise ConfigurationError(
            f'{options.label}: CounterMeta.totals is empty; say what to count: {{"total": Count("*")}}'
        )
    fields: list[tuple[str, models.Field[Any, Any]]] = []
    for name, total in options.totals.items():
        if isinstance(total, models.Avg):
            amount = summed_field(options, source, name, total)
            fields += [
                (f"{name}_sum", _sum_field(amount)),
                (f"{name}_count", _count_field()),
                (name, _average_field(name)),
            ]
        elif isinstance(total, models.Sum):
            fields.append((name, _sum_field(summed_field(options, source, name, total))))
        else:
            fields.append((name, _count_field()))
    if options.on_detach == "keep":
        # What the totals hold of partitions that have left: an all-time total is checked against it.
        fields += [
            (f"{name}_kept", field.clone())
            for name, field in fields
            if not isinstance(field, models.GeneratedField)
        ]
    return fields


def check_total(options: CounterOptions, name: str, total: Any) -> None:
    """Raises `ConfigurationError` for an aggregate that cannot be kept by adding and subtracting."""
    where = f"{options.label}: CounterMeta.totals[{name!r}]"
    if isinstance(total, (models.Min, models.Max)):
        raise ConfigurationError(
            f"{where} is a {type(total).__name__}: when the smallest or largest row goes, the next one is "
            "known only to a scan of the source. Ask the source, which an index answers: "
            f"{options.source}.objects.order_by(..).first()"
        )
    if not isinstance(total, (models.Count, models.Sum, models.Avg)):
        raise ConfigurationError(f"{where} must be a Count, a Sum or an Avg, not {total!r}")
    if getattr(total, "distinct", False):
        raise ConfigurationError(
            f"{where} is distinct: whether a value is still there is known only to a scan of the source. "
            "Group by that value and count the counter's rows."
        )


def summed_field(
    options: CounterOptions, source: type[models.Model], name: str, total: Any
) -> models.Field[Any, Any]:
    """What a Sum or Avg adds up; raises `ConfigurationError` when sums of it are not exact."""
    expression = own_columns(options, source, total.get_source_expressions()[0], f"totals[{name!r}]")
    output = expression.output_field
    if not isinstance(output, SUMMED):
        hint = (
            " (floating point sums depend on the order of adding)"
            if isinstance(output, models.FloatField)
            else ""
        )
        raise ConfigurationError(
            f"{options.label}: CounterMeta.totals[{name!r}] sums a {type(output).__name__}{hint}; "
            "use an integer or a DecimalField"
        )
    return output


def _count_field() -> models.Field[Any, Any]:
    return models.BigIntegerField(default=0, db_default=0, editable=False)


def _sum_field(amount: models.Field[Any, Any]) -> models.Field[Any, Any]:
    if isinstance(amount, models.DecimalField):
        digits, places = amount.max_digits, amount.decimal_places
        wide = None if digits is None else max(digits + 18, 38)
        return models.DecimalField(
            max_digits=wide, decimal_places=places, default=0, db_default=0, editable=False
        )
    return models.BigIntegerField(default=0, db_default=0, editable=False)


def _average_field(name: str) -> models.Field[Any, Any]:
    output = models.DecimalField(max_digits=38, decimal_places=10, null=True)
    return models.GeneratedField(
        expression=Cast(models.F(f"{name}_sum"), output) / NullIf(models.F(f"{name}_count"), models.Value(0)),
        output_field=models.DecimalField(max_digits=38, decimal_places=10, null=True),
        db_persist=True,
    )
