"""UUID7Field: a primary key whose values carry their time, so that it can be the partition key itself."""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING, Any

from django.core.exceptions import ValidationError
from django.db import models

from django_scaledb.partitions.uuid7 import uuid7

if TYPE_CHECKING:
    _UUIDField = models.UUIDField[uuid.UUID | str, uuid.UUID]
else:
    _UUIDField = models.UUIDField


class UUID7Field(_UUIDField):
    """A UUID column filled with version 7 values (RFC 9562), in order within a process.

    As the primary key of a `PartitionedModel` it can be the partition key: the database's primary
    key is then ``(id)`` alone, foreign keys to the model are real ones, and a look-up by primary
    key touches one partition. Bounds carry their time in the top 48 bits, in milliseconds.

    Raises `ValidationError` when a value of another version is about to be saved: its leading bits
    are no time, and the row would land in a partition of some arbitrary year.
    """

    description = "UUID, version 7"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("default", uuid7)
        super().__init__(*args, **kwargs)

    def deconstruct(self) -> tuple[str, str, list[Any], dict[str, Any]]:
        name, _, args, kwargs = super().deconstruct()
        if kwargs.get("default") is uuid7:
            del kwargs["default"]
        return name, "django_scaledb.models.UUID7Field", list(args), kwargs

    def pre_save(self, model_instance: models.Model, add: bool) -> Any:
        value = super().pre_save(model_instance, add)
        if add and value is not None and not hasattr(value, "resolve_expression"):
            parsed = self.to_python(value)
            if parsed.version != 7:
                raise ValidationError(
                    f"{model_instance._meta.label}.{self.name} takes version 7 UUIDs, whose first 48 bits "
                    f"are a time; {parsed} is version {parsed.version}. Leave the field empty to have "
                    "one made, or make it with django_scaledb.partitions.uuid7.uuid7().",
                    code="uuid_version",
                )
        return value
