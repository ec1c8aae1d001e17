"""Which models are partitioned, and what each one's PartitioningMeta comes to."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from django.apps import apps as global_apps
from django.apps.registry import Apps
from django.core.exceptions import FieldDoesNotExist
from django.db import models

from django_scaledb.exceptions import ConfigurationError
from django_scaledb.partitions.config import KeyKind, PartitionConfig, make_config
from django_scaledb.partitions.fields import UUID7Field
from django_scaledb.partitions.options import is_partitioned, options_of

if TYPE_CHECKING:
    from django_scaledb.partitions.models import PartitionedModel


def partitioned_models(apps: Apps = global_apps) -> list[type[PartitionedModel]]:
    """The concrete, managed partitioned models of all installed apps, in their order."""
    return [
        model
        for model in apps.get_models()
        if is_partitioned(model) and model._meta.managed and not model._meta.proxy
    ]


def key_field(model: type[models.Model]) -> models.Field[Any, Any]:
    """The field that `model` is partitioned by.

    Raises `ConfigurationError` when ``PartitioningMeta.key`` does not name exactly one field.
    """
    label = model._meta.label
    key = options_of(model).key
    if not key:
        raise ConfigurationError(
            f'{label} has no PartitioningMeta.key; name the field to partition by: key = ["created_at"]'
        )
    if len(key) != 1 or not isinstance(key[0], str):
        raise ConfigurationError(
            f"{label}: PartitioningMeta.key must name exactly one field, not {list(key)!r}; "
            "range partitions by time have one key"
        )
    try:
        field = model._meta.get_field(key[0])
    except FieldDoesNotExist:
        raise ConfigurationError(
            f"{label} has no field {key[0]!r}, which PartitioningMeta.key names"
        ) from None
    if not isinstance(field, models.Field):
        raise ConfigurationError(f"{label}.{key[0]} is not a column and cannot be the partition key")
    return field


def key_kind(field: models.Field[Any, Any]) -> KeyKind:
    """How `field`'s bounds are written; raises `ConfigurationError` for a type that has no time."""
    if isinstance(field, UUID7Field):
        return KeyKind.UUID7
    if isinstance(field, models.DateTimeField):
        return KeyKind.TIMESTAMP
    if isinstance(field, models.DateField):
        return KeyKind.DATE
    raise ConfigurationError(
        f"{field.model._meta.label}.{field.name} is a {type(field).__name__}; the partition key must be a "
        "DateTimeField, a DateField or a UUID7Field primary key"
    )


def config_for(model: type[models.Model]) -> PartitionConfig:
    """The model's PartitioningMeta, checked; raises `ConfigurationError` with the reason."""
    field = key_field(model)
    assert field.column is not None
    return make_config(
        model._meta.label,
        field.column,
        key_kind(field),
        options_of(model).attrs,
    )


def config_for_migration(model: type[models.Model]) -> PartitionConfig:
    """The configuration with which a migration makes the first partitions of `model`.

    The key is the historical model's own; everything else is what the code says today, because a
    fresh database wants today's interval and not the one of the day the migration was written.
    """
    field = key_field(model)
    assert field.column is not None
    attrs = options_of(model).attrs
    try:
        current = global_apps.get_model(model._meta.app_label, model._meta.model_name)
    except LookupError:
        current = model
    if is_partitioned(current):
        attrs = {**options_of(current).attrs, "key": attrs["key"]}
    return make_config(model._meta.label, field.column, key_kind(field), attrs)
