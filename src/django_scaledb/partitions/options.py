"""PartitioningMeta as a class finds it, and the metaclass that collects it.

No model is defined here: the backend, which Django loads in the middle of making the first model
class, can tell partitioned models by this metaclass.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeGuard

from django.db import models
from django.db.models.base import ModelBase

if TYPE_CHECKING:
    from django_scaledb.partitions.models import PartitionedModel

UNKNOWN = object()


class PartitioningOptions:
    """What a model's PartitioningMeta (merged with those of its bases) says, unchecked.

    `key` and `attrs` are as written; `partitions.registry.config_for` checks them. `method` is
    there for django-postgres-extra's tools, which look for it.
    """

    method = "range"

    def __init__(self, attrs: dict[str, Any]) -> None:
        self.attrs = attrs
        key = attrs.get("key", ())
        self.key: tuple[Any, ...] = (key,) if isinstance(key, str) else tuple(key or ())
        self._key_beside_pk: Any = UNKNOWN

    def key_beside_pk(self, model: type[models.Model]) -> models.Field[Any, Any] | None:
        """The key's field when it is another one than the primary key; asked for with every row."""
        if self._key_beside_pk is UNKNOWN:
            field: models.Field[Any, Any] | None = None
            if len(self.key) == 1:
                found = model._meta.get_field(self.key[0])
                if isinstance(found, models.Field) and not found.primary_key:
                    field = found
            self._key_beside_pk = field
        return self._key_beside_pk  # type: ignore[no-any-return]

    @property
    def original_attrs(self) -> dict[str, Any]:
        """What a migration has to know: the key decides the table's shape, the rest does not."""
        return {"key": list(self.key)}


class PartitionedModelBase(ModelBase):
    """Collects PartitioningMeta over all bases, the nearest one last, attribute by attribute."""

    def __new__(cls, name: str, bases: tuple[type, ...], attrs: dict[str, Any], **kwargs: Any) -> Any:
        new_class = super().__new__(cls, name, bases, attrs, **kwargs)
        merged: dict[str, Any] = {}
        for base in reversed(new_class.__mro__):
            declared = vars(base).get("PartitioningMeta")
            if declared is not None:
                merged |= {n: getattr(declared, n) for n in dir(declared) if not n.startswith("_")}
        new_class._partitioning_meta = PartitioningOptions(merged)  # type: ignore[attr-defined]
        return new_class

    def _prepare(cls) -> None:
        from django_scaledb.partitions.querysets import PartitionedManager

        # Where Django would add a manager, because neither the model nor a base of it declares one.
        meta: Any = cls._meta  # type: ignore[attr-defined]
        if not meta.managers and all(field.name != "objects" for field in meta.fields):
            manager: Any = PartitionedManager()
            manager.auto_created = True
            cls.add_to_class("objects", manager)
        super()._prepare()  # type: ignore[misc]


def is_partitioned(model: Any) -> TypeGuard[type[PartitionedModel]]:
    """Whether `model` is a `PartitionedModel`, a historical one included."""
    return isinstance(model, PartitionedModelBase)


def options_of(model: type[models.Model]) -> PartitioningOptions:
    """The merged PartitioningMeta of a partitioned model."""
    assert is_partitioned(model), f"{model} is not a PartitionedModel"
    return model._partitioning_meta
