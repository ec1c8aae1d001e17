"""Partitioned models in the migration state: a ModelState that keeps the partition key."""

from __future__ import annotations

from typing import Any, Self, cast

from django.apps.registry import Apps
from django.db import models
from django.db.migrations.state import ModelState

from django_scaledb.partitions.models import PartitionedModel
from django_scaledb.partitions.options import PartitioningOptions, is_partitioned


class PartitionedModelState(ModelState):
    """A ModelState that renders into a `PartitionedModel`.

    `partitioning_options` holds ``{"key": [field name]}``: only what gives the table its shape.
    Intervals, retention and the rest live in the code, and changing them is no migration.
    """

    partitioning_options: dict[str, Any]

    def __init__(self, *args: Any, partitioning_options: dict[str, Any] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.partitioning_options = dict(partitioning_options or {})

    @classmethod
    def from_model(cls, model: type[models.Model], exclude_rels: bool = False) -> Self:
        state = cast(Self, super().from_model(model, exclude_rels))
        assert is_partitioned(model)
        state.partitioning_options = model._partitioning_meta.original_attrs
        return state

    def clone(self) -> Self:
        state = cast(Self, super().clone())
        state.partitioning_options = dict(self.partitioning_options)
        return state

    def render(self, apps: Apps) -> Any:
        """The historical model: Django leaves abstract bases out of a state, so ours is put back."""
        plain = self.bases
        self.bases = tuple(PartitionedModel if base is models.Model else base for base in plain)
        try:
            model = super().render(apps)
        finally:
            self.bases = plain
        model._partitioning_meta = PartitioningOptions(self.partitioning_options)
        return model
